"""The evidence lower bound."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowvi.objectives import closed_form
from flowvi.objectives.variational import Joint, Variational, finish

Array = jax.Array

KL_RULES = ("auto", "analytic", "sampled")


@dataclasses.dataclass(frozen=True)
class ELBO(Variational):
    """Minus the evidence lower bound in nats, a mean over rows, as a loss for `fit`.

        ELBO = E_q [log p(z, x) - log q(z)]

    estimated from K reparameterised draws of each row. Three forms of one number:

    - by default, gradients flow through the draws and through log q;
    - with `path`, through the draws alone. The other part has mean zero, but not variance zero: the
      gradient of the path vanishes draw by draw where q equals the posterior ("sticking the
      landing"). It needs the log density of q at given points, for which all flows here have both
      directions cheap;
    - where the joint density is a `Joint` whose prior has a closed KL divergence from q,
      ELBO = E_q log p(x | z) - KL(q || p(z)), with no noise in the second term. The metrics then
      are "kl" and "log_likelihood"; `kl_rule` tells beforehand.

    Attributes:
        path: whether to take the path gradient.
        kl: "analytic", "sampled", or "auto": analytic where it exists and `path` is not asked for.

    Raises:
        ValueError: if the family is not reparameterised, `kl` is unknown, or "analytic" is asked
            for together with `path`.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014; Roeder, Wu, Duvenaud,
    "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference",
    2017.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> def log_joint(params, key, z, batch):
        ...     return -0.5 * jnp.sum(z**2, -1)
        >>> loss_fn = fv.objectives.ELBO(fv.mean_field(2), log_joint, num_samples=8, path=True)
        >>> loss = loss_fn(loss_fn.init(jax.random.key(0)), jax.random.key(1), None)
        >>> f"{loss:.4f}"  # minus the log of the normalising constant, 2 pi
        '-1.8379'
    """

    path: bool = dataclasses.field(default=False, kw_only=True)
    kl: str = dataclasses.field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized("fv.objectives.ScoreFunction")
        if self.kl not in KL_RULES:
            raise ValueError(f"`kl` must be one of {', '.join(KL_RULES)}; got {self.kl!r}.")
        if self.kl == "analytic" and self.path:
            raise ValueError('`kl` must be "auto" or "sampled" with `path`; got "analytic".')
        if self.kl == "analytic" and not isinstance(self.log_joint, Joint):
            raise ValueError(
                '`log_joint` must be a `Joint` for `kl="analytic"`, so that the prior is known; '
                f"got {self.log_joint!r}."
            )

    def kl_rule(self, params: Any, batch: Any = None) -> str:
        """Which rule holds for these parameters and this batch: "analytic" or "sampled"."""
        key = jax.random.key(0)
        output = jax.eval_shape(self, params, key, batch)
        return "analytic" if isinstance(output, tuple) and "kl" in output[1] else "sampled"

    def _closed_kl(self, distribution: Any, params: Any) -> Array | None:
        if self.path or self.kl == "sampled" or not isinstance(self.log_joint, Joint):
            return None
        try:
            return closed_form.kl_divergence(
                distribution, self.log_joint.prior_distribution(params)
            )
        except NotImplementedError:
            if self.kl == "analytic":
                raise
            return None

    def __call__(self, params: Any, key: Array, batch: Any) -> Any:
        """The loss, with metrics and parameters where there are any."""
        train_key, draw_key, model_key = jax.random.split(key, 3)
        q = self._approximation(params, train_key, batch)
        kl = self._closed_kl(q.distribution, params)
        if kl is not None and isinstance(self.log_joint, Joint):
            z = q.distribution.sample(seed=draw_key, sample_shape=self.num_samples)
            terms = self.log_joint.log_likelihood(params, model_key, self._guarded(z), batch)
            likelihood, metrics = self._averaged(terms)
            kl = jnp.mean(kl)
            metrics = {**metrics, "kl": kl, "log_likelihood": likelihood}
            return finish(kl - likelihood, metrics, params, q.new)
        if self.path:
            z = self._guarded(q.distribution.sample(seed=draw_key, sample_shape=self.num_samples))
            log_q = q.frozen.log_prob(z)
        else:
            z, log_q = q.distribution.sample_and_log_prob(
                seed=draw_key, sample_shape=self.num_samples
            )
            z = self._guarded(z)
        elbo, metrics = self._averaged(self.log_joint(params, model_key, z, batch) - log_q)
        return finish(-elbo, metrics, params, q.new)
