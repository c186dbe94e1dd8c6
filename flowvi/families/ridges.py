"""Planar, radial and Sylvester flows: cheap samples, for posteriors."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, TypedDict, Unpack

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.bijectors.orthogonal import reflections
from flowvi.bijectors.planar import Planar, Radial, Sylvester
from flowvi.families.family import Array, Family, Params, Shape
from flowvi.families.flow import Flow
from flowvi.families.flows import Numbered, flow_of


@dataclasses.dataclass(frozen=True)
class _Layer(abc.ABC):
    """A layer of a few arrays, to each of which a linear layer of the context may add."""

    event_size: int
    context_size: int | None
    permutation = None
    name: ClassVar[str]

    @property
    @abc.abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """The arrays; the first one starts at random, the others at zero."""

    @abc.abstractmethod
    def build(self, arrays: dict[str, Array], number: Array) -> distrax.Bijector:
        """The bijector of arrays of shapes [*batch, *shape]."""

    def init(self, key: Array) -> Params:
        params = {name: {"start": jnp.zeros(shape)} for name, shape in self.shapes.items()}
        first = next(iter(params))
        params[first]["start"] = jax.random.normal(key, self.shapes[first])
        if self.context_size is not None:
            for name, shape in self.shapes.items():
                params[name]["context"] = jnp.zeros((self.context_size, *shape))
        return params

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        params, number = numbered
        arrays = {name: each["start"] for name, each in params.items()}
        if context is not None and self.context_size is not None:
            scaled = context * self.context_size**-0.5
            for name, each in params.items():
                arrays[name] = arrays[name] + jnp.tensordot(scaled, each["context"], 1)
        return self.build(arrays, number)


@dataclasses.dataclass(frozen=True)
class PlanarLayer(_Layer):
    """w, u and b of `flowvi.bijectors.Planar`."""

    name = "planar"

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"w": (self.event_size,), "u": (self.event_size,), "b": ()}

    def build(self, arrays: dict[str, Array], number: Array) -> distrax.Bijector:
        return Planar(arrays["w"] * self.event_size**-0.5, arrays["u"], arrays["b"])


@dataclasses.dataclass(frozen=True)
class RadialLayer(_Layer):
    """The arguments of `flowvi.bijectors.Radial`."""

    name = "radial"

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"center": (self.event_size,), "alpha": (), "beta": ()}

    def build(self, arrays: dict[str, Array], number: Array) -> distrax.Bijector:
        return Radial(**arrays)


@dataclasses.dataclass(frozen=True)
class SylvesterLayer(_Layer):
    """Two triangular matrices and the vectors of reflections, of which there may be none.

    Without them the basis is the identity, and the reversal in every other layer.
    """

    rank: int
    num_reflections: int
    name = "sylvester"

    @property
    def shapes(self) -> dict[str, Shape]:
        rank = self.rank
        vectors = {"vectors": (self.num_reflections, self.event_size)}
        rest: dict[str, Shape] = {"inner": (rank, rank), "outer": (rank, rank), "bias": (rank,)}
        return {**vectors, **rest} if self.num_reflections else rest

    def build(self, arrays: dict[str, Array], number: Array) -> distrax.Bijector:
        scale = self.rank**-0.5
        if self.num_reflections:
            basis = reflections(arrays["vectors"])[..., : self.rank]
        else:
            eye = jnp.eye(self.event_size, dtype=arrays["bias"].dtype)
            basis = jnp.where(number % 2 == 1, eye[::-1], eye)
        return Sylvester(basis, arrays["outer"] * scale, arrays["inner"] * scale, arrays["bias"])


class RidgeOptions(TypedDict, total=False):
    """Options of `planar`, `radial` and `sylvester`.

    Attributes:
        num_layers: the number of layers, 16 by default, of Sylvester flows 4.
        context_size: the length of the context vector, of which the parameters of every layer are
            linear functions, as those of a flow that is amortized by an encoder; or None.
        base: the family of the noise, as of `fv.iaf`.
    """

    num_layers: int
    context_size: int | None
    base: Family | None


def planar(event_size: int, **options: Unpack[RidgeOptions]) -> Flow:
    """Planar flow: each layer pushes along one direction, by a function of one direction.

        y = x + u tanh(w^T x + b)

    Samples and their densities take one pass; the density elsewhere takes a root of one equation a
    layer, with the implicit derivative. A new flow is the identity: it equals its base.

    Args:
        event_size: D, at least 1.
        **options: those of `RidgeOptions`.

    Source: Rezende, Mohamed, "Variational Inference with Normalizing Flows", 2015.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.planar(3, num_layers=4)
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 5).shape
        (5, 3)
    """
    options.setdefault("num_layers", 16)
    return _flow(PlanarLayer, event_size, **options)


def radial(event_size: int, **options: Unpack[RidgeOptions]) -> Flow:
    """Radial flow: each layer pulls towards a point, or pushes away from it.

        y = x + beta (x - c) / (alpha + |x - c|)

    Samples and their densities take one pass; the density elsewhere takes a root of one equation a
    layer, with the implicit derivative. A new flow is the identity: it equals its base.

    Args:
        event_size: D, at least 1.
        **options: those of `RidgeOptions`.

    Source: Rezende, Mohamed, "Variational Inference with Normalizing Flows", 2015.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.radial(3, num_layers=4)
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 5).shape
        (5, 3)
    """
    options.setdefault("num_layers", 16)
    return _flow(RadialLayer, event_size, **options)


def sylvester(
    event_size: int,
    *,
    kind: str = "householder",
    rank: int | None = None,
    **options: Unpack[RidgeOptions],
) -> Flow:
    """Sylvester flow: planar flows of M directions at once.

        y = x + Q R tanh(S Q^T x + b),   R and S upper triangular

    Samples and their densities take one pass; the density elsewhere takes M roots a layer, one
    after the other. A new flow is the identity: it equals its base.

    Args:
        event_size: D, at least 1.
        kind: "householder", where Q is M columns of a product of D reflections; or "triangular",
            where it is the identity and in every other layer the reversal.
        rank: M, at most D, its default; "triangular" takes D only.
        **options: those of `RidgeOptions`.

    Raises:
        ValueError: if `kind` is neither, or `rank` is above D or not D where it must be.

    Source: van den Berg, Hasenclever, Tomczak, Welling, "Sylvester Normalizing Flows for
    Variational Inference", 2018.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.sylvester(3, num_layers=2, rank=2)
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 5).shape
        (5, 3)
    """
    size = checks.positive_int("event_size", event_size)
    rule = '`kind` must be "householder" or "triangular"'
    checks.require(kind in ("householder", "triangular"), rule, kind)
    rank = size if rank is None else checks.positive_int("rank", rank)
    if kind == "triangular":
        checks.require(rank == size, f'`rank` must be {size} for "triangular"', rank)
    checks.require(rank <= size, f"`rank` must be at most {size}", rank)
    reflected = size if kind == "householder" else 0
    make = functools.partial(SylvesterLayer, rank=rank, num_reflections=reflected)
    options.setdefault("num_layers", 4)
    return _flow(make, size, **options)


def _flow(
    make: Callable[[int, int | None], _Layer],
    event_size: int,
    *,
    num_layers: int,
    context_size: int | None = None,
    base: Family | None = None,
) -> Flow:
    size = checks.positive_int("event_size", event_size)
    context_size = checks.optional_int("context_size", context_size)
    return flow_of(make(size, context_size), num_layers, context_size, base)
