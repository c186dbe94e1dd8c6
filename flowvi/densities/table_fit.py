"""The fit of a table: a network for its columns, beside what it begins from."""

import dataclasses
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import special
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from flowvi.densities import diagnosis, table_frames
from flowvi.densities.data import Split, check_weights, num_held_out, shuffled
from flowvi.densities.diagnosis import DensityWarning
from flowvi.densities.frames import Columns
from flowvi.densities.recipe import DIVERGED, FEW_ROWS, PARTS, Score, chosen_weights, mixed
from flowvi.densities.table_density import TableDensity, _blocks, _field_log_probs
from flowvi.densities.table_frames import Tabular
from flowvi.densities.training import Training, fresh
from flowvi.diagnostics import mean
from flowvi.families.family import bare
from flowvi.families.known import Stacked
from flowvi.params import Fixed, Origin, PyTree
from flowvi.tables import Encoder, Table, table
from flowvi.training import FitResult, TrainingDiverged

Array = jax.Array

#: Steps: so many epochs, but within these bounds.
EPOCHS, MIN_STEPS, MAX_STEPS = 60, 1_000, 8_000

#: Units of a layer by the number of rows.
WIDTHS = ((0, 32), (1_500, 64), (20_000, 96))

#: How many groups of rows with a copula each are tried, where there are so many rows at most; the
#: rows that they are made of at most, and iterations.
GROUPS, MOST_GROUPED, GROUP_ROWS, EM_STEPS = (2, 3, 5), 20_000, 5_000, 12

#: With fewer rows nothing is compared.
LEAST_ROWS = 20

INDEPENDENT = (
    "The columns look independent: nothing that says how they depend on each other scores held-"
    "out rows better. Perhaps more rows?"
)


def fit_table(
    family: Table | None,
    x: Tabular,
    *,
    key: Array,
    weights: ArrayLike | None,
    validation_fraction: float,
    patience: int | None,
    options: dict[str, Any],
) -> TableDensity:
    """Fits the joint density of the columns of a table; see `fit_density`."""
    started = time.monotonic()
    schema = table_frames.infer_schema(x) if family is None else family.schema
    values = table_frames.read("x", x, schema.names)
    rows = len(next(iter(values.values())))
    pairs = zip(schema.names, schema.kinds, strict=True)
    found = {n: kind.numbers(values[n], f"Column {n!r} of `x`") for n, kind in pairs}
    counts = check_weights(weights, rows)
    if counts is not None:
        counts = counts * (np.count_nonzero(counts) / counts.sum())
    if counts is not None and not counts.all():
        used = counts > 0
        found, counts = {n: each[used] for n, each in found.items()}, counts[used]
        rows = len(counts)
    if family is None:
        width = next(width for least, width in reversed(WIDTHS) if rows >= least)
        family = table(schema, width=width)
    if rows < LEAST_ROWS:
        few = f"`x` has {rows} rows, which are too few to know how good a density of them is."
        warnings.warn(few, RuntimeWarning, stacklevel=3)
    num_held = num_held_out(validation_fraction, rows)
    init_key, split_key, fit_key = jax.random.split(key, 3)
    order = shuffled(split_key, rows)
    is_few = rows < FEW_ROWS
    parts = [order[:num_held]]
    if is_few and num_held:
        parts = np.split(order[: rows // PARTS * PARTS], PARTS)
    if rows < LEAST_ROWS:
        parts = []
    # Of many rows all is made of those to train on; few are needed, all of them, for each column.
    seen = np.ones(rows, bool)
    if len(parts) == 1:
        seen[parts[0]] = False
    shown = {n: each[seen] for n, each in found.items()}
    encoder = Encoder.fitted(schema, shown, None if counts is None else counts[seen])
    encoded = encoder.encode(found).astype(np.float32)
    steps = options.get("num_steps")
    start = fresh(family, init_key)

    sizes = [f"{size} groups" for size in GROUPS]
    if dataclasses.replace(family, plain=True).is_plain.any():
        sizes += [f"{size} normals" for size in (1, *GROUPS)]
    sizes = sizes if rows <= MOST_GROUPED else []
    columns: dict[str, list[np.ndarray]] = {}
    members: list[PyTree] = []
    results: list[FitResult] = []
    messages: list[str] = []
    for number, part in enumerate(parts):
        split = Split(encoded, None, part, counts)
        own, _, own_weights = split.whole_training()
        placed = family.place(start, encoder, own, own_weights)
        tried = {"marginals": family.alone(placed, False), "copula": family.alone(placed)}
        if steps != 0:
            chosen = {**options, "num_steps": steps or _num_steps(len(own))}
            training = Training(patience if len(part) else None, chosen)
            try:
                result = training.of_part(number, len(parts) > 1).run(
                    family, placed, split, fit_key
                )
            except TrainingDiverged as error:
                result = error.result
                messages.append(DIVERGED)
            results.append(result)
            tried["network"] = result.params
            members.append(bare(result.params))
        if not len(part):
            continue
        new = encoded[split.rows_out]
        for name, params in tried.items():
            columns.setdefault(name, []).append(scores(family, params, new))
        for name in sizes:
            of, size = _groups(family, name)
            them = mixture(of, placed, encoder, own, own_weights, size)
            columns.setdefault(name, []).append(mixture_scores(of, them, new))
    whole = family.alone(family.place(start, encoder, encoded, counts))
    if not columns:
        kept = {"network": 1.0} if members else {"copula": 1.0}
        table_scores: tuple[Score, ...] = ()
        held_out = np.zeros(0)
    else:
        each = {name: np.concatenate(found) for name, found in columns.items()}
        numbers = np.concatenate([np.sort(part) for part in parts])
        shares = None if counts is None else counts[numbers]
        score = {name: mean(found, shares).value for name, found in each.items()}
        best = max(sizes, key=lambda name: score[name], default="")
        by_size = ["marginals", "copula", best, "network"]
        each = {name: each[name] for name in by_size if name in each}
        kept = chosen_weights(each, shares)
        each["all"] = mixed(each, kept)
        told = {"network": f"{len(members)} x {family!r}" if len(members) > 1 else repr(family)}
        told |= {"marginals": "each column for itself", "copula": "normal scores", "all": ""}
        told[best] = "normal in each" if best.endswith("normals") else "a copula in each"
        table_scores = tuple(
            Score(n, mean(e, shares), kept.get(n, float(n == "all")), told[n])
            for n, e in each.items()
        )
        held_out = np.sort(each["all"])
        training_scores = None
        if "network" in kept:
            some = encoded[seen][: len(numbers)] if len(parts) == 1 else None
            if some is not None:
                training_scores = scores(family, results[-1].params, some)
        messages += diagnosis.about_scores(each["all"], numbers, training_scores)
        if list(kept) == ["marginals"] and len(family.fields) > 1:
            messages.append(INDEPENDENT)
    made: list[tuple[Table, PyTree, float]] = []
    for name, weight in kept.items():
        if name == "network":
            made += [(family, member, weight / len(members)) for member in members]
        elif name in sizes:
            of, size = _groups(family, name)
            them = mixture(of, whole, encoder, encoded, counts, size)
            made += [(of, bare(params), weight * share) for params, share in them]
        else:
            correlated = name == "copula"
            made.append((family, bare(family.alone(whole, correlated)), weight))
    result = FitResult.untrained(None, time.monotonic() - started)
    stacked = Stacked(tuple(of for of, _, _ in made))
    logs = Fixed(jnp.log(jnp.asarray([weight for _, _, weight in made])))
    params = {"origin": Origin(stacked), "families": [p for _, p, _ in made], "log_weights": logs}
    if results:
        result = results[-1]
    messages = list(dict.fromkeys(messages))
    if messages:
        warnings.warn(" ".join(messages), DensityWarning, stacklevel=3)
    names = schema.names
    return TableDensity(
        result=dataclasses.replace(result, params=params, last_params=None),
        family=stacked,
        dtype="float64",
        num_rows=rows,
        scores=table_scores,
        messages=tuple(messages),
        held_out=held_out,
        columns=Columns(names, ("float64",) * len(names), ""),
        encoder=encoder,
        frame_type=table_frames.frame_type(x, names),
        names=names,
    )


def _num_steps(num_rows: int) -> int:
    return int(np.clip(EPOCHS * num_rows // min(256, num_rows), MIN_STEPS, MAX_STEPS))


def _groups(family: Table, name: str) -> tuple[Table, int]:
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
    units = family.in_units(encoder.rates(), rows)
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
    for block, count in _blocks(4096, rows):
        each = _field_log_probs(family, bare(params), jnp.asarray(block), position)
        found.append(np.asarray(each, np.float64).sum(1)[:count])
    return np.concatenate(found)
