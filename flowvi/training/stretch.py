"""Many steps between two looks of the host, as one compiled program.

The number of steps is traced, so a stretch of any length runs the same program, and every number
that a step uses depends on the key and the step's own number: the result is the same, bit for bit,
however the steps are cut into stretches.

Good steps pay nothing for bad ones. A step is bad if its loss or gradient is not finite, or what
it leaves behind; and with most optimizers, what is not finite stays so. So a stretch looks at its
losses, and in the end at its parameters and the optimizer's state. Where something is wrong, all of
it is taken back, and a second program, compiled only then, does its steps again with a look at each
of them: it takes a run of steps back that holds a bad one, does it again up to that one, and goes
on behind it. As equal steps give equal bits, the result is that of a loop that looks before it
moves.

Where there are parameters per row, steps wait for the verdict: to take a run of them back needs a
copy of all rows, where a step is to cost what its own few do. There, and with an optimizer that
hides what is not finite, all steps are careful ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi.compiling import KEPT
from flowvi.params import partition
from flowvi.training import averaging, rowwise, stopping
from flowvi.training.order import Order, Stream
from flowvi.training.step import (
    Faults,
    LossFn,
    no_faults,
    shows,
    spoiled,
    train_step,
    unpack,
)

Array = jax.Array

#: Steps in a stretch at most: the length of the buffers that hold their history.
CAPACITY = 4096

#: Careful steps at most that are taken back where one of them is bad.
LONGEST_RUN = 64

#: Steps for which the order of the rows is made ahead, where it is not too large.
AHEAD = 1024


class State(NamedTuple):
    """All of a run's state.

    Attributes:
        params: the parameters.
        opt_state: the optimizer's state.
        keys: the random keys of steps, shuffles and validations, which never change.
        step: steps done.
        order: the place in the stream of rows; None where steps do not pick their rows.
        best: the best parameters by validation; None without validation.
        faults: the count of bad steps.
    """

    params: Any
    opt_state: Any
    keys: Any
    step: Any
    order: Order | None
    best: stopping.Best | None
    faults: Faults


class Limits(NamedTuple):
    """Where a stretch ends. All are traced, so none of them compiles anything anew.

    Attributes:
        stretch: the step at which the host wants to look.
        chunk: the step of the first batch of streamed data.
        num_steps: the last step of all.
        validate_every: steps between two validations.
        patience: validations without a new best.
        max_bad_steps: bad steps in a row.
    """

    stretch: Any
    chunk: Any
    num_steps: Any
    validate_every: Any
    patience: Any
    max_bad_steps: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled stretch is made of; equal programs share it.

    Attributes:
        loss_fn: the loss.
        optimizer: the optimizer.
        validate: the validation loss; None without validation.
        batch_size: rows of a batch; None where every step sees all the data.
        num_rows: rows of the data; None without data.
        streamed: whether the data are batches along a leading axis, made by the host.
        averaging: the decay of the parameters' moving average; None for none.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    validate: LossFn | None
    batch_size: int | None
    num_rows: int | None
    streamed: bool = False
    averaging: float | None = None

    @property
    def stepper(self) -> optax.GradientTransformation:
        """The optimizer row by row, together with the average where there is one."""
        optimizer = self.optimizer
        if self.averaging is not None:
            optimizer = averaging.averaged(optimizer, self.averaging)
        return rowwise.rowwise(optimizer)

    @property
    def stream(self) -> Stream | None:
        """The stream of rows; None where steps do not pick theirs."""
        if self.num_rows is None or self.batch_size is None or self.streamed:
            return None
        return Stream(self.num_rows, self.batch_size, AHEAD)

    def learned(self, state: "State") -> Any:
        """The parameters to judge and to hand back: their average where there is one."""
        if self.averaging is None:
            return state.params
        return averaging.average(state.opt_state, state.params)


class Compiled(NamedTuple):
    """The functions of a program.

    Attributes:
        loss_fn: the loss, whose trace `jit` remembers.
        validate: the validation loss, likewise; None without validation.
        begin: (params, key) -> (the state before the first step, which owns its buffers; whether
            steps may be trusted, and need not be careful).
        run: (state, data, validation data, limits) -> (state, history, suspects). It takes the
            state's buffers away from the caller. If `suspects` is not 0, there was a bad step among
            so many, and the state is as it was.
        careful: the same, with a look at each step; it goes on behind a bad one.
    """

    loss_fn: LossFn
    validate: LossFn | None
    begin: Callable[[Any, Array], tuple[State, Array]]
    run: Callable[[State, Any, Any, np.ndarray], tuple[State, dict[str, Array], Array]]
    careful: Callable[[State, Any, Any, np.ndarray], tuple[State, dict[str, Array], Array]]


# A program also keeps alive whatever its loss has closed over.
@functools.lru_cache(maxsize=KEPT)
def build(program: Program) -> Compiled:
    """The compiled functions of a program, the same ones at every call."""
    # Traced once: checks, steps and their derivatives all start from the same trace.
    # Inlined, or the compiler would see calls, and a short step would take a tenth longer.
    loss_fn = jax.jit(program.loss_fn, inline=True)
    validate = None if program.validate is None else jax.jit(program.validate, inline=True)
    program = dataclasses.replace(program, loss_fn=loss_fn, validate=validate)
    return Compiled(
        loss_fn=loss_fn,
        validate=validate,
        begin=jax.jit(functools.partial(_begin, program)),
        run=jax.jit(functools.partial(_run, program, False), donate_argnums=0),
        careful=jax.jit(functools.partial(_run, program, True), donate_argnums=0),
    )


def _begin(program: Program, params: Any, key: Array) -> tuple[State, Array]:
    # A stretch takes its buffers away from the caller and may not be given one twice, so all are
    # copies; and of a definite dtype, for a loop's state may not change from weak to strong.
    params = jax.tree.map(_own, params)
    state = State(
        params=params,
        opt_state=program.stepper.init(partition(params)[0]),
        keys=jax.random.split(key, 3),
        step=np.int32(0),
        order=None if program.stream is None else program.stream.start(),
        best=None if program.validate is None else stopping.no_best(params),
        faults=no_faults(params),
    )
    trusted = jnp.bool_(False)
    if not rowwise.tables(params):
        trusted = shows(program.stepper, params, state.opt_state)
    return jax.tree.map(_own, state), trusted


def _own(leaf: Any) -> Array:
    if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        return jnp.copy(leaf)
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)


class Walk(NamedTuple):
    """What changes from step to step.

    Attributes:
        params: the parameters.
        opt_state: the optimizer's state.
        step: steps done.
        good: whether the last step was good.
        flaws: of the last step, as in `step.Outcome`.
        history: the buffers of the stretch.
    """

    params: Any
    opt_state: Any
    step: Any
    good: Any
    flaws: Any
    history: dict[str, Array]


class Carry(NamedTuple):
    """What changes from run to run.

    Attributes:
        state: the state.
        history: the buffers of the stretch.
        length: of the next run, at most.
        good: whether no loss was other than finite; of careful steps, always True.
    """

    state: State
    history: dict[str, Array]
    length: Array
    good: Array


def _run(
    program: Program, careful: bool, state: State, data: Any, validation_data: Any, limits: Array
) -> tuple[State, dict[str, Array], Array]:
    bounds = Limits(*limits)
    begin, first = state, state.step
    # Whether steps wait for the verdict on their gradient.
    waits = bool(rowwise.tables(state.params))

    # Two loops, so that the inner one holds nothing but steps: shuffles, validations and the care
    # for bad steps happen between its runs, and cost nothing where there are none.
    def segment(carry: Carry) -> Carry:
        state, history, length, good = carry
        end = jnp.minimum(bounds.stretch, state.step + length)
        pick = None
        if program.stream is not None and state.order is not None:
            order = program.stream.turn(state.order, state.keys[1])
            state = state._replace(order=order)
            end = jnp.minimum(end, state.step + program.stream.batches_left(order))
            pick = functools.partial(_pick, program.stream, data, order, state.step)
        if program.validate is not None:
            every = bounds.validate_every
            end = jnp.minimum(end, (state.step // every + 1) * every)
        walk = jax.lax.while_loop(
            lambda walk: (walk.step < end) & walk.good,
            functools.partial(_step, program, careful, state, data, first, bounds.chunk, pick),
            Walk(
                params=state.params,
                opt_state=state.opt_state,
                step=state.step,
                good=np.bool_(True),
                flaws=state.faults.suspects if careful else None,
                history=history,
            ),
        )
        before = state.step
        if careful:
            state, length = _judged(program, state, walk, length, waits)
        else:
            state = _moved(program, state, walk, np.bool_(True))  # or back, in the end
            state = state._replace(params=walk.params, opt_state=walk.opt_state)
            good = walk.good
        history = walk.history
        if program.validate is not None and state.best is not None:
            due = (state.step % every == 0) | (state.step == bounds.num_steps)
            due &= state.faults.in_row < bounds.max_bad_steps
            due &= state.step > before  # not where the run was taken back
            # Nothing but what a validation changes: a branch not taken copies what it hands on.
            seen = {name: history[name] for name in history if name.startswith("validation")}
            best, seen = jax.lax.cond(
                due,
                functools.partial(
                    _validated, program, program.validate, validation_data, first, state
                ),
                lambda best, seen: (best, seen),
                state.best,
                seen,
            )
            state, history = state._replace(best=best), history | seen
        return Carry(state, history, length, good)

    def goes_on(carry: Carry) -> Array:
        state = carry.state
        on = (state.step < bounds.stretch) & carry.good
        on &= state.faults.in_row < bounds.max_bad_steps
        return on if state.best is None else on & (state.best.waited < bounds.patience)

    history = _empty_history(program, state, data, validation_data)
    longest = LONGEST_RUN if careful and not waits else CAPACITY
    if not careful:
        state = state._replace(faults=state.faults._replace(in_row=jnp.int32(0)))
    start = Carry(state, history, jnp.int32(longest), jnp.bool_(True))
    state, history, _, good = jax.lax.while_loop(goes_on, segment, start)
    if careful:
        return state, history, jnp.int32(0)
    state, suspects = _trusted(begin, state, good)
    return state, history, suspects


def _pick(stream: Stream, data: Any, order: Order, first: Array, step: Array) -> Any:
    """The batch of a step, where the next one in `order` is that of the step `first`."""
    return stream.take(data, order, step - first)


def _step(
    program: Program,
    careful: bool,
    state: State,
    data: Any,
    first: Array,
    chunk: Array,
    pick: Callable[[Array], Any] | None,
    walk: Walk,
) -> Walk:
    batch = data
    if program.streamed:
        batch = jax.tree.map(lambda leaf: leaf[walk.step - chunk], data)
    elif pick is not None:
        batch = pick(walk.step)
    key = jax.random.fold_in(state.keys[0], walk.step)
    out = train_step(
        program.loss_fn, program.stepper, walk.params, walk.opt_state, key, batch, careful
    )
    index = walk.step - first
    values = {"loss": out.loss, **out.metrics}
    history = {
        name: _write(buffer, values[name], index) if name in values else buffer
        for name, buffer in walk.history.items()
    }
    return Walk(
        params=out.params,
        opt_state=out.opt_state,
        step=walk.step + 1,
        good=out.good,
        flaws=out.flaws,
        history=history,
    )


def _moved(program: Program, state: State, walk: Walk, done: Any) -> State:
    """The state at the step and the place of the end of a run, if its steps are done."""
    step = jnp.where(done, walk.step, state.step)
    order = state.order
    if program.stream is not None and order is not None:
        order = program.stream.go_on(order, step - state.step)
    return state._replace(step=step, order=order)


def _trusted(begin: State, end: State, good: Array) -> tuple[State, Array]:
    """(the state after a stretch, 0), or, where a step is bad, (that before it, its steps)."""
    good &= ~spoiled((begin.params, begin.opt_state), (end.params, end.opt_state))
    suspects = jnp.where(good, 0, end.step - begin.step)
    if begin.order is None or end.order is None:
        return jax.lax.cond(good, lambda: end, lambda: begin), suspects
    # To make the orders of the rows anew is cheaper than a copy of them, before every stretch.
    rows = end.order.rows
    begin = begin._replace(order=begin.order._replace(rows=None, filled=begin.order.epoch))
    end = end._replace(order=end.order._replace(rows=None))
    state = jax.lax.cond(good, lambda: end, lambda: begin)
    return state._replace(order=state.order._replace(rows=rows)), suspects


def _judged(
    program: Program, state: State, walk: Walk, length: Array, waits: bool
) -> tuple[State, Array]:
    """The state after a run of careful steps, and the length of the next one.

    A run ends with its first bad step. If that is all there was, it is skipped; else the run is
    taken back, and the next one ends before it. Steps that wait have skipped it themselves.
    """
    num_steps = walk.step - state.step
    skips = ~walk.good if waits else ~walk.good & (num_steps == 1)
    faults = state.faults
    if waits:
        # There may have been good steps before the bad one.
        faults = faults._replace(in_row=jnp.where(num_steps > 1, 0, faults.in_row))
    faults = jax.tree.map(
        functools.partial(jnp.where, skips),
        faults.one_more(walk.flaws),
        faults._replace(in_row=jnp.where(walk.good, 0, faults.in_row)),
    )
    state = _moved(program, state, walk, walk.good | skips)._replace(faults=faults)
    if waits:
        return state._replace(params=walk.params, opt_state=walk.opt_state), length
    grown = jnp.minimum(2 * length, LONGEST_RUN)
    length = jnp.where(walk.good, grown, jnp.maximum(num_steps - 1, 1))
    params, opt_state = jax.lax.cond(
        walk.good,
        lambda: (walk.params, walk.opt_state),
        lambda: (state.params, state.opt_state),
    )
    return state._replace(params=params, opt_state=opt_state), length


def _validated(
    program: Program,
    validate: LossFn,
    validation_data: Any,
    first: Array,
    state: State,
    best: stopping.Best,
    seen: dict[str, Array],
) -> tuple[stopping.Best, dict[str, Array]]:
    params = program.learned(state)
    loss, metrics, _ = unpack(validate(params, state.keys[2], validation_data))
    value = loss.astype(best.value.dtype)
    best = stopping.judge(best, params, value, state.step)
    values = validation_values(value, metrics)
    index = state.step - first - 1
    return best, {name: _write(buffer, values[name], index) for name, buffer in seen.items()}


def validation_values(loss: Any, metrics: dict[str, Any]) -> dict[str, Any]:
    """What a validation writes into the history, by name."""
    return {"validation": loss} | {f"validation_{name}": metrics[name] for name in metrics}


def _write(buffer: Array, value: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), index, 0)


def _empty_history(
    program: Program, state: State, data: Any, validation_data: Any
) -> dict[str, Array]:
    batch = data
    if program.streamed:
        batch = jax.tree.map(lambda leaf: leaf[0], data)
    elif program.batch_size is not None:
        batch = jax.tree.map(lambda leaf: leaf[: program.batch_size], data)
    loss, metrics, _ = unpack(jax.eval_shape(program.loss_fn, state.params, state.keys[0], batch))
    values = {"loss": loss, **metrics}
    if state.best is not None and program.validate is not None:
        key = state.keys[2]
        _, metrics, _ = unpack(jax.eval_shape(program.validate, state.params, key, validation_data))
        values |= validation_values(state.best.value, metrics)
    return {name: jnp.zeros(CAPACITY, value.dtype) for name, value in values.items()}
