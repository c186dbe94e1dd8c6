"""Where events may lie: one idea for families, densities and targets.

A support is a frozen, hashable description. It checks data, and that of real numbers between bounds
has a bijector from the reals.
"""

import abc
import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import distrax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flowvi.bijectors import Units

Shape = tuple[int, ...]
Ends = float | tuple[float, ...]
#: None or "real"; "positive"; (low, high), of which either may be None or infinite; a sequence of
#: these, one a column; or a `Support`.
SupportLike = object

#: Numbers that are looked at together, so that a file larger than memory can be checked.
CHUNK_SIZE = 2**20


def chunks(array: np.ndarray) -> Iterator[slice]:
    """Slices of rows, each of a size that can be looked at together."""
    step = max(CHUNK_SIZE // max(math.prod(array.shape[1:]), 1), 1)
    for start in range(0, len(array), step):
        yield slice(start, min(start + step, len(array)))


def on_host(value: ArrayLike) -> np.ndarray:
    """A numpy array of an array-like; a memory map stays mapped."""
    return value if isinstance(value, np.memmap) else np.asarray(value)


@dataclasses.dataclass(frozen=True)
class Support(abc.ABC):
    """Where events of a shape may lie."""

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
        """Checks in chunks that all data, of shape [*rows, *event_shape], are inside."""
        if self.is_real:
            return
        array = on_host(x)
        single = array.ndim == len(self.event_shape)
        array = array[None] if single else array
        first, count = None, 0
        for chunk in chunks(array):
            places = np.argwhere(self.outside(np.asarray(array[chunk])))
            if first is None and len(places):
                start, *place = places[0].tolist()
                first = (chunk.start + start, *place)
            count += len(places)
        if first is None:
            return
        row, *place = first
        rule, fix = self.rule(tuple(place), owner)
        words = [] if single else [f"row {row}"]
        words += [f"column {place[0] if len(place) == 1 else tuple(place)}"] if place else []
        words += [f"and {count - 1} more"] if count > 1 else []
        where = f" in {', '.join(words)}" if words else ""
        raise ValueError(f"`{name}` must {rule}; got {array[first]!s}{where}. {fix}")

    def bijector(self, dtype: DTypeLike | None = None) -> distrax.Bijector | None:
        """The map from the reals, None where that is the identity; a TypeError if there is none."""
        raise TypeError(f"`support` must be one of real numbers between bounds; got {self!r}.")


@dataclasses.dataclass(frozen=True, repr=False)
class Interval(Support):
    """Real numbers strictly between bounds, of all coordinates in order or one for all.

    The map from the reals is that of `flowvi.bijectors.Units`.
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
            object.__setattr__(self, name, ends[0] if len(set(ends)) == 1 else ends)

    @property
    def is_real(self) -> bool:
        return self.lower == -math.inf and self.upper == math.inf

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lower and the upper bounds, of the event's shape."""
        return np.resize(self.lower, self.event_shape), np.resize(self.upper, self.event_shape)

    def outside(self, values: np.ndarray) -> np.ndarray:
        lower, upper = self.bounds()
        dtype = values.dtype if jnp.issubdtype(values.dtype, jnp.floating) else lower.dtype
        return (values <= lower.astype(dtype)) | (values >= upper.astype(dtype))

    def moved_inside(self, x: ArrayLike) -> ArrayLike:
        """Numbers of which those on a bound, as rounding puts them there, are the next ones inside.

        What is outside stays there.
        """
        if self.is_real or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        ours = np if isinstance(x, np.ndarray) else jnp
        dtype = jnp.result_type(x)
        for bound, other, sign in zip(self.bounds(), reversed(self.bounds()), (1, -1), strict=True):
            bound = bound.astype(dtype)
            # Processors flush smaller numbers than `tiny` to zero.
            least = sign * jnp.finfo(dtype).tiny
            inside = np.where(bound == 0, least, np.nextafter(bound, other.astype(dtype)))
            x = ours.where((x == bound) & np.isfinite(bound), inside.astype(dtype), x)
        return x

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        lower, upper = (bound[place] for bound in self.bounds())
        inside = f"lie strictly inside its support ({lower:g}, {upper:g})"
        return inside, "Perhaps widen `support`, or drop those rows?"

    def bijector(self, dtype: DTypeLike | None = None) -> Units | None:
        if self.is_real:
            return None
        dtype = jnp.result_type(float) if dtype is None else dtype
        lower, upper = (jnp.asarray(bound, dtype) for bound in self.bounds())
        return Units(jnp.zeros_like(lower), jnp.ones_like(lower), lower, upper)


#: Of each kind of values, what numbers must be, and what to do if they are not.
_KINDS = {
    "binary": ("0 and 1", "Perhaps binarise it, `x > 0.5` or take `fv.continuous_bernoulli`?"),
    "unit interval": ("numbers from 0 to 1", "Perhaps divide by the largest?"),
    "counts": ("whole numbers from 0 on", "Perhaps round them?"),
    "classes": ("the numbers 0, ..., {last} of classes", "Perhaps give it more classes?"),
    "one hot": ("rows of the identity", "Perhaps `jax.nn.one_hot(x, num_classes)`?"),
}


@dataclasses.dataclass(frozen=True)
class Values(Support):
    """Numbers of a kind: "binary", "unit interval", "counts", "classes", "one hot"."""

    kind: str
    num_classes: int | None = None

    def outside(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "unit interval":
            return ~((values >= 0) & (values <= 1))
        if self.kind in ("counts", "classes"):
            last = (self.num_classes or math.inf) - 1
            return ~((values >= 0) & (values <= last) & (values == np.floor(values)))
        inside = (values == 0) | (values == 1)
        return ~(inside & (self.kind == "binary" or values.sum(-1, keepdims=True) == 1))

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        rule, fix = _KINDS[self.kind]
        rule = rule.format(last=(self.num_classes or 0) - 1)
        return f"hold only {rule}{f' for {owner}' if owner else ''}", fix


@dataclasses.dataclass(frozen=True)
class Pieces(Support):
    """Supports of vectors one after the other."""

    supports: tuple[Support, ...]

    def outside(self, values: np.ndarray) -> np.ndarray:
        ends = np.cumsum([each.event_shape[0] for each in self.supports])[:-1]
        parts = zip(self.supports, np.split(values, ends, -1), strict=True)
        return np.concatenate([each.outside(part) for each, part in parts], -1)

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        columns = [(each, i) for each in self.supports for i in range(each.event_shape[0])]
        support, index = columns[place[0]]
        return support.rule((index,), owner)


def concatenated(supports: Sequence[Support]) -> Support:
    """The support of events of these, each made a vector, one after the other."""
    shape = (sum(math.prod(each.event_shape) for each in supports),)
    if not all(isinstance(each, Interval) for each in supports):
        return Pieces(shape, tuple(supports))
    pairs = [each.bounds() for each in supports if isinstance(each, Interval)]
    lower, upper = (tuple(x for pair in pairs for x in pair[i].ravel().tolist()) for i in (0, 1))
    return Interval(shape, lower, upper)


_RULE = "`support` must be None, 'real', 'positive' or (low, high)"
_NAMED = {None: (-math.inf, math.inf), "real": (-math.inf, math.inf), "positive": (0.0, math.inf)}


def as_support(value: SupportLike, event_shape: Shape) -> Support:
    """The support that is meant by one of `SupportLike`."""
    if isinstance(value, Support):
        if value.event_shape != event_shape:
            raise ValueError(f"`support` must be for events of shape {event_shape}; got {value!r}.")
        return value
    if value is None or isinstance(value, str) or _is_pair(value):
        return Interval(event_shape, *_ends(value))
    if not isinstance(value, Sequence):
        raise TypeError(f"{_RULE}, or a sequence of these, one a column; got {value!r}.")
    if (len(value),) != event_shape:
        rule = f"one entry for each column of events of shape {event_shape}"
        raise ValueError(f"`support` must have {rule}; got {len(value)} entries: {value!r}.")
    lower, upper = zip(*map(_ends, value), strict=True)
    return Interval(event_shape, lower, upper)


def _is_pair(value: SupportLike) -> TypeGuard[Sequence[float | None]]:
    if not isinstance(value, Sequence) or len(value) != 2:
        return False
    return all(isinstance(x, numbers.Real | None) and not isinstance(x, bool) for x in value)


def _ends(value: SupportLike) -> tuple[float, float]:
    """The bounds behind a name or a pair."""
    if value is None or isinstance(value, str):
        if value not in _NAMED:
            raise ValueError(f"{_RULE}; got {value!r}.")
        return _NAMED[value]
    if not _is_pair(value):
        raise TypeError(f"{_RULE}; got {value!r}.")
    low, high = (d if x is None else float(x) for x, d in zip(value, _NAMED[None], strict=True))
    if not low < high:
        raise ValueError(f"`support` must have low < high; got {value!r}.")
    return low, high
