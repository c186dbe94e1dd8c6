"""Data frames of pandas, polars or any library whose frames have `columns` and `to_numpy`.

pandas and polars are imported only where a frame of theirs is made.
"""

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jax.typing import ArrayLike

from flowvi.checks import shown
from flowvi.supports import SupportLike

#: Libraries whose frames are made again of what is drawn.
MAKERS = ("pandas", "polars")


@runtime_checkable
class Frame(Protocol):
    """What frames of different libraries have in common."""

    @property
    def columns(self) -> Iterable[object]:
        """The names of the columns."""

    def to_numpy(self) -> np.ndarray:
        """The numbers, of shape [n, D]."""

    def __getitem__(self, name: str) -> "Frame":
        """A column."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a frame.

    Attributes:
        names: their names.
        dtypes: the types of their numbers; those of whole numbers are "float64".
        library: what made the frame.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    library: str

    def frame(self, draws: np.ndarray) -> np.ndarray | Frame:
        """Draws [n, D] as a frame of the same library; as they are where it is unknown."""
        if self.library not in MAKERS or draws.ndim != 2:
            return draws
        pairs = zip(self.names, self.dtypes, draws.T, strict=True)
        table = {name: column.astype(dtype) for name, dtype, column in pairs}
        return importlib.import_module(self.library).DataFrame(table)


def read(
    name: str, x: ArrayLike | Frame, known: Columns | None = None
) -> tuple[ArrayLike, Columns | None]:
    """A frame as an array [n, D] with its columns; anything else as it is.

    With `known` columns the frame's are taken in their order.

    Raises:
        TypeError: if a column does not hold numbers, or has no name.
        ValueError: if columns share a name, are missing or superfluous, or a number is not finite.
    """
    if not isinstance(x, Frame):
        return x, known
    names = checked_names(name, x, None if known is None else known.names)
    columns = [_numbers(name, each, x[each]) for each in names]
    if not columns:
        raise ValueError(f"`{name}` must have at least one column; got none.")
    floats = [c if c.dtype.kind == "f" else c.astype(np.float64) for c in columns]
    dtypes = tuple(each.dtype.name for each in floats)
    return np.stack(floats, 1), known or Columns(tuple(names), dtypes, library_of(x))


def checked_names(
    name: str, x: Frame | Mapping[str, object], wanted: Sequence[str] | None = None
) -> list[str]:
    """The names of the columns of a frame, in the order in which they are wanted.

    Raises:
        TypeError: if a column has no name.
        ValueError: if columns share a name, are missing or superfluous.
    """
    given = list(x) if isinstance(x, Mapping) else list(x.columns)
    if unnamed := [each for each in given if not isinstance(each, str)]:
        fix = f"Perhaps pass `{name}.to_numpy()`?"
        raise TypeError(
            f"Columns of `{name}` must have strings as names; got {unnamed[0]!r}. {fix}"
        )
    names = [each for each in given if isinstance(each, str)]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise ValueError(
            f"Columns of `{name}` must have different names; got {_listed(twice)} twice."
        )
    if wanted is None:
        return names
    rule = f"`{name}` must have the columns {shown(list(wanted))}"
    if missing := [each for each in wanted if each not in names]:
        raise ValueError(f"{rule}; got a frame without {_listed(missing)}.")
    if extra := [each for each in names if each not in wanted]:
        fix = "Perhaps drop them?" if len(extra) > 1 else "Perhaps drop it?"
        raise ValueError(f"{rule}; got {_listed(extra)} too. {fix}")
    return list(wanted)


def library_of(frame: Frame) -> str:
    """The name of the library that a frame is of."""
    return type(frame).__module__.partition(".")[0]


def _numbers(name: str, column: str, values: Frame) -> np.ndarray:
    found = values.to_numpy()
    if found.dtype.kind not in "fiub":
        fix = "Perhaps encode it in numbers, give it as a `context` of codes, or drop it?"
        got = f"dtype {getattr(values, 'dtype', found.dtype)}"
        raise TypeError(f"Column {column!r} of `{name}` must hold numbers; got {got}. {fix}")
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        got = f"{found[bad[0]]} in row {bad[0]}{more}"
        fix = "Perhaps drop or fill in those rows?"
        raise ValueError(f"Column {column!r} of `{name}` must be finite; got {got}. {fix}")
    return found


def _listed(names: list[str]) -> str:
    return shown(names)[1:-1] if len(names) > 1 else repr(names[0])


def support_of(support: SupportLike, columns: Columns | None) -> SupportLike:
    """A support by the names of columns as a sequence, where those without one may be anywhere.

    Raises:
        TypeError: if nothing has names.
        ValueError: if a column is unknown.
    """
    if not isinstance(support, Mapping):
        return support
    if columns is None:
        raise TypeError("`support` may be a dict only where `x` is a data frame; got a dict.")
    if unknown := [each for each in support if each not in columns.names]:
        rule = f"`support` must name columns of `x`, {shown(list(columns.names))}"
        raise ValueError(f"{rule}; got {unknown[0]!r}.")
    return [support.get(each) for each in columns.names]


def in_names(text: str, columns: Columns | None) -> str:
    """A message that says "column 'income'" where it said "column 2"."""
    if columns is None:
        return text
    return re.sub(r"(olumn )(\d+)\b", lambda m: f"{m[1]}{columns.names[int(m[2])]!r}", text)


@contextlib.contextmanager
def errors_in_names(columns: Columns | None) -> Iterator[None]:
    """Errors within name the columns."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if columns is None or in_names(text, columns) == text:
            raise
        raise ValueError(in_names(text, columns)) from None
