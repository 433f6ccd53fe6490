"""The command line of the experiments."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import pkgutil
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import bench.paper
from bench import measure
from bench.paper import data
from bench.paper.experiment import Claim, Experiment, Paused, Report, Settings
from bench.paper.store import ResumeError, Store, replace

_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
# What `all` begins with: the longest, so that no process is left with one of them at the end; the others by name.
_ORDER = ("lstm", "augmentation", "overfit_validation", "distillation", "baselines")
UNFINISHED = 3
Outcome = tuple[int, list[Claim]]
"""The exit status, and what was claimed."""


def experiments() -> dict[str, Experiment]:
    """All modules of the package that have an ``EXPERIMENT``, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(bench.paper.__path__) if module.name != "__main__")
    modules = [importlib.import_module(f"bench.paper.{name}") for name in names]
    found = {m.EXPERIMENT.name: m.EXPERIMENT for m in modules if hasattr(m, "EXPERIMENT")}
    return {name: found[name] for name in sorted(found, key=lambda name: (_ORDER + (name,)).index(name))}


def main(arguments: Sequence[str] | None = None, only: Experiment | None = None) -> int:
    """Parse the command line and run it.

    Args:
        arguments: The arguments; by default those of the process.
        only: The experiment of ``python -m bench.paper.NAME``; without, the first argument names it.

    Returns:
        The exit status: 0, 1 for an error, 3 if the time limit came first.
    """
    missing = [name for module, name in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(f"{', '.join(missing)} not installed: pip install '.[demo]'")
    known = {only.name: only} if only else experiments()
    options = _parser(known, only).parse_args(arguments)
    chosen = list(known.values()) if only or options.name == "all" else [known[options.name]]
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return _refuse(f"--device {options.device}: {str(error).splitlines()[0]}")
    deadline = None if options.time_limit is None else time.monotonic() + options.time_limit
    chosen = [e for e in chosen if len(chosen) == 1 or (options.data or e.bundled) in e.datasets]
    if len(chosen) == 1:
        return _one(chosen[0], options, device, deadline)[0]
    start = time.perf_counter()
    outcomes, seconds = zip(*_several(chosen, options, deadline), strict=True)
    print(f"\n== Summary: {time.perf_counter() - start:.0f} s, data {options.data or 'at hand'}\n")
    summary = [
        {"system": e.name, "claim": c.paper, "ours": c.ours, "reproduced": _word(c.reproduced)}
        for e, (_, claims) in zip(chosen, outcomes, strict=True)
        for c in claims
    ]
    if summary:
        print(left_table(summary))
        told = [row["reproduced"] for row in summary]
        print(f"\n{told.count('yes')} of {len(told)} claims reproduced, {told.count('NO')} not")
    took = ", ".join(f"{e.name} {s:.0f}" for e, s in zip(chosen, seconds, strict=True))
    print(f"\nSeconds: {took}")
    statuses = [status for status, _ in outcomes]
    unfinished = [e.name for e, status in zip(chosen, statuses, strict=True) if status]
    if unfinished:
        print(f"\nNot in the table: {', '.join(unfinished)}, see above")
    return 1 if 1 in statuses else max(statuses, default=0)


def _several(
    chosen: list[Experiment], options: argparse.Namespace, deadline: float | None
) -> list[tuple[Outcome, float]]:
    """Run experiments side by side, each in a process, and print what one says once it is done; their seconds."""
    jobs = min(options.jobs or os.cpu_count() or 1, len(chosen))
    # The clock that a deadline is read from is the machine's, so that it holds in every process.
    arguments = [(e.name, options, deadline) for e in chosen]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        outcomes = []
        for outcome, text, seconds in pool.imap(_in_process, arguments, chunksize=1):
            print(text, end="", flush=True)
            outcomes.append((outcome, seconds))
        return outcomes


def _in_process(arguments: tuple[str, argparse.Namespace, float | None]) -> tuple[Outcome, str, float]:
    name, options, deadline = arguments
    start = time.perf_counter()
    said = io.StringIO()
    outcome: Outcome = 1, []
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            outcome = _one(experiments()[name], options, torch.device(options.device), deadline)
        except Exception:
            # One that fails must not take the others with it.
            traceback.print_exc()
    return outcome, said.getvalue(), time.perf_counter() - start


def _one(experiment: Experiment, options: argparse.Namespace, device: torch.device, deadline: float | None) -> Outcome:
    """Run one experiment: its exit status and its claims."""
    name = options.data or experiment.bundled
    if name not in experiment.datasets:
        return _refuse(f"--data: {experiment.name} takes {', '.join(experiment.datasets)}, got {name}"), []
    # Models of a few thousand weights run several times faster on one thread than on two.
    if options.threads or name == experiment.bundled:
        torch.set_num_threads(options.threads or 1)
    seeds = options.seeds or (experiment.quick_seeds if options.quick else experiment.seeds)
    settings = Settings(name, options.data_dir, options.download, device, seeds, options.quick, options.out, deadline)
    try:
        report = run(experiment, settings, fresh=options.fresh, save=options.save_results)
    except (data.DataError, ResumeError) as error:
        return _refuse(str(error)), []
    except OSError as error:
        return _refuse(f"cannot write to --out {options.out}: {error}"), []
    return (UNFINISHED, []) if report is None else (0, report.claims)


def run(experiment: Experiment, settings: Settings, *, fresh: bool = False, save: bool = False) -> Report | None:
    """Run what is still to run, print the report and write it.

    Args:
        experiment: What to run.
        settings: How.
        fresh: Forget what was run before.
        save: Also copy results to ``bench/results/paper``.

    Returns:
        The report; None if the time limit came first.

    Raises:
        DataError: If the data are not there.
        ResumeError: If earlier results belong to other settings.
    """
    print(f"\n== {experiment.name}: {experiment.about}", flush=True)
    if experiment.not_yet_run:
        print(f"   Not yet run: {experiment.not_yet_run}")
    store = Store(experiment, settings, fresh=fresh)
    experiment.load(settings)
    for arm, seed in store.todo():
        if settings.expired or not _finished(store, arm, seed):
            total = len(store.arms) * settings.seeds
            print(f"   {total - len(store.todo())} of {total} runs done; the same command goes on from here")
            return None
    results = store.results()
    report = experiment.report(results)
    print(f"\n{measure.table(report.rows)}\n")
    if report.legend:
        print(textwrap.fill(report.legend, 120) + "\n")
    for claim in report.claims:
        print(f"   [{_word(claim.reproduced)}] {claim.paper}: {claim.ours}")
    written = [store.path, *_write(store, report)]
    if save:
        folder = measure.RESULTS / "paper"
        folder.mkdir(parents=True, exist_ok=True)
        for path in written:
            replace(folder / path.name, lambda file, path=path: file.write_bytes(path.read_bytes()))
        written = [folder / path.name for path in written]
    print("   wrote " + ", ".join(map(str, written)), flush=True)
    return report


def left_table(rows: list[dict[str, object]], width: int = 52) -> str:
    """Rows of equal keys as text, aligned to the left; cells longer than ``width`` go on in the next line."""
    cells = [[textwrap.wrap(cell, width) or [""] for cell in line] for line in measure.cells(rows)]
    widths = [max(len(part) for line in cells for part in line[i]) for i in range(len(cells[0]))]
    lines: list[Sequence[str]] = [part for line in cells for part in itertools.zip_longest(*line, fillvalue="")]
    lines.insert(max(map(len, cells[0])), ["-" * w for w in widths])
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@contextlib.contextmanager
def _reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers by the seed, and no clock that chooses among engines, which round differently."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Costs a pass over every new tensor, and is for finding reads of what was never written.
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


def _finished(store: Store, arm: str, seed: int) -> bool:
    start = time.perf_counter()
    with _reproducible(store.settings.device, seed):
        try:
            record = store.experiment.run(store.job(arm, seed))
        except Paused:
            return False
    store.add(arm, seed, record, time.perf_counter() - start)
    return True


def _write(store: Store, report: Report) -> list[Path]:
    out, written = store.settings.out, []
    for name, figure in report.figures.items():
        path = out / f"{store.stem}_{name}.png"
        replace(path, lambda file, figure=figure: figure.savefig(file, dpi=100, format="png"))
        written.append(path)
    commits: dict[str, list[str]] = {}
    for environment in store.content["environments"]:
        where = ", ".join(f"{k} {v}" for k, v in environment.items() if k != "commit")
        commits.setdefault(where, []).append(str(environment.get("commit")))
    environments = [f"{where}, commit {' '.join(found)}" for where, found in commits.items()]
    head, *body = measure.cells(report.rows)
    lines = [f"# {store.experiment.name}, {store.content['data']}", "", store.experiment.about, ""]
    lines += [f"{store.settings.seeds} seed{'s' if store.settings.seeds > 1 else ''}. {'; '.join(environments)}.", ""]
    lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
    lines += ["", report.legend] if report.legend else []
    lines += ["", "| claim | ours | reproduced |", "|---|---|---|"]
    lines += [f"| {c.paper} | {c.ours} | {_word(c.reproduced)} |" for c in report.claims]
    lines += [line for path in written for line in ("", f"![{path.stem}]({path.name})")]
    page = out / f"{store.stem}.md"
    replace(page, lambda file: file.write_text("\n".join(lines) + "\n"))
    return [page, *written]


def _word(reproduced: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not shown"}[reproduced]


def _refuse(message: str) -> int:
    print(f"bench.paper: {message}", file=sys.stderr)
    return 1


def _parser(known: dict[str, Experiment], only: Experiment | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.paper.{only.name}" if only else "python -m bench.paper",
        description=only.about if only else "\n".join(f"{e.name}: {e.about}" for e in known.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not only:
        parser.add_argument("name", choices=[*known, "all"], help="the experiment")
    names = sorted({name for experiment in known.values() for name in experiment.datasets})
    parser.add_argument("--data", choices=names, help="data set (default: one that needs no files)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with its files")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch what is not there")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="number of seeds")
    parser.add_argument("--quick", action="store_true", help="smaller settings")
    parser.add_argument("--out", type=Path, default=Path("out/paper"), metavar="DIR", help="folder for results")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before, instead of going on")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop then; the same command goes on")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: 1 without files)")
    if not only:
        parser.add_argument("--jobs", type=_positive, metavar="N", help="processes for `all` (default: one per core)")
    parser.add_argument("--save-results", action="store_true", help="also write to bench/results/paper")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value
