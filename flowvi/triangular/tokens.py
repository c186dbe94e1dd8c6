r"""The same solve for networks that keep what they have seen, such as causal attention.

Coordinate k needs theta_k(x_<k), which one more token gives: its cost is that of a D-th of a pass.
With f(x; w) = t(x; theta(x; w)) = y, the tangent of the solution solves

    J dx = dy - (df/dw) dw,   J = df/dx

where J is triangular. The right side is the tangent of one pass of all tokens, and J is solved
token by token, with the tangents of what is kept. Of a solution all that is kept is known at once,
from one pass; so the walk is linear, JAX turns it round for gradients, and nothing is stored for
each token but what a pass keeps of it. Derivatives are of every order.
"""

import functools
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from flowvi.attention import before
from flowvi.params import Array, PyTree, Shape
from flowvi.transformers import Transformer


@runtime_checkable
class Tokens(Protocol):
    """A conditioner, as a pytree, that takes its input a coordinate at a time."""

    def __call__(self, x: Array) -> Array:
        """theta of shape [..., D, P] for x of shape [..., D]."""

    def batch_shape(self, x: Array) -> Shape:
        """Leading axes of results for x."""

    def rows(self, batch: Shape) -> "Tokens":
        """The same for the rows of a batch, on one axis."""

    def start(self, num_rows: int, dtype: jnp.dtype) -> PyTree:
        """What is kept before the first token."""

    def tokens(self, kept: PyTree, place: Array | int, x: Array) -> tuple[PyTree, Array]:
        """What is kept after T more tokens from a place on, and their theta, [n, T, P]."""


def inverse_by_tokens(
    conditioner: Tokens, transformer: Transformer, y: Array
) -> tuple[Array, Array]:
    """The inverse of y_k = t(x_k; theta_k(x_<k)) and the log-determinant of its Jacobian."""
    batch, size = conditioner.batch_shape(y), y.shape[-1]
    rows = jnp.broadcast_to(y, (*batch, size)).reshape(math.prod(batch), size)
    whole = conditioner.rows(batch)
    dtype = jnp.result_type(y, *jax.tree.leaves(whole))
    x = _solve(transformer, whole, rows.astype(dtype))
    log_det = -transformer(whole(x)).forward_log_det_jacobian(x).sum(-1)
    return x.reshape(*batch, size), log_det.reshape(batch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(transformer: Transformer, conditioner: Tokens, y: Array) -> Array:
    """x of shape [n, D]."""

    def step(state: PyTree, here: PyTree) -> tuple[PyTree, Array]:
        kept, before = state
        place, y_k = here
        kept, theta = conditioner.tokens(kept, place, before[:, None])
        x = transformer(theta[:, 0]).inverse(y_k)
        return (kept, x), x

    start = conditioner.start(len(y), y.dtype), jnp.zeros(len(y), y.dtype)
    _, x = jax.lax.scan(step, start, (jnp.arange(y.shape[1]), y.T))
    return x.T


@_solve.defjvp
def _solve_jvp(transformer: Transformer, primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
    (conditioner, y), (d_conditioner, dy) = primals, tangents
    x = _solve(transformer, conditioner, y)
    theta, d_theta = jax.jvp(lambda network: network(x), (conditioner,), (d_conditioner,))
    scalar = lambda theta, x: transformer(theta).forward(x)  # noqa: E731
    t_theta, t_x = jax.vjp(scalar, theta, x)[1](jnp.ones_like(x))
    shifted = before(x)
    empty = conditioner.start(len(y), y.dtype)
    kept, _ = conditioner.tokens(empty, 0, shifted)

    def step(state: PyTree, here: PyTree) -> tuple[PyTree, Array]:
        place, rhs, x_before, own_theta, own_x = here

        def token(kept: PyTree, before: Array) -> tuple[PyTree, Array]:
            kept, theta = conditioner.tokens(kept, place, before[:, None])
            return kept, theta[:, 0]

        _, (d_kept, d_theta) = jax.jvp(token, (kept, x_before), state)
        dx = (rhs - (own_theta * d_theta).sum(-1)) / own_x
        return (d_kept, dx), dx

    rhs = dy - (t_theta * d_theta).sum(-1)
    rows = (rhs.T, shifted.T, jnp.moveaxis(t_theta, 1, 0), t_x.T)
    start = jax.tree.map(jnp.zeros_like, (kept, x[:, 0]))
    _, dx = jax.lax.scan(step, start, (jnp.arange(y.shape[1]), *rows))
    return x, dx.T
