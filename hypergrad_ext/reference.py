"""Every fused op in plain torch, written like its formula: the truth for tests, and the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Rows that go into a Gram matrix at a time, and rows of the matrix that are formed at once.
_GRAM_ROWS, _GRAM_STRIP = 8192, 112


def aligned(rows: int, *lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Walk several tensor lists as one vector per row.

    The lists need not be cut at the same places; their totals must agree. Only views of contiguous
    tensors can be written through.

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


def _check_contiguous(**lists: Sequence[Tensor]) -> None:
    for name, tensors in lists.items():
        for t in tensors:
            if not t.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got sizes {list(t.shape)} and strides {list(t.stride())}")


def neumann_step_(
    v: Sequence[Tensor], p: Sequence[Tensor], hv: Sequence[Tensor], stats: Tensor, alpha: float, damping: float = 0.0
) -> None:
    """``v <- v - alpha (hv + damping v)``, ``p <- p + v``, ``stats <- (||v||^2, any v not finite)``."""
    _check_contiguous(v=v, p=p)
    rows = stats.shape[0] if stats.dim() == 2 else 1
    squares, bad = stats.new_zeros(rows), torch.zeros(rows, dtype=torch.bool, device=stats.device)
    for v_i, p_i, hv_i in aligned(rows, v, p, hv):
        v_i.sub_(alpha * (hv_i.to(v_i.dtype) + damping * v_i))
        p_i.add_(v_i)
        squares += v_i.double().square().sum(1)
        bad |= ~v_i.isfinite().all(1)
    stats.copy_(torch.stack([squares, bad.double()], dim=-1).view_as(stats))


Preconditioner = Sequence[Tensor] | Callable[[Tensor], Tensor]
"""M: the diagonal of a matrix as a list, one row for all and none for the identity; or a function of ``(rows, n)``."""


def _times(m: Preconditioner, r: Sequence[Tensor]) -> Sequence[Tensor]:
    """``M r`` for the pieces of ``r``."""
    widths = [piece.shape[1] for piece in r]
    if callable(m):
        return m(torch.cat([*r], 1)).split(widths, 1)
    if not m:
        return r
    diagonal = torch.cat([t.reshape(-1) for t in m]).split(widths)
    return [d * piece for d, piece in zip(diagonal, r, strict=True)]


def _fill_residual_stats(
    stats: Tensor, r: Sequence[Tensor], z: Sequence[Tensor], x: Sequence[Tensor], rows: int
) -> None:
    square, energy = stats.new_zeros(2, rows)
    bad = torch.zeros(rows, dtype=torch.bool, device=stats.device)
    for r_i, z_i, x_i in zip(r, z, x, strict=True):
        square += r_i.double().square().sum(1)
        energy += (r_i.double() * z_i.double()).sum(1)
        bad |= ~x_i.isfinite().all(1)
    stats.copy_(torch.stack([square, bad.double(), energy], dim=-1).view_as(stats))


def richardson_step_(
    x: Sequence[Tensor],
    hx: Sequence[Tensor],
    b: Sequence[Tensor],
    m: Preconditioner,
    stats: Tensor,
    alpha: float,
    damping: float = 0.0,
) -> None:
    """``x <- x + alpha M r``, ``r = b - (hx + damping x)``, ``stats <- (||r||^2, any new x not finite, r.M r)``.

    From ``x = alpha b`` and with M = I its iterates are the partial sums of the Neumann series.
    """
    _check_contiguous(x=x)
    rows = stats.shape[0] if stats.dim() == 2 else 1
    pieces = list(aligned(rows, x, hx, b))
    r = [b_i - (hx_i.to(x_i.dtype) + damping * x_i) for x_i, hx_i, b_i in pieces]
    z = _times(m, r) if pieces else r
    for (x_i, _, _), z_i in zip(pieces, z, strict=True):
        x_i.add_(alpha * z_i)
    _fill_residual_stats(stats, r, z, [piece[0] for piece in pieces], rows)


def chebyshev_step_(
    x_old: Sequence[Tensor],
    x: Sequence[Tensor],
    hx: Sequence[Tensor],
    b: Sequence[Tensor],
    m: Preconditioner,
    stats: Tensor,
    alpha: float,
    momentum: float,
    damping: float = 0.0,
) -> None:
    """``x_old <- x + momentum (x - x_old) + alpha M r``, with ``r`` and ``stats`` as in `richardson_step_`."""
    _check_contiguous(x_old=x_old)
    rows = stats.shape[0] if stats.dim() == 2 else 1
    pieces = list(aligned(rows, x_old, x, hx, b))
    r = [b_i - (hx_i.to(x_i.dtype) + damping * x_i) for _, x_i, hx_i, b_i in pieces]
    z = _times(m, r) if pieces else r
    for (old_i, x_i, _, _), z_i in zip(pieces, z, strict=True):
        old_i.copy_(x_i + (momentum * (x_i - old_i) + alpha * z_i))
    _fill_residual_stats(stats, r, z, [piece[0] for piece in pieces], rows)


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
    _cg_iteration(x, r, p, hp, [], (residual, stop, curvature, flag, residual), damping)


def pcg_step_(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    hp: Sequence[Tensor],
    m: Preconditioner,
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """`cg_step_` with the preconditioner M; ``state`` has ``r.M r`` in one more column.

    If that is not positive, neither is M, and the flag becomes 2.
    """
    rows = state.shape[0] if state.dim() == 2 else 1
    _cg_iteration(x, r, p, hp, m, state.view(rows, 5).unbind(1), damping)


def _cg_iteration(
    x: Sequence[Tensor],
    r: Sequence[Tensor],
    p: Sequence[Tensor],
    hp: Sequence[Tensor],
    m: Preconditioner,
    columns: Sequence[Tensor],
    damping: float,
) -> None:
    _check_contiguous(x=x, r=r, p=p)
    residual, stop, curvature, flag, energy = columns
    pieces = [
        (x_i, r_i, p_i, hp_i.to(p_i.dtype) + damping * p_i) for x_i, r_i, p_i, hp_i in aligned(len(flag), x, r, p, hp)
    ]

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        products = [(a_i.double() * b_i.double()).sum(1) for a_i, b_i in zip(a, b, strict=True)]
        return sum(products, torch.zeros_like(flag))

    p_all, hp_all, r_all = ([piece[i] for piece in pieces] for i in (2, 3, 1))
    running = flag == 0
    php, pp, hphp = dot(p_all, hp_all), dot(p_all, p_all), dot(hp_all, hp_all)
    broken = running & ~php.isfinite()
    eps = torch.finfo(x[0].dtype).eps if pieces else 0.0
    rounding = torch.where((pp + hphp).isfinite(), eps * pp.sqrt() * hphp.sqrt(), 0)
    flat = running & ~broken & (php <= rounding)
    curvature.copy_(torch.where(running & ~broken, (php / pp).nan_to_num(), curvature))
    flag[broken], flag[flat] = 3.0, 2.0
    running = flag == 0

    def where(factor: Tensor, t: Tensor) -> Tensor:
        return torch.where(running, factor, 0).to(t.dtype)[:, None]

    alpha = energy / php
    for x_i, r_i, p_i, hp_i in pieces:
        keep = running[:, None]
        x_i.copy_(torch.where(keep, x_i + where(alpha, x_i) * p_i, x_i))
        r_i.copy_(torch.where(keep, r_i - where(alpha, x_i) * hp_i, r_i))
    z_all = _times(m, r_all) if pieces else r_all
    rr, rz = dot(r_all, r_all), dot(r_all, z_all)
    beta = rz / energy
    residual.copy_(torch.where(running, rr, residual))
    energy.copy_(torch.where(running, rz, energy))
    flag[running & (rz <= 0)] = 2.0
    flag[running & (rr <= stop)] = 1.0
    flag[running & ~(rr.isfinite() & rz.isfinite())] = 3.0
    running = flag == 0
    for (_, _, p_i, _), z_i in zip(pieces, z_all, strict=True):
        p_i.copy_(torch.where(running[:, None], z_i + where(beta, p_i) * p_i, p_i))


def glm_hvp(x: Tensor, weights: Tensor, v: Tensor, l2: Tensor | None, scale: float, intercept: bool) -> Tensor:
    """``scale X^T D X v + l2 v`` for the rows of ``v``.

    ``x`` is ``(n, d)``; ``weights`` is ``(n,)``, the diagonal of D, or ``(n, classes)``, probabilities p
    with ``D = diag(p) - p p^T``; a row of ``v`` holds ``classes x d`` weights, then ``classes`` intercepts
    if there are any.

    Returns:
        A tensor like ``v``.
    """
    (n, d), k = x.shape, v.shape[0]
    classes = 1 if weights.dim() == 1 else weights.shape[1]
    p, x = weights.reshape(n, 1, classes), x.to(v.dtype)
    v_w, v_b = v[:, : classes * d].reshape(k, classes, d), v[:, classes * d :]
    z = torch.einsum("nd,kcd->nkc", x, v_w) + (v_b if intercept else 0)
    z = p * z if weights.dim() == 1 else p * (z - (p * z).sum(2, keepdim=True))
    out = torch.einsum("nkc,nd->kcd", z, x).flatten(1)
    out = scale * (torch.cat([out, z.sum(0)], 1) if intercept else out)
    return out if l2 is None else out + l2.reshape(-1) * v


def glm_gram(x: Tensor, weights: Tensor) -> Tensor:
    """``X^T diag(weights[:, c]) X`` for every column c of ``weights``; X is ``(n, d)``, ``weights`` ``(n, m)``.

    By blocks of rows, so that no second copy of X is made, and by strips of what is left of the diagonal: the rest
    is its mirror image.

    Returns:
        The matrices, ``(m, d, d)``.
    """
    out = x.new_zeros(weights.shape[1], x.shape[1], x.shape[1])
    # Of equal widths: what is left over for a narrow last one takes as long as a wide one.
    width = -(-len(out[0]) // max(1, round(len(out[0]) / _GRAM_STRIP))) if out.numel() else 1
    for rows, weights_of_rows in zip(x.split(_GRAM_ROWS), weights.split(_GRAM_ROWS), strict=True):
        for total, weight in zip(out, weights_of_rows.T, strict=True):
            scaled = rows * weight[:, None]
            for left in range(0, x.shape[1], width):
                strip = slice(left, left + width)
                total[strip, : strip.stop].addmm_(rows[:, strip].T, scaled[:, : strip.stop])
    return out.tril() + out.tril(-1).mT


def glm_neumann_solve(
    x: Tensor,
    weights: Tensor,
    b: Tensor,
    l2: Tensor | None,
    scale: float,
    intercept: bool,
    alpha: float,
    damping: float,
    steps: int,
    stop: Tensor,
) -> tuple[Tensor, Tensor]:
    """``alpha sum_j (I - alpha (H + damping I))^j b`` over ``steps + 1`` terms, and the stats of every step.

    Ends once the squared norm of every row's term is at most its ``stop``, or not finite; stats of steps
    that are not taken are -1. A term that is at most its ``stop`` in the end, the residual of the sum before it, is
    left out of that.

    Returns:
        The sum, like ``b``, and the stats, ``(steps, k, 2)``.
    """
    return neumann_series(lambda v: glm_hvp(x, weights, v, l2, scale, intercept), b, alpha, damping, steps, stop)


def glm_cg_solve(
    x: Tensor,
    weights: Tensor,
    b: Tensor,
    l2: Tensor | None,
    scale: float,
    intercept: bool,
    damping: float,
    steps: int,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """At most ``steps`` iterations of `cg_step_` from zero: the solution, the final state, the steps taken."""
    return conjugate_gradients(lambda p: glm_hvp(x, weights, p, l2, scale, intercept), b, damping, steps, state)


def neumann_series(
    product: Callable[[Tensor], Tensor], b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor
) -> tuple[Tensor, Tensor]:
    """The loop of `glm_neumann_solve` around any product with the rows of a tensor."""
    v, p = b.clone(), b.clone()
    history = stop.new_full((steps, b.shape[0], 2), -1.0)
    met = torch.zeros_like(stop, dtype=torch.bool)
    for stats in history:
        neumann_step_([v], [p], [product(v)], stats, alpha, damping)
        met = stats[:, 0] <= stop
        if not bool((~met & stats[:, 0].isfinite()).any()):
            break
    return torch.where(met[:, None], p - v, p) * alpha, history


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, damping: float, steps: int, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop of `glm_cg_solve` around any product with the rows of a tensor."""
    solution, r, p, state = torch.zeros_like(b), b.clone(), b.clone(), state.clone()
    step = 0
    while step < steps and bool((state[:, 3] == 0).any()):
        cg_step_([solution], [r], [p], [product(p)], state, damping)
        step += 1
    return solution, state, torch.tensor(step, device=b.device)


def dense_neumann_solve(
    matrix: Tensor, b: Tensor, alpha: float, damping: float, steps: int, stop: Tensor
) -> tuple[Tensor, Tensor]:
    """`glm_neumann_solve` for a matrix given by its entries."""
    return neumann_series(lambda v: v @ matrix.mT, b, alpha, damping, steps, stop)


def dense_cg_solve(
    matrix: Tensor, b: Tensor, damping: float, steps: int, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`glm_cg_solve` for a matrix given by its entries."""
    return conjugate_gradients(lambda p: p @ matrix.mT, b, damping, steps, state)


def softmax_hessian(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> Tensor:
    """``scale p (u - <p, u>)`` with ``p = softmax(logits)``: cross-entropy's Hessian in the logits, times ``u``.

    ``logits`` is ``(rows, classes)``; ``u`` is the same, or ``(k, rows, classes)``; ``weights``, ``(rows,)``,
    multiplies the rows. A row whose weight is 0 is 0, whatever its logits and ``u`` are.

    Returns:
        A contiguous tensor like ``u``.
    """
    exact = torch.promote_types(u.dtype, torch.float32)
    p, z = logits.to(exact).softmax(-1), u.to(exact)
    out = scale * p * (z - (p * z).sum(-1, keepdim=True))
    if weights is not None:
        out = torch.where((weights == 0)[:, None], 0, weights.to(exact)[:, None] * out)
    return out.to(u.dtype).contiguous()


def softmax_hessian_(logits: Tensor, u: Tensor, scale: float, weights: Tensor | None = None) -> None:
    """`softmax_hessian`, written over ``u``."""
    u.copy_(softmax_hessian(logits, u, scale, weights))
