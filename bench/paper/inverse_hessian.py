"""Approximate inverses of the Hessian against the exact one, and the hypergradients they give (Figures 3 and 4)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import hypergrad_ext as hg
from bench.paper import inverse_report
from bench.paper.cli import main
from bench.paper.experiment import Experiment, Job, Record, Settings, Stopwatch
from bench.paper.inverse_problems import PROBLEMS, Problem, in_training, logistic, mlp_at
from bench.paper.inverse_report import CLAMPED

# How often a solve is timed, unless it takes longer: the least counts, which foreign load spoils least.
_TIMES, _SECONDS = 7, 0.3


# What the paper compares along a run, and MINRES, which knows what to do with negative eigenvalues.
_IN_TRAINING = (("Neumann", 0), ("Neumann", 1), ("Neumann", 5), ("Neumann", 20), ("CG", 20), ("MINRES", 20))
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Protocol:
    """The numbers. An arm is a problem: two at their minimum, one on the way to it with negative eigenvalues."""

    arms: tuple[str, ...] = ("logistic regression", "diabetes ridge", "indefinite MLP")
    terms: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
    examples: int = 600
    hidden: int = 8
    log_penalty: float = -7.0
    clamp: float = 5e-3
    clamped_to: float = 1e-2
    heat_steps: tuple[int, ...] = (1, 5, 20)
    training_steps: tuple[int, ...] = (0, 20, 50, 100, 200)
    convex_steps: tuple[int, ...] = (10, 20, 50, 100, 200, 400)
    warm_up: int = 100
    lr: float = 0.01
    outer_lr: float = 0.01
    other_penalties: tuple[float, ...] = (-5.0, -9.0)


def protocol(settings: Settings) -> Protocol:
    if settings.data == "digits":
        return Protocol()
    # MNIST: 25,450 weights and a dense Hessian of 5 GB; --quick: 1,600. CIFAR-10 has four times the pixels.
    small, large = (1, 8) if settings.data == "cifar10" else (2, 32)
    examples, hidden = (1000, small) if settings.quick else (10_000, large)
    return Protocol(arms=("indefinite MLP",), examples=examples, hidden=hidden, training_steps=(20, 200))


def clamped_cg(matrix: Tensor, b: Tensor, steps: int, p: Protocol) -> Tensor:
    """The baseline of the paper's code: CG from x = b, whose denominators below 5e-3 become 1e-2."""

    def clamped(value: Tensor) -> Tensor:
        return torch.where(value < p.clamp, torch.full_like(value, p.clamped_to), value)

    x = b.clone()
    r = b - matrix @ x
    direction = r.clone()
    for _ in range(steps):
        product = matrix @ direction
        alpha = r.dot(r) / clamped(direction.dot(product))
        x = x + alpha * direction
        after = r - alpha * product
        direction = after + after.dot(after) / clamped(r.dot(r)) * direction
        r = after
    return x


def unrolled(problem: Problem, steps: int, alpha: float) -> Tensor:
    """The hypergradient through ``steps`` steps of gradient descent from ``w``, by backpropagation."""
    trained = hg.unroll(problem.train, problem.w, problem.lam, steps=steps, lr=alpha)
    return torch.autograd.grad(problem.validation(trained), problem.lam)[0]


class Method(NamedTuple):
    """A solver from its number of terms, steps or columns, and the damping that it cannot do without."""

    solver: Callable[[int], hg.Solver]
    damping: float = 0.0
    first: int = 0


def methods(low: float, high: float) -> dict[str, Method]:
    """Solvers by name, for the extreme eigenvalues; a tolerance that is never met makes them take all steps."""
    found = {
        "Neumann": Method(lambda k: hg.Neumann(steps=k, alpha=1 / high)),
        "CG": Method(lambda k: hg.CG(tol=1e-15, max_steps=k), first=1),
        "MINRES": Method(lambda k: hg.MINRES(tol=1e-15, max_steps=k), first=1),
        "Nystrom": Method(lambda k: hg.Nystrom(rank=k), damping=low if low > 0 else 1e-2 * high, first=1),
    }
    if low > 0:
        found["Chebyshev"] = Method(lambda k: hg.Chebyshev(steps=k, bounds=(low, high)))
    return found


def distances(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Cosine similarity and L2 distance relative to the exact hypergradient."""
    return float(cosine_similarity(found, exact, dim=0)), float((found - exact).norm() / exact.norm())


def run(job: Job) -> Record:
    """All approximations of one problem, and the exact inverse."""
    p = job.protocol
    problem = PROBLEMS[job.arm](job)
    matrix, b = problem.dense(), problem.right_hand_side()
    eigenvalues = torch.linalg.eigvalsh(matrix)
    low, high = float(eigenvalues[0]), float(eigenvalues.abs().max())
    exact = problem.through(torch.linalg.solve(matrix, b))
    curves: dict[str, list[list[float]]] = {}
    statuses: dict[str, list[str]] = {}
    for name, (make, damping, first) in methods(low, high).items():
        curves[name], statuses[name] = [], []
        for k in (k for k in p.terms if k >= first):
            solve = partial(problem.hypergradient, make(k), damping)
            found, solution = solve()
            residual = float((b - matrix @ solution.value).norm() / b.norm())
            took = _milliseconds(job, solve)
            curves[name].append([k, *distances(found, exact), residual, solution.hvps, took])
            statuses[name].append(str(solution.status))
    curves[CLAMPED] = []
    for k in p.terms:
        x = clamped_cg(matrix, b, k, p)
        residual = float((b - matrix @ x).norm() / b.norm())
        curves[CLAMPED].append([k, *distances(problem.through(x), exact), residual, k + 1, float("nan")])
    curves["unrolled"] = []
    for k in (k for k in p.terms if k <= 50):
        found = unrolled(problem, k + 1, 1 / high)
        took = _milliseconds(job, partial(unrolled, problem, k + 1, 1 / high))
        curves["unrolled"].append([k, *distances(found, exact), float("nan"), k + 1, took])
    identity, _ = problem.hypergradient(hg.Identity())
    automatic = problem.hypergradient(hg.Neumann(steps=1))[1].alpha or float("nan")
    record = {
        "curves": curves,
        "statuses": statuses,
        "identity": distances(identity, exact),
        "eigenvalues": [low, high],
        "negative": int((eigenvalues < 0).sum()),
        "automatic": automatic * high,
        "weights": len(b),
        **heat(matrix, high, p),
    }
    if job.arm == "logistic regression":
        record["penalties"] = {f"{lam:g}": steepness(logistic(job, lam)) for lam in (*p.other_penalties, p.log_penalty)}
    # Last, because it tunes the penalties.
    record["training"] = along_training(job, problem)
    return record


def _milliseconds(job: Job, work: Callable[[], object]) -> float:
    times: list[float] = []
    while len(times) < _TIMES and sum(times) < _SECONDS:
        watch = Stopwatch(job.device)
        work()
        times.append(watch.stop())
    return 1000 * min(times)


def steepness(problem: Problem) -> Record:
    """Condition number, and the L2 distance over the steps, under another penalty."""
    matrix, b = problem.dense(), problem.right_hand_side()
    eigenvalues = torch.linalg.eigvalsh(matrix)
    exact = problem.through(torch.linalg.solve(matrix, b))
    known = methods(float(eigenvalues[0]), float(eigenvalues[-1]))
    found = {
        name: [[k, *distances(problem.hypergradient(known[name].solver(k))[0], exact)] for k in _STEPS]
        for name in ("Neumann", "CG", "MINRES", "Chebyshev")
    }
    return {"condition": float(eigenvalues[-1] / eigenvalues[0]), "curves": found}


def heat(matrix: Tensor, high: float, p: Protocol) -> Record:
    """Tanh of the inverse and of Neumann approximations, for the first 65 weights at the most."""
    eye = torch.eye(65, len(matrix), dtype=matrix.dtype, device=matrix.device)[: len(matrix)]
    found = {"heat exact": torch.linalg.inv(matrix)}
    for k in p.heat_steps:
        solved = hg.solve(hg.DenseMatrix(matrix), eye, hg.Neumann(steps=k, alpha=1 / high), residual=False)
        found[f"heat {k}"] = solved.value
    return {name: torch.tanh(m[:65, :65]).float().cpu() for name, m in found.items()}


def along_training(job: Job, problem: Problem) -> list[list[object]]:
    """At several times of a training run: negative eigenvalues, and how near the compared methods come."""
    p, found = job.protocol, []
    if job.arm == "indefinite MLP":
        run: Iterable[tuple[int, Problem]] = ((steps, mlp_at(job, steps)) for steps in p.training_steps)
    else:
        run = in_training(problem, p.convex_steps, lr=p.lr, outer_lr=p.outer_lr, warm_up=p.warm_up)
    for steps, here in run:
        matrix, b = here.dense(), here.right_hand_side()
        eigenvalues = torch.linalg.eigvalsh(matrix)
        exact = here.through(torch.linalg.solve(matrix, b))
        known = methods(float(eigenvalues[0]), float(eigenvalues.abs().max()))
        for name, k in _IN_TRAINING:
            g, solution = here.hypergradient(known[name].solver(k), known[name].damping)
            residual = float((b - matrix @ solution.value).norm() / b.norm())
            line = [steps, int((eigenvalues < 0).sum()), f"{name} {k}", *distances(g, exact), residual]
            found.append([*line, str(solution.status)])
    return found


EXPERIMENT = Experiment(
    name="inverse_hessian",
    about="how close approximate inverses of the Hessian come to the exact hypergradient",
    protocol=protocol,
    arms=lambda p: p.arms,
    run=run,
    report=inverse_report.report,
    seeds=3,
    quick_seeds=1,
    not_yet_run="an exact inverse of 25,450 x 25,450 on a GPU (--data mnist --device cuda, without --quick)",
)

if __name__ == "__main__":
    sys.exit(main(only=EXPERIMENT))
