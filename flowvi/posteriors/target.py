"""What a posterior is fitted to: a log density, and parameters laid out in one vector."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks, interop
from flowvi.checks import require
from flowvi.compiling import compiled
from flowvi.interop import callback
from flowvi.interop.model import Model
from flowvi.layouts import Layout, Parameters, Theta, as_float, as_layout, labels_of
from flowvi.params import Array, PyTree, Shape
from flowvi.posteriors import vectorise


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
        model: a model of another library that the log density is of. Then `constrain` gives what
            that model computes too, in its names.
        twice_differentiable: whether the log density has second derivatives.
        expensive: whether a call of the log density costs far more than a step of a flow.

    Raises:
        TypeError: if a function is none.
        ValueError: if the size is not positive, `layout` is of another one, or rows and their
            likelihood are not given together.

    Source: Carpenter et al., "Stan: A Probabilistic Programming Language", 2017, for densities over
    the unconstrained vector.

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
    model: Model | None = None
    twice_differentiable: bool = True
    expensive: bool = False

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
                of which either may be None or infinite; a kind of `flowvi.bijectors.Constrained`,
                such as "simplex" or "corr_cholesky"; a constraint of numpyro's; or a bijector from
                the reals, of Distrax's or TFP's.

        Example:
            >>> import jax.numpy as jnp
            >>> import flowvi as fv
            >>> target = fv.Target.from_named(
            ...     lambda p: jnp.log(p["share"]).sum(), {"share": ((3,), "simplex")}
            ... )
            >>> [f"{share:.2f}" for share in target.constrain(jnp.zeros(2))["share"]]
            ['0.33', '0.33', '0.33']
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
        _check_one_of(event_size, parameters)
        layout = None if parameters is None else as_layout(parameters)
        size = cast(int, event_size if layout is None else layout.event_size)
        return cls(
            log_prior, size, layout=layout, log_likelihood=log_likelihood, data=_as_rows(data)
        )

    @classmethod
    def from_callback(
        cls,
        value_and_grad: callback.ValueAndGrad,
        event_size: int | None = None,
        *,
        parameters: Parameters | None = None,
        num_threads: int | None = None,
    ) -> "Target":
        """A target whose log density is no function of JAX: of Stan, of C++, of a simulator.

        It is called for many vectors at once, each in a thread, which helps where it releases
        Python's lock, as compiled code does. Only its gradient is known: the start is then found
        without second derivatives. It must not call JAX.

        Args:
            value_and_grad: a numpy vector of shape [D], in double precision -> its log density, and
                the gradient of that, of shape [D]. What it raises ends the fit; where there is no
                density, return -inf.
            event_size: the length of the parameters' vector; or
            parameters: the named parameters, as in `from_named`: the vector is then all of them,
                one after the other, inside their supports. The Jacobian is added here.
            num_threads: calls at once; by default as many as there are processors, 1 if the
                function must not be called while another call runs.

        Example:
            >>> import numpy as np
            >>> import flowvi as fv
            >>> target = fv.Target.from_callback(lambda u: (-0.5 * u @ u, -u), 2)
            >>> float(target(np.ones(2)))
            -1.0
        """
        _check_one_of(event_size, parameters)
        layout = None if parameters is None else as_layout(parameters)
        if layout is None:
            size = width = checks.positive_int("event_size", event_size)
        else:
            size, width = layout.event_size, layout.support.event_shape[0]
        function: Any = callback.log_density(value_and_grad, width, num_threads)
        density = function if layout is None else callback.of_named(function)
        return cls(density, size, layout=layout, twice_differentiable=False, expensive=True)

    @classmethod
    def from_numpyro(
        cls, model: Callable[..., object], *args: object, **kwargs: object
    ) -> "Target":
        """A target of a model of numpyro and its data: as `numpyro.infer.NUTS` sees it.

        Draws have the names of its sites, deterministic ones included; `numpyro.infer.Predictive`
        and `numpyro.infer.log_likelihood` take them. Discrete sites that numpyro can enumerate are
        summed out, for which it needs funsor. Where one plate takes a subsample of the data, the
        target is one over rows, and `batch_size` of `fit_posterior` says how many a step sees.

        Args:
            model: a function with numpyro's primitives.
            args: its arguments.
            kwargs: its named arguments.

        Raises:
            ImportError: if numpyro is not installed.
            ValueError: if the model does not run; if a site has no prior, an improper one and no
                data, a discrete support that cannot be enumerated, or data of another shape.

        Example:
            >>> import numpy as np, numpyro, numpyro.distributions as dist
            >>> import flowvi as fv
            >>> def model(y):
            ...     sd = numpyro.sample("sd", dist.HalfNormal(1.0))
            ...     numpyro.sample("y", dist.Normal(0.0, sd), obs=y)
            >>> fv.Target.from_numpyro(model, np.array([0.3, -0.4])).labels()
            ['sd']
        """
        adapter = interop.adapter("numpyro", "fv.Target.from_numpyro")
        return cls._of_model(adapter.NumpyroModel(model, args, kwargs))

    @classmethod
    def from_pymc(cls, model: object) -> "Target":
        """A target of a model of PyMC, through PyTensor's JAX backend.

        The vector is that of the model's value variables, with PyMC's own transforms. Draws have
        the names of its random variables, and of what is deterministic.

        Args:
            model: a `pymc.Model`.

        Raises:
            ImportError: if PyMC is not installed.
            ValueError: if a free random variable is discrete, or the model has something that JAX
                lacks.

        Example:
            >>> import pymc as pm  # doctest: +SKIP
            >>> with pm.Model() as model:  # doctest: +SKIP
            ...     sd = pm.HalfNormal("sd")
            ...     pm.Normal("y", 0, sd, observed=[0.3, -0.4])
            >>> fv.Target.from_pymc(model).labels()  # doctest: +SKIP
            ['sd']
        """
        adapter = interop.adapter("pymc", "fv.Target.from_pymc")
        return cls._of_model(adapter.PyMCModel(model))

    @classmethod
    def _of_model(cls, model: Model) -> "Target":
        layout = as_layout(model.parameters)
        size = layout.event_size
        if model.num_rows is None:
            return cls(model.log_density, size, layout=layout, model=model)
        rows: dict[str, Any] = {"log_likelihood": model.log_likelihood}
        rows["data"] = np.arange(model.num_rows)
        return cls(model.log_prior, size, layout=layout, model=model, **rows)

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
        terms = self._row_terms(theta, rows)
        return value + (self.num_rows or 1) / len(terms) * jnp.sum(terms) + log_det

    def row_terms(self, u: Array, rows: PyTree) -> Array:
        """The log likelihood of each of some rows at one vector."""
        return self._row_terms(self._constrain(u)[0], rows)

    def _row_terms(self, theta: Theta, rows: PyTree) -> Array:
        terms = cast(Callable[[Theta, PyTree], Array], self.log_likelihood)(theta, rows)
        num_rows, got = jax.tree.leaves(rows)[0].shape[0], jnp.shape(terms)
        rule = f"`log_likelihood` must return one log density for each row, of shape {(num_rows,)}"
        fix = "Perhaps sum over the last axis of the data alone?"
        require(got == (num_rows,), rule, f"shape {got}", fix, say=str)
        return terms

    def log_joint(self, params: PyTree, key: Array | None, z: Array, batch: PyTree) -> Array:
        """What objectives call: the log density at z of shape [..., D] and rows of the data."""
        return vectorise.over(self.at, z.reshape(-1, self.event_size), batch).reshape(z.shape[:-1])

    def constrain(self, u: ArrayLike) -> Theta:
        """The user's parameters at u of shape [..., D]: {name: array}, or u itself."""
        u = self._vectors("u", u)
        if self.model is None:
            return self._constrain(u)[0]
        found = _values(self, u)
        return {name: found[name] for name in self.model.names}

    def unconstrain(self, parameters: Theta) -> Array:
        """The inverse of `constrain`.

        Raises:
            ValueError: if a parameter is outside of its support; the message names it.
        """
        if self.model is not None:
            parameters = self._parameters_of(self.model, parameters)
        if self.layout is not None:
            return self.layout.unconstrain(parameters)
        return self._vectors("parameters", parameters)

    def labels(self) -> list[str]:
        """One label for each number of what `constrain` gives, in its order: "m[0,1]"."""
        if self.model is not None:
            return labels_of(self.value_shapes())
        if self.layout is None:
            return [f"u[{index}]" for index in range(self.event_size)]
        return self.layout.labels()

    def check(self) -> None:
        """Checks, from shapes alone, that the log density returns a floating scalar."""
        u = jax.ShapeDtypeStruct((self.event_size,), jnp.result_type(float))
        jax.eval_shape(self.at, u, self.data)

    def value_shapes(self) -> dict[str, Shape]:
        """The shapes of what `constrain` gives at one vector, by name."""
        u = jax.ShapeDtypeStruct((self.event_size,), jnp.result_type(float))
        values = jax.eval_shape(self.constrain, u)
        if not isinstance(values, dict):
            return {"u": values.shape}
        names = values if self.model is None else self.model.names  # tracing sorts them
        return {name: values[name].shape for name in names}

    def _parameters_of(self, model: Model, values: Theta) -> Theta:
        """The parameters of a model's values, which may have leading axes."""
        rule = "`parameters` must be a dict by the names of the model"
        require(isinstance(values, Mapping), rule, type(values).__name__, error=TypeError, say=str)
        shapes = self.value_shapes()
        known = {name: as_float(each) for name, each in values.items() if name in shapes}
        for name, each in known.items():
            checks.trailing_shape(name, each, shapes[name], "this target")
        function = model.parameters_of
        name = next(iter(known), None)
        for _ in range(0 if name is None else known[name].ndim - len(shapes[name])):
            function = jax.vmap(function)
        return function(known)

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


@compiled()
def _values(target: Target, u: Array) -> dict[str, Array]:
    """What a target's model shows, at u of shape [..., D]."""

    def values(u: Array, rows: None) -> dict[str, Array]:
        return cast(Model, target.model).values(target._constrain(u)[0])

    lead = u.shape[:-1]
    found = vectorise.over(values, u.reshape(-1, u.shape[-1]), None)
    return {name: each.reshape(*lead, *each.shape[1:]) for name, each in found.items()}


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


def _check_one_of(event_size: int | None, parameters: Parameters | None) -> None:
    if (event_size is None) == (parameters is None):
        got = "neither" if event_size is None else "both"
        raise ValueError(f"`event_size` must be given, or else `parameters`; got {got}.")


def _check_scalar(name: str, value: object) -> None:
    shape = getattr(value, "shape", () if isinstance(value, int | float) else None)
    got = type(value).__name__ if shape is None else f"shape {shape}"
    rule = f"`{name}` must return a scalar for one vector of parameters"
    require(shape == (), rule, got, "Perhaps sum the terms?", say=str)
    dtype = jnp.result_type(value)  # type: ignore[arg-type]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must return a floating number; got dtype {dtype}.")
