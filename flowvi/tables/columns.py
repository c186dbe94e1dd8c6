"""Columns of a table: what kind each is of, and how a frame is read by it.

A kind is a frozen dataclass. It turns the values of a column into numbers, NaN for holes, and
numbers into values again. What is fitted to data is not here but in `encoding`.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from flowvi.checks import require, shown

Level = str | float | int | bool
#: Values of a column: numbers, or objects of which None is a hole.
Values = np.ndarray

#: A column of more different levels is refused: each of them would need rows of its own.
MAX_LEVELS = 1000

#: A number that is so large a part of a column, and so often there, is a spike.
SPIKE, LEAST_SPIKE = 0.03, 8

#: A column of numbers is rounded if fewer of them than this part are different ones.
TIED = 0.7


@dataclasses.dataclass(frozen=True)
class Real:
    """Real numbers between bounds, with a density; and atoms, values that have a mass of their own.

    Attributes:
        lower: numbers are above it.
        upper: numbers are below it.
        atoms: such as (0.0,) of an income that many have not. They may lie on the bounds.

    Raises:
        ValueError: if `lower` is not below `upper`.

    Example:
        >>> import flowvi as fv
        >>> fv.tables.Real(lower=0.0, atoms=(0.0,))
        Real(lower=0.0, upper=inf, atoms=(0.0,))
    """

    lower: float = -math.inf
    upper: float = math.inf
    atoms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rule = "`lower` must be below `upper`"
        require(self.lower < self.upper, rule, (self.lower, self.upper))

    def numbers(self, values: Values, where: str) -> np.ndarray:
        found = _floats(values, where)
        spike = np.isin(found, self.atoms)
        outside = ~spike & ~np.isnan(found) & ~((found > self.lower) & (found < self.upper))
        fix = "Perhaps drop that row, or give the value as one of the `atoms`?"
        _none(outside, found, f"{where} must lie in ({self.lower:g}, {self.upper:g})", fix)
        return found

    def values(self, found: np.ndarray) -> Values:
        return found


@dataclasses.dataclass(frozen=True)
class Integer:
    """Whole numbers, or numbers rounded to offset + k width: each has the mass of its cell.

    Attributes:
        width: the distance of two neighbours.
        offset: one of the numbers.
        lower: the least one there can be, or -inf.
        upper: the greatest one, or inf.

    Raises:
        ValueError: if the width is not positive, or `lower` is not below `upper`.

    Source: Heitjan, Rubin, "Ignorability and Coarse Data", 1991, for the mass of a rounded number.

    Example:
        >>> import flowvi as fv
        >>> fv.tables.Integer(lower=0)
        Integer(width=1.0, offset=0.0, lower=0, upper=inf)
    """

    width: float = 1.0
    offset: float = 0.0
    lower: float = -math.inf
    upper: float = math.inf

    def __post_init__(self) -> None:
        require(self.width > 0, "`width` must be positive", self.width)
        rule = "`lower` must be below `upper`"
        require(self.lower < self.upper, rule, (self.lower, self.upper))

    def numbers(self, values: Values, where: str) -> np.ndarray:
        found = _floats(values, where)
        number = np.round((found - self.offset) / self.width)
        near = self.offset + number * self.width
        apart = np.abs(near - found) > 1e-3 * self.width + 1e-6 * np.abs(found)
        rule = f"{where} must hold multiples of {self.width:g}"
        rule += f" from {self.offset:g} on" if self.offset else ""
        _none(apart, found, rule, "Perhaps make it a `Real`?")
        half = 0.25 * self.width
        outside = (found < self.lower - half) | (found > self.upper + half)
        _none(outside, found, f"{where} must lie in [{self.lower:g}, {self.upper:g}]")
        return near

    def values(self, found: np.ndarray) -> Values:
        inside = np.clip(found, self.lower, self.upper)
        exact = self.offset + np.round((inside - self.offset) / self.width) * self.width
        # 0.1 + 2 * 0.1 is to read 0.3.
        return np.round(exact, 12)


@dataclasses.dataclass(frozen=True)
class Category:
    """One of some levels: strings, booleans or numbers.

    Attributes:
        levels: all there are.
        ordered: whether their order means something.

    Raises:
        ValueError: if there are not two different levels or more.

    Example:
        >>> import flowvi as fv
        >>> fv.tables.Category(("f", "m"))
        Category(levels=('f', 'm'), ordered=False)
    """

    levels: tuple[Level, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(_plain(each) for each in self.levels))
        rule = "`levels` must be two different ones or more"
        require(len(set(self.levels)) == len(self.levels) > 1, rule, self.levels, say=shown)

    def numbers(self, values: Values, where: str) -> np.ndarray:
        codes = {level: number for number, level in enumerate(self.levels)}
        found = np.full(len(values), np.nan)
        for row, value in enumerate(values.tolist()):
            if value is None or value != value:
                continue
            code = codes.get(value)
            if code is None:
                fix = "Perhaps give it to `Category(levels)`, or take it for missing?"
                rule = f"{where} must hold one of its levels {shown(list(self.levels), 60)}"
                raise ValueError(f"{rule}; got {value!r} in row {row}. {fix}")
            found[row] = code
        return found

    def values(self, found: np.ndarray) -> Values:
        levels = np.array(self.levels, object)
        return levels[np.asarray(found, int)]


@dataclasses.dataclass(frozen=True)
class Angle:
    """Numbers on a circle: directions, times of the day or of the year.

    Attributes:
        period: that after which all is the same: 2 pi, 360, 24, 365.25.

    Raises:
        ValueError: if the period is not positive and finite.

    Source: Mardia, Jupp, "Directional Statistics", 2000.

    Example:
        >>> import flowvi as fv
        >>> fv.tables.Angle(360.0)
        Angle(period=360.0)
    """

    period: float = 2 * math.pi

    def __post_init__(self) -> None:
        rule = "`period` must be positive and finite"
        require(0 < self.period < math.inf, rule, self.period)

    def numbers(self, values: Values, where: str) -> np.ndarray:
        return _floats(values, where) % self.period

    def values(self, found: np.ndarray) -> Values:
        return found % self.period


@dataclasses.dataclass(frozen=True)
class Constant:
    """One value that all rows have, and no other.

    Attributes:
        value: the value that all rows have.

    Example:
        >>> import flowvi as fv
        >>> fv.tables.Constant(3.0)
        Constant(value=3.0)
    """

    value: Level

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _plain(self.value))

    def numbers(self, values: Values, where: str) -> np.ndarray:
        for row, value in enumerate(values.tolist()):
            if not (value is None or value != value or value == self.value):
                rule = f"{where} must hold the constant {self.value!r}"
                raise ValueError(f"{rule}; got {value!r} in row {row}. Perhaps drop that column?")
        return np.zeros(len(values))

    def values(self, found: np.ndarray) -> Values:
        return np.full(len(found), self.value, object)


Column = Real | Integer | Category | Angle | Constant


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a table, in order.

    Attributes:
        names: their names.
        kinds: what each is.

    Raises:
        ValueError: if there is not one name for each kind.
        TypeError: if a kind is none of these.

    Example:
        >>> from flowvi.tables import Category, Integer, Schema
        >>> schema = Schema.of(age=Integer(lower=0), sex=Category(("f", "m")))
        >>> schema.replace(age=Integer()).kinds[0]
        Integer(width=1.0, offset=0.0, lower=-inf, upper=inf)
    """

    names: tuple[str, ...]
    kinds: tuple[Column, ...]

    RULE: ClassVar[str] = "`schema` must have kinds of columns, such as `fv.tables.Real()`"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            require(isinstance(kind, Column), self.RULE, kind, error=TypeError)
        rule = "`schema` must have a name for each kind of column, and at least one"
        require(len(self.names) == len(self.kinds) > 0, rule, self.names)

    @classmethod
    def of(cls, columns: Mapping[str, Column] | None = None, **more: Column) -> "Schema":
        """A schema from kinds by name."""
        both = {**(columns or {}), **more}
        return cls(tuple(both), tuple(both.values()))

    def replace(self, **kinds: Column) -> "Schema":
        """The same with other kinds for some columns."""
        if unknown := [name for name in kinds if name not in self.names]:
            rule = f"`schema` must have the columns that are replaced, of {list(self.names)}"
            raise ValueError(f"{rule}; got {unknown[0]!r}.")
        return Schema.of({**dict(zip(self.names, self.kinds, strict=True)), **kinds})

    def __str__(self) -> str:
        width = max(map(len, self.names))
        pairs = zip(self.names, self.kinds, strict=True)
        return "\n".join(f"{name:<{width}}  {shown(kind, 100)}" for name, kind in pairs)


def infer(values: Values, where: str, *, whole: bool = False) -> Column:
    """The kind that values seem to be of; `whole` says that they are of a type of integers.

    A column of one value is a `Constant`; of strings, booleans or two numbers a `Category`; of
    integers, or of numbers that lie on a grid and repeat, an `Integer`; of others a `Real`, whose
    atoms are the numbers that repeat.

    Raises:
        ValueError: if all values are missing, or there are too many levels.
    """
    is_text = values.dtype.kind == "O"
    there = values[[v is not None for v in values]] if is_text else values[~np.isnan(values)]
    fix = "Perhaps drop that column?"
    require(len(there), f"{where} must hold values", "only missing ones", fix, say=str)
    if is_text:
        return _of_levels(sorted(set(there.tolist())), where)
    levels, counts = np.unique(there, return_counts=True)
    if len(levels) == 1:
        return Constant(_plain(levels[0]))
    if len(levels) == 2:
        return Category(tuple(int(each) if whole else float(each) for each in levels), ordered=True)
    tied = len(levels) < TIED * len(there)
    width = _grid(levels) if whole or tied else 0.0
    if width:
        lower = 0.0 if levels[0] == 0 else -math.inf
        # Of 0.3 and 0.1 a remainder would be nearly 0.1.
        offset = levels[0] - np.floor(levels[0] / width + 1e-6) * width
        return Integer(width, abs(round(float(offset), 9)), lower)
    spike = counts >= max(SPIKE * len(there), LEAST_SPIKE)
    rest, atoms = levels[~spike], levels[spike]
    if len(rest) < LEAST_SPIKE:
        rest, atoms = levels, levels[:0]
    lower = float(atoms[0]) if len(atoms) and atoms[0] < rest[0] and atoms[0] == 0 else -math.inf
    return Real(lower, math.inf, tuple(map(float, atoms)))


def _of_levels(levels: list, where: str) -> Column:
    if len(levels) == 1:
        return Constant(levels[0])
    rule = f"{where} must have at most {MAX_LEVELS} different levels"
    fix = "Perhaps drop that column, or put rare levels together?"
    require(len(levels) <= MAX_LEVELS, rule, len(levels), fix)
    return Category(tuple(levels))


def _grid(levels: np.ndarray) -> float:
    """The widest grid on which all numbers lie; 0 where there is none."""
    for digits in range(7):
        scaled = (levels - levels[0]) * 10.0**digits
        near = np.round(scaled)
        if np.abs(near).max() < 2**52 and np.all(np.abs(scaled - near) < 1e-3):
            common = int(np.gcd.reduce(near.astype(np.int64)))
            return round(common / 10.0**digits, 12)
    return 0.0


def _plain(value: object) -> Level:
    """A level as a plain number, string or boolean."""
    found = value.item() if isinstance(value, np.generic) else value
    rule = "`levels` must be strings, booleans or numbers"
    require(isinstance(found, str | bool | int | float), rule, value, error=TypeError)
    return found  # type: ignore[return-value]


def _floats(values: Values, where: str) -> np.ndarray:
    if values.dtype.kind == "O":
        first = next((v for v in values.tolist() if v is not None), None)
        is_number = first is None or isinstance(first, numbers.Real)
        require(is_number, f"{where} must hold numbers", first, error=TypeError)
        values = np.array([np.nan if v is None else v for v in values], np.float64)
    return np.asarray(values, np.float64)


def _none(bad: np.ndarray, found: np.ndarray, rule: str, fix: str = "") -> None:
    """Checks that no row is bad."""
    rows = np.flatnonzero(bad)
    if len(rows):
        more = f", and {len(rows) - 1} more" if len(rows) > 1 else ""
        raise ValueError(f"{rule}; got {found[rows[0]]:g} in row {rows[0]}{more}. {fix}".rstrip())
