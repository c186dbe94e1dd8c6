"""KL divergences in closed form."""

from typing import Any

import distrax
import jax
import jax.numpy as jnp

from flowvi.bijectors import Units
from flowvi.distributions import FlowDistribution

Array = jax.Array


def kl_divergence(q: distrax.Distribution, p: distrax.Distribution) -> Array:
    """KL(q || p) in nats, of the batch shape of both, where it has a closed form.

    Between normal distributions, also those that are affine flows,

        KL = 1/2 [tr(P^-1 Q) + (m_p - m_q)^T P^-1 (m_p - m_q) - D + log |P| - log |Q|]

    and for others what Distrax and TensorFlow Probability have registered.

    Raises:
        NotImplementedError: where there is none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> from flowvi.objectives import closed_form
        >>> family = fv.full_rank(2)
        >>> q = family.distribution(family.init(jax.random.key(0)))
        >>> p = fv.standard_normal(2).distribution({})
        >>> abs(float(closed_form.kl_divergence(q, p))) < 1e-5
        True
    """
    of_q, of_p = _moments(q), _moments(p)
    if of_q is not None and of_p is not None:
        (mean_q, spread_q, diagonal_q), (mean_p, spread_p, diagonal_p) = of_q, of_p
        if diagonal_q and diagonal_p:
            return _diagonal_kl(mean_q, spread_q, mean_p, spread_p)
        return _full_kl(
            mean_q,
            _as_matrix(spread_q, diagonal_q),
            mean_p,
            _as_matrix(spread_p, diagonal_p),
        )
    if isinstance(q, distrax.Transformed) or isinstance(p, distrax.Transformed):
        # Distrax's own rule takes flows of one architecture for equal: see `distributions`.
        raise NotImplementedError(
            f"KL({type(q).__name__} || {type(p).__name__}) has no closed form."
        )
    return q.kl_divergence(p)


def _moments(distribution: Any) -> tuple[Array, Array, bool] | None:
    """(mean, variances or covariance, whether it is variances) of a normal; None for others."""
    if isinstance(distribution, FlowDistribution):
        base = _moments(distribution.distribution)
        if base is None or not distribution.bijector.is_constant_jacobian:
            return None
        if not base[2] or len(distribution.event_shape) != 1:
            return None
        if isinstance(distribution.bijector, Units):
            slope = jnp.exp(_log_slope(distribution))
            return distribution.mean(), base[1] * slope**2, True
        return distribution.mean(), distribution.covariance(), False
    inner = distribution
    while isinstance(inner, distrax.Independent):
        inner = inner.distribution
    if isinstance(inner, distrax.Normal) and len(distribution.event_shape) == 1:
        return inner.loc, inner.scale**2, True
    return None


def _log_slope(distribution: FlowDistribution) -> Array:
    zero = distribution.mean() * 0
    bijector = distribution.bijector
    return jnp.log(jnp.abs(bijector.forward(zero + 1) - bijector.forward(zero)))


def _as_matrix(spread: Array, diagonal: bool) -> Array:
    return spread[..., None] * jnp.eye(spread.shape[-1]) if diagonal else spread


def _diagonal_kl(mean_q: Array, var_q: Array, mean_p: Array, var_p: Array) -> Array:
    ratio = var_q / var_p
    terms = ratio + (mean_p - mean_q) ** 2 / var_p - 1 - jnp.log(ratio)
    return 0.5 * jnp.sum(terms, -1)


def _full_kl(mean_q: Array, cov_q: Array, mean_p: Array, cov_p: Array) -> Array:
    size = cov_q.shape[-1]
    root_q, root_p = jnp.linalg.cholesky(cov_q), jnp.linalg.cholesky(cov_p)
    batch = jnp.broadcast_shapes(root_q.shape[:-2], root_p.shape[:-2])
    matrix = (*batch, size, size)
    root_q, root_p = jnp.broadcast_to(root_q, matrix), jnp.broadcast_to(root_p, matrix)
    shift = jnp.broadcast_to(mean_p - mean_q, matrix[:-1])[..., None]
    solve = jax.scipy.linalg.solve_triangular
    trace = jnp.sum(solve(root_p, root_q, lower=True) ** 2, (-1, -2))
    square = jnp.sum(solve(root_p, shift, lower=True) ** 2, (-1, -2))
    return 0.5 * (trace + square - size) + _log_diagonal(root_p) - _log_diagonal(root_q)


def _log_diagonal(root: Array) -> Array:
    return jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), -1)
