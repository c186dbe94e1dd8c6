"""Checks of arguments, so that every room words its complaints the same way.

A message reads ``` `name` must RULE; got VALUE. FIX ```. All checks look at shapes and static
options only, so they run before anything is traced or compiled.
"""

import numbers
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def positive_int(name: str, value: Any) -> int:
    """`value` as an int of at least 1.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1.
    """
    if not _is_int(value):
        raise TypeError(f"`{name}` must be a positive integer; got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
    return int(value)


def sizes(name: str, value: Any) -> Shape:
    """`value` as a tuple of positive integers, possibly empty.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if one of them is below 1.
    """
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError(f"`{name}` must be a sequence of positive integers; got {value!r}.")
    value = tuple(value)
    if not all(_is_int(size) for size in value):
        raise TypeError(f"`{name}` must be a sequence of positive integers; got {value!r}.")
    if any(size < 1 for size in value):
        raise ValueError(f"`{name}` must be a sequence of positive integers; got {value!r}.")
    return tuple(int(size) for size in value)


def size_or_shape(name: str, value: Any) -> int | Shape:
    """`value` as a positive integer, or as a tuple of them.

    Raises:
        TypeError: if it is neither.
        ValueError: if a size is below 1.
    """
    return positive_int(name, value) if np.ndim(value) == 0 else sizes(name, value)


def shape(name: str, value: Any) -> Shape:
    """`value` as a shape; an integer is the shape of a vector.

    Raises:
        TypeError: if it is neither an integer nor a sequence of them.
        ValueError: if a size is below 1.
    """
    return sizes(name, (value,) if _is_int(value) else value)


def permutation(name: str, value: Any, size: int | None = None) -> Shape:
    """`value` as a tuple that holds each of 0, ..., size - 1 once.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if a number is missing, repeated or out of range.
    """
    rule = (
        "hold each of 0, ..., n - 1 once"
        if size is None
        else f"hold each of 0, ..., {size - 1} once"
    )
    try:
        value = tuple(value)
    except TypeError:
        raise TypeError(f"`{name}` must {rule}; got {value!r}.") from None
    if not all(_is_int(index) for index in value):
        raise TypeError(f"`{name}` must {rule}; got {value!r}.")
    value = tuple(int(index) for index in value)
    if not value or sorted(value) != list(range(len(value) if size is None else size)):
        raise ValueError(f"`{name}` must {rule}; got {value!r}.")
    return value


def trailing_shape(name: str, array: Any, shape: Shape, owner: str, fix: str = "") -> None:
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
