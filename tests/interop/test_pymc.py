"""Models of PyMC as targets."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from benchmarks.models.by_numpyro import CASES, EFFECTS, ERRORS
from tests.interop import unfitted
from tests.tolerances import FLOAT32, FLOAT64

# Its numba does not know the numpy of later Pythons.
pm = pytest.importorskip("pymc", reason="PyMC is not installed", exc_type=ImportError)

import pytensor.tensor as pt  # noqa: E402
from pytensor.compile.ops import wrap_py  # noqa: E402

from benchmarks.models.by_pymc import MODELS, model_of  # noqa: E402

SCHOOLS = list("ABCDEFGH")

#: PyMC keeps some of its constants to nine digits.
OWN = 1e-8

#: Between them: transforms of positive numbers and of an interval, deterministic variables.
QUICK = ["eight_schools", "zero_inflated"]


def check_densities(name):
    model, case = model_of(name), CASES[name]()
    target = fv.Target.from_pymc(model)
    # It sets JAX's precision, unless flowvi imported it first.
    from pymc.sampling.jax import get_jaxified_graph

    inputs = [model.rvs_to_values[variable] for variable in model.free_RVs]
    # Its transforms are PyMC's own, and so is their log-determinant.
    change = get_jaxified_graph(inputs=inputs, outputs=[model.logp() - model.logp(jacobian=False)])
    u = 0.5 * np.random.default_rng(0).normal(size=(100, target.event_size))
    values = target.constrain(u)

    @jax.jit
    def by_hand(u, values):
        theta = target.layout.constrain_and_log_det(u)[0]
        return case.log_density(values) + change(*theta.values())[0]

    densities = target(u)
    assert np.isfinite(densities).all()
    np.testing.assert_allclose(densities, jax.vmap(by_hand)(u, values), rtol=OWN)
    np.testing.assert_allclose(target.unconstrain(values), u, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("name", QUICK)
def test_densities_are_those_by_hand(name, x64):
    check_densities(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(QUICK)))
def test_densities_of_more_models_are_those_by_hand(name, x64):
    check_densities(name)


@functools.cache
def schools():
    with pm.Model(coords={"school": SCHOOLS}) as model:
        errors = pm.Data("errors", ERRORS)
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        z = pm.Normal("z", 0, 1, dims="school")
        theta = pm.Deterministic("theta", mu + tau * z, dims="school")
        pm.Normal("y", theta, errors, observed=EFFECTS, dims="school")
    return model


@pytest.mark.filterwarnings("ignore")  # of PyMC's and ArviZ's dependencies
@pytest.mark.compilations(60)
def test_draws_speak_the_names_and_coords_of_pymc():
    posterior = unfitted(fv.Target.from_pymc(schools()))
    assert not jax.config.read("jax_enable_x64")  # PyTensor's backend would set it
    assert posterior.target.labels()[:3] == ["mu", "tau", "z[0]"]
    data = posterior.to_arviz(jax.random.key(0), 20, 2)
    drawn = data.posterior
    assert drawn["theta"].dims == ("chain", "draw", "school")
    assert list(drawn["school"].values) == SCHOOLS
    expected = drawn["mu"] + drawn["tau"] * drawn["z"]
    np.testing.assert_allclose(drawn["theta"], expected, rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(data.observed_data["y"], EFFECTS)
    away = (EFFECTS - drawn["theta"].values) / ERRORS
    expected = -0.5 * away**2 - np.log(ERRORS) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(data.log_likelihood["y"], expected, rtol=1e-3, atol=1e-3)
    assert data.posterior_predictive["y"].shape == (2, 20, 8)
    assert data.prior["theta"].shape == (1, 20, 8)
    assert data.prior_predictive["y"].shape == (1, 20, 8)


def bad_discrete():
    pm.Normal("x")
    pm.Poisson("count", 3)


def bad_for_jax():
    @wrap_py(itypes=[pt.dscalar], otypes=[pt.dscalar])
    def foreign(x):
        return x

    x = pm.Normal("x")
    pm.Potential("p", foreign(x))


BAD = {
    "discrete": (bad_discrete, "no discrete free random variables; got count. Perhaps sum it out"),
    "jax": (bad_for_jax, "one that PyTensor can turn into a function of JAX; got NotImplemented"),
    "empty": (lambda: None, "must have free random variables; got none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models(name):
    make, match = BAD[name]
    with pm.Model() as model:
        make()
    with pytest.raises(ValueError, match=match) as caught:
        fv.Target.from_pymc(model)
    assert "\n" not in str(caught.value)


def test_bad_arguments(monkeypatch):
    with pytest.raises(TypeError, match="`model` must be a model of PyMC; got 3"):
        fv.Target.from_pymc(3)
    target = fv.Target.from_pymc(schools())
    with pytest.raises(ValueError, match="must have the names mu, tau, z; got mu"):
        target.unconstrain({"mu": jnp.zeros(())})

    def missing(library):
        raise importlib.metadata.PackageNotFoundError(library)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"must have pymc to work with; got none. .*\[pymc\]"):
        fv.Target.from_pymc(schools())
