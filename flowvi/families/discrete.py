"""Bernoulli and categorical families, whose parameters are the context, and from 0 to 1."""

import dataclasses
import functools
from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Params, Shape, shown, shown_shape
from flowvi.families.parametric import Parametric, independent
from flowvi.supports import Binary, Integers, OneHot, Support, UnitInterval


class BinaryDistribution(distrax.Bernoulli):
    """A Bernoulli distribution that gives no probability to what is neither 0 nor 1."""

    @property
    def atoms(self) -> Array:
        """0 and 1; see `flowvi.distributions.support`."""
        return jnp.arange(2, dtype=self.dtype)

    def log_prob(self, value: Array) -> Array:
        """log p(value) = value * logits - softplus(logits); -inf where value is not 0 or 1."""
        value = jnp.asarray(value)
        log_prob = value * self.logits - jax.nn.softplus(self.logits)
        return jnp.where((value == 0) | (value == 1) | jnp.isnan(value), log_prob, -jnp.inf)


@dataclasses.dataclass(frozen=True, repr=False)
class BernoulliFamily(Parametric):
    """Independent binary numbers; see `bernoulli`."""

    event_shape: Shape
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        return shown("bernoulli", shown_shape(self.event_shape))

    @functools.cached_property
    def support(self) -> Support:
        return Binary(self.event_shape)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits."""
        return {"logits": self.event_shape}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        logits = arguments["logits"]
        return independent(BinaryDistribution(logits, dtype=logits.dtype), self.event_shape)


def bernoulli(event_shape: int | Shape) -> BernoulliFamily:
    """Independent binary numbers, whose logits are the context.

        log p(x) = sum_i x_i logits_i - softplus(logits_i)

    Args:
        event_shape: the shape of an event, or its size. It is also the shape of the context,
            unless that is a dict: {"logits"}.

    Raises:
        ValueError, TypeError: if it is not of this kind.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.bernoulli((8, 8))
        >>> family.sample({}, jax.random.key(0), 2, jnp.zeros((5, 8, 8))).shape
        (2, 5, 8, 8)
        >>> family.check_support(jnp.full((5, 8, 8), 0.3))
        Traceback (most recent call last):
        ...
        ValueError: `x` must hold only 0 and 1 for bernoulli((8, 8)); got 0.3 in row 0, ...
    """
    return BernoulliFamily(checks.shape("event_shape", event_shape))


class ClassDistribution(distrax.Categorical):
    """A categorical distribution that gives no probability to what is no number of a class."""

    @property
    def atoms(self) -> Array:
        """0, ..., K - 1; see `flowvi.distributions.support`."""
        return jnp.arange(self.num_categories, dtype=self.dtype)

    def log_prob(self, value: Array) -> Array:
        """log p(value); -inf where value is none of 0, ..., K - 1."""
        value = jnp.asarray(value)[..., None]
        matches = value == jnp.arange(self.num_categories)
        log_probs = jnp.sum(jnp.where(matches, jax.nn.log_softmax(self.logits), 0), -1)
        log_probs = jnp.where(jnp.any(matches, -1), log_probs, -jnp.inf)
        return jnp.where(jnp.isnan(value[..., 0]), jnp.nan, log_probs)


@dataclasses.dataclass(frozen=True, repr=False)
class CategoricalFamily(Parametric):
    """Independent numbers of classes; see `categorical`."""

    event_shape: Shape
    num_classes: int
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        return shown("categorical", shown_shape(self.event_shape), self.num_classes)

    @functools.cached_property
    def support(self) -> Support:
        return Integers(self.event_shape, self.num_classes)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits, with a last axis of classes."""
        return {"logits": (*self.event_shape, self.num_classes)}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        return independent(ClassDistribution(arguments["logits"]), self.event_shape)


class OneHotDistribution(distrax.OneHotCategorical):
    """A categorical distribution over rows of the identity."""

    @property
    def atoms(self) -> Array:
        """The rows of the identity; see `flowvi.distributions.support`."""
        return jnp.eye(self.num_categories, dtype=self.dtype)

    def log_prob(self, value: Array) -> Array:
        """log p(value); -inf where value is no row of the identity."""
        value = jnp.asarray(value)
        log_probs = jnp.sum(jnp.where(value == 0, 0, value * jax.nn.log_softmax(self.logits)), -1)
        is_row = jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == 1)
        return jnp.where(is_row | jnp.isnan(log_probs), log_probs, -jnp.inf)


@dataclasses.dataclass(frozen=True, repr=False)
class OneHotFamily(Parametric):
    """Independent classes as rows of the identity; see `categorical`."""

    places: Shape
    num_classes: int
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        return shown("categorical", shown_shape(self.places), self.num_classes, one_hot=True)

    @functools.cached_property
    def support(self) -> Support:
        return OneHot(self.event_shape)

    @property
    def event_shape(self) -> Shape:
        """That of the numbers, with a last axis of classes."""
        return (*self.places, self.num_classes)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits, of the event's shape."""
        return {"logits": self.event_shape}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        logits = arguments["logits"]
        return independent(OneHotDistribution(logits, dtype=logits.dtype), self.event_shape)


def categorical(event_shape: int | Shape, num_classes: int, *, one_hot: bool = False) -> Parametric:
    """Independent numbers of classes 0, ..., K - 1, whose logits are the context.

        log p(x) = sum_i log softmax(logits_i)[x_i]

    Args:
        event_shape: the shape of an event, or its size; () for one number.
        num_classes: K. The context is of shape [*batch, *event_shape, K], or a dict: {"logits"}.
        one_hot: whether a class is a row of the identity instead of a number, as the latents of a
            network want to be. The event then has a last axis of classes.

    Raises:
        ValueError, TypeError: if an argument is not of this kind.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.categorical((), 10)
        >>> family.log_prob({}, jnp.array([3, 1]), jnp.zeros((2, 10)))
        Array([-2.3025851, -2.3025851], dtype=float32)
        >>> codes = fv.categorical(2, 3, one_hot=True)
        >>> codes.sample({}, jax.random.key(0), 5, jnp.zeros((2, 3))).shape
        (5, 2, 3)
    """
    shape = checks.shape("event_shape", event_shape)
    num_classes = checks.positive_int("num_classes", num_classes)
    return (OneHotFamily if one_hot else CategoricalFamily)(shape, num_classes)


# -------------------------------------------------------------------------- numbers from 0 to 1

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


@dataclasses.dataclass(frozen=True, repr=False)
class ContinuousBernoulliFamily(Parametric):
    """Independent numbers between 0 and 1; see `continuous_bernoulli`."""

    event_shape: Shape
    reparameterized: bool = dataclasses.field(default=True, init=False)

    def __repr__(self) -> str:
        return shown("continuous_bernoulli", shown_shape(self.event_shape))

    @functools.cached_property
    def support(self) -> Support:
        return UnitInterval(self.event_shape)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits."""
        return {"logits": self.event_shape}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        return independent(ContinuousBernoulliDistribution(arguments["logits"]), self.event_shape)


def continuous_bernoulli(event_shape: int | Shape) -> ContinuousBernoulliFamily:
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
