"""Peak memory of a solve by every engine, in MB of tensors: ``python -m bench.memory_engines``.

Counted by torch's profiler, which sees every allocation of the CPU allocator. What is compared to is the training
step: the forward and backward pass of the same loss.
"""

from __future__ import annotations

import torch

import hypergrad_ext as hg
from bench.bench_engines import MODELS
from bench.measure import save, table
from tests.allocations import peak
from tests.models import loss_of

KINDS = ("eager", "traced", "native")


def main() -> None:
    """Print and save the table."""
    rows: list[dict[str, object]] = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, x, y = make()
        loss, v = loss_of(model, x, y), {n: torch.randn_like(p) for n, p in model.named_parameters()}
        leaves = list(model.parameters())

        def step(loss=loss, model=model, leaves=leaves) -> object:
            return torch.autograd.grad(loss(dict(model.named_parameters())), leaves)

        def solve(kind: str, loss=loss, model=model, v=v) -> object:
            return hg.solve(hg.Hessian(loss, model, engine=kind), v, hg.Neumann(3, alpha=1e-4), residual=False)

        step()
        row: dict[str, object] = {"model": name, "training step MB": peak(step) / 1e6}
        for kind in KINDS:
            for _ in range(2):
                solve(kind)
            row[f"{kind} MB"] = peak(lambda kind=kind: solve(kind)) / 1e6
        rows.append(row)
    print(table(rows))
    print(save("engines_memory", rows))


if __name__ == "__main__":
    main()
