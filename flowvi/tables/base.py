"""The normal model of scores that a table's conditionals begin from, for any order and any holes.

Each column has scores, such as its normal scores or the indicators of its levels. Under a normal
distribution of all scores, a column given any others has the mean and the variance of a linear
regression: conditioning on one score after the other gives them all, one rank-one update each.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.tables.encoding import Field

Array = jax.Array

#: Categories of more levels have no scores.
MAX_INDICATORS = 8

#: What is added to the variance of each score, as a part of it: single precision needs some.
RIDGE = 2e-4

#: Rows that moments are taken from where some have holes; iterations at most, and when to end.
EM_ROWS, EM_STEPS, EM_CHANGE = 20_000, 60, 1e-4


def scores(fields: Sequence[Field], x: Any, xp: Any) -> Any:
    """Scores [..., S + 1], or without the last one in numpy: of no field, and zero."""
    parts = []
    for number, field in enumerate(fields):
        value = x[..., number, 0]
        match field.kind:
            case "real" | "cell":
                parts.append(value)
            case "angle":
                parts += [xp.cos(value), xp.sin(value)]
            case _ if field.size <= MAX_INDICATORS:
                for level in range(1, field.size):
                    hit = xp.where(value == level, 1.0, 0.0)
                    parts.append(hit + 0 * value)
    if xp is jnp:
        parts.append(jnp.zeros(x.shape[:-2]))
    return xp.stack(parts, -1) if parts else np.zeros((len(x), 0))


def places(fields: Sequence[Field]) -> tuple[np.ndarray, np.ndarray]:
    """(places [F, b] of each field's scores among all, which of these there are)."""
    counts = [_num_scores(field) for field in fields]
    total, most = sum(counts), max([1, *counts])
    places = np.full((len(counts), most), total)
    for row, (start, count) in enumerate(zip(_starts(counts), counts, strict=True)):
        places[row, :count] = start + np.arange(count)
    return places, places < total


def _num_scores(field: Field) -> int:
    if field.kind == "angle":
        return 2
    if field.kind == "category":
        return field.size - 1 if field.size <= MAX_INDICATORS else 0
    return 1


def _starts(counts: list[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)][: len(counts)]


def condition(
    state: tuple[Array, Array], places: Array, valid: Array, scores: Array, observed: Array
) -> tuple[Array, Array]:
    """(mean [n, S], covariance [r, S, S]) given the scores in some places as well.

    Args:
        state: mean and covariance before; r is n, or 1 where all rows observe the same.
        places: of shape [b], of the scores of one column.
        valid: of shape [b], which of these there are.
        scores: of shape [n, S].
        observed: of shape [r], whether the column is observed.
    """
    mean, covariance = state
    for t in range(places.shape[0]):
        place = places[t]
        column = jnp.take(covariance, place, axis=2)
        pivot = jnp.take(column, place, axis=1)
        gain = jnp.where(observed & valid[t], 1 / pivot, 0)[:, None] * column
        off = jnp.take(scores, place, axis=1) - jnp.take(mean, place, axis=1)
        mean = mean + gain * jnp.where(observed, off, 0)[:, None]
        covariance = covariance - gain[:, :, None] * column[:, None, :]
    return mean, covariance


def conditionals(
    mean: Array,
    covariance: Array,
    places: np.ndarray,
    valid: np.ndarray,
    scores: Array,
    observed: Array,
    order: Array,
) -> tuple[Array, Array]:
    """Of each column the means [n, F, b] of its scores and the variance [r, F] of the first one.

    They are given the columns before it in the order that are observed.
    """
    place_table, valid_table = jnp.asarray(places), jnp.asarray(valid)
    count = scores.shape[0]
    start = (
        jnp.broadcast_to(mean, (count, mean.shape[0])),
        jnp.broadcast_to(covariance, (observed.shape[0], *covariance.shape)),
    )

    def step(
        state: tuple[Array, Array], field: Array
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        own, there = place_table[field], valid_table[field]
        means = jnp.take(state[0], own, axis=1)
        variance = jnp.take(jnp.take(state[1], own[0], axis=1), own[0], axis=1)
        seen = jnp.take(observed, field, axis=1)
        return condition(state, own, there, scores, seen), (means, variance)

    _, (means, variances) = jax.lax.scan(step, start, order)
    place = jnp.argsort(order)
    return jnp.moveaxis(means[place], 0, 1), jnp.moveaxis(variances[place], 0, 1)


def moments(
    scores: np.ndarray, weights: np.ndarray | None, steps: int = EM_STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """(mean [S], covariance [S, S]) of rows of scores, of which NaN are holes.

    `weights` say for how many rows each counts. The covariance is shrunk towards no correlation.

    With holes by expectation maximisation: Dempster, Laird, Rubin, "Maximum Likelihood from
    Incomplete Data via the EM Algorithm", 1977.
    """
    count = len(scores)
    there = ~np.isnan(scores)
    if not there.all() and count > EM_ROWS:
        some = np.random.default_rng(0).choice(count, EM_ROWS, replace=False)
        scores, there, count = scores[some], there[some], EM_ROWS
        weights = None if weights is None else weights[some]
    shares = np.ones(count) if weights is None else weights
    total = np.maximum((shares[:, None] * there).sum(0), 1e-9)
    filled = np.where(there, scores, 0)
    mean = (shares[:, None] * filled).sum(0) / total
    spread = np.where(there, (filled - mean) ** 2, 0)
    variance = np.maximum((shares[:, None] * spread).sum(0) / total, 1e-6)
    covariance = np.diag(variance)
    for _ in range(1 if there.all() else steps):
        before = covariance
        mean, covariance = _step(filled, there, shares, mean, covariance)
        if np.abs(covariance - before).max() < EM_CHANGE * np.abs(covariance).max():
            break
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-6))
    correlation = covariance / np.outer(scale, scale)
    np.fill_diagonal(correlation, 1.0)
    part = _shrinkage(correlation, shares.sum())
    correlation = (1 - part) * correlation + (part + RIDGE) * np.eye(len(mean))
    return mean, correlation * np.outer(scale, scale)


def _shrinkage(correlation: np.ndarray, rows: float) -> float:
    """How far to shrink a correlation matrix of so many rows towards none.

    Source: Chen, Wiesel, Eldar, Hero, "Shrinkage Algorithms for MMSE Covariance Estimation", 2010.
    """
    size = len(correlation)
    squares = float(np.sum(correlation**2))
    off = (rows + 1 - 2 / max(size, 1)) * (squares - size)
    if size < 2 or off <= 0:
        return 0.0
    return float(min(1.0, ((1 - 2 / size) * squares + size**2) / off))


def _step(
    filled: np.ndarray,
    there: np.ndarray,
    shares: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    size, total = len(mean), shares.sum()
    if there.all():
        mean = shares @ filled / total
        off = filled - mean
        return mean, (shares[:, None] * off).T @ off / total
    guess, rest = np.empty_like(filled), np.zeros((size, size))
    ridge = covariance + RIDGE * np.diag(np.diag(covariance))
    for rows in np.array_split(np.arange(len(filled)), max(len(filled) * size * size // 2**22, 1)):
        mask = there[rows].astype(float)
        both = mask[:, :, None] * mask[:, None, :]
        inner = ridge * both + np.eye(size) * (1 - mask)[:, :, None]
        gain = np.linalg.solve(inner, mask[:, :, None] * covariance).transpose(0, 2, 1)
        off = mask * (filled[rows] - mean)
        found = mean + np.einsum("nij,nj->ni", gain * mask[:, None, :], off)
        guess[rows] = np.where(there[rows], filled[rows], found)
        seen = np.einsum("nij,jk->nik", gain * mask[:, None, :], covariance)
        hidden = (1 - mask)[:, :, None] * (1 - mask)[:, None, :]
        rest += np.einsum("n,nij->ij", shares[rows], hidden * (covariance - seen))
    mean = shares @ guess / total
    off = guess - mean
    return mean, ((shares[:, None] * off).T @ off + rest) / total
