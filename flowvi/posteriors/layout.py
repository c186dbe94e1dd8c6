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
    """The names and shapes of parameters, in the order of the vector, and their joint support."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    support: Interval

    @property
    def event_size(self) -> int:
        """The length of the vector."""
        return self.support.event_shape[0]

    def constrain_and_log_det(self, u: Array) -> tuple[dict[str, Array], Array]:
        """The parameters at u of shape [..., D], and log |det d theta / du| of shape [...]."""
        theta, log_det = u, jnp.zeros(u.shape[:-1], u.dtype)
        bijector = self.support.bijector()
        if bijector is not None:
            theta, log_det = bijector.forward_and_log_det(u)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = zip(self.names, self.shapes, jnp.split(theta, ends[:-1], axis=-1), strict=True)
        return {n: part.reshape(*u.shape[:-1], *shape) for n, shape, part in parts}, log_det

    def unconstrain(self, parameters: Mapping[str, ArrayLike]) -> Array:
        """The vectors, of shape [..., D], at parameters of shapes [..., *shape]."""
        if not isinstance(parameters, Mapping) or set(parameters) != set(self.names):
            got = parameters if isinstance(parameters, Mapping) else [type(parameters).__name__]
            rule = f"`parameters` must have the names {', '.join(self.names)}"
            raise ValueError(f"{rule}; got {', '.join(map(str, got))}.")
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
    """The layout of {name: (shape, support)}, for supports as `as_support` takes them."""
    kind = type(parameters).__name__
    if not isinstance(parameters, Mapping):
        raise TypeError(f"`parameters` must be a dict such as {_FORM}; got {kind}.")
    if not parameters:
        raise ValueError(f"`parameters` must have at least one name, as in {_FORM}; got none.")
    shapes, supports = [], []
    for name, pair in parameters.items():
        if not isinstance(name, str):
            raise TypeError(f"`parameters` must have strings as names; got {name!r}.")
        place = f"parameters[{name!r}]"
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(
                f"`{place}` must be a pair (shape, support), as in {_FORM}; got {pair!r}."
            )
        shapes.append(checks.shape(f"{place}[0]", pair[0]))
        try:
            supports.append(as_support(pair[1], shapes[-1]))
            supports[-1].bijector()
        except (TypeError, ValueError) as error:
            raise type(error)(f"In `{place}`: {error}") from None
    # All of them have a bijector, so they are intervals, and so is what they are together.
    joint = cast(Interval, concatenated(supports))
    return Layout(tuple(parameters), tuple(shapes), joint)
