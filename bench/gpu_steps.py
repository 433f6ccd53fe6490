"""The Neumann step on a GPU: ``python -m bench.gpu_steps [FOLDER]``.

Device time by events, every variant in turn, as in a solve and from a cold cache, against a list of torch's own
operations and against the bandwidth of a plain copy; every variant is checked against float64 first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.device_time import medians, microseconds
from bench.measure import write_in_turn
from hypergrad_ext import backends, ops, reference

DEVICE = torch.device("cuda")
LISTS = {"150 x 420": [420] * 150, "150 x 5332": [5332] * 150, "1 x 64M": [2**26], "8 x 8M + 1": [2**23 + 1] * 8}


def foreach(v: list[Tensor], p: list[Tensor], hv: list[Tensor]) -> Tensor:
    """What a user of torch writes, with the norm that the fused step includes."""
    torch._foreach_sub_(v, hv, alpha=0.01)
    torch._foreach_add_(p, v)
    return torch.stack(torch._foreach_norm(v)).norm()


def copy_bandwidth() -> float:
    """GB/s of a copy that no cache holds, reads and writes counted."""
    big = torch.empty(2**28, device=DEVICE)
    other = torch.empty_like(big)
    return 2 * big.nbytes / medians(microseconds({"copy": lambda: other.copy_(big)}))["copy"] / 1e3


def rows_of(name: str, sizes: list[int], copy: float) -> list[dict[str, object]]:
    """One row per variant."""
    hv = [torch.randn(n, device=DEVICE) for n in sizes]
    v, p = (torch.randn(sum(sizes), device=DEVICE) for _ in range(2))
    stats = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    parts = list(v.split(sizes)), list(p.split(sizes))
    variants: dict[str, Callable[[], object]] = {"foreach": lambda: foreach(*parts, hv)}
    for backend in ("cuda", "triton"):
        if backends.unavailable(backend, DEVICE.type):
            continue
        kernel = ops.neumann_step_.kernel(DEVICE, backend)
        truth, true_stats = [[t.double() for t in x] for x in ([v], [p], hv)], stats.clone()
        reference.neumann_step_(*truth, true_stats, 0.01, 0.0)
        kernel([v], [p], hv, stats, 0.01, 0.0)
        assert float((v - truth[0][0]).norm() / truth[0][0].norm()) < 1e-6, backend
        assert torch.allclose(stats, true_stats, rtol=1e-6), backend
        variants[backend] = lambda kernel=kernel: kernel([v], [p], hv, stats, 0.01, 0.0)
    rows: list[dict[str, object]] = []
    times, cold = (medians(microseconds(variants, cold=flag)) for flag in (False, True))
    for variant, us in times.items():
        rate = 20 * sum(sizes) / us / 1e3
        row: dict[str, object] = {"list": name, "variant": variant, "us": us, "cold us": cold[variant], "GB/s": rate}
        rows.append(row | {"share of copy": rate / copy, "x foreach": times["foreach"] / us})
    return rows


def main() -> None:
    """Measure, print, save."""
    copy = copy_bandwidth()
    rows = [partial(rows_of, name, sizes, copy) for name, sizes in LISTS.items()]
    write_in_turn("gpu_steps", {"rows": rows}, **{"copy GB/s": copy})


if __name__ == "__main__":
    main()
