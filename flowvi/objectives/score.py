"""The score function: gradients where draws carry none, and control variates that compose.

A control variate turns the learning signal f of a draw into another whose product with the score
has the same mean, up to a positive factor, and less variance. Each is a frozen dataclass with

    init(key) -> state                              a pytree; what only it may move is in `Fixed`
    apply(state, signal, draws) -> (signal, state, loss)

where `loss` is what its own parameters are to minimise, or 0. `ScoreFunction` applies a tuple of
them in order, and keeps their states in params["control"].
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import distrax
import jax
import jax.numpy as jnp

from flowvi import distributions
from flowvi.networks import Network
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
from flowvi.params import Fixed, PyTree

Array = jax.Array


class Draws(NamedTuple):
    """What a control variate may look at.

    Attributes:
        distribution: q, to whose parameters no gradient flows.
        context: the context of q, or None.
        signal_at: z of shape [*batch, *event] -> the learning signal there, of shape [*batch].
    """

    distribution: distrax.Distribution
    context: Array | None
    signal_at: Callable[[Array], Array]


class ControlVariate(Protocol):
    """What `ScoreFunction` asks of a control variate: hashable."""

    def init(self, key: Array) -> PyTree:
        """Fresh state."""

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> tuple[Array, PyTree, Array]:
        """(new signal, new state, loss) for a signal of shape [num_samples, *batch]."""


class _Stateless:
    def init(self, key: Array) -> PyTree:
        del key
        return ()


@dataclasses.dataclass(frozen=True)
class _Running:
    """A number of past steps, averaged with weights that decay."""

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"`decay` must be between 0 and 1; got {self.decay!r}.")

    def init(self, key: Array) -> PyTree:
        del key
        return Fixed({"mean": jnp.zeros(()), "weight": jnp.zeros(())})

    def _add(self, state: Fixed, value: Array) -> Fixed:
        """The state after one more step."""
        old = state.value
        value = jax.lax.stop_gradient(value).astype(old["mean"].dtype)
        return Fixed(
            {
                "mean": self.decay * old["mean"] + (1 - self.decay) * value,
                "weight": self.decay * old["weight"] + (1 - self.decay),
            }
        )

    def _current(self, state: Fixed, otherwise: Array) -> Array:
        """The average so far, or another number before there is one."""
        mean, weight = state.value["mean"], state.value["weight"]
        return jnp.where(weight > 0, mean / jnp.maximum(weight, 1e-12), otherwise)


@dataclasses.dataclass(frozen=True)
class RunningMean(_Running):
    """Subtracts the mean signal of past steps, which no draw of this one has touched.

    Attributes:
        decay: the weight of the past in a step, between 0 and 1.

    Source: Mnih, Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014.
    """

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> tuple[Array, PyTree, Array]:
        del draws
        mean = self._current(state, jnp.zeros(()))
        return signal - mean, self._add(state, jnp.mean(signal)), jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class RunningScale(_Running):
    """Divides by the standard deviation of past steps' signals, where that is above 1.

    It changes the length of a step, not its mean direction.

    Attributes:
        decay: the weight of the past in a step, between 0 and 1.

    Source: Mnih, Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014.
    """

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> tuple[Array, PyTree, Array]:
        del draws
        scale = jnp.sqrt(jnp.maximum(self._current(state, jnp.ones(())), 1))
        return signal / scale, self._add(state, jnp.var(signal)), jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class LeaveOneOut(_Stateless):
    """Subtracts from the signal of a draw the mean of those of the row's other draws.

    It needs two draws of each row at least.

    Source: Kool, van Hoof, Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.
    """

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> tuple[Array, PyTree, Array]:
        del draws
        count = signal.shape[0]
        if count < 2:
            raise ValueError(
                "`num_samples` must be at least 2 for `LeaveOneOut`; got 1. Perhaps use "
                "`RunningMean`?"
            )
        others = (jnp.sum(signal, axis=0, keepdims=True) - signal) / (count - 1)
        return signal - others, state, jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class SelfCritic(_Stateless):
    """Subtracts the signal at the mode of q, which q must know: one more evaluation for each row.

    Source: Rennie, Marcheret, Mroueh, Ross, Goel, "Self-Critical Sequence Training for Image
    Captioning", 2017.
    """

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> tuple[Array, PyTree, Array]:
        critic = jax.lax.stop_gradient(draws.signal_at(draws.distribution.mode()))
        return signal - critic[None], state, jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class LearnedBaseline:
    """Subtracts what a network predicts of the signal from q's context, fitted by least squares.

    Attributes:
        network: a network from a context to one number, of shape [..., 1], such as
            `flowvi.networks.MLP(context_size, (32,), 1)`.

    Source: Mnih, Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014.
    """

    network: Network

    def init(self, key: Array) -> PyTree:
        return self.network.init(key)

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> tuple[Array, PyTree, Array]:
        if draws.context is None:
            raise ValueError(
                "`context` must be given for `LearnedBaseline`; got None. Perhaps use "
                "`RunningMean`?"
            )
        prediction = self.network.apply(state, draws.context)[..., 0]
        loss = jnp.mean((jax.lax.stop_gradient(signal) - prediction[None]) ** 2)
        return signal - jax.lax.stop_gradient(prediction)[None], state, loss


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
        controls: control variates, applied in this order; see `ControlVariate`. Their
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
