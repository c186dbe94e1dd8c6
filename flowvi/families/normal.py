"""Normal families: standard, mean-field and full-rank."""

import dataclasses

import distrax
import jax.numpy as jnp

from flowvi import checks
from flowvi.bijectors import Units
from flowvi.families.family import Array, Params, Shape
from flowvi.families.flow import Flow, StandardNormal
from flowvi.families.parametric import positive


@dataclasses.dataclass(frozen=True)
class LocationScale:
    """The map y = loc + scale x, coordinate by coordinate."""

    event_size: int
    name = "mean_field"

    def init(self, key: Array) -> Params:
        del key
        return {"loc": jnp.zeros(self.event_size), "raw_scale": jnp.zeros(self.event_size)}

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        del context
        return Units(params["loc"], positive(params["raw_scale"]))


@dataclasses.dataclass(frozen=True)
class LocationTriangular:
    """The map y = loc + L x with a lower triangular L."""

    event_size: int
    name = "full_rank"

    def init(self, key: Array) -> Params:
        del key
        size = self.event_size
        return {"loc": jnp.zeros(size), "raw_factor": jnp.zeros((size, size))}

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        del context
        raw = params["raw_factor"]
        factor = jnp.tril(raw, -1) + jnp.diag(positive(jnp.diag(raw)))
        shift = distrax.Block(distrax.Shift(params["loc"]), 1)
        return distrax.Chain([shift, distrax.TriangularLinear(factor, is_lower=True)])


def standard_normal(event_shape: int | Shape) -> StandardNormal:
    """Independent standard normals; a family without parameters.

    Args:
        event_shape: the shape of an event, or its size.

    Raises:
        ValueError, TypeError: if it is none.

    Example:
        >>>         >>> import flowvi as fv
        >>> fv.standard_normal(2).sample({}, jax.random.key(0), 3).shape
        (3, 2)
    """
    return StandardNormal(checks.shape("event_shape", event_shape))


def mean_field(event_size: int) -> Flow:
    """A normal with independent coordinates: y = loc + scale x.

    Args:
        event_size: D.

    Raises:
        ValueError, TypeError: if it is not a positive integer.

    Example:
        >>>         >>> import flowvi as fv
        >>> family = fv.mean_field(2)
        >>> family.distribution(family.init(jax.random.key(0))).variance()
        Array([1., 1.], dtype=float32)
    """
    size = checks.positive_int("event_size", event_size)
    return Flow(standard_normal(size), LocationScale(size))


def full_rank(event_size: int) -> Flow:
    """A normal with any covariance: y = loc + L x with a lower triangular L of positive diagonal.

    Args:
        event_size: D.

    Raises:
        ValueError, TypeError: if it is not a positive integer.

    Example:
        >>>         >>> import flowvi as fv
        >>> family = fv.full_rank(2)
        >>> family.distribution(family.init(jax.random.key(0))).covariance().shape
        (2, 2)
    """
    size = checks.positive_int("event_size", event_size)
    return Flow(standard_normal(size), LocationTriangular(size))
