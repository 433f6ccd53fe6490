"""Products with a multilayer perceptron's Hessian on a GPU: ``python -m bench.gpu_mlp [FOLDER]``.

The closed form against the retained double backward that any other package runs, one vector after another, both
launched from Python and replayed from a CUDA graph; where a whole product is one launch, also layer by layer. Device
time by events, variants in turn, medians; every variant is checked against float64 first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import hypergrad_ext as hg
from bench.device_time import in_graph, microseconds
from bench.gpu_glm import without
from bench.measure import write_in_turn
from hypergrad_ext import _native, backends, ops, reference_mlp

# Name, layer sizes, batch, activation.
PROBLEMS = [
    ("784-256-256-10", (784, 256, 256, 10), 256, "relu"),
    ("784-256-256-10", (784, 256, 256, 10), 256, "tanh"),
    ("4 x 2048", (2048,) * 4 + (10,), 1024, "relu"),
    ("60 x 32", (32,) * 60 + (10,), 256, "tanh"),
    ("60 x 32", (32,) * 60 + (10,), 32, "tanh"),
    ("20-64-2", (20, 64, 2), 100, "tanh"),
]
DEVICE = torch.device("cuda")


class Problem:
    """A network with cross entropy at a random point, and k vectors."""

    def __init__(self, sizes: tuple[int, ...], n: int, activation: str, k: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        new = {"generator": generator, "device": DEVICE}
        self.params: list[Tensor] = []
        for i, o in zip(sizes, sizes[1:], strict=False):
            self.params += [torch.randn(o, i, **new) / i**0.5, 0.1 * torch.randn(o, **new)]
        self.x, self.y = torch.randn(n, sizes[0], **new), torch.randint(sizes[-1], (n,), **new)
        self.activation = activation
        self.operator = hg.MLPHessian(self.x, self.params, self.y, activation=activation)
        self.v = torch.randn(k, self.operator.space.numel, **new)

    def double_backward(self, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        params, h = [p.to(dtype).requires_grad_() for p in self.params], self.x.to(dtype)
        for layer in range(0, len(params), 2):
            h = getattr(torch, self.activation)(h) if layer else h
            h = F.linear(h, params[layer], params[layer + 1])
        gradient = torch.autograd.grad(F.cross_entropy(h, self.y), params, create_graph=True)
        rows = [self.operator.space.views(row) for row in self.v.to(dtype)]

        def products() -> Tensor:
            parts = [torch.autograd.grad(gradient, params, row, retain_graph=True) for row in rows]
            return torch.stack([torch.cat([t.reshape(-1) for t in product]) for product in parts])

        return products

    def closed_form(self, backend: str) -> Callable[[], Tensor]:
        kernel, model = ops.mlp_hvp.kernel(DEVICE, backend), self.operator._model(self.v)
        return lambda: kernel(*model)

    def plan(self) -> tuple[str, str]:
        """How the CUDA kernels run, and why."""
        assert _native._C is not None
        sizes = [self.x.shape[1], *(len(w) for w in self.params[::2])]
        return _native._C.mlp_hvp_plan(sizes, len(self.x), len(self.v), 4, self.activation != "relu")


def rows_of(name: str, sizes: tuple[int, ...], n: int, activation: str, k: int) -> list[dict[str, object]]:
    """One row per variant."""
    problem = Problem(sizes, n, activation, k)
    truth = problem.double_backward(torch.float64)()
    variants = {"double backward": problem.double_backward()}
    variants |= {b: problem.closed_form(b) for b in ("cuda", "triton") if not backends.unavailable(b, DEVICE.type)}
    path = ""
    if "cuda" in variants:
        path, reason = problem.plan()
        print(f"{name} {activation} batch {n}, k={k}: {path}, {reason}")
        if path == "one_launch":
            variants["cuda, layer by layer"] = without("one_launch", variants["cuda"])
    variants["closed form in torch"] = lambda: reference_mlp.mlp_hvp(*problem.operator._model(problem.v))
    errors = {}
    for variant, run in variants.items():
        errors[variant] = float((run() - truth).norm() / truth.norm())
        assert errors[variant] <= 2 * errors["double backward"] + 1e-6, (variant, errors)
    for variant, run in list(variants.items()):
        variants[f"{variant}, graph"] = in_graph(run)
    times = microseconds(variants, rounds=25, calls=10)
    # Multiply-adds of the matrix products: two for the first layer, six for every other.
    layers = list(zip(sizes, sizes[1:], strict=False))
    flops = 2 * k * n * (6 * sum(i * o for i, o in layers) - 4 * sizes[0] * sizes[1])
    rows = []
    for variant, us in times.items():
        low, middle, high = statistics.quantiles(us, n=4)
        row: dict[str, object] = {"network": f"{name} {activation} batch {n}", "k": k, "variant": variant}
        row["path"] = path if variant in ("cuda", "cuda, graph") else None
        row |= {"us": middle, "quartiles": f"{low:.1f}-{high:.1f}", "TFLOP/s": flops / middle / 1e6}
        row["x double backward"] = statistics.median(times["double backward"]) / middle
        row["rel. error"] = errors[variant.removesuffix(", graph")]
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, save."""
    # Autograd runs backward where forward ran: to be captured, all of it has to be on one stream of its own.
    with torch.cuda.stream(torch.cuda.Stream()):
        write_in_turn("gpu_mlp", {"rows": [partial(rows_of, *problem, k) for problem in PROBLEMS for k in (1, 8)]})


if __name__ == "__main__":
    main()
