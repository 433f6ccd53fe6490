"""What a GPU says about the GLM kernels: ``python -m bench.gpu_glm [FOLDER]``, results in FOLDER/gpu_glm.json.

Whole solves per step against a CUDA graph of two matrix products and against the same loop in eager mode, where x is
streamed also without bulk copies and with the bytes of x per second, one-pass
products against the bandwidth of a copy, and the numbers that the launch rules are built on: bandwidth from L2,
a node of a CUDA graph, and a barrier of the grid.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import hypergrad_ext as hg
from bench.device_time import in_graph, medians, microseconds
from bench.gpu_steps import copy_bandwidth
from bench.measure import write_in_turn
from hypergrad_ext import _native, ops, reference

DEVICE = torch.device("cuda")
# torch's matrix products refuse to run in deterministic mode without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
STEPS = 100


def deterministic(run: Callable[[], object]) -> Callable[[], None]:
    """The same with sums in a fixed order."""

    def wrapped() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            run()
        finally:
            torch.use_deterministic_algorithms(False)

    return wrapped


def without(path: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same with one path of the kernels left out."""

    def wrapped() -> Tensor:
        os.environ["HYPERGRAD_EXT_CUDA_WITHOUT"] = path
        try:
            return run()
        finally:
            del os.environ["HYPERGRAD_EXT_CUDA_WITHOUT"]

    return wrapped


class Problem:
    """Logistic or softmax regression at zero, with a penalty; `step` sizes make the series converge."""

    def __init__(
        self, n: int, d: int, classes: int, k: int, dtype: torch.dtype = torch.float32, intercept: bool = False
    ) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.x = torch.randn(n, d, generator=generator, device=DEVICE).to(dtype)
        w = torch.zeros((classes, d) if classes > 1 else (d,), device=DEVICE)
        params = [w, torch.zeros(classes, device=DEVICE)] if intercept else w
        self.operator = hg.GLMHessian(self.x, params, "softmax" if classes > 1 else "logistic", l2=0.01)
        self.b = torch.randn(k, self.operator.space.numel, generator=generator, device=DEVICE)
        self.never = torch.full((k,), -1.0, dtype=torch.float64, device=DEVICE)
        self.classes, self.alpha = classes, 0.2
        self.name = f"{n}x{d}, {'binary' if classes == 1 else f'{classes} classes'}, k={k}, {str(dtype)[6:]}"
        self.name += ", intercept" if intercept else ""

    def check(self) -> None:
        """The kernels against float64, before any time is taken."""
        x, weights, b, l2, scale, intercept = self.operator._model(self.b)
        exact = (x.double(), weights.double(), b.double(), None if l2 is None else l2.double(), scale, intercept)
        truth, _ = reference.glm_neumann_solve(*exact, self.alpha, 0.0, STEPS, self.never)
        # A product in bf16 rounds the vectors; the kernel does not.
        by_threads = without("bulk", self.whole)
        limits = {self.whole: 1e-4, by_threads: 1e-4, self.loop: 5e-2 if x.dtype == torch.bfloat16 else 1e-4}
        for solve, limit in limits.items():
            error = float((solve() - truth).norm() / truth.norm())
            assert error < limit, f"{self.name}: relative error {error:.1e}"

    def plan(self) -> str:
        """How the whole solve runs."""
        assert _native._C is not None
        return _native._C.glm_neumann_plan(*self.operator._model(self.b))[0]

    def product(self, v: Tensor) -> Tensor:
        return ops.glm_hvp(*self.operator._model(v))

    def two_products(self, v: Tensor) -> Tensor:
        """What a user of torch writes: X in the precision in which it is stored."""
        x, weights, _, l2, scale, intercept = self.operator._model(v)
        v_w, v_b = v.tensor_split([self.classes * x.shape[1]], 1)
        z = (x @ v_w.reshape(-1, x.shape[1]).T.to(x.dtype)).view(len(x), -1, self.classes).float()
        z = z + v_b if intercept else z
        p = weights.view(len(x), 1, self.classes)
        z = p * z if self.classes == 1 else p * (z - (p * z).sum(2, keepdim=True))
        product = (z.view(len(x), -1).T.to(x.dtype) @ x).float().view_as(v_w)
        product = torch.cat([product, z.sum(0)], 1) if intercept else product
        return product.mul_(scale).addcmul_(l2, v)

    def loop(self) -> Tensor:
        v, p = self.b.clone(), self.b.clone()
        for _ in range(STEPS):
            v.sub_(self.two_products(v), alpha=self.alpha)
            p.add_(v)
        return p.mul_(self.alpha)

    def whole(self) -> Tensor:
        return ops.glm_neumann_solve(*self.operator._model(self.b), self.alpha, 0.0, STEPS, self.never)[0]


SOLVES = [
    *[(4096, 784, 1, 1), (4096, 784, 1, 8), (4096, 784, 10, 1), (1000, 32, 1, 1), (60_000, 784, 1, 1)],
    *[(60_000, 784, 1, 8), (2_000_000, 128, 1, 1), (2_000_000, 32, 1, 1, torch.float32, True)],
    *[(n, 784, 1, 1, torch.bfloat16) for n in (8192, 32_768, 120_000)],
]
PRODUCTS = [(60_000, 784, 1, 1), (60_000, 784, 1, 8), (60_000, 784, 10, 1), (2_000_000, 128, 1, 1)]


def solve(copy: float, *shape: object) -> list[dict[str, object]]:
    """Microseconds per step of a Neumann solve, and for x that is streamed the share of a copy's bandwidth."""
    problem = Problem(*shape)
    problem.check()
    path, variants = problem.plan(), {"one launch": problem.whole}
    if path == "bulk":
        variants |= {"without bulk copies": without("bulk", problem.whole)}
    variants |= {
        "deterministic": deterministic(problem.whole),
        "graph of two products": in_graph(problem.loop),
        "eager two products": problem.loop,
    }
    times = {name: us / STEPS for name, us in medians(microseconds(variants)).items()}
    rate = problem.x.nbytes / times["one launch"] / 1e3
    row: dict[str, object] = {"solve, us per step": problem.name, "path": path, "one launch": times["one launch"]}
    row["without bulk copies"] = times.pop("without bulk copies", None)
    return [row | times | {"GB/s of x": rate, "share of copy": rate / copy}]


def product(copy: float, *shape: object) -> list[dict[str, object]]:
    """One product, and the bytes of X per second."""
    problem = Problem(*shape)
    variants = {
        "one pass": lambda: problem.product(problem.b),
        "two products": lambda: problem.two_products(problem.b),
    }
    times = medians(microseconds(variants, cold=True))
    rate = problem.x.nbytes / times["one pass"] / 1e3
    return [{"product, us": problem.name, **times, "GB/s": rate, "share of copy": rate / copy}]


def rates() -> list[dict[str, object]]:
    """What launch rules and plans assume of the machine."""
    small = torch.empty(2**21, device=DEVICE)
    near, one = torch.empty_like(small), torch.zeros(1, device=DEVICE)
    nodes = 1000

    def add_ones() -> None:
        for _ in range(nodes):
            one.add_(1)

    def copy_in_cache() -> None:
        for _ in range(20):
            near.copy_(small)

    times = medians(microseconds({"cache": in_graph(copy_in_cache), "node": in_graph(add_ones)}))
    # All multiprocessors take part, and have next to nothing to compute.
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    tiny = Problem(32 * multiprocessors, 32, 1, 1)
    steps = medians(microseconds({"one": tiny.whole, "two": deterministic(tiny.whole)}))
    row = {
        "copy in L2 GB/s": 20 * 2 * small.nbytes / times["cache"] / 1e3,
        "graph node us": times["node"] / nodes,
        "step with one barrier us": steps["one"] / STEPS,
        "step with two barriers us": steps["two"] / STEPS,
    }
    return [row]


def main() -> None:
    """Measure, print, save."""
    copy = copy_bandwidth()
    problems = {
        "rates": [rates],
        "solves": [partial(solve, copy, *shape) for shape in SOLVES],
        "products": [partial(product, copy, *s, dtype) for s in PRODUCTS for dtype in (torch.float32, torch.bfloat16)],
    }
    write_in_turn("gpu_glm", problems, **{"copy GB/s": copy})


if __name__ == "__main__":
    main()
