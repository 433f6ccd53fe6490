r"""Regularise a language model by hypergradients, against no tuning, searches and self-tuning networks.

    python -m bench.paper.lstm                                            Python's help pages, minutes on a CPU
    python -m bench.paper.lstm --protocol medium --data-dir ptb           a real text on a CPU, ten minutes a method
    python -m bench.paper.lstm --protocol full --data-dir ptb --device cuda --time-limit 570 \
        --set precision=tf32 --set cuda_graphs=true                       the paper's (not yet run on a GPU)

State is kept every two minutes and when the time limit comes (exit status 3); the same command then goes on, bit by
bit as if nothing had happened. `bench/paper/lstm/full.sh` repeats it until all is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.paper.lstm import protocol, report, text

PROTOCOLS = {"small": protocol.SMALL, "medium": protocol.MEDIUM, "full": protocol.FULL}
KEEP_EVERY, UNFINISHED = 120.0, 3


class Paused(Exception):
    """The time limit came."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is still to run, then print and write the report.

    Returns:
        The exit status: 0, 1 for an error, 3 if the time limit came first.
    """
    options = _parser().parse_args(arguments)
    deadline = math.inf if options.time_limit is None else time.monotonic() + options.time_limit
    try:
        rule = _with(PROTOCOLS[options.protocol], [*options.set, f"device={options.device}"])
        torch.empty(0, device=rule.device)
        corpus = text.help_pages() if options.data_dir is None else text.read(options.data_dir)
        methods = rule.methods.split(",")
        for method in methods:
            if method not in protocol.METHODS:
                raise ValueError(f"methods: expected some of {', '.join(protocol.METHODS)}, got {method!r}")
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"bench.paper.lstm: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if rule.device == "cpu":
        torch.set_num_threads(options.threads)
    folder = options.out / f"lstm_{options.protocol}_{corpus.name}"
    folder.mkdir(parents=True, exist_ok=True)
    what = {
        "protocol": {k: v for k, v in dataclasses.asdict(rule).items() if k != "methods"},
        "text": text.fingerprint([corpus.train, corpus.valid, corpus.test]),
        "seed": options.seed,
    }
    records: dict[str, Any] = {}
    for method in methods:
        try:
            records[method] = _record(corpus, rule, method, what, folder / f"{method}_{options.seed}", deadline)
        except Paused:
            print(f"{method}: paused; the same command goes on from here")
            return UNFINISHED
        except (ValueError, ImportError) as error:
            print(f"bench.paper.lstm: {error}", file=sys.stderr)
            return 1
    content = {"environment": {**measure.environment(), "threads": torch.get_num_threads()}, **what, "records": records}
    for target in (options.out, *([measure.RESULTS / "paper"] if options.save_results else [])):
        written = report.write(content, target, f"lstm_{options.protocol}_{corpus.name}")
        print("wrote " + ", ".join(map(str, written)))
    return 0


def _record(
    corpus: text.Corpus, rule: protocol.Protocol, method: str, what: dict[str, Any], stem: Path, deadline: float
) -> dict[str, Any]:
    """What a method found, now or earlier; keeps its state on the way."""
    done, kept = stem.with_suffix(".json"), stem.with_suffix(".pt")
    if done.exists():
        earlier = json.loads(done.read_text())
        _same(done, what, earlier["what"])
        return earlier["record"]
    run = protocol.make(corpus, rule, method, what["seed"])
    if kept.exists():
        saved = torch.load(kept, map_location=rule.device, weights_only=True)
        _same(kept, what, json.loads(saved["what"]))
        run.load_state_dict(saved["run"])
    last = time.monotonic()

    def keep() -> None:
        _replace(kept, lambda path: torch.save({"what": json.dumps(what), "run": run.state_dict()}, path))

    def each_step() -> None:
        nonlocal last
        now = time.monotonic()
        if now >= deadline or now - last >= KEEP_EVERY:
            keep()
            last = now
        if now >= deadline:
            raise Paused

    protocol.train(run, rule, each_step, lambda line: print(line, flush=True))
    record = {key: report.plain(value) for key, value in protocol.record(run).items()}
    _replace(done, lambda path: path.write_text(json.dumps({"what": what, "record": record})))
    kept.unlink(missing_ok=True)
    return record


def _same(path: Path, what: dict[str, Any], earlier: dict[str, Any]) -> None:
    now = {**json.loads(json.dumps(what["protocol"])), "text": what["text"]}
    before = {**earlier["protocol"], "text": earlier["text"]}
    differ = sorted(key for key in now | before if now.get(key) != before.get(key))
    if differ:
        raise ValueError(f"{path}: was run with another {', '.join(differ)}; choose another --out, or remove it")


def _with(rule: protocol.Protocol, changes: Sequence[str]) -> protocol.Protocol:
    """The protocol with ``NAME=VALUE`` in place of its own."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(rule)}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds:
            raise ValueError(f"--set: expected a name out of {', '.join(kinds)}, got {name!r}")
        try:
            values[name] = value if kinds[name] is str else json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--set {name}: expected a number, true, false or null, got {value!r}") from error
    return dataclasses.replace(rule, **values)


def _replace(path: Path, write: Any) -> None:
    """Let ``write`` fill a new file, and put it in the place of ``path`` in one step."""
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.lstm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="small", help="sizes and budget (default: small)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a number of it")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop then; the same command goes on")
    parser.add_argument("--out", type=Path, default=Path("out/paper"), metavar="DIR", help="folder for results")
    parser.add_argument("--save-results", action="store_true", help="also write to bench/results/paper")
    return parser


if __name__ == "__main__":
    sys.exit(main())
