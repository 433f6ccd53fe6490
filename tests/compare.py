"""One comparator for all formats, with numbers in the message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def flat64(tree: Any) -> Tensor:
    """All elements of a tree as one float64 vector."""
    return torch.cat([t.detach().double().reshape(-1) for t in pytree.tree_leaves(tree)])


def relative_error(value: Any, truth: Any) -> float:
    """``|value - truth| / |truth|`` over whole trees."""
    value, truth = flat64(value), flat64(truth)
    return float((value - truth).norm() / truth.norm().clamp_min(1e-300))


def assert_close(value: Any, truth: Any, tolerance: float, context: str = "") -> None:
    """Relative error within tolerance; NaN never is."""
    error = relative_error(value, truth)
    assert error <= tolerance, f"{context} relative error {error:.3e} > {tolerance:.1e}"


def assert_no_worse_than_torch(value: Any, by_torch: Any, truth: Any, floor: float, context: str = "") -> None:
    """Low precision is judged against torch's own error: at most twice that, plus a rounding floor."""
    ours, theirs = relative_error(value, truth), relative_error(by_torch, truth)
    assert ours <= 2 * theirs + floor, f"{context} error {ours:.3e} against torch's {theirs:.3e}, floor {floor:.1e}"
