"""Rows of a table as numbers that a network sees, and back: what is fitted to each column.

A row is an array [F, 4] of F fields. Most columns are one field; one with atoms is two, of which
the first says which atom it is, or none, and the second holds the number where it is none. The
numbers of a field are NaN where it is missing, and else

    real      z, log |dz / dx|, 0, y       z = Phi^-1(F(x)), a normal score
    cell      z, z - z_low, z_high - z, y  the score of a number and the ends of its cell
    category  code, 0, 0, 0
    angle     radians, log |da / dx|, 0, 0

with y = (x - shift) / scale.

All is computed in double precision, before JAX sees it.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from flowvi.bijectors import Marginal
from flowvi.compiling import compiled
from flowvi.families import marginals
from flowvi.tables.columns import Angle, Category, Column, Constant, Integer, Real, Schema

Arrays = dict[str, np.ndarray]

#: Scores beyond this are as good as infinite.
FAR = 12.0

#: Rows that go through the maps together, so that they are compiled once.
BLOCK_ROWS = 4096

#: How much the smooth part of a rounded column's distribution may count, in rows.
ALPHAS = 4.0 ** np.arange(-1, 10)

#: Cells of which a table is made for the walk; scores of more are taken as they are drawn.
MAX_CELLS = 256


@dataclasses.dataclass(frozen=True)
class Field:
    """One variable of the network.

    Attributes:
        kind: "real", "cell", "category" or "angle".
        column: the number of the column that it is of.
        size: how many levels a category has; else 1.
        parent: the number of the field that says whether there is a number at all, or -1.
    """

    kind: str
    column: int
    size: int = 1
    parent: int = -1


def fields_of(schema: Schema) -> tuple[Field, ...]:
    """The fields of the columns, in order; a constant has none."""
    fields: list[Field] = []
    for column, kind in enumerate(schema.kinds):
        match kind:
            case Real(atoms=atoms) if atoms:
                fields.append(Field("category", column, len(atoms) + 1))
                fields.append(Field("real", column, parent=len(fields) - 1))
            case Real():
                fields.append(Field("real", column))
            case Integer():
                fields.append(Field("cell", column))
            case Category(levels=levels):
                fields.append(Field("category", column, len(levels)))
            case Angle():
                fields.append(Field("angle", column))
            case Constant():
                pass
    return tuple(fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """The numbers of columns as fields, and back.

    Attributes:
        schema: the columns.
        maps: the smooth maps of all numeric columns to normal scores: those of
            `flowvi.bijectors.Marginal`, with units, each array with a leading axis of columns.
        cells: for each numeric column the numbers that data held, of a rounded one, how many there
            were below each and at each, and how many rows the smooth map counts for; or empty.
    """

    schema: Schema
    maps: Arrays
    cells: tuple[Arrays, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a row."""
        return fields_of(self.schema)

    @classmethod
    def fitted(
        cls, schema: Schema, found: Mapping[str, np.ndarray], weights: np.ndarray | None
    ) -> "Encoder":
        """Maps to normal scores by the rows of each numeric column, of which NaN are missing."""
        pairs = zip(schema.names, schema.kinds, strict=True)
        numeric = [(kind, found[name]) for name, kind in pairs if isinstance(kind, Real | Integer)]
        rows = max((len(each) for _, each in numeric), default=0)
        bins = marginals.num_bins(rows)
        parts = [_of_column(kind, values, weights, bins) for kind, values in numeric]
        names = ("shift", "scale", "x", "z", "slope", "shape", "bound")
        maps = {n: np.stack([part[0][n] for part in parts]) for n in names} if parts else {}
        encoder = cls(schema, maps, tuple(part[1] for part in parts))
        cells = [
            encoder._with_alpha(number) if each else each
            for number, each in enumerate(encoder.cells)
        ]
        return dataclasses.replace(encoder, cells=tuple(cells))

    def _with_alpha(self, number: int) -> Arrays:
        """How many rows the smooth map counts for, so that each row is likeliest without itself."""
        cell = self.cells[number]
        count, total = cell["count"], cell["count"].sum()
        smooth = special.ndtr(self._smooth(number, cell["value"] + cell["half"]))
        smooth = smooth - special.ndtr(self._smooth(number, cell["value"] - cell["half"]))
        best, chosen = -np.inf, ALPHAS[-1]
        for alpha in ALPHAS:
            left = np.maximum(count - np.minimum(count, 1), 0)
            mass = (left + alpha * np.maximum(smooth, 1e-300)) / (total - 1 + alpha)
            score = float(count @ np.log(np.maximum(mass, 1e-300)))
            if score > best:
                best, chosen = score, alpha
        return {**cell, "alpha": np.array(chosen)}

    def _smooth(self, number: int, x: np.ndarray) -> np.ndarray:
        """Normal scores by the smooth map of one numeric column."""
        return _through(self._map(number), x, inverse=False)[0]

    def _map(self, number: int) -> Arrays:
        return {name: each[number] for name, each in self.maps.items()}

    def _edge(self, number: int, x: np.ndarray) -> np.ndarray:
        """The normal score of an end of a cell, by the blend of what was counted and smooth."""
        cell = self.cells[number]
        z = self._smooth(number, x)
        alpha, total = cell["alpha"], cell["count"].sum()
        place = np.searchsorted(cell["value"], x)
        below = np.concatenate([[0.0], np.cumsum(cell["count"])])[place]
        lower = (below + alpha * special.ndtr(z)) / (total + alpha)
        upper = (total - below + alpha * special.ndtr(-z)) / (total + alpha)
        return np.where(lower < 0.5, special.ndtri(lower), -special.ndtri(upper))

    def encode(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """Rows [n, F, 4] of the numbers of columns, as their kinds give them."""
        rows = len(next(iter(found.values())))
        parts, numeric = [], 0
        for name, kind in zip(self.schema.names, self.schema.kinds, strict=True):
            values = found[name]
            zero = np.where(np.isnan(values), np.nan, 0.0)
            match kind:
                case Category():
                    parts.append([values, zero, zero, zero])
                case Angle(period=period):
                    turn = 2 * math.pi / period
                    parts.append([values * turn, zero + math.log(turn), zero, zero])
                case Integer():
                    own = self._map(numeric)
                    y = (values - own["shift"]) / own["scale"]
                    parts.append([*self._cell(numeric, kind, values), y])
                    numeric += 1
                case Real(atoms=atoms):
                    plain = values
                    if atoms:
                        which = np.where(np.isnan(values), np.nan, 0.0)
                        for code, atom in enumerate(atoms, 1):
                            which[values == atom] = code
                        parts.append([which, zero, zero, zero])
                        plain = np.where(np.isin(values, atoms), np.nan, values)
                    z, log_slope = _through(self._map(numeric), plain, inverse=False)
                    own = self._map(numeric)
                    y = (plain - own["shift"]) / own["scale"]
                    parts.append([np.clip(z, -FAR, FAR), log_slope, plain * 0, y])
                    numeric += 1
                case Constant():
                    pass
        stacked = [np.stack(part, 1) for part in parts]
        return np.stack(stacked, 1) if parts else np.zeros((rows, 0, 4))

    def _cell(self, number: int, kind: Integer, values: np.ndarray) -> list[np.ndarray]:
        half = kind.width / 2
        low, high = self._edge(number, values - half), self._edge(number, values + half)
        low = np.where(values - half < kind.lower, -FAR, low)
        high = np.where(values + half > kind.upper, FAR, high)
        low, high = np.clip(low, -FAR, FAR), np.clip(high, -FAR, FAR)
        high = np.maximum(high, low + 1e-9)
        score = _middle(low, high)
        return [score, score - low, high - score]

    def decode(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of columns, of fields [n, F] as they are drawn."""
        found: dict[str, np.ndarray] = {}
        place, numeric = 0, 0
        drawn = np.concatenate([drawn, np.zeros((len(drawn), 1))], 1)  # for a constant at the end
        for name, kind in zip(self.schema.names, self.schema.kinds, strict=True):
            own = drawn[:, place]
            match kind:
                case Category():
                    found[name] = own
                case Angle(period=period):
                    found[name] = own * period / (2 * math.pi)
                case Integer():
                    found[name] = self._value(numeric, kind, own)
                case Real(atoms=atoms):
                    which = own if atoms else np.zeros(len(drawn))
                    place += bool(atoms)
                    x = _through(self._map(numeric), drawn[:, place], inverse=True)[0]
                    for code, atom in enumerate(atoms, 1):
                        x = np.where(which == code, atom, x)
                    found[name] = np.where(np.isnan(which), np.nan, x)
                case Constant():
                    found[name] = np.zeros(len(drawn))
                    continue
            place += 1
            numeric += isinstance(kind, Real | Integer)
        return found

    def _value(self, number: int, kind: Integer, z: np.ndarray) -> np.ndarray:
        """The number in whose cell a normal score lies."""
        cell = self.cells[number]
        value, half, alpha = cell["value"], kind.width / 2, cell["alpha"]
        total = cell["count"].sum()
        low, high = self._edge(number, value - half), self._edge(number, value + half)
        place = np.clip(np.searchsorted(low, z, "right") - 1, 0, len(value) - 1)
        inside = (z >= low[place]) & (z <= high[place])
        # Between two numbers that were there, or beyond them, only the smooth part counts.
        below = np.concatenate([[0.0], np.cumsum(cell["count"])])[np.searchsorted(high, z)]
        lower = (special.ndtr(z) * (total + alpha) - below) / alpha
        upper = (special.ndtr(-z) * (total + alpha) - (total - below)) / alpha
        tiny = np.finfo(float).tiny
        guess = np.where(
            lower < upper,
            special.ndtri(np.clip(lower, tiny, 1)),
            -special.ndtri(np.clip(upper, tiny, 1)),
        )
        x = _through(self._map(number), np.clip(guess, -FAR, FAR), inverse=True)[0]
        found = np.where(inside, value[place], x)
        found = kind.offset + np.round((found - kind.offset) / kind.width) * kind.width
        return np.where(np.isnan(z), np.nan, np.clip(found, kind.lower, kind.upper))

    def scores(self, drawn: np.ndarray) -> np.ndarray:
        """Fields [n, F] as `decode` takes them, of those that hold y where the kind is plain."""
        result, numeric = drawn.copy(), 0
        for place, field in enumerate(self.fields):
            kind = self.schema.kinds[field.column]
            if is_plain(kind):
                own = self._map(numeric)
                x = own["shift"] + own["scale"] * drawn[:, place]
                if isinstance(kind, Integer):
                    number = np.round((x - kind.offset) / kind.width)
                    value = np.clip(kind.offset + number * kind.width, kind.lower, kind.upper)
                    result[:, place] = self._cell(numeric, kind, value)[0]
                else:
                    z = _through(own, x, inverse=False)[0]
                    result[:, place] = np.clip(z, -FAR, FAR)
            numeric += field.kind in ("real", "cell")
        return result

    def units(self) -> np.ndarray:
        """Of each field (log |dy / dx|, y at the offset of a rounded column, its width in y)."""
        result, numeric = np.zeros((len(self.fields), 3)), 0
        for place, field in enumerate(self.fields):
            if field.kind not in ("real", "cell"):
                continue
            shift, scale = self.maps["shift"][numeric], self.maps["scale"][numeric]
            kind = self.schema.kinds[field.column]
            cell = (kind.offset - shift, kind.width) if isinstance(kind, Integer) else (0.0, 0.0)
            result[place] = -np.log(scale), cell[0] / scale, cell[1] / scale
            numeric += 1
        return result

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """(ends [C, E], scores [C, E + 1]) of cells, for the walk; those of no use are infinite."""
        kinds = [kind for kind in self.schema.kinds if isinstance(kind, Real | Integer)]
        ends, scores = [], []
        for number, kind in enumerate(kinds):
            if not isinstance(kind, Integer):
                continue
            value = self.cells[number]["value"]
            span = round((value[-1] - value[0]) / kind.width) + 1
            if span > MAX_CELLS:
                ends.append(np.full(MAX_CELLS + 1, np.inf))
                scores.append(np.full(MAX_CELLS + 2, np.inf))
                continue
            grid = value[0] + kind.width * np.arange(span)
            score, below, above = self._cell(number, kind, grid)
            pad = MAX_CELLS - span
            own = np.concatenate([[score[0] - below[0]], score + above])
            ends.append(np.concatenate([own, np.full(pad, np.inf)]))
            scores.append(np.concatenate([[np.inf], score, np.full(pad + 1, np.inf)]))
        if not ends:
            return np.zeros((0, MAX_CELLS + 1)), np.zeros((0, MAX_CELLS + 2))
        return np.stack(ends), np.stack(scores)


def _middle(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The mean of a standard normal variable between two ends."""
    swap = low + high > 0
    a, b = np.where(swap, -high, low), np.where(swap, -low, high)
    log_mass = special.log_ndtr(b) + np.log(-np.expm1(special.log_ndtr(a) - special.log_ndtr(b)))
    density = lambda t: np.exp(-0.5 * t * t - log_mass) / math.sqrt(2 * math.pi)  # noqa: E731
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.where(b - a > 1e-4, density(a) - density(b), 0.5 * (a + b))
    mean = np.clip(np.where(np.isfinite(mean), mean, 0.5 * (a + b)), a, b)
    return np.where(np.isnan(low), np.nan, np.where(swap, -mean, mean))


def _of_column(
    kind: Real | Integer, values: np.ndarray, weights: np.ndarray | None, bins: int
) -> tuple[Arrays, Arrays]:
    """(the smooth map of a numeric column, what was counted of a rounded one)."""
    there = ~np.isnan(values)
    if isinstance(kind, Real):
        there &= ~np.isin(values, kind.atoms)
    own = None if weights is None else weights[there]
    x = _repeated(values[there], own)
    cell: Arrays = {}
    lower, upper = kind.lower, kind.upper
    if isinstance(kind, Integer):
        value, first, inverse = np.unique(values[there], return_index=True, return_inverse=True)
        del first
        count = np.bincount(inverse, own).astype(float)
        if own is not None and not np.all(own == np.round(own)):
            count = count * (len(own) / count.sum())
        half = np.full(len(value), kind.width / 2)
        cell = {"value": value, "count": count, "half": half, "alpha": np.array(1.0)}
        x = _spread(np.sort(x), kind.width)
        lower, upper = -np.inf, np.inf
    if not len(x):
        x = np.zeros(1)
    shift, scale = marginals.units(x, lower, upper)
    ends = (lower - shift) / scale, (upper - shift) / scale
    table = marginals.fitted((x - shift) / scale, bins, *ends)
    if np.array_equal(table["x"], table["z"]):  # too few rows: a normal
        y = (x - shift) / scale
        mean, sd = y.mean(), y.std() or 1.0
        shift, scale = shift + scale * mean, scale * sd
    return {**table, "shift": np.array(shift), "scale": np.array(scale)}, cell


def _repeated(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Numbers whose plain quantiles are the weighted ones: repeated where weights are whole."""
    if weights is None:
        return x
    if np.all(weights == np.round(weights)) and weights.sum() < 20 * len(x):
        return np.repeat(x, weights.astype(int))
    return marginals.equally_weighted(x, weights)


def _spread(x: np.ndarray, width: float) -> np.ndarray:
    """Sorted numbers of which equal ones are spread evenly over their cell."""
    _, first, counts = np.unique(x, return_index=True, return_counts=True)
    rank = np.arange(len(x)) - np.repeat(first, counts)
    return x + width * ((rank + 0.5) / np.repeat(counts, counts) - 0.5)


def _through(table: Arrays, values: np.ndarray, *, inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """(score, log slope) of numbers by a map, or numbers of scores; NaN stay NaN."""
    there = ~np.isnan(values)
    shift, scale = float(table["shift"]), float(table["scale"])
    fill = 0.0 if inverse else shift
    x = np.where(there, values, fill)
    x = x if inverse else (x - shift) / scale
    count = -(-max(len(x), 1) // BLOCK_ROWS) * BLOCK_ROWS
    padded = np.concatenate([x, np.zeros(count - len(x))]).reshape(-1, BLOCK_ROWS)
    arrays = {name: table[name][None] for name in ("x", "z", "slope", "shape", "bound")}
    with jax.enable_x64(True):
        own = {name: jnp.asarray(each) for name, each in arrays.items()}
        found = [_scored(own, jnp.asarray(block)[:, None], inverse) for block in padded]
        result, log_slope = (np.concatenate(part)[: len(x)] for part in zip(*found, strict=True))
    result = shift + scale * result if inverse else result
    nan = np.where(there, 0.0, np.nan)
    return result + nan, log_slope - math.log(scale) + nan


@compiled(0, static_argnums=(2,))
def _scored(
    table: dict[str, jax.Array], x: jax.Array, inverse: bool
) -> tuple[jax.Array, jax.Array]:
    marginal = Marginal(**table)
    if inverse:
        z, log_det = marginal.forward_and_log_det(x)
    else:
        z, log_det = marginal.inverse_and_log_det(x)
    return z[:, 0], log_det


def is_plain(kind: Column) -> bool:
    """Whether affine units suit a kind: all but reals with bounds or atoms."""
    return isinstance(kind, Integer) or kind == Real()
