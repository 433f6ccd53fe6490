"""Every fused op in plain torch, written like its formula: the truth for tests, and the fallback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def aligned(rows: int, *lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Walk several tensor lists as one vector per row.

    The lists need not be cut at the same places; their totals must agree.

    Yields:
        One view ``(rows, m)`` per list, of the elements that come next in all of them.
    """
    rest = [[t.reshape(rows, -1) for t in tensors if t.numel()] for tensors in lists]
    while all(rest):
        width = min(tensors[0].shape[1] for tensors in rest)
        yield tuple(tensors[0][:, :width] for tensors in rest)
        for tensors in rest:
            tensors[0] = tensors[0][:, width:]
            if tensors[0].shape[1] == 0:
                tensors.pop(0)


def neumann_step_(
    v: Sequence[Tensor], p: Sequence[Tensor], hv: Sequence[Tensor], stats: Tensor, alpha: float, damping: float = 0.0
) -> None:
    """``v <- v - alpha (hv + damping v)``, ``p <- p + v``, ``stats <- (||v||^2, any v not finite)``."""
    rows = stats.shape[0] if stats.dim() == 2 else 1
    squares, bad = stats.new_zeros(rows), torch.zeros(rows, dtype=torch.bool, device=stats.device)
    for v_i, p_i, hv_i in aligned(rows, v, p, hv):
        v_i.sub_(alpha * (hv_i.to(v_i.dtype) + damping * v_i))
        p_i.add_(v_i)
        squares += v_i.double().square().sum(1)
        bad |= ~v_i.isfinite().all(1)
    stats.copy_(torch.stack([squares, bad.double()], dim=-1).view_as(stats))


def cg_step_(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    hp: Sequence[Tensor],
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """One iteration of conjugate gradients on ``(H + damping I) x = b``, given ``hp = H p``.

    ``state`` holds, per row, ``r.r``, the value of ``r.r`` at which to stop, the curvature
    ``p.(H + damping I)p / p.p`` and a flag: 0 running, 1 converged, 2 non-positive curvature,
    3 not finite. A row whose flag is set is left alone.
    """
    rows = state.shape[0] if state.dim() == 2 else 1
    residual, stop, curvature, flag = state.view(rows, 4).unbind(1)
    pieces = [(x_i, r_i, p_i, hp_i.to(p_i.dtype) + damping * p_i) for x_i, r_i, p_i, hp_i in aligned(rows, x, r, p, hp)]

    def dot(a: int, b: int) -> Tensor:
        return sum((piece[a].double() * piece[b].double()).sum(1) for piece in pieces)  # type: ignore[return-value]

    running = flag == 0
    php, pp, hphp = (dot(2, 3), dot(2, 2), dot(3, 3)) if pieces else [torch.zeros_like(flag)] * 3
    broken = running & ~php.isfinite()
    eps = torch.finfo(x[0].dtype).eps if pieces else 0.0
    rounding = torch.where(hphp.isfinite(), eps * pp.sqrt() * hphp.sqrt(), 0)
    flat = running & ~broken & (php <= rounding)
    curvature.copy_(torch.where(running & ~broken, (php / pp).nan_to_num(), curvature))
    flag[broken], flag[flat] = 3.0, 2.0
    running = flag == 0

    def where(factor: Tensor, t: Tensor) -> Tensor:
        return torch.where(running, factor, 0).to(t.dtype)[:, None]

    alpha = residual / php
    for x_i, r_i, p_i, hp_i in pieces:
        keep = running[:, None]
        x_i.copy_(torch.where(keep, x_i + where(alpha, x_i) * p_i, x_i))
        r_i.copy_(torch.where(keep, r_i - where(alpha, x_i) * hp_i, r_i))
    rr = dot(1, 1) if pieces else torch.zeros_like(flag)
    beta = rr / residual
    for _, r_i, p_i, _ in pieces:
        p_i.copy_(torch.where(running[:, None], r_i + where(beta, p_i) * p_i, p_i))
    residual.copy_(torch.where(running, rr, residual))
    flag[running & ~rr.isfinite()] = 3.0
    flag[running & (rr <= stop)] = 1.0
