"""Families of a context that is their parameters."""

import abc
import itertools
import math
from collections.abc import Mapping

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.families.family import Array, Context, Family, Params, Shape


class Parametric(Family):
    """A distribution whose arguments are the context, such as the output of a network.

    A context is a dict of the arguments by name, of the shapes [*batch, *shape] that `arguments`
    gives; or one array, in which the arguments stand one after the other along the last axis. So a
    normal over vectors of length D takes {"loc": [*batch, D], "scale": [*batch, D]} or an array
    [*batch, 2 D], and one over images [H, W, C] an array [*batch, H, W, 2 C]. An argument whose
    shape is () is of length 1 there; arguments whose shapes differ in other axes are flattened.

    Arguments are unconstrained: every finite value is accepted, and smooth maps take them to where
    they have to be.
    """

    @property
    @abc.abstractmethod
    def arguments(self) -> dict[str, Shape]:
        """Names and shapes of the arguments, in their order."""

    def init(self, key: Array) -> Params:
        return {}

    @abc.abstractmethod
    def build(self, params: Params, arguments: dict[str, Array]) -> distrax.Distribution:
        """The distribution at these arguments, whose leading axes agree."""

    def initial_arguments(self, key: Array) -> dict[str, Array]:
        """Arguments to start from where they are parameters themselves: zeros."""
        return {name: jnp.zeros(shape) for name, shape in self.arguments.items()}

    @property
    def context_shape(self) -> Shape:
        """The shape of the array that holds all arguments."""
        if len(self.arguments) == 1:
            return next(iter(self.arguments.values()))
        return (*self._leading, sum(self._pieces()))

    @property
    def _leading(self) -> Shape:
        leading = {shape[:-1] for shape in self.arguments.values()}
        return leading.pop() if len(leading) == 1 else ()

    def _pieces(self) -> list[int]:
        """How much of the last axis of the array each argument takes."""
        size = math.prod(self._leading)
        return [math.prod(shape) // size for shape in self.arguments.values()]

    def check_context(self, context: Context) -> Shape:
        if not isinstance(context, Mapping):
            return super().check_context(context)
        expected = self.arguments
        if set(context) != set(expected):
            got = ", ".join(map(str, context)) or "no names"
            rule = f"`context` must be a dict of {', '.join(expected)} for {self!r}"
            raise ValueError(f"{rule}; got {got}.")
        leading = {}
        for name, shape in expected.items():
            checks.trailing_shape(f'context["{name}"]', context[name], shape, f"{self!r}")
            leading[name] = jnp.shape(context[name])[: jnp.ndim(context[name]) - len(shape)]
        rule = f"`context` must be arrays with the same leading axes for {self!r}"
        checks.require(len(set(leading.values())) == 1, rule, leading)
        return next(iter(leading.values()))

    def take_apart(self, context: Context) -> dict[str, Array]:
        """The arguments by name, from a context in either form."""
        if isinstance(context, Mapping):
            return {name: jnp.asarray(context[name]) for name in self.arguments}
        context = jnp.asarray(context)
        if len(self.arguments) == 1:
            return {next(iter(self.arguments)): context}
        batch_shape = context.shape[: context.ndim - len(self.context_shape)]
        cuts = itertools.pairwise(itertools.accumulate(self._pieces(), initial=0))
        parts = [context[..., start:end] for start, end in cuts]
        pairs = zip(self.arguments.items(), parts, strict=True)
        return {name: part.reshape(batch_shape + shape) for (name, shape), part in pairs}

    def distribution(self, params: Params, context: Context = None) -> distrax.Distribution:
        self.check_context(context)
        return self.build(params, self.take_apart(context))


def positive(raw: Array) -> Array:
    """A smooth map of the reals to positive numbers, 1 at 0, bounded away from 0 by its dtype."""
    floor = jnp.finfo(raw.dtype).tiny ** 0.5
    return jax.nn.softplus(raw + math.log(math.e - 1)) + floor


def independent(distribution: distrax.Distribution, event_shape: Shape) -> distrax.Distribution:
    """`distribution`, whose trailing batch axes become axes of the event."""
    missing = len(event_shape) - len(distribution.event_shape)
    return distrax.Independent(distribution, missing) if missing > 0 else distribution
