"""The autoregressive flow whose parameters a causal transformer gives."""

import dataclasses

from jax.typing import ArrayLike

from flowvi import checks
from flowvi.attention import AttentionNetwork
from flowvi.families.family import Family
from flowvi.families.flow import Flow
from flowvi.families.flows import AutoregressiveLayer, flow_of, mixing_of
from flowvi.transformers import Transformer, as_transformer


@dataclasses.dataclass(frozen=True)
class AttentionLayer(AutoregressiveLayer):
    """An autoregressive layer with an attention network."""

    network: AttentionNetwork  # type: ignore[assignment]

    @property
    def name(self) -> str:
        return "transformer_flow"


def transformer_flow(
    event_size: int,
    *,
    num_layers: int = 2,
    width: int = 64,
    num_heads: int = 4,
    num_blocks: int = 2,
    transformer: str | Transformer = "spline",
    density_first: bool = True,
    context_size: int | None = None,
    base: Family | None = None,
    mixing: str | ArrayLike = "reverse",
) -> Flow:
    """Autoregressive flow over many coordinates, with causal attention in the place of masks.

    The parameters of all coordinates come from one network of shared weights, so their number
    grows with D by D (width + P) only. Densities take one pass of each layer. Samples take one
    too, a coordinate at a time: keys and values of those before are kept. A new flow is the
    identity: it equals its base.

    Args:
        event_size: D, at least 1.
        num_layers: layers, of a transformer each.
        width: numbers that each coordinate has inside of a transformer, a multiple of `num_heads`.
        num_heads: attention heads.
        num_blocks: pairs of attention and a dense network in each transformer.
        transformer: the scalar map, as for `fv.maf`.
        density_first: False for samples in one pass, coordinates at once, as posteriors want them.
        context_size: the length of the context vector, or None.
        base: the family of the noise, as for `fv.maf`.
        mixing: what stands between layers, as for `fv.maf`.

    Raises:
        ValueError: if a size is not positive, or `num_heads` does not divide `width`.

    Source: Patacchiola, Shysheya, Hofmann, Turner, "Transformer Neural Autoregressive Flows", 2024;
    Zhai et al., "Normalizing Flows are Capable Generative Models", 2024.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.transformer_flow(8, num_layers=1, width=8, num_heads=2, num_blocks=1)
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 10).shape
        (10, 8)
    """
    size, scalar = checks.positive_int("event_size", event_size), as_transformer(transformer)
    context_size = checks.optional_int("context_size", context_size)
    options = (size, scalar.num_params, width, num_heads, num_blocks, context_size)
    layer = AttentionLayer(
        AttentionNetwork(*options), scalar, density_first, *mixing_of(mixing, size)
    )
    return flow_of(layer, num_layers, context_size, base)
