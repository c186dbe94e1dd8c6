"""A flow as a family: a base family pushed through a map with parameters."""

import dataclasses
from typing import Any, ClassVar, Protocol

import distrax
import jax
import jax.numpy as jnp

from flowvi.bijectors import Units
from flowvi.distributions import FlowDistribution
from flowvi.families.family import Array, Family, Params
from flowvi.params import Fixed, Origin


class Transform(Protocol):
    """The map of a flow, waiting for parameters and a context: hashable, without arrays."""

    @property
    def event_size(self) -> int:
        """D."""

    def init(self, key: Array) -> Params:
        """Fresh parameters, at which the map is the identity."""

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        """The map at these parameters, from base to data."""


@dataclasses.dataclass(frozen=True)
class Flow(Family):
    """The distribution of y = f(x; context), x from a base family.

        log p(y) = log p_base(f^{-1}(y)) + log |det J f^{-1}(y)|

    Its parameters are a dict: "base" and "transform", and where the flow was placed in the units of
    data, "units" and "context_units" as `Fixed` leaves.

    Attributes:
        base: the family of x.
        transform: the map f, waiting for parameters and context.
        context_size: the length of the context vector, or None.
    """

    base: Family
    transform: Transform
    context_size: int | None = None

    has_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.base.event_shape != self.event_shape:
            raise ValueError(
                f"`base` must have event shape {self.event_shape}, that of the flow; got "
                f"{self.base.event_shape} of {self.base!r}."
            )
        if self.base.context_shape not in (None, self.context_shape):
            raise ValueError(
                f"`base` must take no context or that of the flow, {self.context_shape}; got "
                f"context shape {self.base.context_shape} of {self.base!r}."
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.transform.event_size,)

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """(context_size,), or None."""
        return None if self.context_size is None else (self.context_size,)

    @property
    def reparameterized(self) -> bool:
        """Whether the base is: the map carries gradients always."""
        return self.base.reparameterized

    def init(self, key: Array) -> Params:
        """{"base", "transform", "origin"}; the map starts as the identity."""
        base_key, transform_key = jax.random.split(key)
        return {
            "base": self.base.init(base_key),
            "transform": self.transform.init(transform_key),
            "origin": Origin(self),
        }

    def with_units(self, params: Params, units: Any, context_units: Any = None) -> Params:
        """See `Family.with_units`."""
        params = {**params, "units": Fixed(units)}
        return (
            params if context_units is None else {**params, "context_units": Fixed(context_units)}
        )

    def distribution(self, params: Params, context: Array | None = None) -> FlowDistribution:
        """See `Family.distribution`."""
        self.check_context(context)
        context = self._standardised(params, context)
        base = self.base.distribution(params["base"], self._base_context(context))
        return self._pushed(params, base, context)

    def train_distribution(
        self, params: Params, key: Array, context: Array | None = None
    ) -> tuple[FlowDistribution, Params]:
        """See `Family.train_distribution`; the base is in its training form."""
        self.check_context(context)
        context = self._standardised(params, context)
        own = params["base"]
        base, new = self.base.train_distribution(own, key, self._base_context(context))
        flow = self._pushed(params, base, context)
        return flow, params if new is own else {**params, "base": new}

    def _standardised(self, params: Params, context: Array | None) -> Array | None:
        if context is None or "context_units" not in params:
            return context
        units = params["context_units"].value
        return (context - units["shift"]) / units["scale"]

    def _base_context(self, context: Array | None) -> Array | None:
        return None if self.base.context_shape is None else context

    def _pushed(
        self, params: Params, base: distrax.Distribution, context: Array | None
    ) -> FlowDistribution:
        """The distribution of f(x) for x from `base`."""
        batch_shape = self.check_context(context)
        bijector = self.transform.bijector(params["transform"], context)
        if "units" in params:
            bijector = distrax.Chain([Units(**params["units"].value), bijector])
        dtype = jnp.result_type(*jax.tree.leaves(params["transform"]))
        return FlowDistribution(base, bijector, batch_shape=batch_shape, dtype=dtype)
