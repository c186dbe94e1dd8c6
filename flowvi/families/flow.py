"""A flow as a family: a base family pushed through a map with parameters; and the normals."""

import dataclasses
import functools
from typing import Protocol

import distrax
import jax
import jax.numpy as jnp
from distrax import Distribution

from flowvi import checks
from flowvi.bijectors import Units
from flowvi.checks import require
from flowvi.distributions import FlowDistribution
from flowvi.families.family import Array, Composed, Context, Family, Params, Shape, Trained, shown
from flowvi.families.parametric import positive
from flowvi.params import is_key
from flowvi.supports import Interval, Support


class Transform(Protocol):
    """The map of a flow from base to data: hashable, the identity at fresh parameters.

    One whose training form is random has a method `randomized`, from parameters and a key to those
    of that form.
    """

    @property
    def event_size(self) -> int: ...
    @property
    def name(self) -> str: ...
    def init(self, key: Array) -> Params: ...
    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector: ...


@dataclasses.dataclass(frozen=True, repr=False)
class Flow(Composed):
    """The distribution of y = f(x; context), x from a base family.

        log p(y) = log p_base(f^{-1}(y)) + log |det J f^{-1}(y)|

    Its parameters are {"family": those of the base, "transform"}.
    """

    base: Family
    transform: Transform
    context_size: int | None = None

    def __post_init__(self) -> None:
        event, taken = self.base.event_shape, self.base.context_shape
        rule = f"`base` must have event shape {self.event_shape}, that of the flow"
        require(event == self.event_shape, rule, f"{event} of {self.base!r}", say=str)
        rule = f"`base` must take no context or that of the flow, {self.context_shape}"
        got = f"context shape {taken} of {self.base!r}"
        require(taken in (None, self.context_shape), rule, got, say=str)

    def __repr__(self) -> str:
        base = None if isinstance(self.base, StandardNormal) else self.base
        options = {"context_size": self.context_size, "base": base}
        return shown(self.transform.name, self.transform.event_size, **options)

    @property
    def family(self) -> Family:  # type: ignore[override]
        return self.base

    @property
    def event_shape(self) -> Shape:
        return (self.transform.event_size,)

    @property
    def context_shape(self) -> Shape | None:
        return None if self.context_size is None else (self.context_size,)

    @functools.cached_property
    def support(self) -> Support:
        """All real numbers: where the base may lie says nothing of its image."""
        return Interval(self.event_shape)

    def own(self, key: Array) -> dict[str, Params]:
        return {"transform": self.transform.init(key)}

    def features(self, params: Params, context: Context) -> Context:
        self.check_context(context)
        return None if self.base.context_shape is None else context

    def push(self, params: Params, inner: Distribution, context: Context) -> FlowDistribution:
        batch_shape = self.check_context(context)
        bijector = self.transform.bijector(params["transform"], context)
        leaves = [leaf for leaf in jax.tree.leaves(params["transform"]) if not is_key(leaf)]
        dtype = jnp.result_type(*leaves)
        return FlowDistribution(inner, bijector, batch_shape=batch_shape, dtype=dtype)

    def train_distribution(self, params: Params, key: Array, context: Context = None) -> Trained:
        randomized = getattr(self.transform, "randomized", None)
        if randomized is None:
            return super().train_distribution(params, key, context)
        inner_key, own_key = jax.random.split(key)
        trained, new = super().train_distribution(params, inner_key, context)
        own = {"transform": randomized(params["transform"], own_key)}
        return self.push(own, trained.distribution, context), new


@dataclasses.dataclass(frozen=True, repr=False)
class StandardNormal(Family):
    """Independent standard normals, without parameters; see `standard_normal`."""

    event_shape: Shape
    context_shape: None = None
    reparameterized: bool = True

    def __repr__(self) -> str:
        return shown("standard_normal", self.event_shape)

    def init(self, key: Array) -> Params:
        return {}

    def distribution(self, params: Params, context: Context = None) -> Distribution:
        self.check_context(context)
        # A MultivariateNormalDiag would leak tracers when it leaves a compiled function.
        normal = distrax.Normal(jnp.zeros(self.event_shape), jnp.ones(self.event_shape))
        return distrax.Independent(normal, len(self.event_shape))


@dataclasses.dataclass(frozen=True)
class Linear:
    """The map y = loc + L x: L is lower triangular where it is full, else diagonal."""

    event_size: int
    full: bool

    @property
    def name(self) -> str:
        return "full_rank" if self.full else "mean_field"

    def init(self, key: Array) -> Params:
        size = self.event_size
        name, shape = ("raw_factor", (size, size)) if self.full else ("raw_scale", (size,))
        return {"loc": jnp.zeros(size), name: jnp.zeros(shape)}

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        if not self.full:
            return Units(params["loc"], positive(params["raw_scale"]))
        raw = params["raw_factor"]
        factor = jnp.tril(raw, -1) + jnp.diag(positive(jnp.diag(raw)))
        shift = distrax.Block(distrax.Shift(params["loc"]), 1)
        return distrax.Chain([shift, distrax.TriangularLinear(factor, is_lower=True)])


def standard_normal(event_shape: int | Shape) -> StandardNormal:
    """Independent standard normals over events of a shape, or a size; without parameters.

    Args:
        event_shape: the shape of an event, or its size.

    Raises:
        ValueError: if a size is not positive.

    Source: Gauss, "Theoria motus corporum coelestium", 1809.

    Example:
        >>> import jax.numpy as jnp, flowvi as fv
        >>> round(float(fv.standard_normal(1).log_prob({}, jnp.zeros(1))), 4)
        -0.9189
    """
    return StandardNormal(checks.shape("event_shape", event_shape))


def mean_field(event_size: int) -> Flow:
    """A normal over D independent coordinates: y = loc + scale x.

    Args:
        event_size: D, the number of coordinates.

    Raises:
        ValueError: if it is not positive.

    Source: Jordan, Ghahramani, Jaakkola, Saul, "An Introduction to Variational Methods for
    Graphical Models", 1999.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.mean_field(2)
        >>> family.log_prob(family.init(jax.random.key(0)), jnp.zeros((5, 2))).shape
        (5,)
    """
    size = checks.positive_int("event_size", event_size)
    return Flow(standard_normal(size), Linear(size, full=False))


def full_rank(event_size: int) -> Flow:
    """A normal over D coordinates with any covariance: y = loc + L x, L lower triangular.

    Args:
        event_size: D, the number of coordinates.

    Raises:
        ValueError: if it is not positive.

    Source: Challis, Barber, "Gaussian Kullback-Leibler Approximate Inference", 2013.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.full_rank(2)
        >>> family.log_prob(family.init(jax.random.key(0)), jnp.zeros((5, 2))).shape
        (5,)
    """
    size = checks.positive_int("event_size", event_size)
    return Flow(standard_normal(size), Linear(size, full=True))
