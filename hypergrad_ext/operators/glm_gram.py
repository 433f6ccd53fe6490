"""The Gram matrix of a generalised linear model: formed, and as an operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad_ext import ops, reference
from hypergrad_ext.operators.dense import DenseMatrix
from hypergrad_ext.structure import Space
from hypergrad_ext.surroundings import without_autocast

# Rows of a half precision X that are widened at a time.
_ROWS = 8192


class Gram(DenseMatrix):
    """The Gram matrix as an operator on the model's own parameters."""

    def __init__(self, matrix: Tensor, space: Space) -> None:
        """Without the checks of a matrix from outside, which take as long as forming a small one."""
        self.matrix, self.space, self.symmetric = matrix, space, True

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """One product with the matrix."""
        with without_autocast(self.space.device):
            return self.space.views(self.matrix @ self.space.joined(v))

    def matmat(self, v: Sequence[Tensor]) -> list[Tensor]:
        """One product with the matrix for all vectors."""
        with without_autocast(self.space.device):
            return self.space.views(self.space.joined(v) @ self.matrix)


def form_gram(inputs: Tensor, weights: Tensor, scale: float, intercept: bool) -> Tensor:
    """``scale X^T D X``: a symmetric block for every pair of classes.

    Args:
        inputs: X, ``(n, d)``.
        weights: ``(n,)``: D; ``(n, classes)``: probabilities p, of which D is ``diag(p) - p p^T``.
        scale: Of the sum.
        intercept: Whether X has another column, of ones.

    Returns:
        The matrix, with rows and columns in the order of the parameters: all weights, then all intercepts.
    """
    n, d = inputs.shape
    p = weights.view(n, -1)
    classes, width = p.shape[1], d + intercept
    m = classes * width
    # A GPU has no kernel of ours for it, whatever backend was asked for: its libraries form it.
    form = ops.glm_gram.kernel_if_any(p.device) if p.device.type == "cpu" else None
    form = form or reference.glm_gram
    if classes == 1 and not intercept and inputs.dtype == p.dtype:
        # As it comes: a copy takes as long as hundreds of thousands of multiply-adds.
        return form(inputs, scale * p)[0]
    blocks = p.new_zeros(classes, classes, width, width)
    unit = torch.eye(classes, dtype=p.dtype, device=p.device)
    # A half precision X is widened by blocks of rows, so that no second copy of it is made.
    rows = n if inputs.dtype == p.dtype else _ROWS
    for x, p_x in zip(inputs.split(rows), p.split(rows), strict=True):
        x = x.to(p.dtype)
        for c in range(classes):
            curvature = scale * p_x
            if classes > 1:
                curvature = curvature[:, c, None] * (unit[c, : c + 1] - p_x[:, : c + 1])
            blocks[c, : c + 1, :d, :d] += form(x, curvature)
            if intercept:
                blocks[c, : c + 1, d, :d] += curvature.T @ x
                blocks[c, : c + 1, d, d] += curvature.sum(0)
    if intercept:
        blocks[:, :, :d, d] = blocks[:, :, d, :d]
    for c in range(1, classes):
        blocks[:c, c] = blocks[c, :c]
    gram = blocks.transpose(1, 2).reshape(m, m)
    if classes > 1 and intercept:
        order = torch.arange(classes * width, device=p.device).view(classes, width)
        order = torch.cat([order[:, :d].reshape(-1), order[:, d:].reshape(-1)])
        gram = gram[order][:, order]
    return gram
