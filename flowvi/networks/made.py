"""MADE as a Haiku module."""

from collections.abc import Sequence

import haiku as hk
import jax

from flowvi import masked
from flowvi.networks.network import Activation, Array
from flowvi.params import PyTree


class MADE(hk.Module):
    """A masked autoregressive network as a Haiku module, over `flowvi.masked`.

    `made(x, context)` maps x of shape [..., D] to parameters of shape [..., D, P], where those of a
    coordinate depend on the coordinates before it.

    Args:
        event_size: D, at least 1.
        hidden_sizes: widths of the hidden layers; any number of them, also none.
        num_params: P, the number of parameters of one coordinate.
        context_size: the length of the context vector, or None.
        activation: a name such as "silu", or a function.
        order: the input order; order[0] is the coordinate that depends on none.
        name: the module's name.

    Source: Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution
    Estimation", 2015.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> def forward(x):
        ...     made = fv.MADE(event_size=3, hidden_sizes=[16], num_params=2)
        ...     return fv.IAF(made.bind()).forward(x)
        >>> network = hk.without_apply_rng(hk.transform(forward))
        >>> params = network.init(jax.random.key(0), jnp.zeros(3))
        >>> network.apply(params, jnp.ones((5, 3))).shape
        (5, 3)
    """

    def __init__(
        self,
        event_size: int,
        hidden_sizes: Sequence[int],
        num_params: int,
        *,
        context_size: int | None = None,
        activation: Activation = "silu",
        order: Sequence[int] | None = None,
        name: str | None = None,
    ):
        # Haiku must not meet a half-built module, so the description is checked first.
        options: PyTree = {"context_size": context_size, "activation": activation}
        options["order"] = None if order is None else tuple(order)
        network = masked.MaskedNetwork(event_size, tuple(hidden_sizes), num_params, **options)
        super().__init__(name=name)
        self._network = network

    def bind(self, context: Array | None = None) -> masked.Conditioner:
        """The conditioner x -> theta of a bijector, with its weights in sight, at this context."""
        return self._network.bind(_get_parameters(self._network), context)

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        return self.bind(context)(x)


def _get_parameters(network: masked.MaskedNetwork) -> PyTree:
    """The network's parameter tree, each array a Haiku parameter named by its place in the tree."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = []
    for index, (path, leaf) in enumerate(paths):
        # A key may be drawn only where the parameter is new: not inside of a loop, for example.
        def fresh(shape: Sequence[int], dtype: PyTree, index: int = index) -> Array:
            return jax.tree.leaves(network.init(hk.next_rng_key()))[index]

        name = jax.tree_util.keystr(path, simple=True, separator="_")
        leaves.append(hk.get_parameter(name, leaf.shape, leaf.dtype, init=fresh))
    return jax.tree.unflatten(structure, leaves)
