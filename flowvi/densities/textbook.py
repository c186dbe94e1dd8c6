"""Textbook estimates of a density: a normal, a mixture of normals by scikit-learn, a kernel.

Each stands in units of the data or under marginal maps, whichever scores better on held-out rows.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.families import Family, standard_normal
from flowvi.families.known import KnownMixture
from flowvi.families.marginals import num_bins
from flowvi.families.placed import Gaussianized, gaussianized
from flowvi.params import Fixed, PyTree
from flowvi.supports import Support

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

#: Rows that an estimate is made of at most, and held-out rows that choose a bandwidth.
MAX_ROWS, MAX_KERNELS, BANDWIDTH_ROWS = 20_000, 10_000, 500

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
class Placement:
    """Rows as the whitened space of some training rows shows them."""

    family: Gaussianized
    params: PyTree
    rows: np.ndarray

    def standardize(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows in that space, and the log-determinants of the way there."""
        return self.family.standardize(self.params, x)[:2]

    def around(self, inner: Family, params: PyTree) -> tuple[Family, PyTree]:
        """An estimate of the whitened rows as one of the data."""
        family = dataclasses.replace(self.family, family=inner)
        return family, {**_without_mark(self.params), "family": params}


def _without_mark(params: PyTree) -> PyTree:
    return {name: each for name, each in params.items() if name != "origin"}


def placements(x: np.ndarray, support: Support) -> Iterator[Placement]:
    """In units of the data where the support is real, and under marginal maps."""
    for bins in ([None] if support.is_real else []) + [num_bins(len(x))]:
        yield place(x, support, bins)


def place(x: np.ndarray, support: Support, bins: int | None) -> Placement:
    """The whitened space of rows."""
    family = gaussianized(standard_normal(x.shape[1]), support, num_bins=bins)
    params = family.place(family.init(jax.random.key(0)), x)
    return Placement(family, params, family.standardize(params, x)[0])


def scores(
    x: np.ndarray, held_out: np.ndarray, support: Support, seed: int
) -> dict[Setting, np.ndarray]:
    """Log densities of held-out rows by every estimate that is tried, made of rows x."""
    found: dict[Setting, np.ndarray] = {}
    x = x[:MAX_ROWS]
    spaces = [(each, *each.standardize(held_out)) for each in placements(x, support)]
    for space, w, log_det in spaces:
        bins = space.family.num_bins
        normal = -0.5 * (w**2).sum(1) - 0.5 * w.shape[1] * np.log(2 * np.pi)
        found[Setting("normal", bins)] = normal + log_det
        factor, kernel = _best_bandwidth(space.rows, w)
        found[Setting("kernel", bins, factor)] = kernel + log_det
    # Sizes grow in all spaces side by side, until the best of them has stopped improving.
    best, worse = -np.inf, 0
    for size in COMPONENTS:
        if size * x.shape[1] * (x.shape[1] + 3) / 2 * ROWS_EACH > len(x):
            break
        for space, w, log_det in spaces:
            mixture = _mixture(space.rows, size, seed)
            found[Setting("mixture", space.family.num_bins, size)] = (
                mixture.score_samples(w) + log_det
            )
        here = {
            s: each.mean() for s, each in found.items() if s.size == size and s.kind == "mixture"
        }
        top = max(here.values())
        if size >= SURE_SIZE:
            spaces = [each for each in spaces if _at(here, each[0]) > top - FAR_BEHIND]
        worse = 0 if max(here.values()) > best else worse + 1
        best = max(best, *here.values())
        if worse == MOST_WORSE:
            break
    return found


def _at(means: dict[Setting, float], space: Placement) -> float:
    return next(mean for s, mean in means.items() if s.num_bins == space.family.num_bins)


def build(setting: Setting, x: np.ndarray, support: Support, seed: int) -> tuple[Family, PyTree]:
    """The estimate of a setting, made of rows x, as a family with its parameters."""
    space = place(x[:MAX_ROWS], support, setting.num_bins)
    if setting.kind == "normal":
        return space.family, _without_mark(space.params)
    if setting.kind == "kernel":
        rows = space.rows[:MAX_KERNELS]
        width = setting.size * _normal_rule(*rows.shape)
        return space.around(*_known(rows, np.full(len(rows), 1 / len(rows)), np.array([1 / width])))
    mixture = _mixture(space.rows, int(setting.size), seed)
    known = _known(mixture.means_, mixture.weights_, mixture.precisions_cholesky_)
    return space.around(*known)


def _known(loc: np.ndarray, weights: np.ndarray, inverse: np.ndarray) -> tuple[Family, PyTree]:
    family = KnownMixture(loc.shape[1], len(loc), shared=inverse.ndim == 1)
    with np.errstate(divide="ignore"):
        arrays = {"loc": loc, "log_weights": np.log(weights), "inverse": inverse}
    dtype = jnp.result_type(float)
    return family, {"known": Fixed({n: jnp.asarray(a, dtype) for n, a in arrays.items()})}


def _mixture(w: np.ndarray, size: int, seed: int) -> "GaussianMixture":
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    is_tied = any(len(np.unique(column)) < len(w) / 2 for column in w.T)
    least = LEAST_TIED_VARIANCE if is_tied else LEAST_VARIANCE
    mixture = GaussianMixture(size, random_state=seed, reg_covar=least)
    # Its matrices are small: more threads cost more than they save.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(w)


def _normal_rule(num_rows: int, size: int) -> float:
    return num_rows ** (-1 / (size + 4))


def _best_bandwidth(rows: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
    """The bandwidth that suits held-out rows, over that of the normal rule, and their scores."""
    rows = rows[:MAX_KERNELS]
    some, rule = _squares(rows, w[:BANDWIDTH_ROWS]), _normal_rule(*rows.shape)
    means = [_kernel(some, factor * rule, w.shape[1]).mean() for factor in BANDWIDTHS]
    best = float(BANDWIDTHS[int(np.argmax(means))])
    parts = np.array_split(w, max(len(w) // BANDWIDTH_ROWS, 1))
    scores = [_kernel(_squares(rows, part), best * rule, w.shape[1]) for part in parts]
    return best, np.concatenate(scores)


def _squares(rows: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Squared distances [len(w), len(rows)]."""
    squares = (w**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * w @ rows.T
    # Single precision is enough for exponents, and twice as fast.
    return np.maximum(squares, 0).astype(np.float32)


def _kernel(squares: np.ndarray, width: float, size: int) -> np.ndarray:
    constant = np.log(squares.shape[1]) + size * np.log(width * np.sqrt(2 * np.pi))
    least = squares.min(1, keepdims=True)
    kernels = np.exp((least - squares) * np.float32(0.5 / width**2)).sum(1, dtype=np.float64)
    return np.log(kernels) - 0.5 * least[:, 0] / width**2 - constant
