"""Models of numpyro as targets, and families as its distributions and guides."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.util import potential_energy

import flowvi as fv
from benchmarks.models.by_numpyro import CASES, EFFECTS
from flowvi.interop.numpyro import AutoFlow, FlowDistribution
from tests.interop import unfitted
from tests.tolerances import FLOAT64, STANDARD_ERRORS

#: Between them: plates, deterministic sites, a simplex, an order, `scan`, what is summed out, a
#: subsample, an improper prior, `factor` and `mask`.
QUICK = [
    "eight_schools",
    "dirichlet",
    "ordered_logistic",
    "autoregression",
    "capture_recapture",
    "logistic_regression",
    "improper_priors",
    "survival",
]


def check_densities(name):
    case = CASES[name]()
    ours, theirs = case.by_hand(), case.by_numpyro()
    u = np.random.default_rng(0).normal(size=(100, ours.event_size))
    np.testing.assert_allclose(theirs(u), ours(u), rtol=FLOAT64)


@pytest.mark.compilations(150)  # numpyro runs a model once, operation by operation
@pytest.mark.parametrize("name", QUICK)
def test_densities_are_those_by_hand(name, x64):
    check_densities(name)


@pytest.mark.slow
@pytest.mark.compilations(400)
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(QUICK)))
def test_densities_of_more_models_are_those_by_hand(name, x64):
    check_densities(name)


def bounded(y):
    """With a support that varies with another site."""
    top = numpyro.sample("top", dist.HalfNormal(2.0))
    with numpyro.plate("row", 3):
        x = numpyro.sample("x", dist.Uniform(0.0, top))
    numpyro.deterministic("share", x / top)
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


@pytest.mark.compilations(120)
def test_supports_that_vary_with_other_sites(x64):
    target = fv.Target.from_numpyro(bounded, 1.3)
    u = np.random.default_rng(0).normal(size=(2, 4))

    @jax.jit
    def program(u):
        theirs = [
            -potential_energy(bounded, (1.3,), {}, {"top": u[i, 0], "x": u[i, 1:]})
            for i in range(2)
        ]
        values = target.constrain(u)
        return target.log_joint({}, None, u, None), jnp.stack(theirs), values

    ours, theirs, values = program(u)
    np.testing.assert_allclose(ours, theirs, rtol=FLOAT64)
    assert (values["x"] < values["top"][:, None]).all()
    np.testing.assert_allclose(values["share"], values["x"] / values["top"][:, None], rtol=FLOAT64)
    np.testing.assert_allclose(target.unconstrain(values), u, rtol=FLOAT64)
    assert target.labels() == [
        "top",
        *(f"x[{i}]" for i in range(3)),
        *(f"share[{i}]" for i in range(3)),
    ]


@functools.cache
def schools():
    return CASES["eight_schools"]()


@functools.cache
def posterior_of_schools():
    return unfitted(schools().by_numpyro())


@pytest.mark.compilations(200)
def test_draws_speak_the_names_of_numpyro():
    posterior = posterior_of_schools()
    draws = posterior.sample(jax.random.key(1), 6)
    assert {name: x.shape for name, x in draws.items()} == {
        "mu": (6,),
        "tau": (6,),
        "z": (6, 8),
        "theta": (6, 8),
    }
    expected = draws["mu"][:, None] + draws["tau"][:, None] * draws["z"]
    np.testing.assert_allclose(draws["theta"], expected, rtol=1e-4, atol=1e-4)
    case = schools()
    args = [np.float32(each) for each in case.args]  # numpyro does not mix precisions
    found = log_likelihood(case.model, draws, *args)
    assert found["y"].shape == (6, 8)
    predictive = Predictive(numpyro.handlers.uncondition(case.model), draws)
    assert predictive(jax.random.key(2), *args)["y"].shape == (6, 8)
    model = posterior.target.model
    np.testing.assert_allclose(model.pointwise(draws)["y"], found["y"], rtol=1e-5)
    np.testing.assert_allclose(model.observed_data()["y"], EFFECTS)
    assert model.dims["theta"] == ("school",)
    np.testing.assert_allclose(
        posterior.target.unconstrain(draws),
        posterior.sample_and_log_prob(jax.random.key(1), 6)[0],
        rtol=1e-3,
        atol=1e-3,
    )


def test_new_data_have_the_shape_of_the_data():
    """Also where the model has no plate that says how many there are."""

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 0.1), obs=y)

    target = fv.Target.from_numpyro(model, np.zeros(5))
    x = np.array([-10.0, 0.0, 10.0], np.float32)
    new = target.model.posterior_predictive(jax.random.key(0), {"x": x})["y"]
    assert new.shape == (3, 5) and len(np.unique(new)) == 15
    np.testing.assert_allclose(new.mean(1), x, atol=0.5)


def test_rows_of_a_plate_are_a_minibatch(x64):
    target = CASES["logistic_regression"]().by_numpyro()
    assert target.num_rows == 80
    u = np.random.default_rng(0).normal(size=(2, 4))

    @jax.jit
    def program(u):
        parts = [np.arange(80).reshape(8, 10)[i] for i in range(8)]
        return jnp.stack([target.log_joint({}, None, u, part) for part in parts])

    parts = program(u)
    np.testing.assert_allclose(parts.mean(0), target(u), rtol=FLOAT64)
    assert np.ptp(np.asarray(parts)[:, 0]) > 1


def test_a_family_is_a_distribution_of_numpyro():
    family = fv.full_rank(2)
    params = family.init(jax.random.key(0))
    made = FlowDistribution(family, params)

    def model():
        numpyro.sample("x", made)

    target = fv.Target.from_numpyro(model)
    u = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    np.testing.assert_allclose(target(u), family.log_prob(params, u), rtol=1e-4)
    assert jax.tree.map(lambda x: x, made).event_shape == (2,)
    positive = FlowDistribution(fv.standardized(fv.mean_field(2), support="positive"), {})
    assert isinstance(positive.support.base_constraint, type(dist.constraints.interval(0, 1)))
    with pytest.raises(TypeError, match="`family` must be a family"):
        FlowDistribution(3, params)


@pytest.mark.slow
@pytest.mark.compilations(400)
def test_a_guide_learns_what_the_recipe_learns(x64):
    case = schools()
    guide = AutoFlow(case.model)
    svi = SVI(case.model, guide, numpyro.optim.Adam(5e-3), Trace_ELBO(num_particles=16))
    result = svi.run(jax.random.key(0), 800, *case.args, progress_bar=False)
    log_evidence = -32.00449 + np.log(2)  # by quadrature, of a half of a Cauchy density
    assert abs(-result.losses[-200:].mean() - log_evidence) < 0.3
    draws = guide.sample_posterior(
        jax.random.key(1), result.params, *case.args, sample_shape=(2, 50)
    )
    assert draws["theta"].shape == (2, 50, 8)


@pytest.mark.slow
@pytest.mark.compilations(200)
def test_a_posterior_is_a_guide():
    """Its ELBO by numpyro is its ELBO."""
    posterior, case = posterior_of_schools(), schools()
    guide = AutoFlow(case.model, posterior.family, posterior.params)
    loss = Trace_ELBO(num_particles=400)
    svi = SVI(case.model, guide, numpyro.optim.Adam(1e-3), loss)
    state = svi.init(jax.random.key(0), *case.args)
    expected = posterior.elbo(jax.random.key(1), 2_000)
    error = expected.standard_error * np.sqrt(2_000 / 400 + 1)
    got = -svi.evaluate(state, *case.args)
    assert abs(float(got) - expected.value) < STANDARD_ERRORS * error
    with pytest.raises(ValueError, match=r"`family` must have event shape \(10,\)"):
        SVI(case.model, AutoFlow(case.model, fv.mean_field(2)), numpyro.optim.Adam(1.0), loss).init(
            jax.random.key(0), *case.args
        )


def discrete():
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    count = numpyro.sample("count", dist.Poisson(rate))
    numpyro.sample("y", dist.Normal(count, 1.0), obs=1.0)


def loose():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("free", dist.ImproperUniform(dist.constraints.real, (), ()))


def parameter():
    numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), 1.0))


def outer(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", 4):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def local(y):
    with numpyro.plate("row", 4, subsample_size=2) as rows:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])


def nothing():
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.0)


BAD = {
    "no function": (
        3,
        (),
        TypeError,
        "`model` must be a function with numpyro's primitives; got 3",
    ),
    "discrete": (
        discrete,
        (),
        ValueError,
        r"site 'count' .* numpyro can enumerate; got <.*Poisson",
    ),
    "improper": (loose, (), ValueError, "site 'free' .* must have a proper prior, or data"),
    "parameter": (parameter, (), ValueError, "without a prior, as `numpyro.param` 'loc'"),
    "shape": (outer, (np.ones(3),), ValueError, r"data of site 'y' .* \(4,\); got shape \(3,\)"),
    "broadcast": (outer, (np.ones((4, 1)),), ValueError, r"data of site 'y' .* \(4,\); got shape"),
    "arguments": (outer, (), TypeError, "`model` must run with the arguments .* TypeError"),
    "local": (local, (np.ones(4),), ValueError, "no latent site in the plate 'row'.* got x"),
    "nothing": (nothing, (), ValueError, "must have a latent site of real numbers; got no latent"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models(name):
    model, args, error, match = BAD[name]
    with pytest.raises(error, match=match) as caught:
        fv.Target.from_numpyro(model, *args)
    assert "\n" not in str(caught.value)


def test_libraries_that_are_missing_or_old(monkeypatch):
    def missing(library):
        raise importlib.metadata.PackageNotFoundError(library)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    match = r"`fv.Target.from_numpyro` must have numpyro to work with; got none. Perhaps `pip"
    with pytest.raises(ImportError, match=match):
        fv.Target.from_numpyro(nothing)
    monkeypatch.setattr(importlib.metadata, "version", lambda library: "0.3.1")
    with pytest.raises(ImportError, match=r"must have numpyro 0.20 or later; got 0.3.1"):
        fv.Target.from_numpyro(nothing)
