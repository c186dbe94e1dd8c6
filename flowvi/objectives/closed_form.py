"""KL divergences in closed form."""

import distrax
import jax
import jax.numpy as jnp

from flowvi.bijectors import Units
from flowvi.distributions import FlowDistribution, RelaxedDistribution

Array = jax.Array


def kl_divergence(q: distrax.Distribution, p: distrax.Distribution) -> Array:
    """KL(q || p) in nats, of the batch shape of both, where it has a closed form.

    Between normal distributions, also those that are affine flows,

        KL = 1/2 [tr(P^-1 Q) + (m_p - m_q)^T P^-1 (m_p - m_q) - D + log |P| - log |Q|]

    and for others what Distrax and TensorFlow Probability have registered. Of a relaxed
    distribution it is that of the discrete one.

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
    q, p = (each.discrete if isinstance(each, RelaxedDistribution) else each for each in (q, p))
    of_q, of_p = _moments(q), _moments(p)
    if of_q is not None and of_p is not None:
        (mean_q, root_q, diagonal_q), (mean_p, root_p, diagonal_p) = of_q, of_p
        if diagonal_q and diagonal_p:
            return _diagonal_kl(mean_q, root_q, mean_p, root_p)
        return _full_kl(
            mean_q, _as_matrix(root_q, diagonal_q), mean_p, _as_matrix(root_p, diagonal_p)
        )
    if isinstance(q, distrax.Transformed) or isinstance(p, distrax.Transformed):
        # Distrax's own rule takes flows of one architecture for equal: see `distributions`.
        raise NotImplementedError(
            f"KL({type(q).__name__} || {type(p).__name__}) has no closed form."
        )
    return q.kl_divergence(p)


def _moments(distribution: distrax.Distribution) -> tuple[Array, Array, bool] | None:
    """(mean, root, whether it is a diagonal) of a normal; None for others.

    The root is standard deviations, or a lower triangular R with covariance R R^T.
    """
    if isinstance(distribution, FlowDistribution):
        base = _moments(distribution.distribution)
        if base is None or not distribution.bijector.is_constant_jacobian:
            return None
        if not base[2] or len(distribution.event_shape) != 1:
            return None
        mean, bijector = distribution.mean(), distribution.bijector
        if isinstance(bijector, Units):
            return mean, base[1] * jnp.abs(_slope(bijector, mean)), True
        if _is_triangular(bijector):
            outer, linear = bijector.bijectors
            # A covariance and its Cholesky factor would lose half of the digits.
            slope = _slope(outer, mean)[..., :, None]
            return mean, slope * linear.matrix * base[1][..., None, :], False
        return mean, jnp.linalg.cholesky(distribution.covariance()), False
    inner = distribution
    while isinstance(inner, distrax.Independent):
        inner = inner.distribution
    if isinstance(inner, distrax.Normal) and distribution.event_shape:
        # Coordinates of any event shape, in a row; a scale may be one for all of them.
        scale = jnp.broadcast_to(inner.scale, inner.batch_shape)
        shape = (*distribution.batch_shape, -1)
        return inner.loc.reshape(shape), scale.reshape(shape), True
    return None


def _is_triangular(bijector: distrax.Bijector) -> bool:
    """Whether this is an elementwise map after a lower triangular matrix."""
    if not isinstance(bijector, distrax.Chain) or len(bijector.bijectors) != 2:
        return False
    outer, linear = bijector.bijectors
    return (
        isinstance(outer, distrax.Block | Units)
        and isinstance(linear, distrax.TriangularLinear)
        and linear.is_lower
    )


def _slope(bijector: distrax.Bijector, mean: Array) -> Array:
    """The slope of an elementwise affine map."""
    zero = mean * 0
    return bijector.forward(zero + 1) - bijector.forward(zero)


def _as_matrix(root: Array, diagonal: bool) -> Array:
    return root[..., None] * jnp.eye(root.shape[-1], dtype=root.dtype) if diagonal else root


def _diagonal_kl(mean_q: Array, root_q: Array, mean_p: Array, root_p: Array) -> Array:
    mean_q, root_q, mean_p, root_p = jnp.broadcast_arrays(mean_q, root_q, mean_p, root_p)
    ratio = root_q / root_p
    terms = ratio**2 + ((mean_p - mean_q) / root_p) ** 2 - 1 - 2 * jnp.log(ratio)
    return 0.5 * jnp.sum(terms, -1)


def _full_kl(mean_q: Array, root_q: Array, mean_p: Array, root_p: Array) -> Array:
    size = root_q.shape[-1]
    batch = jnp.broadcast_shapes(root_q.shape[:-2], root_p.shape[:-2])
    matrix = (*batch, size, size)
    root_q, root_p = jnp.broadcast_to(root_q, matrix), jnp.broadcast_to(root_p, matrix)
    shift = jnp.broadcast_to(mean_p - mean_q, matrix[:-1])[..., None]
    solve = jax.scipy.linalg.solve_triangular
    trace = jnp.sum(solve(root_p, root_q, lower=True) ** 2, (-1, -2))
    square = jnp.sum(solve(root_p, shift, lower=True) ** 2, (-1, -2))
    return 0.5 * (trace + square - size) + _log_diagonal(root_p) - _log_diagonal(root_q)


def _log_diagonal(root: Array) -> Array:
    return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(root, axis1=-2, axis2=-1))), -1)
