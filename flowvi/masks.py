"""Degrees of masked autoregressive networks and what follows for their masks, in numpy.

Every unit of a masked network carries a degree: the number of inputs, counted in the input order,
that it may see. Input k (k = 1..D) has degree k, a hidden unit of degree k sees inputs 1..k, and
the parameters of output d may use units of degree below d. A connection is kept where

    layer to hidden:  degree(from) <= degree(to)
    hidden to output: degree(from) <  degree(to)

(Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", 2015).

Units are sorted by degree, so each mask is block triangular: a product skips its zero blocks, and
the units that become computable once input d is known are neighbours. A unit of degree 0 sees no
input. It is of use only where there is a context, and there it is needed, or the first output could
depend on the context no more than linearly.
"""

import functools
import itertools

import numpy as np

from flowvi import checks

Degrees = tuple[int, ...]
#: Row i says on which coordinates the parameters of coordinate i may depend.
Adjacency = tuple[tuple[bool, ...], ...]


def hidden_degrees(event_size: int, size: int, *, context: bool) -> Degrees:
    """Sorted degrees of the units of one hidden layer, spread evenly over those of use.

    These are 1, ..., D - 1, and 0 where there is a context (or where D is 1 and nothing else is
    left). A layer with fewer units than that keeps both ends, so that the first input is seen by
    all later outputs and the last useful input is not lost.
    """
    low = 0 if context or event_size == 1 else 1
    count = event_size - low
    if size >= count:
        degrees = low + np.arange(size) * count // size
    elif size == 1:
        degrees = np.array([low + (count - 1) // 2])
    else:
        degrees = low + np.arange(size) * (count - 1) // (size - 1)
    return tuple(int(degree) for degree in degrees)


def layer_degrees(
    event_size: int, hidden_sizes: tuple[int, ...], *, context: bool
) -> tuple[Degrees, ...]:
    """Degrees of the inputs, of every hidden layer, and of the outputs, in this order."""
    ends = tuple(range(1, event_size + 1))
    hidden = tuple(hidden_degrees(event_size, size, context=context) for size in hidden_sizes)
    return (ends, *hidden, ends)


def blocks(degrees: tuple[Degrees, ...], num_blocks: int) -> list[list[tuple[int, int]]]:
    """Cuts a network between coordinates into blocks: first and last + 1 unit of each, by layer.

    Blocks hold about equal numbers of coordinates. That of coordinates low, ..., high - 1 holds, of
    each hidden layer, the units of degree low, ..., high - 1. A unit of block i is connected to
    blocks 0, ..., i of the layer before it.
    """
    size = len(degrees[0])
    cuts = np.linspace(0, size, num_blocks + 1).round().astype(int)
    ends = list(itertools.pairwise(cuts.tolist()))
    hidden = [np.searchsorted(each, cuts).tolist() for each in degrees[1:-1]]
    return [ends, *(list(itertools.pairwise(each)) for each in hidden), ends]


def as_adjacency(value: object, size: int) -> Adjacency:
    """`value`, a matrix [D, D] of zeros and ones, as tuples."""
    matrix = np.asarray(value)
    rule = f"`adjacency` must be a matrix of shape {(size, size)} of zeros and ones"
    checks.require(matrix.shape == (size, size), rule, f"shape {matrix.shape}", say=str)
    is_binary = matrix.dtype == bool or np.isin(matrix, (0, 1)).all()
    checks.require(is_binary, rule, value, say=checks.shown)
    return tuple(tuple(bool(each) for each in row) for row in matrix)


def topological_order(adjacency: Adjacency) -> Degrees:
    """An order in which each coordinate comes after those that it depends on, else as numbered."""
    order: list[int] = []
    rest = list(range(len(adjacency)))
    while rest:
        free = [i for i in rest if not any(adjacency[i][j] for j in rest)]
        rule = "`adjacency` must be acyclic, with zeros on its diagonal"
        checks.require(free, rule, f"a cycle among coordinates {rest}", say=str)
        order.append(free[0])
        rest.remove(free[0])
    return tuple(order)


def is_transitive(adjacency: Adjacency) -> bool:
    """Whether each coordinate depends on all that those depend on which it depends on."""
    matrix = np.asarray(adjacency, int)
    return not ((matrix @ matrix > 0) & (matrix == 0)).any()


@functools.lru_cache(maxsize=256)
def sparse_layers(
    adjacency: Adjacency, order: Degrees, hidden_sizes: tuple[int, ...], *, context: bool
) -> tuple[tuple[Degrees, ...], tuple[np.ndarray, ...]]:
    """Degrees as of `layer_degrees`, and the mask of every layer, for a known dependence.

    A hidden unit has the set of one coordinate's inputs, and sees units whose sets lie in its own:
    so the parameters of a coordinate depend on its own inputs, all of them, and on nothing else.
    All is in the order of the coordinates, where the degree of a set is that of its last member.

    Source: Wehenkel, Louppe, "Graphical Normalizing Flows", 2021; Chen, Shi, Gao, Baptista,
    Krishnan, "Structured Neural Networks for Density Estimation and Causal Inference", 2023, whose
    factorisation of the matrix this is.
    """
    size = len(order)
    outputs = np.asarray(adjacency, bool)[np.ix_(order, order)]
    rows = np.unique(outputs, axis=0)
    rows = rows if context or not rows.any() else rows[rows.any(1)]
    degree = (rows * np.arange(1, size + 1)).max(1)
    rows, degree = rows[np.argsort(degree, kind="stable")], np.sort(degree)
    sets, degrees = [np.eye(size, dtype=bool)], [tuple(range(1, size + 1))]
    for width in hidden_sizes:
        rule = "`hidden_sizes` must be at least the number of different rows of `adjacency`"
        checks.require(width >= len(rows), f"{rule}, {len(rows)}", width)
        which = np.arange(width) * len(rows) // width
        sets.append(rows[which])
        degrees.append(tuple(degree[which].tolist()))
    within = lambda below, above: ~(below[:, None] & ~above[None]).any(-1)  # noqa: E731
    found = tuple(within(a, b) for a, b in itertools.pairwise([*sets, outputs]))
    return (*degrees, degrees[0]), found
