"""The block neural autoregressive flow."""

import dataclasses
import itertools
from collections.abc import Sequence

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.bijectors import Permutation
from flowvi.bijectors.block import BlockAutoregressive
from flowvi.families.family import Array, Family, Params, Shape
from flowvi.families.flow import Flow
from flowvi.families.flows import Numbered, Order, flow_of

#: The logarithm of the weight that a new network has beside the identity.
START = -4.0


@dataclasses.dataclass(frozen=True)
class BlockLayer:
    """`BlockAutoregressive`, turned round where densities come first, and a reversal."""

    event_size: int
    hidden_sizes: Shape
    density_first: bool
    context_size: int | None
    name = "bnaf"

    @property
    def permutation(self) -> Order | None:
        return tuple(range(self.event_size))[::-1] if self.event_size > 1 else None

    def init(self, key: Array) -> Params:
        size, count = self.event_size, (1, *self.hidden_sizes, 1)
        keys = jax.random.split(key, 2 * len(count))
        weights, biases = [], []
        for index, (below, above) in enumerate(itertools.pairwise(count[:-1])):
            weights.append(jax.random.normal(keys[2 * index], (size, above, size, below)))
            biases.append(jax.random.normal(keys[2 * index + 1], (size, above)))
        own = jnp.eye(size)[:, None, :, None]
        weights.append(jnp.broadcast_to(START * own, (size, 1, size, count[-2])))
        biases.append(jnp.zeros((size, 1)))
        params = {"weights": weights, "biases": biases, "log_scale": jnp.zeros(size)}
        if self.context_size is not None:
            shape = (self.context_size, size, count[1])
            params["context"] = jax.random.normal(keys[-1], shape)
        return params

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        params, _ = numbered
        first, *biases = params["biases"]
        if context is not None and self.context_size is not None:
            scaled = context * self.context_size**-0.5
            first = first + jnp.tensordot(scaled, params["context"], 1)
        block = BlockAutoregressive(params["weights"], [first, *biases], params["log_scale"])
        bijector = distrax.Inverse(block) if self.density_first else block
        if self.permutation is None:
            return bijector
        return distrax.Chain([Permutation(self.permutation), bijector])


def bnaf(
    event_size: int,
    *,
    num_layers: int = 2,
    hidden_sizes: Sequence[int] = (8, 8),
    density_first: bool = True,
    context_size: int | None = None,
    base: Family | None = None,
) -> Flow:
    """Block neural autoregressive flow: each layer is one network of increasing blocks.

        y_d = exp(s_d) x_d + f_d(x_1, ..., x_d),   f_d increasing in x_d

    One direction is a pass of a network, the other a root for each coordinate. A new flow is not
    quite the identity: its networks count by exp(-4).

    Args:
        event_size: D, at least 1.
        num_layers: the number of layers; the order of coordinates turns round between them.
        hidden_sizes: units of one coordinate in each hidden layer, of which there is at least one.
        density_first: whether densities of data are the direction of one pass; else samples are.
        context_size: the length of the context vector, or None.
        base: the family of the noise, as of `fv.maf`.

    Raises:
        ValueError: if a size is not positive, or there is no hidden layer.

    Source: De Cao, Aziz, Titov, "Block Neural Autoregressive Flow", 2019.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.bnaf(2, num_layers=1, hidden_sizes=[4])
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 5).shape
        (5, 2)
    """
    size = checks.positive_int("event_size", event_size)
    sizes = checks.sizes("hidden_sizes", hidden_sizes)
    checks.require(sizes, "`hidden_sizes` must hold at least one size", sizes)
    context_size = checks.optional_int("context_size", context_size)
    layer = BlockLayer(size, sizes, density_first, context_size)
    return flow_of(layer, num_layers, context_size, base)
