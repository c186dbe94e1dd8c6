"""Data frames with columns of every kind: their values in, and frames of draws out."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence

import numpy as np

from flowvi.checks import require
from flowvi.densities import frames
from flowvi.densities.frames import MAKERS, Frame
from flowvi.tables import Category, Schema
from flowvi.tables.columns import Column, Values, infer

#: A frame, or arrays by the names of columns.
Tabular = Frame | Mapping[str, object]

DATES = "Perhaps give days since some date as numbers, or the time of the day or of the year as an "
DATES += "`fv.tables.Angle`?"


@dataclasses.dataclass(frozen=True)
class FrameType:
    """What a frame is made of again: its library and the types of its columns.

    Attributes:
        names: the names of all columns.
        dtypes: the types of each, as the library calls them.
        library: what made the frame.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    library: str

    def frame(self, table: Mapping[str, Values], schema: Schema) -> object:
        """Columns as a frame of the same library, a dict of arrays where it is unknown."""
        kinds = dict(zip(schema.names, schema.kinds, strict=True))
        dtypes = dict(zip(self.names, self.dtypes, strict=True))
        made = {name: _typed(values, dtypes[name]) for name, values in table.items()}
        if self.library not in MAKERS:
            return made
        library = importlib.import_module(self.library)
        if self.library == "pandas":
            for name in made:
                kind = kinds[name]
                if dtypes[name] == "category" and isinstance(kind, Category):
                    kept = library.CategoricalDtype(list(kind.levels), kind.ordered)
                    made[name] = library.Series(made[name], dtype=kept)
        else:
            made = {name: each.tolist() for name, each in made.items()}
        return library.DataFrame(made)


def _typed(values: Values, dtype: str) -> Values:
    """Values of a type of numbers or truth values where theirs is one, and there are no holes."""
    name = {"boolean": "bool"}.get(dtype.lower(), dtype.lower())
    is_plain = name.startswith(("int", "uint", "float")) or name == "bool"
    has_holes = values.dtype.kind == "f" and bool(np.isnan(values).any())
    if values.dtype.kind == "O":
        has_holes = any(each is None for each in values)
    if not is_plain or (has_holes and not name.startswith("float")):
        return values
    if values.dtype.kind == "f" and not name.startswith("float"):
        values = np.round(values)
    return values.astype(name)


def is_mixed(x: object) -> bool:
    """Whether this is a frame with columns that are not real numbers, or with missing ones.

    A dict of arrays is one in any case.
    """
    if isinstance(x, Mapping):
        return True
    if not isinstance(x, Frame):
        return False
    for name in x.columns:
        found = x[name].to_numpy() if isinstance(name, str) else np.zeros(0)  # type: ignore[arg-type]
        if found.ndim != 1:
            return False  # of two columns of one name, which is said elsewhere
        if found.dtype.kind != "f" or bool(np.isnan(found).any()):
            return True
    return False


def read(name: str, x: object, wanted: Sequence[str] | None = None) -> dict[str, Values]:
    """Columns as arrays: floating ones with NaN for holes, or objects with None for them.

    Raises:
        TypeError: if this is no frame, or a column holds what no kind of columns is made of.
        ValueError: if columns are missing, superfluous, named alike or of different lengths; or
            infinite.
    """
    if not isinstance(x, Frame | Mapping):
        rule = f"`{name}` must be a data frame, or a dict of arrays"
        raise TypeError(f"{rule}; got a {type(x).__name__}.")
    names = frames.checked_names(name, x, wanted)
    found = {each: _values(_where(name, each), x[each]) for each in names}
    lengths = {each: len(values) for each, values in found.items()}
    rule = f"`{name}` must have columns of one length"
    require(len(set(lengths.values())) == 1, rule, lengths)
    require(next(iter(lengths.values())), f"`{name}` must have at least one row", "none", say=str)
    return found


def _where(name: str, column: str) -> str:
    return f"Column {column!r} of `{name}`"


def frame_type(x: Tabular, names: Sequence[str]) -> FrameType:
    """What to make frames of again."""
    library = "" if isinstance(x, Mapping) else frames.library_of(x)
    dtypes = tuple(str(getattr(x[each], "dtype", np.asarray(x[each]).dtype)) for each in names)
    return FrameType(tuple(names), dtypes, library)


def infer_schema(x: Tabular) -> Schema:
    """The kinds of a frame's columns, by their types and by the numbers that repeat.

    Strings, booleans, and numbers of which there are two are categories; integers, and numbers that
    lie on a grid and repeat, are `Integer`; other numbers are `Real`, with those that are often
    there as atoms; what is the same in all rows is a `Constant`. An angle is not recognised:
    `schema.replace(wind=fv.tables.Angle(360))` says that one is.

    Args:
        x: a data frame, or a dict of arrays.

    Raises:
        TypeError: if a column holds dates or objects.
        ValueError: if a column is empty, infinite, or has more than 1,000 levels; or names repeat.

    Example:
        >>> import numpy as np, flowvi as fv
        >>> rng = np.random.default_rng(0)
        >>> columns = {"age": rng.integers(0, 90, 50), "sex": np.array(["f", "m"] * 25)}
        >>> print(fv.infer_schema(columns))
        age  Integer(width=1.0, offset=0.0, lower=0.0, upper=inf)
        sex  Category(levels=('f', 'm'), ordered=False)
    """
    kinds: dict[str, Column] = {}
    for name, values in read("x", x).items():
        whole = np.asarray(_raw(x[name])).dtype.kind in "iu"
        kinds[name] = infer(values, _where("x", name), whole=whole)
        dtype = getattr(x[name], "dtype", None)
        levels = getattr(dtype, "categories", None)  # those of pandas, whose order is told
        if levels is not None and len(levels) > 1 and hasattr(levels, "tolist"):
            kinds[name] = Category(tuple(levels.tolist()), bool(getattr(dtype, "ordered", False)))
    return Schema.of(kinds)


def _raw(column: object) -> object:
    return column.to_numpy() if hasattr(column, "to_numpy") else column


def _values(where: str, column: object) -> Values:
    found = np.asarray(_raw(column))
    rule, dtype = f"{where} must hold numbers, strings or booleans", getattr(column, "dtype", None)
    got = f"dtype {found.dtype if dtype is None else dtype}"
    require(found.ndim == 1, f"{where} must have one axis", f"shape {found.shape}", say=str)
    if found.dtype.kind in "Mm":
        raise TypeError(f"{rule}; got {got}. {DATES}")
    if found.dtype.kind == "b":
        return found.astype(object)
    if found.dtype.kind in "fiu":
        return _finite(found.astype(np.float64), where)
    listed = [None if _is_missing(each) else each for each in found.tolist()]
    there = [each for each in listed if each is not None]
    if all(isinstance(each, bool) for each in there) or all(isinstance(e, str) for e in there):
        result = np.empty(len(listed), object)
        result[:] = listed
        return result
    if all(isinstance(e, int | float | np.number) and not isinstance(e, bool) for e in there):
        return _finite(np.array([np.nan if e is None else e for e in listed], np.float64), where)
    odd = (
        next(e for e in there if not isinstance(e, str | bool | int | float | np.number))
        if any(not isinstance(e, str | bool | int | float | np.number) for e in there)
        else None
    )
    if odd is None:
        kinds = sorted({type(e).__name__ for e in there})
        fix = "Perhaps convert it with `.astype(str)`?"
        raise TypeError(f"{rule}, all of one type; got {' and '.join(kinds)}. {fix}")
    fix = DATES if hasattr(odd, "year") or hasattr(odd, "hour") else "Perhaps drop that column?"
    raise TypeError(f"{rule}; got a {type(odd).__name__} and {got}. {fix}")


def _is_missing(value: object) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def _finite(found: np.ndarray, where: str) -> np.ndarray:
    bad = np.flatnonzero(np.isinf(found))
    if len(bad):
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        fix = "Perhaps mark it as missing by NaN, or drop those rows?"
        raise ValueError(
            f"{where} must be finite; got {found[bad[0]]} in row {bad[0]}{more}. {fix}"
        )
    return found
