"""Continuous relaxations of discrete families: binary concrete, and Gumbel-softmax."""

import dataclasses
import functools
import math

import distrax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flowvi.distributions import BinaryConcrete, OneHotConcrete, RelaxedDistribution
from flowvi.families.family import Array, Context, Params, Shape, Trained, replaced, shown
from flowvi.families.observations import Logits
from flowvi.families.parametric import Parametric, independent
from flowvi.params import Fixed
from flowvi.supports import Support


@dataclasses.dataclass(frozen=True)
class Annealing:
    """A temperature that falls from step to step, by the same factor each.

        T(step) = start (end / start)^min(step / num_steps, 1)

    Source: Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017.

    Example:
        >>> import flowvi as fv
        >>> temperature = fv.Annealing(1.0, 0.25, num_steps=1000)
        >>> float(temperature(0)), float(temperature(500)), float(temperature(2000))
        (1.0, 0.5, 0.25)
    """

    start: float
    end: float
    num_steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "num_steps"):
            _check_positive(name, getattr(self, name))

    def __call__(self, step: ArrayLike) -> Array:
        """The temperature of a step."""
        done = jnp.minimum(jnp.asarray(step) / self.num_steps, 1.0)
        return self.start * (self.end / self.start) ** done


@dataclasses.dataclass(frozen=True, repr=False)
class Relaxed(Parametric):
    """A discrete family that is relaxed in training; see `relaxed`."""

    family: Logits
    temperature: float | Annealing
    reparameterized: bool = dataclasses.field(default=True, init=False)

    def __repr__(self) -> str:
        return shown("relaxed", self.family, repr(self.temperature))

    @property
    def event_shape(self) -> Shape:
        return self.family.event_shape

    @functools.cached_property
    def support(self) -> Support:
        return self.family.support

    @property
    def arguments(self) -> dict[str, Shape]:
        return self.family.arguments

    def init(self, key: Array) -> Params:
        del key
        if isinstance(self.temperature, Annealing):
            return {"step": Fixed(jnp.zeros((), jnp.int32))}
        return {}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        return self.family.build(params, arguments)

    def train_distribution(self, params: Params, key: Array, context: Context = None) -> Trained:
        discrete, new = self.distribution(params, context), params
        temperature: float | Array | Annealing = self.temperature
        if isinstance(temperature, Annealing):
            step = params["step"].value
            temperature, new = temperature(step), replaced(params, step=Fixed(step + 1))
        single = OneHotConcrete if self.family.kind == "one_hot" else BinaryConcrete
        concrete = single(self.take_apart(context)["logits"], jnp.asarray(temperature))
        return RelaxedDistribution(independent(concrete, self.event_shape), discrete), new


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a positive number; got {value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number; got {value!r}.")


def relaxed(family: Logits, temperature: float | Annealing) -> Relaxed:
    """A discrete family whose draws in training are continuous, and carry gradients.

        binary: z = sigmoid((logits + L) / T),   L logistic noise
        classes: z = softmax((logits + G) / T),   G independent Gumbel noise

    It is a posterior for `fv.objectives.ELBO`. In evaluation it is the discrete family. In training
    the likelihood sees the relaxed draws, and the rate is the KL divergence of the discrete
    distributions, in closed form. That is biased: the loss tends to the discrete one's as T falls
    to zero, while the variance of its gradient grows. A log p(x | z) that is concave in z is
    flattered by draws between the discrete values: for fair coins the distortion is too small.

    Args:
        family: `fv.bernoulli(...)`, or `fv.categorical(..., one_hot=True)`.
        temperature: T, a positive number; or a `fv.Annealing`, whose steps are counted in the
            parameters.

    Source: Maddison, Mnih, Teh, "The Concrete Distribution", 2017; Jang, Gu, Poole, "Categorical
    Reparameterization with Gumbel-Softmax", 2017.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.relaxed(fv.bernoulli(3), fv.Annealing(1.0, 0.5, num_steps=10_000))
        >>> params, key = family.init(jax.random.key(0)), jax.random.key(1)
        >>> q, _ = family.train_distribution(params, key, jnp.zeros(3))
        >>> z = q.sample(seed=key, sample_shape=5)
        >>> bool(jnp.all((0 < z) & (z < 1)))
        True
    """
    if not (isinstance(family, Logits) and family.kind in ("bernoulli", "one_hot")):
        rule = "`family` must be `fv.bernoulli(...)` or `fv.categorical(..., one_hot=True)`"
        raise TypeError(f"{rule}; got {family!r}.")
    if not isinstance(temperature, Annealing):
        _check_positive("temperature", temperature)
        temperature = float(temperature)
    return Relaxed(family, temperature)
