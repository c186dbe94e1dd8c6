"""Draws that carry the score of their density with them, from base to data.

Where x has the density p and s(x) is the gradient of log p(x), y = f(x) has the score

    J^-T (s(x) - gradient of log |det J|),   J the Jacobian of f at x

which is what a path gradient needs of q. As the way of a draw is known, no layer is inverted.

Source: Vaitl, Winkler, Richter, Kessel, "Fast and Unified Path Gradient Estimators for Normalizing
Flows", 2024.
"""

import distrax
import jax
import jax.numpy as jnp

from flowvi.params import Array


def forward_with_score(
    bijector: distrax.Bijector, x: Array, score: Array
) -> tuple[Array, Array, Array]:
    """y = f(x), log |det J| and the score at y; no gradient flows through the score.

    A bijector that knows how has a method of this name; of others the inverse is differentiated.
    The gradient of the log density of x is `score`, of the shape of x.
    """
    own = getattr(bijector, "forward_with_score", None)
    if own is not None:
        return own(x, score)
    if not isinstance(bijector, distrax.Chain):
        return through_inverse(bijector, x, score)
    total = jnp.zeros(())
    for each in reversed(bijector.bijectors):
        x, log_det, score = forward_with_score(each, x, score)
        total = total + log_det
    return x, total, score


def through_inverse(
    bijector: distrax.Bijector, x: Array, score: Array
) -> tuple[Array, Array, Array]:
    """The same by a gradient of the inverse."""
    y, log_det = bijector.forward_and_log_det(x)
    frozen = jax.lax.stop_gradient(bijector)
    (back, inverse_log_det), pull = jax.vjp(frozen.inverse_and_log_det, jax.lax.stop_gradient(y))
    (new,) = pull((score.astype(back.dtype), jnp.ones_like(inverse_log_det)))
    return y, log_det, jax.lax.stop_gradient(new)
