"""Mixtures that no optimizer moves, and mixtures of families."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from distrax import Distribution
from jax.typing import ArrayLike

from flowvi.compiling import compiled
from flowvi.distributions.normals import NormalMixture
from flowvi.families.family import (
    Array,
    Context,
    Family,
    Params,
    SampleShape,
    Shape,
    as_array,
    as_shape,
    bare,
    bare_init,
)
from flowvi.params import Fixed, Origin
from flowvi.supports import Support


@dataclasses.dataclass(frozen=True, repr=False)
class KnownMixture(Family):
    """A mixture of normals whose locations, weights and factors are `Fixed` parameters.

    Those of a new one are of standard normals. `shared` is for a kernel estimate: one bandwidth for
    all coordinates and components.
    """

    event_size: int
    num_components: int
    shared: bool = False
    context_shape: None = None
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        name = "kernel estimate" if self.shared else "mixture of normals"
        return f"<{name}, {self.num_components} components>"

    @property
    def event_shape(self) -> Shape:
        return (self.event_size,)

    def init(self, key: Array) -> Params:
        del key
        count, size = self.num_components, self.event_size
        inverse = jnp.ones(1) if self.shared else jnp.tile(jnp.eye(size), (count, 1, 1))
        weights = jnp.full(count, -jnp.log(float(count)))
        return {
            "known": Fixed(
                {"loc": jnp.zeros((count, size)), "log_weights": weights, "inverse": inverse}
            )
        }

    def distribution(self, params: Params, context: Context = None) -> Distribution:
        self.check_context(context)
        return NormalMixture(**params["known"].value)


@dataclasses.dataclass(frozen=True, repr=False)
class KnownConditional(Family):
    """What a mixture of normals over (x, context) says of x at a context; nothing of it is moved.

    With c_k, R_k and w_k the location, the factor and the weight of the context's part,

        p(x | c) = sum_k w_k(c) N(x; loc_k + (c - c_k) B_k, (P_k P_k^T)^-1)
        w_k(c) proportional to w_k |det R_k| phi((c - c_k) R_k)
    """

    event_size: int
    context_size: int
    num_components: int
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        return f"<mixture of linear regressions, {self.num_components} components>"

    @property
    def event_shape(self) -> Shape:
        return (self.event_size,)

    @property
    def context_shape(self) -> Shape:
        return (self.context_size,)

    def init(self, key: Array) -> Params:
        count, size, other = self.num_components, self.event_size, self.context_size
        arrays = {
            "loc": jnp.zeros((count, size)),
            "log_weights": jnp.full(count, -jnp.log(float(count))),
            "inverse": jnp.tile(jnp.eye(size), (count, 1, 1)),
            "slope": jnp.zeros((count, other, size)),
            "context_loc": jnp.zeros((count, other)),
            "context_inverse": jnp.tile(jnp.eye(other), (count, 1, 1)),
        }
        return {"known": Fixed(arrays)}

    def distribution(self, params: Params, context: Context = None) -> Distribution:
        self.check_context(context)
        known = params["known"].value
        c = jnp.asarray(context, known["loc"].dtype)[..., None, :] - known["context_loc"]
        y = jnp.einsum("...kc,kce->...ke", c, known["context_inverse"])
        scale = jnp.diagonal(known["context_inverse"], axis1=-2, axis2=-1)
        logits = known["log_weights"] + jnp.log(scale).sum(-1) - 0.5 * jnp.sum(y * y, -1)
        loc = known["loc"] + jnp.einsum("...kc,kcd->...kd", c, known["slope"])
        return NormalMixture(loc, jax.nn.log_softmax(logits), known["inverse"])


class StackedDistribution(Distribution):
    """The mixture of some distributions over the same events, of one batch shape."""

    def __init__(self, components: Sequence[Distribution], log_weights: Array):
        super().__init__()
        self._components, self._log_weights = list(components), log_weights

    @property
    def event_shape(self) -> Shape:
        return self._components[0].event_shape

    @property
    def batch_shape(self) -> Shape:
        return jnp.broadcast_shapes(*(each.batch_shape for each in self._components))

    @property
    def dtype(self) -> jnp.dtype:
        return self._components[0].dtype

    def log_prob(self, value: Array) -> Array:
        return _mixed(self._log_weights, [each.log_prob(value) for each in self._components])

    def _sample_n(self, key: Array, n: int) -> Array:
        key, *keys = jax.random.split(key, 1 + len(self._components))
        shape = (n, *self.batch_shape)
        draws = []
        for each, its_key in zip(self._components, keys, strict=True):
            missing = self.batch_shape[: len(self.batch_shape) - len(each.batch_shape)]
            draws.append(each.sample(seed=its_key, sample_shape=(n, *missing)))
        choice = jax.random.categorical(key, self._log_weights, shape=shape)
        each = jnp.stack(draws)
        return jnp.take_along_axis(each, _place(choice, each.ndim), 0)[0]


@compiled(0)
def _mixed(log_weights: Array, log_probs: Sequence[Array]) -> Array:
    each = jnp.stack(jnp.broadcast_arrays(*log_probs), -1)
    return jax.nn.logsumexp(log_weights.astype(each.dtype) + each, -1)


def _place(choice: Array, ndim: int) -> Array:
    """Where in draws [M, *shape, *event], of so many axes, those of a choice [*shape] are."""
    return choice.reshape(1, *choice.shape, *[1] * (ndim - 1 - choice.ndim))


@dataclasses.dataclass(frozen=True, repr=False)
class Stacked(Family):
    """A mixture of families with `Fixed` weights.

        p(x | context) = sum_m w_m p_m(x | context)

    Its parameters are {"families": those of each, "log_weights"}. A family that takes no context
    is the same at every one.

    Source: Wolpert, "Stacked Generalization", 1992; Smyth, Wolpert, "Linearly Combining Density
    Estimators via Stacking", 1999.
    """

    families: tuple[Family, ...]
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        return f"stacked({', '.join(map(repr, self.families))})"

    @property
    def event_shape(self) -> Shape:
        return self.families[0].event_shape

    @property
    def context_shape(self) -> Shape | None:
        return self.families[0].context_shape

    @functools.cached_property
    def support(self) -> Support:
        return self.families[0].support

    def init(self, key: Array) -> Params:
        keys = jax.random.split(key, len(self.families))
        each = [bare_init(*pair) for pair in zip(self.families, keys, strict=True)]
        weights = jnp.full(len(each), -jnp.log(float(len(each))))
        return {"families": each, "log_weights": Fixed(weights)}

    def joined(self, members: Sequence[Params], log_weights: ArrayLike) -> Params:
        """The parameters of a mixture of members that are there, with such weights."""
        weights = Fixed(jnp.asarray(log_weights, jnp.result_type(float)))
        each = [bare(params) for params in members]
        return {"origin": Origin(self), "families": each, "log_weights": weights}

    def _each(self, params: Params, context: Context) -> list[tuple[Family, Params, Context]]:
        pairs = zip(self.families, params["families"], strict=True)
        return [(f, p, None if f.context_shape is None else context) for f, p in pairs]

    def distribution(self, params: Params, context: Context = None) -> Distribution:
        self.check_context(context)
        components = [f.distribution(p, c) for f, p, c in self._each(params, context)]
        return StackedDistribution(components, params["log_weights"].value)

    def log_prob(self, params: Params, x: ArrayLike, context: Context = None) -> Array:
        x, context = self._check_data(params, x, context)
        log_probs = [f.log_prob(p, x, c) for f, p, c in self._each(params, context)]
        return _mixed(params["log_weights"].value, log_probs)

    def sample_exactly(
        self, params: Params, key: Array, sample_shape: SampleShape = (), context: Context = None
    ) -> tuple[np.ndarray, np.ndarray]:
        key, *keys = jax.random.split(key, 1 + len(self.families))
        context = None if context is None else as_array("context", context)
        batch_shape = self.check_context(context)
        shape = (*as_shape(sample_shape), *batch_shape)
        draws = []
        for (f, p, c), its_key in zip(self._each(params, context), keys, strict=True):
            own_shape = sample_shape if f.context_shape == self.context_shape else shape
            draws.append(f.sample_exactly(p, its_key, own_shape, c)[0])
        choice = jax.random.categorical(key, params["log_weights"].value, shape=shape)
        each = np.stack(draws)
        x = np.take_along_axis(each, np.asarray(_place(choice, each.ndim)), 0)[0]
        return x, np.asarray(self.log_prob(params, x, context))

    def sample_alike(
        self, params: Params, key: Array, num_samples: int, context: ArrayLike
    ) -> np.ndarray:
        key, *keys = jax.random.split(key, 1 + len(self.families))
        count, draws = len(context), []  # type: ignore[arg-type]
        for (f, p, c), its_key in zip(self._each(params, context), keys, strict=True):
            if c is None:
                its = f.sample_exactly(p, its_key, num_samples)[0][:, None]
                draws.append(np.broadcast_to(its, (num_samples, count, *self.event_shape)))
            else:
                draws.append(f.sample_alike(p, its_key, num_samples, c))
        choice = jax.random.categorical(key, params["log_weights"].value, shape=(num_samples,))
        return np.stack(draws)[np.asarray(choice), np.arange(num_samples)]
