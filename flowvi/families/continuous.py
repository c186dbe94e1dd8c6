"""The continuous Bernoulli family: numbers between 0 and 1, such as grey pixels."""

import dataclasses
from typing import Any

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Params, Shape
from flowvi.families.parametric import Parametric, independent
from flowvi.families.support import check_values

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


def _derivative(function: Any, x: Array) -> Array:
    """The derivative of an elementwise function."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


class ContinuousBernoulliDistribution(distrax.Distribution):
    """The density proportional to exp(logits x) on the interval from 0 to 1.

    Args:
        logits: of any shape, which is the batch shape.
    """

    def __init__(self, logits: Array):
        super().__init__()
        self._logits = jnp.asarray(logits)

    @property
    def logits(self) -> Array:
        """The slope of the log density."""
        return self._logits

    @property
    def event_shape(self) -> Shape:
        """()."""
        return ()

    @property
    def batch_shape(self) -> Shape:
        """The shape of the logits."""
        return self._logits.shape

    def log_prob(self, value: Array) -> Array:
        """log p(value); -inf outside of the interval."""
        value = jnp.asarray(value)
        log_prob = value * self._logits - _log_normaliser(self._logits)
        return jnp.where((value < 0) | (value > 1), -jnp.inf, log_prob)

    def _sample_n(self, key: Array, n: int) -> Array:
        eta = self._logits
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
        """The mean, 1 / (1 - exp(-logits)) - 1 / logits."""
        return _derivative(_log_normaliser, self._logits)

    def variance(self) -> Array:
        """The variance."""
        return _derivative(lambda eta: _derivative(_log_normaliser, eta), self._logits)

    def mode(self) -> Array:
        """The end of the interval that the logits point to."""
        return (self._logits > 0).astype(self._logits.dtype)

    def entropy(self) -> Array:
        """The entropy in nats."""
        return _log_normaliser(self._logits) - self._logits * self.mean()


@dataclasses.dataclass(frozen=True)
class ContinuousBernoulliFamily(Parametric):
    """Independent numbers between 0 and 1; see `continuous_bernoulli`."""

    event_shape: Shape
    reparameterized: bool = dataclasses.field(default=True, init=False)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits."""
        return {"logits": self.event_shape}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        """See `Parametric.build`."""
        return independent(ContinuousBernoulliDistribution(arguments["logits"]), self.event_shape)

    def check_support(self, x: Any, name: str = "x") -> None:
        """See `Family.check_support`."""
        check_values(
            name,
            x,
            self,
            lambda v: (v >= 0) & (v <= 1),
            "hold only numbers from 0 to 1",
            "Perhaps divide by the largest?",
        )


def continuous_bernoulli(event_shape: Any) -> ContinuousBernoulliFamily:
    """Independent numbers from 0 to 1, such as grey pixels, whose logits are the context.

        log p(x) = sum_i logits_i x_i - log((exp(logits_i) - 1) / logits_i)

    It is accurate for all logits, also near 0, where the last term is 0 / 0. Samples are by the
    inverse of the distribution function and carry gradients.

    Args:
        event_shape: the shape of an event, or its size. It is also the shape of the context,
            unless that is a dict: {"logits"}.

    Raises:
        ValueError, TypeError: if it is not of this kind.

    Source: Loaiza-Ganem, Cunningham, "The Continuous Bernoulli: Fixing a Pervasive Error in
    Variational Autoencoders", 2019.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.continuous_bernoulli((8, 8))
        >>> family.log_prob({}, jnp.full((8, 8), 0.3), jnp.zeros((8, 8)))
        Array(0., dtype=float32)
    """
    return ContinuousBernoulliFamily(checks.shape("event_shape", event_shape))
