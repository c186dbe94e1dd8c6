"""What a posterior is fitted to: a log density, and parameters laid out in one vector."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.checks import require
from flowvi.compiling import compiled
from flowvi.params import Array, PyTree, Shape
from flowvi.posteriors import vectorise
from flowvi.supports import Support, SupportLike, as_support, concatenated

#: {name: (shape, support)}, as users write it.
Parameters = Mapping[str, tuple[int | Sequence[int], SupportLike]]

#: Parameters in the user's space: an array, or {name: array}.
Theta = PyTree

_FORM = '{"tau": ((), "positive"), "theta": ((8,), "real"), "p": ((3,), (0, 1))}'


def as_float(value: ArrayLike) -> Array:
    """An array, or what numpy can make one of, in JAX's floating precision."""
    is_array = isinstance(value, jax.Array)
    return jnp.asarray(value if is_array else np.asarray(value), jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and supports of parameters, in the order of the vector, and their joint support."""

    names: tuple[str, ...]
    supports: tuple[Support, ...]
    support: Support

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the parameters."""
        return tuple(support.event_shape for support in self.supports)

    @property
    def event_size(self) -> int:
        """The length of the vector."""
        return self.support.free_shape[0]

    def constrain_and_log_det(self, u: Array) -> tuple[dict[str, Array], Array]:
        """The parameters at u of shape [..., D], and log |det d theta / du| of shape [...]."""
        theta, log_det = u, jnp.zeros(u.shape[:-1], u.dtype)
        bijector = self.support.bijector()
        if bijector is not None:
            theta, log_det = bijector.forward_and_log_det(u)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = zip(self.names, self.shapes, jnp.split(theta, ends[:-1], axis=-1), strict=True)
        return {n: part.reshape(*u.shape[:-1], *shape) for n, shape, part in parts}, log_det

    def unconstrain(self, parameters: Mapping[str, ArrayLike]) -> Array:
        """The vectors, of shape [..., D], at parameters of shapes [..., *shape]."""
        if not isinstance(parameters, Mapping) or set(parameters) != set(self.names):
            got = parameters if isinstance(parameters, Mapping) else [type(parameters).__name__]
            rule = f"`parameters` must have the names {', '.join(self.names)}"
            raise ValueError(f"{rule}; got {', '.join(map(str, got))}.")
        parts = []
        for name, support in zip(self.names, self.supports, strict=True):
            value, shape = as_float(parameters[name]), support.event_shape
            checks.trailing_shape(name, value, shape, "this target")
            if not isinstance(value, jax.core.Tracer):  # which has no values yet
                single = value.ndim == len(shape)
                support.check(value if single else value.reshape(-1, *shape), name)
            parts.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
        theta = jnp.concatenate(parts, -1)
        bijector = self.support.bijector()
        return theta if bijector is None else bijector.inverse(theta)

    def labels(self) -> list[str]:
        """One label for each number of the parameters: "tau", "theta[0]", "m[0,1]"."""
        return [
            f"{name}[{','.join(map(str, index))}]" if shape else name
            for name, shape in zip(self.names, self.shapes, strict=True)
            for index in np.ndindex(*shape)
        ]


def as_layout(parameters: Parameters) -> Layout:
    """The layout of {name: (shape, support)}, for supports as `as_support` takes them."""
    kind, is_dict = type(parameters).__name__, isinstance(parameters, Mapping)
    require(is_dict, f"`parameters` must be a dict such as {_FORM}", kind, error=TypeError, say=str)
    if not parameters:
        raise ValueError(f"`parameters` must have at least one name, as in {_FORM}; got none.")
    shapes, supports = [], []
    for name, pair in parameters.items():
        rule, place = "`parameters` must have strings as names", f"parameters[{name!r}]"
        require(isinstance(name, str), rule, name, error=TypeError)
        rule, is_pair = f"`{place}` must be a pair (shape, support)", isinstance(pair, tuple | list)
        require(is_pair and len(pair) == 2, f"{rule}, as in {_FORM}", pair, error=TypeError)
        shapes.append(checks.shape(f"{place}[0]", pair[0]))
        try:
            supports.append(as_support(pair[1], shapes[-1]))
            supports[-1].bijector()
        except (TypeError, ValueError) as error:
            raise type(error)(f"In `{place}`: {error}") from None
    return Layout(tuple(parameters), tuple(supports), concatenated(supports))


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A log density that need not be normalised, of a vector without constraints.

    A target is compared by identity: use the same object again, and a second fit compiles nothing.
    Its precision is that of JAX: double where `jax_enable_x64` is set.

    Args:
        log_density: u of shape [event_size], or {name: array} where there is a layout -> scalar.
            It is differentiated and vectorised. Beside a likelihood over rows it is the log prior.
        event_size: D, the length of u.

    Attributes:
        layout: the named parameters that u stands for; None where it stands for itself.
        log_likelihood: (parameters, rows) -> the log density of each row.
        data: the rows: a pytree of arrays with a common leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> target = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
        >>> float(target(jnp.ones(2)))
        -1.0
        >>> target = fv.Target.from_named(lambda p: -p["rate"], {"rate": ((), "positive")})
        >>> float(target(jnp.zeros(1)))  # the logarithm of an exponential variable, at 0
        -1.0
    """

    log_density: Callable[[Theta], Array]
    event_size: int
    _: dataclasses.KW_ONLY
    layout: Layout | None = None
    log_likelihood: Callable[[Theta, PyTree], Array] | None = None
    data: PyTree = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        size = checks.positive_int("event_size", self.event_size)
        object.__setattr__(self, "event_size", size)
        likelihood: Any = self.log_likelihood
        pairs = ((self._density_name, self.log_density), ("log_likelihood", likelihood))
        for name, function in pairs[: 1 if likelihood is None else 2]:
            require(callable(function), f"`{name}` must be a function", function, error=TypeError)
        layout: Any = self.layout
        fits = layout is None or (isinstance(layout, Layout) and layout.event_size == size)
        rule = f"`layout` must be None or a layout of event size {size}"
        require(fits, f"{rule}, as `fv.Target.from_named` makes it", layout)
        if (self.data is None) != (likelihood is None):
            rule = "`data` must be given together with `log_likelihood`; got one of them"
            raise ValueError(f"{rule}. Perhaps make it with `fv.Target.from_likelihood`?")
        if self.data is not None:
            object.__setattr__(self, "data", _as_rows(self.data))

    @classmethod
    def from_named(cls, log_density: Callable[[Theta], Array], parameters: Parameters) -> "Target":
        """A target over named parameters with supports.

        Args:
            log_density: {name: array}, inside the supports -> scalar, the log density with respect
                to these parameters. The Jacobian of the map from the vector is added here, once.
            parameters: {name: (shape, support)}; a support is "real", "positive", or (low, high),
                of which either may be None or infinite.
        """
        layout = as_layout(parameters)
        return cls(log_density, layout.event_size, layout=layout)

    @classmethod
    def from_likelihood(
        cls,
        log_prior: Callable[[Theta], Array],
        log_likelihood: Callable[[Theta, PyTree], Array],
        data: PyTree,
        event_size: int | None = None,
        *,
        parameters: Parameters | None = None,
    ) -> "Target":
        """A target made of a prior and a likelihood over rows, which may be subsampled.

            log p(u) = log prior(theta) + sum_i log likelihood(theta; row i) + log |d theta / du|

        With B rows out of N, as `batch_size` of `fit_posterior` says, the sum is estimated, without
        bias, by N / B times the sum over them.

        Args:
            log_prior: parameters -> scalar.
            log_likelihood: (parameters, rows) -> the log densities, of shape [number of rows].
            data: an array, or a pytree of arrays with a common leading axis: the rows.
            event_size: the length of the parameters' vector; or
            parameters: the named parameters, as in `from_named`.
        """
        if (event_size is None) == (parameters is None):
            got = "neither" if event_size is None else "both"
            raise ValueError(f"`event_size` must be given, or else `parameters`; got {got}.")
        layout = None if parameters is None else as_layout(parameters)
        size = cast(int, event_size if layout is None else layout.event_size)
        return cls(
            log_prior, size, layout=layout, log_likelihood=log_likelihood, data=_as_rows(data)
        )

    @property
    def num_rows(self) -> int | None:
        """The number of rows of the data; None where there are none."""
        return None if self.data is None else len(jax.tree.leaves(self.data)[0])

    def __call__(self, u: ArrayLike) -> Array:
        """The log density at u of shape [..., D], of shape [...]. Compiled."""
        return _evaluate(self, self._vectors("u", u), self.data)

    def at(self, u: Array, rows: PyTree) -> Array:
        """The log density at one vector, its likelihood estimated from some of the rows."""
        theta, log_det = self._constrain(u)
        value = self.log_density(theta)
        _check_scalar(self._density_name, value)
        if self.log_likelihood is None:
            return value + log_det
        terms = self.log_likelihood(theta, rows)
        num_rows, got = jax.tree.leaves(rows)[0].shape[0], jnp.shape(terms)
        rule = f"`log_likelihood` must return one log density for each row, of shape {(num_rows,)}"
        fix = "Perhaps sum over the last axis of the data alone?"
        require(got == (num_rows,), rule, f"shape {got}", fix, say=str)
        return value + (self.num_rows or 1) / num_rows * jnp.sum(terms) + log_det

    def log_joint(self, params: PyTree, key: Array | None, z: Array, batch: PyTree) -> Array:
        """What objectives call: the log density at z of shape [..., D] and rows of the data."""
        return vectorise.over(self.at, z.reshape(-1, self.event_size), batch).reshape(z.shape[:-1])

    def constrain(self, u: ArrayLike) -> Theta:
        """The user's parameters at u of shape [..., D]: {name: array}, or u itself."""
        return self._constrain(self._vectors("u", u))[0]

    def unconstrain(self, parameters: Theta) -> Array:
        """The inverse of `constrain`."""
        if self.layout is not None:
            return self.layout.unconstrain(parameters)
        return self._vectors("parameters", parameters)

    def labels(self) -> list[str]:
        """One label for each coordinate of the vector, in the user's names."""
        if self.layout is None:
            return [f"u[{index}]" for index in range(self.event_size)]
        return self.layout.labels()

    def check(self) -> None:
        """Checks, from shapes alone, that the log density returns a floating scalar."""
        u = jax.ShapeDtypeStruct((self.event_size,), jnp.result_type(float))
        jax.eval_shape(self.at, u, self.data)

    @property
    def _density_name(self) -> str:
        return "log_density" if self.log_likelihood is None else "log_prior"

    def _vectors(self, name: str, u: ArrayLike) -> Array:
        u = as_float(u)
        checks.trailing_shape(name, u, (self.event_size,), "this target")
        return u

    def _constrain(self, u: Array) -> tuple[Theta, Array | float]:
        return (u, 0.0) if self.layout is None else self.layout.constrain_and_log_det(u)


@compiled()
def _evaluate(target: Target, u: Array, rows: PyTree) -> Array:
    return target.log_joint({}, None, u, rows)


def _as_rows(data: PyTree) -> PyTree:
    """Data as JAX's arrays. A list of numbers, or of lists of them, is one array."""
    if isinstance(data, list) and all(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(data)):
        data = np.asarray(data)
    data = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), data)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    got = ", ".join(map(str, shapes)) or "none"
    if not shapes or () in shapes:
        raise ValueError(f"`data` must be arrays whose leading axis is the row; got shapes {got}.")
    counts = {shape[0] for shape in shapes}
    if len(counts) > 1 or 0 in counts:
        rule = "`data` must have the same number of rows, at least one, in all arrays"
        raise ValueError(f"{rule}; got shapes {got}.")
    return jax.tree.map(jnp.asarray, data)


def _check_scalar(name: str, value: object) -> None:
    shape = getattr(value, "shape", () if isinstance(value, int | float) else None)
    got = type(value).__name__ if shape is None else f"shape {shape}"
    rule = f"`{name}` must return a scalar for one vector of parameters"
    require(shape == (), rule, got, "Perhaps sum the terms?", say=str)
    dtype = jnp.result_type(value)  # type: ignore[arg-type]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must return a floating number; got dtype {dtype}.")
