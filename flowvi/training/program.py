"""Many steps as one compiled program.

The number of steps is traced, so a chunk of any length runs the same program, and every number that
a step uses depends on the key and the step's own number: the result is the same, bit for bit,
however the steps are cut into chunks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi import devices
from flowvi.compiling import KEPT
from flowvi.optimizers import averaged, learned, rowwise
from flowvi.params import PyTree, is_key, partition
from flowvi.training.step import LossFn, Metrics, is_finite, train_step, unpack

Array = jax.Array

#: Steps in a chunk at most, where the data set no limit.
CAPACITY = 4096

#: Those of several runs at once, whose histories a step copies as a whole.
TOGETHER = 128

#: Steps at most that are done again where one of them is bad.
SEGMENT = 64


class State(NamedTuple):
    """What a step changes: of `step` steps `num_bad` were bad, the last `bad_in_row` in a row."""

    params: PyTree
    opt_state: PyTree
    step: Array
    num_bad: Array
    bad_in_row: Array


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled chunk is made of; equal programs share it.

    Where it is `batched`, data are batches along a leading axis. `averaging` is the decay of the
    parameters' moving average.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    validate: LossFn | None = None
    batched: bool = False
    averaging: float | None = None

    @property
    def stepper(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer row by row, together with the average where there is one."""
        own, decay = self.optimizer, self.averaging
        return rowwise.rowwise(own if decay is None else averaged(own, decay))


class Compiled(NamedTuple):
    """The functions of a program.

    - loss_fn, validate: the losses, whose traces `jit` remembers;
    - begin: params -> the state before the first step, which owns its buffers;
    - run: (state, key, data, rows, first, end, max_bad) -> (state, history), which takes the
      state's buffers away. The history has an entry for each step. See `sources.Chunk` for data,
      rows and first; it ends at the step `end`, or with so many bad steps in a row;
    - judge: (params, opt_state, key, validation data) -> (loss and metrics of the validation, or
      none, the parameters that are judged, in buffers of their own).
    """

    loss_fn: LossFn
    validate: LossFn | None
    begin: Callable[[PyTree], State]
    run: Callable[..., tuple[State, Metrics]]
    judge: Callable[[PyTree, PyTree, Array, PyTree], tuple[Metrics, PyTree]]


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
        run=jax.jit(functools.partial(_run, program), donate_argnums=0),
        judge=jax.jit(functools.partial(_judge, program)),
    )


@functools.lru_cache(maxsize=KEPT)
def build_together(program: Program) -> Compiled:
    """The same of several runs at once: what `run` and `judge` are given has an axis of runs.

    A run that is at its end does no steps, whatever those beside it do. A call of `run` does
    `TOGETHER` steps at most.
    """
    alone = build(program)
    program = dataclasses.replace(program, loss_fn=alone.loss_fn, validate=alone.validate)
    run = jax.vmap(functools.partial(_run, program, most=TOGETHER))
    judge = jax.vmap(functools.partial(_judge, program))
    return alone._replace(run=jax.jit(run, donate_argnums=0), judge=jax.jit(judge))


def _begin(program: Program, params: PyTree) -> State:
    # A chunk takes its buffers away from the caller and may not be given one twice, so all are
    # copies; and of a definite dtype, for a loop's state may not change from weak to strong.
    params = jax.tree.map(_own, params)
    opt_state = program.stepper.init(partition(params)[0])
    return devices.placed(jax.tree.map(_own, State(params, opt_state, *np.zeros(3, np.int32))))


def _own(leaf: Array) -> Array:
    if is_key(leaf):
        return jnp.copy(leaf)
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)


def _run(
    program: Program,
    state: State,
    key: Array,
    data: PyTree,
    rows: Array | None,
    first: Array,
    end: Array,
    max_bad: Array,
    most: int | None = None,
) -> tuple[State, Metrics]:
    begin = state.step

    def batch_at(step: Array) -> PyTree:
        if rows is not None:
            chosen = rows[step - first]
            batch = jax.tree.map(lambda leaf: leaf.at[chosen].get(mode="promise_in_bounds"), data)
            # Or the compiler picks the rows out anew in each kernel that reads them.
            return devices.split(jax.lax.optimization_barrier(batch))
        batch = jax.tree.map(lambda leaf: leaf[step - first], data) if program.batched else data
        return devices.split(batch)

    # Steps take back themselves what they did to parameters per row: a copy of all rows is dear.
    guards = bool(rowwise.tables(state.params))

    def one_step(carry: tuple[State, Metrics, Array]) -> tuple[State, Metrics, Array]:
        state, history, _ = carry
        own_key, batch = jax.random.fold_in(key, state.step), batch_at(state.step)
        out = train_step(
            program.loss_fn, program.stepper, state.params, state.opt_state, own_key, batch, guards
        )
        place = state.step - begin
        history = {
            name: jax.lax.dynamic_update_index_in_dim(
                history[name], value.astype(history[name].dtype), place, 0
            )
            for name, value in {"loss": out.loss, **out.metrics}.items()
        }
        bad = jnp.where(out.good, 0, 1) if guards else 0
        counts = state.step + 1, state.num_bad + bad, (state.bad_in_row + bad) * bad
        after = State(out.params, out.opt_state, *counts)
        return devices.placed(after), history, out.good | guards

    def segment(carry: tuple[State, Metrics, Array]) -> tuple[State, Metrics, Array]:
        state, history, limit = carry

        def goes_on(carry: tuple[State, Metrics, Array]) -> Array:
            return (carry[0].step < limit) & carry[2] & (carry[0].bad_in_row < max_bad)

        start = state, history, jnp.bool_(True)
        after, history, all_good = jax.lax.while_loop(goes_on, one_step, start)
        if guards:
            return after, history, jnp.minimum(after.step + SEGMENT, end)
        # One bad step alone is skipped; behind others it is taken back with them, and they are done
        # again up to it. That costs good steps nothing, where a choice in each would cost a third.
        good, count = all_good & is_finite(partition(after.params)[0]), after.step - state.step
        params, opt_state = jax.lax.cond(good, lambda a, b: a, lambda a, b: b, after[:2], state[:2])
        skips = ~good & (count == 1)
        back = ~good & ~skips
        step = jnp.where(back, state.step, after.step)
        in_row = jnp.where(good, 0, state.bad_in_row + skips)
        moved = State(params, opt_state, step, state.num_bad + skips, in_row.astype(jnp.int32))
        # What an optimizer made of good gradients is looked at behind a segment, and searched for.
        retry = jnp.where(all_good, count // 2, count - 1)
        limit = step + jnp.where(back, retry, SEGMENT)
        return moved, history, jnp.minimum(limit, end)

    loss, metrics, _ = unpack(jax.eval_shape(program.loss_fn, state.params, key, batch_at(begin)))
    batches = rows if rows is not None else jax.tree.leaves(data)[0] if program.batched else None
    capacity = most or (CAPACITY if batches is None else batches.shape[0])
    numbers = {"loss": loss, **metrics}
    history = {name: jnp.zeros(capacity, each.dtype) for name, each in numbers.items()}
    limit = jnp.minimum(begin + SEGMENT, end)
    is_open = lambda c: (c[0].step < end) & (c[0].bad_in_row < max_bad)  # noqa: E731
    return jax.lax.while_loop(is_open, segment, (state, history, limit))[:2]


def _judge(
    program: Program, params: PyTree, opt_state: PyTree, key: Array, data: PyTree
) -> tuple[Metrics, PyTree]:
    judged = learned(opt_state, params)
    values: Metrics = {}
    if program.validate is not None:
        again = jax.random.clone(key)  # the same each time
        loss, metrics, _ = unpack(program.validate(judged, again, data))
        values = {"validation": loss} | {f"validation_{name}": metrics[name] for name in metrics}
    return values, devices.placed(jax.tree.map(_own, judged))
