"""What importance weights say about an approximation, and what they cannot say.

All of it is computed from draws of the approximation itself. So none of it sees a mode that the
approximation misses altogether, and in high dimension tails are lost slowly before any of it moves.

Log weights are log p(u) - log q(u) at draws u of q, of shape [num_samples], and must not be NaN.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "PSIS",
    "Estimate",
    "bridge",
    "effective_sample_size",
    "elbo",
    "log_evidence",
    "psis",
]

#: Log weights that differ by less are equal.
EQUAL = 1e-6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate, and its standard error by the spread of the draws.

    Attributes:
        value: the estimate.
        standard_error: the standard deviation of the values, over the root of their number.

    Example:
        >>> import flowvi as fv
        >>> fv.Estimate(1.5, 0.1).value
        1.5
    """

    value: float
    standard_error: float


@dataclasses.dataclass(frozen=True)
class PSIS:
    """Pareto-smoothed importance weights.

    Attributes:
        khat: the shape of the generalised Pareto distribution fitted to the largest weights;
            infinite where there are too few of them, 0 where all weights are equal. Below 0.5
            importance sampling works well, above 0.7 it cannot be trusted.
        ess: the effective sample size of the smoothed weights, as a fraction of the draws.
        log_weights: smoothed and normalised log weights, of shape [num_samples], in the order of
            the draws.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling", 2024.

    Example:
        >>> import flowvi as fv
        >>> import numpy as np
        >>> round(fv.diagnostics.psis(np.zeros(100)).ess, 4)
        1.0
    """

    khat: float
    ess: float
    log_weights: np.ndarray = dataclasses.field(repr=False)


def _checked(log_weights: ArrayLike) -> np.ndarray:
    log_weights = np.asarray(log_weights, np.float64)
    if log_weights.ndim != 1 or log_weights.size < 2:
        rule = "`log_weights` must have shape [num_samples] of two draws or more"
        raise ValueError(f"{rule}; got shape {log_weights.shape}.")
    if num_nan := np.isnan(log_weights).sum():
        raise ValueError(f"`log_weights` must not be NaN; got {num_nan} of {log_weights.size}.")
    return log_weights


def _scaled(log_weights: ArrayLike) -> tuple[float, np.ndarray]:
    """The largest log weight, and weights over the largest; all of them 0 if that is not finite."""
    log_weights = _checked(log_weights)
    top = log_weights.max()
    finite = np.isfinite(top)
    return float(top), np.exp(log_weights - top) if finite else np.zeros(log_weights.size)


def mean(values: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """The mean of values, or their weighted one, with its standard error."""
    weights = np.ones(len(values)) if weights is None else weights / weights.mean()
    value = float(np.mean(weights * values))
    error = np.sqrt(np.mean((weights * (values - value)) ** 2) / len(values))
    return Estimate(value, float(error))


def elbo(log_weights: ArrayLike) -> Estimate:
    """The mean of log weights log p(u) - log q(u): the evidence lower bound, in nats.

    Args:
        log_weights: of shape [num_samples].

    Raises:
        ValueError: if there are fewer than two, or one is NaN.

    Source: Jordan, Ghahramani, Jaakkola, Saul, "An Introduction to Variational Methods for
    Graphical Models", 1999.

    Example:
        >>> elbo([1.0, 3.0])
        Estimate(value=2.0, standard_error=1.0)
    """
    log_weights = _checked(log_weights)
    with np.errstate(invalid="ignore"):
        error = log_weights.std(ddof=1) / np.sqrt(log_weights.size)
    return Estimate(float(log_weights.mean()), float(error))


def log_evidence(log_weights: ArrayLike) -> Estimate:
    """The log of the mean weight: an estimate of log Z, in nats, as reliable as k-hat says.

    Its standard error is sd(w) / (sqrt(n) mean(w)).

    Args:
        log_weights: of shape [num_samples].

    Raises:
        ValueError: if there are fewer than two, or one is NaN.

    Source: Owen, "Monte Carlo Theory, Methods and Examples", 2013, chapter 9.

    Example:
        >>> import flowvi as fv
        >>> fv.diagnostics.log_evidence([1.0, 1.0])
        Estimate(value=1.0, standard_error=0.0)
    """
    top, weights = _scaled(log_weights)
    if not weights.any():
        return Estimate(top, np.inf)
    mean = weights.mean()
    error = weights.std(ddof=1) / np.sqrt(weights.size) / mean
    return Estimate(float(top + np.log(mean)), float(error))


def bridge(own: ArrayLike, other: ArrayLike, effective: float | None = None) -> Estimate:
    """The log evidence by bridge sampling between draws of q and draws of p, in nats.

        Z = E_q [w / (s_q Z + s_p w)] / E_p [1 / (s_q Z + s_p w)],   w = p(u) / q(u)

    for the shares s_q and s_p of the draws. It is right where q has heavier tails than p and where
    it has lighter ones, as long as they overlap.

    Args:
        own: log weights log p(u) - log q(u) at draws of q.
        other: those at draws of p.
        effective: how many independent draws of p `other` is worth; all of them by default.

    Source: Meng, Wong, "Simulating Ratios of Normalizing Constants via a Simple Identity", 1996;
    the error, Fruehwirth-Schnatter, "Estimating Marginal Likelihoods for Mixture and Markov
    Switching Models Using Bridge Sampling Techniques", 2004.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> own, other = rng.normal(size=1000), 1 + rng.normal(size=1000)  # log weights, sd 1
        >>> abs(bridge(own, other).value - 0.5) < 0.1
        True
    """
    ours, theirs = np.asarray(own, np.float64), np.asarray(other, np.float64)
    effective = len(theirs) if effective is None else min(effective, len(theirs))
    ours = np.where(np.isfinite(ours), ours, -np.inf)
    theirs = theirs[np.isfinite(theirs)]
    if not len(theirs) or not np.isfinite(ours).any():
        return Estimate(-np.inf, np.inf)
    share = np.log(np.array([len(ours), effective]) / (len(ours) + effective))
    value = float(np.median(theirs))
    for _ in range(1000):
        first = ours - np.logaddexp(share[0] + value, share[1] + ours)
        second = -np.logaddexp(share[0] + value, share[1] + theirs)
        new = _log_mean(first) - _log_mean(second)
        if abs(new - value) < 1e-10:
            break
        value = new
    spread = [np.exp(each - _log_mean(each)).var() for each in (first, second)]
    return Estimate(float(value), float(np.sqrt(spread[0] / len(ours) + spread[1] / effective)))


def _log_mean(values: np.ndarray) -> float:
    return float(np.logaddexp.reduce(values) - np.log(len(values)))


def effective_sample_size(log_weights: ArrayLike) -> float:
    """(sum w)^2 / sum w^2, as a fraction of the draws.

    Args:
        log_weights: of shape [num_samples].

    Raises:
        ValueError: if there are fewer than two, or one is NaN.

    Source: Kong, "A Note on Importance Sampling Using Standardized Weights", 1992.

    Example:
        >>> import flowvi as fv
        >>> round(fv.diagnostics.effective_sample_size([0.0, 0.0, -1000.0, -1000.0]), 4)
        0.5
    """
    _, weights = _scaled(log_weights)
    return float(weights.sum() ** 2 / max((weights**2).sum(), 1.0) / weights.size)


def psis(log_weights: ArrayLike) -> PSIS:
    """Pareto-smoothed importance sampling, of weights that need not be normalised.

    The M = min(n / 5, 3 sqrt(n)) largest weights are replaced by the quantiles of a generalised
    Pareto distribution fitted to them, whose shape is k-hat.

    Args:
        log_weights: of shape [num_samples].

    Raises:
        ValueError: if there are fewer than two, or one is NaN.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto Smoothed Importance Sampling", 2024; the
    fit is that of Zhang, Stephens, "A New and Efficient Estimation Method for the Generalized
    Pareto Distribution", 2009.

    Example:
        >>> x = np.random.default_rng(0).normal(size=10_000)
        >>> psis(-0.15 * x**2).khat < 0.7
        True
    """
    log_weights = _checked(log_weights)
    count = log_weights.size
    top = log_weights.max()
    if not np.isfinite(top):
        return PSIS(np.inf, 0.0, np.full(count, np.nan))
    if top - log_weights.min() < EQUAL:  # rounding has no tail to be judged by
        return PSIS(0.0, 1.0, np.full(count, -np.log(count)))
    shifted = log_weights - top
    num_tail = int(min(0.2 * count, 3 * np.sqrt(count)))
    order = np.argsort(shifted, kind="stable")
    tail = order[count - num_tail :]
    cutoff = max(shifted[order[count - num_tail - 1]], np.log(np.finfo(float).tiny))
    tail = tail[shifted[tail] > cutoff]
    khat = np.inf
    if len(tail) > 4:
        khat, sigma = fit_pareto(np.exp(shifted[tail]) - np.exp(cutoff))
        # A weak prior, worth ten weights, draws the shape to 0.5.
        khat = (len(tail) * khat + 10 * 0.5) / (len(tail) + 10)
        if np.isfinite(khat):
            # The logarithms of 1 minus the probabilities at which quantiles are taken.
            tails = np.log1p(-(np.arange(len(tail)) + 0.5) / len(tail))
            excess = np.expm1(-khat * tails) / khat if abs(khat) >= 1e-12 else -tails
            shifted[tail] = np.minimum(np.log(np.exp(cutoff) + sigma * excess), 0)
    shifted -= np.logaddexp.reduce(shifted)
    return PSIS(khat, effective_sample_size(shifted), shifted)


def fit_pareto(excess: np.ndarray) -> tuple[float, float]:
    """(k, sigma) of a generalised Pareto distribution, from draws of it.

    Source: Zhang, Stephens, "A New and Efficient Estimation Method for the Generalized Pareto
    Distribution", 2009.
    """
    # The posterior mean under a prior that depends on the data, on a grid of k / sigma.
    count, excess = excess.size, np.sort(excess)
    num_grid = 30 + int(np.sqrt(count))
    grid = 1 - np.sqrt(num_grid / (np.arange(1, num_grid + 1) - 0.5))
    grid = grid / (3 * excess[int(count / 4 + 0.5) - 1]) + 1 / excess[-1]
    shapes = np.log1p(-grid[:, None] * excess).mean(1)
    log_like = count * (np.log(-grid / shapes) - shapes - 1)
    share = np.exp(log_like - np.logaddexp.reduce(log_like))
    share[share < 10 * np.finfo(float).eps] = 0
    share /= share.sum()
    ratio = (grid * share).sum()
    shape = np.log1p(-ratio * excess).mean()
    return float(shape), float(-shape / ratio)
