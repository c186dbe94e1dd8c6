"""Bounds from powers of importance weights: Renyi, importance-weighted, and chi."""

import dataclasses
from typing import ClassVar

import distrax
import jax
import jax.numpy as jnp

from flowvi.objectives.variational import (
    Batch,
    DensityAndState,
    Output,
    Params,
    Variational,
    density_and_state,
    finish,
    scale_cotangent,
    with_gradient,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PowerBound(Variational):
    """The common part of the bounds 1/s log (1/K sum_k w_k^s) with w = p(z, x) / q(z).

    Attributes:
        doubly: whether to take the doubly reparameterised gradient: with v = softmax(s log w),

                sum_k ((1 - s) v_k + s v_k^2) d log w_k / dz_k dz_k / dphi

            Its mean is that of the plain gradient, its variance does not grow with K, and it is
            zero where q equals the posterior. Parameters of the joint density get the plain one.
    """

    doubly: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized("fv.objectives.ScoreFunction")

    #: That of the bound in the loss: -1 for a lower bound.
    sign: ClassVar[int] = -1

    @property
    def _power(self) -> float:
        return 1.0

    def _log_weights(
        self, z: Array, q: distrax.Distribution, params: Params, key: Array, batch: Batch
    ) -> DensityAndState:
        z = self._guarded(z)
        log_joint, new = density_and_state(self.log_joint, params, key, z, batch)
        log_weights = log_joint - q.log_prob(z)
        if not self.skip_nonfinite:
            return log_weights, new
        # A draw of weight zero says nothing, in a mean of weights too.
        lowest = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
        return jnp.where(jnp.isneginf(lowest), jnp.finfo(lowest.dtype).min / 1e3, lowest), new

    def __call__(self, params: Params, key: Array, batch: Batch) -> Output:
        train_key, draw_key, model_key = jax.random.split(key, 3)
        q = self._approximation(params, train_key, batch)
        z = q.distribution.sample(seed=draw_key, sample_shape=self.num_samples)
        power = self._power
        if self.doubly:
            again = jax.random.clone(model_key)
            plain, _ = self._log_weights(z, q.frozen, params, again, batch)
            shares = jax.lax.stop_gradient(jax.nn.softmax(power * plain, axis=0))
            z = scale_cotangent(z, (1 - power) + power * shares)
        density = q.frozen if self.doubly else q.distribution
        log_weights, new = self._log_weights(z, density, params, model_key, batch)
        if not self.doubly:
            shares = jax.lax.stop_gradient(jax.nn.softmax(power * log_weights, axis=0))
        surrogate = jnp.sum(shares * log_weights, axis=0)
        log_mean = jax.nn.logsumexp(power * log_weights, axis=0) - jnp.log(self.num_samples)
        bound = with_gradient(log_mean / power, surrogate)
        metrics = {}
        if self.skip_nonfinite:
            low = log_weights <= jnp.finfo(log_weights.dtype).min / 1e3
            metrics["skipped"] = jnp.mean(low.astype(log_weights.dtype))
        loss = self.sign * self._mean(bound, None, batch)
        return finish(loss, metrics, params, {**q.new, **new})


@dataclasses.dataclass(frozen=True)
class Renyi(PowerBound):
    """Minus the Renyi bound of order alpha in nats, a mean over rows, as a loss for `fit`.

        L_alpha = 1 / (1 - alpha) log (1/K sum_k w_k^(1 - alpha)),   w = p(z, x) / q(z)

    It decreases in alpha from log p(x) at 0 (for K to infinity) through the ELBO, its limit at 1.
    Below 1 it punishes a q that leaves mass uncovered more than the ELBO does.

    Attributes:
        alpha: the order, at least 0 and not 1.

    Raises:
        ValueError: if `alpha` is not of this kind, or the family is not reparameterised.

    Source: Li, Turner, "Renyi Divergence Variational Inference", 2016; Tucker, Lawson, Gu,
    Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019.

    Example:
        >>> import jax, flowvi as fv
        >>> log_joint = lambda params, key, z, batch: -0.5 * (z**2).sum(-1)
        >>> loss_fn = fv.objectives.Renyi(fv.mean_field(2), log_joint, alpha=0.5, num_samples=8)
        >>> f"{loss_fn(loss_fn.init(jax.random.key(0)), jax.random.key(1), None):.4f}"
        '-1.8379'
    """

    alpha: float = dataclasses.field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0 or self.alpha == 1:
            raise ValueError(
                f"`alpha` must be at least 0 and not 1; got {self.alpha!r}. Perhaps use "
                "`fv.objectives.ELBO` for 1, and `fv.objectives.CUBO` for an upper bound?"
            )

    @property
    def _power(self) -> float:
        return 1 - self.alpha


@dataclasses.dataclass(frozen=True)
class IWELBO(PowerBound):
    """Minus the importance-weighted ELBO in nats, a mean over rows, as a loss for `fit`.

        L_K = log (1/K sum_k w_k),   w = p(z, x) / q(z)

    in expectation at most log p(x), and not decreasing in K; K = 1 is the ELBO.

    Raises:
        ValueError: if the family is not reparameterised.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016; Tucker, Lawson,
    Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019.

    Example:
        >>> import jax, flowvi as fv
        >>> log_joint = lambda params, key, z, batch: -0.5 * (z**2).sum(-1)
        >>> loss_fn = fv.objectives.IWELBO(fv.mean_field(2), log_joint, num_samples=8)
        >>> f"{loss_fn(loss_fn.init(jax.random.key(0)), jax.random.key(1), None):.4f}"
        '-1.8379'
    """


@dataclasses.dataclass(frozen=True)
class CUBO(PowerBound):
    """The chi upper bound in nats, a mean over rows, as a loss for `fit`.

        CUBO_n = 1/n log (1/K sum_k w_k^n),   w = p(z, x) / q(z)

    For K to infinity it is at least log p(x). It covers mass: a region that q misses makes weights
    large. At finite K it is biased downwards, and its gradient heavy-tailed; a draw in a missed
    region has to happen before it can act, so start wide.

    Attributes:
        order: n, above 1.

    Raises:
        ValueError: if `order` is not above 1, or the family is not reparameterised.

    Source: Dieng, Tran, Ranganath, Paisley, Blei, "Variational Inference via chi Upper Bound
    Minimization", 2017.

    Example:
        >>> import jax, flowvi as fv
        >>> log_joint = lambda params, key, z, batch: -0.5 * (z**2).sum(-1)
        >>> loss_fn = fv.objectives.CUBO(fv.mean_field(2), log_joint, num_samples=8)
        >>> f"{loss_fn(loss_fn.init(jax.random.key(0)), jax.random.key(1), None):.4f}"
        '1.8379'
    """

    sign: ClassVar[int] = 1

    order: float = dataclasses.field(default=2.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.order > 1:
            raise ValueError(f"`order` must be above 1; got {self.order!r}.")

    @property
    def _power(self) -> float:
        return self.order
