"""Concrete distributions: continuous relaxations of Bernoulli and of categorical ones.

Draws are made as logits y and densities are taken there, where nothing is rounded to 0 or 1. A
draw that rounding would put on one of these is the number next to it, so that it has a density.

Source: Maddison, Mnih, Teh, "The Concrete Distribution", 2017; Jang, Gu, Poole, "Categorical
Reparameterization with Gumbel-Softmax", 2017.
"""

import math
from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flowvi.params import Array, Shape


class Concrete(distrax.Distribution):
    """What both have in common: logits of shape [*batch, *event], and the temperature T.

    `_draw(key, n)` are n draws of y, `_value(y)` is z there, and `_log_prob(y)` is log p(z).
    """

    _draw: Callable[..., Array]
    _value: Callable[..., Array]
    _log_prob: Callable[..., Array]

    def __init__(self, logits: Array, temperature: ArrayLike):
        super().__init__()
        self._logits, self._temperature = logits, jnp.asarray(temperature, logits.dtype)

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(batch_shape={self.batch_shape}, event_shape={self.event_shape})"

    @property
    def batch_shape(self) -> Shape:
        return self._logits.shape[: self._logits.ndim - len(self.event_shape)]

    @property
    def dtype(self) -> jnp.dtype:
        return self._logits.dtype

    def _sample_n(self, key: Array, n: int) -> Array:
        return self._value(self._draw(key, n))

    def _sample_n_and_log_prob(self, key: Array, n: int) -> tuple[Array, Array]:
        y = self._draw(key, n)
        return self._value(y), self._log_prob(y)


class BinaryConcrete(Concrete):
    """The distribution of z = sigmoid((logits + L) / T), L of logistic noise, for one number.

        log p(z) = log T - logits + T y - 2 log(1 + e^(T y - logits)) - log z - log (1 - z),

    with y = log z - log (1 - z).
    """

    @property
    def event_shape(self) -> Shape:
        return ()

    def log_prob(self, value: Array) -> Array:
        return self._log_prob(jax.scipy.special.logit(_inside(jnp.asarray(value, self.dtype))))

    def _draw(self, key: Array, n: int) -> Array:
        noise = jax.random.logistic(key, (n, *self._logits.shape), self.dtype)
        return (self._logits + noise) / self._temperature

    def _value(self, y: Array) -> Array:
        return _inside(jax.nn.sigmoid(y))

    def _log_prob(self, y: Array) -> Array:
        noise = self._temperature * y - self._logits
        log_slope = jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y)
        log_density = jax.nn.log_sigmoid(noise) + jax.nn.log_sigmoid(-noise)
        return jnp.log(self._temperature) + log_density - log_slope


class OneHotConcrete(Concrete):
    """The distribution of z = softmax((logits + G) / T), G of Gumbel noise, over K classes.

        log p(z) = log (K - 1)! + (K - 1) log T - K log sum_k e^{logits_k} z_k^{-T}
                   + sum_k (logits_k - (T + 1) log z_k)

    a density with respect to all but one of the coordinates.
    """

    @property
    def event_shape(self) -> Shape:
        return self._logits.shape[-1:]

    def log_prob(self, value: Array) -> Array:
        return self._log_prob(jnp.log(_inside(jnp.asarray(value, self.dtype), upper=False)))

    def _draw(self, key: Array, n: int) -> Array:
        noise = jax.random.gumbel(key, (n, *self._logits.shape), self.dtype)
        return jax.nn.log_softmax((self._logits + noise) / self._temperature)

    def _value(self, y: Array) -> Array:
        return _inside(jnp.exp(y), upper=False)

    def _log_prob(self, y: Array) -> Array:
        count, t = self._logits.shape[-1], self._temperature
        total = jax.nn.logsumexp(self._logits - t * y, -1)
        each = jnp.sum(self._logits - (t + 1) * y, -1)
        return math.lgamma(count) + (count - 1) * jnp.log(t) - count * total + each


def _inside(z: Array, *, upper: bool = True) -> Array:
    """z with the number next to it in the place of 0, and if asked for of 1."""
    info = jnp.finfo(z.dtype)
    # Processors flush smaller numbers than `tiny` to zero.
    z = jnp.where((z >= 0) & (z < info.tiny), info.tiny, z)
    return jnp.where(z == 1, 1 - info.epsneg, z) if upper else z


class RelaxedDistribution(distrax.Independent):
    """A continuous distribution that stands in for a discrete one while a model is trained."""

    def __init__(self, relaxed: distrax.Distribution, discrete: distrax.Distribution):
        super().__init__(relaxed, 0)
        self.discrete = discrete

    def __repr__(self) -> str:
        return f"RelaxedDistribution({self.distribution!r})"
