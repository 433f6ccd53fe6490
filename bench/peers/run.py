"""One task on one problem by every package: checked, then timed in turn."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata

import torch

from bench.measure import interleave, median, ratio
from bench.peers import OURS, PEERS, adapter
from bench.peers.problems import Problem
from bench.peers.tasks import Task, Unsupported, concrete, error_of, tolerance

OK = "ok"
# Seconds up to which a call follows another one of the same package, and so is timed as in a loop of its own.
_SHORT = 0.2


def check(problem: Problem, task: Task, peer: str) -> tuple[Callable[[], object] | None, int, float | None, str]:
    """What runs the task, its steps, the error of its result, and ``"ok"`` or why it is not to be timed."""
    steps = task.steps
    try:
        module = adapter(peer)
        methods = getattr(module, "TO_ERROR", module.METHODS) if task.to_error else module.METHODS
        chosen = concrete(problem, task, methods)
        steps = chosen.steps
        run = module.make(problem, chosen)
        with _quiet():
            for _ in range(3 if peer == OURS else 2):  # packages compile in the first call, ours chooses in the second
                result = run()
    except ImportError as error:
        return None, steps, None, f"not installed: {error}"
    except Unsupported as error:
        return None, steps, None, f"unsupported: {error}"
    except Exception as error:  # a failing peer is a result
        lines = str(error).strip().splitlines() or [""]
        return None, steps, None, f"failed: {type(error).__name__}: {lines[0][:160]}"
    error = error_of(problem, task if task.to_error else chosen, result)
    if not error <= tolerance(task):
        return None, steps, error, f"wrong: error {error:.1e}, allowed {tolerance(task):.0e}"
    return run, steps, error, OK


def compare(
    problem: Problem,
    task: Task,
    peers: Iterable[str] = tuple(PEERS),
    rounds: int = 7,
    budget: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, object]]:
    """Rows of a table: how many times faster ours is than each package; only correct results are timed."""
    rows, runs = [], {}
    for peer in dict.fromkeys([OURS, *peers]):
        run, steps, error, status = check(problem, task, peer)
        row = {"problem": problem.name, "task": task.name, "peer": peer, "steps": steps, "error": error}
        rows.append(row | dict.fromkeys(("times", "low", "high", "ms", "gradients"), None) | {"status": status})
        if run is not None:
            runs[peer] = run
    if OURS not in runs:
        return rows  # no timing on red
    leaves = problem.leaves

    def gradient() -> object:
        return torch.autograd.grad(problem.train_loss(problem.params), leaves)

    with _quiet():
        seconds = interleave({**runs, "gradient": gradient}, rounds + 1, 0, clock=clock, budget=budget, twice=_SHORT)
    seconds = {name: values[1:] for name, values in seconds.items()}  # of the first, nobody knew how long it takes
    unit = median(seconds["gradient"])
    for row in rows:
        if row["peer"] in runs:
            times, low, high = ratio(seconds, row["peer"], OURS)
            middle = median(seconds[row["peer"]])
            row.update(times=times, low=low, high=high, ms=1e3 * middle, gradients=middle / unit)
    return rows


def merged(runs: list[list[dict[str, object]]]) -> list[dict[str, object]]:
    """Rows of several processes as one: geometric means, and the lowest and the highest quartile of any."""
    rows = []
    for same in zip(*runs, strict=True):
        row = next((row for row in same if row["status"] != OK), same[0])
        timed = [row for row in same if row["times"] is not None]
        if row["status"] == OK and timed:
            means = {
                key: math.exp(sum(math.log(r[key]) for r in timed) / len(timed))  # type: ignore[arg-type]
                for key in ("times", "ms", "gradients")
            }
            low, high = min(r["low"] for r in timed), max(r["high"] for r in timed)
            row = row | means | {"low": low, "high": high, "error": max(r["error"] for r in timed)}
        rows.append(row | {"processes": len(same)})
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nobody need be told that a fixed number of steps did not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name, (_, distribution) in PEERS.items():
        if distribution in ("hypergrad_ext", "torch", "hypergrad"):  # ours, torch's own, and one without a version
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(distribution)
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["jax"] = metadata.version("jax")
    return found
