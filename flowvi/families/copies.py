"""Mixtures of many members of one family."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from distrax import Distribution
from jax.typing import ArrayLike

from flowvi.families.family import Array, Context, Family, Params, Shape, bare, bare_init
from flowvi.params import Fixed, Origin
from flowvi.supports import Support


class MixtureOfCopies(Distribution):
    """The mixture of one family at several parameters; see `Copies`."""

    def __init__(self, family: Family, params: Params, log_weights: Array):
        super().__init__()
        self._family, self._params, self._log_weights = family, params, log_weights

    @property
    def event_shape(self) -> Shape:
        return self._family.event_shape

    @property
    def batch_shape(self) -> Shape:
        return ()

    @property
    def dtype(self) -> jnp.dtype:
        return self._log_weights.dtype

    def log_prob_each(self, value: Array) -> Array:
        """log w_k + log p_k of shape [..., K], at values of shape [..., *event]."""
        each = jax.vmap(lambda p: self._family.distribution(p).log_prob(value))(self._params)
        return jnp.moveaxis(each, 0, -1) + self._log_weights

    def log_prob(self, value: Array) -> Array:
        return jax.nn.logsumexp(self.log_prob_each(value), axis=-1)

    def _sample_n(self, key: Array, n: int) -> Array:
        choice_key, key = jax.random.split(key)
        choice = jax.random.categorical(choice_key, self._log_weights, shape=(n,))
        keys = jax.random.split(key, len(self._log_weights))
        draw = jax.vmap(lambda p, k: self._family.distribution(p).sample(seed=k, sample_shape=n))
        return draw(self._params, keys)[choice, jnp.arange(n)]


@dataclasses.dataclass(frozen=True, repr=False)
class Copies(Family):
    """A mixture of K members of one family, with `Fixed` weights.

        p(x) = sum_k w_k p(x; params_k)

    Its parameters are {"copies": those of the members, stacked along a first axis, "log_weights"}.
    """

    family: Family
    count: int
    context_shape: None = None
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        return f"mixture of {self.count} {self.family!r}"

    @property
    def event_shape(self) -> Shape:
        return self.family.event_shape

    @functools.cached_property
    def support(self) -> Support:
        return self.family.support

    def init(self, key: Array) -> Params:
        keys = jax.random.split(key, self.count)
        weights = Fixed(jnp.full(self.count, -jnp.log(float(self.count))))
        return {
            "copies": jax.vmap(functools.partial(bare_init, self.family))(keys),
            "log_weights": weights,
        }

    def joined(self, members: Sequence[Params], log_weights: ArrayLike) -> Params:
        """The parameters of a mixture of members that are there, with such weights."""
        weights = Fixed(jnp.asarray(log_weights, jnp.result_type(float)))
        copies = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(bare, members))
        return {"origin": Origin(self), "copies": copies, "log_weights": weights}

    def distribution(self, params: Params, context: Context = None) -> Distribution:
        self.check_context(context)
        return MixtureOfCopies(self.family, params["copies"], params["log_weights"].value)
