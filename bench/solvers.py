"""Which solver? Error against products on spectra, and seconds on models: ``python -m bench.solvers``.

Writes ``bench/results/solver_products_*``, ``solver_seconds_*`` and the plot of ``docs/which_solver.md``.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import hypergrad_ext as hg
from bench.measure import interleave, median, ratio, save, table

F64 = torch.float64
PLOT = Path(__file__).parent.parent / "docs" / "which_solver.png"
ERRORS = (1e-1, 1e-2, 1e-3)
LIMIT = 3000
SOLVERS: dict[str, Callable[[int], hg.Solver]] = {
    "Neumann": lambda k: hg.Neumann(k),
    "Chebyshev": lambda k: hg.Chebyshev(k),
    "CG": lambda k: hg.CG(tol=1e-12, max_steps=max(k, 1)),
    "MINRES": lambda k: hg.MINRES(tol=1e-12, max_steps=max(k, 1)),
    "CG, Nystrom(30)": lambda k: hg.CG(tol=1e-12, max_steps=max(k, 1), preconditioner=hg.Nystrom(30)),
    "CG, Jacobi(10)": lambda k: hg.CG(tol=1e-12, max_steps=max(k, 1), preconditioner=hg.Jacobi(10)),
}


def with_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """A symmetric matrix in a random basis."""
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=F64))
    return (q * eigenvalues) @ q.T


def logistic(penalty: float, n: int = 1024, d: int = 300) -> Tensor:
    """The Hessian of a logistic regression whose features have a decaying spectrum."""
    x = 6 * torch.randn(n, d, dtype=F64) / torch.arange(1, d + 1)
    p = torch.sigmoid(x @ (0.3 * torch.randn(d, dtype=F64)))
    return x.T @ ((p * (1 - p))[:, None] * x) / n + penalty * torch.eye(d, dtype=F64)


def network(damping: float) -> Tensor:
    """The Hessian of a small trained multilayer perceptron, damped."""
    x, teacher = torch.randn(256, 12, dtype=F64), torch.randn(12, 3, dtype=F64)
    y = (x @ teacher).argmax(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    h = hg.Hessian(nn.functional.cross_entropy(model(x), y), list(model.parameters())).dense()
    shift = float(torch.linalg.eigvalsh(h)[0].clamp_max(0).abs())
    return h + (damping + shift) * torch.eye(len(h), dtype=F64)


@functools.cache
def problems() -> dict[str, tuple[Tensor, Tensor]]:
    """Matrix and right-hand side of every spectrum, the same for the table and the plot."""
    torch.manual_seed(0)
    signs = torch.where(torch.arange(300) % 3 == 0, -1.0, 1.0).double()
    matrices = {
        "log-spread": with_eigenvalues(torch.logspace(0, -2, 300, dtype=F64)),
        "log-spread, wide": with_eigenvalues(torch.logspace(0, -4, 300, dtype=F64)),
        "20 outliers": with_eigenvalues(
            torch.cat([torch.logspace(0, -1, 20, dtype=F64), torch.logspace(-3, -4, 280, dtype=F64)])
        ),
        "logistic, l2 1e-2": logistic(1e-2),
        "logistic, l2 1e-4": logistic(1e-4),
        "network, d 1e-2": network(1e-2),
        "network, d 1e-3": network(1e-3),
        "indefinite": with_eigenvalues(signs * torch.logspace(0, -1, 300, dtype=F64)),
    }
    return {name: (a, torch.randn(len(a), dtype=F64)) for name, a in matrices.items()}


def error_of(a: Tensor, b: Tensor, truth: Tensor, solver: hg.Solver) -> tuple[float, int]:
    """Relative error and products, those for step sizes and preconditioners included; infinite if it failed."""
    solution = hg.solve(hg.DenseMatrix((a + a.T) / 2), b, solver, residual=False)
    if solution.useless:
        return math.inf, solution.hvps
    return float((solution.value - truth).norm() / truth.norm()), solution.hvps


def products_to(a: Tensor, b: Tensor, truth: Tensor, make: Callable[[int], hg.Solver], error: float) -> int | None:
    """Fewest products to an error, by doubling and bisection; None above the limit."""
    low, high = 0, 1
    while error_of(a, b, truth, make(high))[0] > error:
        low, high = high, 2 * high
        if high > LIMIT:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_of(a, b, truth, make(middle))[0] <= error else (middle, high)
    return error_of(a, b, truth, make(high))[1]


def count_products() -> list[dict[str, object]]:
    """Products to errors of 1e-1, 1e-2 and 1e-3."""
    rows: list[dict[str, object]] = []
    for name, (a, b) in problems().items():
        magnitudes = torch.linalg.eigvalsh(a).abs()
        truth = torch.linalg.solve(a, b)
        row: dict[str, object] = {"problem": name, "condition": f"{float(magnitudes.max() / magnitudes.min()):.1e}"}
        for solver, make in SOLVERS.items():
            counts = [products_to(a, b, truth, make, error) for error in ERRORS]
            row[solver] = " / ".join("-" if c is None else str(c) for c in counts)
        print(row, flush=True)
        rows.append(row)
    return rows


def plot() -> None:
    """Error against products on four of the spectra."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True, layout="constrained")
    chosen = ("log-spread", "20 outliers", "network, d 1e-3", "indefinite")
    for axis, name in zip(axes.flat, chosen, strict=True):
        a, b = problems()[name]
        truth = torch.linalg.solve(a, b)
        for colour, (solver, make) in enumerate(SOLVERS.items()):
            points = [error_of(a, b, truth, make(k)) for k in sorted({round(10 ** (i / 8)) for i in range(21)})]
            points = [(hvps, error) for error, hvps in points if error < 1]
            if len(points) > 1:
                axis.loglog(
                    *zip(*points, strict=True),
                    label=solver,
                    color=f"C{colour}",
                    marker=".",
                    markersize=4,
                    linewidth=1.3,
                )
        axis.set_title(name)
        axis.set_ylim(1e-6, 2)
        axis.grid(alpha=0.3)
        axis.set_xlabel("Hessian-vector products, everything included")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    axes[0, 0].legend(fontsize=8)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def models() -> dict[str, tuple[list[Tensor], Callable[[], Tensor], hg.LinearOperator]]:
    """Parameters, training loss and closed-form Hessian of a logistic regression and a network."""
    x, y = torch.randn(2000, 100) / torch.arange(1, 101) ** 0.5, torch.randint(2, (2000,)).float()
    w = (0.1 * torch.randn(100)).requires_grad_()
    inputs, classes = torch.randn(512, 32), torch.randint(5, (512,))
    net = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5))
    params = list(net.parameters())
    return {
        "logistic regression": (
            [w],
            lambda: nn.functional.binary_cross_entropy_with_logits(x @ w, y),
            hg.GLMHessian(x, [w], "logistic"),
        ),
        "network": (
            params,
            lambda: nn.functional.cross_entropy(net(inputs), classes),
            hg.MLPHessian(inputs, params, classes, activation="tanh"),
        ),
    }


def seconds(rounds: int) -> list[dict[str, object]]:
    """32 right-hand sides in one solve against 32 solves."""
    rows: list[dict[str, object]] = []
    for name, (params, loss, closed) in models().items():
        operator = hg.Hessian(loss(), params)
        dense = operator.dense().double()
        dense = (dense + dense.T) / 2
        values = torch.linalg.eigvalsh(dense)
        # What makes the condition number 100, also where an eigenvalue is negative.
        damping = (float(values[-1]) - 100 * float(values[0])) / 99
        flat = torch.randn(32, len(dense))
        batch, single = operator.space.views(flat), [operator.space.views(row) for row in flat]
        rows += _batches(f"{name}, Hessian", operator, batch, single, damping, rounds)
        rows += _batches(f"{name}, {type(closed).__name__}", closed, batch, single, damping, rounds)
    return rows


def _batches(
    name: str, operator: hg.LinearOperator, batch: list[Tensor], single: list[list[Tensor]], damping: float, rounds: int
) -> list[dict[str, object]]:
    def solve(b: list[Tensor], solver: hg.Solver) -> hg.Solution:
        return hg.solve(operator, b, solver, damping=damping, residual=False)

    cg, block = hg.CG(tol=1e-3), hg.BlockCG(tol=1e-3)
    assert solve(batch, cg).converged and solve(batch, block).converged
    variants: dict[str, Callable[[], object]] = {
        "32 solves": lambda: [solve(b, cg) for b in single],
        "batched CG": lambda: solve(batch, cg),
        "BlockCG": lambda: solve(batch, block),
    }
    times = interleave(variants, rounds, warmup=1)
    return [_row(name, times, "32 solves", fast) for fast in ("batched CG", "BlockCG")]


def _row(name: str, times: dict[str, list[float]], slow: str, fast: str) -> dict[str, object]:
    middle, low, high = ratio(times, slow, fast)
    return {
        "model": name,
        "a": slow,
        "b": fast,
        "times faster": middle,
        "quartiles": f"{low:.2f}-{high:.2f}",
        "ms": 1000 * median(times[fast]),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.solvers", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["products", "seconds"])
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.only != "seconds":
        rows = count_products()
        print(table(rows))
        save("solver_products", rows)
        plot()
    if options.only != "products":
        rows = seconds(options.rounds)
        print(table(rows))
        save("solver_seconds", rows)


if __name__ == "__main__":
    main()
