"""Hypergradients against closed forms, finite differences of the re-solved inner problem, and unrolling."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import hypergrad_ext as hg
from tests.cases import PROBLEMS, logistic, mlp, quadratic, spd
from tests.compare import assert_close, relative_error

EXACT = [hg.Direct(), hg.CG(tol=1e-13)]


def closed_form(problem) -> Tensor:
    """Logistic regression with exp(lam) w^2: the mixed derivative is diag(2 exp(lam) w)."""
    w, lam = problem.params[0].detach().double(), problem.hparams[0].detach().double()
    hessian = problem.hessian().double()
    gradient = torch.autograd.grad(problem.val(problem.params), problem.params[0])[0].double()
    x = torch.linalg.solve(hessian, gradient.reshape(-1)).view_as(w)
    return -x * 2 * lam.exp() * w


class TestLogisticRegressionClosedForm:
    @pytest.mark.parametrize("solver", EXACT, ids=str)
    def test_float64(self, solver):
        problem = logistic()
        (grad,) = hg.hypergradient(problem.val, problem.train, problem.params, problem.hparams, solver)
        assert_close(grad, closed_form(problem), 1e-8)

    @pytest.mark.parametrize("solver", [hg.Direct(), hg.CG(tol=1e-6)], ids=str)
    def test_float32(self, solver):
        truth = closed_form(logistic())
        torch.manual_seed(0)
        problem = logistic(torch.float32)
        (grad,) = hg.hypergradient(problem.val, problem.train, problem.params, problem.hparams, solver)
        assert grad.dtype == torch.float32
        assert_close(grad, truth, 1e-4)

    def test_finite_differences_of_the_resolved_inner_problem(self):
        """The only check that knows nothing of the implicit function theorem."""
        problem = logistic()
        lam, w = problem.hparams[0], problem.params[0]
        (grad,) = hg.hypergradient(problem.val, problem.train, problem.params, [lam], hg.Direct())
        direction, step = torch.randn_like(lam), 1e-5

        def resolved(t: float) -> Tensor:
            with torch.no_grad():
                start, best = lam.clone(), w.detach().clone()
                lam.copy_(start + t * direction)
            for _ in range(10):
                inner = lambda flat: problem.train([flat.view_as(w)])  # noqa: E731
                gradient = torch.func.grad(inner)(best.view(-1))
                best = best - torch.linalg.solve(torch.func.hessian(inner)(best.view(-1)), gradient).view_as(w)
            with torch.no_grad():
                lam.copy_(start)
            return problem.val([best]).detach()

        difference = (resolved(step) - resolved(-step)) / (2 * step)
        assert float(difference) == pytest.approx(float((grad * direction).sum()), rel=1e-6)


class TestStructure:
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_all_forms_agree(self, name):
        """Losses as tensors or functions; hypergradient or autograd node."""
        problem = PROBLEMS[name]()
        arguments = (problem.params, problem.hparams, hg.Direct())
        by_function = hg.hypergradient(problem.val, problem.train, *arguments)
        by_tensor = hg.hypergradient(problem.val(problem.params), problem.train(problem.params), *arguments)
        mixed = hg.hypergradient(problem.val(problem.params), problem.train, *arguments)
        problem.val(hg.implicit(problem.train, *arguments)).backward()
        by_node = [t.grad for t in problem.hparams]
        for other in (by_tensor, mixed, by_node):
            assert_close(other, by_function, 1e-12, name)

    def test_structure_of_hparams_is_kept(self):
        problem = mlp()
        for hparams, kind in [
            (problem.hparams, tuple),
            (tuple(problem.hparams), tuple),
            (iter(problem.hparams), tuple),
        ]:
            grads = hg.hypergradient(problem.val, problem.train, problem.params, hparams)
            assert type(grads) is kind and [g.shape for g in grads] == [t.shape for t in problem.hparams]
        named = {f"l{i}": t for i, t in enumerate(problem.hparams)}
        assert list(hg.hypergradient(problem.val, problem.train, problem.params, named)) == list(named)
        w, lam = torch.tensor(1.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        assert isinstance(hg.hypergradient(w**2, (w - 3) ** 2 + lam * w**2, w, lam), Tensor)

    def test_direct_gradient_is_added(self):
        w, lam = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, 1.0))
        grad = hg.hypergradient(w**2 + 5 * lam, (w - 3) ** 2 + lam * w**2, w, lam)
        assert float(grad) == pytest.approx(-2.25 + 5)

    def test_unused_hyperparameters_get_zero_or_are_named(self):
        w, lam, idle = (torch.tensor(x, requires_grad=True) for x in (1.5, 1.0, 2.0))
        train, val = (w - 3) ** 2 + lam * w**2, w**2
        assert hg.hypergradient(val, train, w, [lam, idle])[1] == 0
        with pytest.raises(ValueError, match=r"unused hparams\[1\]"):
            hg.hypergradient(val, train, w, [lam, idle], unused="error")
        with pytest.raises(ValueError, match=r"unused hparams"):
            hg.hypergradient(val, train, w, [idle])

    def test_exchanged_losses_are_noticed(self):
        w, lam, direct = (torch.tensor(x, requires_grad=True) for x in (1.5, 1.0, 2.0))
        train, val = (w - 3) ** 2 + lam * w**2, w**2
        for losses in ((train, val), (lambda w: (w - 3) ** 2 + lam * w**2, lambda w: w**2)):
            with pytest.warns(UserWarning, match="are val_loss and train_loss exchanged"):
                hg.hypergradient(*losses, w, lam)
            with pytest.raises(ValueError, match="are val_loss and train_loss exchanged"):
                hg.hypergradient(*losses, w, lam, unused="error")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hg.hypergradient(train, val, w, lam, unused="zeros")
            hg.hypergradient(val * direct, train, w, [lam, direct], unused="error")
        with pytest.warns(UserWarning, match="are val_loss and train_loss exchanged"):
            hg.HyperOptimizer(torch.optim.SGD([lam], lr=0.0), w).step(train, val)

    def test_warm_start_through_the_solution(self):
        problem = mlp()
        arguments = (problem.val, problem.train, problem.params, problem.hparams, hg.CG(tol=1e-10))
        grads, cold = hg.hypergradient(*arguments, return_solution=True)
        again, warm = hg.hypergradient(*arguments, x0=cold.value, return_solution=True)
        assert_close(again, grads, 1e-8)
        assert warm.steps < cold.steps

    def test_user_graph_survives(self):
        problem = mlp()
        val, train = problem.val(problem.params), problem.train(problem.params)
        first = hg.hypergradient(val, train, problem.params, problem.hparams)
        second = hg.hypergradient(val, train, problem.params, problem.hparams)
        assert_close(second, first, 1e-14)
        (val + train).backward()

    def test_nobodys_grad_is_touched(self):
        problem = mlp()
        hg.hypergradient(problem.val, problem.train, problem.params, problem.hparams)
        assert all(t.grad is None for t in [*problem.params, *problem.hparams])


class TestUnrolling:
    @pytest.mark.parametrize("steps", [1, 3, 10, 50])
    def test_unrolling_i_steps_at_the_optimum_is_neumann_with_i_terms(self, steps):
        """The paper's theorem: equal to rounding, K = i - 1."""
        problem, alpha = logistic(), 0.5
        w, lam = problem.params[0], problem.hparams[0]
        path = w.detach().clone().requires_grad_()
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(problem.train([path]), path, create_graph=True)
            path = path - alpha * gradient
        (unrolled,) = torch.autograd.grad(problem.val([path]), lam)
        (grad,) = hg.hypergradient(problem.val, problem.train, [w], [lam], hg.Neumann(steps - 1, alpha=alpha))
        assert_close(grad, unrolled, 1e-12)

    def test_series_approaches_the_inverse_and_identity_does_not(self):
        problem = logistic()
        arguments = (problem.val, problem.train, problem.params, problem.hparams)
        exact = hg.hypergradient(*arguments, hg.Direct())
        errors = [
            relative_error(hg.hypergradient(*arguments, solver), exact)
            for solver in (hg.Identity(), hg.Neumann(5), hg.Neumann(50), hg.Neumann(500))
        ]
        assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[3] < 1e-3


def test_gradients_can_be_written_to():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    val = (w**2).sum() + ((a + b) ** 2).sum() + c.sum()
    grads = hg.hypergradient(val, ((w - a.detach()) ** 2).sum(), w, [a, b, c])
    for g in grads:
        g.mul_(0.5)
    assert [g.tolist() for g in grads] == [[2, 2], [2, 2], [0.5, 0.5]]


class TestWeightsComputedFromHyperparameters:
    """The response of the weights is what a hypergradient adds; a graph that goes through them has it already."""

    def test_functions_see_the_weights_alone(self):
        lam = torch.tensor(1.0, requires_grad=True)
        w = 3 / (1 + lam)
        train = lambda w: (w - 3) ** 2 + lam * w**2  # noqa: E731
        assert float(hg.hypergradient(lambda w: w**2, train, w, lam)) == pytest.approx(-2.25)
        assert float(hg.hypergradient(w**2, train, w, lam, direct=False)) == pytest.approx(-2.25)

    def test_tensors_are_refused(self):
        log_lam = torch.tensor(0.0, requires_grad=True)
        lam = log_lam.exp()  # the hyperparameter, which was computed itself
        w = 3 / (1 + lam)
        train, val = lambda w: (w - 3) ** 2 + lam * w**2, lambda w: w**2
        for losses in ((val(w), train), (val, train(w)), (val(w), train(w))):
            with pytest.raises(ValueError, match="params: expected weights that do not depend on hparams"):
                hg.hypergradient(*losses, w, lam)
        with pytest.raises(ValueError, match="params: expected weights that do not depend on hparams"):
            hg.implicit(train(w), w, lam)

    def test_weights_computed_from_something_else_are_weights(self):
        base, lam = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        w = 3 * base
        assert float(hg.hypergradient(w**2, (w - 3) ** 2 + lam * w**2, w, lam)) == pytest.approx(-2.25)


class TestImplicit:
    def test_gradcheck(self):
        """Against numerical differentiation of the true optimum as a function of the hyperparameters."""
        a = spd(5, 4.0)

        def best(lam: Tensor) -> Tensor:
            w = torch.linalg.solve(a + torch.diag(lam.detach().exp()), torch.ones(5, dtype=torch.float64))
            train = lambda w: w @ a @ w / 2 + (lam.exp() * w.square()).sum() / 2 - w.sum()  # noqa: E731
            return hg.implicit(train, w, lam, hg.Direct())

        lam = torch.randn(5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(best, lam)
        assert torch.autograd.gradcheck(lambda t: (best(t) ** 3).sum() + t.sin().sum(), lam)

    def test_hyperparameters_may_be_computed(self):
        """Gradients flow on to whatever the hyperparameters were made of."""
        w, log_lam = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, 0.0))
        lam = log_lam.exp()
        best = hg.implicit(lambda w: (w - 3) ** 2 + lam * w**2, w, lam)
        (best**2).backward()
        assert float(log_lam.grad) == pytest.approx(-2.25)

    def test_gradients_accumulate_like_any_others(self):
        w, lam = torch.tensor(1.5), torch.tensor(1.0, requires_grad=True)
        for _ in range(2):
            (hg.implicit(lambda w: (w - 3) ** 2 + lam * w**2, w, lam) ** 2).backward()
        assert float(lam.grad) == pytest.approx(-4.5)

    def test_weights_share_memory_and_can_feed_several_losses(self):
        problem = quadratic()
        w = hg.implicit(problem.train, problem.params, problem.hparams, hg.CG(tol=1e-12))
        assert [t.data_ptr() for t in w] == [p.data_ptr() for p in problem.params]
        total = problem.val(w) + sum(t.sum() for t in w)
        total.backward()
        both = lambda p: problem.val(p) + sum(t.sum() for t in p)  # noqa: E731
        expected = hg.hypergradient(both, problem.train, problem.params, problem.hparams, hg.Direct())
        assert_close(problem.hparams[0].grad, expected, 1e-9)

    def test_second_order_is_refused(self):
        w, lam = torch.tensor(1.5), torch.tensor(1.0, requires_grad=True)
        best = hg.implicit(lambda w: (w - 3) ** 2 + lam * w**2, w, lam)
        (first,) = torch.autograd.grad(best**2, lam, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.backward()
        with pytest.raises(RuntimeError):
            torch.autograd.grad(first, lam)

    def test_hyperparameters_that_get_no_gradient_are_refused(self):
        w, lam = torch.tensor([1.5]), torch.tensor(1.0, requires_grad=True)
        best = hg.implicit(lambda w: ((w - 3) ** 2 + lam.detach() * w**2).sum(), w, lam)
        with pytest.raises(ValueError, match="hparams: expected hyperparameters that a loss depends on, got unused"):
            (best**2).sum().backward()

    def test_failure_in_the_backward_pass_raises(self):
        w, lam = torch.tensor(1.5), torch.tensor(1.0, requires_grad=True)
        best = hg.implicit(lambda w: (w - 3) ** 2 + lam * w**2, w, lam, hg.Neumann(50, alpha=10.0))
        with pytest.raises(hg.SolveError, match="diverged"):
            (best**2).backward()

    @pytest.mark.parametrize("bound", [False, True])
    def test_a_loop_over_tasks_whose_backward_pass_comes_last(self, bound):
        """A function that runs late sees the last task's data; it gave all tasks that one's response."""
        lam, total = torch.tensor(1.0, dtype=torch.float64, requires_grad=True), 0.0
        for target in (torch.tensor(t, dtype=torch.float64) for t in (3.0, 5.0)):
            late = lambda w: (w - target) ** 2 + lam * w**2  # noqa: B023, E731
            train = (lambda w, target=target: (w - target) ** 2 + lam * w**2) if bound else late
            total = total + hg.implicit(train, (target / 2).clone(), lam) ** 2
        if bound:
            total.backward()
            assert float(lam.grad) == pytest.approx(-(3**2 + 5**2) / 4)
        else:
            with pytest.raises(ValueError, match="got one in which target stands for something else by now; bind"):
                total.backward()

    def test_globals_that_a_loss_names_are_looked_at_too(self):
        names = {"hg": hg, "lam": torch.tensor(1.0, requires_grad=True), "goal": 3.0}
        loss = "lambda w: sum((w - goal) ** 2 for _ in '.') + lam * w**2"
        exec(f"best = hg.implicit({loss}, lam.detach() * 1.5, lam)", names)
        names["goal"] = float("3")  # the same number
        (names["best"] ** 2).backward(retain_graph=True)
        assert float(names["lam"].grad) == pytest.approx(-2.25)
        names["goal"] = 4.0
        with pytest.raises(ValueError, match="in which goal stands for something else"):
            (names["best"] ** 2).backward()

    @pytest.mark.parametrize("changed", ["params", "hparams"])
    def test_values_that_were_changed_before_the_backward_pass(self, changed):
        """The loss runs in the backward pass, and was differentiated where neither the user nor autograd had been."""
        w, lam = torch.tensor(1.5), torch.tensor(1.0, requires_grad=True)
        best = hg.implicit(lambda w: (w - 3) ** 2 + lam * w**4, w, lam)
        loss = 2 * best
        with torch.no_grad():
            (w if changed == "params" else lam).mul_(2)
        with pytest.raises(ValueError, match=f"{changed}: expected values that stay until the backward pass"):
            loss.backward()
