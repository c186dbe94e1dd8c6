"""A model as the objectives see it: functions of a batch {"x": rows, "row": their numbers, ...}."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flowvi.families import Family

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """(params, key, z, batch) -> log p(x | z) of shape [K, B], in its training form."""

    family: Family

    #: Whether z may be of shape [K, 1, *latent], for values that all rows share.
    takes_shared: ClassVar[bool] = True

    def __call__(
        self, params: dict[str, Any], key: Array, z: Array, batch: dict[str, Array]
    ) -> Any:
        """See `flowvi.objectives.Joint`."""
        own, x = params["likelihood"], jnp.asarray(batch["x"])
        if z.shape[1] == 1 != len(x):
            # Mapped over rows, what depends on z alone is computed once.
            distribution, new = self.family.train_distribution(own, key, z[:, 0])
            shape = (z.shape[0], *self.family.event_shape)
            of_row = jax.vmap(lambda row: distribution.log_prob(jnp.broadcast_to(row, shape)))
            log_likelihood = of_row(x).T
            return log_likelihood if new is own else (log_likelihood, {"likelihood": new})
        distribution, new = self.family.train_distribution(own, key, z)
        leading = z.shape[: z.ndim - len(self.family.context_shape)]
        x = jnp.broadcast_to(x, leading + self.family.event_shape)
        log_likelihood = distribution.log_prob(x)
        return log_likelihood if new is own else (log_likelihood, {"likelihood": new})


def context_of(batch: dict[str, Array]) -> Array:
    """What the posterior of a batch is conditioned on."""
    return as_float(batch["x"])


def row_of(batch: dict[str, Array]) -> Array:
    """What a posterior without an encoder is conditioned on: the numbers of the rows."""
    return batch["row"]


def weights_of(batch: dict[str, Array]) -> Array:
    """The weights of a batch's rows."""
    return batch["weight"]


def as_float(x: Any) -> Array:
    """Whole numbers as networks take them; others as they are."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))
