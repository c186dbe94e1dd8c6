"""The exponential moving average of parameters, carried along in the optimizer's state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flowvi.params import combine, partition
from flowvi.training.rowwise import RowwiseState, together


class AveragedState(NamedTuple):
    """An optimizer's state and the average.

    Attributes:
        inner: the state of the optimizer itself.
        average: of the trainable leaves after each good step.
        num_steps: good steps.
    """

    inner: Any
    average: Any
    num_steps: Any


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

    def init(params: Any) -> AveragedState:
        return AveragedState(inner.init(params), params, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        decay_now = jnp.minimum(decay, state.num_steps / (state.num_steps + 9))

        def moved(average: jax.Array, new: jax.Array) -> jax.Array:
            weight = (1 - decay_now).astype(new.dtype)
            return average + weight * (new - average)

        average = jax.tree.map(moved, state.average, optax.apply_updates(params, updates))
        return updates, AveragedState(inner_state, average, state.num_steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def average(opt_state: Any, params: Any) -> Any:
    """The averaged parameters, with the `Fixed` leaves of `params`.

    Rows of their own have an average over the steps that moved them.
    """
    if not isinstance(opt_state, RowwiseState):
        result = opt_state.average
    else:
        result = opt_state.shared.average
        for table in opt_state.tables:
            result = together(result, table.average)
    return combine(result, partition(params)[1])
