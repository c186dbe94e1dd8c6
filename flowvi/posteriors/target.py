"""What a posterior is fitted to: a log density of an unconstrained vector."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.compiling import compiled
from flowvi.posteriors import vectorise
from flowvi.posteriors.supports import Layout, as_layout

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A log density that need not be normalised, of a vector without constraints.

    A target is compared by identity: use the same object again, and a second fit compiles nothing.
    Its precision is that of JAX: double where `jax_enable_x64` is set.

    Args:
        log_density: u of shape [event_size] -> scalar. It is differentiated and vectorised.
        event_size: D, the length of u.

    Attributes:
        layout: the named parameters that u stands for; None where it stands for itself.
        log_prior: where there is a likelihood over rows: parameters -> scalar.
        log_likelihood: the same: (parameters, rows) -> one log density for each row.
        data: the rows: a pytree of arrays with a common leading axis.
        num_rows: their number.

    Raises:
        TypeError: if `log_density` is no function.
        ValueError: if `event_size` is not a positive integer.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> target = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
        >>> float(target(jnp.ones(2)))
        -1.0
    """

    log_density: Callable[[Array], Array]
    event_size: int
    layout: Layout | None = dataclasses.field(default=None, kw_only=True)
    log_prior: Callable[[Any], Array] | None = dataclasses.field(default=None, kw_only=True)
    log_likelihood: Callable[[Any, Any], Array] | None = dataclasses.field(
        default=None, kw_only=True
    )
    data: Any = dataclasses.field(default=None, kw_only=True, repr=False)
    num_rows: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "event_size", checks.positive_int("event_size", self.event_size))
        for name in ("log_density", "log_prior", "log_likelihood"):
            function = getattr(self, name)
            if not (callable(function) or (function is None and name != "log_density")):
                raise TypeError(f"`{name}` must be a function; got {function!r}.")

    @classmethod
    def from_named(cls, log_density: Callable[[Any], Array], parameters: Any) -> "Target":
        """A target over named parameters with supports.

        Args:
            log_density: a dict {name: array} of parameters, inside their supports -> scalar: the
                log density with respect to those parameters. The Jacobian of the map from the
                vector is added here, once.
            parameters: {name: (shape, support)}; a support is "real", "positive", or (low, high),
                of which either may be None or infinite.

        Raises:
            TypeError, ValueError: if `parameters` are not of this kind.

        Example:
            >>> import jax.numpy as jnp
            >>> import flowvi as fv
            >>> target = fv.Target.from_named(lambda p: -p["rate"], {"rate": ((), "positive")})
            >>> float(target(jnp.zeros(1)))  # the logarithm of an exponential variable, at 0
            -1.0
        """
        layout = as_layout(parameters)
        _check_function("log_density", log_density)

        def of_vector(u: Array) -> Array:
            theta, log_det = layout.constrain_and_log_det(u)
            value = log_density(theta)
            _check_scalar("log_density", value)
            return value + log_det

        return cls(of_vector, layout.event_size, layout=layout)

    @classmethod
    def from_likelihood(
        cls,
        log_prior: Callable[[Any], Array],
        log_likelihood: Callable[[Any, Any], Array],
        data: Any,
        event_size: int | None = None,
        *,
        parameters: Any = None,
    ) -> "Target":
        """A target made of a prior and a likelihood over rows, which may be subsampled.

            log p(u) = log prior(theta) + sum_i log likelihood(theta; row i) + log |d theta / du|

        With B rows out of N the sum is estimated, without bias, by N / B times the sum over them:
        see `batch_size` of `fit_posterior`.

        Args:
            log_prior: parameters -> scalar.
            log_likelihood: (parameters, rows) -> array of shape [number of rows], the log density
                of each.
            data: an array, or a pytree of arrays with a common leading axis: the rows.
            event_size: the length of the parameters' vector; or
            parameters: the named parameters, as in `from_named`.

        Raises:
            TypeError, ValueError: if an argument is not of this kind.

        Example:
            >>> import jax.numpy as jnp
            >>> import flowvi as fv
            >>> target = fv.Target.from_likelihood(
            ...     lambda mean: -0.5 * jnp.sum(mean**2),
            ...     lambda mean, x: -0.5 * jnp.sum((x - mean) ** 2, -1),
            ...     jnp.ones((100, 2)),
            ...     event_size=2,
            ... )
            >>> float(target(jnp.zeros(2))), target.num_rows
            (-100.0, 100)
        """
        _check_function("log_prior", log_prior)
        _check_function("log_likelihood", log_likelihood)
        if (event_size is None) == (parameters is None):
            raise ValueError(
                "`event_size` must be given, or else `parameters`; got "
                f"{'neither' if event_size is None else 'both'}. Perhaps `event_size=2` for a "
                "vector of two?"
            )
        layout = None if parameters is None else as_layout(parameters)
        size = event_size if layout is None else layout.event_size
        data, num_rows = _check_rows(data)

        def of_vector(u: Array) -> Array:
            return target.at(u, data)

        target = cls(
            of_vector,
            checks.positive_int("event_size", size),
            layout=layout,
            log_prior=log_prior,
            log_likelihood=log_likelihood,
            data=data,
            num_rows=num_rows,
        )
        return target

    def __call__(self, u: Any) -> Array:
        """The log density at u of shape [..., D], of shape [...]. Compiled.

        Raises:
            ValueError: if the last axis of u is not D.
        """
        u = jnp.asarray(u, jnp.result_type(float))
        checks.trailing_shape("u", u, (self.event_size,), "this target")
        return _evaluate(self, u, self.data)

    def at(self, u: Array, rows: Any) -> Array:
        """The log density at one vector, its likelihood estimated from some of the rows."""
        if self.log_likelihood is None or self.log_prior is None:
            return self.log_density(u)
        theta, log_det = (u, 0.0) if self.layout is None else self.layout.constrain_and_log_det(u)
        prior = self.log_prior(theta)
        _check_scalar("log_prior", prior)
        terms = self.log_likelihood(theta, rows)
        num_rows = jax.tree.leaves(rows)[0].shape[0]
        if jnp.shape(terms) != (num_rows,):
            raise ValueError(
                f"`log_likelihood` must return one log density for each row, of shape "
                f"{(num_rows,)}; got shape {jnp.shape(terms)}. Perhaps sum over the last axis of "
                "the data alone?"
            )
        return prior + (self.num_rows or 1) / num_rows * jnp.sum(terms) + log_det

    def log_joint(self, params: Any, key: Array, z: Array, batch: Any) -> Array:
        """What objectives call: the log density at z of shape [..., D], of shape [...].

        Args:
            params: unused; a target has no parameters of its own.
            key: unused.
            z: vectors.
            batch: rows of the data, or None where there are none.
        """
        del params, key
        return _vectorised(self, z, batch)

    def constrain(self, u: Any) -> Any:
        """The user's parameters at u of shape [..., D]: {name: array}, or u itself."""
        u = jnp.asarray(u)
        checks.trailing_shape("u", u, (self.event_size,), "this target")
        return u if self.layout is None else self.layout.constrain(u)

    def unconstrain(self, parameters: Any) -> Array:
        """The inverse of `constrain`."""
        if self.layout is not None:
            return self.layout.unconstrain(parameters)
        u = jnp.asarray(parameters, jnp.result_type(float))
        checks.trailing_shape("parameters", u, (self.event_size,), "this target")
        return u

    def labels(self) -> list[str]:
        """One label for each coordinate of the vector, in the user's names."""
        if self.layout is None:
            return [f"u[{index}]" for index in range(self.event_size)]
        return self.layout.labels()

    def check(self) -> None:
        """Checks what the log density returns, from shapes alone.

        Raises:
            TypeError: if it is not floating.
            ValueError: if it is not a scalar.
        """
        u = jax.ShapeDtypeStruct((self.event_size,), jnp.result_type(float))
        _check_scalar("log_density", jax.eval_shape(self.at, u, self.data))


def _vectorised(target: Target, u: Array, rows: Any) -> Array:
    flat = u.reshape(-1, target.event_size)
    return vectorise.over(target.at, flat, rows).reshape(u.shape[:-1])


@compiled()
def _evaluate(target: Target, u: Array, rows: Any) -> Array:
    return _vectorised(target, u, rows)


def _check_function(name: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"`{name}` must be a function; got {function!r}.")


def _check_rows(data: Any) -> tuple[Any, int]:
    """(data as JAX's arrays, number of rows)."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    if not shapes or any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            "`data` must be arrays whose leading axis is the row; got shapes "
            f"{', '.join(map(str, shapes)) or 'none'}."
        )
    counts = {shape[0] for shape in shapes}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            "`data` must have the same number of rows, at least one, in all arrays; got shapes "
            f"{', '.join(map(str, shapes))}."
        )
    return jax.tree.map(jnp.asarray, data), counts.pop()


def _check_scalar(name: str, value: Any) -> None:
    shape = getattr(value, "shape", () if isinstance(value, int | float) else None)
    if shape != ():
        got = type(value).__name__ if shape is None else f"shape {shape}"
        raise ValueError(
            f"`{name}` must return a scalar for one vector of parameters; got {got}. Perhaps sum "
            "the terms?"
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f"`{name}` must return a floating number; got dtype {jnp.result_type(value)}."
        )
