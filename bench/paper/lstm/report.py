"""Tables and figures of the comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.paper.experiment import Claim, Report
from bench.paper.figures import figure
from bench.paper.lstm.model import NAMES, PENALTIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.paper.store import Results

TITLES = {
    "none": "no regularisation",
    "fixed": "fixed at the start's",
    "seven": "ours, 7",
    "many": "ours, many",
    "stn": "self-tuning network",
    "grid": "grid search",
    "random": "random search",
    "bayesian": "Bayesian optimisation",
}


def report(results: Results) -> Report:
    """Perplexities of every method, at equal time or equal steps."""
    rows: list[dict[str, object]] = [
        {
            "method": TITLES[arm],
            "validation perplexity": results.mean(arm, "best_valid"),
            "test perplexity": results.mean(arm, "test"),
            "inner steps": int(results.mean(arm, "steps")),
            "seconds": round(results.mean(arm, "total_seconds"), 1),
            "failed solves": int(results.mean(arm, "failed_solves")),
        }
        for arm in results.arms
    ]
    figures = {"perplexity": _perplexity(results)}
    if "seven" in results.arms:
        figures["hyperparameters"] = _hyperparameters(results)
    return Report(rows, _claims(results), figures)


def _claims(results: Results) -> list[Claim]:
    claims = []
    paper = {
        ("seven", "fixed"): "7 tuned beat the same start untuned (69.22 against 75.72)",
        ("many", "fixed"): "many tuned beat the same start untuned (68.18 against 75.72)",
        ("many", "seven"): "many tuned beat 7 tuned (68.18 against 69.22)",
        ("seven", "grid"): "7 tuned beat grid search (69.22 against 97.32)",
        ("seven", "random"): "7 tuned beat random search (69.22 against 84.81)",
        ("seven", "bayesian"): "7 tuned beat Bayesian optimisation (69.22 against 72.13)",
        ("seven", "stn"): "7 tuned beat self-tuning networks (69.22 against 70.30)",
    }
    for (ours, theirs), words in paper.items():
        if ours in results.arms and theirs in results.arms:
            a, b = results.mean(ours, "best_valid"), results.mean(theirs, "best_valid")
            claims.append(Claim(words, f"{a:.2f} against {b:.2f} (x {a / b:.3f})", a < b))
    return claims


def _perplexity(results: Results) -> Figure:
    drawing = figure(
        2,
        "Best validation perplexity so far, median over seeds: over the time that a method had, and over its "
        "inner steps. Searches start anew with every trial.",
    )
    for axis, key in zip(drawing.subplots(1, 2), ("seconds", "step"), strict=True):
        for arm in results.arms:
            x = np.nanmedian(results.values(arm, key), 0)
            best = np.fmin.accumulate(results.values(arm, "valid"), axis=1)
            axis.plot(x, np.nanmedian(best, 0), label=TITLES[arm])
        axis.set_yscale("log")
        axis.set_xlabel("time / s" if key == "seconds" else "inner steps")
        axis.set_ylabel("validation perplexity")
    axis.legend(fontsize=8)
    return drawing


def _hyperparameters(results: Results) -> Figure:
    drawing = figure(2, "The seven hyperparameters while they are tuned: the first seed.")
    axes = drawing.subplots(1, 2)
    record = results.of("seven")[0]
    for name in NAMES:
        axis = axes[name in PENALTIES]
        axis.plot(record["step"], record[f"hyper_{name}"], label=name)
    for axis, label in zip(axes, ("rate of dropout", "penalty"), strict=True):
        axis.set_xlabel("inner steps")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    return drawing
