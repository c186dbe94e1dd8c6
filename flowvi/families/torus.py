"""Flows of angles: splines around the circle, whose parameters depend on the other angles."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.families.family import Array, Context, Family, Params, Shape, shown
from flowvi.families.flow import Flow
from flowvi.families.flows import Activation, CouplingLayer, flow_of
from flowvi.networks import MLP
from flowvi.params import PyTree
from flowvi.smooth import bounded
from flowvi.splines import RationalQuadraticSpline
from flowvi.supports import Interval


def wrapped(x: Array) -> Array:
    """Angles strictly between -pi and pi, up to rounding the same."""
    most = np.nextafter(np.asarray(math.pi, x.dtype), np.asarray(0, x.dtype))
    turns = jax.lax.stop_gradient(jnp.floor((x + math.pi) / (2 * math.pi)))
    x = x - 2 * math.pi * turns
    # By a selection, whose derivative is 1 at the ends too.
    return x + jax.lax.stop_gradient(jnp.clip(x, -most, most) - x)


class _Circular(distrax.Bijector):
    """y = spline(x) + m, around the circle."""

    def __init__(self, shift: Array, spline: RationalQuadraticSpline):
        super().__init__(event_ndims_in=0)
        self._shift, self._spline = shift, spline

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        y, log_det = self._spline.forward_and_log_det(wrapped(x))
        return wrapped(y + self._shift), log_det

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        x, log_det = self._spline.inverse_and_log_det(wrapped(y - self._shift))
        return wrapped(x), log_det

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other


@dataclasses.dataclass(frozen=True)
class CircularSpline:
    """A transformer of angles: a rational quadratic spline from the circle to itself, and a turn.

    Its slopes at -pi and pi are the same number, so that the density is continuous there. theta
    holds a turn, K raw widths, heights and slopes, bounded by 2; 0 is the identity.

    Attributes:
        num_bins: K, at least 2.

    Source: Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan, Cranmer, "Normalizing Flows
    on Tori and Spheres", 2020.
    """

    num_bins: int = 8

    def __post_init__(self) -> None:
        count = checks.positive_int("num_bins", self.num_bins)
        checks.require(count > 1, "`num_bins` must be at least 2", count)

    @property
    def num_params(self) -> int:
        """3 K + 1."""
        return 3 * self.num_bins + 1

    def __call__(self, theta: Array) -> distrax.Bijector:
        count = self.num_bins
        raw = [bounded(theta[..., k], 2.0) for k in range(1, self.num_params)]
        slopes = raw[2 * count :]
        spline = RationalQuadraticSpline(
            raw[:count], raw[count : 2 * count], slopes[1:], math.pi, slopes[0]
        )
        return _Circular(theta[..., 0], spline)


@dataclasses.dataclass(frozen=True)
class CircularLayer(CouplingLayer):
    """A coupling layer of angles, of which the network sees cosines and sines."""

    name = "torus"

    def features(self, stays: Array) -> Array:
        return jnp.concatenate([jnp.cos(stays), jnp.sin(stays)], -1)


@dataclasses.dataclass(frozen=True, repr=False)
class UniformAngles(Family):
    """Independent angles, each of them uniform; without parameters."""

    event_shape: Shape
    context_shape: None = None
    reparameterized: bool = True

    def __repr__(self) -> str:
        return shown("uniform_angles", self.event_shape)

    def init(self, key: Array) -> Params:
        return {}

    def distribution(self, params: Params, context: Context = None) -> distrax.Distribution:
        self.check_context(context)
        end = jnp.full(self.event_shape, math.pi)
        return distrax.Independent(distrax.Uniform(-end, end), len(self.event_shape))


@dataclasses.dataclass(frozen=True, repr=False)
class Torus(Flow):
    """A flow of angles in (-pi, pi); see `torus`."""

    def __repr__(self) -> str:
        return shown("torus", self.event_shape, context_size=self.context_size)

    @functools.cached_property
    def support(self) -> Interval:
        """Strictly between -pi and pi."""
        return Interval(self.event_shape, -math.pi, math.pi)


def torus(
    event_size: int,
    *,
    num_layers: int = 6,
    hidden_sizes: Sequence[int] = (64, 64),
    num_bins: int = 8,
    context_size: int | None = None,
    activation: Activation = "silu",
) -> Flow:
    """A flow of D angles, in radians between -pi and pi: circular splines, in coupling layers.

    Densities go round without a step. Samples and densities both take one pass. A new flow is the
    uniform distribution.

    Args:
        event_size: D, at least 1.
        num_layers: the number of layers; even angles move in every other one, odd ones in the rest.
        hidden_sizes: widths of the hidden layers of each network, which sees cosines and sines.
        num_bins: of each spline, at least 2.
        context_size: the length of the context vector, or None.
        activation: a name such as "silu", or a function.

    Raises:
        ValueError: if a size is not positive, or `num_bins` is 1.

    Source: Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan, Cranmer, "Normalizing Flows
    on Tori and Spheres", 2020.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.torus(2, num_layers=2, hidden_sizes=[8])
        >>> params = family.init(jax.random.key(0))
        >>> print(f"{family.log_prob(params, [3.0, -1.0]):.4f}")  # -2 log(2 pi)
        -3.6758
    """
    size, scalar = checks.positive_int("event_size", event_size), CircularSpline(num_bins)
    half, widths = (size + 1) // 2, checks.sizes("hidden_sizes", hidden_sizes)
    context_size = checks.optional_int("context_size", context_size)
    options: PyTree = {"context_size": context_size, "activation": activation}
    network = MLP(2 * half, widths, (half, scalar.num_params), **options, zero_output=True)
    layer = CircularLayer(size, network, scalar)
    flow = flow_of(layer, num_layers, context_size, UniformAngles((size,)))
    return Torus(flow.base, flow.transform, context_size)
