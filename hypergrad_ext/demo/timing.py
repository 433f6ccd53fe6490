"""The cost and the error of one hypergradient: a loop written by hand, the same series fused, and CG."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad_ext as hg
from hypergrad_ext import backends, ops
from hypergrad_ext.demo.networks import Problem
from hypergrad_ext.demo.tables import table
from hypergrad_ext.info import cpu_name

STEPS = 20
# Flat directions of a network's loss make the Hessian singular to rounding without it.
DAMPING = 1e-2


@dataclass(frozen=True)
class Row:
    """One method on one problem.

    Attributes:
        method: Its name.
        hvps: Hessian-vector products of one hypergradient.
        milliseconds: Lower quartile, median and upper quartile.
        error: Relative distance to the exact hypergradient.
        cosine: Of the angle to the exact hypergradient.
        speed_up: Time of the plain loop over time of this method, median over rounds; None unless both
            compute the same thing.
        difference: Relative distance to the plain loop's result; likewise.
    """

    method: str
    hvps: int
    milliseconds: tuple[float, float, float]
    error: float
    cosine: float
    speed_up: float | None
    difference: float | None


@dataclass(frozen=True)
class Comparison:
    """All methods on one problem, and how the exact hypergradient was found."""

    problem: str
    weights: int
    alpha: float
    exact: str
    rounds: int
    rows: list[Row]


def plain_loop(
    val_loss: Tensor, train_loss: Tensor, params: Sequence[Tensor], hparams: Sequence[Tensor], alpha: float
) -> list[Tensor]:
    """What one writes by hand: the paper's Algorithms 2 and 3 in plain torch, a Python loop over tensors."""
    gradient = torch.autograd.grad(train_loss, params, create_graph=True)
    v = list(torch.autograd.grad(val_loss, params))
    p = v
    for _ in range(STEPS):
        hv = torch.autograd.grad(gradient, params, grad_outputs=v, retain_graph=True)
        v = [v_i - alpha * (hv_i + DAMPING * v_i) for v_i, hv_i in zip(v, hv, strict=True)]
        p = [p_i + v_i for p_i, v_i in zip(p, v, strict=True)]
    mixed = torch.autograd.grad(gradient, hparams, grad_outputs=[alpha * p_i for p_i in p])
    return [-m for m in mixed]


def exact_hypergradient(problem: Problem, solver: hg.Solver) -> tuple[Tensor, str]:
    """The hypergradient in float64, flat, and how far its solve can be trusted."""
    double = problem.to(torch.float64)
    grads, solution = hg.hypergradient(
        double.val_loss(),
        double.train_loss(),
        double.params,
        double.penalties,
        solver,
        damping=DAMPING,
        return_solution=True,
    )
    trust = "" if solution.converged else f"{solution.status}, "
    return _flat(grads), f"{type(solver).__name__} in float64, {trust}residual {solution.residual_norm:.0e}"


def step_size(problem: Problem) -> float:
    """The step size that ``Neumann(alpha=None)`` would choose, to give the same one to both loops."""
    hessian = hg.Hessian(problem.train_loss(), problem.params)
    ones = [torch.ones_like(p) for p in problem.params]
    alpha = hg.solve(hessian, ones, hg.Neumann(steps=STEPS), damping=DAMPING, residual=False).alpha
    assert alpha is not None
    return alpha


def compare(problem: Problem, exact: hg.Solver, *, rounds: int) -> Comparison:
    """Time all methods in turn, and compare what they return with the truth.

    Args:
        problem: The network, in float32.
        exact: The solver to trust in float64.
        rounds: How often every method runs.

    Returns:
        One row per method; the plain loop comes first.
    """
    alpha = step_size(problem)
    series, krylov = hg.Neumann(steps=STEPS, alpha=alpha), hg.CG(tol=1e-4)

    def by_hand() -> list[Tensor]:
        return plain_loop(problem.val_loss(), problem.train_loss(), problem.params, problem.penalties, alpha)

    def ours(solver: hg.Solver) -> Callable[[], list[Tensor]]:
        return lambda: hg.hypergradient(
            problem.val_loss(), problem.train_loss(), problem.params, problem.penalties, solver, damping=DAMPING
        )

    methods = [by_hand, ours(series), ours(krylov)]
    truth, how = exact_hypergradient(problem, exact)
    plain, fused, cg = (_flat(method()) for method in methods)
    times = _interleaved(methods, rounds, f"timing {problem.name}")
    speed_up = median(a / b for a, b in zip(times[0], times[1], strict=True))

    def row(method: str, hvps: int, place: int, value: Tensor, *same: float) -> Row:
        low, middle, high = quantiles(times[place], n=4)
        cosine = float(torch.cosine_similarity(value, truth, dim=0))
        return Row(method, hvps, (low, middle, high), _distance(value, truth), cosine, *(same or (None, None)))

    rows = [
        row(f"Neumann, K = {STEPS}, plain torch loop", STEPS, 0, plain),
        row(f"Neumann, K = {STEPS}, hypergrad_ext", STEPS, 1, fused, speed_up, _distance(fused, plain)),
        row(f"CG, tol = {krylov.tol:g}, hypergrad_ext", _products(problem, krylov), 2, cg),
    ]
    return Comparison(problem.name, problem.size, alpha, how, rounds, rows)


def _products(problem: Problem, solver: hg.Solver) -> int:
    """Hessian-vector products of one solve."""
    hessian = hg.Hessian(problem.train_loss(), problem.params)
    v = torch.autograd.grad(problem.val_loss(), problem.params)
    return hg.solve(hessian, v, solver, damping=DAMPING, residual=False).hvps


def _interleaved(methods: Sequence[Callable[[], object]], rounds: int, title: str) -> list[list[float]]:
    """Milliseconds of every method, one after the other in every round, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in methods]
    for _ in tqdm(range(rounds), desc=title, unit="round", disable=None):
        for method, mine in zip(methods, times, strict=True):
            start = time.perf_counter()
            method()
            mine.append(1e3 * (time.perf_counter() - start))
    return times


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def _distance(value: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))


def describe(results: Sequence[Comparison]) -> str:
    """All comparisons in one table, headed by the machine."""
    backend, _ = backends.select(ops.neumann_step_.kernels, "cpu")
    lines = [
        f"  {cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, kernels: {backend}; "
        f"float32, damping {DAMPING:g}.",
        "  The methods run in turn; times are medians with quartiles; both series have the same step size alpha.",
    ]
    for result in results:
        rows = [
            [
                row.method,
                str(row.hvps),
                "{1:.1f} ({0:.1f} to {2:.1f})".format(*row.milliseconds),
                "-" if row.speed_up is None else f"{row.speed_up:.2f}x",
                f"{row.error:.1e}",
                f"{row.cosine:.4f}",
                "-" if row.difference is None else f"{row.difference:.1e}",
            ]
            for row in result.rows
        ]
        lines += [
            "",
            f"  {result.problem}: {result.weights} weights = hyperparameters, alpha {result.alpha:.3g}, "
            f"{result.rounds} rounds; exact: {result.exact}",
            table(["", "HVPs", "ms per hypergradient", "speed-up", "rel. error", "cosine", "from loop"], rows),
        ]
    return "\n".join(
        [
            *lines,
            "",
            "  Error and cosine are against the exact hypergradient: for the series they show its truncation after K",
            "  steps, which no kernel changes. From loop: distance of our result to the plain loop's.",
        ]
    )
