"""MINRES in plain torch: the recurrences of Paige and Saunders for all rows at once.

A Lanczos vector is stored as ``v``, which is ``norm`` times as long, a direction as ``w``, ``gamma`` times as
long: so no vector has to be rewritten when its length is known, and ``x`` advances one step late.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad_ext.reference import _check_contiguous, aligned

COLUMNS = (
    "residual", "stop", "flag", "step", "scale", "norm", "norm_old", "beta", "cosine", "sine", "delta_bar",
    "gamma_bar", "epsilon", "gamma", "gamma_old", "operator_norm",
)  # fmt: skip
"""Columns of the state, as in csrc/minres.h."""
RUNNING, CONVERGED, BROKEN, SINGULAR = 0.0, 1.0, 3.0, 4.0


def start(norm: Tensor, stop: Tensor, scale: Tensor) -> Tensor:
    """The state of a solve from ``x = 0``, for ``v`` the right-hand side, ``v_old``, ``w`` and ``w_old`` zero.

    Args:
        norm: Norm of the right-hand side, ``()`` or ``(k,)``, float64.
        stop: Norm of the residual at which to stop, likewise.
        scale: A positive number of the order of ``||H v|| / ||v||``, likewise.

    Returns:
        Shape ``(16,)`` or ``(k, 16)``.
    """
    first = {"residual": norm, "stop": stop, "flag": (norm <= stop).double(), "scale": scale, "norm": norm}
    ones, zeros = torch.ones_like(norm), torch.zeros_like(norm)
    first |= {"norm_old": ones, "cosine": -ones, "gamma": ones, "gamma_old": ones}
    return torch.stack([first.get(name, zeros) for name in COLUMNS], dim=-1)


class Scalars:
    """The scalar recurrences of every row; rows that are not running keep theirs."""

    def __init__(self, state: Tensor) -> None:
        """View the columns of ``state``, ``(rows, 16)``."""
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        """A view of one column."""
        return self.state[:, COLUMNS.index(name)]

    @property
    def running(self) -> Tensor:
        """Which rows are not over."""
        return self["flag"] == RUNNING

    def set(self, where: Tensor, **columns: Tensor) -> None:
        """Write columns in the rows where ``where`` holds."""
        for name, value in columns.items():
            self[name].copy_(torch.where(where, value, self[name]))

    def lanczos(self, vhv: Tensor) -> tuple[Tensor, ...]:
        """From ``v.(H + damping I)v``, the factors of the new vectors.

        Returns:
            Factors of ``Hv``, ``v`` and ``v_old`` in the next Lanczos vector, of ``v``, ``w`` and ``w_old`` in the
            next direction, and of ``w`` in ``x``.
        """
        alpha = vhv / self["norm"] / self["norm"]
        broken = self.running & ~alpha.isfinite()
        self["flag"].masked_fill_(broken, BROKEN)
        self["step"].masked_fill_(broken, 0)
        delta = self["cosine"] * self["delta_bar"] + self["sine"] * alpha
        gamma_bar = self["sine"] * self["delta_bar"] - self["cosine"] * alpha
        self.set(self.running, gamma_bar=gamma_bar, operator_norm=torch.maximum(self["operator_norm"], alpha.abs()))
        v = 1 / self["norm"]
        return (
            v / self["scale"],
            -alpha * v / self["scale"],
            -self["beta"] / self["norm_old"] / self["scale"],
            v,
            -delta / self["gamma"],
            -self["epsilon"] / self["gamma_old"],
            self["step"].clone(),
        )

    def rotation(self, square: Tensor, eps: float) -> None:
        """From the squared norm of the new Lanczos vector, the next plane rotation and the step of ``x`` to come."""
        running = self.running
        self["step"].masked_fill_(running, 0)
        self["flag"].masked_fill_(running & ~square.isfinite(), BROKEN)
        running = self.running
        norm = square.sqrt()
        beta, gamma_bar = norm * self["scale"], self["gamma_bar"].clone()
        self.set(
            running,
            operator_norm=torch.maximum(self["operator_norm"], beta),
            delta_bar=-self["cosine"] * beta,
            epsilon=self["sine"] * beta,
        )
        # The residual before this step, times the operator, is this small only if no step makes it smaller.
        flat = torch.hypot(gamma_bar, self["delta_bar"]) <= 10 * eps * self["operator_norm"]
        self["flag"].masked_fill_(running & flat, SINGULAR)
        running = self.running
        gamma = torch.hypot(gamma_bar, beta)
        cosine, sine = gamma_bar / gamma, beta / gamma
        self.set(
            running,
            cosine=cosine,
            sine=sine,
            step=cosine * self["residual"] / gamma,
            residual=sine * self["residual"],
            gamma_old=self["gamma"].clone(),
            gamma=gamma,
            norm_old=self["norm"].clone(),
            norm=norm,
            beta=beta,
        )
        self["flag"].masked_fill_(running & (self["residual"] <= self["stop"]), CONVERGED)


def minres_step_(
    x: Sequence[Tensor],
    v: Sequence[Tensor],
    v_old: Sequence[Tensor],
    w: Sequence[Tensor],
    w_old: Sequence[Tensor],
    hv: Sequence[Tensor],
    state: Tensor,
    damping: float = 0.0,
) -> None:
    """One iteration of MINRES on ``(H + damping I) x = b``, given ``hv = H v``; `start` makes the first state.

    Writes the next Lanczos vector over ``v_old`` and the next direction over ``w_old``: swap the pairs before the
    next call. Until a row stops, its ``x`` is ``step`` times the newest direction behind. A row whose flag is set
    is left alone: 1 converged, 3 not finite, 4 singular (the residual is as small as it gets).
    """
    _check_contiguous(x=x, v_old=v_old, w_old=w_old)
    rows = state.shape[0] if state.dim() == 2 else 1
    scalars = Scalars(state.view(rows, len(COLUMNS)))
    pieces = [
        (x_i, v_i, v_old_i, w_i, w_old_i, hv_i.to(v_i.dtype) + damping * v_i)
        for x_i, v_i, v_old_i, w_i, w_old_i, hv_i in aligned(rows, x, v, v_old, w, w_old, hv)
    ]

    def dot(a: int, b: int) -> Tensor:
        products = [(piece[a].double() * piece[b].double()).sum(1) for piece in pieces]
        return sum(products, state.new_zeros(rows))

    factors = scalars.lanczos(dot(1, 5))
    keep = scalars.running[:, None]
    for x_i, v_i, v_old_i, w_i, w_old_i, hv_i in pieces:
        by_hv, by_v, by_v_old, direction, by_w, by_w_old, step = (f.to(x_i.dtype)[:, None] for f in factors)
        x_i.copy_(torch.where(keep, x_i + step * w_i, x_i))
        w_old_i.copy_(torch.where(keep, direction * v_i + by_w * w_i + by_w_old * w_old_i, w_old_i))
        v_old_i.copy_(torch.where(keep, by_hv * hv_i + by_v * v_i + by_v_old * v_old_i, v_old_i))
    scalars.rotation(dot(2, 2), torch.finfo(x[0].dtype).eps if pieces else 0.0)
    closing = ~scalars.running & (scalars["step"] != 0)
    for x_i, _, _, _, w_new_i, _ in pieces:
        step = scalars["step"].to(x_i.dtype)[:, None]
        x_i.copy_(torch.where(closing[:, None], x_i + step * w_new_i, x_i))
    scalars["step"].masked_fill_(closing, 0)
