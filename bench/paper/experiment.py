"""What an experiment is: arms times seeds, each of which gives a record, and a report on all of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import measure
from bench.paper import data
from tests.allocations import peak

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.paper.store import Results

Record = dict[str, Any]
"""What a run found: numbers, strings and lists of them go to the JSON file, tensors to a file beside it."""


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        data: Name of the data set.
        data_dir: Folder with its files.
        download: Whether torchvision may fetch them.
        device: Where to compute.
        seeds: Number of seeds, 0 to ``seeds - 1``.
        quick: Smaller settings.
        out: Folder for results.
        deadline: `time.monotonic` after which no more work is begun; None for no limit.
    """

    data: str = "digits"
    data_dir: Path | None = None
    download: bool = False
    device: torch.device = torch.device("cpu")
    seeds: int = 3
    quick: bool = False
    out: Path = Path("out/paper")
    deadline: float | None = None

    def images(self) -> data.Images:
        """The data set, read once per process."""
        return _loaded(self.data, self.data_dir, self.download)

    @property
    def expired(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


_loaded = lru_cache(maxsize=2)(lambda name, folder, download: data.load(name, folder, download=download))


class Paused(Exception):
    """A run stopped in the middle because its time was up; what it had is saved."""


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed.

    Attributes:
        settings: The command line.
        protocol: The experiment's numbers: sizes, steps, step sizes.
        arm: Which variant to run.
        seed: Seed of everything that is random.
        checkpoint: File for the state of a run that is paused.
    """

    settings: Settings
    protocol: Any
    arm: str
    seed: int
    checkpoint: Path

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.settings.device

    def images(self) -> data.Images:
        """The data set asked for."""
        return self.settings.images()

    def steps(self, count: int, start: int = 0) -> Iterator[int]:
        """The numbers ``start`` to ``count - 1``, with a progress bar on a terminal."""
        title = f"{self.arm}, seed {self.seed}"
        return iter(tqdm(range(start, count), desc=title, initial=start, total=count, unit="step", disable=None))

    def restore(self) -> Record | None:
        """The state at which this run was paused; None if it was not."""
        if not self.checkpoint.exists():
            return None
        return torch.load(self.checkpoint, map_location=self.device, weights_only=True)

    def save(self, state: Record) -> None:
        """Keep the state of this run, in case that the process ends."""
        from bench.paper.store import save_tensors

        save_tensors(self.checkpoint, state)

    def pause_if_expired(self, state: Callable[[], Record]) -> None:
        """Once the time is up, save ``state()`` and stop.

        Raises:
            Paused: If the time is up.
        """
        if self.settings.expired:
            self.save(state())
            raise Paused


class Stopwatch:
    """Seconds of work on a device, the time between `stop` and `start` left out: see `bench.measure.clock_for`."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._clock = time.perf_counter if device.type == "cuda" else measure.clock_for(torch.get_num_threads())
        self._seconds = seconds
        self.start()

    def start(self) -> None:
        """Go on."""
        self._begin: float | None = self._now()

    def stop(self) -> float:
        """Halt, and give the seconds so far."""
        self._seconds = self.seconds
        self._begin = None
        return self._seconds

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._seconds + (0.0 if self._begin is None else self._now() - self._begin)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


@dataclass(frozen=True)
class Claim:
    """A line of the summary.

    Attributes:
        paper: What the paper claims, or what a trap would show.
        ours: The numbers that this run gave.
        reproduced: Whether they bear it out; None if this run cannot tell.
    """

    paper: str
    ours: str
    reproduced: bool | None


@dataclass(frozen=True)
class Report:
    """What is shown of an experiment: a table, figures by name, claims, and what the table's columns are."""

    rows: list[dict[str, object]]
    claims: list[Claim]
    figures: dict[str, Figure] = field(default_factory=dict)
    legend: str = ""


@dataclass(frozen=True)
class Experiment:
    """A system of the paper. A module of this package that has one as ``EXPERIMENT`` is found by the command line.

    Attributes:
        name: The module's name.
        about: One line for people.
        protocol: From settings to a frozen dataclass of all numbers, which the results keep: runs under other
            numbers are not mixed with them.
        arms: From the protocol to the variants.
        run: Runs one arm with one seed; torch's generators are seeded with it.
        report: From all results to what is shown.
        datasets: Data sets that it can take.
        bundled: The one of them that needs no files; taken if none is asked for.
        load: Reads the data set, which has a ``name``.
        seeds: Number of seeds without ``--seeds``.
        quick_seeds: The same with ``--quick``.
        not_yet_run: Settings that are scripted and have not been run, such as those for a GPU.
    """

    name: str
    about: str
    protocol: Callable[[Settings], Any]
    arms: Callable[[Any], Sequence[str]]
    run: Callable[[Job], Record]
    report: Callable[[Results], Report]
    datasets: Sequence[str] = data.NAMES
    bundled: str = "digits"
    load: Callable[[Settings], Any] = Settings.images
    seeds: int = 3
    quick_seeds: int = 3
    not_yet_run: str = ""

    def numbers(self, settings: Settings) -> dict[str, Any]:
        """The protocol as plain numbers."""
        return dataclasses.asdict(self.protocol(settings))


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of rows whose largest logit is at the label."""
    return float((logits.argmax(1) == y).double().mean())


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Largest number of bytes that tensors held at one time during ``work``, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return peak(work)
