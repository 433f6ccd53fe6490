"""An outer loop that can be killed at any time: ``python -m tests.outer_loop FOLDER SOLVER STEPS``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad_ext as hg

SOLVERS: dict[str, Any] = {
    "auto": "auto",
    "auto-sketched": hg.Auto(tol=1e-8, rank=6, long=1),
    "neumann": hg.Neumann(4),
    "chebyshev": hg.Chebyshev(4),
    "nystrom": hg.CG(1e-6, preconditioner=hg.Nystrom(5)),
}


class Loop:
    """Per-weight penalties of a network with dropout, trained by Adam in small batches; a scheduler outside."""

    def __init__(self, solver: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.x, self.y = torch.randn(60, 5), torch.randint(3, (60,))
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3))
        self.hparams = {n: torch.full_like(p, -2.0).requires_grad_() for n, p in self.net.named_parameters()}
        self.inner = torch.optim.Adam(self.net.parameters(), lr=0.02)
        adam = torch.optim.Adam(self.hparams.values(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.95)
        self.outer = hg.HyperOptimizer(adam, self.net, SOLVERS[solver], damping=1.0, max_norm=0.5, on_failure="skip")

    def train_loss(self, params: dict[str, Tensor]) -> Tensor:
        rows = torch.randint(40, (20,))
        logits = torch.func.functional_call(self.net, params, (self.x[rows],))
        penalty = sum((self.hparams[n].exp() * p.square()).sum() for n, p in params.items())
        return F.cross_entropy(logits, self.y[rows]) + penalty

    def val_loss(self, params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(self.net, params, (self.x[40:],)), self.y[40:])

    def step(self) -> hg.OuterStep:
        for _ in range(3):
            self.inner.zero_grad()
            self.train_loss(dict(self.net.named_parameters())).backward()
            self.inner.step()
        result = self.outer.step(self.val_loss, self.train_loss)
        self.schedule.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        return {
            "outer": self.outer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "net": self.net.state_dict(),
            "inner": self.inner.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("outer", "schedule", "net", "inner"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])


def main(folder: Path, solver: str, steps: int) -> None:
    """Go on from the last checkpoint, write one after every step; stop before step ``steps``."""
    loop, file = Loop(solver), folder / "checkpoint.pt"
    if file.exists():
        loop.load_state_dict(torch.load(file))
    while loop.outer.steps + loop.outer.skipped < steps:
        loop.step()
        torch.save(loop.state_dict(), folder / "new.pt")
        os.replace(folder / "new.pt", file)
        (folder / "step").write_text(str(loop.outer.steps))
        time.sleep(0.02)  # so that whoever kills this has a step to choose


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
