"""Every fused op in plain torch, written like its formula: the truth for tests, and the fallback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


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
    _check_contiguous(x=x, r=r, p=p)
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
    residual.copy_(torch.where(running, rr, residual))
    flag[running & ~rr.isfinite()] = 3.0
    flag[running & (rr <= stop)] = 1.0
    running = flag == 0
    for _, r_i, p_i, _ in pieces:
        p_i.copy_(torch.where(running[:, None], r_i + where(beta, p_i) * p_i, p_i))


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
    out = torch.einsum("nkc,nd->kcd", z, x).reshape(k, -1)
    out = scale * (torch.cat([out, z.sum(0)], 1) if intercept else out)
    return out if l2 is None else out + l2.reshape(-1) * v


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
    that are not taken are -1.

    Returns:
        The sum, like ``b``, and the stats, ``(steps, k, 2)``.
    """
    v, p = b.clone(), b.clone()
    history = stop.new_full((steps, b.shape[0], 2), -1.0)
    for stats in history:
        neumann_step_([v], [p], [glm_hvp(x, weights, v, l2, scale, intercept)], stats, alpha, damping)
        if not bool(((stats[:, 0] > stop) & stats[:, 0].isfinite()).any()):
            break
    return p * alpha, history


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
    solution, r, p, state = torch.zeros_like(b), b.clone(), b.clone(), state.clone()
    step = 0
    while step < steps and bool((state[:, 3] == 0).any()):
        cg_step_([solution], [r], [p], [glm_hvp(x, weights, p, l2, scale, intercept)], state, damping)
        step += 1
    return solution, state, torch.tensor(step, device=b.device)


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


def mlp_hvp(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    v: Tensor,
    scale: float,
    biases: bool,
    l2: float,
) -> Tensor:
    """Hessian of an MLP's mean loss times the rows of ``v``, by Pearlmutter's R-operator, R = d/dt at w + t v.

    Layer l takes ``hidden[l]`` to ``a = h W^T + b`` and, but for the last, to ``act(a)``. ``slopes`` are
    ``act'(a)``, ``bends`` are ``act''(a) dL/dh`` with the h that ``a`` leads to (none if ``act''`` is zero
    everywhere); ``deltas`` are ``dL/da`` from the second layer on. With ``probabilities`` p the loss is cross
    entropy, its Hessian by the outputs ``scale (diag(p) - p p^T)``; else ``scale I``. A row of ``v`` holds for
    every layer the weight and then, if there are any, the biases; ``l2 ||W||^2`` is added to the loss.

    Returns:
        A tensor like ``v``.
    """
    k, last = len(v), len(weights) - 1
    sizes = [size for w in weights for size in ([w.numel(), len(w)] if biases else [w.numel()])]
    parts = v.split(sizes, dim=1)
    v_w = [part.view(k, *w.shape) for part, w in zip(parts[:: 1 + biases], weights, strict=True)]
    r_a: list[Tensor] = []
    r_h: list[Tensor] = []  # of hidden[1:]; that of the inputs is zero
    for layer, (w, h) in enumerate(zip(weights, hidden, strict=True)):
        r = h @ v_w[layer].mT
        if biases:
            r = r + parts[2 * layer + 1][:, None]
        r_a.append(r + r_h[-1] @ w.T if layer else r)
        if layer < last:
            r_h.append(slopes[layer] * r_a[-1])

    z, p = r_a[-1], probabilities
    r_delta = scale * (z if p is None else p * (z - (p * z).sum(2, keepdim=True)))
    out: list[Tensor] = []
    for layer in range(last, -1, -1):
        product = r_delta.mT @ hidden[layer] + 2 * l2 * v_w[layer]
        if layer:
            product = product + deltas[layer - 1].T @ r_h[layer - 1]
        out[:0] = [product.reshape(k, -1), *([r_delta.sum(1)] if biases else [])]
        if layer:
            r_e = r_delta @ weights[layer] + deltas[layer - 1] @ v_w[layer]
            r_delta = slopes[layer - 1] * r_e
            if bends:
                r_delta = r_delta + bends[layer - 1] * r_a[layer - 1]
    return torch.cat(out, 1)
