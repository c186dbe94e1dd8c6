"""The compiled functions of a model beside its evaluation."""

from typing import Any

import jax
import jax.numpy as jnp

from flowvi.compiling import compiled
from flowvi.vae.evaluation import Model, log_likelihood_of

Array = jax.Array
Params = dict[str, Any]
Shape = tuple[int, ...]


@compiled()
def init(vae: Model, key: Array) -> Params:
    """Fresh parameters."""
    keys = jax.random.split(key, 3)
    return {
        "prior": vae.prior.init(keys[0]),
        "likelihood": vae.likelihood.init(keys[1]),
        "posterior": vae.posterior.init(keys[2]),
    }


@compiled()
def log_joint(vae: Model, params: Params, x: Array, z: Array) -> Array:
    """log p(z) + log p(x | z)."""
    batch_shape = jnp.broadcast_shapes(
        x.shape[: x.ndim - len(vae.event_shape)], z.shape[: z.ndim - len(vae.latent_shape)]
    )
    x = jnp.broadcast_to(x, batch_shape + vae.event_shape)
    z = jnp.broadcast_to(z, batch_shape + vae.latent_shape)
    log_prior = vae.prior.distribution(params["prior"]).log_prob(z)
    return log_prior + log_likelihood_of(vae.likelihood, params, x, z)


@compiled(static_argnums=(3, 4))
def sample(vae: Model, params: Params, key: Array, sample_shape: Shape, count: int | None) -> Array:
    """Draws of p(x)."""
    latent_key, key = jax.random.split(key)
    prior = vae.prior.distribution(params["prior"])
    z = prior.sample(seed=latent_key, sample_shape=sample_shape)
    p = vae.likelihood.distribution(params["likelihood"], z)
    if count is None:
        return p.sample(seed=key)
    return jnp.moveaxis(p.sample(seed=key, sample_shape=count), 0, len(sample_shape))


@compiled()
def decode(vae: Model, params: Params, z: Array) -> Array:
    """The mean of p(x | z)."""
    return vae.likelihood.distribution(params["likelihood"], z).mean()


@compiled(static_argnums=(4, 5))
def sample_given(
    vae: Model, params: Params, key: Array, context: Array, sample_shape: Shape, hold: bool
) -> Array:
    """Draws of x' like x, whose posterior has this context."""
    latent_key, key = jax.random.split(key)
    q = vae.posterior.distribution(params["posterior"], context)
    z = q.sample(seed=latent_key, sample_shape=() if hold else sample_shape)
    p = vae.likelihood.distribution(params["likelihood"], z)
    return p.sample(seed=key, sample_shape=sample_shape if hold else ())
