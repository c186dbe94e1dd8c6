"""A joint density of a table's columns, and the questions that it answers."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from flowvi import checks, plotting
from flowvi.compiling import compiled
from flowvi.densities import table_frames
from flowvi.densities.density import Density
from flowvi.densities.diagnosis import DensityWarning
from flowvi.densities.frames import Columns
from flowvi.densities.privacy import Privacy, compared
from flowvi.densities.table_frames import FrameType, Tabular
from flowvi.diagnostics import Estimate, mean
from flowvi.families import check_key
from flowvi.families.family import as_shape
from flowvi.families.known import Stacked
from flowvi.params import PyTree
from flowvi.tables import Category, Constant, Encoder, Schema, Table
from flowvi.tables.columns import Column, Level, Values

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

Array = jax.Array

#: Rows that are encoded together, scored together, and drawn together.
ENCODED, SCORED, DRAWN = 65_536, 4096, 2048


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TableDensity(Density):
    """The joint density of a table's columns: of numbers, categories and angles, with holes or not.

    `log_prob` is the log of a density in the units of real columns and angles, times a probability
    mass for all others. A row with missing values has the marginal likelihood of what is there.

    Attributes:
        encoder: the columns, and what was fitted to each.
        frame_type: the frame that it was fitted to.
        names: the columns that it is a density of; the others are summed out.
        known: the values of columns that it is conditional on.
        rest: see `Density`.
    """

    encoder: Encoder
    frame_type: FrameType
    names: tuple[str, ...]
    known: tuple[tuple[str, Level], ...] = ()

    def __repr__(self) -> str:
        given = f" | {', '.join(f'{n}={v!r}' for n, v in self.known)}" if self.known else ""
        return f"TableDensity({', '.join(self.names)}{given})"

    @property
    def schema(self) -> Schema:
        """The kinds of all columns; `schema.replace(...)` changes them for another fit."""
        return self.encoder.schema

    def marginal(self, names: Sequence[str]) -> "TableDensity":
        """The density of some columns, with the others summed out: exact for the network's rows.

        Raises:
            ValueError: if a name is unknown or repeated, or there is none.
        """
        names = self._checked("names", [names] if isinstance(names, str) else list(names))
        return self._part(names, self.known)

    def given(self, values: Mapping[str, Level]) -> "TableDensity":
        """The density of the other columns given the values of some: `given({"sex": "f"})`.

        The network is asked for each column given those and what stands before it, as it is trained
        in random orders of the columns.

        Raises:
            ValueError: if a name is unknown, all columns are given, or a value is none of its
                column's.
        """
        given = self._checked("values", list(values))
        rest = tuple(name for name in self.names if name not in given)
        checks.require(rest, "`values` must leave some columns", list(given), say=checks.shown)
        known = (*self.known, *((name, values[name]) for name in given))
        result = self._part(rest, known)
        result._known_row()  # which checks the values
        return result

    def _part(self, names: tuple[str, ...], known: tuple[tuple[str, Level], ...]) -> "TableDensity":
        dtypes = ("float64",) * len(names)
        columns = Columns(names, dtypes, "")
        none = np.zeros(0)
        return dataclasses.replace(
            self, names=names, known=known, columns=columns, held_out=none, scores=(), messages=()
        )

    def _checked(self, argument: str, names: list[str]) -> tuple[str, ...]:
        rule = f"`{argument}` must name columns of {list(self.names)}, each once"
        bad = [each for each in names if each not in self.names or names.count(each) > 1]
        checks.require(names and not bad, rule, bad[0] if bad else names)
        return tuple(names)

    def log_prob(self, x: Tabular, context: None = None) -> np.ndarray:  # type: ignore[override]
        """Log density of rows in nats, of shape [n], of a frame or a dict of arrays.

        Raises:
            TypeError: if `x` is no frame.
            ValueError: if it has other columns, or values that its columns cannot have.
        """
        found = self._numbers_of(x)
        rows = len(next(iter(found.values())))
        parts = [
            self._log_prob(self._fields({n: each[i : i + ENCODED] for n, each in found.items()}))
            for i in range(0, rows, ENCODED)
        ]
        return np.concatenate(parts)

    def _log_prob(self, rows: np.ndarray) -> np.ndarray:
        joint, part = self._scored(rows)
        return special.logsumexp(joint, 0) - special.logsumexp(part, 0)

    def _scored(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each member the log density [M, n] of all that is there, and of what is known."""
        known = self._known_fields()
        natural = np.array(self._members()[0][0].order)
        order = natural[np.argsort(~known[natural], kind="stable")]
        position = jnp.argsort(jnp.asarray(order))[None]
        joint, part = [], []
        for family, params, log_weight in self._members():
            found = []
            for block, count in blocks(SCORED, rows):
                each = field_log_probs(family, params, jnp.asarray(block), position)
                found.append(np.asarray(each, np.float64)[:count])
            scores = np.concatenate(found)
            joint.append(log_weight + scores.sum(1))
            part.append(log_weight + scores[:, known].sum(1))
        return np.stack(joint), np.stack(part)

    def _members(self) -> list[tuple[Table, PyTree, float]]:
        family, params = self.family, self.params
        if not isinstance(family, Stacked):
            return [(family, params, 0.0)]  # type: ignore[list-item]
        weights = np.asarray(params["log_weights"].value, np.float64)
        return list(zip(family.families, params["families"], weights, strict=True))  # type: ignore[arg-type]

    def _kind(self, name: str) -> Column:
        return self.schema.kinds[self.schema.names.index(name)]

    def _known_fields(self) -> np.ndarray:
        names = [self.schema.names[field.column] for field in self.encoder.fields]
        given = [name for name, _ in self.known]
        return np.array([name in given for name in names], bool)

    def _known_row(self) -> dict[str, np.ndarray]:
        found = {}
        for name, value in self.known:
            values = np.array([value], None if isinstance(value, int | float) else object)
            values = values.astype(object) if isinstance(value, bool) else values
            found[name] = self._kind(name).numbers(values, f"`values[{name!r}]`")
            rule = f"`values[{name!r}]` must be a value"
            checks.require(not np.isnan(found[name][0]), rule, value)
        return found

    def _encoded(self, x: Tabular) -> np.ndarray:
        return self._fields(self._numbers_of(x))

    def _fields(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Encoded rows of columns as numbers; those that are summed out are missing."""
        rows = len(next(iter(values.values())))
        found = {n: np.full(rows, np.nan) for n in self.schema.names}
        found |= {n: np.repeat(each, rows) for n, each in self._known_row().items()}
        found |= values
        return self.encoder.encode(found).astype(np.float32)

    def _numbers_of(self, x: Tabular) -> dict[str, np.ndarray]:
        """The columns of a frame as numbers, NaN where they are missing."""
        values = table_frames.read("x", x, self.names)
        pairs = values.items()
        return {n: self._kind(n).numbers(each, f"Column {n!r} of `x`") for n, each in pairs}

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return (len(self.names),)

    def _rows(self, x: Tabular) -> np.ndarray:  # type: ignore[override]
        """Rows as numbers [n, D]: categories as the numbers of their levels; without holes."""
        found = self._numbers_of(x)
        if holes := [name for name, each in found.items() if np.isnan(each).any()]:
            fix = "Perhaps drop those rows?"
            raise ValueError(
                f"Column {holes[0]!r} of `x` must have no missing values here; got some. {fix}"
            )
        return np.stack(list(found.values()), 1)

    def _drawn(self, key: Array, rows: np.ndarray, alike: bool) -> np.ndarray:
        """Fields [n, F] of rows whose holes are drawn given the rest."""
        check_key(key, " Perhaps `sample(key, n)`?")
        choice_key, key = jax.random.split(key)
        members = self._members()
        chosen = np.zeros(len(rows), int)
        if len(members) > 1:
            first = rows[:1] if alike else rows
            logits = jnp.asarray(self._scored(first)[0].T)
            shape = (len(rows),)
            chosen = np.asarray(jax.random.categorical(choice_key, logits, shape=shape))
        found = np.full(rows.shape[:2], np.nan)
        for number, (family, params, _) in enumerate(members):
            own = np.flatnonzero(chosen == number)
            for start in range(0, len(own), DRAWN):
                part = own[start : start + DRAWN]
                block = rows[np.resize(part, DRAWN)]
                block_key = jax.random.fold_in(jax.random.fold_in(key, number), start)
                made = _walk(family, params, block_key, jnp.asarray(block), alike)
                drawn = np.asarray(made, np.float64)[: len(part)]
                found[part] = self.encoder.scores(drawn) if family.plain else drawn
        return found

    def _draw(
        self, key: Array, sample_shape: int | tuple[int, ...], context: object
    ) -> tuple[np.ndarray, np.ndarray]:
        shape = as_shape(sample_shape)
        found = self._numbers(key, int(np.prod(shape)))
        numbers = np.stack([found[name] for name in self.names], 1)
        return numbers.reshape(*shape, -1), np.zeros(0)

    def _numbers(self, key: Array, count: int) -> dict[str, np.ndarray]:
        row = {n: np.full(1, np.nan) for n in self.schema.names} | self._known_row()
        rows = np.repeat(self.encoder.encode(row).astype(np.float32), count, 0)
        alike = all(field.parent < 0 for field in self.encoder.fields)
        return self.encoder.decode(self._drawn(key, rows, alike))

    def _values(self, found: Mapping[str, np.ndarray]) -> dict[str, Values]:
        return {name: self._kind(name).values(found[name]) for name in self.names}

    def sample(self, key: Array, sample_shape: int = 1, context: None = None) -> object:  # type: ignore[override]
        """Draws as a frame of so many rows, with names and types of the columns."""
        num_rows = checks.positive_int("sample_shape", sample_shape)
        return self.frame_type.frame(self._values(self._numbers(key, num_rows)), self.schema)

    def sample_and_log_prob(  # type: ignore[override]
        self, key: Array, sample_shape: int = 1, context: None = None
    ) -> tuple[object, np.ndarray]:
        """Draws as `sample` gives them, and their log densities."""
        num_rows = checks.positive_int("sample_shape", sample_shape)
        table = self._values(self._numbers(key, num_rows))
        return self.frame_type.frame(table, self.schema), self.log_prob(table)

    def impute(self, x: Tabular, key: Array, num_draws: int | None = None) -> object:
        """A frame whose missing values are drawn given the rest of their rows.

        Args:
            x: a frame with the columns of the density, some of whose values are missing.
            key: a random key.
            num_draws: None for one frame; else a list of so many, for multiple imputation: what
                is computed of each is averaged, and its spread tells what the holes cost.

        Source: Rubin, "Multiple Imputation for Nonresponse in Surveys", 1987.
        """
        values = table_frames.read("x", x, self.names)
        rows = self._encoded(x)
        made = []
        for number in range(
            1 if num_draws is None else checks.positive_int("num_draws", num_draws)
        ):
            drawn = self._drawn(jax.random.fold_in(key, number), rows, alike=False)
            new = self._values(self.encoder.decode(drawn))
            table = {}
            for name, old in values.items():
                is_text = old.dtype.kind == "O"
                hole = np.array([v is None for v in old]) if is_text else np.isnan(old)
                filled = old.astype(object) if new[name].dtype.kind == "O" else old.copy()
                filled[hole] = new[name][hole]
                table[name] = filled
            made.append(self.frame_type.frame(table, self.schema))
        return made[0] if num_draws is None else made

    def plot(  # type: ignore[override]
        self,
        x: Tabular | None = None,
        *,
        names: Sequence[str] | None = None,
        key: Array | None = None,
        num_samples: int = 2_000,
    ) -> "Figure":
        """A picture of draws: marginals and pairs of columns, over data where they are given.

        Args:
            x: a frame with the columns of the density.
            names: columns to draw; by default the first 6.
            key: a random key for the draws.
            num_samples: draws, and rows of the data at most.
        """
        draws = self._draw(jax.random.key(0) if key is None else key, num_samples, None)[0]
        data = None if x is None else np.stack(list(self._numbers_of(x).values()), 1)
        kinds = map(self._kind, self.names)
        levels = [tuple(map(str, k.levels)) if isinstance(k, Category) else None for k in kinds]
        return plotting.table(draws, data, self.names, levels, names=names)

    def quantiles(
        self, parts: Sequence[float], *, key: Array, num_draws: int = 10_000
    ) -> dict[str, np.ndarray]:
        """Quantiles [Q] of each column that has an order, by draws.

        Raises:
            ValueError: if `parts` are not between 0 and 1.
        """
        levels = np.asarray(parts, np.float64)
        inside = levels.ndim == 1 and bool(np.all((levels > 0) & (levels < 1)))
        checks.require(inside, "`parts` must be numbers between 0 and 1", parts)
        found = self._numbers(key, checks.positive_int("num_draws", num_draws))
        result = {}
        for name in self.names:
            kind = self._kind(name)
            if (isinstance(kind, Category) and not kind.ordered) or isinstance(kind, Constant):
                continue
            steps = np.quantile(found[name], levels, method="inverted_cdf")
            result[name] = kind.values(steps)
        return result

    def privacy(
        self, fit: Tabular, held_out: Tabular, key: Array, num_draws: int | None = None
    ) -> Privacy:
        """How close synthetic rows are to rows of the fit, beside rows that were not in it.

        Synthetic rows are no anonymous ones: a density that follows single rows gives them away.

        Args:
            fit: rows that it was fitted to.
            held_out: rows that it was not fitted to.
            key: a random key.
            num_draws: synthetic rows; by default as many as held-out ones.

        Warns:
            DensityWarning: where more synthetic rows than new ones are close to a row of the fit.
        """
        points = [self._points(self._encoded(each)) for each in (fit, held_out)]
        count = len(points[1]) if num_draws is None else num_draws
        drawn = self._values(self._numbers(key, checks.positive_int("num_draws", count)))
        found = compared(points[0], self._points(self._encoded(drawn)), points[1])
        if found.message:
            warnings.warn(found.message, DensityWarning, stacklevel=2)
        return found

    def _points(self, rows: np.ndarray) -> np.ndarray:
        """Encoded rows as points whose squared distances are means over fields."""
        parts = []
        for number, field in enumerate(self.encoder.fields):
            value = rows[:, number, 0]
            value = np.where(np.isnan(value), 0.0, value)  # beside an atom, or missing
            if field.kind == "category":
                parts.append(np.eye(field.size)[value.astype(int)] / np.sqrt(2))
            elif field.kind == "angle":
                parts.append(np.stack([np.cos(value), np.sin(value)], 1))
            else:
                parts.append(value[:, None])
        return np.concatenate(parts, 1) / np.sqrt(len(parts))

    def mutual_information(
        self, first: Sequence[str], second: Sequence[str], *, key: Array, num_draws: int = 10_000
    ) -> Estimate:
        """What some columns say of others, E log p(a, b) - log p(a) - log p(b), in nats, by draws.

        Raises:
            ValueError: if names are unknown or on both sides.
        """
        one, two = ([each] if isinstance(each, str) else list(each) for each in (first, second))
        names = self._checked("first and second", one + two)
        drawn = self._values(self._numbers(key, checks.positive_int("num_draws", num_draws)))
        score = lambda each: self.marginal(each).log_prob({n: drawn[n] for n in each})  # noqa: E731
        return mean(score(names) - score(one) - score(two))


@compiled()
def field_log_probs(family: Table, params: PyTree, x: Array, position: Array) -> Array:
    """log p of each field [n, F] of encoded rows, compiled; see `Table.field_log_probs`."""
    return family.field_log_probs(params, x, position)


@compiled(static_argnums=(4,))
def _walk(family: Table, params: PyTree, key: Array, x: Array, alike: bool) -> Array:
    return family.walk(params, key, x, alike)


def blocks(size: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of so many rows or fewer, the last one filled up, so that few programs serve all."""
    while size >= 8 * max(len(rows), 64):
        size //= 8
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield part[np.minimum(np.arange(size), len(part) - 1)], len(part)
