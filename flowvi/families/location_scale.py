"""Families with a location and a scale: normal, Laplace, logistic and Gumbel."""

import dataclasses
import math
from typing import Literal

import distrax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.distributions import FlowDistribution
from flowvi.families.family import Array, Params, Shape, shown, shown_shape
from flowvi.families.parametric import Parametric, independent, positive

NOISES = {
    "normal": distrax.Normal,
    "laplace": distrax.Laplace,
    "logistic": distrax.Logistic,
    "gumbel": distrax.Gumbel,
}


@dataclasses.dataclass(frozen=True, repr=False)
class LocationScaleFamily(Parametric):
    """The distribution of y = loc + scale x, x of independent standard noise; see `gaussian`."""

    event_shape: Shape
    noise: str = "normal"
    scale: float | str = "predicted"
    reparameterized: bool = dataclasses.field(default=True, init=False)

    def __repr__(self) -> str:
        name = "gaussian" if self.noise == "normal" else self.noise
        scale = None if self.scale == "predicted" else self.scale
        return shown(name, shown_shape(self.event_shape), scale=scale)

    @property
    def arguments(self) -> dict[str, Shape]:
        """The location, and the scale where it is predicted."""
        both = {"loc": self.event_shape, "scale": self.event_shape}
        return both if self.scale == "predicted" else {"loc": self.event_shape}

    def init(self, key: Array) -> Params:
        """{"scale"} where it is learned: 0, which stands for 1."""
        del key
        return {"scale": jnp.zeros(())} if self.scale == "learned" else {}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        loc = arguments["loc"]
        if isinstance(self.scale, float):
            scale = jnp.asarray(self.scale, loc.dtype)
        else:
            scale = positive(arguments["scale"] if "scale" in arguments else params["scale"])
        return independent(NOISES[self.noise](loc, scale), self.event_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class FullGaussian(Parametric):
    """A normal distribution with any covariance, of a context; see `gaussian`."""

    event_shape: Shape
    reparameterized: bool = dataclasses.field(default=True, init=False)

    def __repr__(self) -> str:
        return shown("gaussian", shown_shape(self.event_shape), scale="full")

    @property
    def arguments(self) -> dict[str, Shape]:
        """The location, and the lower triangle of L row by row."""
        (size,) = self.event_shape
        return {"loc": (size,), "factor": (size * (size + 1) // 2,)}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        (size,) = self.event_shape
        loc, raw = arguments["loc"], arguments["factor"]
        rows, columns = np.tril_indices(size)
        scale = positive(raw[..., rows == columns])
        # In units of the row's scale, so that a scale near zero leaves the matrix well conditioned.
        entries = jnp.where(rows == columns, 1, raw * size**-0.5) * scale[..., rows]
        factor = jnp.zeros((*raw.shape[:-1], size, size), raw.dtype).at[..., rows, columns]
        linear = distrax.TriangularLinear(factor.set(entries), is_lower=True)
        normal = distrax.Normal(jnp.zeros(size, loc.dtype), jnp.ones(size, loc.dtype))
        return FlowDistribution(
            distrax.Independent(normal, 1),
            distrax.Chain([distrax.Block(distrax.Shift(loc), 1), linear]),
            batch_shape=loc.shape[:-1],
            dtype=loc.dtype,
        )


Scale = float | Literal["predicted", "learned"]


def _location_scale(
    noise: str, event_shape: int | Shape, scale: object, more: str = ""
) -> LocationScaleFamily:
    shape = checks.shape("event_shape", event_shape)
    rule = f'"predicted", "learned"{more} or a positive number'
    if isinstance(scale, bool) or not isinstance(scale, int | float | str):
        raise TypeError(f"`scale` must be {rule}; got {scale!r}.")
    if isinstance(scale, str):
        if scale not in ("predicted", "learned"):
            raise ValueError(f"`scale` must be {rule}; got {scale!r}.")
        return LocationScaleFamily(shape, noise, scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be {rule}; got {scale!r}.")
    return LocationScaleFamily(shape, noise, float(scale))


def gaussian(
    event_shape: int | Shape, *, scale: Scale | Literal["full"] = "predicted"
) -> Parametric:
    """A normal distribution whose parameters are the context.

        y = loc + scale x,   x standard normal

    As a posterior, `fv.conditional(fv.gaussian(8), encoder)`, its KL divergence from a standard
    normal prior is exact; as a likelihood it is a model of real numbers.

    Args:
        event_shape: the shape of an event, or its size.
        scale: where the scale comes from:

            - "predicted": the context is loc and a scale for each coordinate, which a softplus
              makes positive: {"loc", "scale"}, or one array with the last axis twice as long;
            - "full": for vectors, the context is loc and the lower triangle of L, in y = loc + L x,
              row by row: {"loc", "factor"}, or one array of length D + D (D + 1) / 2. A softplus
              makes the diagonal positive, and a row is in units of its diagonal and of D^(1/2);
            - "learned": the context is loc, and one scale for everything is a parameter;
            - a positive number: the context is loc.

    Raises:
        ValueError, TypeError: if an argument is not of this kind.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.gaussian(3)
        >>> params = family.init(jax.random.key(0))
        >>> family.distribution(params, jnp.zeros((5, 6))).batch_shape
        (5,)
        >>> context = {"loc": jnp.zeros((5, 3)), "scale": jnp.zeros((5, 3))}
        >>> family.sample(params, jax.random.key(0), 2, context).shape
        (2, 5, 3)
    """
    if isinstance(scale, str) and scale == "full":
        shape = checks.shape("event_shape", event_shape)
        if len(shape) != 1:
            raise ValueError(
                f'`event_shape` must be that of a vector for `scale="full"`; got {shape}.'
            )
        return FullGaussian(shape)
    return _location_scale("normal", event_shape, scale, ', "full"')


def laplace(event_shape: int | Shape, *, scale: Scale = "predicted") -> LocationScaleFamily:
    """A Laplace distribution whose parameters are the context: log p = -|y - loc| / scale + c.

    Its arguments and errors are those of `gaussian`, without "full".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.laplace(3, scale=2.0)
        >>> params = family.init(jax.random.key(0))
        >>> family.sample(params, jax.random.key(0), 2, jnp.zeros((5, 3))).shape
        (2, 5, 3)
    """
    return _location_scale("laplace", event_shape, scale)


def logistic(event_shape: int | Shape, *, scale: Scale = "predicted") -> LocationScaleFamily:
    """A logistic distribution whose parameters are the context.

        P(Y < y) = 1 / (1 + exp(-(y - loc) / scale))

    Its arguments and errors are those of `gaussian`, without "full".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> fv.logistic(3).log_prob({}, jnp.zeros(3), jnp.zeros((5, 6))).shape
        (5,)
    """
    return _location_scale("logistic", event_shape, scale)


def gumbel(event_shape: int | Shape, *, scale: Scale = "predicted") -> LocationScaleFamily:
    """A Gumbel distribution whose parameters are the context.

        P(Y < y) = exp(-exp(-(y - loc) / scale))

    Its arguments and errors are those of `gaussian`, without "full".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> fv.gumbel(3).log_prob({}, jnp.zeros(3), jnp.zeros((5, 6))).shape
        (5,)
    """
    return _location_scale("gumbel", event_shape, scale)
