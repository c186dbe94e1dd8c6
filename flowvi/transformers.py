"""Transformers: scalar maps with parameters.

A transformer is a callable that takes raw parameters theta of shape [..., P] to a scalar Distrax
bijector of batch shape [...], where theta = 0 is the identity and every finite theta gives a map
that can be inverted in the same precision. Any callable of this kind will do; those here also know
P and are hashable, so that a family can be configured with them.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.monotone import UMNN, Bernstein, DeepSigmoid, SumOfSquares
from flowvi.smooth import bounded
from flowvi.splines import RationalQuadraticSpline
from flowvi.tails import PowerTails

Array = jax.Array


@runtime_checkable
class Transformer(Protocol):
    """What a family asks of a transformer: hashable, callable, and aware of its parameter count."""

    @property
    def num_params(self) -> int:
        """P, the number of raw parameters of one coordinate."""

    def __call__(self, theta: Array) -> distrax.Bijector:
        """The scalar bijector at raw parameters theta of shape [..., P]."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """y = x exp(s) + m, with theta = (m, r) and s = B tanh(r / B).

    The log-scale is bounded smoothly by B, so no finite parameter makes the map numerically
    singular.

    Attributes:
        max_log_scale: B, in nats; positive.

    Source: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation",
    2017.
    """

    max_log_scale: float = 5.0

    def __post_init__(self) -> None:
        if not self.max_log_scale > 0:
            raise ValueError(f"`max_log_scale` must be positive; got {self.max_log_scale!r}.")

    @property
    def num_params(self) -> int:
        """Two: a shift and a raw log-scale."""
        return 2

    def __call__(self, theta: Array) -> distrax.Bijector:
        log_scale = bounded(theta[..., 1], self.max_log_scale)
        return distrax.ScalarAffine(shift=theta[..., 0], log_scale=log_scale)


@dataclasses.dataclass(frozen=True)
class Spline:
    """Monotone rational quadratic spline on [-interval, interval] with identity tails.

    theta holds K raw widths, K raw heights and K - 1 raw slopes of inner knots (those of the ends
    are 1). Each is bounded smoothly to (-B, B) before a softmax makes bins of them and a softplus
    slopes: with unbounded ones a trained flow grows needle-thin bins, and a stack of layers loses
    its inverse even in double precision.

    Attributes:
        num_bins: K, at least 2.
        interval: half the width of the interval, in units of the layer's input; positive.
        max_raw: B, positive; the sizes of two bins differ by a factor of at most exp(2 B).

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019.
    """

    num_bins: int = 8
    interval: float = 4.0
    max_raw: float = 2.0

    def __post_init__(self) -> None:
        if checks.positive_int("num_bins", self.num_bins) < 2:
            raise ValueError(f"`num_bins` must be at least 2; got {self.num_bins!r}.")
        for name in ("interval", "max_raw"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive; got {getattr(self, name)!r}.")

    @property
    def num_params(self) -> int:
        """3 K - 1: widths, heights and inner slopes."""
        return 3 * self.num_bins - 1

    def __call__(self, theta: Array) -> distrax.Bijector:
        # Unlike that of single indices, the gradient of a split is one concatenation.
        parts = jax.lax.split(bounded(theta, self.max_raw), [1] * self.num_params, axis=-1)
        raw = [jnp.squeeze(part, -1) for part in parts]
        widths, heights = raw[: self.num_bins], raw[self.num_bins : 2 * self.num_bins]
        return RationalQuadraticSpline(widths, heights, raw[2 * self.num_bins :], self.interval)


@dataclasses.dataclass(frozen=True)
class TailedSpline:
    """A `Spline` on [-interval, interval] whose tails are learned, on each side separately.

    theta holds the parameters of the spline and four more: for each side a raw log-power r, whose
    p = exp(2 tanh(r / 2)), and the shape s of `flowvi.tails.PowerTails`, which is 0 where its raw
    number is negative. Tails are normal for theta = 0, and may become exponential, a power law or
    lighter than normal.

    Attributes:
        num_bins: K, at least 2.
        interval: half the width of the interval, in units of the layer's input; positive.
        max_shape: the largest s; positive. The k-th moment is infinite from s = 1 / k on.

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019; Hickling, Prangle,
    "Flexible Tails for Normalizing Flows", 2024.
    """

    num_bins: int = 8
    interval: float = 2.0
    max_shape: float = 3.0

    def __post_init__(self) -> None:
        checks.require(self.max_shape > 0, "`max_shape` must be positive", self.max_shape)
        Spline(self.num_bins, self.interval)

    @property
    def num_params(self) -> int:
        """3 K + 3: those of the spline, and two for each tail."""
        return 3 * self.num_bins + 3

    def __call__(self, theta: Array) -> distrax.Bijector:
        body = Spline(self.num_bins, self.interval)(theta[..., :-4])
        low, high, low_shape, high_shape = (theta[..., k] for k in (-4, -3, -2, -1))
        powers = bounded(low, 2.0), bounded(high, 2.0)
        shapes = self._shape(low_shape), self._shape(high_shape)
        tails = PowerTails(self.interval, powers, shapes)
        return distrax.Chain([tails, body])

    def _shape(self, raw: Array) -> Array:
        clipped = jnp.clip(raw, 0.0, self.max_shape)
        # The gradient is that of raw everywhere: else a negative number could never rise again.
        return raw + jax.lax.stop_gradient(clipped - raw)


@dataclasses.dataclass(frozen=True)
class ScaledSpline:
    """A `Spline` after which the line is scaled and shifted: y = exp(s) spline(x) + m.

    theta is (m, r), as those of `Affine`, and then the parameters of the spline. A spline alone has
    identity tails, so that mass which is narrow, and whose place depends on a context, needs many
    of them: as that of p(theta | x), where x tells theta well.

    Attributes:
        num_bins: K, at least 2.
        interval: half the width of the interval, in units of the layer's input; positive.
        max_log_scale: the bound of s, in nats; positive.
    """

    num_bins: int = 8
    interval: float = 4.0
    max_log_scale: float = 2.0

    def __post_init__(self) -> None:
        Spline(self.num_bins, self.interval)
        Affine(self.max_log_scale)

    @property
    def num_params(self) -> int:
        """3 K + 1: a shift, a raw log-scale and those of the spline."""
        return 3 * self.num_bins + 1

    def __call__(self, theta: Array) -> distrax.Bijector:
        spline = Spline(self.num_bins, self.interval)(theta[..., 2:])
        return distrax.Chain([Affine(self.max_log_scale)(theta[..., :2]), spline])


TRANSFORMERS: dict[str, Callable[[], Transformer]] = {
    "affine": Affine,
    "spline": Spline,
    "tailed": TailedSpline,
    "scaled": ScaledSpline,
    "umnn": UMNN,
    "deep_sigmoid": DeepSigmoid,
    "sum_of_squares": SumOfSquares,
    "bernstein": Bernstein,
}


def as_transformer(transformer: str | Transformer) -> Transformer:
    """The transformer behind a name; a transformer stands for itself."""
    known = ", ".join(map(repr, TRANSFORMERS))
    if isinstance(transformer, str):
        if transformer not in TRANSFORMERS:
            rule = f"`transformer` must be one of {known}, or a transformer"
            raise ValueError(f"{rule}; got {transformer!r}.")
        return TRANSFORMERS[transformer]()
    if not isinstance(transformer, Transformer):
        raise TypeError(
            f"`transformer` must be one of {known}, or a hashable callable with `num_params`; "
            f"got {checks.shown(transformer)}."
        )
    return transformer
