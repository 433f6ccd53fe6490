"""The comparison as an experiment among the others; ``python -m bench.paper.lstm`` has all settings."""

from __future__ import annotations

import dataclasses
import time

from bench.paper.data import DataError
from bench.paper.experiment import Claim, Experiment, Job, Record, Report, Settings
from bench.paper.lstm import protocol, report, text
from bench.paper.lstm.protocol import Protocol
from bench.paper.store import Results

KEEP_EVERY = 120.0


def _load(settings: Settings) -> text.Corpus:
    if settings.data == "help":
        return text.help_pages()
    if settings.data_dir is None:
        raise DataError("--data-dir: expected a folder with train.txt, valid.txt and test.txt, got none")
    try:
        return text.read(settings.data_dir)
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from error


def _protocol(settings: Settings) -> Protocol:
    if settings.data == "help":
        if settings.quick:
            return dataclasses.replace(protocol.SMALL, methods="none,fixed,seven", steps=2000)
        return dataclasses.replace(protocol.SMALL, methods="none,fixed,seven,many,stn,grid,random")
    rule = protocol.FULL if settings.device.type == "cuda" else protocol.MEDIUM
    if settings.quick:
        rule = dataclasses.replace(rule, seconds=120.0)
    return dataclasses.replace(rule, device=str(settings.device))


def _run(job: Job) -> Record:
    run = protocol.make(_load(job.settings), job.protocol, job.arm, job.seed)
    saved = job.restore()
    if saved is not None:
        run.load_state_dict(saved)
    last = time.monotonic()

    def each_step() -> None:
        nonlocal last
        job.pause_if_expired(run.state_dict)
        if time.monotonic() - last >= KEEP_EVERY:
            job.save(run.state_dict())
            last = time.monotonic()

    protocol.train(run, job.protocol, each_step, lambda line: print("   " + line, flush=True))
    return protocol.record(run)


def _report(results: Results) -> Report:
    """The first seed's table and figures."""
    records = {arm: {key: report.plain(value) for key, value in results.of(arm)[0].items()} for arm in results.arms}
    verdicts = {"yes": True, "NO": False}
    claims = [
        Claim(f"{line['claim']} (paper: {line['paper']})", str(line["here"]), verdicts.get(str(line["reproduced"])))
        for line in report.claims(records)
    ]
    return Report(report.rows(records), claims, report.figures(records))


EXPERIMENT = Experiment(
    name="lstm",
    about="Regularisation of an LSTM language model: seven hyperparameters or millions, by hypergradients.",
    protocol=_protocol,
    arms=lambda rule: rule.methods.split(","),
    run=_run,
    report=_report,
    datasets=("help", "text"),
    bundled="help",
    load=_load,
    seeds=1,
    quick_seeds=1,
    not_yet_run="two layers of 650 units on a GPU (--data text --device cuda, or bench/paper/lstm/full.sh)",
)
