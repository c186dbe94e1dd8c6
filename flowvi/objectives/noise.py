"""How noisy the gradient of an objective is."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.compiling import compiled
from flowvi.objectives.variational import Batch, Output, Params
from flowvi.params import PyTree, combine, partition

Array = jax.Array
LossFn = Callable[[Params, Array, Batch], Output]


class GradientMoments(NamedTuple):
    """Mean and variance of a loss and of its gradient, over the randomness of the loss.

    Attributes:
        loss: the mean loss.
        loss_variance: its variance.
        mean: the mean gradient of each trainable leaf, None in place of fixed ones.
        variance: its variance, likewise.
    """

    loss: Array
    loss_variance: Array
    mean: PyTree
    variance: PyTree

    @property
    def total_variance(self) -> Array:
        """The sum of the variances of all numbers of the gradient."""
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(self.variance)), jnp.zeros(()))


def gradient_moments(
    loss_fn: LossFn,
    params: Params,
    key: Array,
    batch: Batch = None,
    *,
    num_draws: int = 100,
    name: str = "posterior",
) -> GradientMoments:
    """Mean and variance of the gradient of a loss at one place and one batch.

    Which estimator to take is a matter of its variance at the same price. Memory does not grow with
    the number of draws.

    Args:
        loss_fn: an objective, or any loss of `fit`.
        params: its parameters, as `init` returns them.
        key: a random key.
        batch: the batch.
        num_draws: how often the gradient is drawn, at least 2.
        name: whose gradient: a key of `params`.

    Raises:
        ValueError, TypeError: if `num_draws` is not an integer of at least 2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> def log_joint(params, key, z, batch):
        ...     return jnp.sum(z, -1)
        >>> family = fv.unconditional(fv.bernoulli(3))
        >>> for controls in ((), (fv.objectives.LeaveOneOut(),)):
        ...     loss_fn = fv.objectives.ScoreFunction(
        ...         family, log_joint, num_samples=4, controls=controls
        ...     )
        ...     params = loss_fn.init(jax.random.key(0))
        ...     moments = gradient_moments(loss_fn, params, jax.random.key(1))
        ...     print(f"{moments.total_variance:.2f}")
        2.06
        0.18
    """
    if checks.positive_int("num_draws", num_draws) < 2:
        raise ValueError(f"`num_draws` must be at least 2; got {num_draws}.")
    return _moments(loss_fn, params, key, batch, num_draws, name)


@compiled(static_argnums=(4, 5))
def _moments(
    loss_fn: LossFn, params: Params, key: Array, batch: Batch, num_draws: int, name: str
) -> GradientMoments:
    trainable, fixed = partition(params[name])

    def loss(trainable: PyTree, key: Array) -> Array:
        out = loss_fn({**params, name: combine(trainable, fixed)}, key, batch)
        return out[0] if isinstance(out, tuple) else out

    def draw(index: Array) -> PyTree:
        return jax.value_and_grad(loss)(trainable, jax.random.fold_in(key, index))

    def add(index: Array, sums: PyTree) -> PyTree:
        # Welford's update, which loses no digits to a large mean.
        mean, square = sums
        new = draw(index)
        moved = jax.tree.map(lambda m, x: m + (x - m) / (index + 1), mean, new)
        square = jax.tree.map(lambda s, x, m, n: s + (x - m) * (x - n), square, new, mean, moved)
        return moved, square

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw, 0))
    mean, square = jax.lax.fori_loop(0, num_draws, add, (zero, zero))
    variance = jax.tree.map(lambda s: s / (num_draws - 1), square)
    return GradientMoments(mean[0], variance[0], mean[1], variance[1])
