"""Every fused op in plain torch, written like its formula: the truth for tests, and the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
    rounding = torch.where(hphp.isfinite(), eps * pp.sqrt() * hphp.sqrt(), 0)
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
    for stats in history:
        neumann_step_([v], [p], [product(v)], stats, alpha, damping)
        if not bool(((stats[:, 0] > stop) & stats[:, 0].isfinite()).any()):
            break
    return p * alpha, history


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
        out[:0] = [product.flatten(1), *([r_delta.sum(1)] if biases else [])]
        if layer:
            r_e = r_delta @ weights[layer] + deltas[layer - 1] @ v_w[layer]
            r_delta = slopes[layer - 1] * r_e
            if bends:
                r_delta = r_delta + bends[layer - 1] * r_a[layer - 1]
    return torch.cat(out, 1)


def mlp_neumann_solve(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    b: Tensor,
    scale: float,
    biases: bool,
    l2: float,
    alpha: float,
    damping: float,
    steps: int,
    stop: Tensor,
) -> tuple[Tensor, Tensor]:
    """`glm_neumann_solve` for a multilayer perceptron, its arguments as in `mlp_hvp`."""
    model = weights, hidden, slopes, bends, deltas, probabilities
    return neumann_series(lambda v: mlp_hvp(*model, v, scale, biases, l2), b, alpha, damping, steps, stop)


def mlp_cg_solve(
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    deltas: Sequence[Tensor],
    probabilities: Tensor | None,
    b: Tensor,
    scale: float,
    biases: bool,
    l2: float,
    damping: float,
    steps: int,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`glm_cg_solve` for a multilayer perceptron, its arguments as in `mlp_hvp`."""
    model = weights, hidden, slopes, bends, deltas, probabilities
    return conjugate_gradients(lambda p: mlp_hvp(*model, p, scale, biases, l2), b, damping, steps, state)


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pointwise part of an LSTM step: ``c' = f c + i g``, ``h' = o tanh(c')``.

    ``gates`` is ``(rows, 4 units)``: what sigmoid turns into i and f, tanh into g, sigmoid into o; ``c`` is
    ``(rows, units)``.

    Returns:
        ``h'``, ``c'``, and the activations ``(i, f, g, o)``, like ``gates``.
    """
    exact = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = gates.to(exact).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_next = f * c + i * g
    activations = torch.cat([i, f, g, o], -1)
    return (o * c_next.tanh()).to(c.dtype), c_next.to(c.dtype), activations.to(c.dtype)


def lstm_cell_backward(
    activations: Tensor,
    c: Tensor,
    c_next: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    grad_activations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients by ``gates`` and ``c`` of `lstm_cell`, from those by ``h'``, ``c'`` and the activations."""
    exact = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = activations.to(exact).chunk(4, -1)
    t, grad_h = c_next.to(exact).tanh(), grad_h.to(exact)
    d = grad_c + grad_h * o * (1 - t * t)  # what reaches c' both ways
    grad = torch.cat([d * g, d * c, d * i, grad_h * t], -1)
    if grad_activations is not None:
        grad = grad + grad_activations
    slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
    return (grad * slopes).to(c.dtype), (d * f).to(c.dtype)


def lstm_cell_double_backward(
    activations: Tensor, c: Tensor, c_next: Tensor, grad_h: Tensor, grad_c: Tensor, v_gates: Tensor, v_c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``<(v_gates, v_c), lstm_cell_backward(...)>`` by its first five arguments.

    The last two, those by ``grad_h`` and ``grad_c``, are how much ``h'`` and ``c'`` change when ``gates`` and ``c``
    change by the vectors.

    Returns:
        Tensors like ``activations``, ``c``, ``c_next``, ``grad_h`` and ``grad_c``.
    """
    exact = torch.promote_types(c.dtype, torch.float32)
    i, f, g, o = activations.to(exact).chunk(4, -1)
    v_i, v_f, v_g, v_o = v_gates.to(exact).chunk(4, -1)
    t, grad_h, v_c = c_next.to(exact).tanh(), grad_h.to(exact), v_c.to(exact)
    d = grad_c + grad_h * o * (1 - t * t)
    w_i, w_f, w_g, w_o = v_i * i * (1 - i), v_f * f * (1 - f), v_g * (1 - g * g), v_o * o * (1 - o)
    by_d = g * w_i + c * w_f + i * w_g + f * v_c
    by_activations = torch.cat(
        [
            d * g * v_i * (1 - 2 * i) + d * w_g,
            d * c * v_f * (1 - 2 * f) + d * v_c,
            d * w_i - 2 * g * d * i * v_g,
            grad_h * t * v_o * (1 - 2 * o) + by_d * grad_h * (1 - t * t),
        ],
        -1,
    )
    by_c_next = (grad_h * w_o - 2 * t * grad_h * o * by_d) * (1 - t * t)
    by_grad_h = by_d * o * (1 - t * t) + t * w_o
    out = by_activations, d * w_f, by_c_next, by_grad_h, by_d
    return tuple(x.to(c.dtype) for x in out)  # type: ignore[return-value]


def lstm_layer(
    x_gates: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor, *, cell: Callable = lstm_cell
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of an LSTM layer: `lstm_cell` of ``x_gates[t] + h[t - 1] W^T`` for every step t.

    ``x_gates`` is ``(steps, batch, 4 units)``, the inputs' part of the gates with all biases; ``w_hh`` is
    ``(4 units, units)``; ``h0`` and ``c0`` are ``(batch, units)``. ``cell`` computes the pointwise part.

    Returns:
        ``h`` and ``c`` of every step, ``(steps, batch, units)``, and the activations, like ``x_gates``.
    """
    h, c, steps = h0, c0, []
    for x in x_gates:
        h, c, activations = cell(torch.addmm(x, h, w_hh.T), c)
        steps.append((h, c, activations))
    return tuple(torch.stack(each) for each in zip(*steps, strict=True))  # type: ignore[return-value]


def lstm_layer_backward(
    activations: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    grad_h: Tensor,
    grad_c: Tensor | None = None,
    grad_activations: Tensor | None = None,
    *,
    cell: Callable = lstm_cell_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by ``x_gates`` and ``c0`` of `lstm_layer`, from those by ``h``, ``c`` and the activations.

    That by ``w_hh`` is ``sum_t grad_gates[t]^T h[t - 1]``, that by ``h0`` is ``grad_gates[0] W``.

    Returns:
        Both, and all that reaches ``h`` and ``c`` of every step, also through later steps.
    """
    steps: list[tuple[Tensor, ...]] = []
    d_c = torch.zeros_like(c0)
    for t in reversed(range(len(c))):
        d_h = torch.addmm(grad_h[t], steps[0][0], w_hh) if steps else grad_h[t]
        d_c = d_c if grad_c is None else d_c + grad_c[t]
        more = None if grad_activations is None else grad_activations[t]
        grad_gates, d_c_before = cell(activations[t], c[t - 1] if t else c0, c[t], d_h, d_c, more)
        steps.insert(0, (grad_gates, d_h, d_c))
        d_c = d_c_before
    all_gates, all_h, all_c = (torch.stack(each) for each in zip(*steps, strict=True))
    return all_gates, d_c, all_h, all_c


def lstm_layer_double_backward(
    activations: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    dh: Tensor,
    dc: Tensor,
    v_gates: Tensor,
    v_h0: Tensor,
    v_c0: Tensor,
    *,
    cell: Callable = lstm_cell_double_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``<v_gates, grad_gates> + <v_h0, grad_gates[0] W> + <v_c0, grad_c0>`` of `lstm_layer_backward`.

    ``dh`` and ``dc`` are the last two that it returned.

    Returns:
        The gradients by its ``activations``, ``c``, ``c0``, ``grad_h`` and ``grad_c``. With the next to last, r,
        the gradient by ``w_hh`` is ``grad_gates[0]^T v_h0 + sum_t grad_gates[t]^T r[t - 1]``.
    """
    steps: list[tuple[Tensor, ...]] = []
    v_h, v_c = v_h0, v_c0
    for t in range(len(c)):
        v = torch.addmm(v_gates[t], v_h, w_hh.T)
        steps.append(cell(activations[t], c[t - 1] if t else c0, c[t], dh[t], dc[t], v, v_c))
        _, _, _, v_h, v_c = steps[-1]
    by_activations, by_c_before, by_c_after, by_grad_h, by_grad_c = (torch.stack(s) for s in zip(*steps, strict=True))
    by_c = torch.cat([by_c_after[:-1] + by_c_before[1:], by_c_after[-1:]])
    return by_activations, by_c, by_c_before[0], by_grad_h, by_grad_c
