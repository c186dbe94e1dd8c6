"""The one idea: a family is a distribution waiting for parameters and a context."""

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from distrax import Distribution
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.compiling import KEPT, compiled
from flowvi.params import Array, Origin, PyTree, Shape
from flowvi.supports import Interval, Support

Params = PyTree
#: An array, a dict of arrays by name, or None.
Context = PyTree
SampleShape = int | tuple[int, ...]
#: A distribution, and parameters with new `Fixed` leaves.
Trained = tuple[Distribution, Params]


class Family(abc.ABC):
    """A distribution waiting for parameters and a context.

    Subclasses are frozen dataclasses with `init` and `distribution`: hashable, and equal when they
    are configured equally, so a family is a static argument of `jax.jit`. Parameters are a dict,
    which `init` marks with the family that they are of: under "origin".

    Attributes:
        event_shape: the shape of one event.
        context_shape: that of one context; None if it takes none; () for a row index.
        reparameterized: whether samples carry gradients to every parameter.
        support: where events may lie.

    Source: the name is that of statistics, as in Casella, Berger, "Statistical Inference", 2002.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.maf(2)
        >>> params = family.init(jax.random.key(0))
        >>> family.distribution(params).log_prob(jnp.zeros((5, 2))).shape
        (5,)
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
        return Interval(self.event_shape)

    @abc.abstractmethod
    def init(self, key: Array) -> Params:
        """Fresh parameters, a pytree whose float leaves outside `Fixed` accept any finite value."""

    @abc.abstractmethod
    def distribution(self, params: Params, context: Context = None) -> Distribution:
        """The distribution at these parameters and this context, for evaluation.

        For a context of shape [*batch, *context_shape], or None where the family takes none, it is
        a Distrax distribution of batch shape [*batch], whose rows never share noise.
        """

    def train_distribution(self, params: Params, key: Array, context: Context = None) -> Trained:
        """The distribution as training sees it, and parameters with new `Fixed` leaves.

        `key` is for what is random in training, such as dropout. The default is the evaluation form
        and unchanged parameters.
        """
        return self.distribution(params, context), params

    def check_support(self, x: ArrayLike, name: str = "x") -> None:
        """Checks that data, of shape [*rows, *event_shape], lie in the support."""
        self.support.check(x, name, repr(self))

    def log_prob(self, params: Params, x: ArrayLike, context: Context = None) -> Array:
        """Log density at `x`, of shape [...] for `x` of shape [..., *event_shape]. Compiled.

        NaN in `x` or `params` gives NaN. Parameters of another family are an error.
        """
        x, context = self._check_data(params, x, context)
        return _log_prob(self, params, x, context)

    def _check_data(self, params: Params, x: PyTree, context: Context) -> tuple[PyTree, Context]:
        check_params(self, params)
        x, context = as_array("x", x), _as_context(context)
        checks.trailing_shape("x", x, self.event_shape, f"{self!r}")
        batch_shape = self.check_context(context)
        rows = x.shape[: x.ndim - len(self.event_shape)]
        try:
            np.broadcast_shapes(rows, batch_shape)
        except ValueError:
            got = f"leading axes {rows} of `x` and {batch_shape} of `context`"
            rule = "`x` and `context` must have the same number of rows"
            raise ValueError(f"{rule}; got {got}.") from None
        return x, context

    def sample(
        self, params: Params, key: Array, sample_shape: SampleShape = (), context: Context = None
    ) -> Array:
        """Samples, of shape sample_shape + batch_shape + event_shape. Compiled."""
        return self._draw("sample", params, key, sample_shape, context)

    def sample_and_log_prob(
        self, params: Params, key: Array, sample_shape: SampleShape = (), context: Context = None
    ) -> tuple[Array, Array]:
        """Samples and their log densities, for the price of the samples. Compiled."""
        return self._draw("sample_and_log_prob", params, key, sample_shape, context)

    def sample_exactly(
        self, params: Params, key: Array, sample_shape: SampleShape = (), context: Context = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples and their log densities on the host, in the precision of the data's units."""
        draws = self.sample_and_log_prob(params, key, sample_shape, context)
        return np.asarray(draws[0]), np.asarray(draws[1])

    def sample_alike(
        self, params: Params, key: Array, num_samples: int, context: ArrayLike
    ) -> np.ndarray:
        """Samples [num_samples, n, *event_shape] at n contexts, on the host, of the same noise.

        So those of one context do not depend on the others, and change smoothly with it.
        """
        return np.asarray(_draw_alike(self, params, key, num_samples, context))

    def _draw(
        self, method: str, params: Params, key: Array, sample_shape: SampleShape, context: Context
    ) -> PyTree:
        check_params(self, params)
        check_key(key, " Perhaps `sample(params, key, sample_shape)`?")
        self.check_context(context := _as_context(context))
        return _draw(self, method, params, key, as_shape(sample_shape), context)

    def check_context(self, context: Context) -> Shape:
        """The batch shape that `context` stands for; a ValueError if it cannot be one."""
        wanted, named = self.context_shape, isinstance(context, Mapping)
        got = "None" if context is None else "a dict" if named else f"shape {jnp.shape(context)}"
        if wanted is None:
            if context is None:
                return ()
            rule = f"`context` must be None for {self!r}, which takes none"
            raise ValueError(f"{rule}; got {got}. Perhaps give the family a `context_size`?")
        if context is None or named:
            rule = f"`context` must be an array whose shape ends in {wanted} for {self!r}"
            raise ValueError(f"{rule}; got {got}.")
        checks.trailing_shape("context", context, wanted, f"{self!r}")
        return jnp.shape(context)[: jnp.ndim(context) - len(wanted)]

    def owns(self, family: "Family") -> bool:
        """Whether parameters of `family` are of this one."""
        return family is self or family == self


def check_params(family: Family, params: Params) -> None:
    """Checks that parameters are those of a family, as far as their mark or their names tell."""
    marked = params.get("origin") if isinstance(params, Mapping) else None
    if isinstance(marked, Origin):
        if not family.owns(marked.family):
            got = f"those of {marked.family!r}{_difference(family, marked.family)}"
            raise ValueError(f"`params` must be those of {family!r}; got {got}.")
        return
    if (names := _names(family)) is None:
        return
    rule = f"`params` must be parameters of {family!r}, as its `init` returns them"
    if not isinstance(params, Mapping):
        fix = " Perhaps they are in another place?" if hasattr(params, "shape") else ""
        fix = " Perhaps pass `result.params`?" if hasattr(params, "params") else fix
        raise TypeError(f"{rule}; got a {type(params).__name__}.{fix}")
    if missing := sorted(names - params.keys()):
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
    """Fresh parameters of a family inside another one."""
    return bare(family.init(key))


def bare(params: Params) -> Params:
    """Parameters inside those of another family: without a mark, which is the outer one's."""
    is_dict = isinstance(params, dict)
    return {n: each for n, each in params.items() if n != "origin"} if is_dict else params


def replaced(params: Params, **new: PyTree) -> Params:
    """Parameters with new `Fixed` leaves in them; the very same ones where nothing is new."""
    return params if all(params[n] is new[n] for n in new) else {**params, **new}


def shown(name: str, *arguments: object, **options: object) -> str:
    """A short repr: the call of a function, without options that are None; (n,) as n."""
    words = [str(a[0] if isinstance(a, tuple) and len(a) == 1 else a) for a in arguments]
    words += [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return f"{name}({', '.join(words)})"


def as_family(value: object, name: str = "family") -> Family:
    """A family that is one."""
    if not isinstance(value, Family):
        raise TypeError(f"`{name}` must be a family, such as `fv.maf(2)`; got {value!r}.")
    return value


def check_key(key: Array, fix: str = "") -> None:
    """Checks that `key` is a random key, of either kind."""
    if isinstance(key, jax.Array | np.ndarray):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if (typed and key.ndim == 0) or (key.dtype == np.uint32 and key.ndim == 1):
            return
    raise TypeError(f"`key` must be a random key, such as `jax.random.key(0)`; got {key!r}.{fix}")


def as_array(name: str, value: ArrayLike) -> Array | np.ndarray:
    """An array of numbers, from an array-like without masked entries."""
    array = value
    if not isinstance(array, jax.Array | np.ndarray):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError):
            array = np.asarray(None)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        got = f"dtype {array.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
        raise TypeError(f"`{name}` must be an array of numbers; got {got}.")
    if not isinstance(array, np.ma.MaskedArray):
        return array
    if np.ma.is_masked(array):
        row = np.argwhere(np.ma.getmaskarray(array))[0][0]
        rule = f"`{name}` must have no masked entries"
        raise ValueError(f"{rule}; got one in row {row}. Perhaps drop those rows?")
    return np.ma.getdata(array)


def _as_context(context: Context) -> Context:
    if isinstance(context, Mapping):
        return {key: as_array(f'context["{key}"]', each) for key, each in context.items()}
    return None if context is None else as_array("context", context)


def as_shape(sample_shape: SampleShape) -> Shape:
    """The shape that a number or a tuple of numbers stands for."""
    try:
        sizes = tuple(sample_shape) if isinstance(sample_shape, Iterable) else (sample_shape,)
        shape = tuple(map(operator.index, sizes))
    except TypeError:
        shape = (-1,)
    if any(size < 0 for size in shape) or any(isinstance(size, bool) for size in sizes):
        rule = "`sample_shape` must be an integer of at least 0, or a tuple of them"
        raise TypeError(f"{rule}; got {sample_shape!r}.")
    return shape


@compiled()
def _log_prob(family: Family, params: Params, x: ArrayLike, context: Context) -> Array:
    return family.distribution(params, context).log_prob(x)


@compiled(2, static_argnums=(4,))
def _draw(
    family: Family, method: str, params: Params, key: Array, shape: Shape, context: Context
) -> PyTree:
    return getattr(family.distribution(params, context), method)(seed=key, sample_shape=shape)


@compiled(1, static_argnums=(3,))
def _draw_alike(
    family: Family, params: Params, key: Array, num_samples: int, context: ArrayLike
) -> Array:
    def draw(context: ArrayLike) -> Array:
        return family.distribution(params, context).sample(seed=key, sample_shape=num_samples)

    return jax.vmap(draw, out_axes=1)(context)


class Wrapper(Family):
    """A family made of another, whose properties are that one's where it does not say otherwise."""

    family: Family

    @property
    def event_shape(self) -> Shape:
        return self.family.event_shape

    @property
    def context_shape(self) -> Shape | None:
        return self.family.context_shape

    @property
    def reparameterized(self) -> bool:
        return self.family.reparameterized

    @functools.cached_property
    def support(self) -> Support:
        return self.family.support


class Composed(Wrapper):
    """A family of another one, whose context is computed and whose distribution may be moved on.

        context -> features -> distribution of the inner family -> `push` of it

    Parameters are {"family": ..., **own}. What is handed back in training comes back here only.
    """

    def own(self, key: Array) -> dict[str, Params]:
        """Fresh parameters beside those of the inner family."""
        return {}

    def features(self, params: Params, context: Context) -> Context:
        """The context of the inner family."""
        return context

    def train_features(
        self, params: Params, key: Array, context: Context
    ) -> tuple[Context, Params]:
        """The same in training, and those of the own parameters that are new."""
        return self.features(params, context), {}

    def push(self, params: Params, inner: Distribution, context: Context) -> Distribution:
        """The distribution of this family, from that of the inner one."""
        return inner

    def init(self, key: Array) -> Params:
        family_key, key = jax.random.split(key)
        return {"family": bare_init(self.family, family_key), **self.own(key)}

    def distribution(self, params: Params, context: Context = None) -> Distribution:
        inner = self.family.distribution(params["family"], self.features(params, context))
        return self.push(params, inner, context)

    def train_distribution(self, params: Params, key: Array, context: Context = None) -> Trained:
        key, family_key = jax.random.split(key)
        features, new = self.train_features(params, key, context)
        inner, own = self.family.train_distribution(params["family"], family_key, features)
        return self.push(params, inner, context), replaced(params, family=own, **new)
