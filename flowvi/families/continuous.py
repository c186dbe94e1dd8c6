"""The continuous flow: the solution of an ordinary differential equation whose field is learned."""

import dataclasses
import importlib.util
from collections.abc import Sequence

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.bijectors.continuous import Continuous
from flowvi.families.family import Array, Family, Params
from flowvi.families.flow import Flow
from flowvi.families.flows import Activation, flow_from
from flowvi.families.residual import takes_estimate
from flowvi.networks import MLP

#: t itself, and sines and cosines of pi t times 1, 2, ..
NUM_TIMES, NUM_WAVES = 9, 4


@dataclasses.dataclass(frozen=True)
class ContinuousMap:
    """dx/dt = v(t, x; context), from base at t = 0 to data at t = 1.

    Attributes:
        network: v, of x and features of t.
        is_matched: whether `fit_density` trains it by flow matching.
        is_random: whether its training form estimates traces.
    """

    network: MLP
    is_matched: bool
    is_random: bool
    name = "continuous"

    @property
    def event_size(self) -> int:
        return self.network.output_shape[0]

    def init(self, key: Array) -> Params:
        return self.network.init(key)

    def velocity(self, params: Params, t: Array, x: Array, context: Array | None) -> Array:
        """v, of shape [..., D], for t of shape [...] or ()."""
        waves = jnp.pi * t[..., None] * jnp.arange(1, NUM_WAVES + 1, dtype=t.dtype)
        times = jnp.concatenate([t[..., None], jnp.sin(waves), jnp.cos(waves)], -1)
        times = jnp.broadcast_to(times, (*x.shape[:-1], NUM_TIMES)).astype(x.dtype)
        return self.network.apply(params, jnp.concatenate([x, times], -1), context)

    def randomized(self, params: Params, key: Array) -> Params:
        """Parameters of the training form."""
        return {**params, "key": key} if self.is_random else params

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        batch_shape = () if context is None else context.shape[:-1]
        field = Field(self, params, context)
        return Continuous(field, batch_shape=batch_shape, key=params.get("key"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Field:
    """The velocity at some parameters and a context: a callable and a pytree."""

    transform: ContinuousMap = dataclasses.field(metadata={"static": True})
    params: Params
    context: Array | None

    def __call__(self, t: Array, x: Array) -> Array:
        return self.transform.velocity(self.params, t, x, self.context)


def continuous(
    event_size: int,
    *,
    hidden_sizes: Sequence[int] = (64, 64, 64),
    trained_by: str = "matching",
    trace: str | None = None,
    context_size: int | None = None,
    base: Family | None = None,
    activation: Activation = "silu",
) -> Flow:
    """Continuous flow: y = x(1) of dx/dt = v(t, x), x(0) from the base, with a network for v.

    Densities and samples both solve the equation, by diffrax: `pip install "flowvi[continuous]"`.
    There is no restriction of v, and any layer order. A new flow is the identity: it equals its
    base. Where an equation needs more than 256 steps, results are NaN.

    Args:
        event_size: D, at least 1.
        hidden_sizes: widths of the hidden layers of v.
        trained_by: "matching", for which `fit_density` solves no equation in training: see
            `fv.objectives.FlowMatching`; or "likelihood". Held-out scores are log densities.
        trace: what the likelihood takes in training: "exact", at the price of D derivatives of v,
            or "hutchinson", an unbiased estimate by one. By default "exact" up to D = 16.
            Evaluation is always exact.
        context_size: the length of the context vector, or None.
        base: the family of the noise, as for `fv.maf`. Flow matching leaves it as it is.
        activation: a name such as "silu", or a smooth function.

    Raises:
        ModuleNotFoundError: where diffrax is missing.

    Source: Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations", 2018;
    Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow Matching for Generative Modeling", 2023.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.continuous(2, hidden_sizes=[8])
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 100).shape
        (100, 2)
    """
    if importlib.util.find_spec("diffrax") is None:
        what = "`fv.continuous` needs diffrax, which is not installed"
        raise ModuleNotFoundError(f'{what}. Perhaps `pip install "flowvi[continuous]"`?')
    size = checks.positive_int("event_size", event_size)
    rule = '`trained_by` must be "matching" or "likelihood"'
    checks.require(trained_by in ("matching", "likelihood"), rule, trained_by)
    context_size = checks.optional_int("context_size", context_size)
    widths = checks.sizes("hidden_sizes", hidden_sizes)
    network = MLP(size + NUM_TIMES, widths, (size,), context_size, activation, zero_output=True)
    estimated = takes_estimate("trace", trace, "hutchinson", size)
    transform = ContinuousMap(network, trained_by == "matching", estimated)
    return flow_from(base, transform, context_size)
