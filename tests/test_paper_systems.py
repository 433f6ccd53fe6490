"""The inverse Hessian, overfitting and distillation: small cases, and claims as slow tests."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("bench.paper", reason="bench/ is not part of the package")

import hypergrad_ext as hg
from bench.paper import baselines, cli, distillation, inverse_hessian, inverse_problems, models, overfit_validation
from bench.paper.experiment import Experiment, Job, Paused, Settings
from hypergrad_ext.solvers import System
from hypergrad_ext.solvers.lanczos import lanczos


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

    def test_images_are_recognised_by_their_class_mean(self):
        data = distillation.Examples(torch.rand(200, 30), torch.arange(200) % 10)
        means = distillation.class_means(data)
        assert distillation.recognised(3 * means + 1, data) == 10
        assert distillation.recognised(means.roll(1, 0), data) == 0

    def test_a_short_run(self, tmp_path):
        (record,) = runs(distillation.EXPERIMENT, "K=5", 1, tmp_path, steps=2)
        assert record["images"].shape == (10, 64)
        assert len(record["retrained"]) == 2

    def test_bounded_images_start_grey_or_as_class_means(self, tmp_path):
        """No step: what they start as. Some steps: they move, between 0 and 1."""
        for arm in ("CG, bounded", distillation.MEANS):
            found = [runs(distillation.EXPERIMENT, arm, 1, tmp_path, steps=n)[0]["images"] for n in (0, 3)]
            assert (found[0].std() < 1e-6) == (arm != distillation.MEANS)
            assert 0 < float(found[1].min()) < float(found[1].max()) < 1
            assert float((found[1] - found[0]).abs().max()) > 1e-3

    def test_an_interrupted_run_ends_as_one_that_was_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(distillation, "_LOOK_EVERY", 2)
        changes = {"steps": 5, "batch": 100, "cosine": True}
        (whole,) = runs(distillation.EXPERIMENT, "CG, bounded", 1, tmp_path, **changes)
        part = job(distillation.EXPERIMENT, "CG, bounded", 0, tmp_path, **changes)
        ends = iter([False, True])
        monkeypatch.setattr(Settings, "expired", property(lambda self: next(ends)))
        with pytest.raises(Paused):
            distillation.run(part)
        monkeypatch.setattr(Settings, "expired", False)
        again = distillation.run(part)
        assert torch.equal(again["images"], whole["images"])
        assert again["retrained"] == whole["retrained"]

    def test_a_penalty_on_brightness_darkens(self, tmp_path):
        bright, dark = (
            runs(distillation.EXPERIMENT, "CG, bounded", 1, tmp_path, steps=20, brightness=b)[0]["images"]
            .square()
            .sum()
            for b in (0.0, 10.0)
        )
        assert dark < 0.8 * bright

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


def small(moved: int = 0, by: float = 0.0) -> inverse_problems.Problem:
    """Logistic regression with 12 weights at its minimum; the penalty ``moved`` is larger ``by`` so much."""
    generator = torch.Generator().manual_seed(0)
    x, xv = torch.randn(2, 40, 12, generator=generator, dtype=torch.float64)
    truth = torch.randn(12, generator=generator, dtype=torch.float64)
    y, yv = (torch.sign(part @ truth) for part in (x, xv))
    lam = torch.full((12,), -2.5, dtype=torch.float64)
    lam[moved] += by
    lam.requires_grad_()

    def train(w):
        return softplus(-y * (x @ w)).mean() + (lam.exp() * w.square()).sum()

    w = inverse_problems.newton(train, torch.zeros(12, dtype=torch.float64))
    return inverse_problems.Problem(train, lambda w: softplus(-yv * (xv @ w)).mean(), w.requires_grad_(), lam)


class TestInverseHessian:
    def test_the_identities(self):
        """Unrolling i steps at the minimum is the series of i terms, and the series tends to the dense inverse."""
        problem = small()
        matrix, b = problem.dense(), problem.right_hand_side()
        alpha = 0.9 / float(torch.linalg.eigvalsh(matrix)[-1])
        exact = problem.through(torch.linalg.solve(matrix, b))
        errors = []
        for steps in (1, 3, 10, 50):
            series, _ = problem.hypergradient(hg.Neumann(steps=steps - 1, alpha=alpha))
            torch.testing.assert_close(series, inverse_hessian.unrolled(problem, steps, alpha), rtol=0, atol=1e-12)
            errors.append(inverse_hessian.distances(series, exact)[1])
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] <= 5e-3

    def test_finite_differences_of_the_trained_weights(self):
        problem = small()
        exact, _ = problem.hypergradient(hg.CG(tol=1e-12))
        for i in (0, 7):
            at = []
            for change in (1e-4, -1e-4):
                moved = small(i, change)
                at.append(float(moved.validation(moved.w.detach())))
            assert (at[0] - at[1]) / 2e-4 == pytest.approx(float(exact[i]), rel=1e-5)

    def test_cg_takes_as_many_steps_as_theory_says(self):
        basis = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))[0]
        matrix, b = basis * torch.logspace(0, 2, 50, dtype=torch.float64) @ basis.T, torch.randn(50).double()
        exact = torch.linalg.solve(matrix, b)
        for steps, error in ((20, 3e-2), (50, 1e-5)):
            x = hg.solve(hg.DenseMatrix(matrix), b, hg.CG(tol=1e-15, max_steps=steps)).value
            assert float((x - exact).norm() / exact.norm()) <= error

    def test_the_paths_of_training(self, tmp_path):
        """Penalties stay until the warm-up is over, by when the loss is near its minimum."""
        problem = inverse_problems.ridge(job(inverse_hessian.EXPERIMENT, "diabetes ridge", 0, tmp_path))
        before, least = problem.lam.detach().clone(), float(problem.train(problem.w).detach())
        above, moved = [], []
        for steps, here in inverse_problems.in_training(problem, (5, 300, 310), lr=0.01, outer_lr=0.01, warm_up=300):
            assert steps == (5, 300, 310)[len(moved)]
            above.append(float(here.train(here.w).detach()) - least)
            moved.append(not torch.equal(problem.lam.detach(), before))
        assert 0 < above[1] < 0.05 * above[0]
        assert moved == [False, False, True]

    def test_a_small_comparison_and_its_report(self, tmp_path, monkeypatch):
        monkeypatch.setattr(inverse_hessian, "_TIMES", 1)
        monkeypatch.setattr(inverse_hessian, "_STEPS", (1, 5))
        small = {
            "examples": 40,
            "hidden": 2,
            "terms": (0, 1, 5, 20),
            "training_steps": (20,),
            "convex_steps": (2, 4),
            "other_penalties": (-5.0,),
        }
        settings = Settings(seeds=1, quick=True, out=tmp_path)
        experiment = dataclasses.replace(
            inverse_hessian.EXPERIMENT,
            protocol=lambda settings: dataclasses.replace(inverse_hessian.Protocol(), **small),
        )
        report = cli.run(experiment, settings)
        assert {"distance", "inverse", "training", "penalties"} == set(report.figures)
        assert {row["problem"] for row in report.rows} == {"logistic regression", "diabetes ridge", "indefinite MLP"}
        assert len(report.claims) == 4

    @pytest.mark.slow
    def test_the_order_of_the_methods_at_a_minimum(self, tmp_path):
        problem = inverse_problems.logistic(job(inverse_hessian.EXPERIMENT, "logistic regression", 0, tmp_path))
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
        problem = inverse_problems.mlp_at(job(inverse_hessian.EXPERIMENT, "indefinite MLP", 0, tmp_path), 200)
        _, solution = problem.hypergradient(hg.CG(tol=1e-15, max_steps=20))
        assert str(solution.status) == "negative_curvature"
        residuals = [problem.hypergradient(hg.MINRES(tol=1e-15, max_steps=k))[1].residual_norm for k in (1, 5, 20)]
        assert residuals == sorted(residuals, reverse=True)
        assert residuals[-1] <= 0.30
        early = inverse_problems.mlp_at(job(inverse_hessian.EXPERIMENT, "indefinite MLP", 0, tmp_path), 20)
        largest = float(torch.linalg.eigvalsh(early.dense()).abs().max())
        _, solution = early.hypergradient(hg.Neumann(steps=100, alpha=1 / largest))
        assert str(solution.status) == "diverged"


class TestOverfitValidation:
    def test_alexnet_has_the_papers_number_of_weights(self):
        with torch.device("meta"):
            assert models.size(models.alexnet((1, 28, 28))) == 20_125_386
            assert models.size(models.alexnet((3, 32, 32))) == 23_272_266

    def test_two_steps_of_every_kind(self, tmp_path):
        for kind in ("K=2", "K=0", "unrolled", "none"):
            (record,) = runs(overfit_validation.EXPERIMENT, f"mlp {kind}", 1, tmp_path, max_steps=2, untuned_steps=2)
            assert len(record["train"]) == (0 if kind == "none" else 2)
            assert (record["largest_penalty"] > 0.0184) == (kind != "none"), "e^-4, unless tuned"

    def test_an_interrupted_run_ends_as_one_that_was_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(overfit_validation, "_LOOK_EVERY", 2)
        (whole,) = runs(overfit_validation.EXPERIMENT, "mlp K=2", 1, tmp_path, max_steps=5)
        torch.manual_seed(0)
        part = job(overfit_validation.EXPERIMENT, "mlp K=2", 0, tmp_path, max_steps=5)
        ends = iter([False, True])
        monkeypatch.setattr(Settings, "expired", property(lambda self: next(ends)))
        with pytest.raises(Paused):
            overfit_validation.run(part)
        monkeypatch.setattr(Settings, "expired", False)
        again = overfit_validation.run(part)
        assert {**again, "seconds": 0} == {**whole, "seconds": 0}

    @pytest.mark.slow
    def test_as_many_hyperparameters_as_weights_fit_the_validation_set(self, tmp_path):
        steps = {}
        for arm in ("mlp K=5", "cnn K=3", "cnn K=0"):
            records = runs(overfit_validation.EXPERIMENT, arm, 4, tmp_path)
            steps[arm] = statistics.median(float("inf") if r["steps"] is None else r["steps"] for r in records)
            if arm != "cnn K=0":
                assert all(r["final"][:2] == [1.0, 1.0] and r["steps"] <= 400 for r in records)
                assert max(r["final"][2] for r in records) <= 0.95
        assert steps["cnn K=3"] <= steps["cnn K=0"]

    @pytest.mark.slow
    def test_three_steps_go_on_while_the_largest_curvature_grows_to_ten_thousands(self, tmp_path, monkeypatch):
        """At four times the outer learning rate, on past 100 %: largest eigenvalues of the loss with its penalties."""
        curvatures: list[float] = []
        take = overfit_validation.implicit_step

        def measured(model, lam, parts, solver):
            params = list(model.parameters())
            loss = models.loss(model, parts.train) + models.penalty(params, lam)
            curvatures.append(lanczos(System(hg.Hessian(loss, params, engine="eager"), 0.0, None), 5).high)
            return take(model, lam, parts, solver)

        monkeypatch.setattr(overfit_validation, "implicit_step", measured)
        steps, changes = 70, {"max_steps": 70, "outer_lr": 0.2, "target": 2.0}
        for seed, record in enumerate(runs(overfit_validation.EXPERIMENT, "cnn K=3", 4, tmp_path, **changes)):
            along = curvatures[steps * seed : steps * (seed + 1)]
            assert along[0] < 2 and along[-1] > 1e4
            both = [min(scores) for scores in zip(record["train"], record["validation"], strict=True)]
            assert both.index(1.0) < 60
            assert set(both[60:]) == {1.0}

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["mlp", "cnn"])
    def test_without_tuning_the_validation_set_is_not_fitted(self, name, tmp_path):
        records = runs(overfit_validation.EXPERIMENT, f"{name} none", 4, tmp_path)
        assert max(r["final"][1] for r in records) <= 0.9


class TestBaselines:
    def test_every_method_keeps_to_its_budget_and_none_to_less(self, tmp_path):
        budget = {"max_steps": 60, "max_seconds": 0.05, "cold_steps": 20, "judged_by": 50}
        for arm in baselines.protocol(Settings(quick=True)).arms:
            (record,) = runs(baselines.EXPERIMENT, arm, 1, tmp_path, **budget)
            if arm != baselines.MEMORY:
                steps, seconds, loss = zip(*record["points"], strict=True)
                assert list(steps) == sorted(steps) and list(seconds) == sorted(seconds)
                assert list(loss) == sorted(loss, reverse=True)
                # A search reads its clock after the point was noted: what lies between is not on record.
                assert steps[-1] >= 60 and (seconds[-1] >= 0.045 or arm.startswith("grid"))
                assert all(0 < record[key][0] < 2.4 and record[key][1] > 0.5 for key in ("steps", "seconds"))

    def test_without_optuna_the_other_searches_remain(self, monkeypatch):
        monkeypatch.setattr(baselines.search, "bayesian_available", lambda: False)
        arms = baselines.protocol(Settings()).arms
        assert "random, 10" in arms and not any("Bayesian" in arm for arm in arms)

    def test_memory_of_unrolling_grows_and_of_a_series_does_not(self, tmp_path):
        (record,) = runs(baselines.EXPERIMENT, baselines.MEMORY, 1, tmp_path)
        assert record["unrolling"][-1] >= 3 * record["Neumann"][-1]
        assert record["Neumann"][-1] <= 1.1 * record["Neumann"][1]
