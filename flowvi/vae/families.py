"""Three families that make a model, and what each of them sees."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.checks import require
from flowvi.families import Family, Labelled, as_array, check_key
from flowvi.families.parts import Parts, fitting
from flowvi.objectives.variational import Params
from flowvi.params import Array, Origin, Shape

Data = ArrayLike
#: What only some models take.
Given = ArrayLike | None
#: By name what there is of each row: "x", and "context" or "row" where the model has them.
Rows = dict[str, Array | np.ndarray]

#: The families, which are the keys of a model's parameters; and those of p(x, z).
NAMES = ("prior", "likelihood", "posterior")
JOINT = ("prior", "likelihood")


@dataclasses.dataclass(frozen=True)
class Families:
    """Prior, likelihood and posterior, whose contexts are made of x, z, covariates, rows' numbers.

    The attributes are those of `VAE`.
    """

    prior: Family
    likelihood: Family
    posterior: Family
    context_shape: int | Shape | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            family, rule = getattr(self, name), "must be a family, such as `fv.standard_normal(2)`"
            require(isinstance(family, Family), f"`{name}` {rule}", family, error=TypeError)
        if self.context_shape is not None:
            shape = checks.shape("context_shape", self.context_shape)
            object.__setattr__(self, "context_shape", shape)
        sees = any("context" in parts for parts in self.parts.values())
        rule = "`context_shape` must be None where no family has room for the context"
        require(sees or self.context_shape is None, rule, self.context_shape)
        latent, found = self.latent_shape, self.posterior.event_shape
        rule = f"`posterior` must have event shape {latent}, that of the prior {self.prior!r},"
        require(found == latent, f"{rule} rather than {found}", self.posterior)

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of what a family may see: "x", "z", "row", and "context" if there is one."""
        shapes: dict[str, Shape] = {"x": self.event_shape, "z": self.latent_shape, "row": ()}
        if self.context_shape is not None:
            shapes["context"] = checks.shape("context_shape", self.context_shape)
        return shapes

    @functools.cached_property
    def parts(self) -> dict[str, Parts]:
        """What each family sees of x, z, "context" and "row", by the name of the family."""
        return {name: self._parts(name) for name in NAMES}

    def _parts(self, name: str) -> Parts:
        family, shapes = getattr(self, name), self.shapes
        always = {"prior": (), "likelihood": ("z",), "posterior": ("x",)}[name]
        choices = [always, ("row",)] if name == "posterior" else [always]
        also = "context" in shapes
        choices += [(*always, "context")] if also else []
        if (parts := fitting(family.context_shape, shapes, choices)) is not None:
            return parts
        with_y = f", or {Parts.of(shapes, choices[-1]).shape} with the context" if also else ""
        if name == "prior":
            raise ValueError(f"`prior` must take no context{with_y}; got {family!r}.")
        source = "z of the prior" if name == "likelihood" else "x of the likelihood"
        owner = getattr(self, source.split()[-1])
        rule = f"`{name}` must take {source} {owner!r}, of shape {shapes[always[0]]}{with_y}, "
        fix = "It takes none. Perhaps use `fv.conditional(family, network)`?"
        require(family.context_shape is not None, f"{rule}as context", family, fix)
        rule += f"as context rather than one of shape {family.context_shape}"
        raise ValueError(f"{rule}; got {family!r}.")

    @property
    def is_unamortized(self) -> bool:
        """Whether each row has its own posterior, whose context is the row's number."""
        return "row" in self.parts["posterior"]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return self.likelihood.event_shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one z."""
        return self.prior.event_shape

    def seen(self, name: str, given: Rows) -> Array | None:
        """The context of a family: what it sees of these arrays, of those in `parts`."""
        floats = {n: a if n == "row" else as_float(a) for n, a in given.items()}
        return self.parts[name](floats)

    def distribution(self, name: str, params: Params, given: Rows) -> distrax.Distribution:
        """The distribution of a family at what it sees of these arrays; see `seen`."""
        return getattr(self, name).distribution(params[name], self.seen(name, given))

    def check_x(self, x: Data) -> Array:
        """x of shape [*batch, *event_shape]."""
        x = as_array("x", x)
        checks.trailing_shape("x", x, self.event_shape, f"the likelihood {self.likelihood!r}")
        return jnp.asarray(x)

    def check_context(
        self, context: Given, families: Sequence[str] = NAMES, name: str = "context"
    ) -> Array | np.ndarray | None:
        """A context of shape [*batch, *context_shape]; None where none of the families needs it."""
        if "context" not in self.shapes:
            fix = "Perhaps give the `VAE` a `context_shape`?"
            rule = f"`{name}` must be None for a model without covariates"
            require(context is None, rule, context, fix, say=checks.shown)
            return None
        shape, owner = self.shapes["context"], "this model"
        if context is None and not any("context" in self.parts[each] for each in families):
            return None
        if context is None:
            rule = f"`{name}` must have a shape that ends in {shape} for {owner}"
            raise ValueError(f"{rule}; got None.")
        array = as_array(name, context)
        checks.trailing_shape(name, array, shape, owner)
        posterior = self.posterior
        return posterior.check_labels(array, name) if isinstance(posterior, Labelled) else array

    def _z(self, z: Data) -> Array:
        z = as_array("z", z)
        checks.trailing_shape("z", z, self.latent_shape, f"the prior {self.prior!r}")
        return jnp.asarray(z)

    def _axes(self, x: Array | np.ndarray) -> Shape:
        return x.shape[: x.ndim - len(self.event_shape)]

    def _given(
        self, batch_shape: Shape | None, context: Given, families: Sequence[str] = JOINT
    ) -> Rows:
        """The context by name where there is one, with these leading axes if not None."""
        if (found := self.check_context(context, families)) is None:
            return {}
        own, shape = self._batch_of(found), self.shapes["context"]
        if batch_shape is not None:
            fits = own == batch_shape[len(batch_shape) - len(own) :]
            rule = f"`context` must have the leading axes {batch_shape} of `x`, or the last of them"
            require(fits, rule, own)
            found = jnp.broadcast_to(found, batch_shape + shape)
        return {"context": jnp.asarray(found)}

    def _batch_of(self, context: Array | np.ndarray) -> Shape:
        return context.shape[: context.ndim - len(self.shapes["context"])]

    def given(self, x: Data, context: Given = None, families: Sequence[str] = JOINT) -> Rows:
        """What these families know of each row, by name: x, and the context."""
        x = self.check_x(x)
        return {"x": x, **self._given(self._axes(x), context, families)}

    def _of_rows(self, x: Data, context: Given, rows: Given) -> Rows:
        """What there is of each row, by name: x, the context, the numbers of the rows."""
        given = self.given(x, context, NAMES)
        if not self.is_unamortized:
            rule = "`rows` must be None for an amortized posterior, which needs x alone"
            require(rows is None, rule, rows)
            return given
        shape = self._axes(given["x"])
        count = math.prod(shape)
        rows = np.arange(count).reshape(shape) if rows is None else as_array("rows", rows)
        require(rows.shape == shape, f"`rows` must have shape {shape}, as `x` does", rows.shape)
        self.posterior.check_context(rows)
        return {**given, "row": jnp.asarray(rows)}

    def flat(self, given: Rows) -> tuple[Rows, Shape]:
        """What there is of each row with one axis of rows, and the axes they had."""
        shape = self._axes(given["x"])
        return {n: a.reshape(-1, *a.shape[len(shape) :]) for n, a in given.items()}, shape


def own_params(vae: Families, params: Params, key: Array | None = None) -> Params:
    """The parameters of a model without what may stand beside them; an error for another's."""
    if key is not None:
        check_key(key)
    if not isinstance(params, dict) or any(name not in params for name in NAMES):
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        fix = " Perhaps use its `.params`?" if hasattr(params, "params") else ""
        rule = "`params` must be a dict with the keys prior, likelihood and posterior, such as"
        raise ValueError(f"{rule} `vae.init(key)`; got {got}.{fix}")
    for name in NAMES:
        family, own = getattr(vae, name), params[name]
        origin = own.get("origin") if isinstance(own, dict) else None
        rule = f'`params["{name}"]` must be those of {family!r}'
        if isinstance(origin, Origin) and origin.family != family:
            raise ValueError(f"{rule}; got those of {origin.family!r}.")
        shapes, expected = [np.shape(leaf) for leaf in jax.tree.leaves(own)], _shapes(family)
        require(shapes == expected, f"{rule}, arrays of shapes {expected}", shapes)
    return {name: params[name] for name in NAMES}


@functools.lru_cache(maxsize=64)
def _shapes(family: Family) -> list[Shape]:
    """The shapes of the leaves of a family's parameters."""
    made = jax.eval_shape(family.init, jax.random.key(0))
    return [leaf.shape for leaf in jax.tree.leaves(made)]


def as_float(x: Data) -> Array:
    """Whole numbers as networks take them; others as they are."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))
