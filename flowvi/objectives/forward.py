"""The forward KL divergence, which covers mass."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi.distributions import FlowDistribution
from flowvi.families import Family
from flowvi.objectives.variational import (
    Approximation,
    Batch,
    Output,
    Params,
    Variational,
    density_and_state,
    finish,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ForwardKL(Variational):
    """The cross entropy -E_p log q in nats, a mean over rows, as a loss for `fit`.

    It is KL(p || q) up to the entropy of the posterior p. The expectation is taken under K draws
    z_k of a proposal r, by self-normalised weights:

        loss = -sum_k v_k log q(z_k),   v = softmax(log p(z, x) - log r(z))

    with r = q itself, frozen, unless `proposal` is given. Its bias is of order 1/K. Neither
    the weights nor the draws carry gradients, so parameters of the joint density get none, and q
    need not be reparameterised. The gradient for r = q is that of

        -sum_k (v_k - 1 / K) log q(z_k)

    as E_q of the gradient of log q is zero: so its noise vanishes at q = p. Where draws of the
    posterior are at hand, `NegativeLogLikelihood(family)` is the forward KL from them.

    Attributes:
        proposal: the family of r, with parameters params["proposal"], which get no gradient (wrap
            them in `Fixed`); None for q.

    Source: Bornschein, Bengio, "Reweighted Wake-Sleep", 2015.

    Example:
        >>> import jax, flowvi as fv
        >>> log_joint = lambda params, key, z, batch: -0.5 * (z**2).sum(-1)
        >>> loss_fn = fv.objectives.ForwardKL(fv.mean_field(1), log_joint, num_samples=4096)
        >>> loss = loss_fn(loss_fn.init(jax.random.key(0)), jax.random.key(1), None)
        >>> abs(float(loss) - 1.4189) < 0.05  # the entropy of a standard normal
        True
    """

    proposal: Family | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.proposal is None or isinstance(self.proposal, Family)):
            raise TypeError(f"`proposal` must be a family or None; got {self.proposal!r}.")

    def __call__(self, params: Params, key: Array, batch: Batch) -> Output:
        train_key, draw_key, model_key = jax.random.split(key, 3)
        q = self._approximation(params, train_key, batch)
        z, log_r, log_q = self._draws(q, params, draw_key)
        log_joint, new = density_and_state(self.log_joint, params, model_key, z, batch)
        log_weights = log_joint - log_r
        metrics = {}
        if self.skip_nonfinite:
            good = jnp.isfinite(log_weights)
            log_weights = jnp.where(good, log_weights, -jnp.inf)
            metrics["skipped"] = 1 - jnp.mean(good.astype(log_weights.dtype))
        loss = self._mean(cross_entropy(log_weights, log_q, self.proposal is None), None, batch)
        return finish(loss, metrics, params, {**q.new, **new})

    def _draws(self, q: Approximation, params: Params, key: Array) -> tuple[Array, Array, Array]:
        """(draws z of the proposal, log r(z), log q(z)), of which the last one has a gradient."""
        if self.proposal is None:
            if isinstance(q.distribution, FlowDistribution):
                z, log_q, _ = q.distribution.sample_with_score(key, (self.num_samples,))
                return jax.lax.stop_gradient(z), jax.lax.stop_gradient(log_q), log_q
            proposal = q.frozen
        else:
            own = params["proposal"]
            own = own.value if hasattr(own, "value") else own
            context = q.context if self.proposal.context_shape is not None else None
            proposal = self.proposal.distribution(jax.lax.stop_gradient(own), context)
        z, log_r = proposal.sample_and_log_prob(seed=key, sample_shape=self.num_samples)
        z = jax.lax.stop_gradient(z)
        return z, log_r, q.distribution.log_prob(z)


def cross_entropy(log_weights: Array, log_q: Array, own: bool) -> Array:
    """-sum_k v_k log q(z_k), with v = softmax(log_weights) frozen; see `ForwardKL`.

    Args:
        log_weights: log p(z_k) - log r(z_k), of shape [K, ...].
        log_q: log q(z_k), of the same shape.
        own: whether r is q.

    Returns:
        An array of shape [...].
    """
    shares = jax.lax.stop_gradient(jax.nn.softmax(log_weights, axis=0))
    total = jnp.sum(jnp.where(shares == 0, 0, shares * log_q), axis=0)
    if own:
        # A draw without weight counts here, unless q itself is not finite at it.
        noise = jnp.where(jnp.isfinite(log_q), log_q - jax.lax.stop_gradient(log_q), 0)
        total = total - jnp.mean(noise, axis=0)
    return -total
