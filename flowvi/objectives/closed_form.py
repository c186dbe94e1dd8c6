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
    """
    q, p = (each.discrete if isinstance(each, RelaxedDistribution) else each for each in (q, p))
    of_q, of_p = _moments(q), _moments(p)
    if of_q is not None and of_p is not None:
        return _normal_kl(*of_q, *of_p)
    if isinstance(q, distrax.Transformed) or isinstance(p, distrax.Transformed):
        # Distrax's own rule takes flows of one architecture for equal: see `distributions`.
        pair = f"{type(q).__name__} || {type(p).__name__}"
        raise NotImplementedError(f"KL({pair}) has no closed form.")
    return q.kl_divergence(p)


def _moments(distribution: distrax.Distribution) -> tuple[Array, Array, bool] | None:
    """(mean, root, whether it is a diagonal) of a normal; None for others.

    The root is standard deviations, or a lower triangular R with covariance R R^T.
    """
    if isinstance(distribution, FlowDistribution):
        base, bijector = _moments(distribution.distribution), distribution.bijector
        if base is None or not bijector.is_constant_jacobian or len(distribution.event_shape) != 1:
            return None
        mean, diagonal = distribution.mean(), base[2]
        if diagonal and isinstance(bijector, Units):
            return mean, base[1] * jnp.abs(_slope(bijector, mean)), True
        links = bijector.bijectors if diagonal and isinstance(bijector, distrax.Chain) else ()
        match links:
            case [distrax.Block() | Units(), distrax.TriangularLinear(is_lower=True)]:
                # A covariance and its Cholesky factor would lose half of the digits.
                slope = _slope(links[0], mean)[..., :, None]
                return mean, slope * links[1].matrix * base[1][..., None, :], False
        return mean, jnp.linalg.cholesky(distribution.covariance()), False
    inner = distribution
    while isinstance(inner, distrax.Independent):
        inner = inner.distribution
    if not (isinstance(inner, distrax.Normal) and distribution.event_shape):
        return None
    # Coordinates of any event shape, in a row; a scale may be one for all of them.
    scale, shape = jnp.broadcast_to(inner.scale, inner.batch_shape), distribution.batch_shape
    return inner.loc.reshape(*shape, -1), scale.reshape(*shape, -1), True


def _slope(bijector: distrax.Bijector, mean: Array) -> Array:
    """The slope of an elementwise affine map."""
    zero = mean * 0
    return bijector.forward(zero + 1) - bijector.forward(zero)


def _normal_kl(
    mean_q: Array, root_q: Array, diagonal_q: bool, mean_p: Array, root_p: Array, diagonal_p: bool
) -> Array:
    if diagonal_q and diagonal_p:
        mean_q, root_q, mean_p, root_p = jnp.broadcast_arrays(mean_q, root_q, mean_p, root_p)
        ratio = root_q / root_p
        terms = ratio**2 + ((mean_p - mean_q) / root_p) ** 2 - 1 - 2 * jnp.log(ratio)
        return 0.5 * jnp.sum(terms, -1)
    size = mean_q.shape[-1]
    unit = jnp.eye(size, dtype=root_q.dtype)
    root_q = root_q[..., None] * unit if diagonal_q else root_q
    root_p = root_p[..., None] * unit if diagonal_p else root_p
    root_q, root_p = jnp.broadcast_arrays(root_q, root_p)
    shift = jnp.broadcast_to(mean_p - mean_q, root_q.shape[:-1])[..., None]
    solve = jax.scipy.linalg.solve_triangular
    squares = (jnp.sum(solve(root_p, each, lower=True) ** 2, (-1, -2)) for each in (root_q, shift))
    diagonals = (jnp.diagonal(root, axis1=-2, axis2=-1) for root in (root_p, root_q))
    log_p, log_q = (jnp.sum(jnp.log(jnp.abs(each)), -1) for each in diagonals)
    return 0.5 * (sum(squares) - size) + log_p - log_q
