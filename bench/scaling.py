"""How time and memory grow: ``python -m bench.scaling [--quick] [--sweep S]``.

One thing grows at a time: the number of weights, of hyperparameters, of terms of the series, of vectors, of outer
steps; and, for every solver, of its steps. Memory is the most that tensors held at once, counted by the profiler from
the events of the allocator, the weights and hyperparameters themselves left out. Slopes are those of straight lines
through the logarithms of the upper half of each sweep: 1 is proportional, 0 is independent.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad_ext as hg
from bench.measure import clock_for, interleave, median, save, table
from hypergrad_ext.operators.hessian import Engine
from tests.allocations import peak

# For series of any length to converge: eigenvalues go down to -1 and a little more.
ALPHA, DAMPING, STEPS = 1e-2, 10.0, 5
WIDTH, BATCH = 512, 16
SOLVERS: dict[str, Callable[[int], hg.Solver]] = {
    "Neumann": lambda k: hg.Neumann(k, alpha=ALPHA),
    "Chebyshev": lambda k: hg.Chebyshev(k, bounds=(DAMPING / 2, 1 / ALPHA)),
    "CG": lambda k: hg.CG(tol=1e-20, max_steps=k),
    "MINRES": lambda k: hg.MINRES(tol=1e-20, max_steps=k),
}

Row = dict[str, object]


def network(weights: int) -> nn.Module:
    """Two hidden layers with about so many weights in all."""
    width = max(2, round((-20 + math.sqrt(400 + 4 * weights)) / 2))
    return nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def hypergradient(
    weights: int, hparams: int | None = None, solver: hg.Solver | None = None, engine: Engine = "auto"
) -> tuple[Callable, int]:
    """A hypergradient by one penalty per weight, or by so many, each of a stretch of weights; and the weights."""
    net = network(weights)
    count = sum(p.numel() for p in net.parameters())
    x, y = torch.randn(BATCH, 10), torch.randint(10, (BATCH,))
    hparams = min(hparams or count, count)
    log_l2 = torch.full((hparams,), -7.0, requires_grad=True)
    sizes = [p.numel() for p in net.parameters()]

    def val(w: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(net, w, (x,)), y)

    def train(w: dict[str, Tensor]) -> Tensor:
        each = -(-count // hparams)
        l2 = log_l2.exp()
        l2 = l2 if each == 1 else l2[:, None].expand(-1, each).reshape(-1)[:count]
        penalties = (part @ t.reshape(-1).square() for part, t in zip(l2.split(sizes), w.values(), strict=True))
        return val(w) + sum(penalties)

    solver = solver or hg.Neumann(STEPS, alpha=ALPHA)
    return lambda: hg.hypergradient(val, train, net, log_l2, solver, damping=DAMPING, engine=engine), count


def vectors(k: int) -> tuple[Callable, int]:
    """An inverse HVP of k vectors."""
    net = network(WIDTH**2)
    x, y = torch.randn(BATCH, 10), torch.randint(10, (BATCH,))
    v = {n: torch.randn(k, *p.shape) for n, p in net.named_parameters()}

    def loss(w: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(net, w, (x,)), y)

    return lambda: hg.inverse_hvp(loss, net, v, hg.Neumann(STEPS, alpha=ALPHA), damping=DAMPING), k


def outer_steps(count: int) -> tuple[Callable, int]:
    """So many outer steps, warm starts included."""
    run, _ = hypergradient(WIDTH**2)

    def steps() -> None:
        for _ in range(count):
            run()

    return steps, count


def sweeps(quick: bool, most: int = 7) -> dict[str, tuple[Callable[[int], tuple[Callable, int]], Iterable[int]]]:
    """What is run for every sweep, and how large."""
    most = 6 if quick else most
    found: dict[str, tuple[Callable[[int], tuple[Callable, int]], Iterable[int]]] = {
        "weights": (hypergradient, [10**i for i in range(3, most + 1)]),
        "hyperparameters": (lambda m: (hypergradient(10 ** (most - 1), m)[0], m), [10**i for i in range(most)]),
        "terms K": (
            lambda k: (hypergradient(WIDTH**2, solver=hg.Neumann(k, alpha=ALPHA))[0], k),
            [2**i for i in range(1, 6 if quick else 9)],
        ),
        "vectors k": (vectors, [2**i for i in range(4 if quick else 6)]),
        "outer steps": (outer_steps, [2**i for i in range(4 if quick else 6)]),
    }
    for name, make in SOLVERS.items():
        found[f"steps of {name}"] = (
            lambda k, make=make: (hypergradient(WIDTH**2, solver=make(k))[0], k),
            [5, 10, 20] if quick else [5, 20, 80, 320],
        )
    return found


def measure(
    name: str,
    make: Callable[[int], tuple[Callable, int]],
    sizes: Iterable[int],
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Rows of a sweep, until a point takes longer than ``budget`` seconds."""
    rows: list[Row] = []
    for size in sizes:
        torch.manual_seed(0)
        run, x = make(size)
        for _ in range(3):  # the engine is chosen in the second solve
            run()
        held = peak(run)
        seconds = interleave({"run": run}, rounds=5, warmup=0, clock=clock, budget=budget)["run"]
        rows.append({"over": name, "x": x, "ms": 1e3 * median(seconds), "MB": held / 1e6})
        if sum(seconds) > budget:
            break
    return rows


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def slopes(rows: Iterable[Row]) -> list[list[object]]:
    """For every sweep: its name, from, to, slope of time and of memory over its upper half."""
    found: list[list[object]] = []
    for name, group in itertools.groupby(rows, key=lambda row: row["over"]):
        points = list(group)
        upper = points[min(len(points) // 2, len(points) - 2) :]
        time, memory = (slope([(row["x"], row[key]) for row in upper]) for key in ("ms", "MB"))
        found.append([name, f"{upper[0]['x']:.2g}", f"{upper[-1]['x']:.2g}", f"{time:.2f}", f"{memory:.2f}"])
    return found


def plot(rows: Iterable[Row], path: Path) -> None:
    """Time and memory over everything that grows, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [(name, list(group)) for name, group in itertools.groupby(rows, key=lambda row: row["over"])]
    groups = [group for group in groups if not group[0].startswith("steps of")]
    figure, axes = plt.subplots(2, len(groups), figsize=(3 * len(groups), 5), layout="constrained", squeeze=False)
    for column, (name, points) in enumerate(groups):
        for row, (key, label) in enumerate((("ms", "time, ms"), ("MB", "tensors held, MB"))):
            axis = axes[row][column]
            axis.loglog([p["x"] for p in points], [p[key] for p in points], marker="o", color=f"C{row}")
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(name)
            if column == 0:
                axis.set_ylabel(label)
            values = [p[key] for p in points]
            if max(values) < 3 * min(values):
                axis.set_ylim(min(values) / 3, max(values) * 3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print slopes and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller, and not saved")
    parser.add_argument("--sweep", action="append", choices=list(sweeps(True)), help="default: all")
    parser.add_argument("--most", type=int, default=7, help="weights up to 10^MOST (default: 7; 8 takes 10 GB)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", hg.SolveWarning)  # a fixed number of steps does not converge
    rows: list[Row] = []
    for name, (make, sizes) in sweeps(options.quick, options.most).items():
        if name in (options.sweep or [name]):
            found = measure(name, make, sizes, 2.0 if options.quick else 10.0, clock_for(options.threads))
            print(table(found), flush=True)
            rows += found
            if not options.quick:
                save(f"scaling_threads{options.threads}", found, key=2, threads=options.threads)
    for line in slopes(rows):
        print("over {}, from {} to {}: slope of time {}, of memory {}".format(*line))


if __name__ == "__main__":
    main()
