"""Textbook estimates of a density: a normal, a mixture of normals by scikit-learn, a kernel.

Each stands in units of the data or under marginal maps, whichever scores better on held-out rows.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from flowvi.diagnostics import mean
from flowvi.families import Family, marginals, standard_normal
from flowvi.families.known import KnownConditional, KnownMixture
from flowvi.families.marginals import num_bins
from flowvi.families.placed import Gaussianized, gaussianized
from flowvi.params import Fixed, PyTree
from flowvi.supports import Interval

#: Rows that an estimate is made of at most, and held-out rows that choose a bandwidth.
MAX_ROWS, MAX_KERNELS, BANDWIDTH_ROWS = 20_000, 10_000, 500

#: Rows that repeat at random are so many times as many; and the largest count of the row of least
#: weight where all weights are whole numbers.
FINER, LARGEST_LEAST = 8, 12

#: Numbers of components that are tried, and rows that each of their parameters needs.
COMPONENTS, ROWS_EACH = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96), 0.5

#: Sizes without a new best that end the search.
MOST_WORSE = 3

#: A space whose mixture is so many nats behind that of the other one is given up, from a size on.
FAR_BEHIND, SURE_SIZE = 0.02, 16

#: The variance that is added to those of components, of whitened rows; more where numbers repeat.
LEAST_VARIANCE, LEAST_TIED_VARIANCE = 1e-9, 1e-6

#: Bandwidths that are tried, over that of the normal rule n^(-1 / (D + 4)).
BANDWIDTHS = np.geomspace(0.08, 1.4, 11)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One estimate: its kind, the marginal maps under which it stands, and its size."""

    kind: str
    num_bins: int | None
    size: float = 1.0

    def __str__(self) -> str:
        size = {
            "normal": "",
            "mixture": f"of {self.size:g}, ",
            "kernel": f"bandwidth {self.size:.2g}, ",
        }
        space = (
            "whitened" if self.num_bins is None else f"under marginal maps, {self.num_bins} bins"
        )
        return size[self.kind] + space


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows x [n, D] with their contexts [n, C], C = 0 where there are none, and weights [n]."""

    x: np.ndarray
    context: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def of(
        cls, x: np.ndarray, context: np.ndarray | None, weights: np.ndarray | None = None
    ) -> "Rows":
        """Rows in double precision."""
        context = np.empty((len(x), 0)) if context is None else context
        return cls(np.asarray(x, np.float64), np.asarray(context, np.float64), weights)

    @property
    def sizes(self) -> tuple[int, int]:
        """(D, C)."""
        return self.x.shape[1], self.context.shape[1]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of normals: weights [K], locations [K, D + C], covariances [K, D + C, D + C]."""

    weights: np.ndarray
    loc: np.ndarray
    covariance: np.ndarray

    def log_prob(self, w: np.ndarray, start: int = 0) -> np.ndarray:
        """Log densities of rows, or of their columns from `start` on."""
        each = []
        parts = zip(self.weights, self.loc, self.covariance, strict=True)
        for weight, loc, covariance in parts:
            factor = np.linalg.cholesky(covariance[start:, start:])
            y = linalg.solve_triangular(factor, (w - loc)[:, start:].T, lower=True)
            constant = np.log(np.diag(factor)).sum() + 0.5 * len(y) * np.log(2 * np.pi)
            each.append(np.log(weight) - constant - 0.5 * (y**2).sum(0))
        return np.logaddexp.reduce(each, axis=0)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The whitened space of some rows: their x there, and beside it what a family sees of contexts.

    Of a mixture over both, what it says of x at a context is what counts.
    """

    family: Gaussianized
    params: PyTree
    sizes: tuple[int, int]
    rows: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def of(cls, rows: Rows, support: Interval, bins: int | None) -> "Placement":
        """That of rows."""
        size, other = rows.sizes
        inner = KnownConditional(size, other, 1) if other else standard_normal(size)
        family = gaussianized(inner, support, num_bins=bins)
        params = family.place(family.init(jax.random.key(0)), rows.x, rows.context, rows.weights)
        bare = cls(family, params, rows.sizes, np.empty(0), rows.weights)
        return dataclasses.replace(bare, rows=bare.standardize(rows)[0])

    def standardize(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Rows in that space [n, D + C], and the log-determinants of the way there."""
        context = rows.context if self.sizes[1] else None
        w, log_det, features = self.family.standardize(self.params, rows.x, context)
        return w if features is None else np.concatenate([w, features], 1), log_det

    def normal(self) -> Mixture:
        """The normal of the rows."""
        if not self.sizes[1]:
            # Whitening has shrunk what needed it; the covariance of whitened rows would undo that.
            size = self.sizes[0]
            return Mixture(np.ones(1), np.zeros((1, size)), np.eye(size)[None])
        found = marginals.covariance(self.rows, self.weights)
        loc = marginals.centered(self.rows, self.weights)[0]
        return Mixture(np.ones(1), loc[None], found[None])

    def mixture(self, size: int, seed: int) -> Mixture:
        """A mixture by scikit-learn, which takes no weights: of rows that repeat by them."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits

        is_tied = any(len(np.unique(column)) < len(self.rows) / 2 for column in self.rows.T)
        least = LEAST_TIED_VARIANCE if is_tied else LEAST_VARIANCE
        mixture = GaussianMixture(size, random_state=seed, reg_covar=least)
        # Its matrices are small: more threads cost more than they save.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(self.rows[repeats(self.weights, len(self.rows), seed)])
        return Mixture(mixture.weights_, mixture.means_, mixture.covariances_)

    def score(self, mixture: Mixture, w: np.ndarray) -> np.ndarray:
        """Log densities of x at its context."""
        size, other = self.sizes
        return mixture.log_prob(w) - (mixture.log_prob(w, size) if other else 0)

    def build(self, mixture: Mixture) -> tuple[Family, PyTree]:
        """A mixture as a family of the data, with its parameters."""
        size, other = self.sizes
        x, c = slice(0, size), slice(size, None)
        joint, arrays = mixture.covariance, {"log_weights": np.log(mixture.weights)}
        inner: Family = KnownMixture(size, len(joint))
        covariance = joint[:, x, x]
        if other:
            inner = KnownConditional(size, other, len(joint))
            slope = np.linalg.solve(joint[:, c, c], joint[:, c, x])
            covariance = covariance - joint[:, x, c] @ slope
            arrays |= {"slope": slope, "context_loc": mixture.loc[:, c]}
            arrays["context_inverse"] = _inverse(joint[:, c, c])
        arrays |= {"loc": mixture.loc[:, x], "inverse": _inverse(covariance)}
        return self.around(inner, arrays)

    def around(self, inner: Family, arrays: dict[str, np.ndarray]) -> tuple[Family, PyTree]:
        """A family of known arrays over the whitened space as one of the data."""
        family = dataclasses.replace(self.family, family=inner)
        params = {name: each for name, each in self.params.items() if name != "origin"}
        dtype = jnp.result_type(float)
        known = Fixed({name: jnp.asarray(array, dtype) for name, array in arrays.items()})
        return family, {**params, "family": {"known": known}}


def repeats(weights: np.ndarray | None, num_rows: int, seed: int) -> np.ndarray:
    """Numbers of rows that repeat by their weights: exactly of few whole ones, else at random.

    At random each row is there as often as its weight says, rounded up or down, by one draw for all
    rows ("systematic resampling"): the least noise that counts can have.
    """
    numbers = np.arange(num_rows)
    if weights is None:
        return numbers
    for scale in range(1, LARGEST_LEAST + 1):
        counts = weights * (scale / weights[weights > 0].min())
        if np.allclose(counts, np.round(counts), rtol=0, atol=1e-9) and counts.sum() <= MAX_ROWS:
            return np.repeat(numbers, np.round(counts).astype(int))
    ends = np.cumsum(weights / weights.mean() * min(FINER, max(MAX_ROWS / num_rows, 1)))
    start = np.random.default_rng(seed).uniform()
    return np.repeat(numbers, np.diff(np.floor(ends + start), prepend=0).astype(int))


def _inverse(covariance: np.ndarray) -> np.ndarray:
    """Upper triangular P with covariance^-1 = P P^T."""
    factors = np.linalg.cholesky(covariance)
    return np.swapaxes(np.linalg.inv(factors), -1, -2)


def placements(rows: Rows, support: Interval) -> Iterator[Placement]:
    """In units of the data where the support is real, and under marginal maps."""
    for bins in ([None] if support.is_real else []) + [num_bins(len(rows.x))]:
        yield Placement.of(rows, support, bins)


def scores(
    rows: Rows,
    held_out: Rows,
    support: Interval,
    seed: int,
    tell: Callable[[int, float], None] = lambda number, loss: None,
) -> dict[Setting, np.ndarray]:
    """Log densities of held-out rows by every estimate that is tried, made of other rows.

    `tell` is called with the number of each size of a mixture, from 1 on, and the best loss so far.
    """
    found: dict[Setting, np.ndarray] = {}
    spaces = [(each, *each.standardize(held_out)) for each in placements(rows, support)]
    for space, w, log_det in spaces:
        bins = space.family.num_bins
        found[Setting("normal", bins)] = space.score(space.normal(), w) + log_det
        if not space.sizes[1]:
            factor, kernel = _best_bandwidth(space.rows, w, space.weights, held_out.weights)
            found[Setting("kernel", bins, factor)] = kernel + log_det
    # Sizes grow in all spaces side by side, until the best of them has stopped improving.
    best, worse, columns = -np.inf, 0, sum(rows.sizes)
    for number, size in enumerate(COMPONENTS, 1):
        if size * columns * (columns + 3) / 2 * ROWS_EACH > len(rows.x):
            break
        here = {}
        for space, w, log_det in spaces:
            bins = space.family.num_bins
            score = space.score(space.mixture(size, seed), w) + log_det
            found[Setting("mixture", bins, size)] = score
            here[bins] = mean(score, held_out.weights).value
        top = max(here.values())
        if size >= SURE_SIZE:
            spaces = [e for e in spaces if here[e[0].family.num_bins] > top - FAR_BEHIND]
        worse = 0 if top > best else worse + 1
        best = max(best, top)
        tell(number, -best)
        if worse == MOST_WORSE:
            break
    return found


def build(setting: Setting, rows: Rows, support: Interval, seed: int) -> tuple[Family, PyTree]:
    """The estimate of a setting, made of rows, as a family with its parameters."""
    space = Placement.of(rows, support, setting.num_bins)
    if setting.kind == "kernel":
        loc = space.rows[:MAX_KERNELS]
        width = setting.size * _normal_rule(*loc.shape)
        shares = np.ones(len(loc)) if space.weights is None else space.weights[: len(loc)]
        loc, shares = loc[shares > 0], shares[shares > 0]
        log_weights = np.log(shares / shares.sum())
        arrays = {"loc": loc, "log_weights": log_weights, "inverse": np.array([1 / width])}
        return space.around(KnownMixture(loc.shape[1], len(loc), shared=True), arrays)
    is_normal = setting.kind == "normal"
    return space.build(space.normal() if is_normal else space.mixture(int(setting.size), seed))


def _normal_rule(num_rows: int, size: int) -> float:
    return num_rows ** (-1 / (size + 4))


def _best_bandwidth(
    rows: np.ndarray, w: np.ndarray, weights: np.ndarray | None, its_weights: np.ndarray | None
) -> tuple[float, np.ndarray]:
    """The bandwidth that suits held-out rows, over that of the normal rule, and their scores."""
    rows, size = rows[:MAX_KERNELS], w.shape[1]
    shares = np.ones(len(rows)) if weights is None else weights[:MAX_KERNELS]
    its_weights = None if its_weights is None else its_weights[:BANDWIDTH_ROWS]
    some, rule = _squares(rows, w[:BANDWIDTH_ROWS]), _normal_rule(*rows.shape)
    scores = [_kernel(some, factor * rule, size, shares) for factor in BANDWIDTHS]
    means = [mean(each, its_weights).value for each in scores]
    best = float(BANDWIDTHS[int(np.argmax(means))])
    parts = np.array_split(w, max(len(w) // BANDWIDTH_ROWS, 1))
    scores = [_kernel(_squares(rows, part), best * rule, size, shares) for part in parts]
    return best, np.concatenate(scores)


def _squares(rows: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Squared distances [len(w), len(rows)]."""
    squares = (w**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * w @ rows.T
    # Single precision is enough for exponents, and twice as fast.
    return np.maximum(squares, 0).astype(np.float32)


def _kernel(squares: np.ndarray, width: float, size: int, shares: np.ndarray) -> np.ndarray:
    constant = np.log(shares.sum()) + size * np.log(width * np.sqrt(2 * np.pi))
    least = squares[:, shares > 0].min(1, keepdims=True)
    each = np.exp((least - squares) * np.float32(0.5 / width**2))
    kernels = (each * shares).sum(1, dtype=np.float64)
    return np.log(kernels) - 0.5 * least[:, 0] / width**2 - constant
