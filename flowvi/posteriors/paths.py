"""Optimisation paths: runs of L-BFGS that keep all the points they visited."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

#: Pairs of differences that L-BFGS remembers.
MEMORY = 10

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


def lbfgs(function: Callable[[Array], Array], start: Array, num_steps: int) -> Path:
    """Minimises a function from one start, and keeps the path.

    The line search takes points where the function is not finite as too far. A run ends where it
    finds no step, or next to nothing is gained.
    """
    search = optax.scale_by_zoom_linesearch(TRIALS, initial_guess_strategy="one")
    solver = optax.lbfgs(memory_size=MEMORY, linesearch=search)
    value, gradient = jax.value_and_grad(function)(start)
    x, gradients, values = (jnp.repeat(a[None], num_steps + 1, 0) for a in (start, gradient, value))
    path = Path(x, gradients, values, jnp.zeros((), jnp.int32))

    def advance(carry: tuple[Path, optax.OptState, Array]) -> tuple[Path, optax.OptState, Array]:
        path, state, _ = carry
        x, gradient, value, done = path.x[-1], path.gradient[-1], path.value[-1], path.length + 1
        update, state = solver.update(
            gradient, state, x, value=value, grad=gradient, value_fn=function
        )
        new_gradient, new_value = optax.tree.get(state, "grad"), optax.tree.get(state, "value")
        found = jnp.any(update != 0) & _finite(new_gradient, new_value)
        tiny = 10 * jnp.finfo(value.dtype).eps
        stuck = jnp.abs(value - new_value) <= tiny * (1 + jnp.abs(new_value))
        later = found & (jnp.arange(num_steps + 1) >= done)
        path = Path(
            x=jnp.where(later[:, None], (x + update)[None], path.x),
            gradient=jnp.where(later[:, None], new_gradient[None], path.gradient),
            value=jnp.where(later, new_value, path.value),
            length=done,
        )
        return path, state, found & ~(stuck & (done > 3))

    def unfinished(carry: tuple[Path, optax.OptState, Array]) -> Array:
        return carry[2] & (carry[0].length < num_steps)

    state = solver.init(start)
    return jax.lax.while_loop(unfinished, advance, (path, state, _finite(gradient, value)))[0]


def _finite(gradient: Array, value: Array) -> Array:
    return jnp.isfinite(value) & jnp.isfinite(jnp.sum(jnp.abs(gradient)))
