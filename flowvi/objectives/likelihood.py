"""Maximum likelihood, and the forward KL divergence, which covers mass."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi import devices
from flowvi.distributions import FlowDistribution
from flowvi.families import Family
from flowvi.objectives.variational import Loss, Output, Step, Variational, require
from flowvi.params import PyTree

Array = jax.Array

#: Rows that a held-out likelihood looks at together, so that its memory does not grow with theirs;
#: so few that a small network stays in one thread, from which the steps after it go on.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood:
    """The mean negative log likelihood of rows, in nats a row, as a loss for `fit`.

        loss = -1/n sum_i log p(x_i | context_i; params)

    A batch is a dict of "x", of shape [n, *event_shape], and, where the family takes a context,
    "context", of shape [n, *context_shape]. With "weight", of shape [n], each row counts so many
    times in the sum.

    Attributes:
        family: the family.
        training: whether to take the family's training form, with dropout and new `Fixed` leaves.
            The evaluation form goes through the rows in chunks.

    Source: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation",
    2017.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> loss_fn = fv.objectives.NegativeLogLikelihood(fv.standard_normal(2))
        >>> f"{loss_fn({}, jax.random.key(0), {'x': jnp.zeros((10, 2))}):.4f}"
        '1.8379'
    """

    family: Family
    training: bool = True

    def __call__(self, params: PyTree, key: Array, batch: dict[str, Array]) -> Output:
        weights = batch.get("weight", 1.0)
        if not self.training:
            return -jnp.mean(weights * held_out_log_probs(self.family, params, batch))
        distribution, new_params = self.family.train_distribution(params, key, batch.get("context"))
        loss = -jnp.mean(weights * distribution.log_prob(batch["x"]))
        return loss if new_params is params else (loss, {}, new_params)


def held_out_log_probs(family: Family, params: PyTree, batch: dict[str, Array]) -> Array:
    """log p(x_i | context_i) of the rows of a batch, in chunks and in the evaluation form."""

    def log_probs(rows: dict[str, Array]) -> Array:
        return family.distribution(params, rows.get("context")).log_prob(rows["x"])

    return devices.in_chunks(log_probs, batch, CHUNK)


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

    Raises:
        TypeError: if `proposal` is no family.

    Source: Bornschein, Bengio, "Reweighted Wake-Sleep", 2015.

    Example:
        >>> import jax, flowvi as fv
        >>> family = fv.full_rank(2)
        >>> log_joint = lambda p, key, z, x: -(z**2).sum(-1)
        >>> loss = fv.objectives.ForwardKL(family, log_joint, num_samples=8)
        >>> params = {"posterior": family.init(jax.random.key(0))}
        >>> jax.tree.leaves(loss(params, jax.random.key(1), None))[0].shape
        ()
    """

    _: dataclasses.KW_ONLY
    proposal: Family | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        is_one = self.proposal is None or isinstance(self.proposal, Family)
        require(is_one, "`proposal` must be a family or None", self.proposal, error=TypeError)

    def _loss(self, step: Step) -> Loss:
        z, log_r, log_q = self._draws(step)
        log_joint, new = step.density(self.log_joint, z)
        log_weights = log_joint - log_r
        good, metrics = self._good(log_weights)
        if good is not None:
            log_weights = jnp.where(good, log_weights, -jnp.inf)
        rows = cross_entropy(log_weights, log_q, self.proposal is None)
        return self._mean(rows, None, step.batch), metrics, new

    def _draws(self, step: Step) -> tuple[Array, Array, Array]:
        """(draws z of the proposal, log r(z), log q(z)), of which the last one has a gradient."""
        q, key = step.q, step.key
        if self.proposal is None:
            if isinstance(q.distribution, FlowDistribution):
                z, log_q, _ = q.distribution.sample_with_score(key, (self.num_samples,))
                return jax.lax.stop_gradient(z), jax.lax.stop_gradient(log_q), log_q
            proposal = q.frozen
        else:
            own = step.params["proposal"]
            own = own.value if hasattr(own, "value") else own
            context = q.context if self.proposal.context_shape is not None else None
            proposal = self.proposal.distribution(jax.lax.stop_gradient(own), context)
        z, log_r = proposal.sample_and_log_prob(seed=key, sample_shape=self.num_samples)
        z = jax.lax.stop_gradient(z)
        return z, log_r, q.distribution.log_prob(z)


def cross_entropy(log_weights: Array, log_q: Array, own: bool) -> Array:
    """-sum_k v_k log q(z_k), with v = softmax(log p(z_k) - log r(z_k)); `own` says whether r is q.

    See `ForwardKL`. Of arrays of shape [K, ...], one of shape [...].
    """
    shares = jax.lax.stop_gradient(jax.nn.softmax(log_weights, axis=0))
    total = jnp.sum(jnp.where(shares == 0, 0, shares * log_q), axis=0)
    if own:
        # A draw without weight counts here, unless q itself is not finite at it.
        noise = jnp.where(jnp.isfinite(log_q), log_q - jax.lax.stop_gradient(log_q), 0)
        total = total - jnp.mean(noise, axis=0)
    return -total
