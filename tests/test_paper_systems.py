"""The inverse Hessian and distillation: small cases, and claims as slow tests."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("bench.paper", reason="bench/ is not part of the package")

import hypergrad_ext as hg
from bench.paper import distillation, inverse_hessian
from bench.paper.experiment import Experiment, Job, Settings


def job(experiment: Experiment, arm: str, seed: int, folder: Path, **changes: object) -> Job:
    settings = Settings(quick=True, out=folder)
    protocol = dataclasses.replace(experiment.protocol(settings), **changes)
    return Job(settings, protocol, arm, seed, folder / f"{arm}_{seed}.pt")


def runs(experiment: Experiment, arm: str, seeds: int, folder: Path, **changes: object) -> list[dict]:
    records = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        records.append(experiment.run(job(experiment, arm, seed, folder, **changes)))
    return records


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestDistillation:
    def test_the_fused_operator_is_the_hessian_of_the_objective(self):
        images = torch.rand(10, 6, dtype=torch.float64)
        params = [torch.randn(10, 6).double().requires_grad_(), torch.randn(10).double().requires_grad_()]
        b = [torch.randn_like(t) for t in params]
        loss = distillation.objective(params, distillation.one_per_class(images), 0.0183)
        # Without damping the shift of all biases is a null direction.
        found = [
            hg.solve(operator, b, hg.CG(tol=1e-12), damping=0.1).value
            for operator in (hg.Hessian(loss, params), hg.GLMHessian(images, params, "softmax", l2=0.0183))
        ]
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)

    def test_a_short_run(self, tmp_path):
        (record,) = runs(distillation.EXPERIMENT, "K=5", 1, tmp_path, steps=2)
        assert record["images"].shape == (10, 64)
        assert len(record["retrained"]) == 2

    @pytest.mark.slow
    def test_ten_learnt_images_are_a_training_set(self, tmp_path):
        def mean(arm: str, key: str = "accuracy") -> float:
            return statistics.fmean(r[key] for r in runs(distillation.EXPERIMENT, arm, 3, tmp_path))

        random = mean("random real images")
        for arm in ("K=5", "CG"):
            assert mean(arm) >= max(0.9, random + 0.2)

    @pytest.mark.slow
    def test_the_evaluation_notices_what_only_warm_weights_know(self, tmp_path):
        records = runs(distillation.EXPERIMENT, "K=5, weak penalty", 3, tmp_path)
        lost = [r["warm_accuracy"] - r["accuracy"] for r in records]
        assert statistics.fmean(lost) > 0.05


class TestInverseHessian:
    def test_the_identities(self, tmp_path):
        """Unrolling i steps at the minimum is the series of i terms, and the series tends to the dense inverse."""
        problem = inverse_hessian.ridge(job(inverse_hessian.EXPERIMENT, "diabetes ridge", 0, tmp_path))
        matrix, b = problem.dense(), problem.right_hand_side()
        alpha = 0.9 / float(torch.linalg.eigvalsh(matrix)[-1])
        for steps in (1, 3, 10, 50):
            series, _ = problem.hypergradient(hg.Neumann(steps=steps - 1, alpha=alpha))
            unrolled = inverse_hessian.unrolled(problem, steps, alpha)
            assert float((series - unrolled).norm()) <= 1e-6 * float(unrolled.norm())
        exact = problem.through(torch.linalg.solve(matrix, b))
        found, _ = problem.hypergradient(hg.CG(tol=1e-12))
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)

    @pytest.mark.slow
    def test_the_order_of_the_methods_at_a_minimum(self, tmp_path):
        problem = inverse_hessian.logistic(job(inverse_hessian.EXPERIMENT, "logistic regression", 0, tmp_path))
        matrix, b = problem.dense(), problem.right_hand_side()
        eigenvalues = torch.linalg.eigvalsh(matrix)
        low, high = float(eigenvalues[0]), float(eigenvalues[-1])
        exact = problem.through(torch.linalg.solve(matrix, b))

        def distances(solver: hg.Solver) -> tuple[float, float]:
            return inverse_hessian.distances(problem.hypergradient(solver)[0], exact)

        terms = inverse_hessian.Protocol().terms
        cosine = {k: distances(hg.Neumann(steps=k, alpha=1 / high))[0] for k in terms}
        assert all(a <= b + 1e-12 for a, b in zip(cosine.values(), list(cosine.values())[1:], strict=False))
        assert cosine[20] >= 0.85
        assert cosine[200] >= 0.97
        assert distances(hg.Identity())[0] <= 0.70
        assert cosine[1] > distances(hg.CG(tol=1e-15, max_steps=1))[0]
        assert distances(hg.CG(tol=1e-15, max_steps=20))[1] <= 1e-2
        assert distances(hg.CG(tol=1e-15, max_steps=50))[1] <= 1e-6
        assert distances(hg.Chebyshev(steps=50, bounds=(low, high)))[1] <= 1e-2
        for k in (1, 20, 200):
            grads, solution = problem.hypergradient(hg.Neumann(steps=k))
            # The series converges below 2; what is found must not be worse than 1, which needs the largest eigenvalue.
            assert 0.8 <= solution.alpha * high < 2
            assert inverse_hessian.distances(grads, exact)[1] <= distances(hg.Neumann(steps=k, alpha=1 / high))[1]

    @pytest.mark.slow
    def test_an_indefinite_network(self, tmp_path):
        problem = inverse_hessian.mlp_at(job(inverse_hessian.EXPERIMENT, "indefinite MLP", 0, tmp_path), 200)
        _, solution = problem.hypergradient(hg.CG(tol=1e-15, max_steps=20))
        assert str(solution.status) == "negative_curvature"
        residuals = [problem.hypergradient(hg.MINRES(tol=1e-15, max_steps=k))[1].residual_norm for k in (1, 5, 20)]
        assert residuals == sorted(residuals, reverse=True)
        assert residuals[-1] <= 0.30
        early = inverse_hessian.mlp_at(job(inverse_hessian.EXPERIMENT, "indefinite MLP", 0, tmp_path), 20)
        largest = float(torch.linalg.eigvalsh(early.dense()).abs().max())
        _, solution = early.hypergradient(hg.Neumann(steps=100, alpha=1 / largest))
        assert str(solution.status) == "diverged"
