"""Whether two runs of the suite agree within the spread they print: ``python -m bench agree FOLDER``.

``FOLDER`` holds the results of another run on the same machine, such as a copy of ``bench/results`` made before the
suite ran again. Every ratio has quartiles: two runs agree on it if the ranges between them overlap.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from bench.measure import RESULTS, case

_SPREAD = re.compile(r"([\d.e+]+) \(([\d.e+]+)-([\d.e+]+)\)")


@dataclass(frozen=True)
class Ratio:
    """One ratio of a run: its median and quartiles."""

    middle: float
    low: float
    high: float


def ratios(path: Path) -> dict[str, Ratio]:
    """The ratios of a file of results, by what they are about."""
    found: dict[str, Ratio] = {}
    for row in json.loads(path.read_text()).get("rows", ()):
        if isinstance(row.get("times"), float) and row["low"] != row["high"]:
            about = f"{row['problem']}, {row['task']}, {row['peer']}"
            found[about] = Ratio(row["times"], row["low"], row["high"])
        for column, value in row.items():
            spread = _SPREAD.fullmatch(value) if isinstance(value, str) else None
            if spread:
                found[f"{case(row)}, {column}"] = Ratio(*map(float, spread.groups()))
    return found


def gap(a: Ratio, b: Ratio) -> float:
    """The factor between the nearer ends of two ranges; 1 where they overlap."""
    return max(1.0, a.low / b.high, b.low / a.high)


def main() -> None:
    """Print how many agree, and those that do not, the worst first."""
    parser = argparse.ArgumentParser(prog="python -m bench agree", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results of the other run are")
    parser.add_argument(
        "files",
        nargs="*",
        default=[],
        metavar="FILE",
        help="names of results to compare (default: all that are in both)",
    )
    options = parser.parse_args()
    there = sorted(path.name for path in options.folder.glob("*.json"))
    names = options.files or [name for name in there if (RESULTS / name).exists()]
    if not names:
        parser.error(f"folder: expected results with the names of those in {RESULTS}, got none in {options.folder}")
    for name in names:
        ours, theirs = ratios(RESULTS / name), ratios(options.folder / name)
        both = sorted(ours.keys() & theirs.keys(), key=lambda about: -gap(ours[about], theirs[about]))
        apart = [about for about in both if gap(ours[about], theirs[about]) > 1]
        print(f"{name}: {len(both) - len(apart)} of {len(both)} agree")
        for about in apart:
            a, b = ours[about], theirs[about]
            print(f"  {gap(a, b):.2f} apart: {about}: {a.middle:.3g} and {b.middle:.3g}")
