"""What `fit_vae` does where nothing is said."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowvi.params import PerRow, is_per_row

#: Rows of a batch, where there are as many.
BATCH_SIZE = 128

#: The learning rate at its peak, relative to the size that parameters start with.
LEARNING_RATE = 2e-2

#: How many times faster than others parameters per row move. They are what an encoder would say of
#: a row, and what it says moves faster than each of its many weights.
ROW_SPEED = 5.0

#: The part of the steps over which the learning rate rises, and how many they are at most.
RISE, MOST_RISE = 0.1, 500


def scale_by_start() -> optax.GradientTransformation:
    """Multiplies the updates of each leaf by the root mean square that it started with.

    A step then is a share of the parameters' own size. Networks of different libraries keep the
    same function in different parameters, weights of size 1 that are divided by the square root of
    the fan-in when they are used, or weights of that smaller size; with this they learn alike. A
    leaf that starts at zero, as biases do, is taken for one of size 1. Parameters per row are taken
    for ones of size 5 whatever they start with.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.full(3, 0.1), "b": jnp.zeros(3)}
        >>> scale = scale_by_start()
        >>> updates, _ = scale.update({"w": jnp.ones(3), "b": jnp.ones(3)}, scale.init(params))
        >>> print(updates["w"], updates["b"])
        [0.1 0.1 0.1] [1. 1. 1.]
    """

    def size(leaf: jax.Array) -> jax.Array:
        square = jnp.mean(jnp.square(leaf))
        return jnp.sqrt(jnp.where(square > 0, square, 1))

    def of(node: Any) -> Any:
        if not is_per_row(node):
            return size(node)
        return PerRow(jax.tree.map(lambda leaf: jnp.asarray(ROW_SPEED, leaf.dtype), node.value))

    def init(params: Any) -> Any:
        return jax.tree.map(of, params, is_leaf=is_per_row)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda update, size: update * size, updates, state), state

    return optax.GradientTransformation(init, update)


# The same object for the same length, so that a second fit compiles nothing.
@functools.lru_cache(maxsize=64)
def default_optimizer(
    num_steps: int, learning_rate: float = LEARNING_RATE
) -> optax.GradientTransformation:
    """Adam relative to the parameters' size at start; a warm-up, and a cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / 10,
        peak_value=learning_rate,
        warmup_steps=min(int(RISE * num_steps), MOST_RISE),
        decay_steps=num_steps,
    )
    return optax.chain(
        optax.scale_by_adam(), scale_by_start(), optax.scale_by_learning_rate(schedule)
    )


#: Steps of each row where only rows are fitted, their learning rate at first, and draws in a step.
ROW_STEPS, ROW_LEARNING_RATE, ROW_DRAWS = 500, 0.1, 8


@functools.lru_cache(maxsize=64)
def row_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam with a cosine decay to zero, for parameters per row: they are of the size of latents.

    A row has few steps, over which its gradient shrinks by orders of magnitude; so the squares of
    the gradient are forgotten within a hundred steps.
    """
    return optax.adam(optax.cosine_decay_schedule(ROW_LEARNING_RATE, num_steps), b2=0.99)
