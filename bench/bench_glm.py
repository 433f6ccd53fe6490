"""Products and whole solves of generalised linear models against torch, double backward and jitted JAX.

The torch baselines are the closed form in two matrix products, in the faster of its two orientations,
and the retained double backward that any other package runs. JAX takes part if it is installed. A timed call makes
as many products as a series has by default, fewer where one takes long; a solve is the public call, which forms the
Gram matrix anew each time if its plan says so, else takes the products of "fused".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypergrad_ext as hg
from bench import measure
from bench.ceilings import Floor
from bench.measure import interleave, median, spread
from hypergrad_ext import ops, reference

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

# Products of a timed call and steps of a solve, fewer where they take long; seconds that the rounds of one row may
# take, and of calls that are timed after one of their own.
PRODUCTS, STEPS, FEW, BUDGET, QUICK_BUDGET, TWICE = 20, 100, 10, 4.0, 0.5, 0.05
PROBLEMS = [(4096, 784, 1), (4096, 784, 10), (60_000, 784, 1), (60_000, 784, 10), (200_000, 128, 1), (1000, 32, 1)]
# Products also with so many classes that their weights do not fit the second cache.
PAIRS = [(shape, k) for shape in PROBLEMS for k in (1, 8)] + [((4096, 2048, 100), 1), ((2048, 2048, 1000), 1)]
# And one that takes long after all, since so many steps are worth a Gram matrix.
SOLVES = [(shape, k, None) for shape in PROBLEMS for k in (1, 8)] + [((60_000, 784, 1), 1, STEPS)]


class Problem:
    """Logistic or softmax regression at a random point, with a penalty that gives it a condition number near 100."""

    def __init__(self, n: int, d: int, classes: int, k: int, steps: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, d, generator=generator)
        self.classes, self.k, self.l2 = classes, k, 0.5e-2
        short = n * d * classes * k <= 4 * 10**7
        self.products, self.steps = (PRODUCTS, STEPS) if short else (FEW, FEW)
        self.steps = steps or self.steps
        self.w = 0.05 * torch.randn((classes, d) if classes > 1 else (d,), generator=generator)
        self.y = torch.randint(max(classes, 2), (n,), generator=generator)
        self.b = torch.randn(k, self.w.numel(), generator=generator)
        family = "softmax" if classes > 1 else "logistic"
        self.operator = hg.GLMHessian(self.x, self.w, family, l2=self.l2)
        self.halves = {
            name: hg.GLMHessian(self.x.to(dtype), self.w, family, l2=self.l2)
            for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16))
        }
        self.weights = self.operator.weights
        # Half of what converges: no vector of the series gets so small that it is subnormal, and slow for everyone.
        self.alpha = 0.5 / float(self._largest())

    def _largest(self) -> Tensor:
        v = torch.randn(1, self.w.numel())
        for _ in range(8):
            v = v / v.norm()
            v = self.fused(v)
        return v.norm()

    def repeated(self, product: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(self.products):
                product(self.b)

        return run

    def fused(self, v: Tensor) -> Tensor:
        return ops.glm_hvp(*self.operator._model(v))

    def fused_half(self, v: Tensor, name: str) -> Tensor:
        return ops.glm_hvp(*self.halves[name]._model(v))

    def weigh(self, z: Tensor) -> Tensor:
        if self.classes == 1:
            return self.weights[:, None] * z
        z = z.view(len(z), -1, self.classes)
        p = self.weights[:, None, :]
        return (p * (z - (p * z).sum(2, keepdim=True))).view(len(z), -1)

    def rows(self, v: Tensor) -> Tensor:
        """Two matrix products with vectors in rows."""
        v2 = v.view(-1, self.x.shape[1])
        if len(v2) == 1:
            return ((self.weights * torch.mv(self.x, v2[0])) @ self.x / len(self.x) + 2 * self.l2 * v2[0])[None]
        z = self.weigh(self.x @ v2.T)
        return (z.T @ self.x / len(self.x) + 2 * self.l2 * v2).view_as(v)

    def columns(self, v: Tensor) -> Tensor:
        """Two matrix products with vectors in columns."""
        v2 = v.view(-1, self.x.shape[1])
        z = self.weigh(self.x @ v2.T)
        return ((self.x.T @ z).T / len(self.x) + 2 * self.l2 * v2).reshape(v.shape)

    def double_backward(self) -> Callable[[Tensor], Tensor]:
        w = self.w.clone().requires_grad_()
        logits = self.x @ (w.T if self.classes > 1 else w)
        target = self.y if self.classes > 1 else self.y.float()
        mean = F.cross_entropy if self.classes > 1 else F.binary_cross_entropy_with_logits
        (g,) = torch.autograd.grad(mean(logits, target) + self.l2 * w.square().sum(), w, create_graph=True)

        def product(v: Tensor) -> Tensor:
            parts = [torch.autograd.grad(g, w, row.view_as(w), retain_graph=True)[0] for row in v]
            return torch.stack(parts).view_as(v)

        return product

    def loop(self, product: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def solve() -> Tensor:
            v, p = self.b.clone(), self.b.clone()
            for _ in range(self.steps):
                v.sub_(product(v), alpha=self.alpha)
                p.add_(v)
            return p.mul_(self.alpha)

        return solve

    def whole(self, operator: hg.GLMHessian) -> Callable[[], Tensor]:
        never = torch.full((self.k,), -1.0, dtype=torch.float64)
        return lambda: ops.glm_neumann_solve(*operator._model(self.b), self.alpha, 0.0, self.steps, never)[0]

    def planned(self) -> Callable[[], Tensor]:
        """The public call, Gram matrix formed anew each time if the plan says so."""

        def solve() -> Tensor:
            self.operator._gram = None
            b = self.b.view(self.k, *self.w.shape)
            return hg.solve(self.operator, b, hg.Neumann(self.steps, alpha=self.alpha), residual=False).value.view_as(
                self.b
            )

        return solve

    def jax_solve(self) -> Callable[[], object]:
        x, weights, b = (jnp.asarray(t.numpy()) for t in (self.x, self.weights, self.b))

        @jax.jit
        def solve(x, weights, b):
            def product(v):
                z = x @ v.reshape(-1, x.shape[1]).T
                if self.classes == 1:
                    z = weights[:, None] * z
                else:
                    z3 = z.reshape(len(x), -1, self.classes)
                    p = weights[:, None, :]
                    z = (p * (z3 - (p * z3).sum(2, keepdims=True))).reshape(z.shape)
                return (z.T @ x).reshape(v.shape) / len(x) + 2 * self.l2 * v

            def step(_, state):
                v, p = state
                v = v - self.alpha * product(v)
                return v, p + v

            return self.alpha * jax.lax.fori_loop(0, self.steps, step, (b, b))[1]

        return lambda: solve(x, weights, b).block_until_ready()


def exact(problem: Problem, operator: hg.GLMHessian | None = None) -> list[Tensor | None]:
    x, weights, _, l2, _, _ = (operator or problem.operator)._model(problem.b)
    return [x.double(), weights.double(), problem.b.double(), None if l2 is None else l2.double()]


def run(
    table: str, row: dict, variants: dict, problem: Problem, products: int, threads: int, benchmark, report, quick: bool
) -> None:
    """Times the variants, of which the first is ours: ratios are to it; "fused" is as near to the floor as said."""
    ours = next(iter(variants))
    floor = Floor(4 * problem.x.numel() * problem.classes * problem.k, problem.x, threads, products)
    with measure.threads(threads):
        timing = {"clock": measure.clock_for(threads), "budget": QUICK_BUDGET if quick else BUDGET, "twice": TWICE}
        seconds = interleave(variants | floor.variants, 300, warmup=1, rested=floor.variants, **timing)
        benchmark.pedantic(variants[ours], rounds=1)
    row[f"{ours} ms"] = median(seconds[ours]) * 1e3 / (products if ours == "fused" else 1)
    better = min(("torch rows", "torch columns"), key=lambda name: median(seconds[name]))
    row["% of floor"] = floor.percent(seconds, "fused")
    row["x torch at the floor"] = floor.speedup(seconds, better)
    for other in [*variants][1:]:
        row[f"x {other}"] = spread(seconds, other, ours)
    report(table, row)


def name(shape: tuple[int, int, int]) -> str:
    n, d, classes = shape
    return f"{n}x{d}, {'binary' if classes == 1 else f'{classes} classes'}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("shape", "k"), PAIRS)
def test_glm_hvp(shape, k, threads, benchmark, report, quick):
    problem = Problem(*shape, k)
    v = problem.b
    truth = reference.glm_hvp(*exact(problem), problem.operator.scale, False)
    error = float((problem.fused(v) - truth).norm() / truth.norm())
    by_torch = float((problem.rows(v) - truth).norm() / truth.norm())
    assert error <= 2 * by_torch + 1e-7, f"{error:.2e} against torch's {by_torch:.2e}"
    double_backward = problem.double_backward()
    assert (double_backward(v) - truth).norm() < 1e-4 * truth.norm()
    products = {
        "fused": problem.fused,
        "fused bf16": lambda v: problem.fused_half(v, "bf16"),
        "fused f16": lambda v: problem.fused_half(v, "f16"),
        "torch rows": problem.rows,
        "torch columns": problem.columns,
        "double backward": double_backward,
    }
    variants = {name: problem.repeated(product) for name, product in products.items()}
    row = {"problem": name(shape), "k": k, "threads": threads, "rel. error": error}
    run("glm_hvp", row, variants, problem, problem.products, threads, benchmark, report, quick)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("shape", "k", "steps"), SOLVES)
def test_glm_neumann_solve(shape, k, steps, threads, benchmark, report, quick):
    n, d, classes = shape
    if quick and n * d * classes * k > 10**7:
        pytest.skip("--quick leaves out solves that take seconds")
    problem = Problem(*shape, k, steps)
    never = torch.full((k,), -1.0, dtype=torch.float64)

    def solved(operator: hg.GLMHessian) -> Tensor:
        rest = problem.operator.scale, False, problem.alpha, 0.0, problem.steps, never
        return reference.glm_neumann_solve(*exact(problem, operator), *rest)[0]

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    truth = solved(problem.operator)
    solve = problem.planned()
    whole, *halves = [problem.whole(each) for each in (problem.operator, *problem.halves.values())]
    error = max(relative(solve(), truth), relative(whole(), truth))
    # The problem whose X was rounded has a solution of its own, in float64 too.
    rounded = solved(problem.halves["bf16"])
    moved, half_error = relative(rounded, truth), relative(halves[0](), rounded)
    assert max(error, half_error) < 1e-5, (error, half_error)
    variants = {
        "solve": solve,
        "fused": whole,
        "fused bf16": halves[0],
        "fused f16": halves[1],
        "torch rows": problem.loop(problem.rows),
        "torch columns": problem.loop(problem.columns),
        "double backward": problem.loop(problem.double_backward()),
    }
    if jax is not None:
        variants["jitted JAX"] = problem.jax_solve()
    row = {
        "problem": name(shape),
        "k": k,
        "threads": threads,
        "steps": problem.steps,
        "plan": problem.operator.plan(problem.steps, k)[0],
        "rel. error": error,
        "rel. error bf16": half_error,
        "rounding X to bf16 moves it": moved,
    }
    run("glm_neumann_solve", row, variants, problem, problem.steps, threads, benchmark, report, quick)
