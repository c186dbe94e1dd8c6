"""What a fitted density says about itself: whether to trust it, and what of the data to look at."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from flowvi import plotting
from flowvi.supports import Interval

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

#: A column is tied if fewer of its numbers than this part are different ones.
LEAST_DIFFERENT = 0.5

#: One held-out row is worth telling of if it moves the mean score by so many nats.
MUCH = 0.25

#: Training and held-out rows part ways by so many nats, and so many standard errors.
PARTED, ERRORS = 0.5, 5.0

#: Numbers pile up at a bound if they are this part of a column, and so many.
PILED, LEAST_PILED = 0.01, 4

#: The least eigenvalue of a correlation matrix that is no dependence of columns.
DEPENDENT = 1e-9

#: Columns that a message names.
MOST_COLUMNS = 5


class DensityWarning(UserWarning):
    """A density that should be looked at before it is used."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How the marginals of a density meet rows that it was not fitted to.

    Attributes:
        pit: the probability integral transforms P(X_ij <= x_ij | context_i), of shape [n, D]:
            uniform on (0, 1) where the marginal of a column is right.
        distance: of each column, the largest distance of their distribution to the uniform one,
            the statistic of Kolmogorov and Smirnov.
        p_value: of each column, that of this distance.

    Source: Dawid, "Statistical Theory: The Prequential Approach", 1984; Gneiting, Balabdaoui,
    Raftery, "Probabilistic Forecasts, Calibration and Sharpness", 2007.
    """

    pit: np.ndarray = dataclasses.field(repr=False)
    distance: np.ndarray
    p_value: np.ndarray

    def plot(self, names: Sequence[str] | None = None) -> "Figure":
        """A picture: for each column how far its distribution is from the uniform one."""
        return plotting.calibration(self.pit, names=names)


def calibration(x: np.ndarray, draws: np.ndarray, seed: int) -> Calibration:
    """The calibration of rows [n, D] among draws [m, D], or draws [m, n, D] of each row's own."""
    if draws.ndim == x.ndim:
        ordered = np.sort(draws, 0)
        columns = list(zip(ordered.T, x.T, strict=True))
        below = np.stack([np.searchsorted(d, v, "left") for d, v in columns], 1)
        upto = np.stack([np.searchsorted(d, v, "right") for d, v in columns], 1)
    else:
        below, upto = (draws < x).sum(0), (draws <= x).sum(0)
    # Between two draws, or among equal ones, any place is as good: a uniform one keeps it uniform.
    uniform = np.random.default_rng(seed).uniform(size=x.shape)
    pit = (below + uniform * (upto - below + 1)) / (len(draws) + 1)
    tests = [stats.kstest(column, "uniform") for column in pit.T]
    return Calibration(
        pit, np.array([t.statistic for t in tests]), np.array([t.pvalue for t in tests])
    )


def about_columns(x: np.ndarray, support: Interval) -> list[str]:
    """What of the columns makes a density doubtful, or another support worth a thought."""
    messages = []
    tied = {i: len(np.unique(column)) for i, column in enumerate(x.T)}
    tied = {i: count for i, count in tied.items() if count < LEAST_DIFFERENT * len(x)}
    if tied:
        listed = [f"column {i} holds {count} different numbers" for i, count in tied.items()]
        messages.append(
            f"{_several(listed)} in {len(x)} rows: of numbers that repeat a density has no "
            "meaning, and its score no bound. Perhaps add uniform noise of the size of their "
            "rounding, give a column with few values as `context`, or leave it out?"
        )
    lower, upper = support.bounds()
    ends = {"smallest": (x.min(0), lower), "largest": (x.max(0), upper)}
    for name, (end, bound) in ends.items():
        many = np.flatnonzero((x == end).sum(0) >= max(PILED * len(x), LEAST_PILED))
        piled = [i for i in many if i not in tied or np.isfinite(bound[i])]
        if piled:
            shares = [f"{(x[:, i] == end[i]).mean():.0%} of column {i}" for i in piled]
            messages.append(
                f"{_several(shares)} equal their {name} number: they pile up at a bound, where a "
                "density has no value. Perhaps model these rows apart?"
            )
    if x.shape[1] > 1 and len(x) > x.shape[1]:
        correlation = np.corrcoef(x.T)
        if np.linalg.eigvalsh(correlation)[0] < DEPENDENT:
            messages.append(
                "A column is a linear function of others: the rows lie in a plane, in which a "
                "density has no bound. Perhaps leave that column out?"
            )
    least, few, most = np.quantile(x, [0, 0.01, 0.75], 0)
    # The rows do not thin out towards their smallest number, which is close to zero.
    near = (least > 0) & (least < 0.1 * most) & (few - least < 0.1 * most) & ~np.isfinite(lower)
    if near.any():
        listed = [f"column {i}" for i in np.flatnonzero(near)]
        messages.append(
            f"{_several(listed)}: no number is below zero, and many are near it. Perhaps "
            '`support="positive"`, so that draws stay above?'
        )
    return messages


def about_scores(
    held_out: np.ndarray, numbers: np.ndarray, training: np.ndarray | None
) -> list[str]:
    """What held-out scores of rows of these numbers say, beside scores of training rows."""
    messages = []
    mean, error = held_out.mean(), held_out.std() / np.sqrt(len(held_out))
    worst = int(np.argmin(held_out))
    without = (held_out.sum() - held_out[worst]) / max(len(held_out) - 1, 1)
    if without - mean > MUCH and len(held_out) > 1:
        messages.append(
            f"Row {numbers[worst]} alone lowers the held-out score by {without - mean:.3g} nats to "
            f"{mean:.6g}: its log density is {held_out[worst]:.3g}. Perhaps look at that row?"
        )
    elif training is not None:
        gap = training.mean() - mean
        if gap > PARTED and gap > ERRORS * error:
            messages.append(
                f"Training rows score {gap:.3g} nats above held-out ones ({mean:.6g} +- "
                f"{error:.2g}): the density follows the rows that it saw. Perhaps more rows, or a "
                "smaller flow?"
            )
    return messages


def _several(listed: Sequence[str]) -> str:
    words = ", ".join(listed[:MOST_COLUMNS])
    more = len(listed) - MOST_COLUMNS
    words = f"{words} and {more} more" if more > 0 else words
    return words[:1].upper() + words[1:]
