"""Seconds to a relative error of 1e-2, ``auto`` against a series by double backward: ``python -m bench.solver_auto``.

On every spectrum of ``bench.solvers`` whose condition is 60 or more, as losses in float32, from the loss on. The series
has the best fixed alpha, ``2 / (largest + smallest eigenvalue)``; where 3000 steps are not enough, they are what it is
timed with, and the ratio is a lower bound. Writes ``bench/results/solver_auto_*``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import hypergrad_ext as hg
from bench.measure import interleave, median, ratio, save, table
from bench.peers import by_hand
from bench.solvers import F64, with_eigenvalues

ERROR, LIMIT = 1e-2, 3000


@dataclass(frozen=True)
class Problem:
    """A loss at a point, and the damping that makes it as badly conditioned as it is to be."""

    params: list[Tensor]
    loss: Callable[[], Tensor]
    damping: float = 0.0


def quadratic(eigenvalues: Tensor) -> Problem:
    """``w^T A w / 2`` in a random basis."""
    a = with_eigenvalues(eigenvalues).float()
    a = (a + a.T) / 2
    w = torch.randn(len(a), requires_grad=True)
    return Problem([w], lambda: w @ (a @ w) / 2)


def logistic(damping: float, *, scales: tuple[float, float] | None = None) -> Problem:
    """Logistic regression, 1024 x 300, on features that decay, or of sizes that have nothing to do with each other."""
    x = torch.randn(1024, 300)
    x *= 6 / torch.arange(1, 301) if scales is None else torch.logspace(*scales, 300)[torch.randperm(300)]
    w = (0.3 * torch.randn(300) / x.square().mean(0).sqrt().clamp_min(1)).requires_grad_()
    y = torch.bernoulli(torch.sigmoid(x @ w.detach()))
    return Problem([w], lambda: binary_cross_entropy_with_logits(x @ w, y), damping)


def network(activation: type[nn.Module], condition: float) -> Problem:
    """A trained multilayer perceptron, damped to a condition number."""
    x, teacher = torch.randn(256, 12), torch.randn(12, 3)
    y = (x @ teacher).argmax(1)
    model = nn.Sequential(nn.Linear(12, 16), activation(), nn.Linear(16, 3))
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(300):
        optimiser.zero_grad()
        cross_entropy(model(x), y).backward()
        optimiser.step()
    params = list(model.parameters())
    values = torch.linalg.eigvalsh(hg.Hessian(cross_entropy(model(x), y), params).dense().double())
    damping = (float(values[-1]) - condition * float(values[0])) / (condition - 1)
    return Problem(params, lambda: cross_entropy(model(x), y), damping)


def problems() -> dict[str, Callable[[], Problem]]:
    """By name."""
    bulk = torch.logspace(-3, -4, 280, dtype=F64)
    return {
        "log-spread, 1e2": lambda: quadratic(torch.logspace(0, -2, 300, dtype=F64)),
        "log-spread, 1e4": lambda: quadratic(torch.logspace(0, -4, 300, dtype=F64)),
        "20 outliers": lambda: quadratic(torch.cat([torch.logspace(0, -1, 20, dtype=F64), bulk])),
        "logistic, l2 1e-2": lambda: logistic(1e-2),
        "logistic, l2 1e-4": lambda: logistic(1e-4),
        "logistic, badly scaled": lambda: logistic(1e-3, scales=(-1.5, 0.5)),
        "network, tanh, 65": lambda: network(nn.Tanh, 65),
        "network, relu, 150": lambda: network(nn.ReLU, 150),
    }


def measure(name: str, problem: Problem, rounds: int) -> dict[str, object]:
    """Both to the error, checked, in turn.

    Returns:
        A row of the table.
    """
    params, loss, damping = problem.params, problem.loss, problem.damping
    dense = hg.Hessian(loss(), params).dense().double()
    dense = (dense + dense.T) / 2 + damping * torch.eye(len(dense), dtype=F64)
    values = torch.linalg.eigvalsh(dense)
    low, high = float(values[0]), float(values[-1])
    b = torch.randn(len(dense), dtype=F64)
    truth = torch.linalg.solve(dense, b)
    v = [part.float().view_as(p) for part, p in zip(b.split([p.numel() for p in params]), params, strict=True)]

    def error(x: list[Tensor]) -> float:
        return float((torch.cat([t.reshape(-1) for t in x]).double() - truth).norm() / truth.norm())

    def auto(tol: float) -> list[Tensor]:
        return hg.inverse_hvp(loss(), params, v, hg.Auto(tol=tol), damping=damping)

    def neumann(steps: int) -> list[Tensor]:
        gradient = torch.autograd.grad(loss(), params, create_graph=True)
        return by_hand.neumann(gradient, params, v, 2 / (high + low), steps, damping)

    # The loosest tolerance and the fewest steps that give the error.
    tol = next(10 ** (-k / 10) for k in range(10, 70) if error(auto(10 ** (-k / 10))) <= ERROR)
    steps, x, matrix = 1, 2 / (high + low) * b, dense * (2 / (high + low))
    while float((x - truth).norm() / truth.norm()) > ERROR and steps < LIMIT:
        x = x + 2 / (high + low) * b - matrix @ x
        steps += 1
    assert steps == LIMIT or error(neumann(steps)) <= 1.2 * ERROR
    variants = {"auto": functools.partial(auto, tol), "neumann": functools.partial(neumann, steps)}
    times = interleave(variants, rounds, warmup=1)
    middle, lower, upper = ratio(times, "neumann", "auto")
    return {
        "problem": name,
        "condition": f"{high / low:.1e}",
        "Neumann steps": f"> {LIMIT}" if steps == LIMIT else steps,
        "times faster": f"> {middle:.0f}" if steps == LIMIT else middle,
        "quartiles": f"{lower:.1f}-{upper:.1f}",
        "ms": 1000 * median(times["auto"]),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.solver_auto", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, make in problems().items():
        torch.manual_seed(0)
        rows.append(measure(name, make(), options.rounds))
        print(rows[-1], flush=True)
    print(table(rows))
    save("solver_auto", rows)


if __name__ == "__main__":
    main()
