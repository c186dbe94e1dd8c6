"""Bounds of the evidence: the ELBO, and powers of importance weights (Renyi, IWELBO, CUBO)."""

import dataclasses
from typing import ClassVar, Literal, get_args

import distrax
import jax
import jax.numpy as jnp

from flowvi.distributions import FlowDistribution, RelaxedDistribution, along
from flowvi.objectives import closed_form
from flowvi.objectives.variational import (
    Batch,
    Joint,
    Loss,
    Metrics,
    Params,
    Step,
    Variational,
    require,
    with_gradient,
)
from flowvi.params import Fixed

Array = jax.Array

KLRule = Literal["auto", "analytic", "sampled"]
Rates = tuple[Array | None, Array | None]


@dataclasses.dataclass(frozen=True)
class ELBO(Variational):
    """Minus the evidence lower bound in nats, a mean over rows, as a loss for `fit`.

        ELBO = E_q [log p(z, x) - log q(z)]

    estimated from K reparameterised draws of each row. Three forms of one number:

    - by default, gradients flow through the draws and through log q;
    - with `path`, through the draws alone. The other part has mean zero, but not variance zero: the
      gradient of the path vanishes draw by draw where q equals the posterior ("sticking the
      landing"). It needs the gradient of log q at the draws, which those of a flow bring with them;
    - where the joint density is a `Joint` whose prior has a closed KL divergence from q,
      ELBO = E_q log p(x | z) - KL(q || p(z)), with no noise in the second term. Of a flow z = f(u)
      whose base q_0 has one, the noise of the base leaves:

        KL(q || p) = KL(q_0 || p) + E_{q_0} [log p(u) - log p(f(u)) - log |det J f(u)|]

      `kl_rule` tells beforehand.

    Of a `Joint` the metrics are "rate" = KL(q || p(z)) and "distortion" = -E_q log p(x | z), and
    the loss may weigh them:

        loss = distortion + kl_weight min(1, step / warm_up) max(rate, free_bits)

    Attributes:
        path: whether to take the path gradient.
        kl: "analytic", "sampled", or "auto": analytic where it exists and `path` is not asked for.
        kl_weight: the weight of the rate; 1 for the ELBO.
        warm_up: over so many steps, counted in params["control"], the weight rises from zero.
        free_bits: a rate in nats, as a mean over rows, below which there is no pressure on it.

    Raises:
        ValueError: if an option needs a `Joint`, or clashes with another one.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014; Roeder, Wu, Duvenaud,
    "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference",
    2017; the weight, Higgins et al., "beta-VAE", 2017; the warm-up, Bowman et al., "Generating
    Sentences from a Continuous Space", 2016; free bits, Kingma et al., "Improving Variational
    Inference with Inverse Autoregressive Flow", 2016.

    Example:
        >>> import jax, flowvi as fv
        >>> log_joint = lambda params, key, z, batch: -0.5 * (z**2).sum(-1)
        >>> loss_fn = fv.objectives.ELBO(fv.mean_field(2), log_joint, num_samples=8, path=True)
        >>> loss = loss_fn(loss_fn.init(jax.random.key(0)), jax.random.key(1), None)
        >>> f"{loss:.4f}"  # minus the log of the normalising constant, 2 pi
        '-1.8379'
    """

    _: dataclasses.KW_ONLY
    path: bool = False
    kl: KLRule = "auto"
    kl_weight: float = 1.0
    warm_up: int = 0
    free_bits: float = 0.0

    takes_relaxed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized()
        check_kl_rule(self.kl)
        is_joint, is_analytic = isinstance(self.log_joint, Joint), self.kl == "analytic"
        clash = is_analytic and self.path
        require(not clash, '`kl` must be "auto" or "sampled" with `path`', self.kl)
        rule = "`log_joint` must be a `Joint` for"
        require(is_joint or not is_analytic, f'{rule} `kl="analytic"`', self.log_joint)
        for name, default in (("kl_weight", 1), ("free_bits", 0), ("warm_up", 0)):
            value = getattr(self, name)
            require(value >= 0, f"`{name}` must be at least 0", value)
            require(is_joint or value == default, f"{rule} `{name}`", self.log_joint)

    def init(self, key: Array) -> Params:
        params = super().init(key)
        steps = Fixed(jnp.zeros((), jnp.int32))
        return {**params, "control": {"step": steps}} if self.warm_up else params

    def kl_rule(self, params: Params, batch: Batch = None) -> str:
        """Which rule holds for these parameters: "analytic", "base" (of a flow), or "sampled"."""

        def closed(params: Params, batch: Batch) -> Rates:
            q = self._approximation(params, jax.random.key(0), batch).distribution
            return self._closed_kls(q, params, batch)

        whole, base = jax.eval_shape(closed, params, batch)
        return "analytic" if whole is not None else "sampled" if base is None else "base"

    def _closed_kls(self, q: distrax.Distribution, params: Params, batch: Batch) -> Rates:
        """The KL divergence from the prior, of q and of the base of a flow, where it is closed."""
        whole = self._closed_kl(q, params, batch)
        if whole is not None or not isinstance(q, FlowDistribution):
            return whole, None
        return None, self._closed_kl(q.distribution, params, batch)

    def _closed_kl(self, q: distrax.Distribution, params: Params, batch: Batch) -> Array | None:
        if not isinstance(self.log_joint, Joint):
            return None
        relaxed, sampled = isinstance(q, RelaxedDistribution), self.path or self.kl == "sampled"
        rule = '`kl` must be "auto" or "analytic", and `path` False, for a relaxed family'
        got = f"kl={self.kl!r}, path={self.path}"
        require(not (relaxed and sampled), rule, got, say=str)
        if sampled:
            return None
        try:
            prior = self.log_joint.prior_distribution(params, batch)
            return closed_form.kl_divergence(q, prior)
        except NotImplementedError as error:
            if relaxed:
                rule = "`prior` must have a KL divergence in closed form from the discrete family"
                got = (
                    f"got {self.log_joint.prior!r}. Perhaps use `fv.unconditional` of that family?"
                )
                raise ValueError(f"{rule} behind a relaxed one; {got}") from error
            if self.kl == "analytic":
                raise
            return None

    def _weight(self, params: Params) -> tuple[float | Array, Params]:
        """The weight of the rate in this step, and the count of steps after it."""
        if not self.warm_up:
            return self.kl_weight, {}
        done = params["control"]["step"].value + 1
        weight = self.kl_weight * jnp.minimum(done / self.warm_up, 1.0)
        return weight, {"control": {**params["control"], "step": Fixed(done)}}

    def _draws(self, step: Step, base: Array | None, closed: bool) -> tuple[Array, Array]:
        """(draws, log q), where log q is 0 if nobody needs it."""
        q, key, count = step.q.distribution, step.key, self.num_samples
        if base is not None and isinstance(self.log_joint, Joint):
            # The base is integrated exactly, and what the flow adds to it is sampled.
            u, z, log_det = q.sample_with_base(key, count)
            prior = self.log_joint.prior_distribution(step.params, step.batch)
            return self._guarded(z), base[None] + prior.log_prob(u) - log_det
        if self.path and isinstance(q, FlowDistribution):
            z, log_q, score = q.sample_with_score(key, (count,))
            z = self._guarded(z)
            path = along(z, score, len(self.family.event_shape))
            return z, jax.lax.stop_gradient(log_q) + path
        if self.path or closed:
            z = self._guarded(q.sample(seed=key, sample_shape=count))
            return z, step.q.frozen.log_prob(z) if self.path else jnp.zeros(())
        z, log_q = q.sample_and_log_prob(seed=key, sample_shape=count)
        return self._guarded(z), log_q

    def _loss(self, step: Step) -> Loss:
        batch = step.batch
        closed, base = self._closed_kls(step.q.distribution, step.params, batch)
        z, log_q = self._draws(step, base, closed is not None)
        if closed is not None and isinstance(self.log_joint, Joint):
            terms, new = step.density(self.log_joint.log_likelihood, z)
            good, metrics = self._good(terms)
            rate = self._mean(closed, None, batch)
        else:
            terms, rates, new = self._terms(step, z, log_q)
            good, metrics = self._good(terms - rates)
            if not isinstance(self.log_joint, Joint):
                return -self._mean(terms - rates, good, batch), metrics, new
            rate = self._mean(rates, good, batch)
        distortion = -self._mean(terms, good, batch)
        weight, control = self._weight(step.params)
        # A rate of few draws may be negative, and must stay so where no bits are free.
        charged = jnp.maximum(rate, self.free_bits) if self.free_bits else rate
        metrics = {**metrics, "rate": rate, "distortion": distortion}
        return distortion + weight * charged, metrics, {**new, **control}


def check_kl_rule(kl: str) -> None:
    """Checks that there is such a rule."""
    require(kl in get_args(KLRule), f"`kl` must be one of {', '.join(get_args(KLRule))}", kl)


@dataclasses.dataclass(frozen=True)
class PowerBound(Variational):
    """The common part of the bounds 1/s log (1/K sum_k w_k^s) with w = p(z, x) / q(z).

    Attributes:
        doubly: whether to take the doubly reparameterised gradient: with v = softmax(s log w),

                sum_k ((1 - s) v_k + s v_k^2) d log w_k / dz_k dz_k / dphi

            Its mean is that of the plain gradient, its variance does not grow with K, and it is
            zero where q equals the posterior. Parameters of the joint density get the plain one.
    """

    _: dataclasses.KW_ONLY
    doubly: bool = True

    #: That of the bound in the loss: -1 for a lower bound.
    sign: ClassVar[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized()

    @property
    def _power(self) -> float:
        return 1.0

    def _loss(self, step: Step) -> Loss:
        q, power = step.q, self._power

        def weights_at(z: Array, q: distrax.Distribution) -> tuple[Array, Array, Metrics, Params]:
            z = self._guarded(z)
            log_joint, new = step.density(self.log_joint, z)
            log_weights = log_joint - q.log_prob(z)
            good, metrics = self._good(log_weights)
            if good is not None:
                # A draw of weight zero says nothing, in a mean of weights too.
                least = jnp.finfo(log_weights.dtype).min / 1e3
                log_weights = jnp.where(good, log_weights, least)
            shares = jax.lax.stop_gradient(jax.nn.softmax(power * log_weights, axis=0))
            log_mean = jax.nn.logsumexp(power * log_weights, axis=0) - jnp.log(self.num_samples)
            bound = with_gradient(log_mean / power, jnp.sum(shares * log_weights, axis=0))
            return shares, bound, metrics, new

        z = q.distribution.sample(seed=step.key, sample_shape=self.num_samples)
        if self.doubly:
            scale = (1 - power) + power * weights_at(z, q.frozen)[0]
            scale = scale.reshape(scale.shape + (1,) * (z.ndim - scale.ndim))
            # z, whose gradient is multiplied by the scale.
            z = jax.lax.stop_gradient(z) + scale * (z - jax.lax.stop_gradient(z))
        _, bound, metrics, new = weights_at(z, q.frozen if self.doubly else q.distribution)
        return self.sign * self._mean(bound, None, step.batch), metrics, new


@dataclasses.dataclass(frozen=True)
class Renyi(PowerBound):
    """Minus the Renyi bound of order alpha in nats, a mean over rows, as a loss for `fit`.

        L_alpha = 1 / (1 - alpha) log (1/K sum_k w_k^(1 - alpha)),   w = p(z, x) / q(z)

    It decreases in alpha from log p(x) at 0 (for K to infinity) through the ELBO, its limit at 1.
    Below 1 it punishes a q that leaves mass uncovered more than the ELBO does.

    Attributes:
        alpha: the order, at least 0 and not 1.

    Raises:
        ValueError: if `alpha` is below 0, or 1.

    Source: Li, Turner, "Renyi Divergence Variational Inference", 2016; Tucker, Lawson, Gu,
    Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019.

    Example:
        >>> import jax, flowvi as fv
        >>> family = fv.full_rank(2)
        >>> loss = fv.objectives.Renyi(family, lambda p, key, z, x: -(z**2).sum(-1), alpha=0.5)
        >>> loss({"posterior": family.init(jax.random.key(0))}, jax.random.key(1), None).shape
        ()
    """

    _: dataclasses.KW_ONLY
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "Perhaps use `fv.objectives.ELBO` for 1, and `CUBO` for an upper bound?"
        is_order = self.alpha >= 0 and self.alpha != 1
        require(is_order, "`alpha` must be at least 0 and not 1", self.alpha, fix)

    @property
    def _power(self) -> float:
        return 1 - self.alpha


@dataclasses.dataclass(frozen=True)
class IWELBO(PowerBound):
    """Minus the importance-weighted ELBO in nats, a mean over rows, as a loss for `fit`.

        L_K = log (1/K sum_k w_k),   w = p(z, x) / q(z)

    in expectation at most log p(x), and not decreasing in K; K = 1 is the ELBO.

    Attributes:
        num_samples: K; the other fields are those of `Variational`.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016; Tucker, Lawson,
    Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019.

    Example:
        >>> import jax, flowvi as fv
        >>> family = fv.full_rank(2)
        >>> loss = fv.objectives.IWELBO(family, lambda p, key, z, x: -(z**2).sum(-1), num_samples=8)
        >>> loss({"posterior": family.init(jax.random.key(0))}, jax.random.key(1), None).shape
        ()
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
        ValueError: if `order` is not above 1.

    Source: Dieng, Tran, Ranganath, Paisley, Blei, "Variational Inference via chi Upper Bound
    Minimization", 2017.

    Example:
        >>> import jax, flowvi as fv
        >>> fv.objectives.CUBO(
        ...     fv.full_rank(2), lambda params, key, z, batch: -(z**2).sum(-1), order=2
        ... )({"posterior": fv.full_rank(2).init(jax.random.key(0))}, jax.random.key(1), None).shape
        ()
    """

    _: dataclasses.KW_ONLY
    order: float = 2.0

    sign: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.order > 1, "`order` must be above 1", self.order)

    @property
    def _power(self) -> float:
        return self.order
