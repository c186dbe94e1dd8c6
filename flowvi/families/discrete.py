"""Families of discrete observations, whose parameters are the context: Bernoulli, categorical."""

import dataclasses
from typing import Any

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Params, Shape
from flowvi.families.parametric import Parametric, independent
from flowvi.families.support import check_values


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


@dataclasses.dataclass(frozen=True)
class BernoulliFamily(Parametric):
    """Independent binary numbers; see `bernoulli`."""

    event_shape: Shape
    reparameterized: bool = dataclasses.field(default=False, init=False)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits."""
        return {"logits": self.event_shape}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        """See `Parametric.build`. Samples are of the dtype of the logits."""
        logits = arguments["logits"]
        return independent(BinaryDistribution(logits, dtype=logits.dtype), self.event_shape)

    def check_support(self, x: Any, name: str = "x") -> None:
        """See `Family.check_support`."""
        check_values(
            name,
            x,
            self,
            lambda v: (v == 0) | (v == 1),
            "hold only 0 and 1",
            "Perhaps binarise it once, `x > 0.5` or by drawing with a fixed seed, "
            "`jax.random.bernoulli(key, x)`; or take `fv.continuous_bernoulli`?",
        )


def bernoulli(event_shape: Any) -> BernoulliFamily:
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
        ValueError: `x` must hold only 0 and 1 for BernoulliFamily(event_shape=(8, 8), ...
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


@dataclasses.dataclass(frozen=True)
class CategoricalFamily(Parametric):
    """Independent numbers of classes; see `categorical`."""

    event_shape: Shape
    num_classes: int
    reparameterized: bool = dataclasses.field(default=False, init=False)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits, with a last axis of classes."""
        return {"logits": (*self.event_shape, self.num_classes)}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        """See `Parametric.build`. Samples are integers."""
        return independent(ClassDistribution(arguments["logits"]), self.event_shape)

    def check_support(self, x: Any, name: str = "x") -> None:
        """See `Family.check_support`."""
        check_values(
            name,
            x,
            self,
            lambda v: (v >= 0) & (v < self.num_classes) & (v == v // 1),
            f"hold only the numbers 0, ..., {self.num_classes - 1} of classes",
            "Perhaps give it more classes?",
        )


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


@dataclasses.dataclass(frozen=True)
class OneHotFamily(Parametric):
    """Independent classes as rows of the identity; see `categorical`."""

    places: Shape
    num_classes: int
    reparameterized: bool = dataclasses.field(default=False, init=False)

    @property
    def event_shape(self) -> Shape:  # type: ignore[override]
        """That of the numbers, with a last axis of classes."""
        return (*self.places, self.num_classes)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The logits, of the event's shape."""
        return {"logits": self.event_shape}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        """See `Parametric.build`. Samples are of the dtype of the logits."""
        logits = arguments["logits"]
        return independent(OneHotDistribution(logits, dtype=logits.dtype), self.event_shape)

    def check_support(self, x: Any, name: str = "x") -> None:
        """See `Family.check_support`."""
        check_values(
            name,
            x,
            self,
            lambda v: ((v == 0) | (v == 1)) & (v.sum(-1, keepdims=True) == 1),
            "hold only rows of the identity",
            "Perhaps use `jax.nn.one_hot(x, num_classes)`, or `one_hot=False`?",
        )


def categorical(event_shape: Any, num_classes: int, *, one_hot: bool = False) -> Parametric:
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
