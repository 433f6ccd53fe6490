"""Peak memory of a solve by every engine, each in a process of its own.

Tensors, as torch's profiler sees every allocation of the CPU allocator, and the most that was resident. What is
compared to is the training step: the forward and backward pass of the same loss.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hypergrad_ext as hg
from bench.models import MODELS, OVERHEAD_BOUND
from tests.allocations import peak
from tests.models import loss_of

KINDS = ("training step", "eager", "traced", "native")


def measured(name: str, kind: str) -> dict[str, float]:
    """MB of tensors, and by how many the process grew at the most."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    loss, v = loss_of(model, x, y), {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def run() -> object:
        if kind == "training step":
            return torch.autograd.grad(loss(dict(model.named_parameters())), list(model.parameters()))
        return hg.solve(hg.Hessian(loss, model, engine=kind), v, hg.Neumann(3, alpha=1e-4), residual=False)

    before = _status("VmRSS")
    for _ in range(3):
        run()
    resident = _status("VmHWM") - before
    return {"tensors": peak(run) / 1e6, "resident": resident / 1e3}


def _status(key: str) -> float:
    """A number of kB that the system has of this process."""
    path = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+)", path.read_text()) if path.exists() else None
    return float(found[1]) if found else float("nan")


@pytest.mark.parametrize("name", MODELS)
def test_memory(name, benchmark, report, quick):
    if quick and name not in OVERHEAD_BOUND[:2]:
        pytest.skip("--quick: two models")
    row: dict[str, object] = {"model": name}
    for kind in KINDS:
        command = [sys.executable, "-m", "bench.bench_memory", name, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        row |= {f"{kind} MB": found["tensors"], f"{kind} resident MB": found["resident"]}
    benchmark.pedantic(lambda: None, rounds=1)
    report("memory", row)


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:])))
