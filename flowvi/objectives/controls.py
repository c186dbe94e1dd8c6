"""Control variates of the score function, which compose.

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

from flowvi.networks import Network
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
        others = (jnp.sum(signal, axis=0) - signal) / (count - 1)
        return signal - others, state, jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class SelfCritic(_Stateless):
    """Subtracts the signal at the mode of q, which q must know: one more evaluation for each row.

    Source: Rennie, Marcheret, Mroueh, Ross, Goel, "Self-Critical Sequence Training for Image
    Captioning", 2017.
    """

    def apply(self, state: PyTree, signal: Array, draws: Draws) -> tuple[Array, PyTree, Array]:
        critic = jax.lax.stop_gradient(draws.signal_at(draws.distribution.mode()))
        return signal - critic, state, jnp.zeros(())


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
        loss = jnp.mean((jax.lax.stop_gradient(signal) - prediction) ** 2)
        return signal - jax.lax.stop_gradient(prediction), state, loss
