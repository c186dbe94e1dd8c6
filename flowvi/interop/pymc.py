"""PyMC: its models as targets, through PyTensor's JAX backend."""

import concurrent.futures
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pymc
from pytensor.graph.replace import graph_replace

from flowvi.checks import require, shown
from flowvi.interop.model import Draws, Model
from flowvi.layouts import Theta
from flowvi.params import Array

# PyTensor's JAX backend sets JAX's precision to its own when it is first imported. What it was is
# read in a thread without a context such as `jax.enable_x64`.
with concurrent.futures.ThreadPoolExecutor(1) as _pool:
    _before = _pool.submit(jax.config.read, "jax_enable_x64").result()
from pymc.sampling.jax import get_jaxified_graph

jax.config.update("jax_enable_x64", _before)

Variables = Sequence[Any]


class PyMCModel(Model):
    """A model of PyMC.

    The parameters are its value variables, which its transforms map from real numbers.

    Args:
        model: the model.
    """

    def __init__(self, model: pymc.Model):
        rule = "`model` must be a model of PyMC"
        require(isinstance(model, pymc.Model), rule, model, error=TypeError, say=shown)
        self._model = model
        variables = model.free_RVs
        require(variables, "`model` must have free random variables", "none", say=str)
        discrete = ", ".join(variable.name for variable in model.discrete_value_vars)
        fix = "Perhaps sum it out, as `pm.Mixture` does?"
        rule = "`model` must have no discrete free random variables"
        require(not discrete, rule, discrete, fix, say=str)
        inputs = [model.rvs_to_values[variable] for variable in variables]
        self.parameters = {each.name: (shape, "real") for each, shape in self._shapes(inputs)}
        self.names = tuple(each.name for each in (*variables, *model.deterministics))
        self._observed = [each.name for each in model.observed_RVs]
        values = model.replace_rvs_by_values([*variables, *model.deterministics])
        self._density = _as_jax(inputs, [model.logp()], self.parameters)
        self._values = _as_jax(inputs, values, self.parameters)
        self._terms: Callable[..., Any] | None = None
        if self._observed:
            terms = model.logp(model.observed_RVs, sum=False)
            self._terms = _as_jax(inputs, terms, self.parameters)
        self._inverse = self._backwards(variables)
        self.dims = {n: _axes(n, axes) for n, axes in model.named_vars_to_dims.items() if axes}
        self.coords = {n: np.asarray(x) for n, x in model.coords.items() if x is not None}

    def _shapes(self, inputs: Variables) -> list[tuple[Any, tuple[int, ...]]]:
        if all(None not in each.type.shape for each in inputs):
            return [(each, tuple(each.type.shape)) for each in inputs]
        point = self._model.initial_point()
        return [(each, np.shape(point[each.name])) for each in inputs]

    def _backwards(self, variables: Variables) -> Callable[..., Any]:
        """The value variables of random variables."""
        given = {variable: variable.type(name=variable.name) for variable in variables}
        found = []
        for variable, value in given.items():
            transform = self._model.rvs_to_transforms[variable]
            inputs = variable.owner.inputs
            found.append(value if transform is None else transform.forward(value, *inputs))
        outputs = graph_replace(found, given, strict=False)
        return _quiet(get_jaxified_graph(inputs=list(given.values()), outputs=outputs))

    def _ordered(self, theta: Theta) -> list[Array]:
        return [theta[name] for name in self.parameters]

    def log_density(self, theta: Theta) -> Array:
        return jnp.asarray(self._density(*self._ordered(theta))[0], jnp.result_type(float))

    def values(self, theta: Theta) -> dict[str, Array]:
        found = self._values(*self._ordered(theta))
        return {n: jnp.asarray(x) for n, x in zip(self.names, found, strict=True)}

    def parameters_of(self, values: Mapping[str, Array]) -> Theta:
        names = [variable.name for variable in self._model.free_RVs]
        missing = [name for name in names if name not in values]
        rule = f"`parameters` must have the names {', '.join(names)}"
        require(not missing, rule, ", ".join(values) or "none", say=str)
        found = self._inverse(*(values[name] for name in names))
        return dict(zip(self.parameters, found, strict=True))

    def observed_data(self) -> dict[str, np.ndarray]:
        data = {}
        for variable in self._model.observed_RVs:
            value = self._model.rvs_to_values[variable]
            found = value.get_value() if hasattr(value, "get_value") else value.data
            data[variable.name] = np.asarray(found)
        return data

    def pointwise(self, draws: Draws) -> dict[str, np.ndarray]:
        if self._terms is None:
            return {}
        terms, inverse = self._terms, self.parameters_of
        given = {v.name: jnp.asarray(draws[v.name]) for v in self._model.free_RVs}

        @jax.jit
        def program(given: dict[str, Array]) -> list[Array]:
            return jax.lax.map(lambda each: terms(*self._ordered(inverse(each))), given)

        found = program(given)
        return {n: np.asarray(x) for n, x in zip(self._observed, found, strict=True)}

    def posterior_predictive(self, key: Array, draws: Draws) -> dict[str, np.ndarray]:
        if not self._observed:
            return {}
        names = [variable.name for variable in self._model.free_RVs]
        count = len(next(iter(draws.values())))
        points = [{n: np.asarray(draws[n][i]) for n in names} for i in range(count)]
        with self._model:
            found = pymc.sample_posterior_predictive(
                points,
                var_names=self._observed,
                return_inferencedata=False,
                random_seed=_seed(key),
                progressbar=False,
            )
        return {n: _without_chain(found[n], count) for n in self._observed}

    def prior(self, key: Array, num_draws: int) -> tuple[Draws, Draws]:
        options: dict[str, Any] = {"return_inferencedata": False, "random_seed": _seed(key)}
        names = [*self.names, *self._observed]
        try:
            with self._model, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of potentials, which priors leave out
                found = pymc.sample_prior_predictive(num_draws, var_names=names, **options)
        except NotImplementedError:  # a flat prior has no draws
            return {}, {}
        drawn = {n: _without_chain(found[n], num_draws) for n in names}
        return {n: drawn[n] for n in self.names}, {n: drawn[n] for n in self._observed}


def _as_jax(
    inputs: Variables, outputs: Variables, parameters: Mapping[str, tuple[Any, object]]
) -> Callable[..., Any]:
    """A function of JAX of a graph; one line if there is none."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.result_type(float)) for s, _ in parameters.values()]
    try:
        function = _quiet(get_jaxified_graph(inputs=list(inputs), outputs=list(outputs)))
        jax.eval_shape(function, *shapes)
    except Exception as error:
        words = " ".join(str(error).split())
        words = words if len(words) <= 200 else f"{words[:197]}..."
        rule = "`model` must be one that PyTensor can turn into a function of JAX"
        raise ValueError(f"{rule}; got {type(error).__name__}: {words}") from error
    return function


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTensor's without its warning that JAX computes in single precision."""

    def quiet(*args: Array) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Explicitly requested dtype")
            return function(*args)

    return quiet


def _axes(name: str, axes: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(axis or f"{name}_dim_{index}" for index, axis in enumerate(axes))


def _seed(key: Array) -> int:
    return int(np.asarray(jax.random.key_data(key)).ravel()[-1])


def _without_chain(array: np.ndarray, count: int) -> np.ndarray:
    array = np.asarray(array)
    return array if len(array) == count and array.ndim else array.reshape(count, *array.shape[2:])
