"""Mixtures of normal distributions."""

import dataclasses
from typing import Literal

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.contexts import unconditional
from flowvi.families.family import Array, Family, Params, Shape, shown
from flowvi.families.observations import LocationScale, gaussian
from flowvi.families.parametric import Parametric


class MixtureDistribution(distrax.MixtureSameFamily):
    """A mixture whose draws say which part of them is a choice; see `flowvi.distributions`."""

    def draw(self, key: Array, sample_shape: Shape, reparameterized: bool) -> tuple[Array, Array]:
        """A reparameterised point of a component, and the log probability of choosing that."""
        choice_key, key = jax.random.split(key)
        choice = self.mixture_distribution.sample(seed=choice_key, sample_shape=sample_shape)
        z = self.components_distribution.sample(seed=key, sample_shape=sample_shape)
        places = choice.reshape(choice.shape + (1,) * (z.ndim - choice.ndim))
        z = jnp.take_along_axis(z, places, axis=choice.ndim).squeeze(choice.ndim)
        return z, self.mixture_distribution.log_prob(choice)

    def draw_each(
        self, key: Array, sample_shape: Shape, reparameterized: bool
    ) -> tuple[Array, Array]:
        """A reparameterised point of each component, and the log weights."""
        z = self.components_distribution.sample(seed=key, sample_shape=sample_shape)
        log_weights = jax.nn.log_softmax(self.mixture_distribution.logits)
        axis = len(sample_shape) + len(self.batch_shape)
        log_weights = jnp.broadcast_to(log_weights, z.shape[: axis + 1])
        return jnp.moveaxis(z, axis, 0), jnp.moveaxis(log_weights, axis, 0)

    def num_choices(self, reparameterized: bool) -> int:
        return self.mixture_distribution.num_categories

    def support_size(self) -> None:
        """None: a mixture of densities is not discrete."""


@dataclasses.dataclass(frozen=True, repr=False)
class MixtureFamily(Parametric):
    """A mixture of normal distributions, of a context; see `mixture`."""

    component: LocationScale
    num_components: int
    #: A draw picks its component, and through that choice no gradient reaches the weights.
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        scale = None if self.component.scale == "predicted" else self.component.scale
        options = {"scale": scale, "components": "predicted"}
        return shown("mixture", self.event_shape, self.num_components, **options)

    @property
    def event_shape(self) -> Shape:
        return self.component.event_shape

    @property
    def arguments(self) -> dict[str, Shape]:
        count = self.num_components
        each = {name: (count, *shape) for name, shape in self.component.arguments.items()}
        return {"logits": (count,), **each}

    def initial_arguments(self, key: Array) -> dict[str, Array]:
        """Equal weights, unit scales, standard normal locations."""
        initial = super().initial_arguments(key)
        return {**initial, "loc": jax.random.normal(key, self.arguments["loc"])}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        each = {name: arguments[name] for name in self.component.arguments}
        weights = distrax.Categorical(arguments["logits"])
        return MixtureDistribution(weights, self.component.build({}, each))


def mixture(
    event_shape: int | Shape,
    num_components: int,
    *,
    scale: Literal["predicted", "full"] = "predicted",
    components: Literal["learned", "predicted"] = "learned",
) -> Family:
    """A mixture of normal distributions: a prior, a posterior or the base of a flow, with modes.

        p(x) = sum_k w_k N(x; loc_k, scale_k)

    The draws carry no gradient to the weights, so `reparameterized` is False. As a prior it is
    learnt through its density. As a posterior its choice of a component is left to
    `fv.objectives.ScoreFunction`, which moves the points with the component they are of; or to
    `fv.objectives.Enumeration`, which sums over the components.

    Args:
        event_shape: the shape of an event, or its size.
        num_components: the number of normal distributions, K.
        scale: "predicted" for independent coordinates, "full" for any covariance of vectors, as in
            `gaussian`.
        components: where weights, locations and scales come from: "learned", they are parameters
            of the family; or "predicted", they are the context, a dict of "logits" of shape [K] and
            of the arguments of `gaussian` with a first axis K; or one array with one after the
            other.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.mixture(2, 10)
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 5).shape
        (5, 2)
        >>> fv.mixture(2, 3, components="predicted").context_shape  # 3 + 3 x 2 + 3 x 2
        (15,)
    """
    if scale not in ("predicted", "full"):
        raise ValueError(f'`scale` must be "predicted" or "full"; got {scale!r}.')
    if components not in ("predicted", "learned"):
        raise ValueError(f'`components` must be "predicted" or "learned"; got {components!r}.')
    count = checks.positive_int("num_components", num_components)
    family = MixtureFamily(gaussian(event_shape, scale=scale), count)
    return unconditional(family) if components == "learned" else family
