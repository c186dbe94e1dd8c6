"""Families of a log density of the user's, and maybe of a sampler."""

import dataclasses
import functools
import math
from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Context, Family, Params, Shape, shown
from flowvi.params import PyTree
from flowvi.supports import Support, SupportLike, as_support


class CustomDistribution(distrax.Distribution):
    """The distribution of a custom family, at parameters `first` and a context, or without them."""

    def __init__(self, family: "Custom", first: tuple[PyTree, ...], context: Array | None):
        super().__init__()
        self._family, self._first, self._context = family, first, context

    @property
    def event_shape(self) -> Shape:
        return self._family.event_shape

    @property
    def batch_shape(self) -> Shape:
        return self._family.check_context(self._context)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.result_type(float)

    def _mapped(self, function: Callable[..., Array], rows: Array, shape: Shape) -> Array:
        """A function of an event or a key, and of the context's row, over leading axes `shape`."""
        arrays = [rows]
        if self._context is not None:
            row = self._context.shape[len(self.batch_shape) :]
            arrays.append(jnp.broadcast_to(self._context, shape + row))
        arrays = [each.reshape(math.prod(shape), *each.shape[len(shape) :]) for each in arrays]
        result = jax.vmap(functools.partial(function, *self._first))(*arrays)
        return result.reshape(shape + result.shape[1:])

    def log_prob(self, value: Array) -> Array:
        value = jnp.asarray(value)
        own = value.shape[: value.ndim - len(self.event_shape)]
        shape = jnp.broadcast_shapes(own, self.batch_shape)
        events = jnp.broadcast_to(value, shape + self.event_shape)
        return self._mapped(self._family.log_density, events, shape)

    def _sample_n(self, key: Array, n: int) -> Array:
        sampler, shape = self._family.sampler, (n, *self.batch_shape)
        if sampler is None:
            raise NotImplementedError("`sampler` must be given to draw from a density; got None.")
        return self._mapped(sampler, jax.random.split(key, shape), shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Custom(Family):
    """A log density and a sampler; see `custom`."""

    log_density: Callable[..., Array]
    event_shape: Shape
    sampler: Callable[..., Array] | None
    initial: Callable[[Array], PyTree] | None
    context_shape: Shape | None
    reparameterized: bool
    support: Support = dataclasses.field()

    def __repr__(self) -> str:
        name = getattr(self.log_density, "__qualname__", type(self.log_density).__qualname__)
        return shown("custom", name, self.event_shape)

    def init(self, key: Array) -> Params:
        return {} if self.initial is None else {"own": self.initial(key)}

    def distribution(self, params: Params, context: Context = None) -> distrax.Distribution:
        self.check_context(context)
        first = () if self.initial is None else (params["own"],)
        return CustomDistribution(self, first, None if context is None else jnp.asarray(context))


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
        log_density: the log density in nats, normalised, or a bound on evidence is off by as much.
        event_shape: the shape of an event, or its size.
        sampler: draws one event; without it `sample` raises.
        init: (key) -> parameters, of which any finite value is acceptable.
        context_shape: the shape of one context, or its size; None if there is none.
        reparameterized: whether draws carry gradients to all parameters and to the context.
        support: where events may lie, as in `standardized`.

    Raises:
        TypeError: if `log_prob` or `sampler` is no function.
        ValueError: if one returns another shape, or a reparameterised family has no sampler.

    Source: Murphy, "Probabilistic Machine Learning: Advanced Topics", 2023, chapter 2, for
    densities by name; any one may stand here.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> prior = fv.custom(lambda x: -jnp.sum(jnp.abs(x)) - 2 * jnp.log(2.0), 2)
        >>> prior.log_prob({}, jnp.ones((5, 2))).shape
        (5,)
    """
    for name, value in (("log_density", log_density), ("sampler", sampler), ("init", init)):
        is_function = callable(value) or (value is None and name != "log_density")
        checks.require(is_function, f"`{name}` must be a function", value, error=TypeError)
    rule = "`sampler` must be given for a reparameterised family"
    checks.require(sampler is not None or not reparameterized, rule, None)
    shape = checks.shape("event_shape", event_shape)
    given = None if context_shape is None else checks.shape("context_shape", context_shape)
    key, number = jax.random.key(0), jnp.zeros(()).dtype
    first = () if init is None else (jax.eval_shape(init, key),)
    last = () if given is None else (jax.ShapeDtypeStruct(given, number),)
    tried: list[PyTree] = [("log_density", log_density, jax.ShapeDtypeStruct(shape, number), ())]
    tried += [] if sampler is None else [("sampler", sampler, key, shape)]
    for name, function, argument, wanted in tried:
        got = jax.eval_shape(function, *first, argument, *last)
        rule = f"`{name}` must return an array of shape {wanted} for one event"
        checks.require(getattr(got, "shape", None) == wanted, rule, got)
    within = as_support(support, shape)
    return Custom(log_density, shape, sampler, init, given, bool(reparameterized), within)
