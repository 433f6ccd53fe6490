"""The differentiable functions of models: derivatives of every kind, batching, compilation, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import functional, reference
from tests.compare import assert_close

EXACT = hg.CG(tol=1e-14)


def glm(classes=1, intercept=True, n=12, d=3, k=None):
    """x, weights, a vector, l2; all float64."""
    x = torch.randn(n, d, dtype=torch.float64)
    weights = torch.rand(n, dtype=torch.float64) + 0.1
    if classes > 1:
        weights = torch.randn(n, classes, dtype=torch.float64).softmax(1)
    m = classes * (d + intercept)
    v = torch.randn(*(() if k is None else (k,)), m, dtype=torch.float64)
    return x, weights, v, torch.rand(m, dtype=torch.float64) + 0.1


def matrix(x, weights, l2, damping=0.0, intercept=True):
    """The whole matrix, in torch ops that autograd differentiates."""
    eye = torch.eye(len(l2), dtype=x.dtype)
    return reference.glm_hvp(x, weights, eye, l2, 1 / len(x), intercept) + damping * eye


models = pytest.mark.parametrize(
    ("classes", "intercept", "k"), [(1, True, None), (1, False, 2), (3, True, 2), (3, False, None)], ids=str
)


@models
class TestGLMProduct:
    def test_derivatives(self, classes, intercept, k):
        x, weights, v, l2 = glm(classes, intercept, k=k)
        v.requires_grad_()

        def f(v):
            return functional.glm_hvp(x, weights, v, l2=l2, intercept=intercept)

        assert_close(f(v), v @ matrix(x, weights, l2, 0.0, intercept), 1e-13)
        assert gradcheck(f, v, check_forward_ad=True)
        assert gradgradcheck(lambda v: f(v).square(), v)
        assert_close(torch.func.jacfwd(f)(v), torch.func.jacrev(f)(v), 1e-14)

    @pytest.mark.parametrize("in_dims", [(None, None, 0), (None, None, -1), (0, 0, None), (1, None, 0)], ids=str)
    def test_vmap(self, classes, intercept, k, in_dims):
        x, weights, v, _ = glm(classes, intercept, k=k)
        tensors = x, weights, v
        tensors = [t if d is None else torch.stack([t, t / 2, 2 * t], d) for t, d in zip(tensors, in_dims, strict=True)]

        def f(*tensors):
            return functional.glm_hvp(*tensors, intercept=intercept, scale=0.3)

        rows = [[t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)] for i in range(3)]
        assert_close(torch.func.vmap(f, in_dims)(*tensors), torch.stack([f(*row) for row in rows]), 1e-14)

    def test_gradient_under_compile(self, classes, intercept, k):
        torch._dynamo.reset()
        x, weights, v, l2 = glm(classes, intercept, k=k)
        v.requires_grad_()

        def f(v):
            return functional.glm_hvp(x, weights, v, l2=l2, intercept=intercept).square().sum()

        (value,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(v), v)
        (truth,) = torch.autograd.grad(f(v), v)
        assert_close(value, truth, 1e-14)


@models
class TestGLMSolve:
    def arguments(self, classes, intercept, k):
        x, weights, b, l2 = glm(classes, intercept, k=k)
        damping = torch.tensor(0.3, dtype=torch.float64)
        return [t.requires_grad_() for t in (x, weights, b, l2, damping)]

    def test_derivatives_in_all_arguments(self, classes, intercept, k):
        def f(x, weights, b, l2, damping):
            return functional.glm_solve(x, weights, b, l2=l2, damping=damping, intercept=intercept, solver=EXACT)

        arguments = self.arguments(classes, intercept, k)
        x, weights, b, l2, damping = arguments

        def through_the_inverse(x, weights, b, l2, damping):
            return b @ torch.linalg.inv(matrix(x, weights, l2, damping, intercept))

        assert_close(f(*arguments), through_the_inverse(*arguments), 1e-12)
        tangents = torch.randn_like(b)
        value = torch.autograd.grad(f(*arguments), arguments, tangents)
        truth = torch.autograd.grad(through_the_inverse(*arguments), arguments, tangents)
        for name, ours, theirs in zip(("x", "weights", "b", "l2", "damping"), value, truth, strict=True):
            assert_close(ours, theirs, 1e-11, name)
        assert gradcheck(f, arguments, check_forward_ad=True)
        assert gradgradcheck(f, arguments)

    @pytest.mark.parametrize("one", range(5), ids=["x", "weights", "b", "l2", "damping"])
    def test_derivative_in_one_argument(self, classes, intercept, k, one):
        arguments = [t.detach() for t in self.arguments(classes, intercept, k)]

        def f(t):
            x, weights, b, l2, damping = [*arguments[:one], t, *arguments[one + 1 :]]
            return functional.glm_solve(x, weights, b, l2=l2, damping=damping, intercept=intercept, solver=EXACT)

        assert gradcheck(f, arguments[one].clone().requires_grad_(), check_forward_ad=True)
        t = arguments[one]
        assert_close(torch.func.jacfwd(f)(t), torch.func.jacrev(f)(t), 1e-10)

    @pytest.mark.parametrize(
        "in_dims", [(None, None, 0, None), (0, 0, None, None), (None, None, -1, 0), (1, None, 0, 0)], ids=str
    )
    def test_vmap(self, classes, intercept, k, in_dims):
        x, weights, b, l2 = [t.detach() for t in self.arguments(classes, intercept, k)][:4]
        # Probabilities stay what they are: D has to be positive.
        three = [x, x / 2, 2 * x], [weights, weights.roll(1, 0), weights.roll(2, 0)], [b, -b, 2 * b], [l2, 2 * l2, l2]
        tensors = [t[0] if d is None else torch.stack(t, d) for t, d in zip(three, in_dims, strict=True)]

        def f(x, weights, b, l2):
            return functional.glm_solve(x, weights, b, l2=l2, intercept=intercept, solver=EXACT)

        rows = [[t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)] for i in range(3)]
        assert_close(torch.func.vmap(f, in_dims)(*tensors), torch.stack([f(*row) for row in rows]), 1e-11)


@pytest.mark.parametrize("solver", [EXACT, hg.Neumann(steps=2000), hg.Direct()], ids=lambda s: type(s).__name__)
def test_any_solver_and_the_hypergradient_of_a_penalty(solver):
    x, _, w, _ = glm(d=4, intercept=False)
    y = torch.rand(len(x), dtype=torch.float64)
    l2 = torch.full((4,), 0.2, dtype=torch.float64, requires_grad=True)
    # Ridge regression: the minimiser itself is a solve.
    best = functional.glm_solve(x, torch.ones_like(y), x.T @ y / len(x), l2=l2, solver=solver)
    (value,) = torch.autograd.grad((best - w).square().sum(), l2)
    closed = torch.linalg.solve(x.T @ x / len(x) + l2.diag(), x.T @ y / len(x))
    (truth,) = torch.autograd.grad((closed - w).square().sum(), l2)
    assert_close(value, truth, 1e-9)


def test_solve_is_left_out_of_a_compiled_graph():
    torch._dynamo.reset()
    x, weights, b, l2 = glm(intercept=False)
    l2.requires_grad_()

    def f(l2):
        return functional.glm_solve(x, weights, b, l2=2 * l2, solver=EXACT).square().sum()

    (value,) = torch.autograd.grad(torch.compile(f, backend="aot_eager")(l2), l2)
    (truth,) = torch.autograd.grad(f(l2), l2)
    assert_close(value, truth, 1e-12)


@pytest.mark.parametrize("classes", [1, 3])
def test_solve_with_data_in_bfloat16(classes):
    x, weights, b, _ = (t.float() for t in glm(classes))
    x, damping = x.bfloat16(), torch.tensor(0.5)

    def f(x, weights, damping):
        return functional.glm_solve(x, weights, b, damping=damping, intercept=True)

    for of, at in ((lambda t: f(x, t, damping), weights), (lambda t: f(x, weights, t), damping)):
        truth = torch.func.jacrev(lambda t, of=of: of(t))(at)
        assert truth.isfinite().all() and truth.abs().max() > 0
        assert_close(torch.func.jacfwd(of)(at), truth, 1e-4)
    exact = torch.func.jacrev(lambda t: f(x.float(), t, damping))(weights)
    assert_close(torch.func.jacrev(lambda t: f(x, t, damping))(weights), exact, 1e-4)


@pytest.mark.parametrize("like", [torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(1)], ids=["(1, 1, 1)", "f32"])
@pytest.mark.parametrize("k", [None, 2])
def test_damping_is_one_number_in_any_shape_and_dtype(like, k):
    x, weights, b, l2 = glm(k=k)

    def f(damping):
        return functional.glm_solve(x, weights, b, l2=l2, damping=damping, intercept=True, solver=EXACT)

    truth = torch.func.jvp(f, (torch.tensor(0.5, dtype=torch.float64),), (torch.tensor(2.0, dtype=torch.float64),))[1]
    assert_close(torch.func.jvp(f, (like + 0.5,), (like + 2,))[1], truth, 1e-12)


def test_solve_and_its_derivatives_under_autocast():
    x, weights, b, l2 = (t.float().requires_grad_() for t in glm(3))

    def results():
        u = functional.glm_solve(x, weights, b, l2=l2, intercept=True)
        forward = torch.func.jvp(
            lambda x: functional.glm_solve(x, weights, b, l2=l2, intercept=True), (x.detach(),), (x.detach(),)
        )[1]
        return [u.detach(), forward.detach(), *torch.autograd.grad(u.sum(), (x, weights, b, l2))]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = results()
    assert_close(value, expected, 0.0)


def test_failed_solves_are_loud():
    x, weights, b, l2 = glm(intercept=False)
    with pytest.raises(hg.SolveError, match="right-hand side"):
        functional.glm_solve(x, weights, torch.full_like(b, torch.nan), l2=l2)
    with pytest.warns(hg.SolveWarning, match="max_steps"):
        functional.glm_solve(x, weights, b, l2=l2, solver=hg.CG(tol=1e-12, max_steps=1))
    with pytest.raises(hg.SolveError, match="negative_curvature"):
        functional.glm_solve(x, -weights, b)
    l2.requires_grad_()
    u = functional.glm_solve(x, weights, b, l2=l2)
    with pytest.raises(hg.SolveError, match="right-hand side"):
        u.backward(torch.full_like(u, torch.inf))


class TestMLPProduct:
    def operator(self):
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
        return hg.MLPHessian(x, model, y), {name: torch.randn_like(p) for name, p in model.named_parameters()}

    @pytest.mark.parametrize("k", [None, 2])
    def test_derivatives(self, k):
        operator, v = self.operator()
        names, leaves = list(v), [t if k is None else torch.stack([t] * k) for t in v.values()]
        leaves = [t.clone().requires_grad_() for t in leaves]

        def f(*leaves):
            return tuple(functional.mlp_hvp(operator, dict(zip(names, leaves, strict=True))).values())

        assert_close(f(*leaves), list((operator @ dict(zip(names, leaves, strict=True))).values()), 0.0)
        assert gradcheck(f, leaves, check_forward_ad=True)
        assert gradgradcheck(lambda *leaves: [t.square() for t in f(*leaves)], leaves)

    @pytest.mark.parametrize("k", [None, 2])
    def test_vmap(self, k):
        operator, v = self.operator()
        lead = (3,) if k is None else (3, k)
        batch = {name: torch.randn(*lead, *t.shape, dtype=t.dtype) for name, t in v.items()}
        value = torch.func.vmap(lambda v: functional.mlp_hvp(operator, v))(batch)
        rows = [operator @ {name: t[i] for name, t in batch.items()} for i in range(3)]
        assert_close(value, {name: torch.stack([row[name] for row in rows]) for name in v}, 1e-14)

    def test_gradient_under_compile(self):
        torch._dynamo.reset()
        operator, v = self.operator()
        v = [t.requires_grad_() for t in v.values()]

        def f(v):
            return sum(t.square().sum() for t in functional.mlp_hvp(operator, v))

        value = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(v), v)
        assert_close(value, torch.autograd.grad(f(v), v), 1e-14)

    def test_value_under_compile(self):
        torch._dynamo.reset()
        operator = hg.MLPHessian(torch.randn(4, 5), [torch.randn(3, 5), torch.randn(3)], torch.tensor([0, 1, 2, 0]))
        v = [torch.randn(3, 5), torch.randn(3)]
        compiled = torch.compile(lambda *v: functional.mlp_hvp(operator, list(v)), backend="aot_eager", fullgraph=True)
        assert_close(compiled(*v), operator @ v, 1e-6)

    def test_gradient_of_curvature_is_twice_the_product(self):
        operator, v = self.operator()

        def curvature(v):
            product = functional.mlp_hvp(operator, v)
            return sum((v[name] * product[name]).sum() for name in v)

        gradient, product = torch.func.grad(curvature)(v), operator @ v
        assert_close(gradient, {name: 2 * product[name] for name in gradient}, 1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"x: expected shape \(n, d\), got \(4,\)"),
        ({"weights": torch.zeros(3)}, ValueError, r"weights: expected shape \(4,\) or \(4, classes >= 2\), got \(3,\)"),
        ({"weights": torch.zeros(4, 1)}, ValueError, "weights: expected shape"),
        ({"vector": torch.zeros(3)}, ValueError, r": expected shape \(2,\) or \(k, 2\), got \(3,\)"),
        ({"vector": torch.zeros(2).half()}, TypeError, ": expected torch.float64 or torch.float32, got torch.float16"),
        ({"x": torch.zeros(4, 2).double()}, TypeError, "x: expected torch.float32 like"),
        ({"weights": torch.zeros(4).double()}, TypeError, "weights: expected torch.float32 like"),
        ({"l2": torch.zeros(3)}, ValueError, r"l2: expected shape \(2,\), got \(3,\)"),
        ({"l2": 0.1}, TypeError, "l2: expected a tensor, got float"),
        ({"x": torch.zeros(4, 2).to_sparse()}, TypeError, "x: expected a dense tensor, got one of layout"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("function", [functional.glm_hvp, functional.glm_solve], ids=lambda f: f.__name__)
def test_glm_functions_refuse(function, call, error, message):
    arguments = {"x": torch.zeros(4, 2), "weights": torch.ones(4), "vector": torch.ones(2)} | call
    with pytest.raises(error, match=message):
        function(arguments.pop("x"), arguments.pop("weights"), arguments.pop("vector"), **arguments)


@pytest.mark.parametrize("argument", ["x", "weights", "l2"])
def test_glm_hvp_refuses_tangents_of_all_but_the_vector(argument):
    arguments = {"x": torch.randn(4, 2), "weights": torch.rand(4), "l2": torch.ones(2)}
    t, v = arguments.pop(argument), torch.randn(2)

    def product(t, v):
        return functional.glm_hvp(v=v, **arguments, **{argument: t})

    with pytest.raises(ValueError, match=rf"pass {argument}\.detach\(\)"):
        torch.func.jvp(lambda t: product(t, v), (t,), (t,))
    with pytest.raises(ValueError, match=f"{argument}: expected no tangent"):
        torch.func.jvp(lambda t: torch.func.jvp(lambda v: product(t, v), (v,), (v,))[1], (t,), (t,))


def test_empty_sizes():
    x, weights, v = torch.zeros(4, 2), torch.ones(4), torch.ones(2)
    assert functional.glm_hvp(x[:, :0], weights, v[:0]).shape == (0,)
    assert reference.glm_hvp(x, weights, v[None][:0], None, 1.0, False).shape == (0, 2)
    assert torch.func.vmap(lambda v: functional.glm_hvp(x, weights, v))(v[None][:0]).shape == (0, 2)
    assert torch.func.vmap(lambda u: functional.softmax_hessian(x, u))(x[None][:0]).shape == (0, 4, 2)
    nothing = weights[:0].requires_grad_()
    u = functional.glm_solve(x[:0], nothing, v, damping=2.0)
    assert_close(u, v / 2, 1e-6)
    assert torch.autograd.grad(u.sum(), nothing)[0].shape == (0,)


def test_batches_of_none():
    x, weights, v, _ = glm(intercept=False)
    none = torch.func.vmap(lambda x: functional.glm_hvp(x, weights, v))(x.new_empty(0, *x.shape))
    assert none.shape == (0, *v.shape)
    h, c = torch.func.vmap(functional.lstm_cell, (0, None))(x.new_empty(0, 5, 8), x.new_empty(5, 2))
    assert h.shape == c.shape == (0, 5, 2)


def test_other_refusals():
    x, weights, v = torch.zeros(4, 2), torch.ones(4), torch.ones(2)
    with pytest.raises(ValueError, match=r"differentiable in v only; pass x\.detach\(\)"):
        functional.glm_hvp(x.clone().requires_grad_(), weights, v)
    with pytest.raises(ValueError, match="damping: expected a number or a tensor of one element"):
        functional.glm_solve(x, weights, v, damping=torch.ones(2))
    with pytest.raises(TypeError, match="damping: expected a number or a tensor of one element, got 'auto'"):
        functional.glm_solve(x, weights, v, damping="auto")
    with pytest.raises(ValueError, match="damping: expected a finite number >= 0, got -1"):
        functional.glm_solve(x, weights, v, damping=-1.0)
    with pytest.raises(ValueError, match="b: expected at least one vector in the batch, got 0"):
        functional.glm_solve(x, weights, v[None][:0], damping=1.0)
    with pytest.raises(TypeError, match="solver: expected a solver such as"):
        functional.glm_solve(x, weights, v, damping=1.0, solver="fast")
    with pytest.raises(TypeError, match="x: expected torch.float32 like b for a derivative by x, got torch.bfloat16"):
        functional.glm_solve(x.bfloat16().requires_grad_(), weights, v, damping=1.0)
    with pytest.raises(TypeError, match="operator: expected an MLPHessian, got Hessian"):
        functional.mlp_hvp(hg.Hessian(lambda w: w.square().sum(), v), v)


def test_derivative_of_a_classifier_is_that_of_its_loss():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    w = torch.randn(3, 4, dtype=torch.float64)
    v = torch.randn_like(w)
    weights = (x @ w.T).softmax(1)
    value = functional.glm_hvp(x, weights, v.flatten())
    _, truth = torch.autograd.functional.hvp(lambda w: F.cross_entropy(x @ w.T, y), w, v)
    assert_close(value, truth, 1e-13)
