"""Named parameters with supports, laid out in one unconstrained vector."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.supports import Interval, SupportLike, as_support, concatenated

Array = jax.Array
Shape = tuple[int, ...]

#: {name: (shape, support)}, as users write it.
Parameters = Mapping[str, tuple[int | Sequence[int], SupportLike]]

_FORM = '{"tau": ((), "positive"), "theta": ((8,), "real"), "p": ((3,), (0, 1))}'


def as_float(value: ArrayLike) -> Array:
    """An array, or what numpy can make one of, in JAX's floating precision."""
    is_array = isinstance(value, jax.Array)
    return jnp.asarray(value if is_array else np.asarray(value), jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each named parameter stands in the vector, and what its support is.

    `flowvi.supports.Interval` says which coordinate u a parameter theta has, and log |d theta / du|
    is 0, u, u, or log(high - low) + log sigmoid(u) + log sigmoid(-u).

    Attributes:
        names: the parameters' names, in the order of the vector.
        shapes: their shapes.
        support: that of all of them, one after the other.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    support: Interval

    @property
    def event_size(self) -> int:
        """The length of the vector."""
        return self.support.event_shape[0]

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
        bijector = self.support.bijector()
        if bijector is None:
            return self.split(u), jnp.zeros(u.shape[:-1], u.dtype)
        theta, log_det = bijector.forward_and_log_det(u)
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
        bijector = self.support.bijector()
        return theta if bijector is None else bijector.inverse(theta)

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
    shapes, supports = [], []
    for name, pair in parameters.items():
        if not isinstance(name, str):
            raise TypeError(f"`parameters` must have strings as names; got {name!r}.")
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(
                f"`parameters[{name!r}]` must be a pair (shape, support), as in {_FORM}; got "
                f"{pair!r}."
            )
        shape = checks.shape(f"parameters[{name!r}][0]", pair[0])
        try:
            support = as_support(pair[1], shape)
            support.bijector()
        except (TypeError, ValueError) as error:
            raise type(error)(f"In `parameters[{name!r}]`: {error}") from None
        shapes.append(shape)
        supports.append(support)
    joint = concatenated(supports)
    return Layout(tuple(parameters), tuple(shapes), cast(Interval, joint))
