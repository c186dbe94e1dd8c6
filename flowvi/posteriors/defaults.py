"""The families that `fit_posterior` fits."""

from flowvi import checks
from flowvi.families import Family, Flow, Whitened, iaf, mean_field, whitened
from flowvi.families.normal import LocationTriangular
from flowvi.posteriors.candidates import ANY_HESSIAN

#: Up to this size there are autoregressive layers; beyond, marginal maps.
MODERATE = 200

#: Directions of the low-rank start.
RANK = 20


def default_family(event_size: int, *, transformer: str = "affine") -> Flow:
    """The flow that is fitted by default, in the units of the start.

    Four autoregressive layers that sample in one pass, and a triangular map after them. Beyond 200
    coordinates nothing but a shift and a scale of each: there the marginal maps do the work, which
    `fit_posterior` puts after the affine map of the start.

    Args:
        event_size: D.
        transformer: as in `iaf`.

    Raises:
        ValueError, TypeError: if an argument is not of this kind.

    Example:
        >>> default_family(3).event_shape
        (3,)
    """
    size = checks.positive_int("event_size", event_size)
    if size > MODERATE:
        return mean_field(size)
    hidden_sizes = (max(64, 2 * size),) * 2  # two units of each degree
    layers = iaf(size, num_layers=4, hidden_sizes=hidden_sizes, transformer=transformer)
    return Flow(layers, LocationTriangular(size))


def placed_family(event_size: int, family: Family | None, transformer: str = "affine") -> Whitened:
    """A family, the default one by default, in the units of a start.

    One that is in such units already stays as it is.
    """
    if isinstance(family, Whitened):
        return family
    rank = None if event_size <= ANY_HESSIAN else RANK
    if family is not None:
        return whitened(family, rank=rank)
    marginal = "spline" if event_size > MODERATE else None
    family = default_family(event_size, transformer=transformer)
    return whitened(family, rank=rank, marginal=marginal)
