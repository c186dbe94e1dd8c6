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

import itertools

import numpy as np

Degrees = tuple[int, ...]


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
