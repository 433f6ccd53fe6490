"""Figures without a window or global state: labelled axes, seeds as bands, and a line that says what to see."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor


def figure(columns: int, caption: str, *, rows: int = 1, width: float = 5.0, height: float = 3.8) -> Figure:
    """An empty figure for ``rows x columns`` panels with a caption below: fill it by ``subplots``."""
    lines = textwrap.wrap(caption, int(columns * width * 12))
    figure = Figure(figsize=(columns * width, rows * height + 0.25 * len(lines)), layout="constrained")
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9.5)
    return figure


def seeds(count: int) -> str:
    """What a caption says of the seeds that `band` draws."""
    return "1 seed" if count == 1 else f"{count} seeds (line: median, band: least to largest)"


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis of few decades by plain numbers: 0.5, 1, 2."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    if decades < 0.15:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif decades < 3:
        steps = (1.0, 2.0, 5.0) if decades >= 0.7 else tuple(range(1, 10))
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def band(axis: Axes, x: Sequence[float], seeds: np.ndarray, label: str, **style: object) -> None:
    """The median over seeds, and the range from the least to the largest as a band.

    Args:
        axis: Where.
        x: Abscissa, one per column.
        seeds: ``(seeds, points)``; NaN where a seed has no point.
        label: For the legend.
        style: For the line.
    """
    seeds = np.atleast_2d(np.asarray(seeds, dtype=float))
    there = ~np.isnan(seeds).all(0)
    x, seeds = np.asarray(x, dtype=float)[there], seeds[:, there]
    (line,) = axis.plot(x, np.nanmedian(seeds, 0), label=label, **style)
    if len(seeds) > 1:
        axis.fill_between(x, np.nanmin(seeds, 0), np.nanmax(seeds, 0), color=line.get_color(), alpha=0.2, linewidth=0)


def pictures(
    figure: Figure,
    grid: Sequence[Sequence[Tensor]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    shared: bool = True,
) -> None:
    """A grid of images ``(channels, height, width)``.

    Args:
        figure: Where.
        grid: The images, row by row.
        rows: A title per row.
        columns: A title per column.
        shared: Whether the images of a row share their scale of grey; else each has its own.
    """
    axes = figure.subplots(len(grid), len(columns), squeeze=False)
    for images, title, line in zip(grid, rows, axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            scale = images if shared else [image]
            low, high = min(float(i.min()) for i in scale), max(float(i.max()) for i in scale)
            shown = ((image - low) / max(high - low, 1e-12)).permute(1, 2, 0).numpy()
            axis.imshow(shown.squeeze(-1) if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, fontsize=9)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
