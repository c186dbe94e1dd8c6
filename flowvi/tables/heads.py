"""Conditional distributions of one field, by its parameters theta and what the base says of it.

Mixtures have closed distribution functions, so the mass of a cell is exact. At theta = 0 each is
what the base says, but for a little weight on other components, which must differ to learn.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jax.scipy.stats import norm

from flowvi.smooth import bounded

Array = jax.Array

#: Components of a mixture, and the logits of all but the first at the start.
COMPONENTS, LITTLE = 8, -4.0

#: Components of the mixture on a circle beside the uniform part, and how often they are wrapped.
TURNS, WRAPS = 6, 2

#: The least part of its marginal mass that the base leaves a level.
LEAST_PART = 0.05

#: A cell so narrow, in standard deviations, has the mass of its width times the density.
NARROW = 0.05


def num_params(kind: str, size: int) -> int:
    """How many parameters a field of a kind has."""
    return {"category": size, "angle": 3 * TURNS + 1}.get(kind, 3 * COMPONENTS)


def _normals(theta: Array) -> tuple[Array, Array, Array]:
    """(log weights, means, log scales) [..., K] of the mixture, in standard deviations."""
    first = np.arange(COMPONENTS) == 0
    logits, means, logs = jnp.split(theta, 3, -1)
    spread = np.where(first, 0.0, np.linspace(-2.2, 2.2, COMPONENTS))
    logits = jax.nn.log_softmax(logits + np.where(first, 0.0, LITTLE))
    return logits, means + spread, bounded(logs + np.where(first, 0.0, -0.5), 6.0)


def log_density(theta: Array, mean: Array, scale: Array, row: Array) -> Array:
    """log p of real numbers in their units, of rows [..., 3]."""
    logits, means, logs = _normals(theta)
    y = ((row[..., 0] - mean) / scale)[..., None]
    each = norm.logpdf((y - means) * jnp.exp(-logs)) - logs
    return jax.nn.logsumexp(logits + each, -1) - jnp.log(scale) + row[..., 1]


def log_mass(theta: Array, mean: Array, scale: Array, row: Array) -> Array:
    """log P of the cells of rounded numbers, of rows [..., 3]."""
    logits, means, logs = _normals(theta)
    rate = jnp.exp(-logs)
    low = (((row[..., 0] - row[..., 1] - mean) / scale)[..., None] - means) * rate
    width = ((row[..., 1] + row[..., 2]) / scale)[..., None] * rate
    return jax.nn.logsumexp(logits + log_normal_mass(low, width), -1)


def log_normal_mass(low: Array, width: Array) -> Array:
    """log (Phi(low + width) - Phi(low)), also of narrow cells and far from zero."""
    high = low + width
    swap = low + high > 0
    a, b = jnp.where(swap, -high, low), jnp.where(swap, -low, high)
    is_narrow = width < NARROW
    # Neither branch may see what only the other one can take, or gradients are NaN.
    wide = jnp.where(is_narrow, b - 1.0, a)
    gap = log_ndtr(wide) - log_ndtr(b)
    plain = log_ndtr(b) + jnp.log1p(-jnp.exp(jnp.minimum(gap, -1e-7)))
    thin = jnp.where(is_narrow, width, NARROW)
    middle = 0.5 * (a + b)
    log_thin = norm.logpdf(middle) + jnp.log(thin) + thin**2 * (middle**2 - 1) / 24
    return jnp.where(is_narrow, log_thin, plain)


def pick(uniform: Array, logits: Array) -> Array:
    """One of some places by their logits [..., K], of a uniform number [...]."""
    parts = jnp.cumsum(jax.nn.softmax(logits), -1)
    found = jnp.sum(uniform[..., None] * parts[..., -1:] >= parts, -1)
    return jnp.minimum(found, logits.shape[-1] - 1)


def draw_score(noise: tuple[Array, Array], theta: Array, mean: Array, scale: Array) -> Array:
    """A normal score, of a real number or of a cell; of (uniform, normal) noise."""
    logits, means, logs = _normals(theta)
    chosen = pick(noise[0], logits)[..., None]
    at = lambda each: jnp.take_along_axis(each, chosen, -1)[..., 0]  # noqa: E731
    return mean + scale * (at(means) + jnp.exp(at(logs)) * noise[1])


def log_levels(theta: Array, start: Array, linear: Array) -> Array:
    """Log probabilities [..., L]: the base's, which are linear in scores, times exp(theta).

    Args:
        theta: of shape [..., L].
        start: log marginal probabilities [L], -inf where there is no level.
        linear: of shape [..., L - 1 or 0], what regression says of the indicators of levels 1, ...
    """
    marginal = jnp.exp(start)
    if linear.shape[-1]:
        first = 1 - jnp.sum(linear, -1, keepdims=True)
        found = jnp.concatenate([first, linear], -1)
        part = jnp.maximum(found, LEAST_PART * marginal)
        base = jnp.where(marginal > 0, jnp.log(jnp.where(marginal > 0, part, 1.0)), -jnp.inf)
    else:
        base = start
    return jax.nn.log_softmax(base + bounded(theta, 30.0))


def _turns(theta: Array) -> tuple[Array, Array, Array]:
    logits, centers, logs = jnp.split(theta[..., 1:], 3, -1)
    logits = jnp.concatenate([theta[..., :1] + 2.0, logits], -1)
    even = np.arange(TURNS) * (2 * math.pi / TURNS)
    return jax.nn.log_softmax(logits), centers + even, bounded(logs - 0.5, 4.0) - 0.5


def log_circular(theta: Array, row: Array) -> Array:
    """log p of angles: a uniform part and wrapped normals, of rows [..., 3].

    Standard deviations are at most e^(3.5) radians, where a wrapped normal is uniform as well.
    """
    logits, centers, logs = _turns(theta)
    off = row[..., :1] - centers
    off = jnp.mod(off + math.pi, 2 * math.pi) - math.pi
    # Broad ones would need many turns: their densities are capped to what few of them hold.
    scale = jnp.minimum(jnp.exp(logs), 2.5)[..., None]
    turns = off[..., None] + 2 * math.pi * np.arange(-WRAPS, WRAPS + 1)
    each = jax.nn.logsumexp(norm.logpdf(turns / scale) - jnp.log(scale), -1)
    uniform = jnp.full((*each.shape[:-1], 1), -math.log(2 * math.pi))
    both = jnp.concatenate([uniform, each], -1)
    return jax.nn.logsumexp(logits + both, -1) + row[..., 1]


def draw_angle(noise: tuple[Array, Array], theta: Array) -> Array:
    """An angle in [0, 2 pi), of (uniform, normal) noise."""
    logits, centers, logs = _turns(theta)
    chosen = pick(noise[0], logits)
    place = jnp.maximum(chosen - 1, 0)[..., None]
    at = lambda each: jnp.take_along_axis(each, place, -1)[..., 0]  # noqa: E731
    scale = jnp.minimum(jnp.exp(at(logs)), 2.5)
    uniform = 2 * math.pi * norm.cdf(noise[1])
    drawn = jnp.where(chosen == 0, uniform, at(centers) + scale * noise[1])
    return jnp.mod(drawn, 2 * math.pi)
