"""The training loop: the host's side of it."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from flowvi import checks
from flowvi.training import data as rows
from flowvi.training import stretch
from flowvi.training.progress import Progress
from flowvi.training.record import Pace, Record
from flowvi.training.result import FitResult, Look, StopReason
from flowvi.training.step import LossFn, check_loss, check_params, suspects
from flowvi.training.stopping import NEVER, Interrupts

Array = jax.Array


def fit(
    loss_fn: LossFn,
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: Array,
    num_steps: int,
    data: Any = None,
    batch_size: int | None = None,
    validate: LossFn | None = None,
    validation_data: Any = None,
    validate_every: int | None = None,
    patience: int | None = None,
    max_bad_steps: int = 10,
    progress: bool = True,
    callback: Callable[[Look], bool | None] | None = None,
) -> FitResult:
    """Minimises a loss.

    Steps run compiled, many between two looks of the host, and the result does not depend on how
    many. A second call with the same `loss_fn`, `optimizer` and shapes compiles nothing: pass the
    same function and the same optimizer again, rather than a fresh lambda and a fresh
    `optax.adam(...)`, which are new to Python. A frozen dataclass with `__call__` is the same
    whenever its fields are.

    `Fixed` leaves of the parameters travel with the rest, but the optimizer sees None in their
    place. Only a loss of the third form changes them.

    Data are rows along the leading axis of every leaf. Rows are reshuffled each epoch and every row
    is used exactly once an epoch; a batch may hold the end of one epoch and the beginning of the
    next, so that all batches have one size. A loss that wants the index of each row takes it as one
    more leaf, `data={"x": x, "row": jnp.arange(len(x))}`.

    A step whose loss or gradient is not finite is skipped: it moves neither the parameters nor the
    optimizer's state, and is counted.

    Ctrl-C ends training after the current stretch, a quarter of a second or one step, and what has
    been learned is returned. A second Ctrl-C does not wait.

    Args:
        loss_fn: `loss_fn(params, key, batch)` returns a scalar loss, or (loss, metrics) with a dict
            of scalars, or (loss, metrics, params), whose `Fixed` leaves are taken over. `batch` is
            None where there are no data. It must be hashable, as functions are.
        params: any pytree of floating arrays; others must be inside `Fixed`. They survive.
        optimizer: an Optax optimizer. Line searches and plateau rules get what they ask for:
            `value`, `grad` and `value_fn`.
        key: a random key. Each step gets its own, and so does each shuffle.
        num_steps: steps to do.
        data: None, an array, or a pytree of arrays with a common leading axis.
        batch_size: rows of a batch. By default every step sees all the data, in their own order.
        validate: a function like `loss_fn`, evaluated as `validate(params, key, validation_data)`,
            with the same key each time; only its loss counts. By default `loss_fn`.
        validation_data: any pytree of arrays, handed to `validate` as it is.
        validate_every: steps between two validations; there is one after the last step too. With
            it, the result holds the parameters with the lowest validation loss.
        patience: end training when so many validations in a row brought no new best.
        max_bad_steps: end training when so many steps in a row were bad.
        progress: whether to show progress on standard error.
        callback: called with a `Look` whenever the host looks, a few times a second; training
            ends when it returns True.

    Returns:
        A `FitResult`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if sizes or shapes do not go together.
        TrainingDiverged: if `max_bad_steps` steps in a row were bad; it carries the last good
            parameters.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import flowvi as fv
        >>> def loss_fn(params, key, batch):
        ...     return jnp.mean((batch - params["mean"]) ** 2)
        >>> x = 3.0 + jax.random.normal(jax.random.key(0), (1000,))
        >>> result = fv.fit(
        ...     loss_fn,
        ...     {"mean": jnp.zeros(())},
        ...     optax.adam(0.1),
        ...     key=jax.random.key(1),
        ...     num_steps=200,
        ...     data=x,
        ...     batch_size=100,
        ...     progress=False,
        ... )
        >>> bool(abs(result.params["mean"] - x.mean()) < 0.1), result.stop_reason.value
        (True, 'max_steps')
    """
    started = time.perf_counter()
    check_key(key)
    _check_functions(loss_fn, optimizer, validate, callback)
    limits = stretch.Limits(
        stretch=0,
        num_steps=checks.positive_int("num_steps", num_steps),
        validate_every=_count("validate_every", validate_every),
        patience=_count("patience", patience),
        max_bad_steps=checks.positive_int("max_bad_steps", max_bad_steps),
    )
    validate = _check_validation(loss_fn, validate, validation_data, validate_every, patience)
    check_params(params)
    num_rows = None
    if data is not None:
        data, num_rows = rows.check("data", data)
    validation_data = rows.as_arrays("validation_data", validation_data)

    batch_size = rows.check_batch_size(batch_size, num_rows)
    program = stretch.Program(loss_fn, optimizer, validate, batch_size, num_rows)
    compiled = stretch.build(program)
    names = _check_losses(program, compiled, params, key, data, validation_data)
    state = compiled.begin(params, jax.random.split(key, 3))

    record = Record(["loss", *names], limits)
    pace = Pace()
    reason = None
    with Interrupts() as interrupts, Progress(num_steps, progress) as bar:
        while reason is None:
            begun = time.perf_counter()
            goal = limits._replace(stretch=min(record.step + pace.steps, num_steps))
            state, history = compiled.run(state, data, validation_data, np.asarray(goal, np.int32))
            # The one transfer of the stretch; it waits for the steps to be done.
            steps = record.add(*jax.device_get((_signs(state), history)))
            seconds = time.perf_counter() - begun
            if pace.compiling:
                bar.begin(record.step)
            pace.learn(steps, seconds)
            bar.update(record.step, record.loss, record.validation)
            if record.diverged:
                raise record.error(suspects(state.params), state.params)
            if record.waited >= limits.patience:
                reason = StopReason.PATIENCE
            elif record.step >= num_steps:
                reason = StopReason.MAX_STEPS
            elif interrupts.requested:
                reason = StopReason.INTERRUPTED
            if callback is not None:
                stop = _call(callback, record, num_steps, steps / seconds, state.params)
                reason = reason or stop

    best = None if record.best_step is None else state.best
    return FitResult(
        params=state.params if best is None else best.params,
        last_params=state.params,
        history=record.history(),
        stop_reason=reason,
        num_steps=record.step,
        num_bad_steps=int(record.faults.total),
        best_step=record.best_step,
        seconds=time.perf_counter() - started,
    )


def _signs(state: stretch.State) -> tuple[Any, ...]:
    best = None if state.best is None else state.best._replace(params=None)
    return state.step, state.faults, best


def _call(
    callback: Callable[[Look], bool | None],
    record: Record,
    num_steps: int,
    steps_per_second: float,
    params: Any,
) -> StopReason | None:
    look = Look(
        step=record.step,
        num_steps=num_steps,
        loss=record.loss,
        metrics=record.metrics,
        validation=record.validation,
        best_step=record.best_step,
        steps_per_second=steps_per_second,
        params=params,
    )
    try:
        return StopReason.CALLBACK if callback(look) else None
    except KeyboardInterrupt:
        return StopReason.INTERRUPTED


def _count(name: str, value: Any) -> int:
    return NEVER if value is None else checks.positive_int(name, value)


def check_key(key: Any) -> None:
    """Checks that `key` is a random key, of either kind.

    Raises:
        TypeError: if it is not.
    """
    try:
        jax.eval_shape(lambda key: jax.random.fold_in(key, 0), key)
    except (TypeError, ValueError):
        raise TypeError(
            f"`key` must be a random key, such as `jax.random.key(0)`; got {key!r}."
        ) from None


def _check_functions(loss_fn: Any, optimizer: Any, validate: Any, callback: Any) -> None:
    for name, function in {"loss_fn": loss_fn, "validate": validate, "callback": callback}.items():
        if not (callable(function) or (function is None and name != "loss_fn")):
            raise TypeError(f"`{name}` must be a function; got {function!r}.")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "`optimizer` must be an Optax optimizer, such as `optax.adam(1e-3)`; got "
            f"{optimizer!r}."
        )
    known = {"loss_fn": loss_fn, "optimizer": optimizer, "validate": validate}
    for name, value in known.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"`{name}` must be hashable, so that a second call knows it again; got {value!r}. "
                "Perhaps make its class a frozen dataclass?"
            ) from None


def _check_validation(
    loss_fn: LossFn,
    validate: LossFn | None,
    validation_data: Any,
    validate_every: int | None,
    patience: int | None,
) -> LossFn | None:
    given = {"validate": validate, "validation_data": validation_data, "patience": patience}
    if validate_every is None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`validate_every` must be a positive integer where `{name}` is given; got "
                    "None."
                )
        return None
    if validate is None and validation_data is None:
        raise ValueError(
            "`validate_every` must be None where neither `validate` nor `validation_data` is "
            f"given; got {validate_every}."
        )
    return loss_fn if validate is None else validate


def _check_losses(
    program: stretch.Program,
    compiled: stretch.Compiled,
    params: Any,
    key: Array,
    data: Any,
    validation_data: Any,
) -> list[str]:
    params = jax.eval_shape(lambda: compiled.begin(params, jax.random.split(key, 3)).params)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (program.batch_size or program.num_rows, *leaf.shape[1:]), leaf.dtype
        ),
        data,
    )
    names = check_loss("loss_fn", compiled.loss_fn, params, key, batch)
    if compiled.validate is not None:
        name = "loss_fn" if program.validate is program.loss_fn else "validate"
        check_loss(name, compiled.validate, params, key, validation_data)
    return names
