"""The two figures, without a window or global state."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hypergrad_ext.demo.data import CLASSES
from hypergrad_ext.demo.distil import Distillation
from hypergrad_ext.demo.penalties import Tuning

_SIDE = 8


def curves(tuning: Tuning, distillation: Distillation) -> Figure:
    """How tuning and distillation went: three panels over outer steps."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _tuning(left, tuning)
    _distillation_loss(middle, distillation)
    _distillation_accuracy(right, distillation)
    return figure


def distilled(result: Distillation) -> Figure:
    """The ten distilled images below the class means."""
    figure = Figure(figsize=(12, 3.3), layout="constrained")
    figure.suptitle(
        f"Ten images distilled from {result.sizes[0]}: training on these ten alone gives {result.accuracy:.1%} test "
        f"accuracy (class means: {result.mean:.1%})"
    )
    axes = figure.subplots(2, CLASSES)
    limit = float(result.images.abs().max())
    for label in range(CLASSES):
        above, below = axes[0, label], axes[1, label]
        above.imshow(result.means[label].view(_SIDE, _SIDE), cmap="gray", vmin=0, vmax=1)
        shown = below.imshow(result.images[label].view(_SIDE, _SIDE), cmap="RdBu_r", vmin=-limit, vmax=limit)
        below.set_title(f"distilled {label}")
        above.set_title(f"mean {label}")
        for axis in (above, below):
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(shown, ax=axes.ravel().tolist(), label="distilled pixel", shrink=0.8)
    return figure


def _tuning(axis: Axes, result: Tuning) -> None:
    axis.plot([s.loss for s in result.validation], color="C0", label="validation (tuned on)")
    axis.plot([s.loss for s in result.test], color="C1", label="test")
    axis.axhline(result.test[0].loss, color="C1", linestyle=":", label="test, best single penalty")
    axis.axhline(result.pooled.loss, color="C7", linestyle="--", label="same, trained on validation set too")
    axis.set(
        title=f"One L2 penalty per weight ({result.weights} hyperparameters)",
        xlabel="outer step",
        ylabel="cross-entropy",
        ylim=(0, 1.4 * result.test[0].loss),
    )
    axis.legend(loc="upper right", fontsize="small")


def _distillation_loss(axis: Axes, result: Distillation) -> None:
    axis.plot(result.validation, color="C0", label="validation")
    axis.set(
        title="Training on ten images: loss on all real ones",
        xlabel="outer step",
        ylabel="cross-entropy",
        ylim=(0, None),
    )
    axis.legend()


def _distillation_accuracy(axis: Axes, result: Distillation) -> None:
    axis.plot(result.retrained, color="C1", label="ten distilled images")
    axis.axhline(result.full, color="C7", linestyle="--", label=f"all {result.sizes[0]} real images")
    axis.axhline(result.mean, color="C2", linestyle="-.", label="ten class means")
    axis.axhline(sum(result.random) / len(result.random), color="C3", linestyle=":", label="ten random real images")
    axis.set(
        title="Trained from scratch on ten images",
        xlabel="outer step",
        ylabel="test accuracy",
        ylim=(0, 1),
    )
    axis.legend()
