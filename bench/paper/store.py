"""Results on disk: every finished run is kept at once, so that an interrupted experiment goes on where it was."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import measure
from bench.paper.experiment import Experiment, Job, Record, Settings


class ResumeError(RuntimeError):
    """The results on disk belong to other settings; the message says what to do."""


@dataclass(frozen=True)
class Results:
    """All runs of an experiment.

    Attributes:
        settings: The command line.
        protocol: The experiment's numbers.
        data: What the data set calls itself.
        arms: The variants, in order.
        runs: One record per arm and seed.
    """

    settings: Settings
    protocol: Any
    data: str
    arms: Sequence[str]
    runs: dict[tuple[str, int], Record]

    def of(self, arm: str) -> list[Record]:
        """The records of an arm, one per seed."""
        return [self.runs[arm, seed] for seed in range(self.settings.seeds)]

    def values(self, arm: str, key: str) -> np.ndarray:
        """One entry of an arm's records: seeds first, then what the entry has; what is missing is NaN."""
        entries = [record[key] for record in self.of(arm)]
        if not isinstance(entries[0], list):
            return np.array(entries, dtype=float)
        longest = max(len(entry) for entry in entries)
        return np.array([[*entry, *[None] * (longest - len(entry))] for entry in entries], dtype=float)

    def mean(self, arm: str, key: str) -> float:
        """Mean over seeds."""
        return float(self.values(arm, key).mean())

    def last(self, arm: str, key: str) -> float:
        """Mean over seeds of the last entry of a curve."""
        return float(self.values(arm, key)[:, -1].mean())


class Store:
    """The files of one experiment under one set of settings."""

    def __init__(self, experiment: Experiment, settings: Settings, *, fresh: bool = False) -> None:
        """Open, or begin.

        Raises:
            ResumeError: If the results that are there cannot be gone on with.
        """
        self.experiment, self.settings = experiment, settings
        self.protocol = experiment.protocol(settings)
        self.arms = list(experiment.arms(self.protocol))
        self.stem = f"{experiment.name}_{settings.data}{'_quick' if settings.quick else ''}"
        self.path = settings.out / f"{self.stem}.json"
        self._state = settings.out / f"{self.stem}_state"
        # As JSON has them: tuples are lists there.
        self._numbers = json.loads(json.dumps(experiment.numbers(settings)))
        self.content: dict[str, Any] = {}
        settings.out.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self._state, ignore_errors=True)
        if self.path.exists():
            self.content = self._checked(self.path.read_text())
        else:
            self.content = {"experiment": experiment.name, "protocol": self._numbers, "environments": [], "runs": []}
        self._state.mkdir(exist_ok=True)

    def job(self, arm: str, seed: int) -> Job:
        """The run of an arm with a seed."""
        return Job(self.settings, self.protocol, arm, seed, self._file(arm, seed, "paused"))

    def todo(self) -> list[tuple[str, int]]:
        """Arms and seeds that have not been run, seed by seed."""
        done = {(run["arm"], run["seed"]) for run in self.content["runs"]}
        return [(arm, seed) for seed in range(self.settings.seeds) for arm in self.arms if (arm, seed) not in done]

    def add(self, arm: str, seed: int, record: Record, seconds: float) -> None:
        """Keep a finished run."""
        tensors = {key: value for key, value in record.items() if isinstance(value, Tensor)}
        if tensors:
            save_tensors(self._file(arm, seed, "tensors"), {key: value.cpu() for key, value in tensors.items()})
        here = {**measure.environment(), "device": str(self.settings.device), "threads": torch.get_num_threads()}
        if here["device"].startswith("cuda"):
            here["device"] = torch.cuda.get_device_name(self.settings.device)
        if here not in self.content["environments"]:
            self.content["environments"].append(here)
        plain = {key: _plain(value) for key, value in record.items() if key not in tensors}
        self.content["data"] = self.experiment.load(self.settings).name
        self.content["runs"].append(
            {
                "arm": arm,
                "seed": seed,
                "environment": self.content["environments"].index(here),
                "seconds": round(seconds, 3),
                "tensors": sorted(tensors),
                "record": plain,
            }
        )
        self.write()
        self._file(arm, seed, "paused").unlink(missing_ok=True)

    def write(self) -> None:
        """Write the JSON file, whole or not at all; rewrite nothing that did not change."""
        text = json.dumps(self.content, indent=None, allow_nan=False, separators=(",", ":")) + "\n"
        replace(self.path, lambda file: file.write_text(text))

    def results(self) -> Results:
        """All runs, their tensors included."""
        runs = {}
        for run in self.content["runs"]:
            record = dict(run["record"])
            if run["tensors"]:
                file = self._file(run["arm"], run["seed"], "tensors")
                record.update(torch.load(file, map_location="cpu", weights_only=True))
            runs[run["arm"], run["seed"]] = record
        return Results(self.settings, self.protocol, self.content.get("data", ""), self.arms, runs)

    def _file(self, arm: str, seed: int, kind: str) -> Path:
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in arm)
        return self._state / f"{name}_{seed}.{kind}.pt"

    def _checked(self, text: str) -> dict[str, Any]:
        try:
            content = json.loads(text)
            there = content["protocol"]
            lost = [
                run["arm"]
                for run in content["runs"]
                if run["tensors"] and not self._file(run["arm"], run["seed"], "tensors").exists()
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{self.path}: not a results file ({error!r}); --fresh begins anew") from error
        if there != self._numbers:
            differ = [key for key in self._numbers | there if self._numbers.get(key) != there.get(key)]
            raise ResumeError(f"{self.path}: was run with another {', '.join(sorted(differ))}; --fresh begins anew")
        if lost:
            raise ResumeError(f"{self._state}: tensors of {', '.join(lost)} are missing; --fresh begins anew")
        return content


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file, and put it in the place of ``path`` in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def save_tensors(path: Path, content: Record) -> None:
    """``torch.save``, whole or not at all."""
    replace(path, lambda file: torch.save(content, file))


def _plain(value: Any) -> Any:
    """What JSON can hold, six digits are enough: NaN and infinity, which it cannot, become null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
