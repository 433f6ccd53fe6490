"""Multilayer perceptrons: the kernel against the reference, the operator against autograd's Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import hypergrad_ext as hg
from hypergrad_ext import backends, ops, reference_mlp
from tests.compare import assert_close, assert_no_worse_than_torch

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu, "softplus": F.softplus, "sigmoid": torch.sigmoid}
LOSSES = {"cross_entropy": F.cross_entropy, "squared": F.mse_loss}
CPU = torch.device("cpu")
# Odd widths, whole vectors, one column, more layers than one; 17 is one more than a float32 vector of AVX-512.
NETWORKS = [(5, 3), (16, 1), (20, 64, 2), (33, 17, 48, 10), (1, 130, 3), (7, 8, 7, 16, 5, 32, 3)]


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.unavailable(request.param, "cpu"):
        pytest.skip(reason)
    return request.param


def network(sizes, biases=True, dtype=torch.float64):
    params = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        params.append(torch.randn(o, i, dtype=dtype) / i**0.5)
        params += [0.3 * torch.randn(o, dtype=dtype)] if biases else []
    return [p.requires_grad_() for p in params]


def problem(sizes, n=40, activation="tanh", loss="cross_entropy", biases=True, dtype=torch.float64, l2=0.0):
    """Parameters, operator, and the same loss for autograd."""
    params, step = network(sizes, biases, dtype), 2 if biases else 1
    x = 1.5 * torch.randn(n, sizes[0], dtype=dtype)
    y = torch.randint(sizes[-1], (n,)) if loss == "cross_entropy" else torch.randn(n, sizes[-1], dtype=dtype)

    def mean_loss(params):
        h = x
        for at in range(0, len(params), step):
            h = F.linear(ACTIVATIONS[activation](h) if at else h, params[at], params[at + 1] if biases else None)
        return LOSSES[loss](h, y) + l2 * sum(w.square().sum() for w in params[::step])

    return params, hg.MLPHessian(x, params, y, activation=activation, loss=loss, l2=l2), mean_loss


def cast(arguments, dtype):
    """The arguments of mlp_hvp in another dtype, contiguous: rows without padding."""
    change = lambda x: x.to(dtype).contiguous() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return [[change(t) for t in x] if isinstance(x, list) else change(x) for x in arguments]


class TestProduct:
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("sizes", NETWORKS, ids=str)
    def test_float64(self, sizes, activation, loss):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        for biases, n, k in [(True, 63, 1), (False, 65, 2)]:
            _, operator, _ = problem(sizes, n, activation, loss, biases, l2=0.1)
            arguments = operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64))
            value = ops.mlp_hvp.kernels["cpp"](*arguments)
            assert_close(value, reference_mlp.mlp_hvp(*arguments), 1e-13, f"biases={biases} n={n} k={k}")

    @pytest.mark.parametrize("n", [1, 2, 31, 63, 64, 65, 129, 200, 515])
    @pytest.mark.parametrize("sizes", [(33, 17, 48, 10), (24,) * 7], ids=str)
    def test_any_batch_and_number_of_vectors(self, n, sizes, backend):
        _, operator, _ = problem(sizes, n)
        for k in range(1, 6):
            arguments = operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64))
            value = ops.mlp_hvp.kernel(CPU, backend)(*arguments)
            assert_close(value, reference_mlp.mlp_hvp(*arguments), 1e-13, f"k={k}")

    @pytest.mark.parametrize(("activation", "loss"), [("relu", "squared"), ("tanh", "cross_entropy")])
    @pytest.mark.parametrize(("biases", "l2"), [(True, 0.0), (False, 0.1)])
    @pytest.mark.parametrize("sizes", [(130, 260, 129, 5), (144, 272, 128, 16)], ids=str)
    @pytest.mark.parametrize("n", [20, 300])
    def test_products_of_many_multiply_adds(self, n, sizes, activation, loss, biases, l2, backend):
        _, operator, _ = problem(sizes, n, activation, loss, biases, l2=l2)
        arguments = operator._model(torch.randn(8, operator.space.numel, dtype=torch.float64))
        assert_close(ops.mlp_hvp.kernel(CPU, backend)(*arguments), reference_mlp.mlp_hvp(*arguments), 1e-13)

    @pytest.mark.parametrize("width", range(1, 36))
    def test_any_width(self, width, backend):
        _, operator, _ = problem((width, 36 - width, width), 19)
        arguments = operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64))
        assert_close(ops.mlp_hvp.kernel(CPU, backend)(*arguments), reference_mlp.mlp_hvp(*arguments), 1e-13)

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
    @pytest.mark.parametrize(
        ("sizes", "n"), [((784, 64, 10), 256), ((33, 17, 48, 10), 200), ((32,) * 20, 300)], ids=str
    )
    def test_float32_is_no_less_accurate_than_torch(self, sizes, n, activation, loss, backend):
        _, operator, _ = problem(sizes, n, activation, loss)
        single = cast(operator._model(torch.randn(3, operator.space.numel, dtype=torch.float64)), torch.float32)
        truth = reference_mlp.mlp_hvp(*cast(single, torch.float64))
        value = ops.mlp_hvp.kernel(CPU, backend)(*single)
        assert value.dtype == torch.float32
        assert_no_worse_than_torch(value, reference_mlp.mlp_hvp(*single), truth, 1e-7)

    def test_padding_is_never_used(self):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        _, operator, _ = problem((5, 7, 9, 3), 21)
        arguments = operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64))
        truth = reference_mlp.mlp_hvp(*arguments)
        poisoned = []
        for x in arguments:
            if isinstance(x, list):
                x = [torch.full((len(t), 16), float("nan"), dtype=t.dtype)[:, : t.shape[1]].copy_(t) for t in x]
            poisoned.append(x)
        assert_close(ops.mlp_hvp.kernels["cpp"](*poisoned), truth, 1e-13)

    def test_rows_without_padding_are_copied(self):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        _, operator, _ = problem((5, 7, 9, 3), 21)
        arguments = operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64))
        truth = reference_mlp.mlp_hvp(*arguments)
        assert_close(ops.mlp_hvp.kernels["cpp"](*cast(arguments, torch.float64)), truth, 1e-13)
        transposed = [[t.T.contiguous().T for t in x] if isinstance(x, list) else x for x in arguments]
        assert_close(ops.mlp_hvp.kernels["cpp"](*transposed), truth, 1e-13)

    def test_no_rows_leave_the_penalty(self, backend):
        _, operator, _ = problem((5, 7, 3), 4, biases=False)
        arguments = operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64))
        weights, *saved, probabilities, v, scale, biases, _ = arguments
        empty = [[t[:0] for t in x] for x in saved]
        value = ops.mlp_hvp.kernel(CPU, backend)(weights, *empty, probabilities[:0], v, scale, biases, 0.25)
        assert_close(value, 0.5 * v, 1e-15)

    @pytest.mark.parametrize("k", [1, 5])
    def test_threads_change_nothing_but_rounding(self, k):
        _, operator, _ = problem((60, 70, 80, 9), 300)
        arguments = operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64))
        results = []
        for threads in (1, 2, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            results.append(ops.mlp_hvp(*arguments))
            torch.set_num_threads(before)
        assert_close(results[1], results[0], 1e-13)
        assert torch.equal(results[1], results[2])

    def test_not_finite_stays_visible(self, backend):
        _, operator, _ = problem((5, 7, 3), 9)
        v = torch.randn(2, operator.space.numel, dtype=torch.float64)
        v[0, 3] = float("nan")
        value = ops.mlp_hvp.kernel(CPU, backend)(*operator._model(v))
        assert value[0].isnan().any() and value[1].isfinite().all()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"v": torch.zeros(2, 25)}, ValueError, r"v must be contiguous with shape \(k, 26\)"),
            ({"v": torch.zeros(26, 2).T}, ValueError, "v must be contiguous"),
            ({"v": torch.zeros(2, 26).half()}, TypeError, "v must be float64 or float32, got Half"),
            ({"v": torch.zeros(2, 26, requires_grad=True)}, ValueError, "v must not require grad"),
            ({"v": None}, TypeError, "v must hold tensors, got NoneType"),
            ({"weights": []}, ValueError, "weights must hold at least one tensor"),
            ({"weights": torch.zeros(3)}, TypeError, "weights must be a list or tuple of tensors, got Tensor"),
            ({"weights": [torch.zeros(4, 3), torch.zeros(2, 4).double()]}, TypeError, "weights must be Float like v"),
            ({"weights": [torch.zeros(4, 3), torch.zeros(2, 5)]}, ValueError, r"weights must have shape \(2, 4\)"),
            ({"hidden": [torch.zeros(6, 3)]}, ValueError, "hidden must hold 2 tensors, got 1"),
            ({"hidden": [torch.zeros(6, 3), torch.zeros(5, 4)]}, ValueError, r"hidden must have shape \(6, 4\)"),
            ({"slopes": []}, ValueError, "slopes must hold 1 tensors, got 0"),
            ({"bends": [torch.zeros(6, 4)] * 2}, ValueError, "bends must hold 1 tensors, got 2"),
            ({"deltas": [torch.zeros(6, 3)]}, ValueError, r"deltas must have shape \(6, 2\)"),
            ({"probabilities": torch.zeros(6, 3)}, ValueError, r"probabilities must have shape \(6, 2\)"),
        ],
        ids=range(15),
    )
    def test_guards(self, change, error, message):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        arguments = {
            "weights": [torch.zeros(4, 3), torch.zeros(2, 4)],
            "hidden": [torch.zeros(6, 3), torch.zeros(6, 4)],
            "slopes": [torch.zeros(6, 4)],
            "bends": [],
            "deltas": [torch.zeros(6, 2)],
            "probabilities": None,
            "v": torch.zeros(2, 26),
        }
        with pytest.raises(error, match=message):
            ops.mlp_hvp.kernels["cpp"](**(arguments | change), scale=1.0, biases=True, l2=0.0)


class TestOperator:
    @pytest.mark.parametrize("biases", [False, True])
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_is_the_hessian_of_the_torch_loss(self, activation, loss, biases):
        params, operator, mean_loss = problem((6, 9, 5, 4), 50, activation, loss, biases, l2=0.2)
        assert_close(operator.dense(), hg.Hessian(mean_loss, params).dense(), 1e-12)
        v = [torch.randn((3, *p.shape), dtype=p.dtype) for p in params]
        assert_close(operator @ v, hg.Hessian(mean_loss, params) @ v, 1e-12)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_is_exact_far_out(self, activation):
        params, _, _ = problem((3, 8, 2), activation=activation)
        x, y = 40 * torch.randn(30, 3).double(), torch.randint(2, (30,))
        operator = hg.MLPHessian(x, params, y, activation=activation)

        def mean_loss(p):
            return F.cross_entropy(F.linear(ACTIVATIONS[activation](F.linear(x, p[0], p[1])), p[2], p[3]), y)

        v = [torch.randn_like(p) for p in params]
        value = operator @ v
        assert all(t.isfinite().all() for t in value)
        assert_close(value, hg.Hessian(mean_loss, params) @ v, 1e-10)

    @pytest.mark.parametrize("solver", [hg.CG(tol=1e-12), hg.Neumann(400), hg.Direct(), "auto"], ids=str)
    @pytest.mark.parametrize("rows", [None, 3])
    def test_solves_like_the_hessian(self, solver, rows):
        params, operator, mean_loss = problem((6, 9, 4), l2=0.3)
        lead = () if rows is None else (rows,)
        b = [torch.randn((*lead, *p.shape), dtype=p.dtype) for p in params]
        # Biases are not penalised: the damping makes the whole positive definite.
        truth = hg.solve(hg.Hessian(mean_loss, params), b, hg.Direct(), damping=0.4).value
        assert_close(hg.solve(operator, b, solver, damping=0.4).value, truth, 1e-3 if solver == "auto" else 1e-8)

    def test_whole_solve_equals_the_loop_in_every_respect(self, monkeypatch):
        params, operator, _ = problem((6, 9, 4), l2=0.3)
        b = [torch.randn((2, *p.shape), dtype=p.dtype) for p in params]
        hg.solve(operator, b, hg.Neumann(0))  # finds and keeps the step size
        for solver in (hg.Neumann(30), hg.Neumann(500, tol=1e-6), hg.CG(tol=1e-8)):
            whole = hg.solve(operator, b, solver, damping=0.4)
            with monkeypatch.context() as patch:
                patch.setattr(operator, "neumann_series", lambda *args: None)
                patch.setattr(operator, "conjugate_gradients", lambda *args: None)
                loop = hg.solve(operator, b, solver, damping=0.4)
            assert_close(whole.value, loop.value, 1e-12)
            assert (whole.status, whole.steps, whole.hvps) == (loop.status, loop.steps, loop.hvps)

    def test_divergence_and_negative_curvature_are_reported(self):
        params, operator, _ = problem((6, 9, 4))
        b = [torch.randn_like(p) for p in params]
        assert hg.solve(operator, b, hg.Neumann(2000, alpha=500.0), throw=False).status == "diverged"
        assert hg.solve(operator, b, hg.CG(), throw=False).status == "negative_curvature"

    @pytest.mark.parametrize("width", [6, 8, 64])
    def test_inputs_and_parameters_changed_later_do_not_matter(self, width):
        inputs, y = torch.randn(10, width, dtype=torch.float64), torch.randint(3, (10,))
        params = [torch.randn(5, width, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)]
        operator = hg.MLPHessian(inputs, params, y, activation="tanh")
        v = [torch.randn_like(p) for p in params]
        before = operator @ v
        for t in (inputs, *params):
            t.zero_()
        assert_close(operator @ v, before, 0.0)

    def test_small_vectors(self):
        # Matrix units take what is below 1e-38 for zero.
        inputs, y = torch.randn(256, 200), torch.randn(256, 192)
        operator = hg.MLPHessian(inputs, [torch.randn(192, 200) / 16], y, loss="squared")
        v = torch.randn(3, 192, 200)
        lead = torch.tensor([1.0, 2.0**-100, 2.0**-120])[:, None, None]
        assert_close((operator @ [lead * v])[0] / lead, (operator @ [v])[0], 1e-6)

    def test_refuses_modules_that_compute_something_else(self):
        class Scaled(nn.Sequential):
            def forward(self, x):
                return super().forward(x) / 10

        layer, tied = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        tied[2].weight = tied[0].weight
        hooked = nn.Linear(4, 4)
        hooked.register_forward_hook(lambda part, x, out: 2 * out)
        whole, replaced, inside = (nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        whole.register_forward_hook(lambda part, x, out: 2 * out)
        replaced.forward = lambda x: 2 * nn.Sequential.forward(replaced, x)
        inside[0].forward = lambda x: 2 * nn.Linear.forward(inside[0], x)
        models = {
            "got one with hooks": whole,
            "got one with hooks or a forward of its own": replaced,
            "got hooks or other": nn.Sequential(*inside),
            "got Scaled": Scaled(layer),
            "share": nn.Sequential(layer, nn.Tanh(), layer),
            "that several of them share": tied,
            "hooks or other parameters in place 0": nn.Sequential(prune.identity(nn.Linear(4, 4), "weight")),
            "hooks or other parameters": nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4))),
            "in place 0": nn.Sequential(hooked),
            "got ParametrizedLinear": nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))),
        }
        for message, model in models.items():
            with pytest.raises(ValueError, match=message):
                hg.MLPHessian(torch.randn(6, 4), model, torch.arange(6) % 4)

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            (nn.ReLU(), "relu"),
            (nn.Tanh(), "tanh"),
            (nn.GELU(), "gelu"),
            (nn.Softplus(), "softplus"),
            (nn.Sigmoid(), "sigmoid"),
        ],
    )
    def test_sequential_and_dict(self, module, name):
        model = nn.Sequential(nn.Linear(5, 6), module, nn.Linear(6, 3)).double()
        x, y = torch.randn(30, 5).double(), torch.randint(3, (30,))
        operator = hg.MLPHessian(x, model, y)
        assert operator.activation == name
        v = {key: torch.randn_like(p) for key, p in reversed(list(model.named_parameters()))}
        truth = hg.Hessian(F.cross_entropy(model(x), y), model) @ v
        value = operator @ v
        assert_close([value[key] for key in truth], list(truth.values()), 1e-12)

    def test_hypergradient_with_the_closed_form(self):
        params, operator, mean_loss = problem((6, 9, 4), l2=0.3)
        lam = torch.zeros((), dtype=torch.float64, requires_grad=True)
        train = lambda p: mean_loss(p) + (lam * p[0]).sum()  # noqa: E731
        val = lambda p: (p[0] ** 2).sum() + p[1].sum()  # noqa: E731
        expected = hg.hypergradient(val, train, params, lam, hg.Direct(), damping=0.4)
        value = hg.hypergradient(val, train, params, lam, hg.CG(tol=1e-12), damping=0.4, operator=operator)
        assert_close(value, expected, 1e-9)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda x, p, y: hg.MLPHessian(x, p, y, activation="elu"), ValueError, "activation: .* got 'elu'"),
            (lambda x, p, y: hg.MLPHessian(x, p, y, loss="hinge"), ValueError, "loss: expected one of .* got 'hinge'"),
            (lambda x, p, y: hg.MLPHessian(x, p, y, l2=-1.0), ValueError, "l2: expected a finite number >= 0, got -1"),
            (lambda x, p, y: hg.MLPHessian([1.0], p, y), TypeError, "inputs: expected a tensor, got list"),
            (lambda x, p, y: hg.MLPHessian(x.double(), p, y), TypeError, "inputs: expected torch.float32"),
            (lambda x, p, y: hg.MLPHessian(x[:, :4], p, y), ValueError, r"inputs: expected shape \(n, 5\) with n > 0"),
            (lambda x, p, y: hg.MLPHessian(x[:0], p, y), ValueError, r"inputs: .* got \(0, 5\)"),
            (lambda x, p, y: hg.MLPHessian(x, p, None), TypeError, "targets: expected a tensor, got NoneType"),
            (lambda x, p, y: hg.MLPHessian(x, p, y.float()), TypeError, "targets: expected torch.int64 for cross_en"),
            (lambda x, p, y: hg.MLPHessian(x, p, y[:3]), ValueError, r"targets: expected shape \(6,\)"),
            (lambda x, p, y: hg.MLPHessian(x, p, y - 7), ValueError, "targets: expected classes from 0 to 2, got -7"),
            (lambda x, p, y: hg.MLPHessian(x, p, y.float(), loss="squared"), ValueError, r"targets: .* \(6, 3\)"),
            (lambda x, p, y: hg.MLPHessian(x, p[:3], y), ValueError, "params: expected a weight and a bias for every"),
            (
                lambda x, p, y: hg.MLPHessian(x, [p[0], p[1][:3], *p[2:]], y),
                ValueError,
                r"params\[1\]: expected a bias of",
            ),
            (lambda x, p, y: hg.MLPHessian(x, [p[0], p[0].clone()], y), ValueError, r"params\[1\]: .* \(outputs, 4\)"),
            (lambda x, p, y: hg.MLPHessian(x, [p[0].bfloat16()], y), TypeError, "params: expected all float64 or all"),
            (lambda x, p, y: hg.MLPHessian(x, nn.Linear(5, 3), y), ValueError, "params: .*nn.Sequential.* got Linear"),
            (
                lambda x, p, y: hg.MLPHessian(x, nn.Sequential(nn.Linear(5, 3), nn.ELU(), nn.Linear(3, 3)), y),
                ValueError,
                r"params: .* got ELU\(alpha=1.0\) in place 1",
            ),
            (
                lambda x, p, y: hg.MLPHessian(x, nn.Sequential(nn.Linear(5, 3), nn.Tanh()), y),
                ValueError,
                "params: .* got Linear, Tanh",
            ),
            (
                lambda x, p, y: hg.MLPHessian(x, nn.Sequential(nn.Linear(5, 3), nn.GELU("tanh"), nn.Linear(3, 3)), y),
                ValueError,
                "params: .* got GELU",
            ),
            (
                lambda x, p, y: hg.MLPHessian(
                    x, nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)), y, activation="relu"
                ),
                ValueError,
                "activation: expected 'tanh', the one in params, got 'relu'",
            ),
        ],
        ids=range(21),
    )
    def test_refuses(self, make, error, message):
        params = [torch.zeros(4, 5), torch.zeros(4), torch.zeros(3, 4), torch.zeros(3)]
        with pytest.raises(error, match=message):
            make(torch.randn(6, 5), params, torch.arange(6) % 3)
