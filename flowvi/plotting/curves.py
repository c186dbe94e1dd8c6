"""The history of a fit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a curve, to which the steps of a long fit are averaged, and panels of a picture.
POINTS, MOST_PANELS = 200, 4

LIGHT, DARK = "#8fb3d9", "#1f4e79"


class HasHistory(Protocol):
    """What a fit returned."""

    @property
    def history(self) -> Mapping[str, ArrayLike]: ...


def pyplot() -> Any:
    """Matplotlib, imported when a picture is drawn.

    Raises:
        ImportError: if it is missing; it says what to install.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib. Perhaps install it with `pip install flowvi[plot]`?"
        ) from error
    return plt


def curves(fit: HasHistory) -> "Figure":
    """Loss and metrics of any fit, step by step, those of validation data where there are any.

    Of a latent-variable model, the ELBO takes the place of the loss.

    Args:
        fit: what `fit`, `fit_density`, `fit_posterior` or `fit_vae` returned. Curves of training
            are averaged to 200 points; metrics beyond the third are left out.
    """
    plt = pyplot()
    history = {name: np.asarray(values) for name, values in fit.history.items()}
    steps = history.pop("validation_step", None)
    is_model = {"distortion", "validation_distortion"} & set(history)
    # (of training, of validation, title, sign)
    panels = [("loss", "validation", "ELBO in nats" if is_model else "loss", -1 if is_model else 1)]
    names = dict.fromkeys(name.removeprefix("validation_") for name in history)
    for name in names:
        # Where draws are never skipped there is nothing to see.
        shown = (history.get(part, np.zeros(1)) for part in (name, f"validation_{name}"))
        if name not in ("loss", "validation", "log_likelihood") and any(map(np.any, shown)):
            unit = " in nats" if name in ("distortion", "rate") else ""
            panels.append((name, f"validation_{name}", name + unit, 1))
    panels = panels[:MOST_PANELS]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 2.8), squeeze=False, layout="constrained"
    )
    for axis, (training, validation, title, sign) in zip(axes[0], panels, strict=True):
        if training in history:
            at, means = _averaged(history[training])
            axis.plot(at, sign * means, color=LIGHT, linewidth=1, label="training")
        if validation in history:
            values = sign * history[validation]
            axis.plot(steps, values, color=DARK, linewidth=1.5, label="validation")
        if validation == "validation" and "validation_log_likelihood" in history:
            values = history["validation_log_likelihood"]
            label = "validation, log p(x)"
            axis.plot(steps, values, color=DARK, linestyle="dotted", label=label)
        _limit_to_late(axis)
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    if len(axes[0, 0].get_lines()) > 1:
        axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _averaged(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means) of equal parts."""
    width = max(len(values) // POINTS, 1)
    whole = len(values) // width * width
    parts = values[:whole].reshape(-1, width)
    good = np.isfinite(parts)
    count = good.sum(1)
    total = np.where(good, parts, 0).sum(1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return (np.arange(len(means)) + 0.5) * width, means


def _limit_to_late(axis: "Axes") -> None:
    """Leaves out how bad it was at the very beginning, which would flatten all the rest."""
    lines = [np.asarray(line.get_ydata(), float) for line in axis.get_lines()]
    values = np.concatenate([line[len(line) // 20 :] for line in lines] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.06 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)
