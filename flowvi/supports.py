"""Where events may lie: one idea for families, densities and targets.

A support is a frozen, hashable description. It checks data, and that of real numbers between bounds
has a bijector from the reals.
"""

import abc
import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence

import distrax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flowvi.bijectors import Units

Shape = tuple[int, ...]
Ends = float | tuple[float, ...]
#: What `as_support` takes: None, "real", "positive", (low, high), a sequence of these, a `Support`.
SupportLike = object

#: Numbers that are looked at together, so that a file larger than memory can be checked.
CHUNK_SIZE = 2**20

_NAMED = {None: (-math.inf, math.inf), "real": (-math.inf, math.inf), "positive": (0.0, math.inf)}


def chunks(array: np.ndarray) -> Iterator[slice]:
    """Slices of rows, each of a size that can be looked at together."""
    step = max(CHUNK_SIZE // max(math.prod(array.shape[1:]), 1), 1)
    for start in range(0, array.shape[0], step):
        yield slice(start, min(start + step, array.shape[0]))


def on_host(value: ArrayLike) -> np.ndarray:
    """A numpy array of an array-like; a memory map stays mapped."""
    return value if isinstance(value, np.memmap) else np.asarray(value)


@dataclasses.dataclass(frozen=True)
class Support(abc.ABC):
    """Where events of a shape may lie.

    Attributes:
        event_shape: the shape of an event.
    """

    event_shape: Shape

    @property
    def is_real(self) -> bool:
        """Whether events may be anywhere on the real line."""
        return False

    @abc.abstractmethod
    def outside(self, values: np.ndarray) -> np.ndarray:
        """Which numbers of an array of shape [*rows, *event_shape] are outside of the support."""

    @abc.abstractmethod
    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        """What the number in a place of the event must do, after "must"; and what to do if not."""

    def check(self, x: ArrayLike, name: str = "x", owner: str = "") -> None:
        """Checks that all data are inside. Memory maps are read in chunks.

        Args:
            x: an array-like of shape [*rows, *event_shape].
            name: what to call it in the message.
            owner: whose support it is, for the message.

        Raises:
            ValueError: naming the first number outside by row, column and value, how many more
                there are, and what to do.
        """
        if self.is_real:
            return
        array = on_host(x)
        single = array.ndim == len(self.event_shape)
        array = array[None] if single else array
        first, count = None, 0
        for chunk in chunks(array):
            values = np.asarray(array[chunk])
            places = np.argwhere(self.outside(values))
            count += len(places)
            if first is None and len(places):
                first = tuple(map(int, places[0]))
                value = values[first]
                first = (first[0] + chunk.start, *first[1:])
        if first is None:
            return
        rule, fix = self.rule(first[len(first) - len(self.event_shape) :], owner)
        words = [] if single else [f"row {first[0]}"]
        if len(first) > 1:
            words.append(f"column {first[1] if len(first) == 2 else first[1:]}")
        if count > 1:
            words.append(f"and {count - 1} more")
        where = f" in {', '.join(words)}" if words else ""
        raise ValueError(f"`{name}` must {rule}; got {value!s}{where}. {fix}")

    def bijector(self, dtype: DTypeLike | None = None) -> distrax.Bijector | None:
        """The map from the reals; None where that is the identity.

        Raises:
            TypeError: if there is none, as for discrete numbers.
        """
        del dtype
        raise TypeError(
            f"`support` must be one of real numbers between bounds, to be mapped to; got {self!r}."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Interval(Support):
    """Real numbers strictly between bounds: what u on the real line stands for.

        y = u                                      where there is no bound
        y = lower + exp(u)                         where only `lower` is finite
        y = upper - exp(u)                         where only `upper` is finite
        y = lower + (upper - lower) sigmoid(u)     where both are

    Attributes:
        event_shape: the shape of an event.
        lower: the lower bounds, of all coordinates in order, or one for all; -inf for none.
        upper: the upper bounds, in the same form.
    """

    lower: Ends = -math.inf
    upper: Ends = math.inf

    def __repr__(self) -> str:
        lower, upper = self.bounds()
        pairs = [f"({a:g}, {b:g})" for a, b in zip(lower.flat, upper.flat, strict=True)]
        return pairs[0] if len(set(pairs)) == 1 else f"[{', '.join(pairs)}]"

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            ends = tuple(np.ravel(getattr(self, name)).tolist())
            # One form only, so that equal supports compare equal.
            same = len(set(ends)) == 1
            object.__setattr__(self, name, ends[0] if same else ends)

    @property
    def is_real(self) -> bool:
        return self.lower == -math.inf and self.upper == math.inf

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lower and the upper bounds, of the event's shape."""
        shape = self.event_shape
        lower, upper = (
            np.broadcast_to(np.reshape(end, shape if np.ndim(end) else ()), shape)
            for end in (self.lower, self.upper)
        )
        return lower, upper

    def outside(self, values: np.ndarray) -> np.ndarray:
        lower, upper = self.bounds()
        if jnp.issubdtype(values.dtype, jnp.floating):
            lower, upper = lower.astype(values.dtype), upper.astype(values.dtype)
        return (values <= lower) | (values >= upper)

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        del owner
        lower, upper = (bound[place] for bound in self.bounds())
        rule = f"lie strictly inside its support ({lower:g}, {upper:g})"
        return rule, "Perhaps widen `support`, or drop those rows?"

    def bijector(self, dtype: DTypeLike | None = None) -> Units | None:
        if self.is_real:
            return None
        dtype = jnp.result_type(float) if dtype is None else dtype
        lower, upper = (jnp.asarray(bound, dtype) for bound in self.bounds())
        return Units(jnp.zeros_like(lower), jnp.ones_like(lower), lower, upper)


@dataclasses.dataclass(frozen=True)
class UnitInterval(Support):
    """Numbers from 0 to 1, both included."""

    def outside(self, values: np.ndarray) -> np.ndarray:
        return ~((values >= 0) & (values <= 1))

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        return f"hold only numbers from 0 to 1{_for(owner)}", "Perhaps divide by the largest?"


@dataclasses.dataclass(frozen=True)
class Integers(Support):
    """Whole numbers 0, 1, 2, ..., below `count`; without end where that is None."""

    count: int | None = None

    def outside(self, values: np.ndarray) -> np.ndarray:
        high = np.inf if self.count is None else self.count
        return ~((values >= 0) & (values < high) & (values == np.floor(values)))

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        if self.count is None:
            return f"hold only whole numbers from 0 on{_for(owner)}", "Perhaps round them?"
        rule = f"hold only the numbers 0, ..., {self.count - 1} of classes{_for(owner)}"
        return rule, "Perhaps give it more classes?"


@dataclasses.dataclass(frozen=True)
class Binary(Support):
    """0 and 1."""

    def outside(self, values: np.ndarray) -> np.ndarray:
        return ~((values == 0) | (values == 1))

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        return f"hold only 0 and 1{_for(owner)}", (
            "Perhaps binarise it once, `x > 0.5` or by drawing with a fixed seed, "
            "`jax.random.bernoulli(key, x)`; or take `fv.continuous_bernoulli`?"
        )


@dataclasses.dataclass(frozen=True)
class OneHot(Support):
    """Rows of the identity along the last axis."""

    def outside(self, values: np.ndarray) -> np.ndarray:
        return ~(((values == 0) | (values == 1)) & (values.sum(-1, keepdims=True) == 1))

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        fix = "Perhaps use `jax.nn.one_hot(x, num_classes)`, or `one_hot=False`?"
        return f"hold only rows of the identity{_for(owner)}", fix


@dataclasses.dataclass(frozen=True)
class Pieces(Support):
    """Supports of vectors one after the other."""

    supports: tuple[Support, ...]

    def outside(self, values: np.ndarray) -> np.ndarray:
        ends = np.cumsum([each.event_shape[0] for each in self.supports])[:-1]
        parts = zip(self.supports, np.split(values, ends, -1), strict=True)
        return np.concatenate(
            [np.zeros(v.shape, bool) if each.is_real else each.outside(v) for each, v in parts], -1
        )

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        index = place[0]
        for each in self.supports:
            if index < each.event_shape[0]:
                return each.rule((index,), owner)
            index -= each.event_shape[0]
        raise IndexError(place)


def _for(owner: str) -> str:
    return f" for {owner}" if owner else ""


def real(event_shape: Shape) -> Interval:
    """The support of all real numbers."""
    return Interval(event_shape)


def concatenated(supports: Sequence[Support]) -> Support:
    """The support of events of these, each made a vector, one after the other."""
    size = sum(math.prod(each.event_shape) for each in supports)
    if not all(isinstance(each, Interval) for each in supports):
        return Pieces((size,), tuple(supports))
    pairs = [each.bounds() for each in supports if isinstance(each, Interval)]
    lower, upper = (np.concatenate([np.ravel(pair[i]) for pair in pairs]) for i in (0, 1))
    return Interval((size,), tuple(lower.tolist()), tuple(upper.tolist()))


def as_support(value: SupportLike, event_shape: Shape) -> Support:
    """The support that is meant.

    Args:
        value: None or "real"; "positive"; (low, high), of which either may be None or infinite; a
            sequence of these, one a column; or a `Support`.
        event_shape: the shape of an event.

    Raises:
        TypeError, ValueError: if it is not of this kind.

    Example:
        >>> as_support(["real", "positive", (0, 1)], (3,)).bijector().forward(jnp.zeros(3))
        Array([0. , 1. , 0.5], dtype=float32)
    """
    if isinstance(value, Support):
        if value.event_shape != event_shape:
            raise ValueError(f"`support` must be for events of shape {event_shape}; got {value!r}.")
        return value
    if value is None or isinstance(value, str) or _is_pair(value):
        return Interval(event_shape, *_interval(value))
    if not isinstance(value, Sequence):
        raise TypeError(
            "`support` must be None, 'real', 'positive', (low, high), or a sequence of these, "
            f"one a column; got {value!r}."
        )
    if (len(value),) != event_shape:
        raise ValueError(
            f"`support` must have one entry for each column of events of shape {event_shape}; "
            f"got {len(value)} entries: {value!r}."
        )
    lower, upper = zip(*(_interval(each) for each in value), strict=True)
    return Interval(event_shape, lower, upper)


def _is_pair(value: SupportLike) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(end is None or _is_number(end) for end in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _interval(value: SupportLike) -> tuple[float, float]:
    if value is None or isinstance(value, str):
        if value not in _NAMED:
            raise ValueError(
                f"`support` must be None, 'real', 'positive' or (low, high); got {value!r}."
            )
        return _NAMED[value]
    if not isinstance(value, Sequence) or not _is_pair(value):
        raise TypeError(
            f"`support` must be None, 'real', 'positive' or (low, high); got {value!r}."
        )
    low = -math.inf if value[0] is None else float(value[0])
    high = math.inf if value[1] is None else float(value[1])
    if not low < high:
        raise ValueError(f"`support` must have low < high; got {value!r}.")
    return low, high
