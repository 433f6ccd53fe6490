"""Arguments of the steps of Richardson, Chebyshev, MINRES and preconditioned CG, for every test of an op."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad_ext import reference_minres

STEPS = ["richardson_step_", "chebyshev_step_", "minres_step_", "pcg_step_"]


def random_list(sizes: list[int], rows: int | None, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    lead = () if rows is None else (rows,)
    return [torch.randn(*lead, n, dtype=torch.float64).to(device, dtype) for n in sizes]


def arguments(
    name: str,
    sizes: list[int],
    rows: int | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64),
    device: torch.device | str = "cpu",
    *,
    preconditioned: bool = True,
    cuts: list[int] | None = None,
) -> list:
    """Arguments of the op ``name``: lists of ``sizes``, products cut at ``cuts``, scalars as they are in a solve."""
    device, (state, product) = torch.device(device), dtypes
    cuts = cuts or sizes

    def vectors(count: int) -> list[list[Tensor]]:
        return [random_list(sizes, rows, state, device) for _ in range(count)]

    hv = random_list(cuts, rows, product, device)
    m = [t.abs() + 0.1 for t in random_list(sizes, None, state, device)] if preconditioned else []
    lead = () if rows is None else (rows,)
    if name in ("richardson_step_", "chebyshev_step_"):
        stats = torch.full((*lead, 3), float("nan"), dtype=torch.float64, device=device)
        if name == "richardson_step_":
            x, b = vectors(2)
            return [x, hv, b, m, stats, 0.3, 0.7]
        x_old, x, b = vectors(3)
        return [x_old, x, hv, b, m, stats, 0.3, 0.6, 0.7]
    ones = torch.ones(lead, dtype=torch.float64, device=device)
    if name == "minres_step_":
        scalars = reference_minres.start(3 * ones, 1e-9 * ones, 2 * ones)
        # As in the middle of a solve: every factor of the vector pass takes part.
        for column, value in {
            "step": 0.4,
            "beta": 1.3,
            "cosine": 0.6,
            "sine": 0.8,
            "delta_bar": 0.5,
            "epsilon": 0.2,
        }.items():
            scalars[..., reference_minres.COLUMNS.index(column)] = value
        return [*vectors(5), hv, scalars, 0.7]
    x, r, p = vectors(3)
    # Positive curvature: the product is 2 p, and noise, cut at other places.
    flat = torch.cat([t.reshape(*lead, -1) for t in p], dim=-1) if p else torch.zeros(*lead, 0)
    hp = [(2 * t.to(state) + 0.1 * torch.randn_like(t, dtype=state)).to(product) for t in flat.split(cuts, dim=-1)]
    scalars = torch.stack([3 * ones, 1e-9 * ones, 0 * ones, 0 * ones, 2 * ones], dim=-1)
    m = m or [torch.ones(n, dtype=state, device=device) for n in sizes]
    return [x, r, p, hp, m, scalars, 0.5]
