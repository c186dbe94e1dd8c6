"""The training loop: the host's side of it."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from flowvi import checks
from flowvi.training import arguments, fingerprint, rowwise, sources, stretch
from flowvi.training.checkpoints import Checkpoints
from flowvi.training.progress import Progress
from flowvi.training.record import Pace, Record
from flowvi.training.result import FitResult, Look, StopReason
from flowvi.training.step import LossFn, check_params, suspects
from flowvi.training.stopping import Interrupts, Plateau

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
    plateau: Plateau | None = None,
    averaging: float | None = None,
    max_bad_steps: int = 10,
    check_finite: bool = True,
    checkpoint_dir: Any = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
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
    more leaf, `data={"x": x, "row": jnp.arange(len(x))}`; parameters that each row has for itself,
    as those of `fv.local`, ask for that. A step then moves just the rows of its batch, and just
    their part of the optimizer's state, as if each were optimized alone. Rows of an `np.memmap` are
    read as they are needed, in the same order, a few batches ahead. An iterable of batches is
    iterated anew whenever it ends; its batches are taken as they come, ragged ones included.

    A step whose loss, gradient or result is not finite is skipped: it moves neither the parameters
    nor the optimizer's state, and is counted.

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
        data: None, an array, a pytree of arrays with a common leading axis, or an iterable of
            batches that is no pytree, such as a data loader. A one-way iterator ends training
            when it ends.
        batch_size: rows of a batch. By default every step sees all the data, in their own order.
        validate: a function like `loss_fn`, evaluated as `validate(params, key, validation_data)`,
            with the same key each time; its loss decides, its metrics go into the history. By
            default `loss_fn`.
        validation_data: any pytree of arrays, handed to `validate` as it is.
        validate_every: steps between two validations; there is one after the last step too. With
            it, the result holds the parameters with the lowest validation loss.
        patience: end training when so many validations in a row brought no new best.
        plateau: end training when the loss itself stops improving; see `Plateau`.
        averaging: the decay, between 0 and 1, of an exponential moving average of the parameters,
            such as 0.999. With it, the average is what is validated and handed back. It gives
            the noise of steps no way into the result, and lets the rate stay high for longer.
        max_bad_steps: end training when so many steps in a row were bad.
        check_finite: whether to refuse data with NaN or infinity in them. Those of an iterable are
            not looked at.
        checkpoint_dir: a directory for checkpoints, of which the last three are kept. They are
            written by Orbax beside the running steps, and there is one at the end.
        checkpoint_every: steps between two checkpoints; by default a tenth of all.
        resume: go on from the last whole checkpoint in `checkpoint_dir`, or begin if there is none.
            The result is that of a run that was never interrupted, to the bit. It needs the same
            arguments; `num_steps` and what ends training early may differ. An iterable must give
            the same batches again.
        progress: whether to show progress on standard error.
        callback: called with a `Look` whenever the host looks, a few times a second; training
            ends when it returns True.

    Returns:
        A `FitResult`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if sizes or shapes do not go together, data are not finite, or a checkpoint is
            that of another run.
        ImportError: if there is a `checkpoint_dir` and Orbax is not installed.
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
    arguments.check_key(key)
    arguments.check_functions(loss_fn, optimizer, validate, callback)
    limits = stretch.Limits(
        stretch=0,
        chunk=0,
        num_steps=checks.positive_int("num_steps", num_steps),
        validate_every=arguments.count("validate_every", validate_every),
        patience=arguments.count("patience", patience),
        max_bad_steps=checks.positive_int("max_bad_steps", max_bad_steps),
    )
    validate = arguments.check_validation(
        loss_fn, validate, validation_data, validate_every, patience
    )
    plateau = arguments.check_plateau(plateau)
    averaging = arguments.check_averaging(averaging)
    checkpoint_every = arguments.check_checkpoints(
        checkpoint_dir, checkpoint_every, resume, num_steps
    )
    check_params(params)
    validation_data = jax.tree.map(
        jax.numpy.asarray, sources.as_arrays("validation_data", validation_data)
    )
    num_rows = rowwise.check_tables(params)
    rowwise.check_optimizer(optimizer, params)
    source = sources.make(data, batch_size, check_finite=check_finite, rows_of_params=num_rows)
    program = stretch.Program(
        loss_fn, optimizer, validate, source.batch_size, source.num_rows, source.streamed, averaging
    )
    compiled = stretch.build(program)
    names, validation_names = arguments.check_losses(
        program, compiled, params, key, source.batch, validation_data
    )
    state, trusted = compiled.begin(params, key)
    # Careful steps to be done before others will do.
    careful = 0 if trusted else num_steps
    record = Record(["loss", *names], limits, plateau, validation_names)
    pace = Pace()
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        checkpoints = None
        if checkpoint_dir is not None:
            about = _fingerprint(program, state, [*names, *validation_names], key, validate_every)
            checkpoints = stack.enter_context(
                Checkpoints(checkpoint_dir, checkpoint_every, resume, about)
            )
            restored = checkpoints.restore(state)
            if restored is not None:
                state, saved = restored
                record.resume(jax.device_get(_signs(state)), saved)
        source.begin(state.keys[1], record.step)
        stack.callback(source.close)
        bar = stack.enter_context(Progress(num_steps, progress))
        reason = record.reason
        while reason is None:
            begun = time.perf_counter()
            chunk = source.at(record.step)
            if chunk is None:
                reason = StopReason.DATA
                break
            chosen = record.step + pace.steps
            ends = [chosen, num_steps, chunk.end, record.boundary]
            if checkpoints is not None:
                ends.append(checkpoints.until(record.step))
            if careful:
                ends.append(record.step + careful)
            goal = limits._replace(stretch=min(ends), chunk=chunk.first)
            run = compiled.careful if careful else compiled.run
            state, history, found = run(
                state, chunk.data, validation_data, np.asarray(goal, np.int32)
            )
            # The one transfer of the stretch; it waits for the steps to be done.
            signs, history, found = jax.device_get((_signs(state), history, found))
            steps = record.add(signs, history)
            seconds = time.perf_counter() - begun
            if pace.compiling:
                bar.begin(record.step)
            if not found and not (trusted and careful):
                pace.learn(steps, seconds)
            # Where there is one bad step there may be more; to change programs takes a moment.
            careful = max(int(found), stretch.LONGEST_RUN) if found else max(careful - steps, 0)
            if not steps:
                continue
            if record.diverged:
                raise record.error(suspects(state.params), state.params)
            reason = record.reason
            if reason is None and interrupts.requested:
                reason = StopReason.INTERRUPTED
            if reason is not None or record.step == chosen or pace.wants_look():
                bar.update(record.step, record.loss, record.validation)
                if callback is not None:
                    stop = _call(callback, record, num_steps, steps / seconds, state.params)
                    reason = reason or stop
            if checkpoints is not None and (reason or checkpoints.due(record.step)):
                checkpoints.save(record.step, state, record.history())

    best = None if record.best_step is None else state.best
    return FitResult(
        params=program.learned(state) if best is None else best.params,
        last_params=state.params,
        history=record.history(),
        stop_reason=reason,
        num_steps=record.step,
        num_bad_steps=0 if record.faults is None else int(record.faults.total),
        best_step=record.best_step,
        seconds=time.perf_counter() - started,
    )


def _fingerprint(
    program: stretch.Program, state: stretch.State, names: list[str], key: Array, every: int | None
) -> fingerprint.Fingerprint:
    """What must be the same for a run to go on."""
    options = {
        "key": np.asarray(_key_data(key)).tolist(),
        "batch_size": program.batch_size,
        "the number of rows": program.num_rows,
        "validate_every": every,
        "averaging": program.averaging,
        "the list of metrics": names,
    }
    return (
        fingerprint.of_tree("params", state.params)
        | fingerprint.of_tree("the optimizer's state", state.opt_state)
        | {name: str(value) for name, value in options.items()}
    )


def _key_data(key: Array) -> Array:
    is_typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(key) if is_typed else key


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
