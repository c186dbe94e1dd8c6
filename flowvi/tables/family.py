"""The joint distribution of a table's columns: one network for any column given any others."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from distrax import Distribution

from flowvi import checks
from flowvi.families import Family
from flowvi.families.family import Context, Params, Shape
from flowvi.masked import silu
from flowvi.params import Array, Fixed
from flowvi.tables import base, heads
from flowvi.tables.columns import Schema
from flowvi.tables.encoding import FAR, MAX_CELLS, Encoder, Field, fields_of, is_plain
from flowvi.tables.walk import walk

#: Orders of the columns that one batch is trained in; half of them are the natural one.
ORDERS = 8


class Group(NamedTuple):
    """Fields whose conditionals are of one kind and have as many parameters."""

    kind: str
    size: int
    fields: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name among the parameters."""
        return f"{self.kind}{self.size}"


@dataclasses.dataclass(frozen=True, repr=False)
class Table(Family):
    """The joint distribution of the columns of a table; see `table`.

    A row is an array [F, 4] of encoded fields, of which NaN are missing; see
    `flowvi.tables.Encoder`. With j standing after the fields i in an order,

        pre_j = sum_{i before j, observed} E_i(x_i) + U_j base_j,   h_j = network(pre_j)
        log p(x) = sum_j log p_j(x_j; theta_j),   theta_j = (h_j, pre_j) W_j + b_j

    over the observed fields. base_j is what a normal model of scores says of j given those, and
    theta = 0 is that: so a table begins as a Gaussian copula, for which any order and any holes are
    exact, and the network learns what that misses. One network serves all orders, as it is trained
    in the natural and in random ones.

    With `plain`, real columns stand in affine units rather than in normal scores, so that what it
    begins from is a normal.

    Source: Uria, Murray, Larochelle, "A Deep and Tractable Density Estimator", 2014.

    Example:
        >>> import flowvi as fv
        >>> from flowvi.tables import Real, Schema
        >>> isinstance(fv.table(Schema.of(height=Real(), weight=Real())), fv.tables.Table)
        True
    """

    schema: Schema
    width: int = 64
    num_layers: int = 2
    plain: bool = False
    context_shape: None = None
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        return f"table({len(self.schema.names)} columns, width={self.width})"

    @property
    def event_shape(self) -> Shape:
        return (len(self.fields), 4)

    @functools.cached_property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a row."""
        return fields_of(self.schema)

    @functools.cached_property
    def is_plain(self) -> np.ndarray:
        """Which fields [F] stand in affine units."""
        kinds = self.schema.kinds
        return np.array([self.plain and is_plain(kinds[field.column]) for field in self.fields])

    def in_units(self, units: Any, x: Any) -> Any:
        """Encoded rows whose first three numbers are those of the units that fields stand in."""
        if not self.is_plain.any():
            return x
        xp = np if isinstance(x, np.ndarray) else jnp
        z, y, half = x[..., 0], x[..., 3], 0.5 * units[:, 2]
        # The first and the last cell of a bounded column have no end.
        below = xp.where(z - x[..., 1] < 1e-3 - FAR, 100.0, half)
        above = xp.where(z + x[..., 2] > FAR - 1e-3, 100.0, half)
        is_cell = np.array([field.kind == "cell" for field in self.fields])
        first = xp.where(is_cell, below, units[:, 0]) + 0 * y
        affine = xp.stack([y, first, above + 0 * y, y], -1)
        return xp.where(self.is_plain[:, None], affine, x)

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """The natural order: categories first, the smallest before, as numbers fall into groups."""
        rank = {"category": 0, "angle": 1, "cell": 2, "real": 3}
        fields = self.fields
        return tuple(
            sorted(range(len(fields)), key=lambda f: (rank[fields[f].kind], fields[f].size))
        )

    @property
    def positions(self) -> np.ndarray:
        """Where each field stands in the natural order."""
        return np.argsort(self.order)

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """Fields by the kind of their conditionals; numbers of levels are rounded up to 2^k."""
        found: dict[tuple[str, int], list[int]] = {}
        for number, field in enumerate(self.fields):
            size = 1 << (field.size - 1).bit_length() if field.kind == "category" else 1
            found.setdefault((field.kind, size), []).append(number)
        return tuple(Group(*each, tuple(numbers)) for each, numbers in found.items())

    @functools.cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(places [F, b] of each field's scores among all, which of these there are)."""
        return base.places(self.fields)

    def init(self, key: Array) -> Params:
        keys = iter(jax.random.split(key, 8 + self.num_layers))
        width, count = self.width, len(self.fields)
        normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
        size = int(self.places[0].max(initial=0)) + 1
        kinds = [field.kind for field in self.fields]
        levels = sum(field.size for field in self.fields if field.kind == "category")
        layers = [
            {"w": normal(width, width), "b": jnp.zeros(width)} for _ in range(self.num_layers - 1)
        ]
        groups = {
            group.name: {
                "w": jnp.zeros((len(group.fields), 2 * width, n)),
                "b": jnp.zeros((len(group.fields), n)),
            }
            for group in self.groups
            for n in [heads.num_params(group.kind, group.size)]
        }
        known = {
            "mean": jnp.zeros(size),
            "covariance": jnp.eye(size),
            "levels": {
                g.name: jnp.stack([_even(self.fields[f].size, g.size) for f in g.fields])
                for g in self.groups
                if g.kind == "category"
            },
            "units": jnp.zeros((count, 3)),
            "ends": jnp.full((kinds.count("cell"), MAX_CELLS + 1), jnp.inf),
            "scores": jnp.full((kinds.count("cell"), MAX_CELLS + 2), jnp.inf),
        }
        return {
            "number": normal(len(kinds) - kinds.count("angle"), width),
            "angle": normal(kinds.count("angle"), 4, width),
            "level": normal(levels, width),
            "seen": normal(count, width),
            "base": normal(count, self.places[0].shape[1] + 1, width),
            "start": normal(count, width),
            "layers": layers,
            "heads": groups,
            "known": Fixed(known),
        }

    def place(
        self,
        params: Params,
        encoder: Encoder,
        x: np.ndarray,
        weights: np.ndarray | None = None,
        steps: int = base.EM_STEPS,
    ) -> Params:
        """Parameters whose base is that of rows [n, F, 4], each of which counts so often.

        `steps` are those of expectation maximisation where some have holes.
        """
        x = self.in_units(encoder.units(), x)
        shares = np.ones(len(x)) if weights is None else weights
        mean, covariance = base.moments(np.asarray(base.scores(self.fields, x, np)), weights, steps)
        mean, size = np.append(mean, 0.0), len(mean) + 1
        whole = np.eye(size)
        whole[:-1, :-1] = covariance
        levels = {}
        for group in self.groups:
            if group.kind != "category":
                continue
            logs = np.full((len(group.fields), group.size), -np.inf)
            for row, number in enumerate(group.fields):
                codes, own = x[:, number, 0], self.fields[number].size
                there = ~np.isnan(codes)
                count = np.bincount(codes[there].astype(int), shares[there], own)
                logs[row, :own] = np.log((count + 0.5) / (count.sum() + 0.5 * own))
            levels[group.name] = jnp.asarray(logs, jnp.result_type(float))
        ends, scores = encoder.steps()
        numbers = {"mean": mean, "covariance": whole, "ends": ends, "scores": scores}
        numbers["units"] = encoder.units()
        known = {name: jnp.asarray(a, jnp.result_type(float)) for name, a in numbers.items()}
        return {**params, "known": Fixed({**known, "levels": levels})}

    def alone(self, params: Params, correlated: bool = True) -> Params:
        """Parameters of the base alone, or of columns that do not depend on each other."""
        known = dict(params["known"].value)
        if not correlated:
            known["covariance"] = jnp.diag(jnp.diag(known["covariance"]))
        groups = {}
        for group in self.groups:
            own = jax.tree.map(jnp.zeros_like, params["heads"][group.name])
            if group.kind in ("real", "cell"):
                own["b"] = own["b"].at[:, 0].set(20.0)
            groups[group.name] = own
        return {**params, "heads": groups, "known": Fixed(known)}

    def distribution(self, params: Params, context: Context = None) -> "Rows":
        self.check_context(context)
        return Rows(self, params, jnp.asarray(self.positions)[None])

    def train_distribution(
        self, params: Params, key: Array, context: Context = None
    ) -> tuple["Rows", Params]:
        self.check_context(context)
        count = len(self.fields)
        drawn = jax.random.uniform(key, (ORDERS - ORDERS // 2, count))
        parents = np.array([field.parent for field in self.fields], int)
        # A number cannot stand before what says whether there is one.
        late = drawn[:, np.maximum(parents, 0)] * (1 - 1e-3) + 1e-3 + 1e-4 * drawn
        drawn = jnp.where(parents >= 0, jnp.maximum(drawn, late), drawn)
        shuffled = jnp.argsort(jnp.argsort(drawn, 1), 1)
        natural = jnp.broadcast_to(jnp.asarray(self.positions), (ORDERS // 2, count))
        return Rows(self, params, jnp.concatenate([natural, shuffled])), params

    def field_log_probs(self, params: Params, x: Array, positions: Array) -> Array:
        """log p of each field [n, F] given those that stand before it; 0 where it is missing.

        Args:
            params: parameters.
            x: rows [n, F, 4].
            positions: orders [G, F]: where each field stands. The rows are dealt out to them.
        """
        x = self.in_units(params["known"].value["units"], x)
        rows, count = x.shape[0], positions.shape[0]
        missing = jnp.full((-rows % count, *x.shape[1:]), jnp.nan, x.dtype)
        x = jnp.concatenate([x, missing]).reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        observed = ~jnp.isnan(x[..., 0])
        # Cells of no width would have gradients that are NaN, though nothing looks at them.
        x = jnp.where(observed[..., None], x, np.array([0.0, 1.0, 1.0, 0.0], np.float32))
        means, variances = self._base(params, x, observed, positions)
        part = functools.partial(self._in_order, params)
        found = jax.vmap(part)(x, observed, positions, means, variances)
        return found.swapaxes(0, 1).reshape(-1, x.shape[2])[:rows]

    def _base(
        self, params: Params, x: Array, observed: Array, positions: Array
    ) -> tuple[Array, Array]:
        """What the normal model says of each field: (means [G, m, F, b], variances [G, r, F])."""
        known = params["known"].value
        scores, (places, valid) = base.scores(self.fields, x, jnp), self.places

        def by(seen: Array) -> tuple[Array, Array]:
            run = lambda s, o, position: base.conditionals(  # noqa: E731
                known["mean"], known["covariance"], places, valid, s, o, jnp.argsort(position)
            )
            means, variances = jax.vmap(run)(scores, seen, positions)
            shape = (*means.shape[:2], variances.shape[2])
            return means, jnp.broadcast_to(variances, shape)

        # Where no row has a hole, one covariance serves them all.
        found = jax.lax.cond(jnp.all(observed), lambda: by(observed[:, :1]), lambda: by(observed))
        return jax.lax.stop_gradient(found)

    def _in_order(
        self,
        params: Params,
        x: Array,
        observed: Array,
        position: Array,
        means: Array,
        variances: Array,
    ) -> Array:
        inputs = jnp.where(observed[..., None], self.inputs(params, x), 0)
        seen = (position[None, :] < position[:, None]).astype(x.dtype)
        pre = jnp.einsum("ji,nih->njh", seen, inputs)
        pre = pre + self.terms(params, means, variances, np.arange(x.shape[1]))
        features = self.network(params, pre)
        result = jnp.zeros(x.shape[:2])
        for group in self.groups:
            own = np.array(group.fields)
            theta = self._theta(params, group, features[:, own])
            scale = jnp.sqrt(variances[:, own])
            found = self._log_prob(params, group, theta, means[:, own], scale, x[:, own])
            result = result.at[:, own].set(found)
        return jnp.where(observed, result, 0)

    def _log_prob(
        self, params: Params, group: Group, theta: Array, means: Array, scale: Array, row: Array
    ) -> Array:
        match group.kind:
            case "real":
                return heads.log_density(theta, means[..., 0], scale, row)
            case "cell":
                return heads.log_mass(theta, means[..., 0], scale, row)
            case "angle":
                return heads.log_circular(theta, row)
        logs = self.log_levels(params, group, theta, means)
        codes = row[..., :1].astype(int)
        return jnp.take_along_axis(logs, codes, -1)[..., 0]

    def log_levels(self, params: Params, group: Group, theta: Array, means: Array) -> Array:
        start = params["known"].value["levels"][group.name]
        linear = means[..., :0]
        if group.size <= base.MAX_INDICATORS:
            missing = group.size - 1 - means.shape[-1]
            linear = means[..., : group.size - 1]
            linear = jnp.pad(linear, [(0, 0)] * (linear.ndim - 1) + [(0, max(missing, 0))])
            valid = self.places[1][np.array(group.fields)][:, : group.size - 1]
            valid = np.pad(valid, [(0, 0), (0, max(missing, 0))])
            linear = jnp.where(valid, linear, 0)
        return heads.log_levels(theta, start, linear)

    def inputs(self, params: Params, x: Array) -> Array:
        """E_i(x_i), of shape [n, F, H]."""
        parts: list[Array] = []
        number = angle = level = 0
        for place, field in enumerate(self.fields):
            value = x[:, place, 0]
            if field.kind == "angle":
                turns = [jnp.cos(value), jnp.sin(value), jnp.cos(2 * value), jnp.sin(2 * value)]
                parts.append(jnp.stack(turns, -1) @ params["angle"][angle])
                angle += 1
            elif field.kind == "category":
                table = params["level"][level : level + field.size]
                parts.append(table[value.astype(int)])
                level += field.size
                number += 1
            else:
                parts.append(value[:, None] * params["number"][number])
                number += 1
        scale = len(self.fields) ** -0.5
        return scale * (jnp.stack(parts, 1) + params["seen"])

    def terms(self, params: Params, means: Array, variances: Array, own: np.ndarray) -> Array:
        """What the base adds for each of some fields: of means [n, f, b] and variances [n, f]."""
        features = jnp.concatenate([means, 0.5 * jnp.log(variances)[..., None]], -1)
        scale = params["base"].shape[1] ** -0.5
        return (
            scale * jnp.einsum("nfb,fbh->nfh", features, params["base"][own]) + params["start"][own]
        )

    def network(self, params: Params, pre: Array) -> Array:
        """Features [..., 2 H] of pre-activations [..., H]."""
        h = silu(pre)
        for layer in params["layers"]:
            h = h + silu(h @ layer["w"] * self.width**-0.5 + layer["b"])
        return jnp.concatenate([h, pre], -1) * (2 * self.width) ** -0.5

    def _theta(self, params: Params, group: Group, features: Array) -> Array:
        own = params["heads"][group.name]
        return jnp.einsum("nfh,fhp->nfp", features, own["w"]) + own["b"]

    def walk(self, params: Params, key: Array, x: Array, alike: bool) -> Array:
        """Draws of what is missing in rows [n, F, 4] given the rest, as fields [n, F].

        What has no value, as a number beside an atom, stays NaN. `alike` says that in all rows the
        same fields are there.
        """
        return walk(self, params, key, x, alike)


class Rows(Distribution):
    """The distribution of encoded rows in some orders, to which rows are dealt out.

    Draws hold scores, as a density has them that has no units; see `Table.walk`.
    """

    def __init__(self, family: Table, params: Params, positions: Array):
        super().__init__()
        self._family, self._params, self._positions = family, params, positions

    @property
    def event_shape(self) -> Shape:
        return self._family.event_shape

    @property
    def batch_shape(self) -> Shape:
        return ()

    def log_prob(self, value: Array) -> Array:
        x = jnp.asarray(value, jnp.result_type(float))
        rows = x.reshape(-1, *self.event_shape)
        found = self._family.field_log_probs(self._params, rows, self._positions)
        return found.sum(-1).reshape(x.shape[:-2])

    def _sample_n(self, key: Array, n: int) -> Array:
        x = jnp.full((n, *self.event_shape), jnp.nan)
        alike = all(field.parent < 0 for field in self._family.fields)
        values = self._family.walk(self._params, key, x, alike)
        return jnp.stack([values, 0 * values, 0 * values, values], -1)


def _even(count: int, size: int) -> Array:
    """Log probabilities of so many levels, in an array of some size."""
    return jnp.where(np.arange(size) < count, -math.log(count), -jnp.inf)


def table(schema: Schema, *, width: int = 64, num_layers: int = 2) -> Table:
    """The joint distribution of columns of every kind, to be fitted by `fv.fit_density`.

    One autoregressive network over the columns; each conditional is of its column's kind: a mixture
    of normals for numbers, in normal scores of the column, whose distribution function gives the
    mass of each value of rounded ones; probabilities of levels; wrapped normals for angles. It
    knows any column given any others, so that missing values, marginals and conditionals are
    answered by the same network.

    Args:
        schema: the columns, as `fv.infer_schema(frame)` finds them.
        width: units of each hidden layer.
        num_layers: hidden layers.

    Raises:
        TypeError: if `schema` is none, or sizes are no integers.
        ValueError: if no column varies.

    Source: Uria, Murray, Larochelle, "A Deep and Tractable Density Estimator", 2014, for one
    network of any order.

    Example:
        >>> import flowvi as fv
        >>> from flowvi.tables import Category, Real, Schema
        >>> fv.table(Schema.of(height=Real(), sex=Category(("f", "m"))))
        table(2 columns, width=64)
    """
    rule = "`schema` must be a schema, such as `fv.infer_schema(frame)`"
    checks.require(isinstance(schema, Schema), rule, schema, error=TypeError, say=checks.shown)
    rule = "`schema` must have a column that varies"
    checks.require(fields_of(schema), rule, list(schema.names), say=checks.shown)
    width = checks.positive_int("width", width)
    return Table(schema, width, checks.positive_int("num_layers", num_layers))
