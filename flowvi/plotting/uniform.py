"""Pictures of numbers that should be uniform."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowvi.plotting.curves import DARK, LIGHT, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Band = tuple[np.ndarray, np.ndarray, np.ndarray]

#: Curves that have a name in a legend.
MOST_NAMED = 6


def uniformity(parts: Mapping[str, tuple[np.ndarray, Band]], labels: Sequence[str]) -> "Figure":
    """How far distribution functions are from those of uniform numbers, in bands for all at once.

    Each panel shows the part of the numbers that are at most u, less u, over u. An S that falls
    below at first and rises above later is of posteriors too wide, its mirror image of ones too
    narrow.

    Args:
        parts: {title: (numbers of shape [n, columns], (places, lower, upper))}.
        labels: names of the columns, where there are several.
    """
    figure, axes = panels(3.2, 2.8, 1, len(parts))
    for axis, (title, (values, (places, lower, upper))) in zip(axes[0], parts.items(), strict=True):
        axis.fill_between(places, lower - places, upper - places, color=LIGHT, alpha=0.4, lw=0)
        axis.axhline(0, color="black", linewidth=0.6)
        names = labels if values.shape[1] == len(labels) > 1 else [""] * values.shape[1]
        count, most = len(values), 1.5 * float(np.max(upper - places))
        colors = [DARK] if len(names) == 1 else None
        for index, (name, column) in enumerate(zip(names, values.T, strict=True)):
            place = np.concatenate([[0], np.sort(column), [1]])
            part = np.concatenate([np.arange(count + 1), [count]]) / count
            color = colors[0] if colors else f"C{index % 10}"
            axis.plot(place, part - place, color=color, linewidth=1.2, label=name)
            most = max(most, 1.1 * float(np.abs(part - place).max()))
        if 1 < len(names) <= MOST_NAMED:
            axis.legend(frameon=False, fontsize=7)
        axis.set(title=title, xlim=(0, 1), ylim=(-most, most), xlabel="u")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("P(value <= u) - u")
    return figure


def null_test(statistic: float, null: np.ndarray) -> "Figure":
    """A statistic, as a line, over a histogram of what it is where there is nothing to find."""
    figure, ((axis,),) = panels(4.0, 2.6)
    axis.hist(null, bins=max(10, len(null) // 4), color=LIGHT)
    axis.axvline(statistic, color=DARK, linewidth=1.5)
    axis.set(xlabel="statistic", yticks=[])
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure
