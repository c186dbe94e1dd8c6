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


def _integers(value: object, rule: str) -> Shape:
    """A sequence of integers as a tuple; an error that begins with the rule for something else."""
    items: object = None
    if isinstance(value, np.ndarray | jax.Array):
        # A traced array has no values yet, and that of keys holds no integers.
        has_values = not isinstance(value, jax.core.Tracer) and value.ndim == 1
        if has_values and jnp.issubdtype(value.dtype, jnp.integer):
            items = value.tolist()
    elif isinstance(value, Iterable) and not isinstance(value, str):
        items = tuple(value)
    if not isinstance(items, list | tuple) or not all(map(_is_int, items)):
        raise TypeError(f"{rule}; got {shown(value)}.")
    return tuple(map(int, items))


def positive_int(name: str, value: object, most: int = INT32_MAX) -> int:
    """`value`, an integer or an array that holds one, as an int between 1 and `most`."""
    if not _is_int(value):
        raise TypeError(f"`{name}` must be a positive integer; got {shown(value)}.")
    rule = "a positive integer" if value < 1 else f"at most {most}"
    require(1 <= value <= most, f"`{name}` must be {rule}", value)
    return int(value)


def optional_int(name: str, value: object) -> int | None:
    """`value` as `positive_int` gives it, or None."""
    return None if value is None else positive_int(name, value)


def sizes(name: str, value: object) -> Shape:
    """`value`, a sequence or an array, as a tuple of positive integers, possibly empty."""
    rule = f"`{name}` must be a sequence of positive integers"
    found = _integers(value, rule)
    if max(found, default=1) > INT32_MAX:
        rule = f"{rule} of at most {INT32_MAX}"
    require(all(1 <= size <= INT32_MAX for size in found), rule, value, say=shown)
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
    found = _integers(value, rule)
    wanted = range(len(found) if size is None else size)
    require(found and sorted(found) == list(wanted), rule, found, say=shown)
    return found


def trailing_shape(name: str, array: ArrayLike, shape: Shape, owner: str, fix: str = "") -> None:
    """Checks that the last axes of `array` are `shape`, which `owner` expects."""
    got = jnp.shape(array)
    fits = len(got) >= len(shape) and got[len(got) - len(shape) :] == shape
    rule = f"`{name}` must have a shape that ends in {shape} for {owner}"
    require(fits, rule, f"shape {got}", fix, say=str)
