"""The fit of a table: a network for its columns, beside what it begins from."""

import dataclasses
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi.densities import diagnosis, table_frames
from flowvi.densities.data import Split, check_weights, num_held_out, shuffled
from flowvi.densities.diagnosis import DensityWarning
from flowvi.densities.frames import Columns
from flowvi.densities.recipe import DIVERGED, FEW_ROWS, PARTS, Score, chosen_weights, mixed
from flowvi.densities.table_density import TableDensity
from flowvi.densities.table_frames import Tabular
from flowvi.densities.table_groups import mixture, mixture_scores, named, names_of, scores
from flowvi.densities.training import Training, fresh
from flowvi.diagnostics import mean
from flowvi.families.known import Stacked
from flowvi.params import PyTree
from flowvi.tables import Encoder, Table, table
from flowvi.training import FitResult, TrainingDiverged

Array = jax.Array

#: Steps: so many epochs, but within these bounds.
EPOCHS, MIN_STEPS, MAX_STEPS = 60, 1_000, 8_000

#: Units of a layer by the number of rows.
WIDTHS = ((0, 32), (1_500, 64), (20_000, 96))

#: With fewer rows nothing is compared.
LEAST_ROWS = 20

INDEPENDENT = (
    "The columns look independent: nothing that says how they depend on each other scores held-"
    "out rows better. Perhaps more rows?"
)


@dataclasses.dataclass
class _Trial:
    """What is tried for a table, and how it describes the rows that were held out.

    Attributes:
        family: the table.
        encoder: what was fitted to each column.
        rows: encoded rows.
        weights: of each of them; or None.
        start: fresh parameters.
        names: of the groups of rows that are tried.
        columns: for each estimate, its scores of the held-out rows of each part.
        results: the trainings of the network, one for each part.
        messages: what is doubtful.
    """

    family: Table
    encoder: Encoder
    rows: np.ndarray
    weights: np.ndarray | None
    start: PyTree
    names: list[str]
    columns: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    results: list[FitResult] = dataclasses.field(default_factory=list)
    messages: list[str] = dataclasses.field(default_factory=list)

    def fit(self, split: Split, training: Training | None, key: Array) -> None:
        """Fits all to the rows that are not held out, and scores those that are."""
        own, _, weights = split.whole_training()
        family = self.family
        placed = family.place(self.start, self.encoder, own, weights)
        tried = {"marginals": family.alone(placed, False), "copula": family.alone(placed)}
        if training is not None:
            try:
                result = training.run(family, placed, split, key)
            except TrainingDiverged as error:
                # What it was before may still be of use, and is judged as anything else.
                result = error.result
                self.messages.append(DIVERGED)
            self.results.append(result)
            tried["network"] = result.params
        if not len(split.rows_out):
            return
        new = self.rows[split.rows_out]
        found = {name: scores(family, params, new) for name, params in tried.items()}
        for name in self.names:
            of, size = named(family, name)
            them = mixture(of, placed, self.encoder, own, weights, size)
            found[name] = mixture_scores(of, them, new)
        for name, each in found.items():
            self.columns.setdefault(name, []).append(each)

    def compared(
        self, parts: list[np.ndarray]
    ) -> tuple[dict[str, float], tuple[Score, ...], np.ndarray]:
        """(weights of estimates, scores of all, those of held-out rows)."""
        if not self.columns:
            return {"network" if self.results else "copula": 1.0}, (), np.zeros(0)
        numbers = np.concatenate([np.sort(part) for part in parts])
        weights = None if self.weights is None else self.weights[numbers]
        found = {name: np.concatenate(each) for name, each in self.columns.items()}
        best = max(self.names, key=lambda name: mean(found[name], weights).value, default="")
        # The simplest one first, of groups the best alone.
        order = ["marginals", "copula", best, "network"]
        found = {name: found[name] for name in order if name in found}
        kept = chosen_weights(found, weights)
        found["all"] = mixed(found, kept)
        count = len(self.results)
        told = {
            best: "normal in each" if best.endswith("normals") else "a copula in each",
            "network": f"{count} x {self.family!r}" if count > 1 else repr(self.family),
            "marginals": "each column for itself",
            "copula": "normal scores",
            "all": "",
        }
        listed = tuple(
            Score(name, mean(each, weights), kept.get(name, float(name == "all")), told[name])
            for name, each in found.items()
        )
        seen = None
        if "network" in kept and len(parts) == 1:
            rest = np.setdiff1d(np.arange(len(self.rows)), parts[0])[: len(numbers)]
            seen = scores(self.family, self.results[-1].params, self.rows[rest])
        self.messages += diagnosis.about_scores(found["all"], numbers, seen)
        if list(kept) == ["marginals"] and len(self.family.fields) > 1:
            self.messages.append(INDEPENDENT)
        return kept, listed, np.sort(found["all"])

    def stacked(self, kept: dict[str, float]) -> tuple[Stacked, PyTree]:
        """The mixture of what was kept: networks of all parts, all else made of all rows."""
        family, encoder = self.family, self.encoder
        whole = family.place(self.start, encoder, self.rows, self.weights)
        made: list[tuple[Table, PyTree, float]] = []
        for name, weight in kept.items():
            if name == "network":
                share = weight / len(self.results)
                made += [(family, each.params, share) for each in self.results]
            elif name in self.names:
                of, size = named(family, name)
                them = mixture(of, whole, encoder, self.rows, self.weights, size)
                made += [(of, params, weight * share) for params, share in them]
            else:
                made.append((family, family.alone(whole, name == "copula"), weight))
        stacked = Stacked(tuple(of for of, _, _ in made))
        logs = jnp.log(jnp.asarray([weight for _, _, weight in made]))
        return stacked, stacked.joined([params for _, params, _ in made], logs)


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
    pairs = zip(schema.names, schema.kinds, strict=True)
    found = {n: kind.numbers(values[n], f"Column {n!r} of `x`") for n, kind in pairs}
    rows = len(values[schema.names[0]])
    counts = check_weights(weights, rows)
    if counts is not None:
        used = counts > 0
        found, counts = {n: each[used] for n, each in found.items()}, counts[used]
        rows, counts = len(counts), counts / counts.mean()
    if family is None:
        width = next(width for least, width in reversed(WIDTHS) if rows >= least)
        family = table(schema, width=width)
    if rows < LEAST_ROWS:
        few = f"`x` has {rows} rows, which are too few to know how good a density of them is."
        warnings.warn(few, RuntimeWarning, stacklevel=4)
    num_held = num_held_out(validation_fraction, rows)
    init_key, split_key, fit_key = jax.random.split(key, 3)
    order = shuffled(split_key, rows)
    parts = [order[:num_held]] if rows >= LEAST_ROWS else []
    if rows < FEW_ROWS and num_held and parts:
        parts = np.split(order[: rows // PARTS * PARTS], PARTS)
    # Of many rows all is made of those to train on; few are needed, all of them, for each column.
    seen = np.ones(rows, bool)
    if len(parts) == 1:
        seen[parts[0]] = False
    shown = {n: each[seen] for n, each in found.items()}
    encoder = Encoder.fitted(schema, shown, None if counts is None else counts[seen])
    encoded = encoder.encode(found).astype(np.float32)
    start, names = fresh(family, init_key), names_of(family, rows)
    trial = _Trial(family, encoder, encoded, counts, start, names)
    for number, part in enumerate(parts):
        split = Split(encoded, None, part, counts)
        training = None
        if (steps := options.get("num_steps")) != 0:
            chosen = {**options, "num_steps": steps or _num_steps(split.num_rows)}
            training = Training(patience if len(part) else None, chosen)
            training = training.of_part(number, len(parts) > 1)
        trial.fit(split, training, fit_key)
    kept, listed, held_out = trial.compared(parts)
    stacked, params = trial.stacked(kept)
    result = FitResult.untrained(None, time.monotonic() - started)
    result = trial.results[-1] if trial.results else result
    messages = tuple(dict.fromkeys(trial.messages))
    if messages:
        warnings.warn(" ".join(messages), DensityWarning, stacklevel=4)
    return TableDensity(
        result=dataclasses.replace(result, params=params, last_params=None),
        family=stacked,
        dtype="float64",
        num_rows=rows,
        scores=listed,
        messages=messages,
        held_out=held_out,
        columns=Columns(schema.names, ("float64",) * len(schema.names), ""),
        encoder=encoder,
        frame_type=table_frames.frame_type(x, schema.names),
        names=schema.names,
    )


def _num_steps(num_rows: int) -> int:
    return int(np.clip(EPOCHS * num_rows // min(256, num_rows), MIN_STEPS, MAX_STEPS))
