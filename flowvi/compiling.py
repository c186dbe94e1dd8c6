"""Compiled functions of objects, whose programs do not outlive their use."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

#: The objects whose programs one function keeps, the last that were used.
#:
#: A program of a flow holds hundreds of pieces of memory, and Linux gives a process no more than
#: 65,530. `jax.jit` keeps the programs of all static arguments as long as the process lives, so
#: after some fifty posteriors of different targets the compiler would crash.
KEPT = 16


def compiled(
    objects: int = 1, *, static_argnums: Iterable[int] = (), **options: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: `jax.jit` for a function of objects, such as families, and of arrays.

    Its first arguments are the `objects`; `static_argnums` are the places of other static ones,
    such as shapes, and `options` those of `jax.jit`. Each combination of objects has programs of
    its own, which equal objects share. Those of the last 16 combinations are kept; older ones are
    compiled again if they come back.
    """
    rest = tuple(place - objects for place in static_argnums)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(maxsize=KEPT)
        def of(*owners: Any) -> Callable[..., R]:
            bound = functools.partial(function, *owners)
            named = functools.update_wrapper(bound, function)  # in profiles and in logs
            return jax.jit(named, static_argnums=rest, **options)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return of(*args[:objects])(*args[objects:], **kwargs)

        return call

    return decorate
