"""A family of a Distrax distribution whose arguments are the context."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Params, Shape, shown, shown_shape
from flowvi.families.parametric import Parametric, independent, positive
from flowvi.supports import Support, SupportLike, as_support

Constraint = str | Callable[[Array], Array]

CONSTRAINTS: dict[str, Callable[[Array], Array]] = {
    "positive": positive,
    "unit interval": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True, repr=False)
class FromDistrax(Parametric):
    """A Distrax distribution whose arguments are the context; see `from_distrax`."""

    constructor: Callable[..., distrax.Distribution]
    event_shape: Shape
    named: tuple[tuple[str, Shape], ...]
    constraints: tuple[tuple[str, Constraint], ...] = ()
    reparameterized: bool = False
    within: Support | None = None

    def __repr__(self) -> str:
        name = getattr(self.constructor, "__qualname__", type(self.constructor).__qualname__)
        return shown("from_distrax", name, shown_shape(self.event_shape))

    @functools.cached_property
    def support(self) -> Support:
        return super().support if self.within is None else self.within

    @property
    def arguments(self) -> dict[str, Shape]:
        """Names and shapes of the constructor's arguments."""
        return dict(self.named)

    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        for name, constraint in self.constraints:
            function = CONSTRAINTS[constraint] if isinstance(constraint, str) else constraint
            arguments = {**arguments, name: function(arguments[name])}
        distribution = self.constructor(**arguments)
        if not isinstance(distribution, distrax.Distribution):
            raise TypeError(
                f"`constructor` must return a distribution of Distrax; got {distribution!r}."
            )
        return independent(distribution, self.event_shape)


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
        constructor: a class of Distrax, or a function that returns one of its distributions. It is
            called with the arguments by name. Batch axes beyond those of the context become axes of
            the event.
        event_shape: the shape of an event, or its size.
        arguments: names of its arguments, all of the event's shape; or a dict name -> shape.
        constraints: what makes an argument acceptable, whatever its value: "positive",
            "unit interval", or an elementwise function, by name.
        reparameterized: whether samples carry gradients to every argument. Distrax does not say.
        support: where events may lie, as in `standardized`.

    Raises:
        ValueError, TypeError: if an argument is not of this kind, or the distribution is not over
            events of that shape.

    Example:
        >>> import distrax, jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.from_distrax(
        ...     distrax.Gamma,
        ...     3,
        ...     ("concentration", "rate"),
        ...     constraints={"concentration": "positive", "rate": "positive"},
        ... )
        >>> family.sample({}, jax.random.key(0), 2, jnp.zeros((5, 6))).shape
        (2, 5, 3)
    """
    if not callable(constructor):
        raise TypeError(f"`constructor` must be a class or a function; got {constructor!r}.")
    shape = checks.shape("event_shape", event_shape)
    if isinstance(arguments, str) or not all(isinstance(name, str) for name in arguments):
        raise TypeError(
            f"`arguments` must be names, or a dict of shapes by name; got {arguments!r}."
        )
    if isinstance(arguments, Mapping):
        named = tuple(
            (name, checks.shape(f'arguments["{name}"]', s)) for name, s in arguments.items()
        )
    else:
        named = tuple((name, shape) for name in arguments)
    if not named:
        raise ValueError(f"`arguments` must name at least one argument; got {arguments!r}.")
    constraints = dict(constraints or {})
    for name, constraint in constraints.items():
        if name not in dict(named):
            raise ValueError(f"`constraints` must be for {', '.join(dict(named))}; got {name!r}.")
        if not callable(constraint) and constraint not in CONSTRAINTS:
            raise ValueError(
                f"`constraints` must be functions or one of {', '.join(map(repr, CONSTRAINTS))}; "
                f"got {constraint!r}."
            )
    within = None if support is None else as_support(support, shape)
    family = FromDistrax(
        constructor, shape, named, tuple(constraints.items()), bool(reparameterized), within
    )
    _check_distribution(family)
    return family


def _check_distribution(family: FromDistrax) -> None:
    """Checks that the constructor gives a distribution over events of the family's shape."""
    shapes = []

    def build(context: Array) -> Array:
        distribution = family.distribution({}, context)
        shapes.append((distribution.batch_shape, distribution.event_shape))
        return jnp.zeros(())

    batch = (2,)
    jax.eval_shape(build, jax.ShapeDtypeStruct(batch + family.context_shape, jnp.zeros(()).dtype))
    if shapes != [(batch, family.event_shape)]:
        batch_shape, event_shape = shapes[0]
        raise ValueError(
            f"`constructor` must return a distribution over events of shape {family.event_shape} "
            f"and of batch shape {batch} for {batch[0]} rows; got event shape {event_shape} and "
            f"batch shape {batch_shape}."
        )
