"""A family moved into the units of a normal distribution."""

import dataclasses
from typing import Any

import distrax
import jax.numpy as jnp

from flowvi import checks
from flowvi.bijectors import Dense, LowRank, Units
from flowvi.distributions import FlowDistribution
from flowvi.families.family import Array, Family, Params, Wrapper
from flowvi.params import Fixed, Origin
from flowvi.transformers import Transformer, as_transformer


@dataclasses.dataclass(frozen=True)
class Whitened(Wrapper):
    """A family pushed through an affine map that no optimizer moves; see `whitened`."""

    family: Family
    rank: int | None = None
    marginal: Transformer | None = None

    def init(self, key: Array) -> Params:
        """{"family", "origin", "whitening"}, whose map is the identity.

        With a marginal transformer also "marginal", its parameters for each coordinate.
        """
        size = self.event_shape[0]
        loc = jnp.zeros(size)
        if self.rank is None:
            eye = jnp.eye(size)
            whitening = {"loc": loc, "matrix": eye, "inverse": eye, "log_det": jnp.zeros(())}
        else:
            basis = jnp.eye(size, self.rank)
            gain = jnp.zeros(self.rank)
            whitening = {"loc": loc, "scale": jnp.ones(size), "basis": basis, "gain": gain}
        params = {"family": self.family.init(key), "origin": Origin(self)}
        if self.marginal is not None:
            params["marginal"] = jnp.zeros((size, self.marginal.num_params))
        return self.place(params, whitening)

    def place(self, params: Params, whitening: Any) -> Params:
        """Parameters with another affine map.

        Args:
            params: parameters as `init` returns them.
            whitening: the arguments of `Dense`, or of `LowRank` where there is a rank, as a dict.
        """
        whitening = {name: jnp.asarray(leaf) for name, leaf in whitening.items()}
        if self.marginal is not None:
            whitening = {**whitening, "spread": _spread(whitening)}
        return {**params, "whitening": Fixed(whitening)}

    def widen(self, params: Params, factor: float) -> Params:
        """Parameters with a base `factor` times as wide as that of the family, before its maps."""
        before = params["width"].value if "width" in params else 1.0
        return {**params, "width": Fixed(jnp.asarray(before * factor, jnp.result_type(float)))}

    def distribution(self, params: Params, context: Array | None = None) -> FlowDistribution:
        """See `Family.distribution`."""
        return self._placed(params, self.family.distribution(params["family"], context))

    def train_distribution(
        self, params: Params, key: Array, context: Array | None = None
    ) -> tuple[distrax.Distribution, Params]:
        """See `Family.train_distribution`."""
        own = params["family"]
        inner, new = self.family.train_distribution(own, key, context)
        return self._placed(params, inner), params if new is own else {**params, "family": new}

    def _placed(self, params: Params, inner: Any) -> FlowDistribution:
        whitening = params["whitening"].value
        batch_shape = inner.batch_shape
        dtype = jnp.promote_types(inner.dtype, whitening["loc"].dtype)
        if "width" in params:
            inner = _wider(inner, params["width"].value)
        bijectors = self._affine(whitening, params.get("marginal"))
        if isinstance(inner, FlowDistribution):
            inner, bijectors = inner.distribution, [*bijectors, inner.bijector]
        bijector = bijectors[0] if len(bijectors) == 1 else distrax.Chain(bijectors)
        return FlowDistribution(inner, bijector, batch_shape=batch_shape, dtype=dtype)

    def _affine(self, whitening: dict[str, Array], theta: Array | None) -> list[distrax.Bijector]:
        kind = Dense if self.rank is None else LowRank
        if self.marginal is None or theta is None:
            return [kind(**whitening)]
        # The marginal maps stand between A x, in units of its standard deviations, and those units.
        whitening = dict(whitening)
        loc, spread = whitening.pop("loc"), whitening.pop("spread")
        whitening["loc"] = jnp.zeros_like(loc)
        if self.rank is None:
            whitening["matrix"] = whitening["matrix"] / spread[:, None]
            whitening["inverse"] = whitening["inverse"] * spread
            whitening["log_det"] = whitening["log_det"] - jnp.sum(jnp.log(spread))
        else:
            whitening["scale"] = whitening["scale"] / spread
        scalar = distrax.Block(self.marginal(theta), 1)
        return [Units(loc, spread), scalar, kind(**whitening)]


def _wider(distribution: distrax.Distribution, width: Array) -> FlowDistribution:
    """A distribution from a base so many times as wide."""
    batch_shape, dtype = distribution.batch_shape, distribution.dtype
    if isinstance(distribution, FlowDistribution):
        base, bijector = _wider(distribution.distribution, width), distribution.bijector
    else:
        scale = distrax.ScalarAffine(shift=0.0, scale=width.astype(dtype))
        base, bijector = distribution, distrax.Block(scale, len(distribution.event_shape))
    return FlowDistribution(base, bijector, batch_shape=batch_shape, dtype=dtype)


def _spread(whitening: dict[str, Array]) -> Array:
    """The standard deviations of loc + A x for standard normal x."""
    if "matrix" in whitening:
        return jnp.linalg.norm(whitening["matrix"], axis=-1)
    gain = (1 + whitening["gain"]) ** 2 - 1
    return whitening["scale"] * jnp.sqrt(1 + whitening["basis"] ** 2 @ gain)


def whitened(
    family: Family, *, rank: int | None = None, marginal: str | Transformer | None = None
) -> Whitened:
    """A family pushed through an affine map that no optimizer moves.

        y = loc + A x,   x from the family

    With a marginal transformer t, y_i = loc_i + s_i t_i((A x)_i / s_i) where s_i is the standard
    deviation of (A x)_i: skewed and heavy-tailed marginals at the price of a few parameters for
    each coordinate, in however many dimensions.

    A new one has the identity; `place` puts another map into the parameters. A is a full matrix,
    or a diagonal times the identity plus a matrix of low rank.

    Args:
        family: any family over vectors.
        rank: the number of directions of the low-rank form; None for a full matrix.
        marginal: "spline", "affine", a transformer, or None for none.

    Raises:
        TypeError: if it is no family, `rank` no integer, or `marginal` no transformer.
        ValueError: if its events are no vectors, or `rank` is below 1 or above their size.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.whitened(fv.mean_field(3), rank=1)
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 5).shape
        (5, 3)
    """
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family; got {family!r}.")
    if len(family.event_shape) != 1:
        raise ValueError(
            f"`family` must be over vectors; got event shape {family.event_shape} of {family!r}."
        )
    if rank is not None and checks.positive_int("rank", rank) > family.event_shape[0]:
        raise ValueError(f"`rank` must be at most {family.event_shape[0]}; got {rank}.")
    return Whitened(family, rank, None if marginal is None else as_transformer(marginal))
