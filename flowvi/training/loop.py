"""The training loop: the host's side of it."""

import contextlib
import hashlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi import checks, files
from flowvi.families import check_key
from flowvi.files import Checkpoints
from flowvi.optimizers import rowwise
from flowvi.params import Origin, PyTree, named_leaves, numbers, partition
from flowvi.training import arguments, program, sources
from flowvi.training.progress import display
from flowvi.training.record import Pace, Record
from flowvi.training.result import FitResult, Progress, StopReason, TrainingDiverged
from flowvi.training.step import LossFn, check_loss, check_params, culprit
from flowvi.training.stopping import Hopeless, Plateau, noted_interrupts

Array = jax.Array

#: Rows of data whose digest tells them from others.
SAMPLED_ROWS = 1000


def fit(
    loss_fn: LossFn,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    key: Array,
    num_steps: int,
    data: PyTree = None,
    batch_size: int | None = None,
    validate: LossFn | None = None,
    validation_data: PyTree = None,
    validate_every: int | None = None,
    patience: int | None = None,
    is_hopeless: Hopeless | None = None,
    plateau: Plateau | None = None,
    averaging: float | None = None,
    max_bad_steps: int = 10,
    check_finite: bool = True,
    checkpoint_dir: files.Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: arguments.Callback | None = None,
    configuration: dict[str, str] | None = None,
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
    nor the optimizer's state, and is counted; many of them are warned of.

    Ctrl-C ends training after the current chunk, a quarter of a second or one step, and what has
    been learned is returned. A second Ctrl-C does not wait. An exception of the callback, of the
    data or of the loop has what was learned so far as its `result`.

    Args:
        loss_fn: `loss_fn(params, key, batch)` returns a scalar loss, or (loss, metrics) with a dict
            of scalars, or (loss, metrics, params), whose `Fixed` leaves are taken over. `batch` is
            None where there are no data. It must be hashable, as functions are.
        params: any pytree of floating arrays; others must be inside `Fixed`. They survive.
        optimizer: an Optax optimizer.
        key: a random key. Each step gets its own, and so does each shuffle.
        num_steps: steps to do.
        data: None, an array, a pytree of arrays with a common leading axis, or an iterable of
            batches that is no pytree, such as a data loader. A one-way iterator ends training
            when it ends. On resuming, an iterable must give the same batches again.
        batch_size: rows of a batch. By default every step sees all the data, in their own order.
        validate: a function like `loss_fn`, evaluated as `validate(params, key, validation_data)`,
            with the same key each time; its loss decides, its metrics go into the history. By
            default `loss_fn`.
        validation_data: any pytree of arrays, handed to `validate` as it is.
        validate_every: steps between two validations; there is one after the last step too. With
            it, the result holds the parameters with the lowest validation loss.
        patience: end training when so many validations in a row brought no new best.
        is_hopeless: called with the history of the validations so far, a dict of arrays; training
            ends where it returns True.
        check_finite: whether to refuse data with NaN or infinity in them. Those of an iterable are
            not looked at.
        plateau: see `TrainingOptions`, as for all that follow.
        averaging: see there.
        max_bad_steps: see there.
        checkpoint_dir: see there.
        checkpoint_every: see there.
        resume: see there.
        progress: see there.
        callback: see there.
        configuration: name -> value of what else a resumed run must have in common with the one
            that wrote the checkpoint, such as the settings that `loss_fn` does not show.

    Returns:
        A `FitResult`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if sizes or shapes do not go together, data are not finite, or a checkpoint is
            that of another run.
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
    arguments.check_functions(loss_fn, optimizer, validate, callback)
    arguments.check_options(progress, resume, plateau, averaging)
    num_steps = checks.positive_int("num_steps", num_steps)
    max_bad = checks.positive_int("max_bad_steps", max_bad_steps)
    arguments.check_validation(
        validate_every,
        validate=validate,
        validation_data=validation_data,
        patience=patience,
        is_hopeless=is_hopeless,
    )
    if validate_every is not None and validate is None:
        validate = loss_fn
    every = arguments.checkpoint_interval(checkpoint_dir, checkpoint_every, resume, num_steps)
    check_params(params)
    validation_data = sources.as_arrays("validation_data", validation_data)
    validation_data = jax.tree.map(jnp.asarray, validation_data)
    num_rows = rowwise.check_tables(params)
    rowwise.check_optimizer(optimizer, params)
    source = sources.make(data, batch_size, must_be_finite=check_finite, rows_of_params=num_rows)
    own = program.Program(loss_fn, optimizer, validate, source.batched, averaging)
    compiled = program.build(own)
    shapes = jax.eval_shape(compiled.begin, params)
    names = check_loss("loss_fn", compiled.loss_fn, shapes.params, key, source.batch)
    validation_names = _validation_names(compiled, shapes.params, key, validation_data, names)
    counts = {"validate_every": validate_every, "patience": patience}
    limits: dict[str, Any] = {name: arguments.count(name, value) for name, value in counts.items()}
    limits |= {"plateau": plateau, "is_hopeless": is_hopeless}
    record = Record(["loss", *names], validation_names, num_steps, **limits)
    run = _Run(compiled, source, record, list(jax.random.split(key, 3)), validation_data, started)
    run.state = compiled.begin(params)
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(noted_interrupts())
        checkpoints = None
        if checkpoint_dir is not None:
            settings = {
                "the key": str(np.asarray(numbers(key)).tolist()),
                "batch_size": str(source.batch_size),
                "validate_every": str(validate_every),
                "averaging": str(averaging),
                "the list of metrics": str([*names, *validation_names]),
            }
            about = {**(configuration or {}), **settings}
            about |= _fingerprint(own, run.state, source, validation_data)
            checkpoints = stack.enter_context(Checkpoints(checkpoint_dir, every, resume, about))
            run.restore(checkpoints)
        source.begin(run.keys[1], record.step)
        stack.callback(source.close)
        shown = stack.enter_context(display(num_steps, progress))
        stack.enter_context(run.carried_by_exceptions())
        reason = record.reason
        pace = Pace()
        while reason is None:
            begun = time.perf_counter()
            chunk = source.at(record.step)
            if chunk is None:
                reason = StopReason.DATA
                break
            chosen = record.step + pace.steps
            ends = [chosen, chunk.end, record.boundary, record.step + program.CAPACITY]
            if checkpoints is not None:
                ends.append(checkpoints.until(record.step))
            steps = run.advance(chunk, min(ends), max_bad)
            seconds = time.perf_counter() - begun
            if pace.compiling:
                shown.begin(record.step)
            pace.learn(steps, seconds)
            if run.bad_in_row >= max_bad:
                raise run.diverged(chunk)
            if record.validation_due:
                run.validate()
            reason = record.reason
            if reason is None and interrupts:
                reason = StopReason.INTERRUPTED
            if reason is not None or record.step == chosen or pace.is_due():
                shown.update(record.step, record.loss, record.validation, record.num_bad_steps)
                if callback is not None:
                    reason = run.call(callback, num_steps, steps / seconds) or reason
            if checkpoints is not None and (reason or record.step % every == 0):
                checkpoints.save(record.step, (run.state, run.best), record.history())

    concerns = record.concerns()
    if reason is StopReason.INTERRUPTED:
        place = f"Interrupted after {record.step} of {num_steps} steps"
        concerns.append(f"{place}: what was learned so far is returned, and the program goes on.")
    for concern in concerns:
        warnings.warn(concern, RuntimeWarning, stacklevel=2)
    return run.result(reason)


class _Run:
    """A run in progress: the state after the last step, and the best parameters by validation.

    `keys` are those of the steps, of the shuffles and of validations.
    """

    state: program.State

    def __init__(
        self,
        compiled: program.Compiled,
        source: sources.Source,
        record: Record,
        keys: list[Array],
        validation_data: PyTree,
        started: float,
    ):
        self._compiled, self._source, self._record = compiled, source, record
        self._validation_data, self._started = validation_data, started
        self.keys = keys
        self.best: PyTree = None
        self.bad_in_row = 0

    def restore(self, checkpoints: Checkpoints) -> None:
        """Goes on from the last checkpoint, if there is one."""
        if self._compiled.validate is not None:
            # Parameters that hold the place of the best ones in a checkpoint.
            self.best = self._judge()[1]
        saved = checkpoints.restore((self.state, self.best))
        if saved is not None:
            (self.state, self.best), history = saved
            step, num_bad, self.bad_in_row = map(int, jax.device_get(self.state[2:]))
            self._record.resume(step, num_bad, history)

    def advance(self, chunk: sources.Chunk, end: int, max_bad: int) -> int:
        """Does the steps of a chunk up to `end`; returns how many these are."""
        before = self._record.step
        numbers = np.asarray([chunk.first, end, max_bad], np.int32)
        self.state, history = self._compiled.run(
            self.state, self.keys[0], chunk.data, chunk.rows, *numbers
        )
        # The one transfer of the chunk; it waits for the steps to be done.
        (step, num_bad, in_row), history = jax.device_get((self.state[2:], history))
        self.bad_in_row = int(in_row)
        self._record.add(int(step), int(num_bad), history)
        return int(step) - before

    def _judge(self) -> tuple[dict[str, Array], PyTree]:
        params, opt_state = self.state[:2]
        return self._compiled.judge(params, opt_state, self.keys[2], self._validation_data)

    def validate(self) -> None:
        """Validates the parameters, and keeps them if they are the best."""
        values, judged = self._judge()
        if self._record.validated(self._record.step, jax.device_get(values)):
            self.best = judged

    def call(
        self, callback: arguments.Callback, num_steps: int, steps_per_second: float
    ) -> StopReason | None:
        """Calls back; returns whether that ends the run."""
        names = ("step", "num_bad_steps", "loss", "metrics", "validation", "best_step")
        seen = Progress(
            **{name: getattr(self._record, name) for name in names},
            num_steps=num_steps,
            steps_per_second=steps_per_second,
            running=self.state.params,
        )
        try:
            return StopReason.CALLBACK if callback(seen) else None
        except KeyboardInterrupt:
            return StopReason.INTERRUPTED

    def result(self, reason: StopReason) -> FitResult:
        """What has been learned."""
        record, state = self._record, self.state
        return FitResult(
            params=self._judge()[1] if record.best_step is None else self.best,
            history=record.history(),
            stop_reason=reason,
            num_steps=record.step,
            num_bad_steps=record.num_bad_steps,
            best_step=record.best_step,
            seconds=time.perf_counter() - self._started,
            last_params=state.params,
            opt_state=state.opt_state,
        )

    @contextlib.contextmanager
    def carried_by_exceptions(self) -> Iterator[None]:
        """Hands what has been learned so far to an exception that ends the run."""
        try:
            yield
        except BaseException as error:
            # An exception in the middle of a step finds its buffers given away.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
                error.result = self.result(StopReason.ERROR)  # type: ignore[attr-defined]
                if not isinstance(error, TrainingDiverged):
                    what = f"What fit had learned in {self._record.step} steps"
                    error.add_note(f"{what} is this exception's `result`.")
            raise

    def diverged(self, chunk: sources.Chunk) -> TrainingDiverged:
        """The error that ends a run with too many bad steps in a row."""
        record, params = self._record, self.state.params
        last = record.step - 1
        batch = chunk.data
        if chunk.rows is not None:
            rows = chunk.rows[last - chunk.first]
            batch = jax.tree.map(lambda leaf: leaf[rows], batch)
        elif self._source.batched:
            batch = jax.tree.map(lambda leaf: leaf[last - chunk.first], batch)
        # The parameters are as they were, so the last bad step can be looked at closely.
        key = jax.random.fold_in(self.keys[0], last)
        cause = culprit(self._compiled.loss_fn, params, key, batch)
        first = record.step - self.bad_in_row
        start = "That is the very first step, so look at the starting parameters and the data. "
        message = (
            f"Training ended after {self.bad_in_row} bad steps in a row: from step {first} on, "
            f"{cause}. {'' if first else start}What usually helps: a smaller learning rate, "
            "`optax.clip_by_global_norm` before the optimizer, a look at the data for outliers, "
            "and at the loss for logarithms, quotients and square roots near zero. This error's "
            "`params` are the last good ones."
        )
        return TrainingDiverged(
            message, params=params, step=first, culprit=cause, history=record.history()
        )


def _validation_names(
    compiled: program.Compiled, params: PyTree, key: Array, data: PyTree, names: list[str]
) -> list[str]:
    """The names under which the history keeps validations, apart from those of the loss."""
    if compiled.validate is None:
        return []
    name = "loss_fn" if compiled.validate is compiled.loss_fn else "validate"
    own = check_loss(name, compiled.validate, params, key, data)
    written = ["validation", *(f"validation_{metric}" for metric in own)]
    for metric in set(names) & set(written):
        rule = f"`loss_fn` must not name a metric {metric!r}"
        raise ValueError(f"{rule}, under which the history keeps a metric of the validation.")
    return written


def _fingerprint(
    own: program.Program, state: program.State, source: sources.Source, validation_data: PyTree
) -> dict[str, str]:
    """What must be the same for a run to go on: what it trains, on what, and how."""
    result = files.describe("loss_fn", own.loss_fn)
    is_origin = lambda node: isinstance(node, Origin)  # noqa: E731
    for name, leaf in named_leaves("params", state.params, is_origin).items():
        if is_origin(leaf):
            result[f"the family of {name}"] = str(leaf.family)
    leaves = named_leaves("params", state.params)
    for name, leaf in (leaves | named_leaves("the optimizer's state", state.opt_state)).items():
        result[name] = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
    trainable, fixed = partition(state.params)
    ones = jax.tree.map(jnp.ones_like, trainable)
    values = {
        "the data": source.sample(SAMPLED_ROWS),
        "the data of the validation": validation_data,
        "the Fixed leaves of the parameters": fixed,
    }
    if not rowwise.tables(trainable):
        extra = {"value": jnp.ones(()), "grad": ones, "value_fn": lambda _: jnp.ones(())}
        update = jax.jit(lambda ones: own.stepper.update(ones, state.opt_state, ones, **extra)[0])
        values["the first update of the optimizer"] = update(ones)
    return result | {f"the digest of {name}": _digest(tree) for name, tree in values.items()}


def _digest(tree: PyTree) -> str:
    result = hashlib.sha256()
    for name, leaf in named_leaves("", tree).items():
        array = np.asarray(numbers(leaf))
        result.update(f"{name} {array.dtype} {array.shape}".encode())
        result.update(array.tobytes())
    return result.hexdigest()[:16]
