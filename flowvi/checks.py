"""Checks of arguments, so that every room words its complaints the same way.

A message reads ``` `name` must RULE; got VALUE. FIX ```. All checks look at shapes and static
options only, so they run before anything is traced or compiled. What is of the wrong type is a
TypeError, all else a ValueError.
"""

import numbers
from collections.abc import Callable, Iterable
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Shape = tuple[int, ...]

#: The largest count or size that is accepted: XLA counts in 32 bits.
INT32_MAX = 2**31 - 1


def require(
    condition: object,
    rule: str,
    got: object,
    fix: str = "",
    error: type[Exception] = ValueError,
    say: Callable[[object], str] = repr,
) -> None:
    """Raises an error that reads "RULE; got GOT. FIX" unless the condition holds."""
    if not condition:
        raise error(f"{rule}; got {say(got)}. {fix}".rstrip())


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
    """`value`, an integer or an array that holds one, as an int between 1 and `most`."""
    if not _is_int(value):
        raise TypeError(f"`{name}` must be a positive integer; got {shown(value)}.")
    if not 1 <= value <= most:
        rule = "a positive integer" if value < 1 else f"at most {most}"
        raise ValueError(f"`{name}` must be {rule}; got {value!r}.")
    return int(value)


def sizes(name: str, value: object) -> Shape:
    """`value`, a sequence or an array, as a tuple of positive integers, possibly empty."""
    found = _integers(value)
    rule = f"`{name}` must be a sequence of positive integers"
    if found is None:
        raise TypeError(f"{rule}; got {shown(value)}.")
    if max(found, default=1) > INT32_MAX:
        rule = f"{rule} of at most {INT32_MAX}"
    if any(not 1 <= size <= INT32_MAX for size in found):
        raise ValueError(f"{rule}; got {shown(value)}.")
    return found


def size_or_shape(name: str, value: object) -> int | Shape:
    """`value` as a positive integer, or as a tuple of them."""
    if isinstance(value, Iterable) and not _is_int(value):
        return sizes(name, value)
    return positive_int(name, value)


def shape(name: str, value: object) -> Shape:
    """`value` as a shape; an integer is the shape of a vector."""
    return sizes(name, (value,) if _is_int(value) else value)


def permutation(name: str, value: object, size: int | None = None) -> Shape:
    """`value`, a sequence or an array, as a tuple that holds each of 0, ..., size - 1 once."""
    rule = f"`{name}` must hold each of 0, ..., {'n - 1' if size is None else size - 1} once"
    found = _integers(value)
    if found is None:
        raise TypeError(f"{rule}; got {shown(value)}.")
    if not found or sorted(found) != list(range(len(found) if size is None else size)):
        raise ValueError(f"{rule}; got {shown(found)}.")
    return found


def trailing_shape(name: str, array: ArrayLike, shape: Shape, owner: str, fix: str = "") -> None:
    """Checks that the last axes of `array` are `shape`, which `owner` expects."""
    got = jnp.shape(array)
    if len(got) < len(shape) or got[len(got) - len(shape) :] != shape:
        rule = f"`{name}` must have a shape that ends in {shape} for {owner}"
        raise ValueError(f"{rule}; got shape {got}. {fix}".rstrip())
