"""The README's code runs, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="runs in a checkout, where the README is")


def test_example_fills_the_hypergradient():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    gradient = names["log_l2"].grad
    assert gradient.shape == (10, 64) and gradient.isfinite().all() and gradient.abs().max() > 0


def test_every_name_in_the_table_is_public():
    import hypergrad_ext as hg

    for name in set(re.findall(r"`(?:\w+ = )?hg\.(\w+)", README.read_text())):
        assert hasattr(hg, name), name


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README.read_text())):
        assert f"\n{target}:" in makefile, target


def test_result_is_that_of_the_exact_inverse():
    """The example's default solver against Direct."""
    import hypergrad_ext as hg

    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    lam = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(60, 6).double(), torch.randint(3, (60,))
    train = torch.nn.functional.cross_entropy(model(x[:30]), y[:30]) + (lam.exp() * model.weight**2).sum()
    val = torch.nn.functional.cross_entropy(model(x[30:]), y[30:])
    # A free bias makes the Hessian singular in one direction, which no gradient has a part in.
    default = hg.hypergradient(val, train, model, lam)
    exact = hg.hypergradient(val, train, model, lam, hg.Direct(), damping=1e-8)
    assert float((default - exact).norm() / exact.norm()) < 1e-3
