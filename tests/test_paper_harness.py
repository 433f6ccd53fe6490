"""The harness of ``bench.paper``: data formats, resuming, errors, search. The systems themselves: test_paper.py."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import hypergrad_ext as hg

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("bench", reason="bench/ is part of the repository, not of the package")

from bench.paper import cli, data, experiment, figures, search, store
from bench.paper.experiment import Claim, Experiment, Job, Report, Settings


def _idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def _write_idx(folder, *, zipped: bool, train: int = 12, test: int = 5) -> np.ndarray:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (train + test, 28, 28))
    labels = np.arange(train + test) % 10
    files = [_idx(pixels[:train]), _idx(labels[:train]), _idx(pixels[train:]), _idx(labels[train:])]
    for name, content in zip(data._IDX, files, strict=True):
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return pixels


@pytest.mark.parametrize("inner", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_in_every_layout(tmp_path, inner, zipped):
    pixels = _write_idx(tmp_path / "root" / inner, zipped=zipped)
    images = data.load("mnist", tmp_path / "root")
    assert images.name == "MNIST" and images.shape == (1, 28, 28)
    taken = images.train.take(torch.tensor([3, 1]))
    assert torch.equal(taken.y, torch.tensor([3, 1]))
    assert torch.equal(taken.x[0, 0], torch.tensor(pixels[3] / 255, dtype=torch.float32))
    assert len(images.test.y) == 5


def test_cifar_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {b"data": pixels[i], b"labels": [i] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    images = data.load("cifar10", tmp_path)
    assert images.name == "CIFAR-10" and len(images.train.y) == 20
    last = images.train.take(torch.tensor([19]))
    assert last.y.item() == 4
    assert torch.equal(last.x.flatten(), torch.tensor(pixels[4, 3] / 255, dtype=torch.float32))


def test_cifar_batch_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(data.DataError, match="print does not belong"):
        data.load("cifar10", tmp_path)


def test_cifar_jpegs_say_that_they_are_a_copy(tmp_path):
    image = pytest.importorskip("PIL.Image")
    files = []
    for grey in (0, 255):
        file = io.BytesIO()
        image.fromarray(np.full((32, 32, 3), grey, np.uint8)).save(file, "jpeg")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_jpeg"] = np.concatenate(files)
        arrays[f"{part}_offsets"] = np.array([0, len(files[0]), len(files[0]) + len(files[1])])
        arrays[f"{part}_labels"] = np.array([7, 8], np.uint8)
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    images = data.load("cifar10", tmp_path)
    assert images.name == "CIFAR-10 (JPEG copy)"
    both = images.test.take(torch.tensor([1, 0]))
    assert both.y.tolist() == [8, 7] and both.x.mean((1, 2, 3)).tolist() == [1, 0]


def _spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda content: content[:-1], "expected .* bytes"),
        (lambda content: b"\x1f\x8b" + content, "expected an idx file"),
        (lambda content: b"", "expected an idx file"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, said):
    _write_idx(tmp_path / "mnist", zipped=False)
    _spoil(tmp_path / "mnist" / data._IDX[0], change)
    with pytest.raises(data.DataError, match=f"{data._IDX[0]}: {said}"):
        data.load("mnist", tmp_path)


def test_truncated_gz_is_named(tmp_path):
    _write_idx(tmp_path / "mnist", zipped=True)
    _spoil(tmp_path / "mnist" / f"{data._IDX[0]}.gz", lambda content: content[:-20])
    with pytest.raises(data.DataError, match="cannot be read"):
        data.load("mnist", tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(data.DataError, match="no --data-dir was given"):
        data.load("mnist")
    with pytest.raises(data.DataError, match="not found in .*--data-dir"):
        data.load("cifar10", tmp_path)
    _write_idx(tmp_path / "mnist", zipped=False)
    (tmp_path / "mnist" / data._IDX[3]).unlink()
    with pytest.raises(data.DataError, match="holds 3 of the files"):
        data.load("mnist", tmp_path)
    with pytest.raises(data.DataError, match="expected one of digits"):
        data.load("imagenet", tmp_path)


def test_a_torchvision_that_does_not_load_is_reported(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def broken(name, *arguments, **options):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(data.DataError, match="nms does not exist.*--data-dir"):
        data.load("mnist", tmp_path, download=True)


def test_splits_are_disjoint_and_follow_the_seed():
    images = data.load("digits")
    first, again, other = (images.split(seed, train=50, validation=60) for seed in (0, 0, 1))
    assert [len(p) for p in (first.train, first.validation, first.test)] == [50, 60, 1687]
    assert torch.equal(first.train.x, again.train.x) and not torch.equal(first.train.x, other.train.x)
    everything = (first.train + first.validation + first.test).flat()
    assert torch.equal(
        everything.x.sum(1).sort()[0], (other.train + other.validation + other.test).flat().x.sum(1).sort()[0]
    )
    with pytest.raises(data.DataError, match="at most 1797"):
        images.split(0, train=1000, validation=797)


@dataclass(frozen=True)
class Numbers:
    steps: int = 3


def toy(run, steps: int = 3) -> Experiment:
    def report(results):
        value = results.mean("b", "value")
        figure = figures.figure(1, "What to see.")
        figures.band(figure.subplots(), range(3), results.values("b", "curve"), "b")
        claims = [Claim("it adds up", f"{value}", value == 1.5)]
        return Report([{"arm": "b", "value": value}], claims, {"curve": figure}, "Value: of the seeds, mean.")

    return Experiment("toy", "A toy.", lambda settings: Numbers(steps), lambda numbers: ["a", "b"], run, report)


def add(job: Job) -> dict:
    value = job.seed + len(job.arm)
    return {"value": value, "curve": [0.5, float("nan"), value], "noise": torch.randn(2)}


def test_every_finished_run_is_kept_and_not_run_again(tmp_path):
    calls = []

    def run(job):
        calls.append((job.arm, job.seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(job)

    settings = Settings(seeds=2, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cli.run(toy(run), settings)
    report = cli.run(toy(run), settings)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("a", 1), ("b", 1)]
    assert report.claims[0].reproduced
    assert "\n\nValue: of the seeds, mean.\n\n| claim |" in (tmp_path / "toy_digits.md").read_text()
    # A run that was interrupted before gives what it would have given at once.
    whole = store.Store(toy(add), settings).results()
    cli.run(toy(add), Settings(seeds=2, out=tmp_path / "again"))
    again = store.Store(toy(add), Settings(seeds=2, out=tmp_path / "again")).results()
    for key, record in whole.runs.items():
        assert torch.equal(record["noise"], again.runs[key]["noise"])
    content = json.loads((tmp_path / "toy_digits.json").read_text())
    assert content["environments"][0]["torch"] == torch.__version__ and content["protocol"] == {"steps": 3}
    assert content["runs"][0]["record"]["curve"] == [0.5, None, 1]
    assert (tmp_path / "toy_digits_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "| it adds up | 1.5 | yes |" in (tmp_path / "toy_digits.md").read_text()
    assert not list(tmp_path.glob("*.new"))


def test_no_clock_has_a_say_in_a_run(tmp_path):
    """Engines round differently, so one is chosen by rule, as long as the run takes."""
    engines = []

    def run(job):
        w = torch.ones(3, requires_grad=True)
        for _ in range(3):
            operator = hg.Hessian(lambda w: (w**4).sum(), w)
            hg.solve(operator, torch.ones(3), hg.Neumann(100, alpha=0.01))
            engines.append(operator.engine)
        if len(engines) == 6:
            raise experiment.Paused
        return add(job)

    assert cli.run(toy(run), Settings(seeds=1, out=tmp_path)) is None
    assert engines == ["eager"] * 6
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def add_bit_by_bit(job: Job) -> dict:
    """Six random numbers, saved one by one; stopped from outside in the middle of a run where the variable says so."""
    state = job.restore() or {"step": 0, "random": torch.get_rng_state(), "sum": torch.zeros(())}
    torch.set_rng_state(state["random"])
    total = state["sum"]
    for step in range(state["step"], 6):
        total = total + torch.randn(())
        job.save({"step": step + 1, "random": torch.get_rng_state(), "sum": total})
        if step == 3 and (job.arm, job.seed) == ("b", 0) and "KILL_THE_TEST" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
    return {**add(job), "total": float(total)}


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    """Killed in the middle of its second run: the same command ends with what an undisturbed one gives."""

    def records(folder: str) -> list[tuple]:
        content = json.loads((tmp_path / folder / "toy_digits.json").read_text())
        return [(run["arm"], run["seed"], run["record"]) for run in content["runs"]]

    arguments = ["--seeds", "2", "--threads", "1", "--out"]
    code = "from tests.test_paper_harness import *; cli.main(sys.argv[1:], only=toy(add_bit_by_bit))"
    command = [sys.executable, "-c", code, *arguments, str(tmp_path / "cut")]
    environment = os.environ | {"KILL_THE_TEST": "1"}
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [run[:2] for run in records("cut")] == [("a", 0)]
    assert (tmp_path / "cut" / "toy_digits_state" / "b_0.paused.pt").exists()
    for folder in ("cut", "whole"):
        assert cli.main([*arguments, str(tmp_path / folder)], only=toy(add_bit_by_bit)) == 0
    assert records("cut") == records("whole") and len(records("cut")) == 4


def test_an_experiment_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    def fail(job):
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(cli, "experiments", lambda: {"toy": toy(fail)})
    options = cli._parser({"toy": toy(fail)}, None).parse_args(["toy", "--out", str(tmp_path)])
    (status, claims), text, _ = cli._in_process(("toy", options, None))
    assert (status, claims) == (1, []) and "in the middle" in text


def test_a_wide_table_goes_on_in_the_next_line():
    text = cli.left_table([{"claim": "a b c d", "ours": 0.5}, {"claim": "e", "ours": 1}], width=3)
    assert text.splitlines() == ["cla  our", "im   s", "---  ---", "a b  0.5", "c d", "e    1"]


def test_logarithmic_axes_of_few_decades_have_plain_labels():
    for values, labels in (((0.6, 1.0), {"0.7", "0.8"}), ((0.1, 9.0), {"0.2", "1", "5"})):
        axis = figures.figure(1, "What to see.").subplots()
        figures.band(axis, values, [values], "seed")
        axis.set(xscale="log", yscale="log")
        figures.plain_ticks(axis.xaxis)
        axis.figure.draw_without_rendering()
        assert labels <= {text.get_text() for text in axis.get_xticklabels()}
        assert not any(text.get_text() for text in axis.get_xticklabels(minor=True))


def test_fresh_begins_anew_and_other_numbers_are_refused(tmp_path):
    settings = Settings(seeds=1, out=tmp_path)
    cli.run(toy(add), settings)
    with pytest.raises(store.ResumeError, match="another steps; --fresh"):
        cli.run(toy(add, steps=4), settings)
    cli.run(toy(add, steps=4), settings, fresh=True)
    (tmp_path / "toy_digits.json").write_text('{"protocol": ')
    with pytest.raises(store.ResumeError, match="not a results file"):
        cli.run(toy(add), settings)


def test_missing_tensors_are_noticed(tmp_path):
    cli.run(toy(add), Settings(seeds=1, out=tmp_path))
    (tmp_path / "toy_digits_state" / "b_0.tensors.pt").unlink()
    with pytest.raises(store.ResumeError, match="tensors of b are missing"):
        cli.run(toy(add), Settings(seeds=1, out=tmp_path))


def test_a_run_pauses_at_the_time_limit_and_goes_on(tmp_path, capsys):
    seen = []

    def run(job):
        state = job.restore() or {"step": 0, "sum": torch.zeros(())}
        for step in job.steps(4, start=state["step"]):
            seen.append(step)
            state = {"step": step + 1, "sum": state["sum"] + step}
            if step == 1:
                job.pause_if_expired(lambda state=state: state)
        return {**add(job), "total": float(state["sum"])}

    def settings(deadline):
        return Settings(seeds=1, out=tmp_path, deadline=deadline)

    assert cli.run(toy(run), settings(time.monotonic() + 1e3)) is not None
    expired = time.monotonic()
    assert cli.run(toy(run), settings(expired), fresh=True) is None and "0 of 2 runs" in capsys.readouterr().out
    seen.clear()
    once = store.Store(toy(run), settings(expired))
    with pytest.raises(experiment.Paused):
        run(once.job("a", 0))
    assert seen == [0, 1]
    assert cli.run(toy(run), settings(None)) is not None
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3]
    assert not list(tmp_path.glob("**/*paused*"))
    assert [r["total"] for r in store.Store(toy(run), settings(None)).results().runs.values()] == [6, 6]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--data", "mnist"], "MNIST: no --data-dir was given"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--out", "blocked/below"], "cannot write to --out"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocked").touch()
    assert cli.main(arguments, toy(add)) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_the_command_line_counts_on(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--quick"]
    assert cli.main([*arguments, "--time-limit", "0"], toy(add)) == cli.UNFINISHED
    assert cli.main(arguments, toy(add)) == 0
    assert "[yes] it adds up: 1.5" in capsys.readouterr().out
    assert (tmp_path / "toy_digits_quick.json").exists()


def test_all_experiments_side_by_side(tmp_path, capsys):
    assert cli.main(["all", "--quick", "--time-limit", "0", "--jobs", "2", "--out", str(tmp_path)]) == cli.UNFINISHED
    said = capsys.readouterr().out
    for name, known in cli.experiments().items():
        assert f"== {name}: {known.about}" in said
    assert "== Summary" in said and "Seconds: lstm " in said


def test_peak_bytes_sees_what_is_alive_at_one_time():
    megabyte = 2**18

    def three_at_once():
        kept = [torch.ones(megabyte) for _ in range(3)]
        del kept
        for _ in range(5):
            torch.ones(megabyte)

    peak = experiment.peak_bytes(torch.device("cpu"), three_at_once)
    assert 3 * 2**20 <= peak < 3.5 * 2**20


SPACE = {"x": (-2.0, 4.0), "y": (0.0, 1.0)}


def bowl(point):
    return (point["x"] - 1) ** 2 + (point["y"] - 0.25) ** 2, 10


def test_searches_keep_to_their_budget():
    random = search.random_search(bowl, SPACE, search.Budget(steps=95), seed=0)
    assert len(random.points) == 9 and random.steps[-1] == 90
    grid = search.grid_search(bowl, SPACE, search.Budget(steps=1000), per_axis=5)
    assert len(grid.points) == 25 and grid.best == {"x": 1.0, "y": 0.25}
    assert all(-2 <= p["x"] <= 4 and 0 <= p["y"] <= 1 for p in random.points)
    short = search.random_search(bowl, SPACE, search.Budget(seconds=0.0), seed=0)
    assert len(short.points) == 1
    with pytest.raises(ValueError, match="seconds or steps"):
        search.random_search(bowl, SPACE, search.Budget(), seed=0)


def test_bayesian_search_beats_random_search_on_a_bowl():
    pytest.importorskip("optuna")
    bayes = search.bayesian_search(bowl, SPACE, search.Budget(steps=200), seed=0)
    random = search.random_search(bowl, SPACE, search.Budget(steps=200), seed=0)
    assert len(bayes.points) == 20
    assert min(bayes.values) < min(random.values)
