"""Where events may lie: one idea for families, densities and targets.

A support is a frozen, hashable description. It checks data, and that of continuous events has a
bijector from a vector of reals.
"""

import abc
import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flowvi._tfp import tfb
from flowvi.bijectors import KINDS, Blocks, Constrained, Units
from flowvi.checks import shown

Shape = tuple[int, ...]
Ends = float | tuple[float, ...]
#: None or "real"; "positive"; (low, high), of which either may be None or infinite; a sequence of
#: these, one a column; a name of `flowvi.bijectors.Constrained`; a constraint of numpyro's, a
#: transform of PyMC's, or a bijector from the reals of Distrax's or TFP's; or a `Support`.
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

    @property
    def free_shape(self) -> Shape:
        """The shape of the reals behind an event."""
        return self.event_shape

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


#: What events of each kind of constrained vectors and matrices must be.
_CONSTRAINED = {
    "simplex": "positive numbers whose sum is 1",
    "ordered_vector": "rising numbers",
    "positive_ordered_vector": "rising positive numbers",
    "zero_sum": "numbers whose sum is 0",
    "sphere": "a vector of length 1",
    "corr_cholesky": "the Cholesky factor of a correlation matrix",
    "corr_matrix": "a correlation matrix",
    "lower_cholesky": "the Cholesky factor of a covariance matrix",
    "positive_definite": "a positive definite matrix",
}


@dataclasses.dataclass(frozen=True)
class Manifold(Support):
    """Vectors or matrices of a kind, whose map from the reals is `flowvi.bijectors.Constrained`."""

    kind: str

    def __post_init__(self) -> None:
        rank = KINDS[self.kind].rank
        size = self.event_shape[-rank:]
        if len(size) != rank or len(set(size)) != 1 or KINDS[self.kind].free_size(size[0]) < 1:
            form = "a shape (..., n, n)" if rank == 2 else "a shape (..., n)"
            rule = f"`support` {self.kind!r} must have {form} with a number that is free"
            raise ValueError(f"{rule}; got {self.event_shape}.")

    @property
    def free_shape(self) -> Shape:
        kind = KINDS[self.kind]
        return (math.prod(self.event_shape[: -kind.rank]) * kind.free_size(self.event_shape[-1]),)

    def outside(self, values: np.ndarray) -> np.ndarray:
        dtype = values.dtype if jnp.issubdtype(values.dtype, jnp.floating) else np.dtype(float)
        # Sums of rounded numbers miss by a little.
        slack = 10 * values.shape[-1] * float(jnp.finfo(dtype).eps) ** 0.5
        axes = tuple(range(-KINDS[self.kind].rank, 0))
        bad = ~self._holds(np.asarray(values, np.float64), slack)
        bad &= ~np.isnan(values).any(axes)
        return np.broadcast_to(np.expand_dims(bad, axes), values.shape)

    def _holds(self, y: np.ndarray, slack: float) -> np.ndarray:
        match self.kind:
            case "simplex":
                return (y > 0).all(-1) & (abs(y.sum(-1) - 1) < slack)
            case "ordered_vector":
                return np.all(np.diff(y) > 0, axis=-1)
            case "positive_ordered_vector":
                return np.all(np.diff(y, prepend=0) > 0, axis=-1)
            case "zero_sum":
                return np.abs(y.sum(-1)) < slack * (1 + np.abs(y).max(-1))
            case "sphere":
                return np.abs((y**2).sum(-1) - 1) < slack
            case "corr_cholesky" | "lower_cholesky":
                diagonal = np.diagonal(y, axis1=-2, axis2=-1)
                good = (diagonal > 0).all(-1) & (np.triu(y, 1) == 0).all((-2, -1))
                unit = abs((y**2).sum(-1) - 1) < slack
                return good & (unit.all(-1) | (self.kind == "lower_cholesky"))
        scale = 1 + abs(y).max((-2, -1))
        good = (abs(y - np.swapaxes(y, -1, -2)) < slack * scale[..., None, None]).all((-2, -1))
        finite = np.isfinite(y).all((-2, -1))
        safe = np.where((good & finite)[..., None, None], y, np.eye(y.shape[-1]))
        good &= np.linalg.eigvalsh(safe)[..., 0] > 0
        unit = abs(np.diagonal(y, axis1=-2, axis2=-1) - 1) < slack
        return good & (unit.all(-1) | (self.kind == "positive_definite"))

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        return f"be {_CONSTRAINED[self.kind]}, as its support {self.kind!r} says", ""

    def bijector(self, dtype: DTypeLike | None = None) -> Constrained:
        return Constrained(self.kind, self.event_shape)


@dataclasses.dataclass(frozen=True)
class Image(Support):
    """Where a bijector takes the reals."""

    through: distrax.Bijector

    @property
    def free_shape(self) -> Shape:
        event = jax.ShapeDtypeStruct(self.event_shape, jnp.result_type(float))
        return jax.eval_shape(self.through.inverse, event).shape

    def outside(self, values: np.ndarray) -> np.ndarray:
        u = np.asarray(self.through.inverse(jnp.asarray(values)))
        axes = tuple(range(values.ndim - len(self.event_shape), u.ndim))
        bad = ~np.isfinite(u).all(axes) & np.isfinite(values).all(axes)
        lead = values.shape[: values.ndim - len(self.event_shape)]
        return np.broadcast_to(bad.reshape(*lead, *[1] * len(self.event_shape)), values.shape)

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        return f"lie where {self.through.name} takes the real numbers", ""

    def bijector(self, dtype: DTypeLike | None = None) -> distrax.Bijector:
        return self.through


@dataclasses.dataclass(frozen=True)
class Pieces(Support):
    """Supports of events, each made a vector, one after the other."""

    supports: tuple[Support, ...]

    @property
    def free_shape(self) -> Shape:
        return (sum(math.prod(each.free_shape) for each in self.supports),)

    def outside(self, values: np.ndarray) -> np.ndarray:
        lead = values.shape[:-1]
        ends = np.cumsum([math.prod(each.event_shape) for each in self.supports])[:-1]
        parts = zip(self.supports, np.split(values, ends, -1), strict=True)
        found = [each.outside(part.reshape(*lead, *each.event_shape)) for each, part in parts]
        return np.concatenate([each.reshape(*lead, -1) for each in found], -1)

    def rule(self, place: Shape, owner: str) -> tuple[str, str]:
        columns = [(each, i) for each in self.supports for i in np.ndindex(*each.event_shape)]
        support, index = columns[place[0]]
        return support.rule(index, owner)

    def bijector(self, dtype: DTypeLike | None = None) -> Blocks:
        return Blocks(
            [each.bijector(dtype) for each in self.supports],
            [each.free_shape for each in self.supports],
            [each.event_shape for each in self.supports],
        )


def concatenated(supports: Sequence[Support]) -> Support:
    """The support of events of these, each made a vector, one after the other."""
    shape = (sum(math.prod(each.event_shape) for each in supports),)
    if not all(isinstance(each, Interval) for each in supports):
        return Pieces(shape, tuple(supports))
    pairs = [each.bounds() for each in supports if isinstance(each, Interval)]
    lower, upper = (tuple(x for pair in pairs for x in pair[i].ravel().tolist()) for i in (0, 1))
    return Interval(shape, lower, upper)


_NAMED: dict[object, tuple[float, float]] = {
    None: (-math.inf, math.inf),
    "real": (-math.inf, math.inf),
    "positive": (0.0, math.inf),
    "nonnegative": (0.0, math.inf),
    "unit_interval": (0.0, 1.0),
}
_RULE = "`support` must be None, 'real', 'positive' or (low, high)"
_DISCRETE = (
    "Perhaps sum it out in the log density (numpyro does so for a site with "
    "`infer={'enumerate': 'parallel'}`), or relax it to real numbers?"
)

#: The names of constraints of numpyro's and of transforms of PyMC's, by their classes.
_FOREIGN = {
    "_Real": "real",
    "_RealVector": "real",
    "_RealMatrix": "real",
    "_Positive": "positive",
    "_Nonnegative": "positive",
    "_SoftplusPositive": "positive",
    "_Simplex": "simplex",
    "_OrderedVector": "ordered_vector",
    "_PositiveOrderedVector": "positive_ordered_vector",
    "_ZeroSum": "zero_sum",
    "_Sphere": "sphere",
    "_CorrCholesky": "corr_cholesky",
    "_CorrMatrix": "corr_matrix",
    "_LowerCholesky": "lower_cholesky",
    "_ScaledUnitLowerCholesky": "lower_cholesky",
    "_SoftplusLowerCholesky": "lower_cholesky",
    "_PositiveDefinite": "positive_definite",
    "LogTransform": "positive",
    "LogOddsTransform": "unit_interval",
    "SimplexTransform": "simplex",
    "Ordered": "ordered_vector",
    "ZeroSumTransform": "zero_sum",
    "CholeskyCorrTransform": "corr_cholesky",
}


def as_support(value: SupportLike, event_shape: Shape) -> Support:
    """The support that is meant by one of `SupportLike`."""
    library = type(value).__module__.partition(".")[0]
    if isinstance(value, Support):
        if value.event_shape != event_shape:
            raise ValueError(f"`support` must be for events of shape {event_shape}; got {value!r}.")
        return value
    if library in ("numpyro", "pymc"):
        return _of_library(value, event_shape)
    if isinstance(value, distrax.Bijector | tfb.Bijector):
        bijector = distrax.as_bijector(value)
        missing = len(event_shape) - bijector.event_ndims_out
        if missing < 0:
            rule = f"a bijector to events of shape {event_shape}"
            raise ValueError(f"`support` must be {rule}; got {value!r}.")
        return Image(event_shape, distrax.Block(bijector, missing) if missing else bijector)
    if isinstance(value, str) and value in KINDS:
        return Manifold(event_shape, value)
    if value is None or isinstance(value, str) or _is_pair(value):
        return Interval(event_shape, *_ends(value))
    if not isinstance(value, Sequence):
        raise TypeError(f"{_RULE}, or a sequence of these, one a column; got {value!r}.")
    if (len(value),) != event_shape:
        rule = f"one entry for each column of events of shape {event_shape}"
        raise ValueError(f"`support` must have {rule}; got {len(value)} entries: {value!r}.")
    lower, upper = zip(*map(_ends, value), strict=True)
    return Interval(event_shape, lower, upper)


def _of_library(value: object, event_shape: Shape) -> Support:
    """The support of a constraint of numpyro's or of a transform of PyMC's.

    Both are told by the names of their classes, so that neither library is imported.
    """
    while hasattr(value, "base_constraint"):  # some axes belong to one event
        value = value.base_constraint
    if getattr(value, "is_discrete", False):
        _refuse_discrete(value)
    kinds = [each.__name__ for each in type(value).__mro__]
    name = next((_FOREIGN[kind] for kind in kinds if kind in _FOREIGN), None)
    if name is not None:
        return as_support(name, event_shape)
    bounds = [getattr(value, end, None) for end in ("lower_bound", "upper_bound")]
    if "Interval" in kinds and hasattr(value, "args_fn"):  # PyMC's; its bounds may be variables
        bounds = list(value.args_fn())
    if all(bound is None for bound in bounds):
        rule = "`support` must be a constraint that flowvi knows, or a bijector from the reals"
        raise TypeError(f"{rule}; got {shown(value)}.")
    ends = (-math.inf, math.inf)
    filled = [end if bound is None else bound for bound, end in zip(bounds, ends, strict=True)]
    lower, upper = (np.broadcast_to(np.asarray(b, float), event_shape) for b in filled)
    if not (lower < upper).all():
        raise ValueError(f"`support` must have low < high; got {shown(value)}.")
    return Interval(event_shape, tuple(lower.ravel().tolist()), tuple(upper.ravel().tolist()))


def _refuse_discrete(value: object) -> None:
    got = f"{shown(value)}, which is of whole numbers"
    raise TypeError(f"`support` must be one of real numbers; got {got}. {_DISCRETE}")


def _is_pair(value: SupportLike) -> TypeGuard[Sequence[float | None]]:
    if not isinstance(value, Sequence) or len(value) != 2:
        return False
    return all(isinstance(x, numbers.Real | None) and not isinstance(x, bool) for x in value)


def _ends(value: SupportLike) -> tuple[float, float]:
    """The bounds behind a name or a pair."""
    if value is None or isinstance(value, str):
        if value in ("integer", "category", "categorical", "boolean"):
            _refuse_discrete(value)
        if value not in _NAMED:
            names = ", ".join(map(repr, KINDS))
            raise ValueError(f"{_RULE}, or one of {names}; got {value!r}.")
        return _NAMED[value]
    if not _is_pair(value):
        raise TypeError(f"{_RULE}; got {value!r}.")
    low, high = (d if x is None else float(x) for x, d in zip(value, _NAMED[None], strict=True))
    if not low < high:
        raise ValueError(f"`support` must have low < high; got {value!r}.")
    return low, high
