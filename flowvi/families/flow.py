"""A flow as a family: a base family pushed through a map with parameters."""

import dataclasses
import functools
from typing import Protocol

import distrax
import jax
import jax.numpy as jnp

from flowvi.distributions import FlowDistribution
from flowvi.families.family import (
    Array,
    Composed,
    Context,
    Family,
    Params,
    Shape,
    shown,
    shown_shape,
)
from flowvi.supports import Support, real


class Transform(Protocol):
    """The map of a flow, waiting for parameters and a context: hashable, without arrays."""

    @property
    def event_size(self) -> int:
        """D."""

    @property
    def name(self) -> str:
        """What the flow is called in messages."""

    def init(self, key: Array) -> Params:
        """Fresh parameters, at which the map is the identity."""

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        """The map at these parameters, from base to data."""


@dataclasses.dataclass(frozen=True, repr=False)
class StandardNormal(Family):
    """Independent standard normals, without parameters; see `standard_normal`."""

    event_shape: Shape
    context_shape: None = None
    reparameterized: bool = True

    def __repr__(self) -> str:
        return shown("standard_normal", shown_shape(self.event_shape))

    def init(self, key: Array) -> Params:
        del key
        return {}

    def distribution(self, params: Params, context: Context = None) -> distrax.Distribution:
        del params
        self.check_context(context)
        # A MultivariateNormalDiag would leak tracers when it leaves a compiled function.
        normal = distrax.Normal(jnp.zeros(self.event_shape), jnp.ones(self.event_shape))
        return distrax.Independent(normal, len(self.event_shape))


@dataclasses.dataclass(frozen=True, repr=False)
class Flow(Composed):
    """The distribution of y = f(x; context), x from a base family.

        log p(y) = log p_base(f^{-1}(y)) + log |det J f^{-1}(y)|

    Its parameters are {"family": those of the base, "transform"}.

    Attributes:
        base: the family of x.
        transform: the map f, waiting for parameters and context.
        context_size: the length of the context vector, or None.
    """

    base: Family
    transform: Transform
    context_size: int | None = None

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

    def __repr__(self) -> str:
        base = None if isinstance(self.base, StandardNormal) else self.base
        options = {"context_size": self.context_size, "base": base}
        return shown(self.transform.name, self.transform.event_size, **options)

    @property
    def family(self) -> Family:  # type: ignore[override]
        """The base."""
        return self.base

    @property
    def event_shape(self) -> Shape:
        """(D,)."""
        return (self.transform.event_size,)

    @property
    def context_shape(self) -> Shape | None:
        """(context_size,), or None."""
        return None if self.context_size is None else (self.context_size,)

    @functools.cached_property
    def support(self) -> Support:
        """All real numbers: where the base may lie says nothing of its image."""
        return real(self.event_shape)

    def own(self, key: Array) -> dict[str, Params]:
        return {"transform": self.transform.init(key)}

    def features(self, params: Params, context: Context) -> Context:
        self.check_context(context)
        return None if self.base.context_shape is None else context

    def push(
        self, params: Params, inner: distrax.Distribution, context: Context
    ) -> FlowDistribution:
        batch_shape = self.check_context(context)
        bijector = self.transform.bijector(params["transform"], context)
        dtype = jnp.result_type(*jax.tree.leaves(params["transform"]))
        return FlowDistribution(inner, bijector, batch_shape=batch_shape, dtype=dtype)
