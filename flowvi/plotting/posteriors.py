"""Pictures of posteriors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowvi.plotting.tools import bare, pyplot

#: Coordinates in one picture, unless asked for.
MOST = 8


def _columns(
    posterior: Any, key: Any, num_samples: int, names: Sequence[str] | None, most: int
) -> tuple[list[str], np.ndarray]:
    """Labels, and draws of shape [num_samples, number of labels]."""
    values = posterior.sample(key, num_samples)
    leaves = values.values() if isinstance(values, dict) else [values]
    table = np.concatenate([np.asarray(leaf).reshape(num_samples, -1) for leaf in leaves], 1)
    labels = posterior.target.labels()
    if names is None:
        chosen = list(range(min(most, len(labels))))
    else:
        chosen = [
            index
            for name in names
            for index, label in enumerate(labels)
            if label == name or label.startswith(f"{name}[")
        ]
        for name in names:
            if not any(label == name or label.startswith(f"{name}[") for label in labels):
                raise ValueError(
                    f"`names` must be among {', '.join(labels[:MOST])}, ...; got {name!r}."
                )
    return [labels[index] for index in chosen], table[:, chosen]


def _range(column: np.ndarray) -> tuple[float, float]:
    """Where nearly all draws are: a heavy tail would squeeze the rest into one bin."""
    low, high = np.quantile(column, [0.002, 0.998])
    return (low, high) if high > low else (low - 1, high + 1)


def marginals(
    posterior: Any,
    key: Any,
    *,
    names: Sequence[str] | None = None,
    num_samples: int = 10_000,
    reference: Any = None,
) -> Any:
    """Histograms of the marginal posteriors, in the user's names.

    Args:
        posterior: a `Posterior`.
        key: a random key.
        names: parameters to draw; by default the first 8 coordinates.
        num_samples: draws.
        reference: an array [num_reference, number of labels drawn] of draws to compare with, or
            None; its outlines are drawn on top.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if a name is unknown.
    """
    plt = pyplot()
    labels, table = _columns(posterior, key, num_samples, names, MOST)
    width = min(len(labels), 4)
    height = -(-len(labels) // width)
    figure, axes = plt.subplots(
        height, width, figsize=(2.6 * width, 2.0 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for index, (axis, label) in enumerate(zip(axes.flat, labels, strict=False)):
        span = _range(table[:, index])
        axis.hist(table[:, index], bins=60, range=span, density=True, color="#7b9fc7")
        if reference is not None:
            axis.hist(
                np.asarray(reference)[:, index],
                bins=60,
                range=span,
                density=True,
                histtype="step",
                color="black",
                linewidth=0.8,
            )
        axis.set_xlabel(label)
        bare(axis)
    return figure


def pairs(
    posterior: Any,
    key: Any,
    *,
    names: Sequence[str] | None = None,
    num_samples: int = 4_000,
    reference: Any = None,
) -> Any:
    """Scatter plots of pairs of coordinates, with the marginals on the diagonal.

    Args:
        posterior: a `Posterior`.
        key: a random key.
        names: parameters to draw; by default the first 4 coordinates.
        num_samples: draws.
        reference: an array [num_reference, number of labels drawn] of draws to compare with, or
            None; they are drawn above the diagonal.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if a name is unknown.
    """
    plt = pyplot()
    labels, table = _columns(posterior, key, num_samples, names, MOST // 2)
    size = len(labels)
    figure, axes = plt.subplots(
        size, size, figsize=(2.0 * size, 2.0 * size), squeeze=False, layout="constrained"
    )
    spans = [_range(table[:, index]) for index in range(size)]
    other = None if reference is None else np.asarray(reference)[:num_samples]
    for row in range(size):
        for column in range(size):
            axis = axes[row, column]
            if row == column:
                axis.hist(table[:, row], bins=60, range=spans[row], density=True, color="#7b9fc7")
                bare(axis)
            else:
                above = column > row
                points = other if above and other is not None else table
                if above and other is None:
                    axis.set_visible(False)
                    continue
                color = "black" if above else "#3b6ea5"
                axis.scatter(points[:, column], points[:, row], s=1, linewidths=0, color=color)
                axis.set(xlim=spans[column], ylim=spans[row])
            if row == size - 1:
                axis.set_xlabel(labels[column])
            if column == 0:
                axis.set_ylabel(labels[row])
    return figure
