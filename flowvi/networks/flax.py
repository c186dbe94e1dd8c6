"""Networks of Flax, of either kind. Flax is imported where such a network is used, if ever."""

import jax
import jax.numpy as jnp

from flowvi.networks.foreign import ForeignNetwork, parameters_of
from flowvi.networks.network import Array, Pair
from flowvi.params import PyTree


class LinenNetwork(ForeignNetwork):
    """A module of `flax.linen`, hashable. All its collections but "params" are state."""

    def begin(self, key: Array, x: Array) -> Pair:
        variables = dict(self.source.init(key, x, **self.flags(type(self.source).__call__, True)))
        return variables.pop("params", {}), variables

    def call(self, params: PyTree, state: PyTree, x: Array, key: Array | None) -> Pair:
        variables = {"params": params, **state}
        flags = self.flags(type(self.source).__call__, key is not None)
        if key is None:
            return self.source.apply(variables, x, **flags), state
        # A stream of any other name is derived from "params".
        dropout, other = jax.random.split(key)
        rngs = {"dropout": dropout, "params": other}
        return self.source.apply(variables, x, rngs=rngs, mutable=list(state), **flags)


class NNXNetwork(ForeignNetwork):
    """A module of `flax.nnx`. Its variables that are neither parameters nor keys are state."""

    def _split(self, module: PyTree) -> PyTree:
        from flax import nnx

        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    def begin(self, key: Array, x: Array) -> Pair:
        from flax import nnx

        _, params, _, state = self._split(self.source(rngs=nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def call(self, params: PyTree, state: PyTree, x: Array, key: Array | None) -> Pair:
        from flax import nnx

        # Only the structure of this module is of use; its arrays are replaced.
        abstract = nnx.eval_shape(lambda: self.source(rngs=nnx.Rngs(0)))
        graph, like_params, like_rngs, like_state = self._split(abstract)
        nnx.replace_by_pure_dict(like_params, params)
        nnx.replace_by_pure_dict(like_state, state)
        rngs = _reseeded(like_rngs, jax.random.key(0) if key is None else key)
        module = nnx.merge(graph, like_params, rngs, like_state)
        named: dict[str, PyTree] = self.flags(type(module).__call__, key is not None)
        module.eval() if key is None else module.train()
        if key is not None and "rngs" in parameters_of(module.__call__):
            named["rngs"] = nnx.Rngs(jax.random.fold_in(key, 0))
        output = module(x, **named)
        nnx.pop(module, nnx.Intermediate)
        _, _, _, new = self._split(module)
        return output, nnx.to_pure_dict(new)


def _reseeded(rngs: PyTree, key: Array) -> PyTree:
    """Streams of random numbers that depend on `key` alone, each on its own."""
    leaves, structure = jax.tree.flatten(rngs)
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, index)
            leaves[index] = jax.random.split(own, leaf.shape) if leaf.shape else own
        else:
            leaves[index] = jnp.zeros(leaf.shape, leaf.dtype)
    return jax.tree.unflatten(structure, leaves)
