"""Data as it comes: its checks, its support, and the units a family is placed in."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.bijectors import Units
from flowvi.families import Family
from flowvi.training.sources import Subset, parts

Bounds = tuple[np.ndarray, np.ndarray]
SUPPORTS = {None: (-np.inf, np.inf), "real": (-np.inf, np.inf), "positive": (0.0, np.inf)}


def _floating(name: str, value: Any) -> np.ndarray:
    array = _on_host(value)
    if array.dtype.kind in "iub":
        raise TypeError(
            f"`{name}` must hold floating numbers; got dtype {array.dtype}. Perhaps convert it "
            f"with `{name}.astype(float)`?"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must hold floating numbers; got dtype {array.dtype}.")
    return array


def _on_host(value: Any) -> np.ndarray:
    # `np.asarray` would hide that it is mapped.
    return value if isinstance(value, np.memmap) else np.asarray(value)


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    """`array` in JAX's dtype for it, at least single precision, with nothing but finite numbers.

    A memory map stays what it is.
    """
    dtype = jnp.promote_types(jax.dtypes.canonicalize_dtype(array.dtype), jnp.float32)
    for part in parts(array):
        with np.errstate(over="ignore"):
            cast = np.asarray(array[part]).astype(dtype, copy=False)
        bad = np.argwhere(~np.isfinite(cast))
        if len(bad):
            value = array[part][tuple(bad[0])]
            bad[:, 0] += part.start
            where, fix = "", " Perhaps drop or fill in those rows?"
            if np.isfinite(value):
                where, fix = f" in {dtype.name}", ""
            raise ValueError(f"`{name}` must be finite{where}; got {value} in {_where(bad)}.{fix}")
    return array if isinstance(array, np.memmap) else array.astype(dtype, copy=False)


def _where(indices: np.ndarray) -> str:
    row, *column = map(int, indices[0])
    more = f", and {len(indices) - 1} more" if len(indices) > 1 else ""
    return f"row {row}, {_column(column)}{more}" if column else f"row {row}{more}"


def _column(column: Sequence[int]) -> str:
    return f"column {column[0]}" if len(column) == 1 else f"column {tuple(column)}"


def check_x(family: Family, x: Any) -> np.ndarray:
    """`x` as a numpy array of shape [num_rows, *event_shape] of finite numbers.

    Raises:
        TypeError: if it does not hold floating numbers.
        ValueError: if it has another shape, no rows, or an entry that is not finite.
    """
    x = _floating("x", x)
    shape = ", ".join(["num_rows", *map(str, family.event_shape)])
    if x.ndim != 1 + len(family.event_shape) or x.shape[1:] != family.event_shape:
        fix = ""
        if x.ndim == 1 and family.event_shape == (1,):
            fix = " Perhaps give it a second axis with `x[:, None]`?"
        elif x.ndim == 2 and len(family.event_shape) == 1:
            fix = f" Perhaps build the family with event size {x.shape[1]}?"
        raise ValueError(
            f"`x` must have shape [{shape}], one event of {family!r} in each row; got shape "
            f"{x.shape}.{fix}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"`x` must have at least one row; got shape {x.shape}.")
    return _finite("x", x)


def check_context(family: Family, context: Any, num_rows: int) -> np.ndarray | None:
    """`context` as a numpy array of shape [num_rows, *context_shape], or None.

    Raises:
        TypeError: if it does not hold numbers.
        ValueError: if it is missing, superfluous, of another shape, or not finite.
    """
    if context is None or family.context_shape is None:
        family.check_context(context)
        return None
    context = _on_host(context)
    if context.dtype.kind not in "iub":
        context = _floating("context", context)
    family.check_context(context)
    expected = (num_rows, *family.context_shape)
    if context.shape != expected:
        raise ValueError(
            f"`context` must have shape {expected}, a row for each row of `x`; got shape "
            f"{context.shape}."
        )
    return context if context.dtype.kind in "iub" else _finite("context", context)


def parse_support(support: Any, event_shape: tuple[int, ...]) -> Bounds | None:
    """The lower and upper bounds of every coordinate, of the event's shape; None without any.

    Args:
        support: None or "real", "positive", (low, high) with None or infinity for an open end, or
            a sequence of these, one a column.
        event_shape: the shape of an event.

    Raises:
        TypeError, ValueError: if it is not of this kind.
    """
    if _is_single(support):
        low, high = _interval(support)
        bounds = np.full(event_shape, low), np.full(event_shape, high)
    else:
        if not isinstance(support, Sequence) or isinstance(support, str):
            raise TypeError(
                "`support` must be None, 'real', 'positive', (low, high), or a sequence of these, "
                f"one a column; got {support!r}."
            )
        if (len(support),) != event_shape:
            raise ValueError(
                f"`support` must have one entry for each column of events of shape {event_shape}; "
                f"got {len(support)} entries: {support!r}."
            )
        pairs = np.array([_interval(each) for each in support])
        bounds = pairs[:, 0], pairs[:, 1]
    return bounds if np.isfinite(bounds).any() else None


def _is_single(support: Any) -> bool:
    if support is None or isinstance(support, str):
        return True
    return _is_pair(support)


def _is_pair(support: Any) -> bool:
    return (
        isinstance(support, Sequence)
        and not isinstance(support, str)
        and len(support) == 2
        and all(end is None or _is_number(end) for end in support)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _interval(support: Any) -> tuple[float, float]:
    if support is None or isinstance(support, str):
        if support not in SUPPORTS:
            raise ValueError(
                f"`support` must be None, 'real', 'positive' or (low, high); got {support!r}."
            )
        return SUPPORTS[support]
    if not _is_pair(support):
        raise TypeError(
            f"`support` must be None, 'real', 'positive' or (low, high); got {support!r}."
        )
    low = -np.inf if support[0] is None else float(support[0])
    high = np.inf if support[1] is None else float(support[1])
    if not low < high:
        raise ValueError(f"`support` must have low < high; got {support!r}.")
    return low, high


def check_inside(x: np.ndarray, bounds: Bounds) -> None:
    """Checks that data lie strictly inside their support.

    Raises:
        ValueError: naming the first outside by row, column and value, and how many more there are.
    """
    lower, upper = (bound.astype(x.dtype) for bound in bounds)
    for part in parts(x):
        values = np.asarray(x[part])
        outside = np.argwhere((values <= lower) | (values >= upper))
        if len(outside):
            value = values[tuple(outside[0])]
            column = tuple(outside[0][1:])
            outside[:, 0] += part.start
            raise ValueError(
                f"`x` must lie strictly inside its support ({lower[column]:g}, "
                f"{upper[column]:g}); got {value!s} in {_where(outside)}. Perhaps widen "
                "`support`, or drop those rows?"
            )


def data_units(x: Any, bounds: Bounds | None) -> dict[str, jax.Array]:
    """The units of data: their support, and mean and standard deviation of the unbounded values.

    Those of a memory map are taken over all its rows, in the order of the file.

    Raises:
        ValueError: if a column is constant.
    """
    x = x.whole if isinstance(x, Subset) else x
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    ends = {}
    if bounds is not None:
        ends = dict(
            zip(("lower", "upper"), (jnp.asarray(end, dtype) for end in bounds), strict=True)
        )

    def unbounded(values: np.ndarray) -> np.ndarray:
        return np.asarray(_unbounded(jnp.asarray(values), **ends)) if ends else values

    shift, scale, constant = _moments(x, unbounded)
    if constant.any():
        column = np.argwhere(constant)[0]
        raise ValueError(
            f"`x` must vary in every column; got the constant "
            f"{x[0][tuple(column)]!s} in {_column(column)}. Perhaps drop that column?"
        )
    return {"shift": jnp.asarray(shift, dtype), "scale": jnp.asarray(scale, dtype), **ends}


def context_units(context: Any) -> dict[str, jax.Array] | None:
    """Mean and standard deviation of a context; None for one of integers, which are labels."""
    if context is None or not jnp.issubdtype(context.dtype, jnp.floating):
        return None
    context = context.whole if isinstance(context, Subset) else context
    dtype = jax.dtypes.canonicalize_dtype(context.dtype)
    shift, scale, constant = _moments(context)
    scale = np.where(constant, 1, scale)
    return {"shift": jnp.asarray(shift, dtype), "scale": jnp.asarray(scale, dtype)}


def _moments(
    array: np.ndarray, change: Callable[[np.ndarray], np.ndarray] = lambda values: values
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, in double precision, and whether it is constant.

    A column is constant by its values rather than by its standard deviation, which rounding keeps
    from zero.
    """
    count, mean, squares = 0, np.zeros(array.shape[1:]), np.zeros(array.shape[1:])
    low, high = np.full(array.shape[1:], np.inf), np.full(array.shape[1:], -np.inf)
    for part in parts(array):
        values = change(np.asarray(array[part])).astype(np.float64)
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
        # Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        # Variances", 1979.
        delta = values.mean(0) - mean
        total = count + len(values)
        squares += values.var(0) * len(values) + delta**2 * (count * len(values) / total)
        mean += delta * (len(values) / total)
        count = total
    return mean, np.sqrt(squares / count), low == high


@jax.jit
def _unbounded(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    return Units(jnp.zeros_like(lower), jnp.ones_like(lower), lower, upper).inverse(x)
