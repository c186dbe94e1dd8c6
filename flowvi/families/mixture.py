"""Mixtures of normal distributions."""

import dataclasses
from typing import Any

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Family, Params, Shape
from flowvi.families.location_scale import gaussian
from flowvi.families.parametric import Parametric
from flowvi.params import Origin


@dataclasses.dataclass(frozen=True)
class Mixture(Family):
    """A mixture of normal distributions with parameters of its own; see `mixture`."""

    component: Parametric
    num_components: int
    context_shape: None = dataclasses.field(default=None, init=False)
    #: A draw picks its component, and through that choice no gradient reaches the weights.
    reparameterized: bool = dataclasses.field(default=False, init=False)

    @property
    def event_shape(self) -> Shape:
        """That of a component."""
        return self.component.event_shape

    def init(self, key: Array) -> Params:
        """{"logits", "components", "origin"}: equal weights, unit scales, standard normal means."""
        count = self.num_components
        shapes = self.component.arguments
        components = {name: jnp.zeros((count, *shape)) for name, shape in shapes.items()}
        components["loc"] = jax.random.normal(key, components["loc"].shape)
        return {"logits": jnp.zeros(count), "components": components, "origin": Origin(self)}

    def distribution(self, params: Params, context: Array | None = None) -> distrax.Distribution:
        """See `Family.distribution`."""
        self.check_context(context)
        return distrax.MixtureSameFamily(
            distrax.Categorical(params["logits"]),
            self.component.build({}, params["components"]),
        )


def mixture(event_shape: Any, num_components: int, *, scale: str = "predicted") -> Mixture:
    """A mixture of normal distributions: a prior, or the base of a flow, with several modes.

        p(x) = sum_k w_k N(x; loc_k, scale_k)

    Weights, locations and scales are its parameters. The draws carry no gradient to the weights, so
    `reparameterized` is False: learn it through its density, as a prior is learnt.

    Args:
        event_shape: the shape of an event, or its size.
        num_components: the number of normal distributions.
        scale: "predicted" for independent coordinates, "full" for any covariance of vectors, as in
            `gaussian`.

    Raises:
        ValueError, TypeError: if an argument is not of this kind.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.mixture(2, 10)
        >>> params = family.init(jax.random.key(0))
        >>> family.sample(params, jax.random.key(1), 5).shape
        (5, 2)
    """
    if scale not in ("predicted", "full"):
        raise ValueError(f'`scale` must be "predicted" or "full"; got {scale!r}.')
    component = gaussian(event_shape, scale=scale)
    return Mixture(component, checks.positive_int("num_components", num_components))
