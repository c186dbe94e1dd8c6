"""A family moved into the units of a normal distribution."""

import dataclasses
from typing import Any

import distrax
import jax.numpy as jnp

from flowvi import checks
from flowvi.bijectors.whitening import Dense, LowRank
from flowvi.distributions import FlowDistribution
from flowvi.families.family import Array, Family, Params
from flowvi.params import Fixed


@dataclasses.dataclass(frozen=True)
class Whitened(Family):
    """A family pushed through an affine map that no optimizer moves; see `whitened`."""

    family: Family
    rank: int | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """That of the inner family."""
        return self.family.event_shape

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """That of the inner family."""
        return self.family.context_shape

    @property
    def reparameterized(self) -> bool:
        """That of the inner family."""
        return self.family.reparameterized

    def init(self, key: Array) -> Params:
        """{"family": ..., "whitening": Fixed(...)}, whose map is the identity."""
        size = self.event_shape[0]
        loc = jnp.zeros(size)
        if self.rank is None:
            eye = jnp.eye(size)
            whitening = {"loc": loc, "matrix": eye, "inverse": eye, "log_det": jnp.zeros(())}
        else:
            basis = jnp.eye(size, self.rank)
            gain = jnp.zeros(self.rank)
            whitening = {"loc": loc, "scale": jnp.ones(size), "basis": basis, "gain": gain}
        return {"family": self.family.init(key), "whitening": Fixed(whitening)}

    def place(self, params: Params, whitening: Any) -> Params:
        """Parameters with another affine map.

        Args:
            params: parameters as `init` returns them.
            whitening: the arguments of `Dense`, or of `LowRank` where there is a rank, as a dict.
        """
        return {**params, "whitening": Fixed(whitening)}

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
        affine = Dense(**whitening) if self.rank is None else LowRank(**whitening)
        batch_shape, dtype = inner.batch_shape, inner.dtype
        dtype = jnp.promote_types(dtype, whitening["loc"].dtype)
        if isinstance(inner, FlowDistribution):
            inner, affine = inner.distribution, distrax.Chain([affine, inner.bijector])
        return FlowDistribution(inner, affine, batch_shape=batch_shape, dtype=dtype)


def whitened(family: Family, *, rank: int | None = None) -> Whitened:
    """A family pushed through an affine map that no optimizer moves.

        y = loc + A x,   x from the family

    A new one has the identity; `place` puts another map into the parameters. A is a full matrix,
    or a diagonal times the identity plus a matrix of low rank.

    Args:
        family: any family over vectors.
        rank: the number of directions of the low-rank form; None for a full matrix.

    Raises:
        TypeError: if it is no family, or `rank` no integer.
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
    return Whitened(family, rank)
