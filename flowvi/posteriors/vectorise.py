"""A function of one vector at many: all at once, or a few at a time where LAPACK would hang.

On processors, JAX 0.10 and 0.11 cut a batched call of LAPACK into tasks for the thread pool and
wait for them in a thread of that pool. Where as many such calls meet as there are threads, two on a
machine of two cores, each waits for tasks that no thread is left to do, and the program never ends.
A call of less than 200,000 multiplications is not cut, so batches stay below that.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from flowvi.params import Array, PyTree

T = TypeVar("T")

#: Versions of JAX that cut, and the multiplications from which on they do.
CUTS, MOST_WORK = ((0, 10), (0, 12)), 200_000

_NAMES = """cholesky eig eigh geqp3 geqrf hessenberg householder_product lu ormqr schur svd
triangular_solve tridiagonal tridiagonal_solve"""
#: Primitives that LAPACK computes.
LAPACK = frozenset(_NAMES.split())


def over(function: Callable[[Array, PyTree], T], u: Array, rows: PyTree) -> T:
    """function(u_i, rows) for each u_i along the leading axis of u, stacked."""
    one = jax.ShapeDtypeStruct(u.shape[1:], u.dtype)
    cuts = CUTS[0] <= jax.__version_info__[:2] < CUTS[1] and jax.default_backend() == "cpu"
    work = largest_call(function, one, rows) if cuts else 0
    if work * len(u) < MOST_WORK:
        return jax.vmap(function, in_axes=(0, None))(u, rows)
    num_batches = math.ceil(len(u) / max((MOST_WORK - 1) // work, 1))
    size = math.ceil(len(u) / num_batches)
    return jax.lax.map(lambda each: function(each, rows), u, batch_size=size if size > 1 else None)


def largest_call(function: Callable[..., PyTree], *args: PyTree) -> int:
    """Multiplications of the largest call of LAPACK in a function; 0 if it makes none."""
    sizes = [0]
    for equation in _equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name in LAPACK:
            shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
            sizes.append(max(math.prod(shape) * max(shape[-2:], default=1) for shape in shapes))
    return max(sizes)


def _equations(program: PyTree) -> Iterator[PyTree]:
    """All equations of a program, those of programs inside of it included."""
    for equation in program.eqns:
        yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _equations(getattr(inner, "jaxpr", inner))


def _is_program(value: object) -> bool:
    return hasattr(value, "eqns")
