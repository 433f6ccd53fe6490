"""The demonstration in its quick settings, and the command line."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from hypergrad_ext import __main__ as cli
from hypergrad_ext import backends, ops
from hypergrad_ext.demo import distil, penalties, run, timing
from hypergrad_ext.demo.data import digits

SEEDS = [0, 1, 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_tuned_penalties_generalise(seed):
    result = run.tuned_penalties(seed, quick=True)
    assert result.weights == 650
    assert result.gradient < 1e-6, "the implicit function theorem needs a minimum"
    # Against the best single penalty. Ratios measured on seeds 0 to 9: 0.41 to 0.55, and 0.64 to 0.77 on test.
    assert result.validation[-1].loss < 0.6 * result.validation[0].loss
    assert result.test[-1].loss < 0.9 * result.test[0].loss
    assert result.test[-1].accuracy > result.test[0].accuracy


@pytest.mark.parametrize("seed", SEEDS)
def test_ten_distilled_images_train_a_classifier(seed):
    result = run.distilled_digits(seed, quick=True)
    random = sum(result.random) / len(result.random)
    assert result.images.shape == (10, 64)
    # Measured on seeds 0 to 9: 0.91 to 0.94, against 0.59 to 0.70 for random real images.
    assert result.accuracy >= 0.9
    assert result.accuracy >= random + 0.2
    assert result.validation[-1] < result.validation[0]


def test_noise_images_train_no_classifier():
    """The evaluation must not leak: nothing but the images given can reach the weights."""
    data = digits(0, train=0, validation=distil.VALIDATION)
    generator = torch.Generator().manual_seed(0)
    accuracies = [
        distil.retrained_accuracy(
            distil.one_per_class(torch.rand(10, 64, generator=generator, dtype=torch.float64)), data.test
        )
        for _ in range(10)
    ]
    assert sum(accuracies) / len(accuracies) < 0.25


def test_wrong_labels_train_a_wrong_classifier():
    data = digits(0, train=0, validation=distil.VALIDATION)
    images = distil.class_means(data.validation)
    assert distil.retrained_accuracy(distil.one_per_class(images), data.test) > 0.85
    assert distil.retrained_accuracy(distil.one_per_class(images.roll(1, 0)), data.test) < 0.1


def test_splits_are_disjoint_and_follow_the_seed():
    first, again, other = (digits(seed, train=200, validation=600) for seed in (0, 0, 1))
    assert [len(part) for part in (first.train, first.validation, first.test)] == [200, 600, 997]
    assert torch.equal(first.train.x, again.train.x) and not torch.equal(first.train.x, other.train.x)
    everything = first.train + first.validation + first.test
    assert torch.equal(everything.x.sum(0).sort()[0], (other.train + other.validation + other.test).x.sum(0).sort()[0])
    assert 0 <= everything.x.min() and everything.x.max() == 1


def test_timed_methods_agree_and_approach_the_truth():
    for result in run.timed_hypergradients(0, quick=True):
        plain, fused, cg = result.rows
        assert fused.difference is not None and fused.difference < 1e-5
        assert math.isclose(fused.error, plain.error, rel_tol=1e-4)
        assert cg.error < 0.01 < plain.error, "20 terms are not enough here, and CG's tolerance is"
        assert all(ms > 0 for row in result.rows for ms in row.milliseconds)
        assert f"{result.weights} weights" in timing.describe([result])


def test_descriptions_quote_the_results():
    result = run.tuned_penalties(0, quick=True)
    text = penalties.describe(result)
    for score in (result.test[0], result.test[-1], result.pooled):
        assert f"{score.loss:.3f}" in text and f"{score.accuracy:.1%}" in text


def test_info_names_every_op_and_backend(capsys, monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for fact in ("hypergrad_ext", "Python", "torch", "triton", "CPU", "threads", backends.ENVIRONMENT):
        assert any(line.startswith(fact) for line in lines), fact
    for op in ops.ALL:
        for name in backends.NAMES[1:]:
            (line,) = [line for line in lines if line.split()[:3] == [op.name, "cpu", name]]
            assert ("auto picks this" in line) == (name == backends.select(op.kernels, "cpu", "auto")[0])


@pytest.mark.parametrize(
    "asked, said", [("torch", "picks this"), ("cuda", "cannot run"), ("nonsense", "must be one of")]
)
def test_info_reports_the_environment_variable(capsys, monkeypatch, asked, said):
    if asked == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA can run here")
    monkeypatch.setenv(backends.ENVIRONMENT, asked)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert asked in out and said in out.replace(f"{backends.ENVIRONMENT} ", "")


def test_demo_writes_figures(tmp_path):
    done = _demo("--quick", "--out", str(tmp_path / "new" / "folder"))
    assert done.returncode == 0, done.stderr
    for name in ("curves.png", "distilled.png"):
        figure = tmp_path / "new" / "folder" / name
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
        assert f"wrote {figure}" in done.stdout


def test_demo_refuses_a_folder_it_cannot_write(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    done = _demo("--quick", "--out", str(blocked / "below"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("hypergrad_ext demo: cannot write to --out") and len(done.stderr.splitlines()) == 1


def test_demo_names_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_EXTRAS", {"no_such_module": "scikit-learn"})
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "hypergrad_ext demo: scikit-learn not installed: pip install '.[demo]' in a checkout\n"
    )


@pytest.mark.parametrize("seed", [str(2**64), "-1", "one"])
def test_demo_refuses_seeds_that_torch_does_not_take(capsys, seed):
    with pytest.raises(SystemExit):
        cli.main(["demo", f"--seed={seed}"])
    assert f"--seed: expected an integer from 0 to 2^64 - 1, got {seed}" in capsys.readouterr().err


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hypergrad_ext", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
