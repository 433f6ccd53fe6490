"""The code on the pages of docs/ runs, block after block, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="runs in a checkout, where the pages are")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_outer_loop(tmp_path):
    tune, resume, reweight, influence, migrate, unroll = blocks("outer_loop.md")
    assert len([line for line in tune.splitlines() if line.strip()]) <= 20
    names: dict = {"checkpoint": tmp_path / "checkpoint.pt"}

    exec(tune, names)
    assert names["result"].taken and names["outer"].steps == 10
    assert all((t != -3).any() for t in names["log_l2"].values())

    before = {name: t.detach().clone() for name, t in names["log_l2"].items()}
    resumed = resume.split("\n\n")
    exec(resumed[0], names)
    for t in names["log_l2"].values():
        t.data.fill_(7.0)
    exec(resumed[1], names)
    assert all(torch.equal(t, before[name]) for name, t in names["log_l2"].items())

    exec(reweight, names)
    assert names["reweight"].steps == 5 and names["log_weight"].std() > 0

    exec(influence, names)
    influences = names["influence"]
    assert influences.shape == (8, 200)
    exact = hessian_inverse_products(names)
    assert float((influences - exact).norm() / exact.norm()) < 1e-2

    exec(migrate, names)
    assert names["result"].taken
    exec(unroll, names)
    assert names["lr"].grad is not None and names["lr"].grad != 0


def hessian_inverse_products(names: dict) -> torch.Tensor:
    """The influences with a dense Hessian in float64."""
    import hypergrad_ext as hg

    flat = lambda tree: torch.cat([tree[n].double().flatten(1) for n in names["weights"]], dim=1)  # noqa: E731
    dense = hg.Hessian(names["train_loss"](), names["model"]).dense().double()
    dense.diagonal().add_(1e-3)
    return -torch.linalg.solve(dense, flat(names["g_test"]).T).T @ flat(names["g_train"]).T


def test_which_solver():
    (kfac,) = blocks("which_solver.md")
    names: dict = {}
    exec(kfac, names)
    plain, faster = names["plain"], names["faster"]
    assert plain.converged and faster.converged and faster.steps < 0.7 * plain.steps
    for name, value in plain.value.items():
        assert float((value - faster.value[name]).norm() / value.norm()) < 0.05


def test_every_name_is_public():
    import hypergrad_ext as hg

    for page in DOCS.glob("*.md"):
        for name in set(re.findall(r"\bhg\.(\w+)", page.read_text())):
            assert hasattr(hg, name), f"{page.name}: hg.{name}"
