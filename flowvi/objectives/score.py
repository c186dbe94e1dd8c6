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
from typing import ClassVar, NamedTuple, Protocol

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks, distributions
from flowvi.compiling import compiled
from flowvi.networks import Network
from flowvi.objectives.variational import (
    Batch,
    Loss,
    Output,
    Params,
    Step,
    Variational,
    require,
    with_gradient,
)
from flowvi.params import Fixed, PyTree, combine, partition

Array = jax.Array
LossFn = Callable[[Params, Array, Batch], Output]
Applied = tuple[Array, PyTree, Array]


class Draws(NamedTuple):
    """What a control variate may look at: q without gradients to its parameters, and its context.

    `signal_at` is a function from z of shape [*batch, *event] to the signal there, [*batch].
    """

    distribution: distrax.Distribution
    context: Array | None
    signal_at: Callable[[Array], Array]


class ControlVariate(Protocol):
    """What `ScoreFunction` asks of a control variate: hashable."""

    def init(self, key: Array) -> PyTree:
        """Fresh state, by default none."""
        del key
        return ()

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> Applied:
        """(new signal, new state, loss) for a signal of shape [num_samples, *batch]."""


@dataclasses.dataclass(frozen=True)
class _Running:
    """Uses a number of past steps, averaged with weights that decay."""

    decay: float = 0.9

    #: The average before there is one.
    start: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        require(0 < self.decay < 1, "`decay` must be between 0 and 1", self.decay)

    def init(self, key: Array) -> PyTree:
        del key
        return Fixed({"mean": jnp.zeros(()), "weight": jnp.zeros(())})

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> Applied:
        del draws
        mean, weight = state.value["mean"], state.value["weight"]
        past = jnp.where(weight > 0, mean / jnp.maximum(weight, 1e-12), self.start)
        signal, now = self._use(signal, past)
        new = {"mean": jax.lax.stop_gradient(now).astype(mean.dtype), "weight": 1.0}
        blend = lambda old, new: self.decay * old + (1 - self.decay) * new  # noqa: E731
        return signal, Fixed(jax.tree.map(blend, state.value, new)), jnp.zeros(())

    def _use(self, signal: Array, past: Array) -> tuple[Array, Array]:
        """(the new signal, what this step adds to the average)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RunningMean(_Running):
    """Subtracts the mean signal of past steps, which no draw of this one has touched.

    Attributes:
        decay: the weight of the past in a step, between 0 and 1.

    Source: Mnih, Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014.

    Example:
        >>> import flowvi as fv
        >>> fv.objectives.RunningMean(decay=0.9)
        RunningMean(decay=0.9)
    """

    def _use(self, signal: Array, past: Array) -> tuple[Array, Array]:
        return signal - past, jnp.mean(signal)


@dataclasses.dataclass(frozen=True)
class RunningScale(_Running):
    """Divides by the standard deviation of past steps' signals, where that is above 1.

    It changes the length of a step, not its mean direction.

    Attributes:
        decay: the weight of the past in a step, between 0 and 1.

    Source: Mnih, Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014.

    Example:
        >>> import flowvi as fv
        >>> fv.objectives.RunningScale(decay=0.9)
        RunningScale(decay=0.9)
    """

    start: ClassVar[float] = 1.0

    def _use(self, signal: Array, past: Array) -> tuple[Array, Array]:
        return signal / jnp.sqrt(jnp.maximum(past, 1)), jnp.var(signal)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut(ControlVariate):
    """Subtracts from the signal of a draw the mean of those of the row's other draws.

    It needs two draws of each row at least.

    Source: Kool, van Hoof, Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.

    Example:
        >>> import flowvi as fv
        >>> fv.objectives.LeaveOneOut()
        LeaveOneOut()
    """

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> Applied:
        del draws
        count, fix = signal.shape[0], "Perhaps use `RunningMean`?"
        require(count > 1, "`num_samples` must be at least 2 for `LeaveOneOut`", count, fix)
        others = (jnp.sum(signal, axis=0, keepdims=True) - signal) / (count - 1)
        return signal - others, state, jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class SelfCritic(ControlVariate):
    """Subtracts the signal at the mode of q, which q must know: one more evaluation for each row.

    Source: Rennie, Marcheret, Mroueh, Ross, Goel, "Self-Critical Sequence Training for Image
    Captioning", 2017.

    Example:
        >>> import flowvi as fv
        >>> fv.objectives.SelfCritic()
        SelfCritic()
    """

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> Applied:
        critic = jax.lax.stop_gradient(draws.signal_at(draws.distribution.mode()))
        return signal - critic[None], state, jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class LearnedBaseline:
    """Subtracts what a network predicts of the signal from q's context, fitted by least squares.

    Attributes:
        network: a network from a context to one number, of shape [..., 1], such as
            `flowvi.networks.MLP(context_size, (32,), 1)`.

    Source: Mnih, Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014.

    Example:
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> fv.objectives.LearnedBaseline(MLP(64, (32,), 1))
        LearnedBaseline(...)
    """

    network: Network

    def init(self, key: Array) -> PyTree:
        return self.network.init(key)

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> Applied:
        if draws.context is None:
            rule = "`context` must be given for `LearnedBaseline`"
            raise ValueError(f"{rule}. Perhaps use `RunningMean`?")
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
        TypeError: if one of `controls` is no control variate.

    Source: Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning", 1992; Ranganath, Gerrish, Blei, "Black Box Variational Inference",
    2014; both parts together, Schulman, Heess, Weber, Abbeel, "Gradient Estimation Using Stochastic
    Computation Graphs", 2015.

    Example:
        >>> import jax, flowvi as fv
        >>> family = fv.unconditional(fv.bernoulli(2))
        >>> log_joint = lambda p, key, z, x: z.sum(-1)
        >>> loss = fv.objectives.ScoreFunction(family, log_joint, num_samples=4)
        >>> params = loss.init(jax.random.key(0))
        >>> params["posterior"] = family.init(jax.random.key(1))
        >>> jax.tree.leaves(loss(params, jax.random.key(2), None))[0].shape
        ()
    """

    _: dataclasses.KW_ONLY
    controls: tuple[ControlVariate, ...] = (LeaveOneOut(),)
    path: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "`controls` must be control variates, such as `fv.objectives.LeaveOneOut()`"
        for control in self.controls:
            is_one = hasattr(control, "init") and hasattr(control, "apply")
            require(is_one, rule, control, error=TypeError)

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

    def _draws(self, step: Step) -> tuple[Array, Array]:
        """Draws, and the log probability whose gradient is the score."""
        q, shape = step.q, (self.num_samples,)
        if self._moves:
            flag = self.family.reparameterized
            z, score = distributions.draw(q.distribution, step.key, shape, reparameterized=flag)
            return (self._guarded(z) if jnp.issubdtype(z.dtype, jnp.floating) else z), score
        z = jax.lax.stop_gradient(q.frozen.sample(seed=step.key, sample_shape=shape))
        return z, q.distribution.log_prob(z)

    def _loss(self, step: Step) -> Loss:
        z, log_choice = self._draws(step)
        # The score of the point itself has mean zero, so it is left out.
        log_q = step.q.frozen.log_prob(z)
        log_joint, new = step.density(self.log_joint, z)
        raw = jax.lax.stop_gradient(log_joint - log_q)
        found, metrics = self._good(raw)
        good = jnp.ones(raw.shape, bool) if found is None else found
        # A draw that is skipped takes the mean signal, and no part in the means below.
        middle = jnp.sum(jnp.where(good, raw, 0)) / jnp.maximum(jnp.sum(good), 1)
        signal = jnp.where(good, raw, middle)

        def signal_at(z: Array) -> Array:
            log_joint, _ = step.density(self.log_joint, z[None])
            return (log_joint - step.q.frozen.log_prob(z[None]))[0]

        draws = Draws(step.q.frozen, step.q.context, signal_at)
        states, baseline_loss = [], jnp.zeros(())
        for control, state in zip(self.controls, step.params.get("control", ()), strict=True):
            signal, state, loss = control.apply(state, signal, draws)
            states.append(state)
            baseline_loss += loss
        terms = jax.lax.stop_gradient(signal) * log_choice + log_joint - log_q
        surrogate, value = (self._mean(each, found, step.batch) for each in (terms, raw))
        loss = with_gradient(-value, -surrogate)
        loss += baseline_loss - jax.lax.stop_gradient(baseline_loss)
        metrics = {"baseline_loss": baseline_loss, **metrics}
        return loss, metrics, {**new, "control": tuple(states)}


class GradientMoments(NamedTuple):
    """Mean and variance of a loss and of its gradient, over the randomness of the loss.

    `mean` and `variance` are those of the gradient of each trainable leaf, None of fixed ones.
    """

    loss: Array
    loss_variance: Array
    mean: PyTree
    variance: PyTree

    @property
    def total_variance(self) -> Array:
        """The sum of the variances of all numbers of the gradient."""
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(self.variance)), jnp.zeros(()))


def gradient_moments(
    loss_fn: LossFn,
    params: Params,
    key: Array,
    batch: Batch = None,
    *,
    num_draws: int = 100,
    name: str = "posterior",
) -> GradientMoments:
    """Mean and variance of the gradient of a loss at one place and one batch.

    Which estimator to take is a matter of its variance at the same price. Memory does not grow with
    the number of draws.

    Args:
        loss_fn: an objective, or any loss of `fit`.
        params: its parameters, as `init` returns them.
        key: a random key.
        batch: the batch.
        num_draws: how often the gradient is drawn, at least 2.
        name: whose gradient: a key of `params`.

    Raises:
        ValueError: if `num_draws` is below 2.

    Source: Roeder, Wu, Duvenaud, "Sticking the Landing", 2017, compare gradients so.

    Example:
        >>> import jax, flowvi as fv
        >>> family, log_joint = fv.unconditional(fv.bernoulli(3)), lambda p, k, z, b: z.sum(-1)
        >>> for controls in ((), (fv.objectives.LeaveOneOut(),)):
        ...     loss_fn = ScoreFunction(family, log_joint, num_samples=4, controls=controls)
        ...     params = loss_fn.init(jax.random.key(0))
        ...     moments = gradient_moments(loss_fn, params, jax.random.key(1))
        ...     print(f"{moments.total_variance:.2f}")
        2.06
        0.18
    """
    checks.positive_int("num_draws", num_draws)
    require(num_draws > 1, "`num_draws` must be at least 2", num_draws)
    return _moments(loss_fn, params, key, batch, num_draws, name)


@compiled(static_argnums=(4, 5))
def _moments(
    loss_fn: LossFn, params: Params, key: Array, batch: Batch, num_draws: int, name: str
) -> GradientMoments:
    trainable, fixed = partition(params[name])

    def loss(trainable: PyTree, key: Array) -> Array:
        out = loss_fn({**params, name: combine(trainable, fixed)}, key, batch)
        return out[0] if isinstance(out, tuple) else out

    def draw(index: Array) -> PyTree:
        return jax.value_and_grad(loss)(trainable, jax.random.fold_in(key, index))

    def add(index: Array, sums: PyTree) -> PyTree:
        # Welford's update, which loses no digits to a large mean.
        mean, square = sums
        new = draw(index)
        moved = jax.tree.map(lambda m, x: m + (x - m) / (index + 1), mean, new)
        square = jax.tree.map(lambda s, x, m, n: s + (x - m) * (x - n), square, new, mean, moved)
        return moved, square

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw, 0))
    mean, square = jax.lax.fori_loop(0, num_draws, add, (zero, zero))
    variance = jax.tree.map(lambda s: s / (num_draws - 1), square)
    return GradientMoments(mean[0], variance[0], mean[1], variance[1])
