"""Named parameters laid out in one vector."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.checks import require
from flowvi.params import Array, PyTree, Shape
from flowvi.supports import Support, SupportLike, as_support, concatenated

#: {name: (shape, support)}, as users write it.
Parameters = Mapping[str, tuple[int | Sequence[int], SupportLike]]

#: Parameters in the user's space: an array, or {name: array}.
Theta = PyTree

_FORM = '{"tau": ((), "positive"), "theta": ((8,), "real"), "p": ((3,), (0, 1))}'


def as_float(value: ArrayLike) -> Array:
    """An array, or what numpy can make one of, in JAX's floating precision."""
    is_array = isinstance(value, jax.Array)
    return jnp.asarray(value if is_array else np.asarray(value), jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and supports of parameters, in the order of the vector, and their joint support."""

    names: tuple[str, ...]
    supports: tuple[Support, ...]
    support: Support

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the parameters."""
        return tuple(support.event_shape for support in self.supports)

    @property
    def event_size(self) -> int:
        """The length of the vector."""
        return self.support.free_shape[0]

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
        for name, support in zip(self.names, self.supports, strict=True):
            value, shape = as_float(parameters[name]), support.event_shape
            checks.trailing_shape(name, value, shape, "this target")
            if not isinstance(value, jax.core.Tracer):  # which has no values yet
                single = value.ndim == len(shape)
                support.check(value if single else value.reshape(-1, *shape), name)
            parts.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
        theta = jnp.concatenate(parts, -1)
        bijector = self.support.bijector()
        return theta if bijector is None else bijector.inverse(theta)

    def labels(self) -> list[str]:
        """One label for each number of the parameters: "tau", "theta[0]", "m[0,1]"."""
        return labels_of(dict(zip(self.names, self.shapes, strict=True)))


def labels_of(shapes: Mapping[str, Shape]) -> list[str]:
    """One label for each number of arrays of these shapes: "tau", "theta[0]", "m[0,1]"."""
    return [
        f"{name}[{','.join(map(str, index))}]" if shape else name
        for name, shape in shapes.items()
        for index in np.ndindex(*shape)
    ]


def as_layout(parameters: Parameters) -> Layout:
    """The layout of {name: (shape, support)}, for supports as `as_support` takes them."""
    kind, is_dict = type(parameters).__name__, isinstance(parameters, Mapping)
    require(is_dict, f"`parameters` must be a dict such as {_FORM}", kind, error=TypeError, say=str)
    if not parameters:
        raise ValueError(f"`parameters` must have at least one name, as in {_FORM}; got none.")
    shapes, supports = [], []
    for name, pair in parameters.items():
        rule, place = "`parameters` must have strings as names", f"parameters[{name!r}]"
        require(isinstance(name, str), rule, name, error=TypeError)
        rule, is_pair = f"`{place}` must be a pair (shape, support)", isinstance(pair, tuple | list)
        require(is_pair and len(pair) == 2, f"{rule}, as in {_FORM}", pair, error=TypeError)
        shapes.append(checks.shape(f"{place}[0]", pair[0]))
        try:
            supports.append(as_support(pair[1], shapes[-1]))
            supports[-1].bijector()
        except (TypeError, ValueError) as error:
            raise type(error)(f"In `{place}`: {error}") from None
    return Layout(tuple(parameters), tuple(supports), concatenated(supports))
