"""Contexts made of named parts, such as x, z and covariates: those that a family has room for."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from jax.typing import ArrayLike

from flowvi.params import Array, Shape


@dataclasses.dataclass(frozen=True)
class Parts:
    """The named parts that a family's context is made of, with the shape of each.

    No part is no context, one part is the context as it is, and several stand flattened in one
    vector, one after the other.
    """

    shapes: tuple[tuple[str, Shape], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Shape], names: Iterable[str]) -> "Parts":
        """The parts of these names."""
        return cls(tuple((name, shapes[name]) for name in names))

    @property
    def shape(self) -> Shape | None:
        """The shape of the context."""
        shapes = [shape for _, shape in self.shapes]
        if len(shapes) < 2:
            return shapes[0] if shapes else None
        return (sum(map(math.prod, shapes)),)

    def __contains__(self, name: str) -> bool:
        return name in dict(self.shapes)

    def __call__(self, given: Mapping[str, ArrayLike]) -> Array | None:
        """The context, of parts whose leading axes broadcast; others are left alone."""
        arrays = [jnp.asarray(given[name]) for name, _ in self.shapes]
        if len(arrays) < 2:
            return arrays[0] if arrays else None
        pairs = [
            (a, a.shape[: a.ndim - len(s)]) for a, (_, s) in zip(arrays, self.shapes, strict=True)
        ]
        rows = jnp.broadcast_shapes(*(own for _, own in pairs))
        flat = [a.reshape(*own, math.prod(a.shape[len(own) :])) for a, own in pairs]
        return jnp.concatenate([jnp.broadcast_to(a, rows + a.shape[-1:]) for a in flat], -1)


def fitting(
    wanted: Shape | None, shapes: Mapping[str, Shape], choices: Iterable[tuple[str, ...]]
) -> Parts | None:
    """The first of these choices of parts that makes a context of the shape wanted, if one does."""
    made = (Parts.of(shapes, names) for names in choices)
    return next((parts for parts in made if parts.shape == wanted), None)
