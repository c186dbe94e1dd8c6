"""A map along curves that draws show: which coordinates follow others, and scale with them."""

import dataclasses
import itertools
from collections.abc import Callable

import distrax
import jax.numpy as jnp
import numpy as np

from flowvi.bijectors.curved import Curved
from flowvi.families.family import Params
from flowvi.params import Array, Fixed

#: Standard errors from which on a term is kept, rounds of leaving out, and of a scale's regression.
CLEAR, NUM_SELECTIONS, NUM_SCORINGS = 4.0, 3, 12

#: The part of a coordinate's variance that regression regards as rounding, and of a matrix's
#: largest singular value.
ROUNDING, RANK = 1e-13, 1e-10

Curve = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Curves:
    """The transform of `flowvi.bijectors.Curved`, which no optimizer moves.

    At fresh parameters it is the identity; `curve_of` makes others.
    """

    event_size: int
    name = "curves"

    def init(self, key: Array) -> Params:
        del key
        size = self.event_size
        curve = {
            "order": jnp.arange(size),
            "loc": jnp.zeros(size),
            "linear": jnp.zeros((size, size)),
            "log_scale": jnp.zeros(size),
            "log_slope": jnp.zeros((size, size)),
            "quadratic": jnp.zeros((size, size, size)),
        }
        return {"curve": Fixed(curve)}

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        return Curved(**params["curve"].value)


def curve_of(x: np.ndarray) -> tuple[Curve, float]:
    """The arguments of `Curved` for draws of shape [n, D] in units of their own, and its gain.

    The gain is that of the mean log density over the best linear map, in nats, less what as many
    coefficients gain on noise.
    """
    from threadpoolctl import threadpool_limits

    size = x.shape[1]
    natural = tuple(range(size))
    with threadpool_limits(1):  # many small products
        orders = dict.fromkeys((natural, natural[::-1], _greedy(x)))
        fits = [_along(x, order) for order in orders]
    curve, value, count = min(fits, key=lambda each: each[1])
    linear = 0.5 * np.linalg.slogdet(np.cov(x.T).reshape(size, size))[1]
    return curve, float(linear - value - 0.5 * count * np.log(len(x)) / len(x))


def _features(x: np.ndarray, before: tuple[int, ...]) -> np.ndarray:
    pairs = itertools.combinations_with_replacement(before, 2)
    columns = [np.ones(len(x)), *(x[:, j] for j in before), *(x[:, j] * x[:, k] for j, k in pairs)]
    return np.stack(columns, 1)


def _inverse(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: (the matrix that takes y to coefficients, their errors where y's are 1)."""
    scale = np.maximum(np.linalg.norm(features, axis=0), np.finfo(float).tiny)
    columns = features / scale
    sizes, vectors = np.linalg.eigh(columns.T @ columns)
    good = sizes > sizes[-1] * RANK
    roots = vectors[:, good] / np.sqrt(sizes[good]) / scale[:, None]
    return roots @ (roots.T @ features.T), np.linalg.norm(roots, axis=1)


def _clear_terms(
    features: np.ndarray, solve: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], rounds: int
) -> np.ndarray:
    """Coefficients that `solve(columns)` finds, with their errors; 0 where noise may be all.

    Far away from the draws a term that they do not tell from noise would be all.
    """
    kept = np.ones(features.shape[1], bool)
    for last in (False,) * rounds + (True,):
        found, errors = solve(features[:, kept])
        clear = np.abs(found) > CLEAR * errors
        clear[0] = True
        if last or clear.all():
            break
        kept[np.flatnonzero(kept)[~clear]] = False
    coefficients = np.zeros(len(kept))
    coefficients[kept] = found
    return coefficients


def _means(features: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients of y by weighted least squares."""

    def solve(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inverse, errors = _inverse(columns)
        found = inverse @ (y * weights)
        residual = np.sum((y * weights - columns @ found) ** 2) / max(len(y) - len(found), 1)
        return found, errors * np.sqrt(residual)

    return _clear_terms(features * weights[:, None], solve, NUM_SELECTIONS)


def _scales(features: np.ndarray, residual: np.ndarray, least: float) -> np.ndarray:
    """Coefficients of the log standard deviation of residuals, by Fisher's scoring."""
    squares = residual**2 + least**2

    def solve(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inverse, errors = _inverse(columns)
        found = np.zeros(columns.shape[1])
        found[0] = 0.5 * np.log(np.mean(squares))
        for _ in range(NUM_SCORINGS):
            excess = squares * np.exp(-2 * (columns @ found)) - 1
            found = found + inverse @ (0.5 * np.clip(excess, -1, 10))
        return found, errors / np.sqrt(2)

    return _clear_terms(features, solve, 1)


def _regressed(
    x: np.ndarray, i: int, before: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, float]:
    """(terms of the mean, of the log scale, mean log scale) of x_i given others."""
    features = _features(x, before)
    lines = features[:, : 1 + len(before)]
    y, least = x[:, i], np.sqrt(ROUNDING) * x[:, i].std()
    mean = _means(features, y, np.ones(len(y)))
    scale = _scales(lines, y - features @ mean, least)
    if scale[1:].any():
        weights = np.exp(-(lines @ scale))
        mean = _means(features, y, weights / weights.mean())
        scale = _scales(lines, y - features @ mean, least)
    log_scale = lines @ scale
    z = (y - features @ mean) * np.exp(-log_scale)
    return mean, scale, float(np.mean(log_scale) + 0.5 * np.mean(z**2) - 0.5)


def _greedy(x: np.ndarray) -> tuple[int, ...]:
    """The order that leaves for the end what others tell most about."""
    rest = list(range(x.shape[1]))
    order: list[int] = []
    while len(rest) > 1:
        others = {i: tuple(j for j in rest if j != i) for i in rest}
        last = min(rest, key=lambda i: _regressed(x, i, others[i])[2] - np.log(x[:, i].std()))
        order.insert(0, last)
        rest.remove(last)
    return (*rest, *order)


def _along(x: np.ndarray, order: tuple[int, ...]) -> tuple[Curve, float, int]:
    """(the map along an order, minus its mean log density but for a constant, its coefficients)."""
    size, value = x.shape[1], 0.0
    loc, log_scale = np.zeros(size), np.zeros(size)
    linear, log_slope, quadratic = (np.zeros((size,) * rank) for rank in (2, 2, 3))
    for place, i in enumerate(order):
        before = order[:place]
        mean, scale, own = _regressed(x, i, before)
        value += own
        loc[i], log_scale[i] = mean[0], scale[0]
        linear[i, list(before)], log_slope[i, list(before)] = mean[1 : 1 + place], scale[1:]
        pairs = itertools.combinations_with_replacement(before, 2)
        for (j, k), term in zip(pairs, mean[1 + place :], strict=True):
            quadratic[i, j, k] = term
    curve = {
        "order": np.array(order),
        "loc": loc,
        "linear": linear,
        "log_scale": log_scale,
        "log_slope": log_slope,
        "quadratic": quadratic,
    }
    count = int(np.count_nonzero(quadratic) + np.count_nonzero(log_slope))
    return curve, value, count
