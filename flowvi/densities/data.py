"""Rows of data: checked, and split into those to train on and those to be held out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi.checks import require
from flowvi.families import Family, as_array
from flowvi.training.order import Order
from flowvi.training.sources import LazyRows, check_finite

Array = jax.Array
Data = dict[str, np.ndarray]
Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]

#: Rows that are held out at most.
MAX_HELD_OUT = 20_000

FIX = "Perhaps drop or fill in those rows?"


class Split:
    """Some rows of data to be held out, and the rest of them, to be trained on.

    The rows of a memory map stay where they are.
    """

    def __init__(
        self,
        x: np.ndarray,
        context: np.ndarray | None,
        held_out: np.ndarray,
        weights: np.ndarray | None = None,
    ):
        self._data: Data = {"x": x} if context is None else {"x": x, "context": context}
        if weights is not None:
            # Those to train on have the mean weight 1, and so have all batches of them, on average.
            total = weights.sum() - weights[held_out].sum()
            self._data["weight"] = weights * ((len(x) - len(held_out)) / total)
        #: The numbers of the rows that are held out.
        self.rows_out = np.sort(held_out)
        #: How many rows there are to train on.
        self.num_rows = len(x) - len(held_out)
        self._mapped = any(isinstance(array, np.memmap) for array in self._data.values())

    def _take(self, rows: np.ndarray) -> Data:
        return {name: np.asarray(array[rows]) for name, array in self._data.items()}

    def _take_training(self, numbers: np.ndarray) -> Data:
        """The rows of these numbers among those that are not held out."""
        before = self.rows_out - np.arange(len(self.rows_out))
        return self._take(numbers + np.searchsorted(before, numbers, side="right"))

    def some(self, key: Array, count: int) -> Parts:
        """(x, context, weights) of so many random rows of those to train on."""
        count = min(count, self.num_rows)
        return parts(self._take_training(Order(key, self.num_rows).rows(0, count)))

    def held_out(self) -> Data:
        """The rows that are held out, of the mean weight 1."""
        data = self._take(self.rows_out)
        if "weight" in data:
            data["weight"] = data["weight"] / data["weight"].mean()
        return data

    def whole_training(self) -> Parts:
        """(x, context, weights) of which units are made; all of a memory map, as they lie there."""
        return parts(self._data if self._mapped else self._take_training(np.arange(self.num_rows)))

    def training(self, standardize: Callable[[Data], Data]) -> Data | LazyRows:
        """The rows to train on, standardised; those of a memory map when they are needed."""
        if not self._mapped:
            return standardize(self._take_training(np.arange(self.num_rows)))
        return LazyRows(lambda rows: standardize(self._take_training(rows)), self.num_rows)


def parts(data: Data) -> Parts:
    """(x, context, weights) of data that have them."""
    return data["x"], data.get("context"), data.get("weight")


def check_weights(weights: ArrayLike | None, num_rows: int) -> np.ndarray | None:
    """`weights` as a numpy array of shape [num_rows], or None.

    Raises:
        TypeError: if they are not numbers.
        ValueError: if they have another shape, or are negative, not finite or all zero.
    """
    if weights is None:
        return None
    found = np.asarray(as_array("weights", weights), np.float64)
    rule = f"`weights` must have shape ({num_rows},), one for each row of `x`"
    require(found.shape == (num_rows,), rule, f"shape {found.shape}", say=str)
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        got = f"{found[bad[0]]} in row {bad[0]}"
        raise ValueError(f"`weights` must be finite and not negative; got {got}.")
    require(found.any(), "`weights` must not all be zero", "only zeros", say=str)
    return found


def distinct(x: np.ndarray, context: np.ndarray | None, weights: np.ndarray | None) -> Parts | None:
    """The different rows, in their order by size, with their weights; None if all are different.

    A row that is there twice is one of weight 2: in two parts of the data, each would tell all
    about the other one. And so neither the order of the rows nor how repeats are written down has
    a say.
    """
    both = x if context is None else np.concatenate([x, context], 1)
    _, first, number = np.unique(both, axis=0, return_index=True, return_inverse=True)
    if weights is None and len(first) == len(x):
        return None
    totals = np.bincount(number.ravel(), weights)
    first, totals = first[totals > 0], totals[totals > 0]
    one = bool(np.all(totals == totals[0]))
    return x[first], None if context is None else context[first], None if one else totals


def shuffled(key: Array, num_rows: int) -> np.ndarray:
    """The numbers of rows in random order."""
    return Order(key, num_rows).rows(0, num_rows)


def check_x(family: Family, x: ArrayLike) -> np.ndarray:
    """`x` as a numpy array of shape [num_rows, *event_shape] of finite numbers.

    Raises:
        TypeError: if it does not hold floating numbers.
        ValueError: if it has another shape, no rows, or an entry that is not finite.
    """
    x = _numbers("x", x, integers=not family.support.is_real)
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
    check_finite("x", x, FIX)
    return x


def check_context(family: Family, context: ArrayLike | None, x: np.ndarray) -> np.ndarray | None:
    """`context` as a numpy array of shape [num_rows, *context_shape], or None.

    Raises:
        TypeError: if it does not hold numbers.
        ValueError: if it is missing, superfluous, of another shape, or not finite.
    """
    if context is None or family.context_shape is None:
        family.check_context(context)
        return None
    context = _numbers("context", context, integers=True)
    if context.shape != (len(x), *family.context_shape):
        shape = ", ".join(["num_rows", *map(str, family.context_shape)])
        raise ValueError(
            f"`context` must have shape [{shape}], a row for each of the {len(x)} rows of `x`; got "
            f"shape {context.shape}."
        )
    family.check_context(context[:1])
    check_finite("context", context, FIX)
    return context


def _numbers(name: str, value: ArrayLike, integers: bool) -> np.ndarray:
    array = as_array(name, value)
    # `np.asarray` would hide that it is mapped.
    array = array if isinstance(array, np.memmap) else np.asarray(array)
    whole = array.dtype.kind in "iub"
    if not (jnp.issubdtype(array.dtype, jnp.floating) or (whole and integers)):
        fix = f" Perhaps convert it with `{name}.astype(float)`?" if whole else ""
        kind = "numbers" if integers else "floating numbers"
        raise TypeError(f"`{name}` must hold {kind}; got dtype {array.dtype}.{fix}")
    return array


def num_held_out(fraction: float, num_rows: int) -> int:
    """How many rows to hold out."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"`validation_fraction` must be a number; got {fraction!r}.")
    if not 0 <= fraction < 1:
        raise ValueError(f"`validation_fraction` must be at least 0 and below 1; got {fraction}.")
    return min(int(fraction * num_rows), MAX_HELD_OUT)
