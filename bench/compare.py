"""Two commits against each other: ``python -m bench compare --base REV [--quick] [--problem P]``.

The base is checked out and built aside; processes of both run in turn, and the same problems are timed in each, on
one thread by the process's own clock. The noise is the most that neighbouring runs of one commit differ by. Ends with
status 1 where the working tree is slower by more than that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Below this, a difference is not told from how code lies in memory.
LEAST = 0.03
CASES = ("neumann20", "cg20", "hypergradient")

Seconds = dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """One case of both commits.

    Attributes:
        case: Problem and task.
        times: How many times faster the working tree is, median over pairs of runs.
        noise: The most that neighbouring runs of one commit differed by.
        judgement: ``"faster"``, ``"slower"``, ``"level"``, or why there is none.
    """

    case: str
    times: float
    noise: float
    judgement: str


def judge(base: list[Seconds], head: list[Seconds]) -> list[Verdict]:
    """Verdicts from runs of both that were made in turn."""
    found = []
    for case in head[0]:
        if any(case not in run for run in (*base, *head)):
            found.append(Verdict(case, float("nan"), float("nan"), "not in both"))
            continue
        times = statistics.median(b[case] / h[case] for b, h in zip(base, head, strict=True))
        # One commit against itself, in neighbouring runs: no change would make ratios of this size.
        same = [abs(a[case] / b[case] - 1) for runs in (base, head) for a, b in zip(runs, runs[1:], strict=False)]
        noise = max(LEAST, *same)
        change = "faster" if times > 1 + noise else "slower" if 1 / times > 1 + noise else "level"
        found.append(Verdict(case, times, noise, change))
    return found


def overlay(tree: Path, where: Path) -> Path:
    """A folder with the package of a checkout, and nothing else of it."""
    package = where / "hypergrad_ext"
    package.mkdir(parents=True)
    for part in (tree / "hypergrad_ext").iterdir():
        (package / part.name).symlink_to(part.resolve())
    (package / "kernels").symlink_to((tree / "kernels").resolve())
    return where


def run(package: Path, arguments: list[str]) -> Seconds:
    """Median seconds per case, by a process that has this package and the benchmark of the working tree.

    Raises:
        RuntimeError: If it fails.
    """
    path = os.pathsep.join([str(package), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", "-m", "bench.compare", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=package, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(f"{package.name} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(base: Path, head: Path, rounds: int, arguments: list[str]) -> list[Verdict]:
    """Run both so many times, every other round in another order, and judge."""
    found: dict[Path, list[Seconds]] = {base: [], head: []}
    for r in range(rounds):
        for package in (base, head) if r % 2 == 0 else (head, base):
            found[package].append(run(package, arguments))
    return judge(found[base], found[head])


def work(problems: list[str], tasks: list[str], budget: float) -> Seconds:
    """Time our package, checked first, on every case."""
    import torch

    import hypergrad_ext
    from bench.measure import clock_for, interleave, median
    from bench.peers import OURS
    from bench.peers.problems import load
    from bench.peers.run import check
    from bench.peers.tasks import TASKS

    print(f"hypergrad_ext of {Path(hypergrad_ext.__file__).parent}")
    torch.set_num_threads(1)
    found = {}
    for problem in problems:
        for task in tasks:
            once, _, _, status = check(load(problem), TASKS[task], OURS)
            if once is None:
                print(f"{problem} {task}: {status}", file=sys.stderr)
                raise SystemExit(f"no timing on red: {problem} {task}: {status}")
            found[f"{problem} {task}"] = median(interleave({"": once}, 15, 2, clock=clock_for(1), budget=budget)[""])
    return found


def checkout(revision: str, where: Path) -> Path:
    """A revision as a working tree of its own, built; removed by `git worktree remove`."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(where), revision], check=True, cwd=ROOT)
    if subprocess.run(["git", "diff", "--quiet", revision, "--", "csrc", "setup.py"], cwd=ROOT).returncode == 0:
        for built in (ROOT / "hypergrad_ext").glob("_C*.so"):  # the same sources
            shutil.copy2(built, where / "hypergrad_ext")
        return where
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, check=True, cwd=where, stdout=subprocess.DEVNULL)
    return where


def main() -> None:
    """Build the base, run both in turn, print verdicts."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("--base", metavar="REV", help="what to compare the working tree with")
    parser.add_argument("--quick", action="store_true", help="three small problems, three rounds")
    parser.add_argument("--problem", action="append")
    parser.add_argument("--task", action="append")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    problems = options.problem or ["logistic", "mlp", "deep", *([] if options.quick else ["lstm", "transformer"])]
    tasks = options.task or list(CASES)
    if options.worker:
        print(json.dumps(work(problems, tasks, 1.0 if options.quick else 3.0)))
        return
    if not options.base:
        parser.error("--base: expected a revision")
    arguments = [part for name in problems for part in ("--problem", name)]
    arguments += [part for name in tasks for part in ("--task", name)] + (["--quick"] if options.quick else [])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree = checkout(options.base, folder / "tree")
        try:
            packages = overlay(tree, folder / "base"), overlay(ROOT, folder / "head")
            verdicts = in_turn(*packages, options.rounds or (3 if options.quick else 7), arguments)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT)
    report(verdicts, print)
    if any(verdict.judgement == "slower" for verdict in verdicts):
        raise SystemExit(1)


def report(verdicts: list[Verdict], write: Callable[[str], object]) -> None:
    """A line per case."""
    for v in verdicts:
        write(f"{v.case:32} {v.times:6.2f} times faster, noise {100 * v.noise:.0f}%: {v.judgement}")


if __name__ == "__main__":
    main()
