"""What a loss makes of a batch: the contexts of families, and log likelihoods in training form."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from flowvi.families import Labelled
from flowvi.objectives.variational import Batch, DensityAndState, Params
from flowvi.params import Array
from flowvi.vae.families import Families


@dataclasses.dataclass(frozen=True)
class Seen:
    """batch -> the context of one of a model's families."""

    vae: Families
    name: str

    def __call__(self, batch: Batch) -> Array | None:
        return self.vae.seen(self.name, batch)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """(params, key, z, batch) -> log p(x | z) of shape [K, B], in its training form."""

    vae: Families

    @property
    def takes_shared(self) -> bool:
        """Whether z may be of shape [K, 1, *latent], for values that all rows share."""
        return "context" not in self.vae.parts["likelihood"]

    def __call__(self, params: Params, key: Array, z: Array, batch: Batch) -> DensityAndState:
        family, own, x = self.vae.likelihood, params["likelihood"], jnp.asarray(batch["x"])
        shared = z.shape[1] == 1 != len(x)
        context = self.vae.seen("likelihood", {**batch, "z": z[:, 0] if shared else z})
        p, new = family.train_distribution(own, key, context)
        if shared:
            # Mapped over rows, what depends on z alone is computed once.
            shape = (z.shape[0], *family.event_shape)
            log_prob = jax.vmap(lambda row: p.log_prob(jnp.broadcast_to(row, shape)))(x).T
        else:
            leading = z.shape[: z.ndim - len(self.vae.latent_shape)]
            log_prob = p.log_prob(jnp.broadcast_to(x, leading + family.event_shape))
        return log_prob, {} if new is own else {"likelihood": new}


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A log likelihood, and log q(y | x) of the rows whose label is known, as `VAE.loss` says."""

    log_likelihood: Likelihood
    weight: float

    @property
    def takes_shared(self) -> bool:
        """As of the log likelihood."""
        return self.log_likelihood.takes_shared

    def __call__(self, params: Params, key: Array, z: Array, batch: Batch) -> DensityAndState:
        key, label_key = jax.random.split(key)
        terms, new = self.log_likelihood(params, key, z, batch)
        vae = self.log_likelihood.vae
        classes = cast(Labelled, vae.posterior)
        context = vae.seen("posterior", batch)
        log_q, is_known = classes.label_log_prob(params["posterior"], label_key, context)
        share = len(log_q) / jnp.maximum(jnp.sum(is_known), 1)
        return terms + self.weight * share * log_q, new


def weights_of(batch: Batch) -> Array:
    """The weights of a batch's rows."""
    return batch["weight"]
