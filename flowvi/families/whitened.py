"""Families moved by an affine map that no optimizer moves."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from distrax import Bijector, Block, Distribution, ScalarAffine
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.bijectors import Dense, LowRank, Units
from flowvi.distributions import FlowDistribution
from flowvi.families.family import Composed, Family, Params, as_family, bare_init, shown
from flowvi.families.placed import pushed
from flowvi.params import Fixed, PyTree
from flowvi.supports import Interval, Support
from flowvi.transformers import Transformer, as_transformer

Numbers = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, repr=False)
class Whitened(Composed):
    """A family pushed through an affine map that no optimizer moves; see `whitened`.

    Its parameters are {"family", "whitening", "width"}, and "marginal" with such a transformer.
    """

    family: Family
    rank: int | None = None
    marginal: Transformer | None = None

    def __repr__(self) -> str:
        return shown("whitened", self.family, rank=self.rank, marginal=self.marginal)

    @functools.cached_property
    def support(self) -> Support:
        return Interval(self.event_shape)

    def init(self, key: jax.Array) -> Params:
        size, rank = self.event_shape[0], self.rank
        loc, scale, basis = jnp.zeros(size), jnp.ones(size), jnp.eye(size, rank)
        whitening = {"loc": loc, "matrix": basis, "inverse": basis, "log_det": jnp.zeros(())}
        if rank is not None:
            whitening = {"loc": loc, "scale": scale, "basis": basis, "gain": jnp.zeros(rank)}
        params = {"family": bare_init(self.family, key), "width": Fixed(jnp.ones(()))}
        if self.marginal is not None:
            params["marginal"] = jnp.zeros((size, self.marginal.num_params))
        return self.place(params, whitening)

    def place(self, params: Params, whitening: Mapping[str, ArrayLike]) -> Params:
        """Parameters with another affine map: the arguments of `Dense`, or of `LowRank`."""
        arrays = {name: jnp.asarray(leaf) for name, leaf in whitening.items()}
        if self.marginal is not None:
            arrays["spread"] = _spread(arrays)
        return {**params, "whitening": Fixed(arrays)}

    def widen(self, params: Params, factor: float) -> Params:
        """Parameters with a base `factor` times as wide as that of the family, before its maps."""
        return {**params, "width": Fixed(params["width"].value * factor)}

    def push(self, params: Params, inner: Distribution, context: PyTree) -> FlowDistribution:
        whitening = params["whitening"].value
        inner = _wider(inner, params["width"].value)
        bijectors = self._affine(whitening, params.get("marginal"))
        return pushed(inner, bijectors, whitening["loc"].dtype)

    def _affine(self, whitening: Numbers, theta: jax.Array | None) -> list[Bijector]:
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
        scalar = Block(self.marginal(theta), 1)
        return [Units(loc, spread), scalar, kind(**whitening)]


def _wider(distribution: Distribution, width: jax.Array) -> FlowDistribution:
    """A distribution from a base so many times as wide."""
    batch_shape, dtype = distribution.batch_shape, distribution.dtype
    if isinstance(distribution, FlowDistribution):
        base, bijector = _wider(distribution.distribution, width), distribution.bijector
    else:
        scale = ScalarAffine(shift=0.0, scale=width.astype(dtype))
        base, bijector = distribution, Block(scale, len(distribution.event_shape))
    return FlowDistribution(base, bijector, batch_shape=batch_shape, dtype=dtype)


def _spread(whitening: Numbers) -> jax.Array:
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
    each coordinate. A new one has the identity; `place` puts another map into the parameters.

    Args:
        family: any family over vectors.
        rank: None for a full matrix A; or that of R in A = diagonal x (identity + R).
        marginal: "spline", "affine", a transformer, or None for none.

    Raises:
        ValueError: if the family is not over vectors, or `rank` is larger than they are.

    Source: Hoffman et al., "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural
    Transport", 2019, use such maps the other way.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.whitened(fv.iaf(2))
        >>> family.log_prob(family.init(jax.random.key(0)), jnp.zeros((5, 2))).shape
        (5,)
    """
    if len(as_family(family).event_shape) != 1:
        got = f"event shape {family.event_shape} of {family!r}"
        raise ValueError(f"`family` must be over vectors; got {got}.")
    if rank is not None and checks.positive_int("rank", rank) > family.event_shape[0]:
        raise ValueError(f"`rank` must be at most {family.event_shape[0]}; got {rank}.")
    return Whitened(family, rank, None if marginal is None else as_transformer(marginal))
