"""Optimisation paths: several runs of L-BFGS side by side, with all they visited."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

#: Pairs of differences that L-BFGS remembers.
MEMORY = 10

#: Conditions of a step: on the decrease, and on the slope at its end.
DECREASE, SLOPE = 1e-4, 0.9

#: Trials of one line search.
TRIALS = 30


class Path(NamedTuple):
    """What a run visited.

    Attributes:
        x: points, of shape [num_steps + 1, D]; beyond `length` the last one is repeated.
        gradient: of the function there.
        value: of the function there, of shape [num_steps + 1].
        length: steps done.
    """

    x: Array
    gradient: Array
    value: Array
    length: Array


class _State(NamedTuple):
    x: Array
    value: Array
    gradient: Array
    steps: Array  # [MEMORY, D], the latest last
    changes: Array  # of the gradient
    done: Array
    alive: Array


def lbfgs(function: Callable[[Array], Array], start: Array, num_steps: int) -> Path:
    """Minimises a function from one start, and keeps the path.

    A step ends where the function has decreased enough and its slope has flattened; points where
    it is not finite count as too far. A run ends where no such step is found.

    Source: Lewis, Overton, "Nonsmooth Optimization via Quasi-Newton Methods", 2013.
    """
    value_and_grad = jax.value_and_grad(function)
    value, gradient = value_and_grad(start)
    size = start.shape[0]
    state = _State(
        x=start,
        value=value,
        gradient=gradient,
        steps=jnp.zeros((MEMORY, size), start.dtype),
        changes=jnp.zeros((MEMORY, size), start.dtype),
        done=jnp.zeros((), jnp.int32),
        alive=_finite(value, gradient),
    )
    path = Path(
        x=jnp.broadcast_to(start, (num_steps + 1, size)),
        gradient=jnp.broadcast_to(gradient, (num_steps + 1, size)),
        value=jnp.broadcast_to(value, (num_steps + 1,)),
        length=state.done,
    )

    def advance(carry: tuple[_State, Path]) -> tuple[_State, Path]:
        state, path = carry
        direction = _direction(state)
        slope = jnp.vdot(direction, state.gradient)
        downhill = slope < 0
        direction = jnp.where(downhill, direction, -state.gradient)
        slope = jnp.where(downhill, slope, -jnp.vdot(state.gradient, state.gradient))
        length, value, gradient, found = _search(value_and_grad, state, direction, slope)
        step = jnp.where(found, length * direction, 0)
        change = jnp.where(found, gradient - state.gradient, 0)
        product = jnp.vdot(step, change)
        useful = product > 1e-10 * jnp.linalg.norm(step) * jnp.linalg.norm(change)

        def push(old: Array, new: Array) -> Array:
            return jnp.where(useful, jnp.concatenate([old[1:], new[None]]), old)

        tiny = jnp.finfo(value.dtype).eps * 10
        stuck = jnp.abs(state.value - value) <= tiny * (1 + jnp.abs(value))
        new = _State(
            x=state.x + step,
            value=jnp.where(found, value, state.value),
            gradient=jnp.where(found, gradient, state.gradient),
            steps=push(state.steps, step),
            changes=push(state.changes, change),
            done=state.done + 1,
            alive=found & ~(stuck & (state.done > 2)),
        )
        index = jnp.arange(num_steps + 1) >= new.done
        path = Path(
            x=jnp.where(index[:, None], new.x, path.x),
            gradient=jnp.where(index[:, None], new.gradient, path.gradient),
            value=jnp.where(index, new.value, path.value),
            length=new.done,
        )
        return new, path

    def unfinished(carry: tuple[_State, Path]) -> Array:
        state, _ = carry
        return state.alive & (state.done < num_steps)

    return jax.lax.while_loop(unfinished, advance, (state, path))[1]


def _finite(value: Array, gradient: Array) -> Array:
    return jnp.isfinite(value) & jnp.isfinite(jnp.sum(jnp.abs(gradient)))


def _direction(state: _State) -> Array:
    """Minus the inverse Hessian's estimate times the gradient, by the two loops."""
    products = jnp.sum(state.steps * state.changes, -1)
    inverse = jnp.where(products > 0, 1 / jnp.where(products > 0, products, 1), 0)

    def backward(q: Array, pair: Any) -> tuple[Array, Array]:
        step, change, rho = pair
        alpha = rho * jnp.vdot(step, q)
        return q - alpha * change, alpha

    pairs = (state.steps, state.changes, inverse)
    q, alphas = jax.lax.scan(backward, state.gradient, pairs, reverse=True)
    square = jnp.vdot(state.changes[-1], state.changes[-1])
    first = 1 / jnp.maximum(jnp.linalg.norm(state.gradient), 1)
    scale = jnp.where(square > 0, products[-1] / jnp.where(square > 0, square, 1), first)

    def forward(q: Array, item: Any) -> tuple[Array, None]:
        step, change, rho, alpha = item
        return q + (alpha - rho * jnp.vdot(change, q)) * step, None

    q, _ = jax.lax.scan(forward, scale * q, (*pairs, alphas))
    return -q


def _search(
    value_and_grad: Callable[[Array], tuple[Array, Array]],
    state: _State,
    direction: Array,
    slope: Array,
) -> tuple[Array, Array, Array, Array]:
    """(length, value, gradient, found) of a step, by bisection between too short and too long."""
    dtype = state.x.dtype

    def trial(carry: Any) -> Any:
        low, high, length, _, best, count = carry
        value, gradient = value_and_grad(state.x + length * direction)
        good = _finite(value, gradient)
        lower = good & (value <= state.value + DECREASE * length * slope)
        flat = lower & (jnp.vdot(gradient, direction) >= SLOPE * slope)
        # A step that is too short still is one, where no better is found.
        old_length, old_value, old_gradient, old_found = best
        take = lower & (~old_found | (value < old_value))
        best = (
            jnp.where(take, length, old_length),
            jnp.where(take, value, old_value),
            jnp.where(take, gradient, old_gradient),
            old_found | lower,
        )
        low, high = jnp.where(lower, length, low), jnp.where(lower, high, length)
        # Below the middle where nothing is known but that a step is far too long.
        middle = jnp.where(low > 0, 0.5 * (low + high), 0.25 * high)
        length = jnp.where(jnp.isfinite(high), middle, 2 * low)
        return low, high, length, flat, best, count + 1

    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    none = (zero, state.value, state.gradient, jnp.zeros((), bool))
    start = (zero, jnp.full((), jnp.inf, dtype), one, jnp.zeros((), bool), none, 0)
    carry = jax.lax.while_loop(lambda c: ~c[3] & (c[5] < TRIALS), trial, start)
    return carry[4]
