"""Densities as scikit-learn estimators: for pipelines, cross-validation and searches.

It is imported by its name, `from flowvi.sklearn import FlowDensity`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.typing import ArrayLike
from sklearn.base import BaseEstimator, DensityMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from flowvi import checks
from flowvi.densities import Density, fit_density
from flowvi.densities.data import check_weights
from flowvi.densities.frames import Columns, Frame, library_of
from flowvi.diagnostics import mean
from flowvi.families import Family
from flowvi.supports import SupportLike

__all__ = ["ConditionalFlow", "FlowDensity"]

Rows = np.ndarray | Frame
RandomState = int | np.random.RandomState | None

#: Rows that are scored together, and those whose draws are made together. Always as many, so that
#: what is said of a row depends neither on the others nor on their number, and is compiled once.
SCORED, DRAWN = 1024, 64

#: The seed of the draws behind predictions, which are the same each time.
SEED = 0


class _Flow(BaseEstimator):
    """What both estimators share."""

    family: Family | None
    support: SupportLike
    num_steps: int | None
    validation_fraction: float
    progress: bool
    random_state: RandomState

    def _fit(self, x: Rows, context: Rows | None, weights: ArrayLike | None) -> Self:
        options: dict[str, Any] = {} if self.num_steps is None else {"num_steps": self.num_steps}
        self.density_: Density = fit_density(
            self.family,
            x,
            context=context,
            weights=weights,
            key=_key(self.random_state),
            support=self.support,
            validation_fraction=self.validation_fraction,
            progress=self.progress,
            **options,
        )
        return self


class FlowDensity(DensityMixin, _Flow):
    """The density of the rows of X, as a scikit-learn estimator; see `flowvi.fit_density`.

    Args:
        family: the family of flows to fit, over as many columns as X has; None for the default.
        support: where rows may lie, as in `fit_density`: None, "positive", (low, high), a sequence
            of these, one for each column, or a dict by the names of columns.
        num_steps: steps of training; by default many enough, and 0 for textbook estimates alone.
        validation_fraction: the part of the rows to hold out.
        progress: whether to show progress on standard error.
        random_state: a seed or a `numpy.random.RandomState`; None for NumPy's own.

    Attributes:
        density_: the fitted `flowvi.Density`, with its `summary()` and its pictures.
        n_features_in_: how many columns X had.
        feature_names_in_: their names, where all of them were strings.

    Example:
        >>> import numpy as np
        >>> from flowvi.sklearn import FlowDensity
        >>> X = np.random.default_rng(0).normal(size=(90, 2))
        >>> density = FlowDensity(random_state=0).fit(X)
        >>> density.score_samples(X).shape, density.sample(5, random_state=1).shape
        ((90,), (5, 2))
    """

    def __init__(
        self,
        family: Family | None = None,
        *,
        support: SupportLike = None,
        num_steps: int | None = None,
        validation_fraction: float = 0.1,
        progress: bool = False,
        random_state: RandomState = None,
    ):
        self.family = family
        self.support = support
        self.num_steps = num_steps
        self.validation_fraction = validation_fraction
        self.progress = progress
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Fits the density of the rows of X, of shape [n, D]; y is ignored.

        `sample_weight`, of shape [n], says how much each row counts: 2 as much as two equal rows.
        """
        return self._fit(_named(_rows(self, X, reset=True), X), None, sample_weight)

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """Log densities of the rows of X, of shape [n], in nats."""
        check_is_fitted(self)
        return _scored(self.density_, _rows(self, X))

    def score(
        self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None
    ) -> float:
        """The mean log density of the rows of X: what searches and cross-validation compare."""
        scores = self.score_samples(X)
        return mean(scores, check_weights(sample_weight, len(scores))).value

    def sample(self, n_samples: int = 1, random_state: RandomState = None) -> np.ndarray:
        """Draws of shape [n_samples, D]."""
        check_is_fitted(self)
        checks.positive_int("n_samples", n_samples)
        return np.asarray(self.density_.sample(_key(random_state), n_samples), np.float64)


class ConditionalFlow(RegressorMixin, _Flow):
    """The density p(y | X) of targets given features, as a scikit-learn regressor.

    Its predictions are made of draws of y at each row of X, of the same noise at all rows: so they
    are the same each time, and a row's do not depend on the other rows. `score` is that of all
    regressors, the R² of the predicted means; `log_prob(X, y)` says how good the density is.

    Args:
        family: the family of conditional flows to fit; None for the default.
        support: where y may lie: None, "positive", (low, high), or a sequence, one for each target.
        num_steps: steps of training; by default many enough, and 0 for textbook estimates alone.
        validation_fraction: the part of the rows to hold out.
        num_draws: draws behind each prediction. The error of a predicted mean is about the standard
            deviation of y given X over their root.
        progress: whether to show progress on standard error.
        random_state: a seed or a `numpy.random.RandomState`; None for NumPy's own.

    Attributes:
        density_: the fitted `flowvi.Density`, of y with X as the context.
        n_features_in_: how many columns X had.
        feature_names_in_: their names, where all of them were strings.

    Example:
        >>> import numpy as np
        >>> from flowvi.sklearn import ConditionalFlow
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(90, 1))
        >>> flow = ConditionalFlow(random_state=0).fit(X, X[:, 0] + 0.1 * rng.normal(size=90))
        >>> flow.predict(X).shape, flow.predict_interval(X, 0.9).shape, flow.sample(X, 7).shape
        ((90,), (90, 2), (90, 7))
    """

    def __init__(
        self,
        family: Family | None = None,
        *,
        support: SupportLike = None,
        num_steps: int | None = None,
        validation_fraction: float = 0.1,
        num_draws: int = 1000,
        progress: bool = False,
        random_state: RandomState = None,
    ):
        self.family = family
        self.support = support
        self.num_steps = num_steps
        self.validation_fraction = validation_fraction
        self.num_draws = num_draws
        self.progress = progress
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fits p(y | X) to X of shape [n, C] and y of shape [n], or [n, D] for several targets.

        `sample_weight`, of shape [n], says how much each row counts: 2 as much as two equal rows.
        """
        checks.positive_int("num_draws", self.num_draws)
        context, targets = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2
        )
        self._is_single = targets.ndim == 1
        return self._fit(_targets(targets), _named(np.asarray(context), X), sample_weight)

    def log_prob(self, X: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Log densities of the rows of y given those of X, of shape [n], in nats."""
        check_is_fitted(self)
        context, targets = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, reset=False
        )
        return _scored(self.density_, _targets(targets), np.asarray(context))

    def sample(
        self, X: ArrayLike, n_samples: int = 1, random_state: RandomState = None
    ) -> np.ndarray:
        """Draws of y at each row of X, of shape [n, n_samples], or [n, D, n_samples]."""
        context = self._context(X)
        checks.positive_int("n_samples", n_samples)
        draws = self.density_.sample(_key(random_state), n_samples, context)
        return self._shaped(np.moveaxis(np.asarray(draws), 0, -1))

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The mean of y given each row of X, of shape [n], or [n, D] for several targets."""
        return self._summary(X, lambda draws: draws.mean(0, keepdims=True))[..., 0]

    def predict_quantiles(self, X: ArrayLike, quantiles: Sequence[float]) -> np.ndarray:
        """Quantiles of y given each row of X, of shape [n, Q], or of each target [n, D, Q].

        Raises:
            ValueError: if `quantiles` are not between 0 and 1.
        """
        parts = np.atleast_1d(np.asarray(quantiles, np.float64))
        inside = parts.size > 0 and bool(np.all((parts > 0) & (parts < 1)))
        checks.require(inside, "`quantiles` must lie between 0 and 1", quantiles)
        return self._summary(X, lambda draws: np.quantile(draws, parts, axis=0))

    def predict_interval(self, X: ArrayLike, coverage: float = 0.9) -> np.ndarray:
        """The central interval that holds y with a probability, [n, 2], or [n, D, 2].

        Raises:
            ValueError: if `coverage` is not between 0 and 1.
        """
        is_part = isinstance(coverage, int | float) and 0 < coverage < 1
        checks.require(is_part, "`coverage` must lie between 0 and 1", coverage)
        return self.predict_quantiles(X, [0.5 - coverage / 2, 0.5 + coverage / 2])

    def _context(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self)
        return _rows(self, X)

    def _summary(self, X: ArrayLike, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A summary [Q, n, D] of draws [num_draws, n, D], as [n, Q] or [n, D, Q]."""
        context, density, key = self._context(X), self.density_, jax.random.key(SEED)
        found = []
        for (block,), count in _blocks(DRAWN, context):
            draws = density.family.sample_alike(density.params, key, self.num_draws, block)
            found.append(of(draws.astype(np.float64))[:, :count])
        return self._shaped(np.moveaxis(np.concatenate(found, 1), 0, -1))

    def _shaped(self, found: np.ndarray) -> np.ndarray:
        return found[:, 0] if self._is_single else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _key(random_state: RandomState) -> jax.Array:
    return jax.random.key(int(check_random_state(random_state).randint(2**31 - 1)))


def _rows(estimator: BaseEstimator, X: ArrayLike, reset: bool = False) -> np.ndarray:
    """X as scikit-learn checks it, in double precision; one row is too few to fit to."""
    least = 2 if reset else 1
    found = validate_data(estimator, X, dtype=np.float64, reset=reset, ensure_min_samples=least)
    return np.asarray(found)  # which reads a memory map only once


def _named(rows: np.ndarray, X: ArrayLike | Frame) -> Rows:
    """Rows as a frame, where X is one with names of columns, so that the density knows these."""
    if not isinstance(X, Frame):
        return rows
    names = tuple(name for name in X.columns if isinstance(name, str))
    if len(names) < rows.shape[1]:
        return rows
    return Columns(names, (rows.dtype.name,) * len(names), library_of(X)).frame(rows)


def _targets(y: np.ndarray) -> np.ndarray:
    return np.asarray(y, np.float64).reshape(len(y), -1)


def _blocks(size: int, *arrays: np.ndarray) -> Iterator[tuple[list[np.ndarray], int]]:
    """Blocks of `size` rows, the last one filled up with its last row, and how many rows count."""
    for start in range(0, len(arrays[0]), size):
        parts = [each[start : start + size] for each in arrays]
        count = len(parts[0])
        filled = [np.concatenate([e, np.repeat(e[-1:], size - count, 0)]) for e in parts]
        yield filled, count


def _scored(density: Density, *arrays: np.ndarray) -> np.ndarray:
    found = [np.asarray(density.log_prob(*part))[:n] for part, n in _blocks(SCORED, *arrays)]
    return np.concatenate(found).astype(np.float64)
