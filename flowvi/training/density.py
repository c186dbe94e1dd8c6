"""Fitting a density to data, with no settings needed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from flowvi import checks
from flowvi.compiling import compiled
from flowvi.families import Family, standardized
from flowvi.objectives import NegativeLogLikelihood
from flowvi.training import order, sources, units
from flowvi.training.arguments import check_key
from flowvi.training.loop import fit
from flowvi.training.result import FitResult, Look

Array = jax.Array

#: Rows of a batch, where there are as many.
BATCH_SIZE = 256

#: Steps: so many epochs, but within these bounds.
EPOCHS, MIN_STEPS, MAX_STEPS = 80, 1_000, 20_000

#: The decay of the parameters' average, whose memory is some hundred steps.
AVERAGING = 0.995

#: Rows that are held out at most.
MAX_HELD_OUT = 20_000

#: Validations over the length of a fit, and how many without a new best end it.
VALIDATIONS, PATIENCE = 50, 15


def fit_density(
    family: Family,
    x: Any,
    *,
    key: Array,
    context: Any = None,
    support: Any = None,
    params: Any = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    averaging: float | None = AVERAGING,
    validation_fraction: float = 0.1,
    patience: int | None = PATIENCE,
    checkpoint_dir: Any = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[Look], bool | None] | None = None,
) -> FitResult:
    """Fits a family to data by maximum likelihood.

    Minimises the mean negative log likelihood -1/n sum_i log p(x_i | context_i; params) of the
    training rows. A random tenth of the rows, at most 20,000, is held out: the result holds the
    parameters that score best on it, and training ends early when it stops improving.

    A flow is placed in the data's own units first: the bijector `Units` after its last layer maps
    to the support and to the mean and standard deviation of the training rows, and a floating
    context is standardised before its first. These are `Fixed` leaves of the parameters, so that
    `log_prob` and `sample` speak the data's language.

    Args:
        family: any family. Of a conditional one the fit is p(x | context).
        x: array of shape [num_rows, *event_shape] of finite floating numbers. An `np.memmap` may be
            larger than memory: its rows are read as they are needed.
        key: a random key.
        context: array of shape [num_rows, *context_shape], where the family takes one.
        support: where samples may lie: None or "real"; "positive"; (low, high), of which either may
            be None or infinite; or a sequence of these, one for each column.
        params: parameters to start from, such as an earlier result's. They keep their units.
        num_steps: steps to do; by default 80 epochs, but at least 1000 and at most 20,000.
        batch_size: rows of a batch; 256 by default, or all if there are fewer.
        optimizer: an Optax optimizer. By default Adam with a learning rate that rises over the
            first steps to 0.01 and falls to zero with the last, and gradients clipped to norm 10.
        averaging: the decay of the parameters' moving average, which is what is validated and
            handed back, as in `fit`; None for the plain parameters.
        validation_fraction: the part of the rows to hold out, of 20,000 at most; 0 for none.
            Without it the result holds the last parameters, and `patience` must be None or left
            alone.
        patience: end training when so many validations in a row brought no new best; None for
            never. There are 50 over the length of a fit.
        checkpoint_dir: as in `fit`, as are the two that follow.
        checkpoint_every: see there.
        resume: see there.
        progress: whether to show progress on standard error.
        callback: as in `fit`.

    Returns:
        A `FitResult`, whose losses are in nats a row, in the units of `x`.

    Raises:
        TypeError: if data are not floating numbers, or an argument is of the wrong kind.
        ValueError: if data have the wrong shape, hold NaN or infinity, are constant in a column or
            lie outside the support; or sizes do not go together.
        TrainingDiverged: as in `fit`.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> x = 5.0 + jax.random.normal(jax.random.key(0), (500, 2))
        >>> family = fv.maf(2, num_layers=1, hidden_sizes=[8])
        >>> result = fv.fit_density(family, x, key=jax.random.key(1), num_steps=50, progress=False)
        >>> family.log_prob(result.params, x).shape
        (500,)
    """
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family, such as `fv.maf(2)`; got {family!r}.")
    check_key(key)
    x = units.check_x(family, x)
    context = units.check_context(family, context, len(x))
    bounds = _check_support(family, support, params)
    if bounds is not None:
        units.check_inside(x, bounds)
    num_held_out = _num_held_out(validation_fraction, len(x))
    num_rows = len(x) - num_held_out
    batch_size = _check_batch_size(batch_size, num_rows)
    if num_steps is None:
        num_steps = int(np.clip(EPOCHS * num_rows // batch_size, MIN_STEPS, MAX_STEPS))
    num_steps = checks.positive_int("num_steps", num_steps)
    if patience is not None:
        checks.positive_int("patience", patience)

    family = standardized(family, support)
    init_key, split_key, fit_key = jax.random.split(key, 3)
    data = {"x": x} if context is None else {"x": x, "context": context}
    held_out, data = _split(data, split_key, num_held_out)

    if params is None:
        params = _init(family, init_key)
        params = family.place(params, whole(data["x"]), whole(data.get("context")))
    validation: dict[str, Any] = {}
    if num_held_out:
        validation = {
            "validate": NegativeLogLikelihood(family, training=False),
            "validation_data": held_out,
            "validate_every": max(num_steps // VALIDATIONS, 1),
            "patience": patience,
        }
    return fit(
        NegativeLogLikelihood(family),
        params,
        default_optimizer(num_steps) if optimizer is None else optimizer,
        key=fit_key,
        num_steps=num_steps,
        data=data,
        batch_size=batch_size,
        averaging=averaging,
        check_finite=False,  # they have been looked at
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
        callback=callback,
        **validation,
    )


def whole(array: Any) -> Any:
    """The file of which a part is trained with."""
    return array.whole if isinstance(array, sources.Subset) else array


def _split(data: dict[str, Any], key: Array, num_held_out: int) -> tuple[dict, dict]:
    """Some random rows of data, and the rest of them, which stays on the host if it is there."""
    num_rows = len(data["x"])
    if not any(isinstance(array, np.memmap) for array in data.values()):
        rows = order.rows_at(key, 0, num_rows, num_rows)
        held_out = {name: array[rows[:num_held_out]] for name, array in data.items()}
        return held_out, {name: array[rows[num_held_out:]] for name, array in data.items()}
    rows = order.rows_at(key, 0, num_held_out, num_rows)
    dtypes = {name: jax.dtypes.canonicalize_dtype(array.dtype) for name, array in data.items()}
    held_out = {name: array[rows].astype(dtypes[name]) for name, array in data.items()}
    return held_out, {
        name: sources.Subset(array, key, num_held_out, num_rows - num_held_out)
        for name, array in data.items()
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


@compiled()
def _init(family: Family, key: Array) -> Any:
    return family.init(key)


def _check_support(family: Family, support: Any, params: Any) -> units.Bounds | None:
    bounds = units.parse_support(support, family.event_shape)
    if bounds is None:
        return None
    if params is not None:
        raise ValueError(
            "`support` must be None where `params` are given, which have their support already; "
            f"got {support!r}."
        )
    return bounds


def _num_held_out(fraction: Any, num_rows: int) -> int:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"`validation_fraction` must be a number; got {fraction!r}.")
    if not 0 <= fraction < 1:
        raise ValueError(f"`validation_fraction` must be at least 0 and below 1; got {fraction}.")
    return min(int(fraction * num_rows), MAX_HELD_OUT)


def _check_batch_size(batch_size: Any, num_rows: int) -> int:
    if batch_size is None:
        return min(BATCH_SIZE, num_rows)
    batch_size = checks.positive_int("batch_size", batch_size)
    if batch_size > num_rows:
        raise ValueError(
            f"`batch_size` must be at most the number of training rows, {num_rows}; got "
            f"{batch_size}. Perhaps leave it out?"
        )
    return batch_size
