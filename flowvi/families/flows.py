"""The flow families: IAF, MAF and coupling."""

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from jax.typing import ArrayLike

from flowvi import checks
from flowvi.families.contexts import conditional
from flowvi.families.family import Array, Family
from flowvi.families.flow import Flow
from flowvi.families.layers import AutoregressiveLayer, CouplingLayer, Layers, as_mixing
from flowvi.families.normal import standard_normal
from flowvi.masked import MaskedNetwork
from flowvi.networks import MLP
from flowvi.transformers import Transformer, as_transformer

Activation = str | Callable[[Array], Array]

NUM_LAYERS = 5


def _hidden_sizes(hidden_sizes: Sequence[int] | None, event_size: int) -> tuple[int, ...]:
    """Two layers of 64, or wider where there are more coordinates than they could tell apart."""
    if hidden_sizes is not None:
        return checks.sizes("hidden_sizes", hidden_sizes)
    return (max(64, min(2 * event_size, 512)),) * 2


def _context_size(context_size: int | None) -> int | None:
    return None if context_size is None else checks.positive_int("context_size", context_size)


def _base(base: Family | None, event_size: int, context_size: int | None) -> Family:
    if base is None:
        return standard_normal(event_size)
    if not isinstance(base, Family):
        raise TypeError(
            f"`base` must be a family, such as `fv.mean_field({event_size})`; got {base!r}."
        )
    if context_size is None or base.context_shape in (None, (context_size,)):
        return base
    return conditional(base, MLP(context_size, (), base.context_shape))


class FlowOptions(TypedDict, total=False):
    """Options of `iaf` and `maf`.

    Attributes:
        num_layers: the number of autoregressive layers, 5 by default.
        hidden_sizes: widths of the hidden layers of each conditioner; two of max(64, 2 D), at most
            512, by default.
        transformer: "spline", "affine", or a transformer.
        context_size: the length of the context vector, or None.
        base: the family of the noise, a standard normal by default. It may take the context too,
            or another one that a linear layer makes of it: `fv.gaussian(D)` is a normal whose
            parameters depend on the context.
        activation: a name such as "silu", or a function.
        mixing: what stands between layers: "reverse" turns the order of the coordinates round; "lu"
            does so after a learned LU-linear map; or a permutation.
    """

    num_layers: int
    hidden_sizes: Sequence[int] | None
    transformer: str | Transformer
    context_size: int | None
    base: Family | None
    activation: Activation
    mixing: str | ArrayLike


def _autoregressive(
    event_size: int,
    density_first: bool,
    *,
    num_layers: int = NUM_LAYERS,
    hidden_sizes: Sequence[int] | None = None,
    transformer: str | Transformer = "spline",
    context_size: int | None = None,
    base: Family | None = None,
    activation: Activation = "silu",
    mixing: str | ArrayLike = "reverse",
) -> Flow:
    size = checks.positive_int("event_size", event_size)
    scalar = as_transformer(transformer)
    network = MaskedNetwork(
        size,
        _hidden_sizes(hidden_sizes, size),
        scalar.num_params,
        context_size=_context_size(context_size),
        activation=activation,
    )
    between = as_mixing(mixing, size)
    layer = AutoregressiveLayer(network, scalar, density_first, between)
    layers = Layers(layer, checks.positive_int("num_layers", num_layers), between.permutation)
    return Flow(_base(base, size, context_size), layers, context_size)


def iaf(event_size: int, **options: Unpack[FlowOptions]) -> Flow:
    """Inverse autoregressive flow: samples, and their densities, in one pass of each layer.

    The choice for variational posteriors. A new flow is the identity: it equals its base.

    Args:
        event_size: D, at least 1.
        **options: those of `FlowOptions`: num_layers, hidden_sizes, transformer, context_size,
            base, activation, mixing.

    Raises:
        ValueError, TypeError: if an argument is not of this kind.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving Variational Inference
    with Inverse Autoregressive Flow", 2016.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.iaf(2, num_layers=2, hidden_sizes=[8])
        >>> params = family.init(jax.random.key(0))
        >>> x, log_prob = family.sample_and_log_prob(params, jax.random.key(1), 100)
        >>> x.shape, log_prob.shape
        ((100, 2), (100,))
    """
    return _autoregressive(event_size, density_first=False, **options)


def maf(event_size: int, **options: Unpack[FlowOptions]) -> Flow:
    """Masked autoregressive flow: densities in one pass of each layer.

    The choice for density estimation. A new flow is the identity: it equals its base. With a
    context it is a conditional density p(x | context).

    Args:
        event_size: D, at least 1.
        **options: those of `FlowOptions`: num_layers, hidden_sizes, transformer, context_size,
            base, activation, mixing.

    Raises:
        ValueError, TypeError: if an argument is not of this kind.

    Source: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation",
    2017; with the spline, Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.maf(2, num_layers=2, hidden_sizes=[8], context_size=3)
        >>> params = family.init(jax.random.key(0))
        >>> x, context = jax.numpy.zeros((100, 2)), jax.numpy.zeros((100, 3))
        >>> family.log_prob(params, x, context).shape
        (100,)
    """
    return _autoregressive(event_size, density_first=True, **options)


def coupling(
    event_size: int,
    *,
    num_layers: int = 2 * NUM_LAYERS,
    hidden_sizes: Sequence[int] | None = None,
    transformer: str | Transformer = "spline",
    context_size: int | None = None,
    base: Family | None = None,
    activation: Activation = "silu",
) -> Flow:
    """Coupling flow: samples and densities both in one pass of each layer, which moves half of x.

    Args:
        event_size: D, at least 1.
        num_layers: the number of coupling layers; even coordinates move in every other one.
        hidden_sizes: as of `FlowOptions`.
        transformer: as there.
        context_size: as there.
        base: as there.
        activation: as there.

    Raises:
        ValueError, TypeError: if an argument is not of this kind.

    Source: Dinh, Sohl-Dickstein, Bengio, "Density Estimation using Real NVP", 2017; with the
    spline, Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.coupling(2, num_layers=2, hidden_sizes=[8])
        >>> params = family.init(jax.random.key(0))
        >>> family.sample(params, jax.random.key(1), 100).shape
        (100, 2)
    """
    size = checks.positive_int("event_size", event_size)
    scalar = as_transformer(transformer)
    half = (size + 1) // 2
    network = MLP(
        half,
        _hidden_sizes(hidden_sizes, size),
        (half, scalar.num_params),
        context_size=_context_size(context_size),
        activation=activation,
        zero_output=True,
    )
    layers = Layers(
        CouplingLayer(size, network, scalar), checks.positive_int("num_layers", num_layers)
    )
    return Flow(_base(base, size, context_size), layers, context_size)
