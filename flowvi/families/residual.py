"""The residual flow: layers y = x + g(x) whose g has a bounded slope."""

import dataclasses
from collections.abc import Sequence

import distrax

from flowvi import checks
from flowvi.bijectors.residual import Residual
from flowvi.families.family import Array, Family, Params
from flowvi.families.flow import Flow
from flowvi.families.flows import Numbered, flow_of
from flowvi.networks.lipschitz import LipschitzNetwork

#: Up to this many coordinates, training takes exact log-determinants and traces by default.
MOST_EXACT = 16


@dataclasses.dataclass(frozen=True)
class ResidualLayer:
    """y = x + g(x; context), from data to base if density comes first."""

    network: LipschitzNetwork
    density_first: bool
    is_random: bool
    name = "residual"
    permutation = None

    @property
    def event_size(self) -> int:
        return self.network.event_size

    def init(self, key: Array) -> Params:
        return self.network.init(key)

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        params, _ = numbered
        bounded = self.network.bounded(params)
        layer = Residual(
            lambda x: self.network.apply(bounded, x, context),
            self.network.lipschitz,
            batch_shape=() if context is None else context.shape[:-1],
            key=params.get("key"),
        )
        return distrax.Inverse(layer) if self.density_first else layer


def takes_estimate(name: str, value: str | None, estimate: str, event_size: int) -> bool:
    """Whether training takes an estimate where there is an exact number."""
    rule = f'`{name}` must be "exact", "{estimate}" or None'
    checks.require(value in ("exact", estimate, None), rule, value)
    return event_size > MOST_EXACT if value is None else value == estimate


def residual(
    event_size: int,
    *,
    num_layers: int = 10,
    hidden_sizes: Sequence[int] = (64, 64),
    lipschitz: float = 0.95,
    log_det: str | None = None,
    density_first: bool = True,
    context_size: int | None = None,
    base: Family | None = None,
) -> Flow:
    """Residual flow: every coordinate moves at once, by layers y = x + g(x) from data to base.

    The slope of g is below `lipschitz` whatever the parameters, so every layer has an inverse. Log
    densities take one pass of each layer and D derivatives of it; samples a few passes more, by
    fixed points. A new flow is the identity: it equals its base.

    Args:
        event_size: D, at least 1.
        num_layers: the number of layers.
        hidden_sizes: widths of the hidden layers of each g.
        lipschitz: the bound of the slope of g, above 0 and below 1.
        log_det: what training takes: "exact", at the price of a D x D determinant for each row, or
            "roulette", an unbiased estimate by a random number of terms of a series. By default
            "exact" up to D = 16. Evaluation is always exact.
        density_first: False for layers from base to data, as posteriors want them.
        context_size: the length of the context vector, or None.
        base: the family of the noise, as for `fv.maf`.

    Raises:
        ValueError: if a size is not positive, `lipschitz` is not between 0 and 1, or `log_det` is
            of another name.

    Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible Residual Networks", 2019;
    Chen, Behrmann, Duvenaud, Jacobsen, "Residual Flows for Invertible Generative Modeling", 2019.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.residual(2, num_layers=2, hidden_sizes=[8])
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 100).shape
        (100, 2)
    """
    size = checks.positive_int("event_size", event_size)
    context_size = checks.optional_int("context_size", context_size)
    widths = checks.sizes("hidden_sizes", hidden_sizes)
    network = LipschitzNetwork(size, widths, lipschitz, context_size)
    estimated = takes_estimate("log_det", log_det, "roulette", size)
    return flow_of(ResidualLayer(network, density_first, estimated), num_layers, context_size, base)
