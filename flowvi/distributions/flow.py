"""The distribution of a flow, and what it answers that Distrax's own gets wrong.

Distrax decides that two transformed distributions share a bijector by comparing printed programs,
in which the values of arrays do not appear: two flows of one architecture get KL = 0.0 whatever
their parameters. Every pair with a flow in it is therefore registered here, and refuses. A stock
`distrax.Transformed` over our bijectors keeps the defect, on both sides of a KL.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi._tfp import tfd
from flowvi.bijectors.score import forward_with_score
from flowvi.distributions import draws
from flowvi.params import Array, PyTree, Shape


def _closed_form(
    claim: str, instead: str, *, rank: int | None = None
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """A statistic where a claim of the map holds, also of rows that `jax.vmap` has added."""

    def decorate(method: Callable[..., Array]) -> Callable[..., Array]:
        @functools.wraps(method)
        def call(self: "FlowDistribution", *args: Any, **kwargs: Any) -> Array:
            if self._is_mapped:
                return jax.vmap(lambda row: call(row, *args, **kwargs))(self)
            if not getattr(self.bijector, claim) or rank not in (None, len(self.event_shape)):
                rule = f"`{method.__name__}` of a flow has no closed form unless its map is affine"
                raise NotImplementedError(f"{rule}. Estimate it from samples: {instead}.")
            return method(self, *args, **kwargs)

        return call

    return decorate


class FlowDistribution(distrax.Transformed):
    """The distribution of y = f(x) for x from a base and a bijector f.

        log p(y) = log p_base(f^{-1}(y)) + log |det J f^{-1}(y)|

    It differs from `distrax.Transformed` in that a base without a batch shape is sampled once for
    every row of the bijector's batch (rows never share noise), the bijector is called on whole
    batches, and `kl_divergence` never returns a silent zero. Mean, covariance, variance and
    standard deviation are exact where the map is affine, mode and entropy where its log-determinant
    is constant; where they are not, a NotImplementedError says what to call instead.

    Args:
        distribution: the base.
        bijector: f.
        batch_shape: the batch shape of the result; the base's by default.
        dtype: the dtype of samples and log densities; the base's by default.

    Raises:
        TypeError: if the base's events are not of the rank that the bijector takes.

    Source: Papamakarios, Nalisnick, Rezende, Mohamed, Lakshminarayanan, "Normalizing Flows for
    Probabilistic Modeling and Inference", 2021.

    Example:
        >>> import jax, flowvi as fv
        >>> family = fv.maf(2, num_layers=1, hidden_sizes=[8])
        >>> flow = family.distribution(family.init(jax.random.key(0)))  # a `fv.FlowDistribution`
        >>> flow.sample(seed=jax.random.key(1), sample_shape=(4,)).shape
        (4, 2)
    """

    def __init__(
        self,
        distribution: distrax.Distribution,
        bijector: distrax.Bijector,
        *,
        batch_shape: Shape | None = None,
        dtype: jax.typing.DTypeLike | None = None,
    ):
        super().__init__(distribution, bijector)
        self._event_shape = distribution.event_shape
        self._dtype = jnp.dtype(distribution.dtype if dtype is None else dtype)
        batch_shape = distribution.batch_shape if batch_shape is None else batch_shape
        # A leaf, to which `jax.vmap` adds its axes as it does to all others.
        self._batch = np.broadcast_to(np.zeros((), self._dtype), batch_shape)
        self._batch_ndim = len(batch_shape)

    def __repr__(self) -> str:
        shapes = f"batch_shape={self.batch_shape}, event_shape={self.event_shape}"
        return f"FlowDistribution({shapes}, bijector={self.bijector!r})"

    @property
    def batch_shape(self) -> Shape:
        """That of the flow, after the axes over which `jax.vmap` has made it."""
        return self._batch.shape

    @property
    def _is_mapped(self) -> bool:
        """Whether `jax.vmap` has put an axis before those of the batch, in every leaf."""
        return self._batch.ndim > self._batch_ndim

    def _base_sample_shape(self, *sample_shape: int) -> Shape:
        """The sample shape that gives the base one draw for each row of our batch."""
        missing = len(self.batch_shape) - len(self.distribution.batch_shape)
        return (*sample_shape, *self.batch_shape[:missing])

    def _push_draws(
        self,
        draw: Callable[..., tuple[Array, Array]],
        key: Array,
        sample_shape: Shape,
        reparameterized: bool,
    ) -> tuple[Array, Array]:
        shape = self._base_sample_shape(*sample_shape)
        x, log_choice = draw(self.distribution, key, shape, reparameterized=reparameterized)
        return self.bijector.forward(x.astype(self.dtype)), log_choice

    draw = functools.partialmethod(_push_draws, draws.draw)
    draw_each = functools.partialmethod(_push_draws, draws.draw_each)

    def num_choices(self, reparameterized: bool) -> int | None:
        return draws.num_choices(self.distribution, reparameterized=reparameterized)

    def support_size(self) -> None:
        """None: a flow is not discrete."""

    def sample_with_base(self, key: Array, num_samples: int) -> tuple[Array, Array, Array]:
        """Draws x of the base, their images y, and log |det J f(x)|, with a first axis of draws."""
        shape = self._base_sample_shape(num_samples)
        x = self.distribution.sample(seed=key, sample_shape=shape).astype(self.dtype)
        y, log_det = self.bijector.forward_and_log_det(x)
        return x, y, log_det

    def sample_root(self, key: Array, sample_shape: Shape) -> Array:
        """Draws of the base at the bottom of all the maps, of shape [*sample, *batch, *event]."""
        base, shape = self.distribution, self._base_sample_shape(*sample_shape)
        if isinstance(base, FlowDistribution):
            return base.sample_root(key, shape)
        return base.sample(seed=key, sample_shape=shape)

    @property
    def root(self) -> distrax.Distribution:
        """The base at the bottom of all the maps."""
        base = self.distribution
        return base.root if isinstance(base, FlowDistribution) else base

    def sample_with_score(self, key: Array, sample_shape: Shape) -> tuple[Array, Array, Array]:
        """Draws y, log p(y), and the gradient of log p at y, as `push_with_score`."""
        return self.push_with_score(self.sample_root(key, sample_shape))

    def push_with_score(self, x: Array) -> tuple[Array, Array, Array]:
        """The images y of points x of the root, log p(y), and the gradient of log p at y.

        The gradient of each for the parameters is that of its own meaning: of y the path of the
        draw, of log p(y) that of the density at a fixed point, of the last none. With s_x and
        s_y the gradients of the base's log density and of this one, and dx and dy the paths,

            d log p(y) = d log p_base(x) + s_x . dx - d log |det J f(x)| - s_y . dy

        so no layer is inverted.

        Points have the shape [*sample, *batch, *event] that `sample_root` gives them.
        """
        base = self.distribution
        if isinstance(base, FlowDistribution):
            x, log_prob, score = base.push_with_score(x)
        else:
            log_prob, pull = jax.vjp(base.log_prob, jax.lax.stop_gradient(x))
            (score,) = pull(jnp.ones_like(log_prob))
        x, score = x.astype(self.dtype), jax.lax.stop_gradient(score).astype(self.dtype)
        y, log_det, new = forward_with_score(self.bijector, x, score)
        rank = len(self.event_shape)
        change = along(x, score, rank) - along(y, new, rank)
        log_prob = log_prob.astype(self.dtype) - log_det + change
        return y, log_prob, new

    def _sample_n(self, key: Array, n: int) -> Array:
        if self._is_mapped:
            return self._sample_each(FlowDistribution._sample_n, key, n)
        x = self.distribution.sample(seed=key, sample_shape=self._base_sample_shape(n))
        return self.bijector.forward(x.astype(self.dtype))

    def _sample_n_and_log_prob(self, key: Array, n: int) -> tuple[Array, Array]:
        if self._is_mapped:
            return self._sample_each(FlowDistribution._sample_n_and_log_prob, key, n)
        shape = self._base_sample_shape(n)
        x, log_prob = self.distribution.sample_and_log_prob(seed=key, sample_shape=shape)
        y, log_det = self.bijector.forward_and_log_det(x.astype(self.dtype))
        return y, log_prob.astype(self.dtype) - log_det

    def _sample_each(self, method: Callable[..., PyTree], key: Array, n: int) -> PyTree:
        keys = jax.random.split(key, len(self._batch))
        return jax.vmap(lambda flow, key: method(flow, key, n), out_axes=1)(self, keys)

    def log_prob(self, value: Array) -> Array:
        if self._is_mapped:
            value = jnp.asarray(value)
            split = value.ndim - len(self.event_shape)
            rows = jnp.broadcast_shapes(value.shape[:split], self.batch_shape)
            axis = len(rows) - len(self.batch_shape)
            value = jnp.broadcast_to(value, (*rows, *value.shape[split:]))
            return jax.vmap(FlowDistribution.log_prob, (0, axis), axis)(self, value)
        x, log_det = self.bijector.inverse_and_log_det(value)
        return self.distribution.log_prob(x).astype(log_det.dtype) + log_det

    def _base_rows(self, value: Array) -> Array:
        """A statistic of the base, once for every row of our batch."""
        return jnp.broadcast_to(value, self.batch_shape + self.event_shape).astype(self.dtype)

    @_closed_form("is_constant_jacobian", "`sample(seed=key, sample_shape=1000).mean(0)`")
    def mean(self) -> Array:
        return self.bijector.forward(self._base_rows(self.distribution.mean()))

    @_closed_form(
        "is_constant_jacobian", "`jnp.cov(sample(seed=key, sample_shape=1000).T)`", rank=1
    )
    def covariance(self) -> Array:
        """The covariance matrix J C J^T of shape [..., D, D], of an affine map of vectors."""
        # The Jacobian is the same everywhere, so its columns are differences of images.
        zero = self._base_rows(jnp.zeros(()))
        eye = jnp.eye(self.event_shape[0], dtype=self.dtype)
        steps = zero + jnp.expand_dims(eye, tuple(range(1, 1 + len(self.batch_shape))))
        columns = self.bijector.forward(steps) - self.bijector.forward(zero)
        jacobian, base = jnp.moveaxis(columns, 0, -1), self.distribution
        # Distributions that have no such method have independent coordinates.
        if hasattr(base, "covariance"):
            inner = base.covariance().astype(self.dtype)
        else:
            inner = self._base_rows(base.variance())[..., None] * eye
        return jacobian @ inner @ jnp.swapaxes(jacobian, -1, -2)

    @_closed_form("is_constant_jacobian", "`sample(seed=key, sample_shape=1000).var(0)`", rank=1)
    def variance(self) -> Array:
        return jnp.diagonal(self.covariance(), axis1=-2, axis2=-1)

    def stddev(self) -> Array:
        return jnp.sqrt(self.variance())

    @_closed_form("is_constant_log_det", "the one of largest `log_prob`, refined by an optimizer")
    def mode(self) -> Array:
        return self.bijector.forward(self._base_rows(self.distribution.mode()))

    @_closed_form(
        "is_constant_log_det", "`-sample_and_log_prob(seed=key, sample_shape=1000)[1].mean(0)`"
    )
    def entropy(self, input_hint: Array | None = None) -> Array:
        hint = self._base_rows(jnp.zeros(())) if input_hint is None else input_hint
        log_det = self.bijector.forward_log_det_jacobian(hint)
        return self.distribution.entropy().astype(self.dtype) + log_det

    def kl_divergence(
        self,
        other_dist: distrax.DistributionLike,
        *,
        seed: Array | int | None = None,
        num_samples: int | None = None,
        **kwargs: Any,
    ) -> Array:
        """KL(self || other) = E_self [log p_self(y) - log p_other(y)] in nats.

        With `seed`, a key or an integer, it is a Monte Carlo estimate from `num_samples` (1000 by
        default); without, a NotImplementedError unless an exact rule is known, which may take more
        arguments.
        """
        if seed is None and num_samples is not None:
            raise ValueError("`seed` must be given with `num_samples`; got None.")
        if seed is None:
            return tfd.kl_divergence(self, other_dist, **kwargs)
        count = 1000 if num_samples is None else num_samples
        y, log_prob = self.sample_and_log_prob(seed=seed, sample_shape=count)
        return (log_prob - other_dist.log_prob(y)).mean(0)


def along(x: Array, score: Array, event_ndims: int) -> Array:
    """Zero, with the gradient score . dx, a sum over the axes of the event."""
    axes = tuple(range(x.ndim - event_ndims, x.ndim))
    return jnp.sum((x - jax.lax.stop_gradient(x)) * score, axis=axes)


def _refuse_kl(first: object, second: object, *unused: object, **kwargs: object) -> NoReturn:
    raise NotImplementedError(
        f"KL({type(first).__name__} || {type(second).__name__}) has no closed form. Estimate it "
        "from samples: `p.kl_divergence(q, seed=key, num_samples=1000)` for a flow p, or "
        "`distrax.mc_estimate_kl(p, q, key, 1000)`."
    )


# The shortest path through both class hierarchies wins, so every pair with a flow is listed.
tfd.RegisterKL(FlowDistribution, FlowDistribution)(_refuse_kl)
for _other in (distrax.Transformed, tfd.TransformedDistribution):
    tfd.RegisterKL(FlowDistribution, _other)(_refuse_kl)
    tfd.RegisterKL(_other, FlowDistribution)(_refuse_kl)
