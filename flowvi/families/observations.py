"""Families of numbers whose parameters are the context: locations and scales, logits, Distrax's."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.checks import require
from flowvi.distributions import FlowDistribution
from flowvi.families import discrete
from flowvi.families.family import Array, Params, Shape, shown
from flowvi.families.parametric import Parametric, independent, positive
from flowvi.supports import Support, SupportLike, Values, as_support

Scale = float | Literal["predicted", "learned"]
Full = Literal["full"]
Constraint = str | Callable[[Array], Array]

NOISES = {"gaussian": distrax.Normal, "laplace": distrax.Laplace}
NOISES |= {"logistic": distrax.Logistic, "gumbel": distrax.Gumbel}


@dataclasses.dataclass(frozen=True, repr=False)
class LocationScale(Parametric):
    """The distribution of y = loc + scale x, x of independent standard noise; see `gaussian`."""

    noise: str
    event_shape: Shape
    scale: float | str = "predicted"
    reparameterized: bool = dataclasses.field(default=True, init=False)

    def __repr__(self) -> str:
        scale = None if self.scale == "predicted" else self.scale
        return shown(self.noise, self.event_shape, scale=scale)

    @property
    def arguments(self) -> dict[str, Shape]:
        if self.scale == "full":
            return {"loc": self.event_shape, "factor": (math.comb(self.event_shape[0] + 1, 2),)}
        names = ("loc", "scale") if self.scale == "predicted" else ("loc",)
        return dict.fromkeys(names, self.event_shape)

    def init(self, key: Array) -> Params:
        return {"scale": jnp.zeros(())} if self.scale == "learned" else {}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        loc = arguments["loc"]
        if self.scale == "full":
            return _full_normal(loc, arguments["factor"])
        raw = {**params, **arguments}.get("scale")
        scale = jnp.asarray(self.scale, loc.dtype) if raw is None else positive(raw)
        return independent(NOISES[self.noise](loc, scale), self.event_shape)


def _full_normal(loc: Array, raw: Array) -> FlowDistribution:
    """The normal of a location and the lower triangle of L, row by row."""
    size = loc.shape[-1]
    rows, columns = np.tril_indices(size)
    scale = positive(raw[..., rows == columns])
    # In units of the row's scale, so that a scale near zero leaves the matrix well conditioned.
    entries = jnp.where(rows == columns, 1, raw * size**-0.5) * scale[..., rows]
    factor = jnp.zeros((*raw.shape[:-1], size, size), raw.dtype).at[..., rows, columns]
    linear = distrax.TriangularLinear(factor.set(entries), is_lower=True)
    normal = distrax.Normal(jnp.zeros(size, loc.dtype), jnp.ones(size, loc.dtype))
    bijector = distrax.Chain([distrax.Block(distrax.Shift(loc), 1), linear])
    base = distrax.Independent(normal, 1)
    return FlowDistribution(base, bijector, batch_shape=loc.shape[:-1], dtype=loc.dtype)


def _location_scale(noise: str, event_shape: int | Shape, scale: object) -> LocationScale:
    shape = checks.shape("event_shape", event_shape)
    names = ("predicted", "learned", "full")[: 3 if noise == "gaussian" else 2]
    rule = f"`scale` must be one of {', '.join(map(repr, names))} or a positive number"
    if isinstance(scale, bool) or not isinstance(scale, int | float | str):
        raise TypeError(f"{rule}; got {scale!r}.")
    require(scale in names if isinstance(scale, str) else 0 < scale < math.inf, rule, scale)
    rule = '`event_shape` must be that of a vector for `scale="full"`'
    require(scale != "full" or len(shape) == 1, rule, shape)
    return LocationScale(noise, shape, scale if isinstance(scale, str) else float(scale))


def gaussian(event_shape: int | Shape, *, scale: Scale | Full = "predicted") -> LocationScale:
    """A normal distribution whose parameters are the context: y = loc + scale x, x normal.

    Args:
        event_shape: the shape of an event, or its size.
        scale: where the scale comes from:

            - "predicted": the context is {"loc", "scale"}, or one array with the last axis twice
              as long; a softplus makes scales positive;
            - "full": for vectors, the context is loc and the lower triangle of L, in y = loc + L x,
              row by row: {"loc", "factor"}, or one array of length D + D (D + 1) / 2. A softplus
              makes the diagonal positive, and a row is in units of its diagonal and of D^(1/2);
            - "learned": the context is loc, and one scale for everything is a parameter;
            - a positive number: the context is loc.

    Raises:
        ValueError: if `scale` is none of these.

    Source: Nix, Weigend, "Estimating the Mean and Variance of the Target Probability Distribution",
    1994, for scales that a network predicts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.gaussian(3)
        >>> context = {"loc": jnp.zeros((5, 3)), "scale": jnp.zeros((5, 3))}  # or zeros((5, 6))
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(0), 2, context).shape
        (2, 5, 3)
    """
    return _location_scale("gaussian", event_shape, scale)


def laplace(event_shape: int | Shape, *, scale: Scale = "predicted") -> LocationScale:
    """As `gaussian`, without "full": log p(y) = -|y - loc| / scale - log(2 scale).

    Args:
        event_shape: the shape of an event, or its size.
        scale: a positive number; "learned", one for each coordinate; or "predicted" by the
            context.

    Raises:
        ValueError: if `scale` is none of these.

    Source: Laplace, "Memoire sur la probabilite des causes par les evenements", 1774.

    Example:
        >>> import jax.numpy as jnp, flowvi as fv
        >>> fv.laplace(2).distribution({}, jnp.zeros((5, 4))).log_prob(jnp.ones(2)).shape
        (5,)
    """
    return _location_scale("laplace", event_shape, scale)


def logistic(event_shape: int | Shape, *, scale: Scale = "predicted") -> LocationScale:
    """As `gaussian`, without "full": P(Y < y) = 1 / (1 + exp(-(y - loc) / scale)).

    Args:
        event_shape: the shape of an event, or its size.
        scale: a positive number; "learned", one for each coordinate; or "predicted" by the
            context.

    Raises:
        ValueError: if `scale` is none of these.

    Source: Balakrishnan, "Handbook of the Logistic Distribution", 1991.

    Example:
        >>> import jax.numpy as jnp, flowvi as fv
        >>> fv.logistic(2).distribution({}, jnp.zeros((5, 4))).log_prob(jnp.ones(2)).shape
        (5,)
    """
    return _location_scale("logistic", event_shape, scale)


def gumbel(event_shape: int | Shape, *, scale: Scale = "predicted") -> LocationScale:
    """As `gaussian`, without "full": P(Y < y) = exp(-exp(-(y - loc) / scale)).

    Args:
        event_shape: the shape of an event, or its size.
        scale: a positive number; "learned", one for each coordinate; or "predicted" by the
            context.

    Raises:
        ValueError: if `scale` is none of these.

    Source: Gumbel, "Statistics of Extremes", 1958.

    Example:
        >>> import jax.numpy as jnp, flowvi as fv
        >>> fv.gumbel(2).distribution({}, jnp.zeros((5, 4))).log_prob(jnp.ones(2)).shape
        (5,)
    """
    return _location_scale("gumbel", event_shape, scale)


#: Of each kind of numbers with logits, the distribution of one of them and its support.
KINDS: dict[str, tuple[Callable[[Array], distrax.Distribution], str]] = {
    "bernoulli": (lambda a: discrete.BinaryDistribution(a, dtype=a.dtype), "binary"),
    "continuous_bernoulli": (discrete.ContinuousBernoulliDistribution, "unit interval"),
    "categorical": (discrete.ClassDistribution, "classes"),
    "one_hot": (lambda a: discrete.OneHotDistribution(a, dtype=a.dtype), "one hot"),
}


@dataclasses.dataclass(frozen=True, repr=False)
class Logits(Parametric):
    """Independent numbers of one of `KINDS`; see `bernoulli`, `categorical`."""

    kind: str
    shape: Shape
    num_classes: int | None = None

    def __repr__(self) -> str:
        words = [self.shape, *([self.num_classes] if self.num_classes else [])]
        one_hot = self.kind == "one_hot"
        return shown("categorical" if one_hot else self.kind, *words, one_hot=one_hot or None)

    @property
    def event_shape(self) -> Shape:
        return self.arguments["logits"] if self.kind == "one_hot" else self.shape

    @property
    def reparameterized(self) -> bool:
        return self.kind == "continuous_bernoulli"

    @functools.cached_property
    def support(self) -> Support:
        return Values(self.event_shape, KINDS[self.kind][1], self.num_classes)

    @property
    def arguments(self) -> dict[str, Shape]:
        classes = () if self.num_classes is None else (self.num_classes,)
        return {"logits": self.shape + classes}

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        return independent(KINDS[self.kind][0](arguments["logits"]), self.event_shape)


def bernoulli(event_shape: int | Shape) -> Logits:
    """Independent binary numbers, whose logits are the context.

        log p(x) = sum_i x_i logits_i - softplus(logits_i)

    The event shape, or its size, is also that of the context, or of its "logits".

    Args:
        event_shape: the shape of an event, or its size; () for one number.

    Raises:
        ValueError: if a size is not positive.

    Source: Bernoulli, "Ars Conjectandi", 1713.

    Example:
        >>> import jax.numpy as jnp, flowvi as fv
        >>> fv.bernoulli(3).distribution({}, jnp.zeros(3)).mean()
        Array([0.5, 0.5, 0.5], dtype=float32)
    """
    return Logits("bernoulli", checks.shape("event_shape", event_shape))


def categorical(event_shape: int | Shape, num_classes: int, *, one_hot: bool = False) -> Logits:
    """Independent numbers of classes 0, ..., K - 1, whose logits are the context.

        log p(x) = sum_i log softmax(logits_i)[x_i]

    Args:
        event_shape: the shape of an event, or its size; () for one number.
        num_classes: K. The context is of shape [*batch, *event_shape, K], or a dict: {"logits"}.
        one_hot: whether a class is a row of the identity instead of a number.

    Raises:
        ValueError: if a size or `num_classes` is not positive.

    Source: Bishop, "Pattern Recognition and Machine Learning", 2006, section 2.2.

    Example:
        >>> import jax.numpy as jnp, flowvi as fv
        >>> family = fv.categorical((), 3)
        >>> family.distribution({}, jnp.zeros((5, 3))).log_prob(jnp.arange(5) % 3).shape
        (5,)
    """
    shape = checks.shape("event_shape", event_shape)
    count = checks.positive_int("num_classes", num_classes)
    return Logits("one_hot" if one_hot else "categorical", shape, count)


def continuous_bernoulli(event_shape: int | Shape) -> Logits:
    """Independent numbers from 0 to 1, such as grey pixels, whose logits are the context.

        log p(x) = sum_i logits_i x_i - log((exp(logits_i) - 1) / logits_i)

    It is accurate for all logits, also near 0, where the last term is 0 / 0. Samples are by the
    inverse of the distribution function and carry gradients.

    Args:
        event_shape: the shape of an event, or its size; () for one number.

    Raises:
        ValueError: if a size is not positive.

    Source: Loaiza-Ganem, Cunningham, "The Continuous Bernoulli: Fixing a Pervasive Error in
    Variational Autoencoders", 2019.

    Example:
        >>> import jax.numpy as jnp, flowvi as fv
        >>> round(float(fv.continuous_bernoulli(1).distribution({}, jnp.ones(1)).mean()[0]), 4)
        0.582
    """
    return Logits("continuous_bernoulli", checks.shape("event_shape", event_shape))


CONSTRAINTS = {"positive": positive, "unit interval": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True, repr=False)
class FromDistrax(Parametric):
    """A Distrax distribution whose arguments are the context; see `from_distrax`."""

    constructor: Callable[..., distrax.Distribution]
    event_shape: Shape
    named: tuple[tuple[str, Shape], ...]
    constraints: tuple[tuple[str, Constraint], ...]
    reparameterized: bool
    support: Support = dataclasses.field()

    def __repr__(self) -> str:
        name = getattr(self.constructor, "__qualname__", type(self.constructor).__qualname__)
        return shown("from_distrax", name, self.event_shape)

    @property
    def arguments(self) -> dict[str, Shape]:
        return dict(self.named)

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        for name, constraint in self.constraints:
            function = CONSTRAINTS[constraint] if isinstance(constraint, str) else constraint
            arguments = {**arguments, name: function(arguments[name])}
        found = self.constructor(**arguments)
        rule = "`constructor` must return a distribution of Distrax"
        require(isinstance(found, distrax.Distribution), rule, found, error=TypeError)
        return independent(found, self.event_shape)


def from_distrax(
    constructor: Callable[..., distrax.Distribution],
    event_shape: int | Shape,
    arguments: Iterable[str] | Mapping[str, Shape],
    *,
    constraints: Mapping[str, Constraint] | None = None,
    reparameterized: bool = False,
    support: SupportLike = None,
) -> FromDistrax:
    """Any Distrax distribution, whose arguments are the context, such as the output of a network.

    Args:
        constructor: a class of Distrax, or a function of named arguments that returns one of its
            distributions, whose batch axes beyond those of the context become axes of the event.
        event_shape: the shape of an event, or its size.
        arguments: names of its arguments, all of the event's shape; or a dict name -> shape.
        constraints: what makes an argument acceptable, whatever its value: "positive",
            "unit interval", or an elementwise function, by name.
        reparameterized: whether samples carry gradients to every argument. Distrax does not say.
        support: where events may lie, as in `standardized`.

    Raises:
        TypeError: if `constructor` is not callable, or `arguments` are no names.
        ValueError: if what it returns has other events or batches than these, or a constraint
            is
            unknown.

    Source: Babuschkin et al., "The DeepMind JAX Ecosystem", 2020, of which Distrax is part.

    Example:
        >>> import distrax, jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> positive = {"concentration": "positive", "rate": "positive"}
        >>> family = fv.from_distrax(distrax.Gamma, 3, list(positive), constraints=positive)
        >>> family.sample({}, jax.random.key(0), 2, jnp.zeros((5, 6))).shape
        (2, 5, 3)
    """
    rule = "`constructor` must be a class or a function"
    require(callable(constructor), rule, constructor, error=TypeError)
    shape = checks.shape("event_shape", event_shape)
    are_names = not isinstance(arguments, str) and all(isinstance(n, str) for n in arguments)
    rule = "`arguments` must be names, or shapes by name"
    require(are_names, rule, arguments, error=TypeError)
    given = arguments if isinstance(arguments, Mapping) else dict.fromkeys(arguments, shape)
    named = {name: checks.shape(f'arguments["{name}"]', each) for name, each in given.items()}
    require(named, "`arguments` must name at least one argument", arguments)
    constraints = dict(constraints or {})
    for name, constraint in constraints.items():
        require(name in named, f"`constraints` must be for {', '.join(named)}", name)
        rule = f"`constraints` must be functions or one of {', '.join(map(repr, CONSTRAINTS))}"
        require(callable(constraint) or constraint in CONSTRAINTS, rule, constraint)
    options = tuple(constraints.items()), bool(reparameterized), as_support(support, shape)
    family = FromDistrax(constructor, shape, tuple(named.items()), *options)
    context = jax.ShapeDtypeStruct((2, *family.context_shape), jnp.zeros(()).dtype)

    def shapes(context: Array) -> tuple[Array, Array]:
        found = family.distribution({}, context)
        return jnp.zeros(found.event_shape), jnp.zeros(found.batch_shape)

    event, batch = (each.shape for each in jax.eval_shape(shapes, context))
    if (event, batch) != (shape, (2,)):
        rule = f"a distribution over events of shape {shape} and of batch shape (2,) for 2 rows"
        raise ValueError(f"`constructor` must return {rule}; got {event} and {batch}.")
    return family
