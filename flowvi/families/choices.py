"""Families whose draws make choices: mixtures, and continuous relaxations of discrete families."""

import dataclasses
import math
from typing import Literal

import distrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.distributions import BinaryConcrete, OneHotConcrete, RelaxedDistribution
from flowvi.families.contexts import unconditional
from flowvi.families.family import Array, Context, Family, Params, Shape, Trained, replaced, shown
from flowvi.families.observations import LocationScale, Logits, gaussian
from flowvi.families.parametric import Parametric, independent
from flowvi.params import Fixed

Draws = tuple[Array, Array]


class MixtureDistribution(distrax.MixtureSameFamily):
    """A mixture whose draws say which part of them is a choice; see `flowvi.distributions`."""

    def draw(self, key: Array, sample_shape: Shape, reparameterized: bool) -> Draws:
        """A reparameterised point of a component, and the log probability of choosing that."""
        choice_key, key = jax.random.split(key)
        choice = self.mixture_distribution.sample(seed=choice_key, sample_shape=sample_shape)
        z = self.components_distribution.sample(seed=key, sample_shape=sample_shape)
        places = choice.reshape(choice.shape + (1,) * (z.ndim - choice.ndim))
        z = jnp.take_along_axis(z, places, axis=choice.ndim).squeeze(choice.ndim)
        return z, self.mixture_distribution.log_prob(choice)

    def draw_each(self, key: Array, sample_shape: Shape, reparameterized: bool) -> Draws:
        """A reparameterised point of each component, and the log weights."""
        z = self.components_distribution.sample(seed=key, sample_shape=sample_shape)
        log_weights = jax.nn.log_softmax(self.mixture_distribution.logits)
        axis = len(sample_shape) + len(self.batch_shape)
        log_weights = jnp.broadcast_to(log_weights, z.shape[: axis + 1])
        return jnp.moveaxis(z, axis, 0), jnp.moveaxis(log_weights, axis, 0)

    def num_choices(self, reparameterized: bool) -> int:
        return self.mixture_distribution.num_categories

    def support_size(self) -> None:
        """None: a mixture of densities is not discrete."""


@dataclasses.dataclass(frozen=True, repr=False)
class MixtureFamily(Parametric):
    """A mixture of normal distributions, of a context; see `mixture`."""

    component: LocationScale
    num_components: int
    #: A draw picks its component, and through that choice no gradient reaches the weights.
    reparameterized: bool = dataclasses.field(default=False, init=False)

    def __repr__(self) -> str:
        scale = None if self.component.scale == "predicted" else self.component.scale
        options = {"scale": scale, "components": "predicted"}
        return shown("mixture", self.event_shape, self.num_components, **options)

    @property
    def event_shape(self) -> Shape:
        return self.component.event_shape

    @property
    def arguments(self) -> dict[str, Shape]:
        count = self.num_components
        each = {name: (count, *shape) for name, shape in self.component.arguments.items()}
        return {"logits": (count,), **each}

    def initial_arguments(self, key: Array) -> dict[str, Array]:
        """Equal weights, unit scales, standard normal locations."""
        initial = super().initial_arguments(key)
        return {**initial, "loc": jax.random.normal(key, self.arguments["loc"])}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        each = {name: arguments[name] for name in self.component.arguments}
        weights = distrax.Categorical(arguments["logits"])
        return MixtureDistribution(weights, self.component.build({}, each))


def mixture(
    event_shape: int | Shape,
    num_components: int,
    *,
    scale: Literal["predicted", "full"] = "predicted",
    components: Literal["learned", "predicted"] = "learned",
) -> Family:
    """A mixture of normal distributions: a prior, a posterior or the base of a flow, with modes.

        p(x) = sum_k w_k N(x; loc_k, scale_k)

    The draws carry no gradient to the weights, so `reparameterized` is False. As a posterior its
    choice of a component is left to `fv.objectives.ScoreFunction` or `fv.objectives.Enumeration`.

    Args:
        event_shape: the shape of an event, or its size.
        num_components: the number of normal distributions, K.
        scale: "predicted" for independent coordinates, "full" for any covariance of vectors, as in
            `gaussian`.
        components: "learned" where weights, locations and scales are parameters; or "predicted"
            where they are the context, a dict of "logits" of shape [K] and of the arguments of
            `gaussian` with a first axis K; or one array with one after the other.

    Raises:
        ValueError: if a number is not positive, or a name is unknown.

    Source: Bishop, "Mixture Density Networks", 1994, for those that a network predicts.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.mixture(2, 5)
        >>> params = family.init(jax.random.key(0))
        >>> family.log_prob(params, jnp.zeros((7, 2))).shape
        (7,)
    """
    for name, value, other in (("scale", scale, "full"), ("components", components, "learned")):
        if value not in ("predicted", other):
            raise ValueError(f'`{name}` must be "predicted" or "{other}"; got {value!r}.')
    count = checks.positive_int("num_components", num_components)
    family = MixtureFamily(gaussian(event_shape, scale=scale), count)
    return unconditional(family) if components == "learned" else family


@dataclasses.dataclass(frozen=True)
class Annealing:
    """A temperature that falls from step to step, by the same factor each.

        T(step) = start (end / start)^min(step / num_steps, 1)

    Attributes:
        start: the temperature at the first step, positive.
        end: that after `num_steps`, which stays.
        num_steps: steps until then.

    Raises:
        ValueError: if one of them is not positive.

    Source: Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017.

    Example:
        >>> import flowvi as fv
        >>> fv.Annealing(1.0, 0.5, num_steps=100)
        Annealing(start=1.0, end=0.5, num_steps=100)
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
class Relaxed(Logits):
    """A discrete family that is relaxed in training; see `relaxed`."""

    temperature: float | Annealing = 1.0
    reparameterized: bool = dataclasses.field(default=True, init=False)  # type: ignore[assignment]

    def __repr__(self) -> str:
        return shown("relaxed", super().__repr__(), repr(self.temperature))

    def init(self, key: Array) -> Params:
        is_counted = isinstance(self.temperature, Annealing)
        return {"step": Fixed(jnp.zeros((), jnp.int32))} if is_counted else {}

    def train_distribution(self, params: Params, key: Array, context: Context = None) -> Trained:
        discrete, new = self.distribution(params, context), params
        temperature: float | Array | Annealing = self.temperature
        if isinstance(temperature, Annealing):
            step = params["step"].value
            temperature, new = temperature(step), replaced(params, step=Fixed(step + 1))
        single = OneHotConcrete if self.kind == "one_hot" else BinaryConcrete
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
    to zero, while the variance of its gradient grows.

    Args:
        family: `fv.bernoulli(...)`, or `fv.categorical(..., one_hot=True)`.
        temperature: T, a positive number; or a `fv.Annealing`, whose steps are counted in the
            parameters.

    Raises:
        TypeError: if the family is not one of these.
        ValueError: if a temperature is not positive.

    Source: Maddison, Mnih, Teh, "The Concrete Distribution", 2017; Jang, Gu, Poole, "Categorical
    Reparameterization with Gumbel-Softmax", 2017.

    Example:
        >>> import flowvi as fv
        >>> family = fv.relaxed(fv.bernoulli(3), 0.5)
        >>> family.reparameterized, fv.bernoulli(3).reparameterized
        (True, False)
    """
    if type(family) is not Logits or family.kind not in ("bernoulli", "one_hot"):
        rule = "`family` must be `fv.bernoulli(...)` or `fv.categorical(..., one_hot=True)`"
        raise TypeError(f"{rule}; got {family!r}.")
    if not isinstance(temperature, Annealing):
        _check_positive("temperature", temperature)
        temperature = float(temperature)
    return Relaxed(family.kind, family.shape, family.num_classes, temperature)
