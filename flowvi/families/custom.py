"""Families of a log density of the user's, and maybe of a sampler."""

import dataclasses
import functools
import math
from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Context, Family, Params, Shape, shown, shown_shape
from flowvi.params import PyTree
from flowvi.supports import Support, SupportLike, as_support


class CustomDistribution(distrax.Distribution):
    """The distribution of a log density and a sampler of single events.

    Args:
        log_density: (event, row of context) -> number.
        sampler: (key, row of context) -> event, or None.
        rows: a tuple with the context, of shape [*batch, *context_shape]; or an empty one.
        batch_shape: the leading axes of the context.
        event_shape: the shape of an event.
        dtype: of samples.
    """

    def __init__(
        self,
        log_density: Callable[..., Array],
        sampler: Callable[..., Array] | None,
        rows: tuple[Array, ...],
        batch_shape: Shape,
        event_shape: Shape,
        dtype: jnp.dtype,
    ):
        super().__init__()
        self._log_density = log_density
        self._sampler = sampler
        self._rows = rows
        self._batch = batch_shape
        self._event = event_shape
        self._type = dtype

    @property
    def event_shape(self) -> Shape:
        """The shape of an event."""
        return self._event

    @property
    def batch_shape(self) -> Shape:
        """The leading axes of the context."""
        return self._batch

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of samples."""
        return self._type

    def _flat_rows(self, shape: Shape) -> list[Array]:
        """The context of each of the events of an array with leading axes `shape`."""
        size = math.prod(shape)
        return [
            jnp.broadcast_to(row, shape + row.shape[len(self._batch) :]).reshape(
                size, *row.shape[len(self._batch) :]
            )
            for row in self._rows
        ]

    def log_prob(self, value: Array) -> Array:
        """The log density, of shape [...] for values of shape [..., *event_shape]."""
        value = jnp.asarray(value)
        own = value.shape[: value.ndim - len(self._event)]
        shape = jnp.broadcast_shapes(own, self._batch)
        events = jnp.broadcast_to(value, shape + self._event)
        events = events.reshape(math.prod(shape), *self._event)
        return jax.vmap(self._log_density)(events, *self._flat_rows(shape)).reshape(shape)

    def _sample_n(self, key: Array, n: int) -> Array:
        if self._sampler is None:
            raise NotImplementedError(
                "`sampler` must be given to draw from a family of a log density; got None."
            )
        shape = (n, *self._batch)
        keys = jax.random.split(key, math.prod(shape))
        events = jax.vmap(self._sampler)(keys, *self._flat_rows(shape))
        return events.reshape(shape + self._event)


@dataclasses.dataclass(frozen=True, repr=False)
class Custom(Family):
    """A log density and a sampler; see `custom`."""

    log_density: Callable[..., Array]
    event_shape: Shape
    sampler: Callable[..., Array] | None = None
    initial: Callable[[Array], PyTree] | None = None
    context_shape: Shape | None = None
    reparameterized: bool = False
    within: Support | None = None

    def __repr__(self) -> str:
        name = getattr(self.log_density, "__qualname__", type(self.log_density).__qualname__)
        return shown("custom", name, shown_shape(self.event_shape))

    @functools.cached_property
    def support(self) -> Support:
        return super().support if self.within is None else self.within

    def init(self, key: Array) -> Params:
        """{"own": what `init` returned}."""
        return {} if self.initial is None else {"own": self.initial(key)}

    def distribution(self, params: Params, context: Context = None) -> distrax.Distribution:
        batch_shape = self.check_context(context)
        first = () if self.initial is None else (params["own"],)
        rows = () if context is None else (jnp.asarray(context),)

        def log_density(event: Array, *row: Array) -> Array:
            return self.log_density(*first, event, *row)

        def sample(key: Array, *row: Array) -> Array:
            return jnp.asarray(self.sampler(*first, key, *row))  # type: ignore[misc]

        dtype = jnp.result_type(float)
        sampler = None if self.sampler is None else sample
        return CustomDistribution(log_density, sampler, rows, batch_shape, self.event_shape, dtype)


def custom(
    log_density: Callable[..., Array],
    event_shape: int | Shape,
    *,
    sampler: Callable[..., Array] | None = None,
    init: Callable[[Array], PyTree] | None = None,
    context_shape: int | Shape | None = None,
    reparameterized: bool = False,
    support: SupportLike = None,
) -> Custom:
    """A family of a log density of yours, and of a sampler where draws are needed.

    Both are functions of one event and are mapped over rows, each with a key of its own. They get
    what there is: parameters first if there is `init`, the context last if there is a context
    shape.

        log_density([params,] x [, context]) -> number      sampler([params,] key [, context]) -> x

    A prior or a likelihood needs only the density to be trained with; a posterior needs both.

    Args:
        log_density: the log density in nats, normalised for what asks for that: a bound on the
            evidence of a model is off by the log of its constant.
        event_shape: the shape of an event, or its size.
        sampler: draws one event; without it `sample` raises.
        init: (key) -> parameters, of which any finite value is acceptable.
        context_shape: the shape of one context, or its size; None if there is none.
        reparameterized: whether the sampler's draws carry gradients to all parameters and to the
            context.
        support: where events may lie, as in `standardized`.

    Raises:
        ValueError, TypeError: if an argument is not of this kind, the density is not a number, or
            a sample is not an event.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> def log_density(x):
        ...     return -jnp.sum(jnp.abs(x)) - 2 * jnp.log(2.0)
        >>> prior = fv.custom(log_density, 2)
        >>> prior.log_prob({}, jnp.ones((5, 2))).shape
        (5,)
    """
    for name, value in (("log_density", log_density), ("sampler", sampler), ("init", init)):
        if not (callable(value) or (value is None and name != "log_density")):
            raise TypeError(f"`{name}` must be a function; got {value!r}.")
    if reparameterized and sampler is None:
        raise ValueError("`sampler` must be given for a reparameterised family; got None.")
    shape = checks.shape("event_shape", event_shape)
    given = None if context_shape is None else checks.shape("context_shape", context_shape)
    within = None if support is None else as_support(support, shape)
    family = Custom(log_density, shape, sampler, init, given, bool(reparameterized), within)
    _try(family)
    return family


def _try(family: Custom) -> None:
    """Checks the shapes that the functions of a family return."""
    key = jax.random.key(0)
    number = jnp.zeros(()).dtype
    context = None
    if family.context_shape is not None:
        context = jax.ShapeDtypeStruct(family.context_shape, number)
    params = jax.eval_shape(family.init, key)
    first = () if family.initial is None else (params["own"],)
    last = () if context is None else (context,)
    event = jax.ShapeDtypeStruct(family.event_shape, number)
    expected: list[tuple[str, Callable[..., Array], PyTree, Shape]] = [
        ("log_density", family.log_density, event, ())
    ]
    if family.sampler is not None:
        expected.append(("sampler", family.sampler, key, family.event_shape))
    for name, function, argument, shape in expected:
        got = jax.eval_shape(function, *first, argument, *last)
        if getattr(got, "shape", None) != shape:
            raise ValueError(
                f"`{name}` must return an array of shape {shape} for one event; got {got}."
            )
