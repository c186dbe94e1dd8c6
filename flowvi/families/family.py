"""The one idea: a family is a distribution waiting for parameters and a context."""

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.compiling import KEPT, compiled
from flowvi.params import Origin, PyTree
from flowvi.supports import Support, real

Array = jax.Array
Shape = tuple[int, ...]
Params = PyTree
#: An array, a dict of arrays by name, or None.
Context = PyTree
SampleShape = int | tuple[int, ...]


class Family(abc.ABC):
    """A distribution waiting for parameters and a context.

    Subclasses are frozen dataclasses: hashable, and equal when they are configured equally, so a
    family is a static argument of `jax.jit`. Objectives, the fit loop, VAEs and diagnostics are
    written against this class and nothing else. A subclass defines `init` and `distribution`.

    Parameters are a dict, which `init` marks with the family that they are of: under "origin".

    Attributes:
        event_shape: the shape of one event.
        context_shape: the shape of one context; None if the family takes no context; () for a
            row index.
        reparameterized: whether samples carry gradients to every parameter.
        support: where events may lie; by default all real numbers.
    """

    if TYPE_CHECKING:
        # Properties for a checker of types only: fields of subclasses would take them for defaults.
        @property
        def event_shape(self) -> Shape: ...
        @property
        def context_shape(self) -> Shape | None: ...
        @property
        def reparameterized(self) -> bool: ...

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "init" in vars(cls):
            cls.init = _marked(cls.init)  # type: ignore[assignment]

    @functools.cached_property
    def support(self) -> Support:
        """Where events may lie: all real numbers."""
        return real(self.event_shape)

    @abc.abstractmethod
    def init(self, key: Array) -> Params:
        """Fresh parameters, a pytree whose float leaves outside `Fixed` accept any finite value."""

    @abc.abstractmethod
    def distribution(self, params: Params, context: Context = None) -> distrax.Distribution:
        """The distribution at these parameters and this context, for evaluation.

        Args:
            params: parameters as `init` returns them.
            context: an array of shape [*batch, *context_shape], or None where the family takes
                none.

        Returns:
            A Distrax distribution with batch shape [*batch] and the family's event shape. Rows of
            a batch never share noise.

        Raises:
            ValueError: if the context is missing, superfluous or of the wrong shape.
        """

    def train_distribution(
        self, params: Params, key: Array, context: Context = None
    ) -> tuple[distrax.Distribution, Params]:
        """The distribution as training sees it, and parameters with new `Fixed` leaves.

        Args:
            params: parameters as `init` returns them.
            key: randomness of the training form, such as dropout.
            context: as in `distribution`.

        Returns:
            (distribution, params). The default is the evaluation form and unchanged parameters.
        """
        del key
        return self.distribution(params, context), params

    def check_support(self, x: ArrayLike, name: str = "x") -> None:
        """Checks that data are where the family can be.

        Args:
            x: an array-like of shape [*rows, *event_shape], in memory or on disk.
            name: what to call it in the message.

        Raises:
            ValueError: if a number is outside of the support; it says which, and what to do.
        """
        self.support.check(x, name, repr(self))

    def log_prob(self, params: Params, x: ArrayLike, context: Context = None) -> Array:
        """Log density at `x`, of shape [...] for `x` of shape [..., *event_shape]. Compiled.

        NaN in `x` or `params` gives NaN.

        Raises:
            TypeError: if `x` or `context` does not hold numbers, or `params` are no parameters.
            ValueError: if `x` or `context` has the wrong shape, or `params` are another family's.
        """
        x, context = self._check_data(params, x, context)
        return _log_prob(self, params, x, context)

    def _check_data(
        self, params: Params, x: ArrayLike, context: Context
    ) -> tuple[Array | np.ndarray, Context]:
        check_params(self, params)
        x, context = as_array("x", x), _as_context(context)
        checks.trailing_shape("x", x, self.event_shape, f"{self!r}")
        batch_shape = self.check_context(context)
        rows = x.shape[: x.ndim - len(self.event_shape)]
        try:
            np.broadcast_shapes(rows, batch_shape)
        except ValueError:
            raise ValueError(
                f"`x` and `context` must have the same number of rows; got leading axes {rows} of "
                f"`x` and {batch_shape} of `context`."
            ) from None
        return x, context

    def sample(
        self,
        params: Params,
        key: Array,
        sample_shape: SampleShape = (),
        context: Context = None,
    ) -> Array:
        """Samples, of shape sample_shape + batch_shape + event_shape. Compiled.

        Raises:
            TypeError: if `key`, `sample_shape` or `params` are not of their kind.
            ValueError: if `context` has the wrong shape, or `params` are another family's.
        """
        shape, context = self._check_draw(params, key, sample_shape, context)
        return _sample(self, params, key, shape, context)

    def sample_and_log_prob(
        self,
        params: Params,
        key: Array,
        sample_shape: SampleShape = (),
        context: Context = None,
    ) -> tuple[Array, Array]:
        """Samples and their log densities, for the price of the samples. Compiled.

        Returns:
            (x, log_prob) of shapes sample_shape + batch_shape + event_shape and
            sample_shape + batch_shape.

        Raises:
            TypeError, ValueError: as `sample`.
        """
        shape, context = self._check_draw(params, key, sample_shape, context)
        return _sample_and_log_prob(self, params, key, shape, context)

    def _check_draw(
        self, params: Params, key: Array, sample_shape: SampleShape, context: Context
    ) -> tuple[Shape, Context]:
        check_params(self, params)
        check_key(key, " Perhaps `sample(params, key, sample_shape)`?")
        context = _as_context(context)
        self.check_context(context)
        return _as_shape(sample_shape), context

    def check_context(self, context: Context) -> Shape:
        """The batch shape that `context` stands for.

        Raises:
            ValueError: if the context is missing, superfluous or of the wrong shape.
        """
        if self.context_shape is None:
            if context is not None:
                got = "a dict" if isinstance(context, Mapping) else f"shape {jnp.shape(context)}"
                raise ValueError(
                    f"`context` must be None for {self!r}, which takes none; got {got}. Perhaps "
                    "give the family a `context_size`?"
                )
            return ()
        if context is None or isinstance(context, Mapping):
            got = "None" if context is None else "a dict"
            raise ValueError(
                f"`context` must be an array whose shape ends in {self.context_shape} for "
                f"{self!r}; got {got}."
            )
        checks.trailing_shape("context", context, self.context_shape, f"{self!r}")
        shape = jnp.shape(context)
        return shape[: len(shape) - len(self.context_shape)]

    def owns(self, family: "Family") -> bool:
        """Whether parameters of `family` are of this one."""
        return family is self or family == self


def check_params(family: Family, params: Params) -> None:
    """Checks that parameters are those of a family, as far as their mark or their names tell.

    Raises:
        TypeError: if they are no parameters.
        ValueError: if they are another family's, or something is missing.
    """
    marked = params.get("origin") if isinstance(params, Mapping) else None
    if isinstance(marked, Origin):
        if not family.owns(marked.family):
            raise ValueError(
                f"`params` must be those of {family!r}; got those of {marked.family!r}"
                f"{_difference(family, marked.family)}."
            )
        return
    names = _names(family)
    if names is None:
        return
    rule = f"`params` must be parameters of {family!r}, as its `init` returns them"
    if not isinstance(params, Mapping):
        fix = ""
        if hasattr(params, "params"):
            fix = " Perhaps pass `result.params`?"
        elif hasattr(params, "shape"):
            fix = " Perhaps they are in another place among the arguments?"
        raise TypeError(f"{rule}; got a {type(params).__name__}.{fix}")
    missing = sorted(names - params.keys())
    if missing:
        raise ValueError(f"{rule}; got a dict without {', '.join(map(repr, missing))}.")


@functools.lru_cache(maxsize=KEPT)
def _names(family: Family) -> frozenset[str] | None:
    """The names of a family's parameters; None where they are no dict, or nobody knows."""
    try:
        params = jax.eval_shape(family.init, jax.random.key(0))
    except Exception:  # of somebody else's family, which need not be traceable
        return None
    return frozenset(params) - {"origin"} if isinstance(params, Mapping) else None


def _difference(one: object, other: object, name: str = "") -> str:
    """Where two configurations of one kind differ first, in words."""
    if type(one) is not type(other) or not dataclasses.is_dataclass(one):
        return f", whose `{name}` is {other!r} rather than {one!r}" if name else ""
    for field in dataclasses.fields(one):
        own, its = getattr(one, field.name), getattr(other, field.name)
        if own != its:
            return _difference(own, its, f"{name}.{field.name}".lstrip("."))
    return ""


def _marked(init: Callable[[Family, Array], Params]) -> Callable[[Family, Array], Params]:
    """`init`, whose parameters say which family they are of."""

    @functools.wraps(init)
    def marked(self: Family, key: Array) -> Params:
        check_key(key)
        params = init(self, key)
        if isinstance(params, dict) and "origin" not in params:
            params = {**params, "origin": Origin(self)}
        return params

    return marked


def bare_init(family: Family, key: Array) -> Params:
    """Fresh parameters of a family inside another one: without a mark, which is the outer one's."""
    params = family.init(key)
    if not isinstance(params, dict):
        return params
    return {name: each for name, each in params.items() if name != "origin"}


def replaced(params: Params, **new: PyTree) -> Params:
    """Parameters with new `Fixed` leaves in them; the very same ones where nothing is new."""
    if all(params[name] is each for name, each in new.items()):
        return params
    return {**params, **new}


def shown(name: str, *arguments: object, **options: object) -> str:
    """A short repr: the call of a function, without options that are None."""
    words = [str(argument) for argument in arguments]
    words += [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return f"{name}({', '.join(words)})"


def shown_shape(shape: Shape) -> int | Shape:
    """A shape as one writes it: the size of a vector."""
    return shape[0] if len(shape) == 1 else shape


def check_key(key: Array, fix: str = "") -> None:
    """Checks that `key` is a random key, of either kind.

    Raises:
        TypeError: if it is not.
    """
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return
        if key.dtype == np.uint32 and key.ndim == 1:
            return
    raise TypeError(f"`key` must be a random key, such as `jax.random.key(0)`; got {key!r}.{fix}")


def as_array(name: str, value: ArrayLike) -> Array | np.ndarray:
    """An array of numbers, from an array-like.

    Raises:
        TypeError: if it is none.
        ValueError: if entries of it are masked.
    """
    array = value
    if not isinstance(array, jax.Array | np.ndarray):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError):
            array = np.asarray(None)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(f"`{name}` must be an array of numbers; got a {type(value).__name__}.")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        row = np.argwhere(np.ma.getmaskarray(value))[0][0]
        raise ValueError(
            f"`{name}` must have no masked entries; got one in row {row}. Perhaps drop those rows?"
        )
    return array


def _as_context(context: Context) -> Context:
    if context is None:
        return None
    if isinstance(context, Mapping):
        return {key: as_array(f'context["{key}"]', each) for key, each in context.items()}
    return as_array("context", context)


def _as_shape(sample_shape: SampleShape) -> Shape:
    try:
        sizes = tuple(sample_shape) if isinstance(sample_shape, Iterable) else (sample_shape,)
        shape = tuple(map(operator.index, sizes))
    except TypeError:
        shape = (-1,)
    if any(size < 0 for size in shape) or any(isinstance(size, bool) for size in sizes):
        raise TypeError(
            "`sample_shape` must be an integer of at least 0, or a tuple of them; got "
            f"{sample_shape!r}."
        )
    return shape


@compiled()
def _log_prob(family: Family, params: Params, x: ArrayLike, context: Context) -> Array:
    return family.distribution(params, context).log_prob(x)


@compiled(static_argnums=(3,))
def _sample(
    family: Family, params: Params, key: Array, sample_shape: Shape, context: Context
) -> Array:
    return family.distribution(params, context).sample(seed=key, sample_shape=sample_shape)


@compiled(static_argnums=(3,))
def _sample_and_log_prob(
    family: Family, params: Params, key: Array, sample_shape: Shape, context: Context
) -> tuple[Array, Array]:
    return family.distribution(params, context).sample_and_log_prob(
        seed=key, sample_shape=sample_shape
    )


class Wrapper(Family):
    """A family made of another, whose properties are that one's where it does not say otherwise.

    Attributes:
        family: the inner family.
    """

    family: Family

    @property
    def event_shape(self) -> Shape:
        """That of the inner family."""
        return self.family.event_shape

    @property
    def context_shape(self) -> Shape | None:
        """That of the inner family."""
        return self.family.context_shape

    @property
    def reparameterized(self) -> bool:
        """That of the inner family."""
        return self.family.reparameterized

    @functools.cached_property
    def support(self) -> Support:
        """That of the inner family."""
        return self.family.support

    def owns(self, family: Family) -> bool:
        return super().owns(family) or self.family.owns(family)


class Composed(Wrapper):
    """A family of another one, whose context is computed and whose distribution may be moved on.

        context -> features -> distribution of the inner family -> `push` of it

    Parameters are {"family": ..., **own}. What is handed back in training comes back here only.
    """

    def own(self, key: Array) -> dict[str, Params]:
        """Fresh parameters beside those of the inner family."""
        del key
        return {}

    def features(self, params: Params, context: Context) -> Context:
        """The context of the inner family."""
        del params
        return context

    def train_features(
        self, params: Params, key: Array, context: Context
    ) -> tuple[Context, dict[str, Params]]:
        """The same in training, and those of the own parameters that are new."""
        del key
        return self.features(params, context), {}

    def push(
        self, params: Params, inner: distrax.Distribution, context: Context
    ) -> distrax.Distribution:
        """The distribution of this family, from that of the inner one."""
        del params, context
        return inner

    def init(self, key: Array) -> Params:
        family_key, key = jax.random.split(key)
        return {"family": bare_init(self.family, family_key), **self.own(key)}

    def distribution(self, params: Params, context: Context = None) -> distrax.Distribution:
        inner = self.family.distribution(params["family"], self.features(params, context))
        return self.push(params, inner, context)

    def train_distribution(
        self, params: Params, key: Array, context: Context = None
    ) -> tuple[distrax.Distribution, Params]:
        key, family_key = jax.random.split(key)
        features, new = self.train_features(params, key, context)
        inner, own = self.family.train_distribution(params["family"], family_key, features)
        return self.push(params, inner, context), replaced(params, family=own, **new)

    def owns(self, family: Family) -> bool:
        return Family.owns(self, family)
