"""Pictures of densities and posteriors: marginals and pairs of their columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

from flowvi.checks import require
from flowvi.plotting.curves import DARK, LIGHT, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = jax.Array
Span = tuple[float, float]
Names = Sequence[str] | None

#: Columns of marginals in one picture, and of pairs, unless asked for.
MOST, MOST_PAIRS = 8, 4

#: Bins of a histogram, points of a curve and, along each side, of a density in the plane.
BINS, CURVE, GRID = 60, 400, 120

#: Shares of the probability that the contours of a density in the plane hold.
SHARES = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1)


class Density(Protocol):
    """A fitted density or posterior."""

    def sample(self, key: Array, num_samples: int, /) -> Array | Mapping[str, Array]: ...
    def log_prob(self, x: ArrayLike, /) -> Array: ...


def as_table(values: ArrayLike | Mapping[str, ArrayLike]) -> np.ndarray:
    """Numbers of shape [rows, columns]."""
    leaves = list(values.values()) if isinstance(values, Mapping) else [values]
    return np.concatenate([np.asarray(x, float).reshape(len(np.asarray(x)), -1) for x in leaves], 1)


def _optional(name: str, values: ArrayLike | None, num_columns: int) -> np.ndarray:
    """The table of what is given; one without rows where nothing is."""
    table = np.empty((0, num_columns)) if values is None else as_table(values)
    got = table.shape[1]
    require(got == num_columns, f"`{name}` must have {num_columns} columns", got)
    return table


def _choose(labels: Sequence[str], names: Names, most: int) -> list[int]:
    """The columns of some names: all that are called so, or are elements of what is."""
    if names is None:
        return list(range(min(most, len(labels))))
    chosen: list[int] = []
    for name in names:
        found = [i for i, label in enumerate(labels) if f"{label}[".startswith(f"{name}[")]
        require(found, f"`names` must be among {', '.join(labels[:MOST])}, ...", name)
        chosen += found
    return chosen


def _spans(*tables: np.ndarray) -> list[Span]:
    """Where nearly all values are: a heavy tail would squeeze the rest into one bin."""
    spans = []
    for column in np.concatenate(tables).T:
        low, high = map(float, np.quantile(column[np.isfinite(column)], [0.002, 0.998]))
        margin = 0.04 * (high - low) or 1.0
        spans.append((low - margin, high + margin))
    return spans


def _histograms(axis: "Axes", span: Span, values: np.ndarray, other: np.ndarray) -> None:
    """A histogram, and the outline of another one, where they have values."""
    fewest = min(len(each) for each in (values, other) if len(each))
    bins = int(np.clip(1.5 * np.sqrt(fewest), 10, BINS))
    options: dict[str, Any] = {"bins": bins, "range": span, "density": True}
    axis.hist(values, color=LIGHT, **options)
    if len(other):
        axis.hist(other, histtype="step", color="black", linewidth=0.8, **options)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set(xlim=span, yticks=[])


def _scatter(axis: "Axes", points: np.ndarray, color: str) -> None:
    if len(points):
        size = float(np.clip(8e3 / len(points), 1.5, 4))
        x, y = points.T
        axis.scatter(x, y, s=size, linewidths=0, color=color, alpha=0.7, rasterized=True)


def _grid(labels: Sequence[str], table: np.ndarray, other: np.ndarray, over: bool) -> "Figure":
    """Marginals on the diagonal, pairs below it, and other pairs over them or else above it."""
    size = len(labels)
    inches = max(1.9, 3.0 / size)
    figure, axes = panels(inches, inches, size, size)
    spans = _spans(table, other)
    for row, column in np.ndindex(size, size):
        axis = axes[row, column]
        if row == column:
            _histograms(axis, spans[row], table[:, row], other[:, row])
        elif column > row and (over or not len(other)):
            axis.set_visible(False)
        else:
            if row > column:
                _scatter(axis, table[:, [column, row]], LIGHT if over and len(other) else DARK)
            if over or column > row:
                _scatter(axis, other[:, [column, row]], "black")
            axis.set(xlim=spans[column], ylim=spans[row])
        axis.tick_params(labelsize=7)
        axis.label_outer()
        if row == size - 1:
            axis.set_xlabel(labels[column])
        if column == 0 and row > 0:
            axis.set_ylabel(labels[row])
    return figure


def _columns(
    posterior: Density, key: Array, num_samples: int, names: Names, most: int
) -> tuple[list[str], np.ndarray]:
    labels = posterior.target.labels()  # type: ignore[attr-defined]
    chosen = _choose(labels, names, most)
    table = as_table(posterior.sample(key, num_samples))
    return [labels[index] for index in chosen], table[:, chosen]


def pairs(
    posterior: Density,
    key: Array,
    *,
    names: Names = None,
    num_samples: int = 4_000,
    reference: ArrayLike | None = None,
) -> "Figure":
    """Scatter plots of pairs of parameters, with the marginals on the diagonal.

    Args:
        posterior: a `Posterior`.
        key: a random key.
        names: parameters to draw; by default the first 4 coordinates.
        num_samples: draws.
        reference: draws to compare with, [num_reference, number of labels drawn], or None; they
            are drawn above the diagonal, and as outlines on it.
    """
    labels, table = _columns(posterior, key, num_samples, names, MOST_PAIRS)
    other = _optional("reference", reference, len(labels))[:num_samples]
    return _grid(labels, table, other, over=False)


def marginals(
    posterior: Density,
    key: Array,
    *,
    names: Names = None,
    num_samples: int = 10_000,
    reference: ArrayLike | None = None,
) -> "Figure":
    """Histograms of the marginal posteriors, in the user's names, by default of 8 coordinates.

    The arguments are those of `pairs`; the outlines of the reference are drawn on top.
    """
    labels, table = _columns(posterior, key, num_samples, names, MOST)
    other = _optional("reference", reference, len(labels))
    num_columns = min(len(labels), 4)
    figure, axes = panels(2.6, 2.0, -(-len(labels) // num_columns), num_columns)
    for index, axis in enumerate(axes.flat):
        axis.set_visible(index < len(labels))
    columns = zip(labels, _spans(table), table.T, other.T, strict=True)
    for axis, (label, span, values, others) in zip(axes.flat, columns, strict=False):
        _histograms(axis, span, values, others)
        axis.set_xlabel(label)
    return figure


def density(
    density: Density,
    x: ArrayLike | None = None,
    *,
    columns: Names = None,
    names: Names = None,
    key: Array | None = None,
    num_samples: int = 4_000,
    most: int = 6,
) -> "Figure":
    """A fitted density, and the data where they are given.

    One column is drawn as the density over a histogram of the data, two as contours that hold 99,
    90, 70, 50, 30 and 10 % of the probability, with the data over them. More than two are drawn as
    draws: marginals on the diagonal and pairs below it, data in black over draws in blue.

    Args:
        density: what has `sample(key, num_samples)` and `log_prob(x)`.
        x: data of shape [n, D], or None.
        columns: the names of all columns; by default x0, x1, ...
        names: those to draw; by default the first ones.
        key: a random key; by default always the same one.
        num_samples: draws, and rows of the data at most.
        most: columns to draw at most; a line says how many are left out.
    """
    table = as_table(density.sample(jax.random.key(0) if key is None else key, num_samples))
    size = table.shape[1]
    columns = [f"x{index}" for index in range(size)] if columns is None else list(columns)
    require(len(columns) == size, f"`columns` must have {size} columns", len(columns))
    data = _optional("x", x, size)
    if len(data) > num_samples:
        data = data[np.random.default_rng(0).choice(len(data), num_samples, replace=False)]
    chosen = _choose(columns, names, most)[:most]
    if size == 1:
        return _curve(density, columns[0], table, data)
    if size == 2 and len(chosen) == 2:
        return _contours(density, columns, table, data)
    labels = [columns[index] for index in chosen]
    figure = _grid(labels, table[:, chosen], data[:, chosen], over=True)
    if names is None and len(chosen) < size:
        figure.suptitle(f"{size - len(chosen)} more columns are left out", fontsize=9)
    return figure


def _curve(density: Density, label: str, table: np.ndarray, data: np.ndarray) -> "Figure":
    figure, ((axis,),) = panels(4.6, 3.0)
    (span,) = _spans(table, data)
    if len(data):
        _histograms(axis, span, data[:, 0], data[:0, 0])
    line = np.linspace(*span, CURVE)
    # Outside of the support of a density there is none.
    values = np.nan_to_num(np.exp(np.asarray(density.log_prob(line[:, None]), float)))
    axis.plot(line, values, color=DARK, linewidth=1.5)
    axis.set(xlim=span, ylim=(0, None), xlabel=label, yticks=[])
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _contours(
    density: Density, labels: Sequence[str], table: np.ndarray, data: np.ndarray
) -> "Figure":
    figure, ((axis,),) = panels(4.6, 4.2)
    spans = _spans(table, data)
    first, second = np.meshgrid(*(np.linspace(*span, GRID) for span in spans))
    points = np.stack([first, second], -1).reshape(-1, 2)
    values = np.asarray(density.log_prob(points), float).reshape(GRID, GRID)
    values = np.exp(np.where(np.isnan(values), -np.inf, values))
    # The level above which a share of the probability lies, by the draws.
    at_draws = np.exp(np.asarray(density.log_prob(table), float))
    levels = np.unique(np.nanquantile(at_draws, [1 - share for share in SHARES]))
    highest = max(values.max(), levels[-1]) * 1.01
    axis.contourf(first, second, values, [*levels, highest], cmap="Blues")
    _scatter(axis, data, "black")
    axis.set(xlim=spans[0], ylim=spans[1], xlabel=labels[0], ylabel=labels[1])
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def calibration(pit: ArrayLike, *, names: Names = None) -> "Figure":
    """How far probability integral transforms are from uniform ones, column by column.

    Each panel shows the part of the rows whose transform is at most u, less u, over u; and the band
    in which 99 of 100 such curves of uniform numbers stay.

    Args:
        pit: of shape [n, D], as in `flowvi.densities.Calibration`; the first 8 columns are shown.
        names: names of the columns.
    """
    table = as_table(pit)
    count = len(table)
    columns = min(table.shape[1], MOST)
    labels = [f"x[{i}]" for i in range(columns)] if names is None else list(names)[:columns]
    figure, axes = panels(2.4, 2.0, -(-columns // 4), min(columns, 4))
    for axis in axes.flat[columns:]:
        axis.set_visible(False)
    band = 1.63 / np.sqrt(count)
    for axis, label, column in zip(axes.flat, labels, table.T, strict=False):
        axis.axhspan(-band, band, color=LIGHT, alpha=0.4, linewidth=0)
        axis.axhline(0, color="black", linewidth=0.6)
        place = np.concatenate([[0], np.sort(column), [1]])
        part = np.concatenate([np.arange(count + 1), [count]]) / count
        axis.plot(place, part - place, color=DARK, linewidth=1.2)
        most = max(1.5 * band, 1.1 * np.abs(part - place).max())
        axis.set(title=label, xlim=(0, 1), ylim=(-most, most))
        axis.tick_params(labelsize=7)
    figure.supylabel("P(transform <= u) - u", fontsize=8)
    return figure
