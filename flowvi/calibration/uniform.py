"""Whether numbers are uniform: bands, p-values and what their spread says."""

import dataclasses
import functools

import numpy as np
from scipy import stats

from flowvi.diagnostics import Estimate

#: Places at which distribution functions are compared, and sets of uniform numbers behind a band.
PLACES, NUM_SETS = 100, 2_000

#: The probability that a band holds the curves of all columns together.
LEVEL = 0.95


@dataclasses.dataclass(frozen=True, eq=False)
class Uniformity:
    """Numbers that are uniform on (0, 1) where a posterior is right.

    Attributes:
        values: of shape [n, columns].
        spread: 12 E (value - 1/2)^2 - 1, over all columns: 0 of uniform numbers, positive where
            they crowd at the ends, as they do where a posterior is too narrow.
        p_value: of the largest departure of any column from uniform numbers.
    """

    values: np.ndarray = dataclasses.field(repr=False)
    spread: Estimate
    p_value: float

    @property
    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(places, lower, upper): where the distribution functions of all columns lie together.

        With probability 0.95, where the numbers are uniform.
        """
        return band(*self.values.shape)


def uniformity(values: np.ndarray) -> Uniformity:
    """What numbers of shape [n, columns] say of being uniform."""
    num_rows, num_columns = values.shape
    each = np.array([_extremity(column, num_rows) for column in values.T])
    null = _null(num_rows)
    single = (1 + np.searchsorted(null, each.min(), "right")) / (1 + len(null))
    p_value = 1 - (1 - single) ** num_columns
    squares = 12 * ((values - 0.5) ** 2).mean(1) - 1
    # Of one column the error of uniform numbers is known; of several, their own correlation counts.
    error = np.sqrt(0.8 / num_rows) if num_columns == 1 else squares.std() / np.sqrt(num_rows)
    return Uniformity(values, Estimate(float(squares.mean()), float(error)), float(p_value))


def band(num_rows: int, num_columns: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places, lower, upper) of distribution functions of uniform numbers, all at once.

    Source: Saeilynoja, Buerkner, Vehtari, "Graphical Test for Discrete Uniformity and Its
    Applications in Goodness-of-Fit Evaluation and Multiple Sample Comparison", 2022.
    """
    missed = 1 - LEVEL ** (1 / num_columns)
    gamma = np.quantile(_null(num_rows), missed)
    places = _places()
    lower, upper = stats.binom.ppf([[gamma / 2], [1 - gamma / 2]], num_rows, places)
    return places, lower / num_rows, upper / num_rows


def _places() -> np.ndarray:
    return np.arange(1, PLACES) / PLACES


def _extremity(column: np.ndarray, num_rows: int) -> float:
    """The least two-sided probability, at any place, of so many numbers below it."""
    counts = np.searchsorted(np.sort(column), _places(), "right")
    return float(_probabilities(counts, num_rows).min())


def _probabilities(counts: np.ndarray, num_rows: int) -> np.ndarray:
    places = _places()
    below = stats.binom.cdf(counts, num_rows, places)
    above = stats.binom.sf(counts - 1, num_rows, places)
    return 2 * np.minimum(below, above)


@functools.lru_cache(maxsize=32)
def _null(num_rows: int) -> np.ndarray:
    """The extremities of sets of uniform numbers, in order of size."""
    rng = np.random.default_rng(0)
    parts = rng.multinomial(num_rows, np.full(PLACES, 1 / PLACES), NUM_SETS)
    counts = np.cumsum(parts, 1)[:, :-1]
    return np.sort(_probabilities(counts, num_rows).min(1))
