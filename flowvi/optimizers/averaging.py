"""Parameters that are judged and handed back, where they are not those that are trained.

The exponential moving average of parameters is carried along in the optimizer's state; optimizers
without a schedule keep an average of their own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from flowvi.optimizers.rowwise import RowwiseState, together
from flowvi.params import PyTree, combine, partition


class AveragedState(NamedTuple):
    """An optimizer's own state, the average of trainable leaves, and the number of good steps."""

    inner: PyTree
    average: PyTree
    num_steps: jax.Array


# The same object for the same arguments, so that a second fit compiles nothing.
@functools.lru_cache(maxsize=64)
def averaged(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, whose state also holds the average of the parameters it leads to.

        average_t = d_t average_{t-1} + (1 - d_t) params_t,  d_t = min(decay, t / (t + 9))

    At first d_t is smaller than the decay, so that the start is forgotten in time.

    Source: Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> AveragedState:
        return AveragedState(inner.init(params), params, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: AveragedState, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, AveragedState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        decay_now = jnp.minimum(decay, state.num_steps / (state.num_steps + 9))

        def moved(average: jax.Array, new: jax.Array) -> jax.Array:
            weight = (1 - decay_now).astype(new.dtype)
            return average + weight * (new - average)

        average = jax.tree.map(moved, state.average, optax.apply_updates(params, updates))
        return updates, AveragedState(inner_state, average, state.num_steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def learned(opt_state: PyTree, params: PyTree) -> PyTree:
    """The parameters to judge and to hand back, with the `Fixed` leaves of `params`.

    Those where a schedule-free optimizer evaluates (Defazio et al., "The Road Less Scheduled",
    2024), the moving average where there is one, else `params`. Rows of their own have an average
    over the steps that moved them.
    """
    trainable, fixed = partition(params)
    is_free = lambda node: isinstance(node, ScheduleFreeState)  # noqa: E731
    for node in filter(is_free, jax.tree.leaves(opt_state, is_leaf=is_free)):
        return combine(schedule_free_eval_params(node, trainable), fixed)
    if isinstance(opt_state, AveragedState):
        trainable = opt_state.average
    elif isinstance(opt_state, RowwiseState) and isinstance(opt_state.shared, AveragedState):
        trainable = opt_state.shared.average
        for table in opt_state.tables:
            trainable = together(trainable, table.average)
    return combine(trainable, fixed)
