"""Checks of arguments, so that every room words its complaints the same way.

A message reads ``` `name` must RULE; got VALUE. FIX ```. All checks look at shapes and static
options only, so they run before anything is traced or compiled.
"""

import numbers
from collections.abc import Iterable
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Shape = tuple[int, ...]

#: The largest count or size that is accepted: XLA counts in 32 bits.
INT32_MAX = 2**31 - 1


def shown(value: object, width: int = 120) -> str:
    """The repr of a value in one short line, for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _is_int(value: object) -> TypeGuard[int]:
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integers(value: object) -> Shape | None:
    """A sequence of integers as a tuple, or None if it is something else."""
    if isinstance(value, np.ndarray | jax.Array):
        # A traced array has no values yet, and that of keys holds no integers.
        if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(value.dtype, jnp.integer):
            return None
        return tuple(value.tolist()) if value.ndim == 1 else None
    if isinstance(value, str) or not isinstance(value, Iterable):
        return None
    items = tuple(value)
    return tuple(int(item) for item in items) if all(map(_is_int, items)) else None


def positive_int(name: str, value: object, most: int = INT32_MAX) -> int:
    """`value` as an int of at least 1.

    Args:
        name: the name of the argument.
        value: an integer, or an array of no axes that holds one.
        most: the largest that is accepted.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1 or above `most`.
    """
    if not _is_int(value):
        raise TypeError(f"`{name}` must be a positive integer; got {shown(value)}.")
    if value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
    if value > most:
        raise ValueError(f"`{name}` must be at most {most}; got {value!r}.")
    return int(value)


def sizes(name: str, value: object) -> Shape:
    """`value`, a sequence or an array, as a tuple of positive integers, possibly empty.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if one of them is below 1 or above the largest 32-bit integer.
    """
    found = _integers(value)
    rule = f"`{name}` must be a sequence of positive integers"
    if found is None:
        raise TypeError(f"{rule}; got {shown(value)}.")
    if any(size < 1 for size in found):
        raise ValueError(f"{rule}; got {shown(value)}.")
    if any(size > INT32_MAX for size in found):
        raise ValueError(f"{rule} of at most {INT32_MAX}; got {shown(value)}.")
    return found


def size_or_shape(name: str, value: object) -> int | Shape:
    """`value` as a positive integer, or as a tuple of them.

    Raises:
        TypeError: if it is neither.
        ValueError: if a size is below 1 or above the largest 32-bit integer.
    """
    if isinstance(value, Iterable) and not _is_int(value):
        return sizes(name, value)
    return positive_int(name, value)


def shape(name: str, value: object) -> Shape:
    """`value` as a shape; an integer is the shape of a vector.

    Raises:
        TypeError: if it is neither an integer nor a sequence of them.
        ValueError: if a size is below 1 or above the largest 32-bit integer.
    """
    return sizes(name, (value,) if _is_int(value) else value)


def permutation(name: str, value: object, size: int | None = None) -> Shape:
    """`value`, a sequence or an array, as a tuple that holds each of 0, ..., size - 1 once.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if a number is missing, repeated or out of range.
    """
    last = "n - 1" if size is None else size - 1
    rule = f"`{name}` must hold each of 0, ..., {last} once"
    found = _integers(value)
    if found is None:
        raise TypeError(f"{rule}; got {shown(value)}.")
    if not found or sorted(found) != list(range(len(found) if size is None else size)):
        raise ValueError(f"{rule}; got {shown(found)}.")
    return found


def trailing_shape(name: str, array: ArrayLike, shape: Shape, owner: str, fix: str = "") -> None:
    """Checks that the last axes of `array` are `shape`.

    Raises:
        ValueError: if they are not; it names `owner`, whose expectation it is.
    """
    got = jnp.shape(array)
    if len(got) < len(shape) or got[len(got) - len(shape) :] != shape:
        tail = f" {fix}" if fix else ""
        raise ValueError(
            f"`{name}` must have a shape that ends in {shape} for {owner}; got shape {got}.{tail}"
        )
