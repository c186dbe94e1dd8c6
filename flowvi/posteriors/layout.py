"""Named parameters with supports, laid out in one unconstrained vector."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.bijectors import Units
from flowvi.training.units import parse_support

Array = jax.Array
Shape = tuple[int, ...]
Support = str | tuple[ArrayLike | None, ArrayLike | None] | None

#: {name: (shape, support)}, as users write it.
Parameters = Mapping[str, tuple[int | Sequence[int], Support]]

_FORM = '{"tau": ((), "positive"), "theta": ((8,), "real"), "p": ((3,), (0, 1))}'


def as_float(value: ArrayLike) -> Array:
    """An array, or what numpy can make one of, in JAX's floating precision."""
    is_array = isinstance(value, jax.Array)
    return jnp.asarray(value if is_array else np.asarray(value), jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each named parameter stands in the vector, and what its support is.

    The coordinate u of a parameter theta with support

        real                theta = u
        positive            theta = exp(u)
        (low, infinity)     theta = low + exp(u)
        (-infinity, high)   theta = high - exp(u)
        (low, high)         theta = low + (high - low) sigmoid(u)

    so log |d theta / du| is 0, u, u, u, log(high - low) + log sigmoid(u) + log sigmoid(-u).

    Attributes:
        names: the parameters' names, in the order of the vector.
        shapes: their shapes.
        lower: the lower bound of each coordinate of the vector.
        upper: the upper bound of each.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]

    @property
    def event_size(self) -> int:
        """The length of the vector."""
        return len(self.lower)

    def _map(self) -> Units | None:
        lower, upper = np.asarray(self.lower), np.asarray(self.upper)
        if not np.isfinite([lower, upper]).any():
            return None
        ones = jnp.ones(self.event_size)
        return Units(0 * ones, ones, jnp.asarray(lower), jnp.asarray(upper))

    def split(self, vector: Array) -> dict[str, Array]:
        """Cuts vectors of shape [..., D] into {name: array of shape [..., *shape]}."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = jnp.split(vector, ends[:-1], axis=-1)
        return {
            name: part.reshape(*vector.shape[:-1], *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def constrain_and_log_det(self, u: Array) -> tuple[dict[str, Array], Array]:
        """The parameters at u of shape [..., D], and log |det d theta / du| of shape [...]."""
        to_support = self._map()
        if to_support is None:
            return self.split(u), jnp.zeros(u.shape[:-1], u.dtype)
        theta, log_det = to_support.forward_and_log_det(u)
        return self.split(theta), log_det

    def unconstrain(self, parameters: Mapping[str, ArrayLike]) -> Array:
        """The vectors, of shape [..., D], at parameters of shapes [..., *shape].

        Raises:
            ValueError: if a name is missing or unknown, or a shape is wrong.
        """
        if not isinstance(parameters, Mapping) or set(parameters) != set(self.names):
            got = parameters if isinstance(parameters, Mapping) else [type(parameters).__name__]
            raise ValueError(
                f"`parameters` must have the names {', '.join(self.names)}; got "
                f"{', '.join(map(str, got))}."
            )
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            value = as_float(parameters[name])
            checks.trailing_shape(name, value, shape, "this target")
            parts.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
        theta = jnp.concatenate(parts, -1)
        to_support = self._map()
        return theta if to_support is None else to_support.inverse(theta)

    def labels(self) -> list[str]:
        """One label for each coordinate: "tau", "theta[0]", "theta[1]", "m[0,1]"."""
        return [
            f"{name}[{','.join(map(str, index))}]" if shape else name
            for name, shape in zip(self.names, self.shapes, strict=True)
            for index in np.ndindex(*shape)
        ]


def as_layout(parameters: Parameters) -> Layout:
    """The layout of {name: (shape, support)}.

    Args:
        parameters: a dict from names to pairs (shape, support); a support is "real", "positive" or
            (low, high), of which either may be None or infinite.

    Raises:
        TypeError, ValueError: if it is not of this kind.
    """
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"`parameters` must be a dict such as {_FORM}; got {type(parameters).__name__}."
        )
    if not parameters:
        raise ValueError(f"`parameters` must have at least one name, as in {_FORM}; got none.")
    shapes, lower, upper = [], [], []
    for name, pair in parameters.items():
        if not isinstance(name, str):
            raise TypeError(f"`parameters` must have strings as names; got {name!r}.")
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(
                f"`parameters[{name!r}]` must be a pair (shape, support), as in {_FORM}; got "
                f"{pair!r}."
            )
        shape = (pair[0],) if isinstance(pair[0], int) else pair[0]
        shape = checks.sizes(f"parameters[{name!r}][0]", shape)
        try:
            bounds = parse_support(pair[1], shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"In `parameters[{name!r}]`: {error}") from None
        low, high = (np.full(shape, -np.inf), np.full(shape, np.inf)) if bounds is None else bounds
        shapes.append(shape)
        lower.extend(np.ravel(low).tolist())
        upper.extend(np.ravel(high).tolist())
    return Layout(tuple(parameters), tuple(shapes), tuple(lower), tuple(upper))
