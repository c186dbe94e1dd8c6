import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi import objectives
from flowvi.params import partition
from flowvi.posteriors import default_family
from tests.tolerances import STANDARD_ERRORS

KEY = jax.random.key(0)
LOG_2PI = np.log(2 * np.pi)

quick = functools.partial(fv.fit_posterior, key=KEY, progress=False)


def named_target():
    """log rate ~ N(1, 0.5^2) and mean | rate ~ N(rate, 1): log Z = 0."""

    def log_density(p):
        log_rate = jnp.log(p["rate"])
        prior = -0.5 * ((log_rate - 1) / 0.5) ** 2 - jnp.log(0.5) - 0.5 * LOG_2PI - log_rate
        return prior + jnp.sum(-0.5 * (p["mean"] - p["rate"]) ** 2 - 0.5 * LOG_2PI)

    return fv.Target.from_named(log_density, {"rate": ((), "positive"), "mean": ((2,), "real")})


@pytest.fixture(scope="module")
def posterior():
    with jax.enable_x64(True):
        return quick(named_target(), num_steps=500)


@pytest.mark.usefixtures("x64")
class TestPosterior:
    def test_the_gap_is_small_and_nothing_is_warned_of(self, posterior):
        elbo = posterior.elbo(jax.random.key(1), 20_000)
        assert -STANDARD_ERRORS * elbo.standard_error < -elbo.value < 0.01
        evidence = posterior.log_evidence(jax.random.key(1), 20_000)
        assert abs(evidence.value) < STANDARD_ERRORS * evidence.standard_error + 1e-6
        assert posterior.diagnosis.messages == ()
        assert posterior.psis(jax.random.key(1), 20_000).ess > 0.95
        # The start alone, a normal distribution, was not that good.
        assert posterior.start.elbo < -0.02
        assert "khat" in repr(posterior)

    def test_samples_have_the_users_names_and_space(self, posterior):
        samples = posterior.sample(KEY, 2_500)
        assert {name: leaf.shape for name, leaf in samples.items()} == {
            "rate": (2_500,),
            "mean": (2_500, 2),
        }
        assert (samples["rate"] > 0).all()
        u, log_q = posterior.sample_and_log_prob(KEY, 2_500)
        assert u.dtype == jnp.float64
        trainable, _ = partition(posterior.params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float64"}
        np.testing.assert_array_equal(posterior.constrain(u)["rate"], samples["rate"])
        np.testing.assert_allclose(posterior.log_prob(u), log_q, atol=1e-6)
        np.testing.assert_allclose(
            posterior.log_weights(KEY, 2_500), posterior.target(u) - log_q, atol=1e-9
        )

    def test_moments(self, posterior):
        u, _ = posterior.sample_and_log_prob(KEY, 40_000)
        np.testing.assert_allclose(u[:, 0].mean(), 1.0, atol=0.02)
        np.testing.assert_allclose(u[:, 0].std(), 0.5, rtol=0.03)
        resampled = posterior.resample(KEY, 20_000)
        np.testing.assert_allclose(jnp.log(resampled["rate"]).mean(), 1.0, atol=0.03)
        assert len(np.unique(resampled["rate"])) > 15_000

    def test_summary(self, posterior):
        summary = posterior.summary(KEY, 10_000)
        assert summary.labels == ["rate", "mean[0]", "mean[1]"]
        rate = np.exp(1 + 0.5**2 / 2)
        np.testing.assert_allclose(summary.mean, rate, rtol=0.05)
        np.testing.assert_allclose(summary.weighted_mean, rate, rtol=0.05)
        lines = str(summary).splitlines()
        assert lines[0].split()[:5] == ["mean", "sd", "q05", "median", "q95"]
        assert lines[1].startswith("rate ")

    def test_files(self, posterior, tmp_path):
        path = tmp_path / "posterior.flowvi"
        posterior.save(path)
        again = fv.Posterior.load(path, posterior.target, key=KEY)
        assert again.family == posterior.family
        u, _ = posterior.sample_and_log_prob(KEY, 10)
        np.testing.assert_array_equal(again.log_prob(u), posterior.log_prob(u))
        assert again.diagnosis.messages == ()
        with pytest.raises(ValueError, match="`like` must be configured as what was saved"):
            fv.Posterior.load(path, posterior.target, key=KEY, family=fv.iaf(3))

    def test_pictures(self, posterior):
        from flowvi import plotting

        plt = pytest.importorskip("matplotlib.pyplot")
        plt.switch_backend("agg")
        figure = plotting.marginals(posterior, KEY, num_samples=500)
        assert [axis.get_xlabel() for axis in figure.axes[:3]] == ["rate", "mean[0]", "mean[1]"]
        figure = plotting.pairs(posterior, KEY, names=["mean"], num_samples=500)
        assert len(figure.axes) == 4
        with pytest.raises(ValueError, match=r"`names` must be among rate, .*; got 'sigma'"):
            plotting.pairs(posterior, KEY, names=["sigma"])
        plt.close("all")


def test_single_precision_and_one_dimension():
    posterior = quick(fv.Target(lambda u: -0.5 * jnp.sum((u - 1000.0) ** 2), 1), num_steps=20)
    u, _ = posterior.sample_and_log_prob(KEY, 5_000)
    assert u.dtype == jnp.float32
    assert abs(u.mean() - 1000.0) < 0.1
    assert abs(posterior.diagnosis.elbo.value - 0.5 * LOG_2PI) < 1e-2


def test_minibatches_of_a_likelihood():
    x = np.random.default_rng(0).normal(size=(2_000, 2)) + [0.0, 10.0]
    target = fv.Target.from_likelihood(
        lambda mean: -0.5 * jnp.sum(mean**2),
        lambda mean, rows: -0.5 * jnp.sum((rows - mean) ** 2, -1),
        x,
        event_size=2,
    )
    posterior = quick(target, num_steps=100, batch_size=128, num_samples=16)
    u = np.asarray(posterior.sample(KEY, 20_000))
    sd = 1 / np.sqrt(2_001)
    np.testing.assert_allclose(u.mean(0), x.sum(0) / 2_001, atol=0.1 * sd)
    np.testing.assert_allclose(u.std(0), sd, rtol=0.1)


def test_any_family_and_objective():
    target = fv.Target(lambda u: -0.5 * jnp.sum(u**2) - 0.1 * jnp.sum(u**4), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fv.PosteriorWarning)
        for family, objective in (
            (fv.mean_field(2), functools.partial(objectives.Renyi, alpha=0.5, num_samples=16)),
            (fv.full_rank(2), functools.partial(objectives.ScoreFunction, num_samples=16)),
        ):
            posterior = quick(target, family=family, objective=objective, num_steps=20)
            assert posterior.family.family == family
            assert np.isfinite(posterior.diagnosis.elbo.value)


def test_the_start_is_kept_where_the_fit_is_worse():
    import optax

    target = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fv.PosteriorWarning)
        posterior = quick(target, num_steps=30, optimizer=optax.sgd(-1.0))
    assert abs(posterior.diagnosis.elbo.value - LOG_2PI) < 1e-3


def normal(u):
    return -0.5 * jnp.sum(u**2)


def banana(u):
    return -0.5 * u[0] ** 2 - 0.5 * ((u[1] - u[0] ** 2) / 0.3) ** 2


@pytest.mark.parametrize(
    ("log_density", "options", "num_steps"),
    [
        (normal, {}, 1_000),
        (banana, {}, 4_000),
        (normal, {"family": fv.mean_field(2)}, 4_000),
        (normal, {"optimizer": optax.sgd(1e-3)}, 4_000),
    ],
)
def test_an_easy_start_takes_few_steps(log_density, options, num_steps, x64):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fv.PosteriorWarning)
        quick(
            fv.Target(log_density, 2),
            callback=lambda look: seen.append(look.num_steps) is None,  # enough was seen
            **options,
        )
    assert set(seen) == {num_steps}


WARNS = {
    # Tails of |u|^-1.5: no normal distribution or flow of one has them.
    "heavy_tails": (lambda u: -0.75 * jnp.sum(jnp.log1p(u**2)), "k-hat|effective|standard error"),
    "flat_direction": (lambda u: -0.5 * u[0] ** 2 + 0.0 * u[1], "may not be normalisable"),
    "holes": (
        lambda u: -0.5 * jnp.sum(u**2) + jnp.where(u[0] > 1.5, jnp.nan, 0.0),
        "not finite at .* of the draws",
    ),
}


@pytest.mark.parametrize("name", WARNS)
def test_what_should_not_be_trusted_is_warned_of(name):
    log_density, message = WARNS[name]
    with pytest.warns(fv.PosteriorWarning, match=message):
        posterior = quick(fv.Target(log_density, 2), num_steps=20)
    assert posterior.diagnosis.messages


def test_second_fit_compiles_nothing():
    from tests.training.helpers import compilations

    target = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
    quick(target, num_steps=5)
    with compilations() as names:
        quick(target, num_steps=5)
    assert names == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"family": 3}, TypeError, "`family` must be a family"),
        ({"family": fv.iaf(3)}, ValueError, r"`family` must have event shape \(2,\)"),
        ({"family": fv.iaf(2, context_size=1)}, ValueError, "`family` must take no context"),
        ({"objective": 3}, TypeError, "`objective` must be a function"),
        ({"batch_size": 3}, ValueError, "`batch_size` must be None for a target without rows"),
        ({"tempering": 2.0}, ValueError, "`tempering` must be None or a number between 0 and 1"),
        (
            {"tempering": 0.1, "objective": objectives.ELBO},
            ValueError,
            "`tempering` must be None where `objective` is given",
        ),
        ({"num_steps": 0}, ValueError, "`num_steps` must be a positive integer"),
        ({"key": 3}, TypeError, "`key` must be a random key"),
    ],
)
def test_bad_input(options, error, message):
    target = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
    with pytest.raises(error, match=message):
        quick(target, **options)


def test_no_target():
    with pytest.raises(TypeError, match="`target` must be a target, such as"):
        fv.fit_posterior(lambda u: u.sum(), key=KEY)


def test_default_family_is_the_identity():
    family = default_family(3)
    x = jax.random.normal(KEY, (4, 3))
    expected = fv.standard_normal(3).log_prob({}, x)
    np.testing.assert_allclose(family.log_prob(family.init(KEY), x), expected, rtol=1e-5)


def two_modes(u):
    """Two normals of scale 1, ten apart, with weights 0.8 and 0.2."""
    first = -0.5 * (u[0] - 5.0) ** 2 + jnp.log(0.8)
    second = -0.5 * (u[0] + 5.0) ** 2 + jnp.log(0.2)
    return jnp.logaddexp(first, second) - 0.5 * LOG_2PI


def test_a_mode_that_is_left_out_is_warned_of_where_a_run_ended_in_it(x64):
    with pytest.warns(fv.PosteriorWarning, match=r"modes are missing.*`tempering=0.1`"):
        posterior = quick(fv.Target(two_modes, 1), num_steps=20)
    # Nothing else could have told.
    assert len(posterior.diagnosis.messages) == 1
    assert posterior.diagnosis.ess > 0.9
    assert abs(posterior.diagnosis.log_evidence.value - np.log(0.8)) < 0.01


def test_tempering_finds_all_modes_and_their_weights(x64):
    posterior = quick(fv.Target(two_modes, 1), num_steps=1000, num_samples=64, tempering=0.1)
    u = posterior.sample(jax.random.key(1), 20_000)
    assert abs((u[:, 0] > 0).mean() - 0.8) < 0.05
    assert abs(posterior.diagnosis.log_evidence.value) < 0.05
