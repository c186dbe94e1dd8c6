"""Tables of `flowvi.bijectors.Marginal` from data, on the host in double precision."""

from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

from flowvi.diagnostics import fit_pareto, mean

Tables = dict[str, np.ndarray]

#: Rows beyond the last knot: at a light tail, and the part of them at one that may be heavy.
LIGHT_ROWS, HEAVY_PART, MAX_HEAVY_ROWS = 25, 0.05, 1000

#: Where a column has fewer different numbers, or rows, it keeps an affine map.
FEW_VALUES = 50

#: Nats of likelihood that a Pareto tail must gain over others, and a shape that is exponential.
LEAST_GAIN, LEAST_SHAPE = 1.0, 0.005

#: The choice of a covariance: in so many parts of the rows, of so many columns at most, of so many
#: rows at least; and the standard errors by which another one than the first must be better.
FOLDS, MANY_COLUMNS, LEAST_ROWS, LEAST_ERRORS = 4, 64, 20, 2.0

#: The variance that is added to every direction, as a part of the mean one.
LEAST_VARIANCE = 1e-9


def units(x: np.ndarray, lower: float = -np.inf, upper: float = np.inf) -> tuple[float, float]:
    """(shift, scale) of a column, which neither outliers nor a far group set: by its quartiles.

    At a bound the shift is that bound, so that what is near it stays exact.
    """
    low, loc, high = np.quantile(x, [0.25, 0.5, 0.75])
    # For normal columns this is the standard deviation.
    scale = (high - low) / 1.349
    if not scale > 0:
        loc, scale = x.mean(), x.std() or 1.0
    if np.isfinite(lower):
        return float(lower), float(upper - lower if np.isfinite(upper) else scale)
    return (float(upper) if np.isfinite(upper) else float(loc)), float(scale)


def equally_weighted(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """As many numbers as a column has, whose plain quantiles are its weighted ones."""
    if weights is None:
        return x
    order = np.argsort(x)
    total = np.cumsum(weights[order])
    places = (np.arange(len(x)) + 0.5) / len(x) * total[-1]
    return x[order][np.searchsorted(total, places)]


def identity(num_bins: int) -> Tables:
    """The table of z = x."""
    z = np.linspace(-1, 1, num_bins + 1)
    return {
        "x": z,
        "z": z,
        "slope": np.ones_like(z),
        "shape": np.zeros(2),
        "bound": np.array([-np.inf, np.inf]),
    }


def num_bins(num_rows: int) -> int:
    """Bins that so many rows can fill."""
    return int(np.clip(num_rows // 100, 4, 24))


def fitted(x: np.ndarray, num_bins: int, lower: float = -np.inf, upper: float = np.inf) -> Tables:
    """The map of a column to a standard normal, by its quantiles and its tails.

    Each end is a power of the distance to a bound where there is one, else a Pareto or a normal
    tail, whichever is the likelier.
    """
    x = np.sort(x)
    count, bounds = len(x), (lower, upper)
    is_bounded = [bool(np.isfinite(bound)) for bound in bounds]
    if count < FEW_VALUES or (len(np.unique(x)) < FEW_VALUES and not any(is_bounded)):
        return identity(num_bins)
    heavy = int(np.clip(HEAVY_PART * count, 5, MAX_HEAVY_ROWS))
    ends = [_end(side * x[::side], bounds[i] * side, heavy) for i, side in enumerate((1, -1))]
    z = np.linspace(stats.norm.ppf(ends[0][0]), -stats.norm.ppf(ends[1][0]), num_bins + 1)
    knots = np.quantile(x, stats.norm.cdf(z))
    knots[[0, -1]] = ends[0][1], -ends[1][1]
    if np.any(np.diff(knots) <= 0):  # ties
        knots, z = _distinct(knots, z)
    chords = np.diff(z) / np.diff(knots)
    inner = np.sqrt(chords[1:] * chords[:-1])
    slope = np.concatenate([[ends[0][2]], inner, [ends[1][2]]])
    # Of a few rows a tail may say any slope; far from that of its bin a spline would bend sharply.
    near = np.concatenate([chords[:1], inner, chords[-1:]])
    slope = np.clip(slope, near / 10, near * 10)
    shape = np.array([ends[0][3], ends[1][3]])
    return {"x": knots, "z": z, "slope": slope, "shape": shape, "bound": np.array(bounds)}


def _distinct(knots: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many knots, of which none coincide."""
    kept = np.concatenate([[True], np.diff(knots) > 0])
    grid = np.linspace(0, kept.sum() - 1, len(z))
    places = np.arange(kept.sum())
    return np.interp(grid, places, knots[kept]), np.interp(grid, places, z[kept])


def _end(x: np.ndarray, bound: float, heavy: int) -> tuple[float, float, float, float]:
    """Of the lower tail of a sorted column: (mass beyond the knot, knot, dz/dx there, shape)."""
    count = len(x)

    def knot(number: int) -> tuple[float, float, float, np.ndarray]:
        mass, place = number / count, 0.5 * (x[number - 1] + x[number])
        return mass, place, stats.norm.ppf(mass), place - x[:number]

    mass, place, z, excess = knot(heavy)
    density = mass / np.exp(stats.norm.logpdf(z))
    if np.isfinite(bound):
        left = np.maximum(x[:heavy] - bound, np.finfo(float).tiny) / (place - bound)
        alpha = np.clip(-1 / np.mean(np.log(np.minimum(left, 1 - 1e-12))), 1e-2, 1e2)
        return mass, place, alpha * density / (place - bound), 0.0
    excess = np.maximum(excess, 0)
    if not excess.mean() > 0:
        return mass, place, density / max(x.std(), np.finfo(float).tiny), 0.0
    slope, normal = _normal_tail(excess, z)
    sigma = excess.mean()
    # The likeliest of a normal, an exponential and a Pareto tail, which has one parameter more.
    tails = [(normal, np.nan, 0.0), (-len(excess) * (np.log(sigma) + 1), sigma, LEAST_SHAPE)]
    shape, sigma = fit_pareto(excess[excess > 0])
    if np.isfinite(shape) and shape > LEAST_SHAPE:
        pareto = np.sum(-np.log(sigma) - (1 + 1 / shape) * np.log1p(shape * excess / sigma))
        tails.append((pareto - LEAST_GAIN, sigma, float(shape)))
    _, sigma, shape = max(tails)
    if shape > 0:
        return mass, place, density / sigma, shape
    if heavy > LIGHT_ROWS:
        mass, place, z, excess = knot(LIGHT_ROWS)
        if excess.mean() > 0:
            slope, _ = _normal_tail(np.maximum(excess, 0), z)
    return mass, place, slope, 0.0


def _normal_tail(excess: np.ndarray, z: float) -> tuple[float, float]:
    """dz/dx of a normal tail from z on, by maximum likelihood, and its log likelihood."""

    def loss(log_slope: float) -> float:
        points = abs(z) + np.exp(log_slope) * excess
        return float(np.mean(0.5 * points**2) - log_slope)

    guess = -np.log(excess.mean())
    found = optimize.minimize_scalar(loss, bounds=(guess - 6, guess + 4), method="bounded")
    constant = -0.5 * np.log(2 * np.pi) - stats.norm.logcdf(-abs(z))
    return float(np.exp(found.x)), float(len(excess) * (constant - found.fun))


def centered(z: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(the mean of rows, rows whose plain second moments about zero are their covariance)."""
    if weights is None:
        return z.mean(0), z - z.mean(0)
    weights = weights / weights.mean()
    loc = np.mean(weights[:, None] * z, 0)
    return loc, np.sqrt(weights)[:, None] * (z - loc)


def covariance(z: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The covariance of rows, shrunk if that describes new rows better.

    Each eigenvalue is shrunk by how the others lie about it, or all are shrunk alike, or none is.

    Source: Ledoit, Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices",
    2004; the same, "Analytical Nonlinear Shrinkage of Large-Dimensional Covariance Matrices", 2020.
    """
    from sklearn.covariance import empirical_covariance, ledoit_wolf

    count, size = z.shape
    kinds: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda y: ledoit_wolf(y, assume_centered=True)[0]
    ]
    if count >= LEAST_ROWS:
        kinds.insert(0, _nonlinearly_shrunk)
        if count > 2 * size:
            kinds.append(lambda y: empirical_covariance(y, assume_centered=True))
    best = kinds[0]
    # Of many columns the first is sure to be better, and a proof would take long.
    if len(kinds) > 1 and size <= MANY_COLUMNS:
        folds = np.arange(count) % FOLDS
        scores: list[list[np.ndarray]] = [[] for _ in kinds]
        for fold in range(FOLDS):
            seen = folds != fold
            loc, y = centered(z[seen], None if weights is None else weights[seen])
            for kind, its in zip(kinds, scores, strict=True):
                its.append(_normal_scores(z[~seen], loc, kind(y)))
        order = np.argsort(folds, kind="stable")
        its_weights = None if weights is None else weights[order]
        chosen = 0
        for number in range(1, len(kinds)):
            gain = mean(
                np.concatenate(scores[number]) - np.concatenate(scores[chosen]), its_weights
            )
            # What a few rows seem to gain is chance.
            if gain.value > LEAST_ERRORS * gain.standard_error:
                chosen = number
        best = kinds[chosen]
    found = best(centered(z, weights)[1])
    # Columns may depend on each other, and of few rows may be constant.
    return found + LEAST_VARIANCE * np.trace(found) / size * np.eye(size)


def _normal_scores(x: np.ndarray, loc: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The log densities of rows by a normal, up to a constant."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, LEAST_VARIANCE * values[-1])
    return -0.5 * (np.sum(((x - loc) @ vectors) ** 2 / values, 1) + np.log(values).sum())


def _nonlinearly_shrunk(z: np.ndarray) -> np.ndarray:
    """Second moments with each of their eigenvalues shrunk by how the rest lie about it."""
    count, size = len(z) - 1, z.shape[1]
    values, vectors = np.linalg.eigh(z.T @ z / count)
    known = values[max(size - count, 0) :]
    if not known[0] > 0:
        return vectors * values @ vectors.T
    width, root, ratio = count ** (-1 / 3), np.sqrt(5), size / count
    # The density of eigenvalues by an Epanechnikov kernel, and its Hilbert transform.
    widths = width * known
    x = (known[:, None] - known) / widths
    density = np.mean(0.75 / root * np.maximum(1 - x**2 / 5, 0) / widths, 1)
    edge = np.abs(root - np.abs(x)) < 1e-12
    logs = np.log(
        np.abs((root - x) / np.where(edge, 1, root + x)), where=~edge, out=np.zeros_like(x)
    )
    hilbert = np.mean((-0.3 * x + 0.75 / root * (1 - x**2 / 5) * logs) / (np.pi * widths), 1)
    if size <= count:
        real = 1 - ratio - np.pi * ratio * known * hilbert
        shrunk = known / ((np.pi * ratio * known * density) ** 2 + real**2)
        return vectors * shrunk @ vectors.T
    log = np.log((1 + root * width) / (1 - root * width))
    at_zero = 0.3 / width**2 + 0.75 / (root * width) * (1 - 0.2 / width**2) * log
    at_zero *= np.mean(1 / known) / np.pi
    null = 1 / (np.pi * (size - count) / count * at_zero)
    shrunk = known / (np.pi**2 * known**2 * (density**2 + hilbert**2))
    return vectors * np.concatenate([np.full(size - count, null), shrunk]) @ vectors.T
