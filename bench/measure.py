"""Honest timing on a shared machine: variants in turn within one run, medians, and where it was measured."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch

import hypergrad_ext
from hypergrad_ext import _native

# Seconds that a thread of OpenMP spins for the next work, at the most.
SPINNING = 0.015
RESULTS = Path(__file__).parent / "results"


def interleave(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    setup: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    budget: float = float("inf"),
    twice: float = 0.0,
    rested: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds per call of every variant, timed in turn in every round, each round in a random order.

    ``setup`` runs before every call, outside its time. No round after the third begins later than ``budget``
    seconds after the first. Calls that last took fewer seconds than ``twice`` are made twice, and the second is timed:
    it finds its own data in the caches, and no threads of another library that still spin on a core. Before those that
    are ``rested`` no thread does.
    """
    names = list(variants)
    for name in names * warmup:
        setup()
        variants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for r in range(rounds):
        if r >= 3 and time.perf_counter() - begin > budget:
            break
        # Whoever comes after one that left the caches to others, or its threads awake, is slower for it.
        random.Random(r).shuffle(names)
        for name in names:
            setup()
            if seconds[name] and seconds[name][-1] < twice:
                variants[name]()
            if name in rested:
                time.sleep(SPINNING)
            start = clock()
            variants[name]()
            seconds[name].append(clock() - start)
    return seconds


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch on so many threads, and, where the system can, all threads of the process on so many cores.

    JAX has threads of its own, whose number nothing changes once it runs.
    """

    def pin(cores: set[int]) -> None:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)

    before, can_pin = torch.get_num_threads(), hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()
    allowed = os.sched_getaffinity(0) if can_pin else set()
    torch.set_num_threads(count)
    try:
        if can_pin:
            pin(set(sorted(allowed)[:count]))
        yield
    finally:
        torch.set_num_threads(before)
        if can_pin:
            pin(allowed)


def clock_for(count: int) -> Callable[[], float]:
    """One thread by the process's own clock, for which foreign load does not count; several by the wall's."""
    return time.process_time if count == 1 else time.perf_counter


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """How many times faster ``fast`` is: median of the ratios within a round, and their quartiles."""
    ratios = sorted(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def spread(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    """That ratio with its quartiles, as tables show it; ``-`` if one of both was not timed."""
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio(seconds, slow, fast)) if {slow, fast} <= seconds.keys() else "-"


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def cpu_name() -> str:
    """Name of the CPU as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, marked if anything but results differs from it.

    Outside a checkout it is what ``COMMIT`` says.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")
    except FileNotFoundError:
        return "unknown"


def driver() -> str:
    """Version of the GPU's driver, which torch does not tell."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return lines[0] if lines else "unknown"


def environment() -> dict[str, object]:
    """What a number means nothing without."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU only",
        **({"cuda": torch.version.cuda, "driver": driver()} if gpu else {}),
        "cpu": cpu_name(),
        "cores": torch.multiprocessing.cpu_count(),
        "isa": _native.build_info().get("isa", "none"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hypergrad_ext": hypergrad_ext.__version__,
        "commit": commit(),
    }


def save(name: str, rows: list[dict[str, object]], key: int | None = None, **facts: object) -> Path:
    """Write rows of the CPU with their environment to ``bench/results``; one pair of files per kind of CPU.

    Rows kept from runs in the same environment stay, unless a new one is about the same case: a benchmark may be
    run in parts. The first ``key`` columns say what a row is about, or else `case`; ``facts`` belong to the
    environment.
    """
    RESULTS.mkdir(exist_ok=True)
    machine = environment() | facts
    # What AMD and Intel do with the same instructions differs by more than the instructions do.
    maker = "_intel" if _native.build_info().get("vendor") == "intel" else ""
    path = RESULTS / f"{name}_{machine['isa']}{maker}.json"
    if path.exists() and (kept := json.loads(path.read_text()))["environment"] == machine:
        new = {case(row, key) for row in rows}
        rows = [row for row in kept["rows"] if case(row, key) not in new and list(row) == list(rows[0])] + rows
    return write(path, machine, {"rows": rows})


def write(path: Path, machine: dict[str, object], tables: dict[str, list[dict[str, object]]]) -> Path:
    """Write tables with their environment to ``path``, a JSON file, and as Markdown beside it."""
    path.write_text(json.dumps({"environment": machine, **tables}, indent=1) + "\n")
    facts = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in machine.items()
    )
    lines = [f"# {path.stem}", "", facts]
    for name, rows in tables.items():
        head, *body = cells(rows)
        lines += ["", *([f"## {name}", ""] if len(tables) > 1 else [])]
        lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path


def write_in_turn(
    name: str, problems: dict[str, Iterable[Callable[[], list[dict[str, object]]]]], **facts: object
) -> None:
    """Write tables to the folder of the command line or ``bench/results``, again after every problem.

    A run that is cut short keeps what it has. Where a problem fails, its traceback is printed and the others go on.

    Args:
        name: Of the files.
        problems: Of every table, what measures the rows of one problem.
        facts: What belongs to the environment.

    Raises:
        SystemExit: At the end, if a problem failed.
    """
    path = (Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS) / f"{name}.json"
    machine, tables, failed = environment() | facts, {}, 0
    print("  ".join(f"{key}={value}" for key, value in machine.items()))
    for title, measurements in problems.items():
        for rows_of in measurements:
            try:
                rows = rows_of()
            except Exception:
                traceback.print_exc()
                failed += 1
                continue
            tables.setdefault(title, []).extend(rows)
            write(path, machine, tables)
            print(table(rows))
    if failed:
        raise SystemExit(f"{name}: {failed} failed")


def case(row: dict[str, object], key: int | None = None) -> str:
    """What a row is about: its words and whole numbers before the first number that was measured."""
    if key is None:
        key = next((i for i, value in enumerate(row.values()) if isinstance(value, float)), len(row))
    return json.dumps(list(row.values())[:key])


def cells(rows: list[dict[str, object]]) -> list[list[str]]:
    """Rows of equal keys as text, the keys first."""

    def text(x: object) -> str:
        return "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    return [list(rows[0]), *([text(x) for x in row.values()] for row in rows)]


def table(rows: list[dict[str, object]]) -> str:
    """Rows of equal keys as aligned text."""
    lines = cells(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
