"""Maximum likelihood."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi.families import Family
from flowvi.objectives.variational import Output
from flowvi.params import PyTree

Array = jax.Array

#: Rows that a held-out likelihood looks at together, so that its memory does not grow with theirs;
#: so few that a small network stays in one thread, from which the steps after it go on.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood:
    """The mean negative log likelihood of rows, in nats a row, as a loss for `fit`.

        loss = -1/n sum_i log p(x_i | context_i; params)

    A batch is a dict of "x", of shape [n, *event_shape], and, where the family takes a context,
    "context", of shape [n, *context_shape].

    Attributes:
        family: the family.
        training: whether to take the family's training form, with dropout and new `Fixed` leaves.
            The evaluation form goes through the rows in chunks.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> from flowvi.objectives import NegativeLogLikelihood
        >>> loss_fn = NegativeLogLikelihood(fv.standard_normal(2))
        >>> f"{loss_fn({}, jax.random.key(0), {'x': jnp.zeros((10, 2))}):.4f}"
        '1.8379'
    """

    family: Family
    training: bool = True

    def __call__(self, params: PyTree, key: Array, batch: dict[str, Array]) -> Output:
        if not self.training:
            return self._held_out(params, batch)
        distribution, new_params = self.family.train_distribution(params, key, batch.get("context"))
        loss = -jnp.mean(distribution.log_prob(batch["x"]))
        return loss if new_params is params else (loss, {}, new_params)

    def _held_out(self, params: PyTree, batch: dict[str, Array]) -> Array:
        def total(rows: dict[str, Array]) -> Array:
            distribution = self.family.distribution(params, rows.get("context"))
            return jnp.sum(distribution.log_prob(rows["x"]))

        num_rows = batch["x"].shape[0]
        whole = num_rows - num_rows % CHUNK
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, CHUNK, *x.shape[1:]), batch)
        rest = jax.tree.map(lambda x: x[whole:], batch)
        # Neither a loop of no rounds nor a chunk of no rows is worth compiling.
        sums = jnp.sum(jax.lax.map(total, chunks)) if whole else 0.0
        sums += total(rest) if whole < num_rows else 0.0
        return -jnp.asarray(sums) / num_rows
