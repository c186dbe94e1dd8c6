"""Chains by BlackJAX's NUTS, in the coordinates of flows."""

from collections.abc import Callable
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import dual_averaging_adaptation

from flowvi.params import Array

#: The acceptance rate that step sizes are adapted to, and the size they begin with.
ACCEPTANCE, STEP_SIZE = 0.8, 0.5


class Chain(NamedTuple):
    """One chain: points of shape [num_draws, D], their members of a mixture, and how it went.

    `num_leaps` counts gradients; warm-up is in it, and in nothing else.
    """

    x: Array
    member: Array
    is_divergent: Array
    acceptance: Array
    num_leaps: Array


class State(NamedTuple):
    """A point x, and the member of a mixture that it belongs to."""

    x: Array
    member: Array


def run(
    log_density: Callable[[Array, Array], Array],
    switch: Callable[[Array, Array, Array], tuple[Array, Array]],
    key: Array,
    x: Array,
    member: Array,
    num_warmup: int,
    num_draws: int,
) -> Chain:
    """One chain, to be traced: at each step NUTS of x at its member, then `switch`.

    Args:
        log_density: (x of shape [D], member) -> scalar.
        switch: (key, x, member) -> another point and member, by a move that leaves the same
            distribution over both as it is.
        key: a random key.
        x: where the chain starts, of shape [D].
        member: the member there.
        num_warmup: steps that adapt the step size and are dropped.
        num_draws: steps that are kept.
    """
    kernel = blackjax.nuts.build_kernel()
    begin, update, finish = dual_averaging_adaptation(ACCEPTANCE)
    mass = jnp.ones_like(x)

    def step(state: State, key: Array, step_size: Array) -> tuple[State, tuple[Array, ...]]:
        nuts_key, switch_key = jax.random.split(key)

        def density(x: Array) -> Array:
            value = log_density(x, state.member)
            return jnp.where(jnp.isfinite(value), value, -jnp.inf)

        moved, info = kernel(
            nuts_key, blackjax.nuts.init(state.x, density), density, step_size, mass
        )
        new = State(*switch(switch_key, moved.position, state.member))
        told = info.is_divergent, info.acceptance_rate, info.num_integration_steps + 1
        return new, told

    def warm(carry: tuple, key: Array) -> tuple[tuple, Array]:  # type: ignore[type-arg]
        state, adaptation = carry
        state, (_, acceptance, leaps) = step(state, key, jnp.exp(adaptation.log_step_size))
        return (state, update(adaptation, acceptance)), leaps

    def keep(state: State, key: Array) -> tuple[State, tuple[Array, ...]]:
        state, told = step(state, key, step_size)
        return state, (state.x, state.member, *told)

    warm_key, keep_key = jax.random.split(key)
    carry = State(x, member), begin(jnp.asarray(STEP_SIZE, x.dtype))
    keys = jax.random.split(warm_key, num_warmup)
    (state, adaptation), early = jax.lax.scan(warm, carry, keys)
    step_size = finish(adaptation)
    _, kept = jax.lax.scan(keep, state, jax.random.split(keep_key, num_draws))
    x, member, divergent, acceptance, leaps = kept
    return Chain(x, member, divergent, acceptance, early.sum() + leaps.sum())
