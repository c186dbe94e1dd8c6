"""What else one would fit to a mixed table: a mixture of normals, and a Gaussian copula.

Both see the columns that a fitted encoder knows, and both score in its units: densities of real
columns and angles, masses of all others. Where a mass is an integral that neither has, it is a mean
over uniform noise in the cell, with many draws, so that their scores are not a loose bound.
"""

import numpy as np
from scipy import special, stats
from sklearn.covariance import ledoit_wolf
from sklearn.mixture import GaussianMixture

from flowvi.tables import Category, Encoder, Integer, Real

Array = np.ndarray

#: Draws of the noise behind each score, and components of a mixture that are tried.
DRAWS, COMPONENTS = 100, (1, 2, 3, 5, 8)


def _dequantised(encoder: Encoder, found: dict[str, Array], rng: np.random.Generator) -> tuple:
    """(columns with one-hot ones and uniform noise [n, C], log of the mass of their noise)."""
    parts, log_mass = [], 0.0
    for name, kind in zip(encoder.schema.names, encoder.schema.kinds, strict=True):
        x = found[name]
        if isinstance(kind, Category):
            hot = np.eye(len(kind.levels))[x.astype(int)]
            parts.append(hot + rng.uniform(size=hot.shape))
        elif isinstance(kind, Integer):
            parts.append((x + kind.width * (rng.uniform(size=len(x)) - 0.5))[:, None])
            log_mass += np.log(kind.width)
        elif isinstance(kind, Real):
            parts.append(x[:, None])
    return np.concatenate(parts, 1), log_mass


def mixture(encoder: Encoder, train: dict[str, Array], test: dict[str, Array]) -> Array:
    """Log scores of rows by a mixture of normals whose size a fifth of the rows chooses."""
    rng = np.random.default_rng(0)
    x, _ = _dequantised(encoder, train, rng)
    loc, scale = x.mean(0), x.std(0) + 1e-12
    y = (x - loc) / scale
    order = rng.permutation(len(y))
    held, rest = y[order[: len(y) // 5]], y[order[len(y) // 5 :]]
    make = lambda k, reg: GaussianMixture(k, reg_covar=reg, n_init=2, random_state=0)  # noqa: E731
    settings = [(k, reg) for k in COMPONENTS for reg in (1e-6, 1e-2) if k < len(rest) // 2]
    best = max(settings, key=lambda s: make(*s).fit(rest).score(held))
    fitted = make(*best).fit(y)
    scores = []
    for _ in range(DRAWS):
        x, log_mass = _dequantised(encoder, test, rng)
        scores.append(fitted.score_samples((x - loc) / scale) - np.log(scale).sum() + log_mass)
    return special.logsumexp(scores, axis=0) - np.log(DRAWS)


def copula(encoder: Encoder, train: dict[str, Array], test: dict[str, Array]) -> Array:
    """Log scores by a Gaussian copula with the marginals of the encoder."""
    rng = np.random.default_rng(0)
    y = np.concatenate([_scores(encoder, train, train, rng)[0] for _ in range(5)])
    covariance = ledoit_wolf(y, assume_centered=True)[0]
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    scores = []
    for _ in range(DRAWS):
        y, log_marginal = _scores(encoder, train, test, rng)
        joint = stats.multivariate_normal.logpdf(y, np.zeros(len(scale)), correlation)
        scores.append(np.reshape(joint, -1) - stats.norm.logpdf(y).sum(1) + log_marginal)
    return special.logsumexp(scores, axis=0) - np.log(DRAWS)


def _scores(
    encoder: Encoder, train: dict[str, Array], found: dict[str, Array], rng: np.random.Generator
) -> tuple[Array, Array]:
    """(normal scores [n, F], those of cells drawn evenly; the log of all marginals)."""
    seen, rows = encoder.encode(train), encoder.encode(found)
    scores, logs = [], np.zeros(len(rows))
    for number, field in enumerate(encoder.fields):
        z, below, above, _ = rows[:, number].T
        u = rng.uniform(size=len(z))
        if field.kind == "cell":
            low, high = stats.norm.cdf(z - below), stats.norm.cdf(z + above)
        elif field.kind == "category":
            count = np.bincount(seen[:, number, 0].astype(int), minlength=field.size) + 0.5
            edges = np.concatenate([[0], np.cumsum(count / count.sum())])
            low, high = edges[z.astype(int)], edges[z.astype(int) + 1]
        else:
            logs += stats.norm.logpdf(z) + below
            scores.append(z)
            continue
        logs += np.log(np.maximum(high - low, 1e-300))
        scores.append(stats.norm.ppf(np.clip(low + u * (high - low), 1e-9, 1 - 1e-9)))
    return np.stack(scores, 1), logs
