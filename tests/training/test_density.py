import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi.objectives import NegativeLogLikelihood, likelihood
from flowvi.training import fit_density
from flowvi.training.units import data_units, parse_support
from tests.training.helpers import Counting, Gauss, compilations

KEY = jax.random.key(0)


def normal(num_rows=400, size=2):
    """Rows in units of their own."""
    return 100.0 + 5.0 * np.random.default_rng(0).normal(size=(num_rows, size))


def quick(family, x, **options):
    defaults = {"num_steps": 20, "validation_fraction": 0, "progress": False}
    return fit_density(family, x, key=KEY, **{**defaults, **options})


def test_units_of_the_training_rows():
    x = normal()
    units = quick(Gauss(), x).params["units"].value
    np.testing.assert_allclose(units["shift"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(units["scale"], x.std(0), rtol=1e-5)
    assert set(units) == {"shift", "scale"}
    # A row that is held out has no say.
    x[::2] += 50.0
    units = quick(Gauss(), x, validation_fraction=0.5).params["units"].value
    assert (np.abs(units["shift"] - x.mean(0)) > 1e-3).all()


def test_history_is_in_the_users_units():
    family, x = Gauss(), normal()
    result = quick(family, x, num_steps=200, batch_size=400, optimizer=optax.adam(0.05))
    best = -np.log(1 / np.sqrt(2 * np.pi * np.e) / x.std(0)).sum()
    np.testing.assert_allclose(result.history["loss"][-1], best, atol=0.05)
    np.testing.assert_allclose(-family.log_prob(result.params, x).mean(), best, atol=0.05)


def test_held_out_rows():
    x = normal()
    result = quick(Gauss(), x, num_steps=100, validation_fraction=0.1, patience=None)
    np.testing.assert_array_equal(result.history["validation_step"], np.arange(2, 101, 2))
    assert len(result.history["validation"]) == 50
    assert result.best_step is not None
    # Rows are not held out where there are too few of them.
    assert "validation" not in quick(Gauss(), x[:9], validation_fraction=0.1).history


def test_overfitting_stops_early():
    # Ten rows and a flow: validation gets worse soon.
    x = normal(20)
    result = fit_density(
        fv.maf(2, num_layers=1, hidden_sizes=[32], transformer="affine"),
        x,
        key=KEY,
        num_steps=2000,
        optimizer=optax.adam(0.01),
        validation_fraction=0.5,
        patience=5,
        progress=False,
    )
    assert result.stop_reason == "patience"
    assert result.num_steps < 2000
    assert result.history["validation"].min() < result.history["validation"][-1]


def test_third_form_only_where_parameters_change():
    x = jnp.asarray(normal(8))
    for family, forms in ((Gauss(), 1), (Counting(), 3)):
        out = NegativeLogLikelihood(family)(family.init(KEY), KEY, {"x": x})
        assert (len(out) if isinstance(out, tuple) else 1) == forms
    assert int(quick(Counting(), normal()).params["seen"].value) == 20


def test_held_out_likelihood_in_chunks(monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", 16)
    family = Gauss(context_shape=(1,))
    x, context = jnp.asarray(normal(50)), jnp.arange(50.0)[:, None]
    params = family.init(KEY)
    whole = -jnp.mean(family.log_prob(params, x, context))
    for num_rows in (50, 48, 7):
        batch = {"x": x[:num_rows], "context": context[:num_rows]}
        whole = -jnp.mean(family.log_prob(params, batch["x"], batch["context"]))
        loss = NegativeLogLikelihood(family, training=False)(params, KEY, batch)
        np.testing.assert_allclose(loss, whole, rtol=1e-5)


def test_second_fit_compiles_nothing():
    def run(shift):
        quick(Gauss(), normal() + shift, num_steps=50, validation_fraction=0.1)

    run(0.0)
    with compilations() as names:
        run(1.0)
    assert names == []


def test_defaults_adapt_to_few_rows():
    result = fit_density(Gauss(), normal(12), key=KEY, progress=False)
    assert result.num_steps <= 500


def test_the_callers_context():
    family = Gauss(context_shape=(2,))
    rng = np.random.default_rng(1)
    context = np.stack([10 + 3 * rng.normal(size=300), np.full(300, 7.0)], 1)
    x = normal(300)
    params = quick(family, x, context=context).params
    units = params["context_units"].value
    np.testing.assert_allclose(units["shift"], context.mean(0), rtol=1e-5)
    # A constant column is no error in a context, and has scale 1.
    np.testing.assert_allclose(units["scale"], [context[:, 0].std(), 1.0], rtol=1e-5)
    # Integers are labels.
    row = np.arange(300)
    family = Gauss(context_shape=())
    params = quick(family, x, context=row).params
    assert params["context_units"].value is None


def test_params_to_start_from():
    x = normal()
    first = quick(Gauss(), x)
    second = quick(Gauss(), x - 50.0, params=first.params, num_steps=1, optimizer=optax.sgd(0.0))
    np.testing.assert_array_equal(second.params["loc"], first.params["loc"])
    np.testing.assert_array_equal(
        second.params["units"].value["shift"], first.params["units"].value["shift"]
    )


def test_double_precision_input():
    x = normal()
    assert x.dtype == np.float64
    assert quick(Gauss(), x).params["units"].value["shift"].dtype == jnp.float32


def test_double_precision(x64):
    params = quick(Gauss(), normal()).params
    assert params["units"].value["shift"].dtype == params["loc"].dtype == jnp.float64


SUPPORTS = {
    "positive": ("positive", [0.0, 0.0], [np.inf, np.inf]),
    "interval": ((-1.0, 4.0), [-1.0, -1.0], [4.0, 4.0]),
    "below": ((None, 3.0), [-np.inf, -np.inf], [3.0, 3.0]),
    "above": ([2, np.inf], [2.0, 2.0], [np.inf, np.inf]),
    "columns": (["positive", (0, 1)], [0.0, 0.0], [np.inf, 1.0]),
    "mixed": ([None, (None, 5)], [-np.inf, -np.inf], [np.inf, 5.0]),
    "pairs": (((0, 1), (2, None)), [0.0, 2.0], [1.0, np.inf]),
}


@pytest.mark.parametrize("case", SUPPORTS)
def test_supports(case):
    support, lower, upper = SUPPORTS[case]
    bounds = parse_support(support, (2,))
    np.testing.assert_array_equal(bounds[0], lower)
    np.testing.assert_array_equal(bounds[1], upper)


@pytest.mark.parametrize("support", [None, "real", (None, None), [None, "real"], (-np.inf, np.inf)])
def test_no_support(support):
    assert parse_support(support, (2,)) is None


def test_support_of_images():
    assert parse_support("positive", (4, 3))[0].shape == (4, 3)


def test_units_with_a_support_are_of_the_unbounded_values():
    rng = np.random.default_rng(0)
    v = 1.0 + 2.0 * rng.normal(size=(2000, 4))
    sigmoid = 1 / (1 + np.exp(-v[:, 2]))
    x = np.stack([np.exp(v[:, 0]), 3 - np.exp(v[:, 1]), -1 + 5 * sigmoid, v[:, 3]], 1)
    bounds = parse_support(["positive", (None, 3), (-1, 4), None], (4,))
    units = data_units(x.astype(np.float32), bounds)
    np.testing.assert_allclose(units["shift"], v.mean(0), atol=1e-3)
    np.testing.assert_allclose(units["scale"], v.std(0), atol=1e-3)
    np.testing.assert_array_equal(units["lower"], [0, -np.inf, -1, -np.inf])
    np.testing.assert_array_equal(units["upper"], [np.inf, 3, 4, np.inf])


def test_samples_never_leave_the_support():
    rng = np.random.default_rng(0)
    x = np.stack([rng.exponential(size=500), rng.beta(0.5, 0.5, size=500)], 1)
    family = fv.maf(2, num_layers=1, hidden_sizes=[8], transformer="affine")
    result = quick(family, x, support=["positive", (0, 1)], num_steps=50)
    samples = family.sample(result.params, KEY, 2000)
    assert (samples > 0).all()
    assert (samples[:, 1] < 1).all()
    assert np.isfinite(family.log_prob(result.params, samples)).all()


@pytest.mark.optimized
def test_two_moons_with_no_settings():
    datasets = pytest.importorskip("sklearn.datasets")
    x, _ = datasets.make_moons(10_000, noise=0.05, random_state=1)
    test, _ = datasets.make_moons(4_000, noise=0.05, random_state=99)
    family = fv.maf(2)
    result = fit_density(family, x, key=KEY, progress=False)
    # Two half circles of radius 1, convolved with the noise, by an integral over the angle.
    angle = (np.arange(2000) + 0.5) * np.pi / 2000
    outer = np.stack([np.cos(angle), np.sin(angle)], 1)
    inner = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)
    means = np.concatenate([outer, inner])
    square = (test**2).sum(1)[:, None] - 2 * test @ means.T + (means**2).sum(1)
    density = np.exp(-square / (2 * 0.05**2)).mean(1) / (2 * np.pi * 0.05**2)
    gap = -family.log_prob(result.params, test).mean() + np.log(density).mean()
    assert gap <= 0.03
