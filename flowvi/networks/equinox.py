"""Networks of Equinox, which is imported where such a network is used, if ever."""

import jax
import jax.numpy as jnp

from flowvi.networks.foreign import KEYS, ForeignNetwork, parameters_of
from flowvi.networks.network import Array, Pair
from flowvi.params import PyTree


class EquinoxNetwork(ForeignNetwork):
    """A module of Equinox, mapped over an axis of rows that is called "batch".

    `source` is (key) -> module or (module, state). Inexact arrays are parameters, others state.
    """

    def _split(self, made: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """(parameters, arrays that are none, all else), each with the structure of the whole."""
        import equinox as eqx

        module, *state = made if isinstance(made, tuple) else (made,)
        params, rest = eqx.partition(module, _is_inexact)
        arrays, static = eqx.partition((rest, *state), _is_array)
        return params, arrays, static

    def begin(self, key: Array, x: Array) -> Pair:
        params, arrays, _ = self._split(self.source(key=key))
        return params, arrays

    def call(self, params: PyTree, state: PyTree, x: Array, key: Array | None) -> Pair:
        import equinox as eqx

        # Only the structure of this module is of use; its arrays are replaced.
        made = eqx.filter_eval_shape(self.source, key=jax.random.key(0))
        _, _, static = self._split(made)
        rest, *has_state = eqx.combine(state, static)
        module = eqx.combine(params, rest)
        module = eqx.nn.inference_mode(module, value=key is None)
        named = self.flags(type(module).__call__, key is not None)
        takes_key = KEYS & parameters_of(type(module).__call__).keys()
        keys = None if key is None else jax.random.split(key, x.shape[0])

        def one(x: Array, key: Array | None) -> PyTree:
            return module(x, *has_state, **named, **dict.fromkeys(takes_key, key))

        if not has_state:
            return jax.vmap(one, axis_name="batch")(x, keys), state
        output, new = jax.vmap(one, out_axes=(0, None), axis_name="batch")(x, keys)
        return output, (state[0], eqx.filter(new, _is_array))


def _is_array(leaf: PyTree) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_inexact(leaf: PyTree) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
