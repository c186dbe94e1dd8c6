"""Distributions that Distrax lacks, or lacks zero probabilities of: of classes, and from 0 to 1."""

from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi.families.family import Array, Shape


class BinaryDistribution(distrax.Bernoulli):
    """A Bernoulli distribution that gives no probability to what is neither 0 nor 1."""

    @property
    def atoms(self) -> Array:
        return jnp.arange(2, dtype=self.dtype)

    def log_prob(self, value: Array) -> Array:
        value = jnp.asarray(value)
        log_prob = value * self.logits - jax.nn.softplus(self.logits)
        return jnp.where((value == 0) | (value == 1) | jnp.isnan(value), log_prob, -jnp.inf)


class ClassDistribution(distrax.Categorical):
    """A categorical distribution that gives no probability to what is no number of a class."""

    @property
    def atoms(self) -> Array:
        return jnp.arange(self.num_categories, dtype=self.dtype)

    def log_prob(self, value: Array) -> Array:
        value = jnp.asarray(value)[..., None]
        matches = value == jnp.arange(self.num_categories)
        log_probs = jnp.sum(jnp.where(matches, jax.nn.log_softmax(self.logits), 0), -1)
        log_probs = jnp.where(jnp.any(matches, -1), log_probs, -jnp.inf)
        return jnp.where(jnp.isnan(value[..., 0]), jnp.nan, log_probs)


class OneHotDistribution(distrax.OneHotCategorical):
    """A categorical distribution over rows of the identity."""

    @property
    def atoms(self) -> Array:
        return jnp.eye(self.num_categories, dtype=self.dtype)

    def log_prob(self, value: Array) -> Array:
        value = jnp.asarray(value)
        log_probs = jnp.sum(jnp.where(value == 0, 0, value * jax.nn.log_softmax(self.logits)), -1)
        is_row = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == 1)
        return jnp.where(is_row | jnp.isnan(log_probs), log_probs, -jnp.inf)


#: Taylor coefficients of log(sinh(t) / t) in powers of t^2, from the first on.
_SERIES = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250)


def _log_sinhc(t: Array) -> Array:
    """log(sinh(t) / t), and 0 at 0, without cancellation, also in its derivatives."""
    small = jnp.abs(t) < 0.25
    # The untaken branch must stay finite, or its gradient turns into NaN.
    near, far = jnp.where(small, t, 0), jnp.where(small, 1, jnp.abs(t))
    square, series = near**2, jnp.zeros_like(t)
    for coefficient in reversed(_SERIES):
        series = (series + coefficient) * square
    return jnp.where(small, series, far + jnp.log1p(-jnp.exp(-2 * far)) - jnp.log(2 * far))


def _log_normaliser(eta: Array) -> Array:
    """log of the integral of exp(eta x) from 0 to 1, that is log((exp(eta) - 1) / eta)."""
    return eta / 2 + _log_sinhc(eta / 2)


def _derivative(function: Callable[[Array], Array], x: Array) -> Array:
    """The derivative of an elementwise function."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


class ContinuousBernoulliDistribution(distrax.Distribution):
    """The density proportional to exp(logits x) on the interval from 0 to 1."""

    def __init__(self, logits: Array):
        super().__init__()
        self.logits = jnp.asarray(logits)

    @property
    def event_shape(self) -> Shape:
        return ()

    @property
    def batch_shape(self) -> Shape:
        return self.logits.shape

    def log_prob(self, value: Array) -> Array:
        value = jnp.asarray(value)
        log_prob = value * self.logits - _log_normaliser(self.logits)
        return jnp.where((value < 0) | (value > 1), -jnp.inf, log_prob)

    def _sample_n(self, key: Array, n: int) -> Array:
        eta = self.logits
        u = jax.random.uniform(key, (n, *eta.shape), eta.dtype)
        # The inverse of the distribution function at -|eta|; the other sign mirrors it.
        v = jnp.where(eta > 0, 1 - u, u)
        small = jnp.abs(eta) < 1e-2
        minus = jnp.where(small, -1, -jnp.abs(eta))
        far = jnp.log1p(v * jnp.expm1(minus)) / minus
        far = jnp.where(eta > 0, 1 - far, far)
        near = u + eta * u * (1 - u) / 2 * (1 + eta * (1 - 2 * u) / 3)
        return jnp.clip(jnp.where(small, near, far), 0, 1)

    def mean(self) -> Array:
        return _derivative(_log_normaliser, self.logits)

    def variance(self) -> Array:
        return _derivative(lambda eta: _derivative(_log_normaliser, eta), self.logits)

    def mode(self) -> Array:
        return (self.logits > 0).astype(self.logits.dtype)

    def entropy(self) -> Array:
        return _log_normaliser(self.logits) - self.logits * self.mean()
