"""Groups of rows with a copula or a normal each, and the scores by which estimates are compared."""

import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np
from scipy import special
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from flowvi.densities.table_density import blocks, field_log_probs
from flowvi.families.family import bare
from flowvi.params import PyTree
from flowvi.tables import Encoder, Table

#: How many groups are tried, where there are so many rows at most; the rows that they are made of
#: at most, and iterations.
GROUPS, MOST_GROUPED, GROUP_ROWS, EM_STEPS = (2, 3, 5), 20_000, 5_000, 12


def names_of(family: Table, num_rows: int) -> list[str]:
    """What is tried for a table: "3 groups" of copulas, and "3 normals" where columns are real."""
    if num_rows > MOST_GROUPED:
        return []
    names = [f"{size} groups" for size in GROUPS]
    if dataclasses.replace(family, plain=True).is_plain.any():
        names += [f"{size} normals" for size in (1, *GROUPS)]
    return names


def named(family: Table, name: str) -> tuple[Table, int]:
    """The family and the number of groups of "3 groups" or "3 normals"."""
    number, _, kind = name.partition(" ")
    return dataclasses.replace(family, plain=kind == "normals"), int(number)


def mixture(
    family: Table,
    start: PyTree,
    encoder: Encoder,
    rows: np.ndarray,
    weights: np.ndarray | None,
    size: int,
) -> list[tuple[PyTree, float]]:
    """(parameters, weight) of groups of rows with a copula each, by expectation maximisation."""
    if len(rows) > GROUP_ROWS:
        some = np.random.default_rng(0).choice(len(rows), GROUP_ROWS, replace=False)
        rows, weights = rows[some], None if weights is None else weights[some]
    units = family.in_units(encoder.units(), rows)
    filled = np.where(np.isnan(units[..., 0]), 0.0, units[..., 0])
    parts = []
    for number, field in enumerate(family.fields):
        value = filled[:, number]
        is_level = field.kind == "category"
        parts.append(np.eye(field.size)[value.astype(int)] if is_level else value[:, None])
    points = np.concatenate(parts, 1)
    points = points[:, points.std(0) > 0]
    points = (points - points.mean(0)) / points.std(0)
    first = GaussianMixture(size, covariance_type="tied", reg_covar=1e-2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        shares = first.fit(points).predict_proba(points)
    counts = np.ones(len(rows)) if weights is None else weights
    alone = family.alone(start)
    for _ in range(EM_STEPS):
        own = shares * counts[:, None]
        total = np.maximum(own.sum(0), 1e-3)
        them = [family.place(alone, encoder, rows, own[:, k] + 1e-6, steps=3) for k in range(size)]
        logs = np.stack([scores(family, params, rows) for params in them], 1)
        logs += np.log(total / total.sum())
        shares = np.exp(logs - special.logsumexp(logs, 1, keepdims=True))
    return list(zip(them, (total / total.sum()).tolist(), strict=True))


def mixture_scores(family: Table, them: list[tuple[PyTree, float]], rows: np.ndarray) -> np.ndarray:
    """Log densities of rows by a mixture."""
    each = [np.log(share) + scores(family, params, rows) for params, share in them]
    return special.logsumexp(np.stack(each), axis=0)


def scores(family: Table, params: PyTree, rows: np.ndarray) -> np.ndarray:
    """Log densities of encoded rows, in double precision."""
    position = jnp.asarray(family.positions)[None]
    found = []
    for block, count in blocks(4096, rows):
        each = field_log_probs(family, bare(params), jnp.asarray(block), position)
        found.append(np.asarray(each, np.float64).sum(1)[:count])
    return np.concatenate(found)
