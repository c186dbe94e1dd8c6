"""The evidence lower bound."""

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
    Output,
    Params,
    Variational,
    density_and_state,
    finish,
)
from flowvi.params import Fixed

Array = jax.Array

KLRule = Literal["auto", "analytic", "sampled"]


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

    Of a `Joint` the metrics are the two terms, "rate" = KL(q || p(z)) and "distortion" =
    -E_q log p(x | z), and the loss may weigh them:

        loss = distortion + kl_weight min(1, step / warm_up) max(rate, free_bits)

    Attributes:
        path: whether to take the path gradient.
        kl: "analytic", "sampled", or "auto": analytic where it exists and `path` is not asked for.
        kl_weight: the weight of the rate; 1 for the ELBO.
        warm_up: over so many steps the weight rises from zero. They are counted in
            params["control"].
        free_bits: a rate in nats, as a mean over rows, below which there is no pressure on it.

    Raises:
        ValueError: if the family is not reparameterised, `kl` is unknown, "analytic" is asked for
            together with `path`, or a number is negative.

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

    path: bool = dataclasses.field(default=False, kw_only=True)
    kl: KLRule = dataclasses.field(default="auto", kw_only=True)
    kl_weight: float = dataclasses.field(default=1.0, kw_only=True)
    warm_up: int = dataclasses.field(default=0, kw_only=True)
    free_bits: float = dataclasses.field(default=0.0, kw_only=True)

    takes_relaxed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized("fv.objectives.ScoreFunction")
        if self.kl not in get_args(KLRule):
            raise ValueError(f"`kl` must be one of {', '.join(get_args(KLRule))}; got {self.kl!r}.")
        if self.kl == "analytic" and self.path:
            raise ValueError('`kl` must be "auto" or "sampled" with `path`; got "analytic".')
        for name in ("kl_weight", "free_bits", "warm_up"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0; got {getattr(self, name)!r}.")
        needs = {
            'kl="analytic"': self.kl == "analytic",
            "kl_weight": self.kl_weight != 1,
            "warm_up": self.warm_up != 0,
            "free_bits": self.free_bits != 0,
        }
        for name, needed in needs.items():
            if needed and not isinstance(self.log_joint, Joint):
                raise ValueError(
                    f"`log_joint` must be a `Joint` for `{name}`, so that the prior is known; got "
                    f"{self.log_joint!r}."
                )

    def init(self, key: Array) -> Params:
        params = super().init(key)
        steps = Fixed(jnp.zeros((), jnp.int32))
        return {**params, "control": {"step": steps}} if self.warm_up else params

    def kl_rule(self, params: Params, batch: Batch = None) -> str:
        """Which rule holds for these parameters and this batch.

        Returns:
            "analytic"; "base", where the base of a flow has a closed KL divergence; or "sampled".
        """

        def closed(params: Params, batch: Batch) -> tuple[Array | None, Array | None]:
            q = self._approximation(params, jax.random.key(0), batch).distribution
            return self._closed_kl(q, params), self._base_kl(q, params)

        whole, base = jax.eval_shape(closed, params, batch)
        return "analytic" if whole is not None else "sampled" if base is None else "base"

    def _closed_kl(self, distribution: distrax.Distribution, params: Params) -> Array | None:
        relaxed = isinstance(distribution, RelaxedDistribution)
        if not isinstance(self.log_joint, Joint):
            return None
        if relaxed and (self.path or self.kl == "sampled"):
            raise ValueError(
                '`kl` must be "auto" or "analytic" and `path` False for a relaxed family, whose '
                f"rate is that of the discrete one; got kl={self.kl!r}, path={self.path}."
            )
        if self.path or self.kl == "sampled":
            return None
        try:
            return closed_form.kl_divergence(
                distribution, self.log_joint.prior_distribution(params)
            )
        except NotImplementedError as error:
            if relaxed:
                raise ValueError(
                    "`prior` must have a KL divergence in closed form from the discrete family "
                    f"behind a relaxed one; got {self.log_joint.prior!r}. Perhaps use "
                    "`fv.unconditional` of that family?"
                ) from error
            if self.kl == "analytic":
                raise
            return None

    def _base_kl(self, distribution: distrax.Distribution, params: Params) -> Array | None:
        """That of the base of a flow."""
        if not isinstance(distribution, FlowDistribution):
            return None
        return self._closed_kl(distribution.distribution, params)

    def _weight(self, params: Params) -> tuple[float | Array, Params]:
        """The weight of the rate in this step, and the count of steps after it."""
        if not self.warm_up:
            return self.kl_weight, {}
        done = params["control"]["step"].value + 1
        weight = self.kl_weight * jnp.minimum(done / self.warm_up, 1.0)
        return weight, {"control": {**params["control"], "step": Fixed(done)}}

    def __call__(self, params: Params, key: Array, batch: Batch) -> Output:
        train_key, draw_key, model_key = jax.random.split(key, 3)
        q = self._approximation(params, train_key, batch)
        closed = self._closed_kl(q.distribution, params)
        base = self._base_kl(q.distribution, params) if closed is None else None
        if base is not None:
            # The base is integrated exactly, and what the flow adds to it is sampled.
            x, z, log_det = q.distribution.sample_with_base(draw_key, self.num_samples)
        elif self.path and isinstance(q.distribution, FlowDistribution):
            z, log_q, score = q.distribution.sample_with_score(draw_key, (self.num_samples,))
            rank = len(self.family.event_shape)
            log_q = jax.lax.stop_gradient(log_q) + along(self._guarded(z), score, rank)
        elif self.path or closed is not None:
            z = q.distribution.sample(seed=draw_key, sample_shape=self.num_samples)
            log_q = q.frozen.log_prob(self._guarded(z)) if self.path else jnp.zeros(())
        else:
            z, log_q = q.distribution.sample_and_log_prob(
                seed=draw_key, sample_shape=self.num_samples
            )
        z = self._guarded(z)
        if not isinstance(self.log_joint, Joint):
            log_joint, new = density_and_state(self.log_joint, params, model_key, z, batch)
            good, metrics = self._good(log_joint - log_q)
            elbo = self._mean(log_joint - log_q, good, batch)
            return finish(-elbo, metrics, params, {**q.new, **new})
        terms, new = density_and_state(self.log_joint.log_likelihood, params, model_key, z, batch)
        if closed is None:
            prior = self.log_joint.prior_distribution(params)
            if base is None:
                rates = log_q - prior.log_prob(z)
            else:
                rates = base[None] + prior.log_prob(x) - prior.log_prob(z) - log_det
            good, metrics = self._good(terms - rates)
            rate = self._mean(rates, good, batch)
        else:
            good, metrics = self._good(terms)
            rate = self._mean(closed, None, batch)
        distortion = -self._mean(terms, good, batch)
        weight, control = self._weight(params)
        # A rate of few draws may be negative, and must stay so where no bits are free.
        charged = jnp.maximum(rate, self.free_bits) if self.free_bits else rate
        loss = distortion + weight * charged
        metrics = {**metrics, "rate": rate, "distortion": distortion}
        return finish(loss, metrics, params, {**q.new, **new, **control})
