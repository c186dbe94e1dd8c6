"""What is reported of an approximation, from draws of it and their log weights."""

import numpy as np


def draws_of(sample, key_of, count, chunk=10_000):
    """(u, log weights) of `count` draws; `sample(key, chunk)` gives both."""
    parts = [sample(key_of(index), chunk) for index in range(-(-count // chunk))]
    u = np.concatenate([np.asarray(part[0], np.float64) for part in parts])[:count]
    weights = np.concatenate([np.asarray(part[1], np.float64) for part in parts])[:count]
    return u, weights


def of_weights(log_weights, log_z):
    """Gap, evidence error and ESS; draws without a density are left out and counted."""
    good = np.isfinite(log_weights)
    lost = float(1 - good.mean())
    if not good.any():
        return {
            "gap": float("inf"),
            "gap_error": 0.0,
            "log_z_error": float("inf"),
            "ess": 0.0,
            "lost": lost,
        }
    weights = log_weights[good]
    top = weights.max()
    ratio = np.exp(weights - top)
    return {
        "gap": float(log_z - weights.mean()),
        "gap_error": float(weights.std() / np.sqrt(weights.size)),
        "log_z_error": float(top + np.log(ratio.sum() / log_weights.size) - log_z),
        "ess": float(ratio.sum() ** 2 / (ratio**2).sum() / log_weights.size),
        "lost": lost,
    }


def of_moments(values, mean, sd):
    """Worst errors of means and of log standard deviations, in posterior standard deviations."""
    good = np.isfinite(values).all(1)
    values = values[good]
    return {
        "mean_error": float(np.abs((values.mean(0) - mean) / sd).max()),
        "log_sd_error": float(np.abs(np.log(values.std(0) / sd)).max()),
    }


def sliced_wasserstein(first, second, num_directions=64, seed=0):
    """Mean over directions of the distance between projections, in the units of the draws."""
    rng = np.random.default_rng(seed)
    size = min(len(first), len(second))
    directions = rng.normal(size=(first.shape[1], num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    one, two = (np.sort(draws[:size] @ directions, axis=0) for draws in (first, second))
    return float(np.abs(one - two).mean())


def wasserstein_ratio(values, reference, mean, sd):
    """The distance of draws to one half of the reference, over that of its other half."""
    rng = np.random.default_rng(0)
    reference = (reference[rng.permutation(len(reference))] - mean) / sd
    half = len(reference) // 2
    values = (values[np.isfinite(values).all(1)][:half] - mean) / sd
    noise = sliced_wasserstein(reference[half : 2 * half], reference[:half])
    return sliced_wasserstein(values, reference[:half]) / noise
