"""The training loop: the host's side of it."""

import contextlib
import hashlib
import time
import warnings
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flowvi import checks, devices, files
from flowvi.families import check_key
from flowvi.files import Checkpoints
from flowvi.optimizers import rowwise
from flowvi.params import Origin, PyTree, named_leaves, numbers, partition
from flowvi.training import arguments, program, sources
from flowvi.training.record import Record
from flowvi.training.result import FitResult, StopReason
from flowvi.training.run import Run
from flowvi.training.step import LossFn, check_loss, check_params
from flowvi.training.stopping import Hopeless, Plateau
from flowvi.training.together import done

Array = jax.Array

#: Rows of data whose digest tells them from others.
SAMPLED_ROWS = 1000


@devices.over_its_mesh
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
    mesh: Mesh | int | None = None,
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
        mesh: see there.
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
    validation_data = devices.put(validation_data)
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
    run = Run(
        own,
        source,
        Record(["loss", *names], validation_names, num_steps, **limits),
        list(devices.put(list(jax.random.split(key, 3)))),
        validation_data,
        started,
        num_steps,
        max_bad,
        state=compiled.begin(devices.put(params)),
        mesh=devices.as_mesh(mesh),
        progress=progress,
        callback=callback,
        every=every,
    )
    with contextlib.ExitStack() as stack:
        settings = {
            "the key": str(np.asarray(numbers(key)).tolist()),
            "batch_size": str(source.batch_size),
            "validate_every": str(validate_every),
            "averaging": str(averaging),
            "the list of metrics": str([*names, *validation_names]),
        }
        if checkpoint_dir is not None or devices.are_many():
            about = {**(configuration or {}), **settings}
            about |= _fingerprint(own, run.state, source, validation_data)
            others = {"num_steps": num_steps, "patience": patience, "plateau": plateau}
            others |= {"max_bad_steps": max_bad, "checkpoint_every": every, "resume": resume}
            others["num_rows"] = source.num_rows
            _check_alike(about | {name: str(value) for name, value in others.items()})
        if checkpoint_dir is not None:
            if devices.is_first():
                made = Checkpoints(checkpoint_dir, every, resume, about)
                run.checkpoints = stack.enter_context(made)
            run.restore()
        source.begin(run.keys[1], run.record.step)
        stack.callback(source.close)
        stack.enter_context(run.carried_by_exceptions())
        done(run)
        if run.error is not None:
            raise run.error
        reason = cast(StopReason, run.reason)

    record = run.record
    concerns = record.concerns()
    if reason is StopReason.INTERRUPTED:
        place = f"Interrupted after {record.step} of {num_steps} steps"
        concerns.append(f"{place}: what was learned so far is returned, and the program goes on.")
    for concern in concerns:
        warnings.warn(concern, RuntimeWarning, stacklevel=3)
    return run.result(reason)


def _check_alike(about: dict[str, str]) -> None:
    """Checks that all processes of a fit have been given the same."""
    for process, other in enumerate(devices.of_all(about)):
        if (different := files.difference(other, about)) is not None:
            rule = "all processes must `fit` the same"
            raise ValueError(f"{rule}; between this one and process {process}, {different}.")


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
