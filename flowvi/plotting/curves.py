"""The history of a fit, and what all pictures share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Points of a curve, to which the steps of a long fit are averaged, and panels of a picture.
POINTS, MOST_PANELS = 200, 4

LIGHT, DARK = "#8fb3d9", "#1f4e79"


class HasHistory(Protocol):
    """What a fit returned."""

    @property
    def history(self) -> Mapping[str, ArrayLike]: ...


def pyplot() -> Any:
    """Matplotlib, imported when a picture is drawn."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        fix = "Perhaps install it with `pip install flowvi[plot]`?"
        raise ImportError(f"Pictures need matplotlib. {fix}") from error
    return plt


def panels(width: float, height: float, num_rows: int = 1, num_columns: int = 1) -> Any:
    """(figure, array of axes), each of so many inches."""
    size = (width * num_columns, height * num_rows)
    return pyplot().subplots(
        num_rows, num_columns, figsize=size, squeeze=False, layout="constrained"
    )


def curves(fit: HasHistory) -> "Figure":
    """Loss and metrics of any fit, step by step, those of validation data where there are any.

    Of a latent-variable model, the ELBO takes the place of the loss.

    Args:
        fit: what `fit`, `fit_density`, `fit_posterior` or `fit_vae` returned. Curves of training
            are averaged to 200 points; metrics beyond the third are left out.
    """
    history = {name: np.asarray(values) for name, values in fit.history.items()}
    steps = history.pop("validation_step", None)
    is_model = {"distortion", "validation_distortion"} & set(history)
    # (of training, of validation, title, sign)
    shown = [("loss", "validation", "ELBO in nats" if is_model else "loss", -1 if is_model else 1)]
    for name in dict.fromkeys(name.removeprefix("validation_") for name in history):
        both = (history.get(part, np.zeros(1)) for part in (name, f"validation_{name}"))
        # Where draws are never skipped there is nothing to see.
        if name not in ("loss", "validation", "log_likelihood") and any(map(np.any, both)):
            unit = " in nats" if name in ("distortion", "rate") else ""
            shown.append((name, f"validation_{name}", name + unit, 1))
    shown = shown[:MOST_PANELS]
    figure, axes = panels(3.4, 2.8, 1, len(shown))
    for axis, (training, validation, title, sign) in zip(axes[0], shown, strict=True):
        if training in history:
            at, means = _averaged(history[training])
            axis.plot(at, sign * means, color=LIGHT, linewidth=1, label="training")
        if validation in history:
            values = sign * history[validation]
            axis.plot(steps, values, color=DARK, linewidth=1.5, label="validation")
        if validation == "validation" and "validation_log_likelihood" in history:
            values = history["validation_log_likelihood"]
            style = {"color": DARK, "linestyle": "dotted", "label": "validation, log p(x)"}
            axis.plot(steps, values, **style)
        # How bad it was at the very beginning would flatten all the rest.
        lines = [np.asarray(line.get_ydata(), float) for line in axis.get_lines()]
        late = np.concatenate([line[len(line) // 20 :] for line in lines] or [np.zeros(1)])
        if len(late := late[np.isfinite(late)]):
            margin = 0.06 * np.ptp(late) or 1.0
            axis.set_ylim(late.min() - margin, late.max() + margin)
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    if len(axes[0, 0].get_lines()) > 1:
        axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _averaged(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means) of equal parts."""
    width = max(len(values) // POINTS, 1)
    parts = values[: len(values) // width * width].reshape(-1, width)
    good = np.isfinite(parts)
    count = good.sum(1)
    total = np.where(good, parts, 0).sum(1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return (np.arange(len(means)) + 0.5) * width, means
