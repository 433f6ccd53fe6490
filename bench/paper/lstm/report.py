"""Table, claims and figures of a comparison."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import measure
from bench.paper.lstm.model import NAMES, PENALTIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "none": "no regularisation",
    "fixed": "fixed as at the start",
    "seven": "ours, 7",
    "many": "ours, many",
    "identity": "7 by the identity",
    "stn": "self-tuning network",
    "grid": "grid search",
    "random": "random search",
    "bayesian": "Bayesian optimisation",
}
# Pairs of methods, and what the paper found for them on Penn Treebank (validation perplexity).
PAPER = {
    ("seven", "fixed"): "69.22 against 75.72",
    ("many", "fixed"): "68.18 against 75.72",
    ("many", "seven"): "68.18 against 69.22",
    ("seven", "grid"): "69.22 against 97.32",
    ("seven", "random"): "69.22 against 84.81",
    ("seven", "bayesian"): "69.22 against 72.13",
    ("seven", "stn"): "69.22 against 70.30",
}


# Perplexities of one seed that are this close are level.
_LEVEL = 0.02


def plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null, six digits are enough."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def rows(records: dict[str, Any]) -> list[dict[str, object]]:
    """A line per method."""
    return [
        {
            "method": TITLES[method],
            "validation perplexity": _number(record["best_valid"]),
            "test perplexity": _number(record["test"]),
            "inner steps": record["steps"],
            "seconds": round(record["total_seconds"]),
            "failed solves": record["failed_solves"],
        }
        for method, record in records.items()
    ]


def claims(records: dict[str, Any]) -> list[dict[str, object]]:
    """Who beats whom, in the paper and here."""
    lines: list[dict[str, object]] = []
    for (ours, theirs), paper in PAPER.items():
        if ours in records and theirs in records:
            a, b = (records[m]["best_valid"] or math.inf for m in (ours, theirs))
            lines.append(
                {
                    "claim": f"{TITLES[ours]} beats {TITLES[theirs]}",
                    "paper": paper,
                    "here": f"{a:.2f} against {b:.2f}, x {a / b:.3f}",
                    "reproduced": "level" if abs(a / b - 1) <= _LEVEL else "yes" if a < b else "NO",
                }
            )
    return lines


def write(content: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """JSON, a page, and figures where there is matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    records = content["records"]
    data, page = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(content) + "\n")
    print(f"\n{measure.table(rows(records))}\n")
    found = claims(records)
    if found:
        print(measure.table(found))
    drawn = []
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: pip install matplotlib")
    else:
        for name, figure in figures(records).items():
            drawn.append(folder / f"{stem}_{name}.png")
            figure.savefig(drawn[-1], dpi=100)
    budget = content["protocol"]["seconds"]
    equal = f"{budget:g} s each" if budget else f"{content['protocol']['steps']} inner steps each"
    lines = [f"# {stem}", "", ", ".join(f"{k} {v}" for k, v in content["environment"].items()), ""]
    lines += [
        f"Seed {content['seed']}; {equal}; text {content['text']}. On one CPU thread, seconds are the thread's own."
    ]
    for table in (rows(records), found):
        if table:
            head, *body = measure.cells(table)
            lines += ["", *(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))]
    lines += [line for path in drawn for line in ("", f"![{path.stem}]({path.name})")]
    page.write_text("\n".join(lines) + "\n")
    return [data, page, *drawn]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def figures(records: dict[str, Any]) -> dict[str, Figure]:
    """Perplexity over time and over steps; the hyperparameters over time."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4.2), layout="constrained")
    caption = "Best validation perplexity so far. A search starts anew with every trial."
    drawing.supxlabel(caption, x=0.01, ha="left", fontsize=9.5)
    for axis, key in zip(drawing.subplots(1, 2), ("seconds", "step"), strict=True):
        for method, record in records.items():
            values = [math.inf if value is None else value for value in record["valid"]]
            axis.plot(record[key], list(itertools.accumulate(values, min)), label=TITLES[method])
        axis.set(yscale="log", xlabel="time / s" if key == "seconds" else "inner steps", ylabel="validation perplexity")
        for part in ("major", "minor"):  # perplexities as people write them, not as powers of ten
            getattr(axis.yaxis, f"set_{part}_formatter")("{x:.0f}")
        axis.legend(fontsize=8)
    drawn = {"perplexity": drawing}
    if "seven" in records:
        drawing = drawn["hyperparameters"] = Figure(figsize=(10, 4.2), layout="constrained")
        drawing.supxlabel("The seven hyperparameters while they are tuned.", x=0.01, ha="left", fontsize=9.5)
        axes, record = drawing.subplots(1, 2), records["seven"]
        for name in NAMES:
            axes[int(name in PENALTIES)].plot(record["seconds"], record[f"hyper_{name}"], label=name)
        for axis, label in zip(axes, ("rate of dropout", "penalty"), strict=True):
            axis.set(xlabel="time / s", ylabel=label)
            axis.legend(fontsize=8)
        axes[1].set_yscale("log")
    return drawn
