"""Whole solves of networks and matrices in one call: every backend against the reference, errors, and who uses them."""

from __future__ import annotations

import pytest
import torch

import hypergrad_ext as hg
from hypergrad_ext import backends, ops, reference, reference_mlp
from hypergrad_ext.solvers.watch import Watch
from tests.compare import assert_close
from tests.test_mlp import problem

CPU = torch.device("cpu")


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.unavailable(request.param, "cpu"):
        pytest.skip(reason)
    return request.param


def dense(dtype, k=3):
    root = torch.randn(17, 17, dtype=torch.float64) / 17**0.5
    return ((root @ root.T).to(dtype), torch.randn(k, 17, dtype=torch.float64).to(dtype))


def network(dtype, k=3):
    _, operator, _ = problem((7, 8, 3), dtype=dtype, l2=1.0)
    return operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64).to(dtype))


MODELS = {"dense": dense, "mlp": network}
REFERENCES = {"dense": reference, "mlp": reference_mlp}
# Where the right-hand sides are among the arguments.
RIGHT_HAND_SIDES = {"dense": 1, "mlp": 6}


def exact(arguments):
    change = lambda a: a.double() if isinstance(a, torch.Tensor) else a  # noqa: E731
    return [[change(t) for t in a] if isinstance(a, list) else change(a) for a in arguments]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", MODELS)
class TestAgainstTheReference:
    def test_neumann(self, name, k, dtype, backend):
        arguments = MODELS[name](dtype, k)
        stop = torch.logspace(-2, -3, k, dtype=torch.float64)
        op = getattr(ops, f"{name}_neumann_solve")
        x, history = op.kernel(CPU, backend)(*arguments, 0.2, 0.5, 90, stop)
        true_x, true_history = getattr(REFERENCES[name], op.name)(*exact(arguments), 0.2, 0.5, 90, stop)
        assert torch.equal(history == -1, true_history == -1) and 3 < int((history[:, 0, 0] >= 0).sum()) < 90
        assert_close(x, true_x, 1e-13 if dtype == torch.float64 else 1e-6)
        assert_close(history, true_history, 1e-12 if dtype == torch.float64 else 1e-4)

    def test_conjugate_gradients(self, name, k, dtype, backend):
        arguments = MODELS[name](dtype, k)
        squares = arguments[RIGHT_HAND_SIDES[name]].double().square().sum(1)
        state = torch.stack([squares, 1e-6 * squares, 0 * squares, 0 * squares], 1)
        before = state.clone()
        op = getattr(ops, f"{name}_cg_solve")
        x, scalars, steps = op.kernel(CPU, backend)(*arguments, 0.5, 40, state)
        true_x, true_scalars, true_steps = getattr(REFERENCES[name], op.name)(*exact(arguments), 0.5, 40, state)
        assert torch.equal(state, before) and int(steps) == int(true_steps) and 1 < int(steps) < 40
        assert torch.equal(scalars[:, 3], true_scalars[:, 3])
        assert_close(x, true_x, 1e-11 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", MODELS)
class TestEdges:
    def test_no_step(self, name, backend):
        arguments = MODELS[name](torch.float64)
        b = arguments[RIGHT_HAND_SIDES[name]]
        never = torch.full((3,), -1.0, dtype=torch.float64)
        x, history = getattr(ops, f"{name}_neumann_solve").kernel(CPU, backend)(*arguments, 0.2, 0.1, 0, never)
        assert torch.equal(x, 0.2 * b) and history.shape == (0, 3, 2)

    def test_nan_ends_the_series(self, name, backend):
        arguments = MODELS[name](torch.float64)
        arguments[RIGHT_HAND_SIDES[name]].fill_(float("nan"))
        never = torch.full((3,), -1.0, dtype=torch.float64)
        _, history = getattr(ops, f"{name}_neumann_solve").kernel(CPU, backend)(*arguments, 0.2, 0.1, 9, never)
        assert (history[0, :, 1] == 1).all() and (history[1:] == -1).all()

    def test_refusals(self, name):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        arguments = list(MODELS[name](torch.float64))
        solve = getattr(ops, f"{name}_neumann_solve").kernels["cpp"]
        never = torch.full((3,), -1.0, dtype=torch.float64)
        with pytest.raises(ValueError, match="stop must be float64"):
            solve(*arguments, 0.2, 0.1, 5, never[:2])
        with pytest.raises(ValueError, match="steps must be at least 0"):
            solve(*arguments, 0.2, 0.1, -1, never)
        with pytest.raises(ValueError, match="state must be float64"):
            getattr(ops, f"{name}_cg_solve").kernels["cpp"](*arguments, 0.1, 5, never)
        place = RIGHT_HAND_SIDES[name]
        b = arguments[place]
        for wrong, error, message in [
            (b[:, 1:], ValueError, "contiguous"),
            (b.float(), TypeError, "must be"),
            (b.half(), TypeError, "b must be float64 or float32"),
            (b.clone().requires_grad_(), ValueError, "b must not require grad"),
        ]:
            arguments[place] = wrong
            with pytest.raises(error, match=message):
                solve(*arguments, 0.2, 0.1, 5, never)

    def test_a_backend_without_them_goes_step_by_step(self, name, monkeypatch):
        op = getattr(ops, f"{name}_cg_solve")
        assert op.kernel_if_any(CPU, "triton") is None and op.kernel_if_any(CPU, "torch") is not None
        monkeypatch.setenv(backends.ENVIRONMENT, "triton")
        assert op.kernel_if_any(CPU) is None
        with pytest.raises(ValueError, match="backend must be one of"):
            op.kernel_if_any(CPU, "fortran")

    @pytest.mark.parametrize("solver", [hg.Neumann(30), hg.CG(tol=1e-4)], ids=["Neumann", "CG"])
    def test_operators_use_them(self, name, solver, backend, monkeypatch):
        _, operator, _ = problem((7, 8, 3), l2=1.0)
        operator = operator if name == "mlp" else hg.DenseMatrix(dense(torch.float64)[0])
        b = [torch.randn_like(t) for t in operator.space.views(torch.zeros(operator.space.numel, dtype=torch.float64))]
        b = b if name == "mlp" else b[0]
        kind = "neumann" if isinstance(solver, hg.Neumann) else "cg"
        op, called = getattr(ops, f"{name}_{kind}_solve"), []
        kernel = op.kernels[backend]
        monkeypatch.setitem(op.kernels, backend, lambda *a: called.append(1) or kernel(*a))
        solution = hg.solve(operator, b, solver, damping=0.1, backend=backend)
        truth = hg.solve(hg.Callable(operator.__matmul__, b), b, solver, damping=0.1)
        assert called and solution.status == truth.status and solution.steps == truth.steps
        for ours, other in zip(
            *(x if isinstance(x, list) else [x] for x in (solution.value, truth.value)), strict=True
        ):
            assert_close(ours, other, 1e-8)


def state_of(watch):
    return {name: vars(value) if name == "_best" else value for name, value in vars(watch).items()}


class TestCalm:
    """`Watch.calm` takes in a whole solve as `Watch.over` takes in its steps, or leaves it alone."""

    def watches(self, tol=0.1):
        b = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
        return [Watch(b, torch.tensor([5.0, 1.0]), tol) for _ in range(2)]

    def test_equal_to_step_by_step(self):
        history = torch.tensor([[[16.0, 0.0], [0.5, 0.0]], [[0.2, 0.0], [0.4, 0.0]]], dtype=torch.float64)
        whole, single = self.watches()
        assert whole.calm(history.tolist())
        for step, stats in enumerate(history.tolist(), 1):
            single.over(stats, step)
        assert state_of(whole) == state_of(single)
        assert whole.statuses() == [hg.Status.CONVERGED, hg.Status.MAX_STEPS]

    @pytest.mark.parametrize(
        "last", [[[17.0, 0.0], [0.5, 0.0]], [[1.0, 1.0], [0.5, 0.0]], [[float("nan"), 0.0], [0.5, 0.0]]], ids=str
    )
    def test_leaves_growth_and_nan_to_it(self, last):
        history = torch.tensor([[[16.0, 0.0], [0.5, 0.0]], last], dtype=torch.float64)
        watch, fresh = self.watches()
        assert not watch.calm(history.tolist()) and state_of(watch) == state_of(fresh)

    def test_no_step(self):
        watch, _ = self.watches()
        assert not watch.calm([])
