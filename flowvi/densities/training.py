"""Training of one family on rows that are standardised on the way."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi import checks, files
from flowvi.compiling import compiled
from flowvi.densities.data import Data, Split
from flowvi.diagnostics import Estimate
from flowvi.families import Family, Standardized
from flowvi.objectives import FlowMatching, NegativeLogLikelihood, training_loss
from flowvi.objectives.likelihood import held_out_log_probs
from flowvi.params import PyTree
from flowvi.training import FitResult, TrainingDiverged, fit
from flowvi.training.sources import check_batch_size

Array = jax.Array

#: Rows of a batch, where there are as many.
BATCH_SIZE = 256

#: Steps: so many epochs, but within these bounds.
EPOCHS, MIN_STEPS, MAX_STEPS = 80, 1_000, 20_000

#: Flow matching has so many times as many: its steps are cheap, and their gradients noisy.
MATCHING = 4

#: The decay of the parameters' average, whose memory is some hundred steps.
AVERAGING = 0.995

#: Validations over the length of a fit, and how many without a new best end it.
VALIDATIONS, PATIENCE = 50, 10

#: A flow is given up after so many validations at the earliest, and behind by so many errors.
LEAST_VALIDATIONS, LEAST_ERRORS = 8, 2.0


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The negative log likelihood in the units of the data, of rows that are standardised."""

    likelihood: NegativeLogLikelihood

    def __call__(self, params: PyTree, key: Array, batch: dict[str, Array]) -> Array | tuple:
        rows = {name: batch[name] for name in batch if name != "log_det"}
        output = self.likelihood(params, key, rows)
        shift = jnp.mean(batch.get("weight", 1.0) * batch["log_det"])
        return (output[0] - shift, *output[1:]) if isinstance(output, tuple) else output - shift


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """The loss of held-out rows and its standard error; and how far it is behind another's."""

    family: Family

    def __call__(
        self, params: PyTree, key: Array, batch: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        rows = {name: batch[name] for name in batch if name in ("x", "context")}
        found = held_out_log_probs(self.family, params, rows) + batch["log_det"]
        behind = batch["rival"] - jnp.logaddexp(found, batch["least"])
        weights = batch.get("weight", jnp.ones_like(found))

        def mean(x: Array) -> tuple[Array, Array]:
            value = jnp.mean(weights * x)
            return value, jnp.sqrt(jnp.mean((weights * (x - value)) ** 2) / len(x))

        (score, error), (gap, gap_error) = mean(found), mean(behind)
        return -score, {"behind": gap, "behind_error": gap_error, "error": error}


def held_out_score(result: FitResult) -> Estimate:
    """The score of the parameters that were best on held-out rows, where there was a rival."""
    best = int(np.nanargmin(result.history["validation"]))
    value, error = (float(result.history[f"validation{n}"][best]) for n in ("", "_error"))
    return Estimate(-value, error)


@dataclasses.dataclass(frozen=True)
class Rival:
    """Scores of held-out rows by another estimate, and the least that count for each row."""

    scores: np.ndarray
    least: np.ndarray


@dataclasses.dataclass(frozen=True)
class Hopeless:
    """Whether a flow will stay behind a rival's held-out score up to the last validation.

    Curves of learning flatten: of what the second half of the validations so far brought, each
    doubling to come brings no more. So it is hopeless if that much, for all the doublings that
    are left, is less than what is missing by two standard errors of the paired difference.
    """

    num_validations: int = VALIDATIONS

    def __call__(self, history: dict[str, np.ndarray]) -> bool:
        error = history["validation_behind_error"]
        behind = np.minimum.accumulate(history["validation_behind"])
        count = len(behind)
        if not LEAST_VALIDATIONS <= count < self.num_validations:
            return False
        doublings = np.log2(self.num_validations / count) / np.log2(count / (count // 2))
        gain = max(behind[count // 2 - 1] - behind[-1], 0) * doublings
        return bool(behind[-1] - gain > LEAST_ERRORS * error[np.argmin(behind)])


@dataclasses.dataclass(frozen=True)
class Training:
    """How families are trained: what the user asked for, and defaults by the number of rows."""

    patience: int | None
    options: dict[str, Any]

    def of_part(self, number: int, several: bool) -> "Training":
        """That of one part of the rows, with checkpoints of its own where there are several."""
        folder = self.options.get("checkpoint_dir")
        if folder is None or not several:
            return self
        options = {**self.options, "checkpoint_dir": pathlib.Path(folder) / f"part_{number}"}
        return dataclasses.replace(self, options=options)

    def run(
        self,
        own: Family,
        params: PyTree,
        split: Split,
        key: Array,
        rival: Rival | None = None,
    ) -> FitResult:
        """Trains on a split of the data; not on if it stays behind a rival's held-out scores."""
        batch_size = self.options.get("batch_size")
        if batch_size is None:
            batch_size = min(BATCH_SIZE, split.num_rows)
        batch_size = check_batch_size(batch_size, split.num_rows) or split.num_rows
        steps = self.options.get("num_steps")
        loss = training_loss(own.family if isinstance(own, Standardized) else own)
        if steps is None:
            steps = EPOCHS * split.num_rows // batch_size
            steps *= MATCHING if isinstance(loss, FlowMatching) else 1
            steps = int(np.clip(steps, MIN_STEPS, MAX_STEPS))
        steps = checks.positive_int("num_steps", steps)
        standardize = functools.partial(_standardize, own, params)
        inner, inner_params = own, params
        if isinstance(own, Standardized):
            inner, inner_params = own.family, params["family"]
        validation: dict[str, Any] = {}
        if len(split.rows_out):
            validation = {
                "validate": _Loss(NegativeLogLikelihood(inner, training=False)),
                "validation_data": standardize(split.held_out()),
                "validate_every": max(steps // VALIDATIONS, 1),
                "patience": self.patience,
            }
        if rival is not None:
            scores = {"rival": rival.scores, "least": rival.least}
            dtype = jnp.result_type(float)
            rows = validation["validation_data"] | {n: scores[n].astype(dtype) for n in scores}
            validation |= {"validate": _HeldOut(inner), "validation_data": rows}
            if self.patience is not None:
                validation["is_hopeless"] = Hopeless(steps // validation["validate_every"])
        given = {name: value for name, value in self.options.items() if value is not None}
        settings: dict[str, Any] = {
            "optimizer": default_optimizer(steps),
            "averaging": self.options.get("averaging", AVERAGING),
            **given,
            "num_steps": steps,
            "batch_size": batch_size,
        }
        # The default schedule and the moments of validations depend on the number of steps.
        schedule = {"num_steps": str(steps)}
        if not len(split.rows_out) and "optimizer" in given:
            schedule = {}
        with _whole_results(own, params):
            result = fit(
                loss if isinstance(loss, FlowMatching) else _Loss(loss),
                inner_params,
                settings.pop("optimizer"),
                key=key,
                data=split.training(standardize),
                check_finite=False,  # they have been looked at
                configuration={**schedule, **files.describe("family", own)},
                **settings,
                **validation,
            )
        return _whole(own, params, result)


def _whole(own: Family, params: PyTree, result: FitResult) -> FitResult:
    """What training of the inner family learned, as parameters of the whole one."""
    if not isinstance(own, Standardized):
        return result
    whole = [{**params, "family": each} for each in (result.params, result.last_params)]
    return dataclasses.replace(result, params=whole[0], last_params=whole[1])


@contextlib.contextmanager
def _whole_results(own: Family, params: PyTree) -> Iterator[None]:
    """An exception that carries what was learned carries parameters of the whole family."""
    try:
        yield
    except BaseException as error:
        if isinstance(getattr(error, "result", None), FitResult):
            error.result = _whole(own, params, error.result)  # type: ignore[attr-defined]
        if isinstance(error, TrainingDiverged):
            error.params = error.result.last_params
        raise


# It runs once, so to optimize it would take longer than it saves.
@compiled(compiler_options={"xla_backend_optimization_level": 0})
def fresh(family: Family, key: Array) -> PyTree:
    """Fresh parameters, compiled."""
    return family.init(key)


def _standardize(family: Family, params: PyTree, rows: Data) -> Data:
    """Rows as the inner family sees them, with the log-determinant of the way there."""
    x, context = rows["x"], rows.get("context")
    if isinstance(family, Standardized):
        x, log_det, context = family.standardize(params, x, context)
    else:
        log_det = np.zeros(len(x))
    dtype = jnp.result_type(float)
    result = {"x": x, "log_det": log_det} | ({} if context is None else {"context": context})
    if "weight" in rows:
        result["weight"] = rows["weight"]
    return {
        name: each.astype(dtype) if jnp.issubdtype(each.dtype, jnp.floating) else each
        for name, each in result.items()
    }


# The same object for the same length, so that a second fit compiles nothing.
@functools.lru_cache(maxsize=64)
def default_optimizer(
    num_steps: int, learning_rate: float = 1e-2, max_norm: float = 10.0
) -> optax.GradientTransformation:
    """Adam with clipped gradients, a short warm-up and a cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / 10,
        peak_value=learning_rate,
        warmup_steps=min(num_steps // 10, 100),
        decay_steps=num_steps,
    )
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(schedule))
