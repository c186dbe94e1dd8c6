"""The walk over the fields of rows that draws what is missing, one field after the other."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.families.family import Params
from flowvi.params import Array, Fixed
from flowvi.tables import base, heads
from flowvi.tables.columns import Column, Integer

if TYPE_CHECKING:
    from flowvi.tables.family import Group, Table


def walk(family: "Table", params: Params, key: Array, x: Array, alike: bool) -> Array:
    """Draws of what is missing in rows [n, F, 4] given the rest, as fields [n, F].

    What has no value, as a number beside an atom, stays NaN. `alike` says that in all rows the
    same fields are there.
    """
    known = params["known"].value
    places, valid = family.places
    x = family.in_units(known["units"], x)
    there = ~jnp.isnan(x[..., 0])
    filled = jnp.where(there[..., None], x, 0)
    inputs = jnp.where(there[..., None], family.inputs(params, filled), 0).sum(1)
    rows, count = there.shape
    observed = there[:1] if alike else there
    state = (
        jnp.broadcast_to(known["mean"], (rows, len(known["mean"]))),
        jnp.broadcast_to(known["covariance"], (len(observed), *known["covariance"].shape)),
    )
    scores = base.scores(family.fields, filled, jnp)

    def given(state: tuple[Array, Array], f: Array) -> tuple[tuple[Array, Array], None]:
        own = jnp.take(observed, f, axis=1)
        return base.condition(
            state, jnp.asarray(places)[f], jnp.asarray(valid)[f], scores, own
        ), None

    state, _ = jax.lax.scan(given, state, jnp.arange(count))
    values = jnp.where(there, filled[..., 0], jnp.nan)
    keys = jax.random.split(key)
    uniform = jax.random.uniform(keys[0], there.shape, x.dtype)
    normal = jax.random.normal(keys[1], there.shape, x.dtype)
    cells = [number for number, field in enumerate(family.fields) if field.kind == "cell"]
    for f in family.order:
        field = family.fields[f]
        group = next(g for g in family.groups if f in g.fields)
        means = state[0][:, places[f]]
        variance = jnp.broadcast_to(state[1][:, places[f][0], places[f][0]], (rows,))
        own = np.array([f])
        pre = inputs + family.terms(params, means[:, None], variance[:, None], own)[:, 0]
        head = params["heads"][group.name]
        at = group.fields.index(f)
        theta = family.network(params, pre) @ head["w"][at] + head["b"][at]
        noise = uniform[:, f], normal[:, f]
        if field.kind == "angle":
            drawn = heads.draw_angle(noise, theta)
        elif field.kind == "category":
            alone = _one(params, group, at)
            logs = family.log_levels(
                alone, group._replace(fields=(f,)), theta[:, None], means[:, None]
            )
            drawn = heads.pick(noise[0], logs[:, 0])
        else:
            drawn = heads.draw_score(noise, theta, means[:, 0], jnp.sqrt(variance))
            if field.kind == "cell":
                cell = cells.index(f)
                drawn = _stepped(drawn, known["ends"][cell], known["scores"][cell])
        drawn = drawn.astype(x.dtype)  # parameters may be of double precision
        visible = ~there[:, f]
        if field.parent >= 0:
            visible &= values[:, field.parent] == 0
        values = values.at[:, f].set(jnp.where(visible, drawn, values[:, f]))
        clean = jnp.where(visible, drawn, 0)
        filled = filled.at[:, f, 0].set(jnp.where(visible, drawn, filled[:, f, 0]))
        new = jnp.where(visible[:, None], _input(family, params, f, clean), 0)
        inputs = inputs + new
        state = base.condition(
            state,
            jnp.asarray(places[f]),
            jnp.asarray(valid[f]),
            base.scores(family.fields, filled, jnp),
            visible[:1] if alike else visible,
        )
    return values


def _one(params: Params, group: "Group", at: int) -> Params:
    levels = params["known"].value["levels"][group.name][at : at + 1]
    return {"known": Fixed({"levels": {group.name: levels}})}


def _input(family: "Table", params: Params, f: int, value: Array) -> Array:
    """E_f of values [n], of shape [n, H]."""
    x = jnp.zeros((len(value), len(family.fields), 4), value.dtype).at[:, f, 0].set(value)
    return family.inputs(params, x)[:, f]


def _rounded(y: Array, units: Array, kind: Column) -> Array:
    """The number of a rounded column in affine units that is the closest."""
    rounded = jnp.round((y - units[1]) / units[2])
    if isinstance(kind, Integer):
        ends = ((end - kind.offset) / kind.width for end in (kind.lower, kind.upper))
        rounded = jnp.clip(rounded, *ends)
    return units[1] + units[2] * rounded


def _stepped(z: Array, ends: Array, scores: Array) -> Array:
    """The score of the cell in which a score lies, where a table has it."""
    found = scores[jnp.searchsorted(ends, z)]
    return jnp.where(jnp.isfinite(found), found, z)
