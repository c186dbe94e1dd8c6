"""The score function: gradients where draws carry none."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi import distributions
from flowvi.objectives.controls import ControlVariate, Draws, LeaveOneOut
from flowvi.objectives.variational import (
    Approximation,
    Batch,
    Output,
    Params,
    Variational,
    density_and_state,
    finish,
    with_gradient,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ScoreFunction(Variational):
    """Minus the ELBO in nats, a mean over rows, with the score function's gradient.

        d ELBO / d phi = E_q [f(z) d log q(z) / d phi],   f = log p(z, x) - log q(z)

    It asks nothing of q but a density, so it serves discrete variables too. Its variance is large;
    control variates make it bearable. Where a draw is made of choices c and of points that are
    reparameterised, as that of a mixture is or of a `fv.joint` with a discrete member, the score is
    that of the choices, and the points move:

        d ELBO / d phi = E [f(z) d log q(c) / d phi + df/dz dz/dphi]

    Attributes:
        controls: control variates, applied in this order; see `flowvi.objectives.controls`. Their
            states are params["control"], which `init` makes.
        path: whether points move. By default they do, unless the family is reparameterised
            throughout, for which no score would be left.

    Raises:
        TypeError: if one of `controls` is none.
        ValueError: if there are control variates where `path` leaves no score term.

    Source: Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning", 1992; Ranganath, Gerrish, Blei, "Black Box Variational Inference",
    2014; both parts together, Schulman, Heess, Weber, Abbeel, "Gradient Estimation Using Stochastic
    Computation Graphs", 2015.

    Example:
        >>> import jax, flowvi as fv
        >>> log_joint = lambda params, key, z, batch: -0.5 * (z**2).sum(-1)
        >>> loss_fn = fv.objectives.ScoreFunction(fv.mean_field(2), log_joint, num_samples=8)
        >>> loss, metrics, params = loss_fn(
        ...     loss_fn.init(jax.random.key(0)), jax.random.key(1), None
        ... )
        >>> f"{loss:.4f}"
        '-1.8379'
    """

    controls: tuple[ControlVariate, ...] = dataclasses.field(default=(LeaveOneOut(),), kw_only=True)
    path: bool | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for control in self.controls:
            if not (hasattr(control, "init") and hasattr(control, "apply")):
                raise TypeError(
                    "`controls` must be control variates, such as "
                    f"`fv.objectives.LeaveOneOut()`; got {control!r}."
                )

    @property
    def _moves(self) -> bool:
        return not self.family.reparameterized if self.path is None else self.path

    @property
    def _has_score(self) -> bool:
        return not (self._moves and self.family.reparameterized)

    def init(self, key: Array) -> Params:
        key, *keys = jax.random.split(key, 1 + len(self.controls))
        control = tuple(c.init(k) for c, k in zip(self.controls, keys, strict=True))
        return {**super().init(key), "control": control}

    def _draws(self, q: Approximation, key: Array) -> tuple[Array, Array]:
        """Draws, and the log probability whose gradient is the score."""
        if self._moves:
            shape, flag = (self.num_samples,), self.family.reparameterized
            z, log_choice = distributions.draw(q.distribution, key, shape, reparameterized=flag)
            return (self._guarded(z) if jnp.issubdtype(z.dtype, jnp.floating) else z), log_choice
        z = jax.lax.stop_gradient(q.frozen.sample(seed=key, sample_shape=self.num_samples))
        return z, q.distribution.log_prob(z)

    def __call__(self, params: Params, key: Array, batch: Batch) -> Output:
        train_key, draw_key, model_key = jax.random.split(key, 3)
        q = self._approximation(params, train_key, batch)
        z, log_choice = self._draws(q, draw_key)
        # The score of the point itself has mean zero, so it is left out.
        log_q = q.frozen.log_prob(z)
        log_joint, new_joint = density_and_state(self.log_joint, params, model_key, z, batch)
        raw = jax.lax.stop_gradient(log_joint - log_q)
        good = jnp.isfinite(raw) if self.skip_nonfinite else jnp.ones(raw.shape, bool)
        count = jnp.maximum(jnp.sum(good), 1)
        middle = jnp.sum(jnp.where(good, raw, 0)) / count
        # A draw that is skipped takes the mean signal, and no part in the sums below.
        signal = jnp.where(good, raw, middle)

        def signal_at(z: Array) -> Array:
            again = jax.random.clone(model_key)
            log_joint, _ = density_and_state(self.log_joint, params, again, z[None], batch)
            return (log_joint - q.frozen.log_prob(z[None]))[0]

        draws = Draws(q.frozen, q.context, signal_at)
        states, baseline_loss = [], jnp.zeros(())
        for control, state in zip(self.controls, params.get("control", ()), strict=True):
            signal, new, loss = control.apply(state, signal, draws)
            states.append(new)
            baseline_loss += loss
        terms = jax.lax.stop_gradient(signal) * log_choice + log_joint - log_q
        surrogate = jnp.sum(jnp.where(good, self._weighted(terms, batch), 0)) / count
        value = jnp.sum(jnp.where(good, self._weighted(raw, batch), 0)) / count
        value = jnp.where(jnp.any(good), value, jnp.nan)
        loss = with_gradient(-value + baseline_loss * 0, -surrogate + baseline_loss)
        metrics = {"baseline_loss": baseline_loss}
        if self.skip_nonfinite:
            metrics["skipped"] = 1 - jnp.mean(good.astype(raw.dtype))
        return finish(loss, metrics, params, {**q.new, **new_joint, "control": tuple(states)})
