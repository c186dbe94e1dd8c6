import functools
import pickle
import types
import warnings

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi import objectives
from flowvi.families import Flow
from flowvi.params import partition
from flowvi.posteriors import default_family, stages
from flowvi.posteriors.diagnosis import (
    Diagnosis,
    count_rising_directions,
    diagnose,
    warnings_of_fit,
)
from tests.tolerances import STANDARD_ERRORS

KEY = jax.random.key(0)
LOG_2PI = np.log(2 * np.pi)

quick = functools.partial(fv.fit_posterior, key=KEY, progress=False)
compiled = []


@jax.monitoring.register_event_duration_secs_listener
def count(event, duration, **kwargs):
    del duration, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(event)


def named(p):
    """log rate ~ N(1, 0.5^2) and mean | rate ~ N(rate, 1): log Z = 0."""
    log_rate = jnp.log(p["rate"])
    prior = -0.5 * ((log_rate - 1) / 0.5) ** 2 - jnp.log(0.5) - 0.5 * LOG_2PI - log_rate
    return prior + jnp.sum(-0.5 * (p["mean"] - p["rate"]) ** 2 - 0.5 * LOG_2PI)


NAMED = fv.Target.from_named(named, {"rate": ((), "positive"), "mean": ((2,), "real")})


@pytest.fixture(scope="module", autouse=True)
def small_flows():
    """Default flows of fewer layers and units: they compile in half the time."""

    def flow(size, transformer="affine"):
        layers = fv.iaf(size, num_layers=2, hidden_sizes=[32, 32], transformer=transformer)
        return Flow(layers, fv.full_rank(size).transform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "default_family", flow)
        yield


@pytest.fixture(scope="module")
def posterior():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        fitted = quick(NAMED, num_steps=600, num_samples=256)
    jax.config.update("jax_disable_most_optimizations", before)
    return fitted


@pytest.mark.usefixtures("x64")
@pytest.mark.compilations(120)  # of the fit
class TestPosterior:
    def test_the_gap_is_small_and_nothing_is_warned_of(self, posterior):
        elbo = posterior.elbo(jax.random.key(1), 20_000)
        assert -STANDARD_ERRORS * elbo.standard_error < -elbo.value < 0.01
        evidence = posterior.log_evidence(jax.random.key(1), 20_000)
        assert abs(evidence.value) < STANDARD_ERRORS * evidence.standard_error + 1e-6
        assert posterior.diagnosis.messages == ()
        assert posterior.psis(jax.random.key(1), 20_000).ess > 0.95
        assert posterior.diagnose(KEY, 1000).lost == 0
        # The start alone, a normal distribution, was not that good.
        assert posterior.start.elbo < -0.02
        assert "khat" in repr(posterior)
        assert posterior.result.params is posterior.params

    def test_samples_have_the_users_names_and_space(self, posterior):
        samples = posterior.sample(KEY, 2_500)
        assert {name: leaf.shape for name, leaf in samples.items()} == {
            "rate": (2_500,),
            "mean": (2_500, 2),
        }
        assert np.all(np.asarray(samples["rate"]) > 0)
        u, log_q = posterior.sample_and_log_prob(KEY, 2_500)
        assert u.dtype == jnp.float64
        trainable, _ = partition(posterior.params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float64"}
        np.testing.assert_array_equal(posterior.constrain(u)["rate"], samples["rate"])
        np.testing.assert_allclose(posterior.log_prob(u), log_q, atol=1e-6)
        expected = np.asarray(posterior.target(u)) - np.asarray(log_q)
        np.testing.assert_allclose(posterior.log_weights(KEY, 2_500), expected, atol=1e-9)

    def test_moments(self, posterior):
        u = np.asarray(posterior.sample_and_log_prob(KEY, 40_000)[0])
        np.testing.assert_allclose(u[:, 0].mean(), 1.0, atol=0.02)
        np.testing.assert_allclose(u[:, 0].std(), 0.5, rtol=0.03)
        resampled = np.asarray(posterior.resample(KEY, 20_000)["rate"])
        np.testing.assert_allclose(np.log(resampled).mean(), 1.0, atol=0.03)
        assert len(np.unique(resampled)) > 15_000

    def test_summary(self, posterior):
        summary = posterior.summary(KEY, 10_000)
        assert summary.labels == ["rate", "mean[0]", "mean[1]"]
        rate = np.exp(1 + 0.5**2 / 2)
        np.testing.assert_allclose(summary.mean, rate, rtol=0.05)
        np.testing.assert_allclose(summary.weighted_mean, rate, rtol=0.05)
        sd = rate * np.sqrt(np.exp(0.5**2) - 1)
        np.testing.assert_allclose(summary.sd, [sd, *[np.hypot(sd, 1)] * 2], rtol=0.05)
        lines = str(summary).splitlines()
        assert lines[0].split()[:5] == ["mean", "sd", "q05", "median", "q95"]
        assert lines[1].startswith("rate ")

    def test_files(self, posterior, tmp_path):
        path = tmp_path / "posterior.flowvi"
        posterior.save(path)
        u, _ = posterior.sample_and_log_prob(KEY, 10)
        for again in (fv.load(path, like=NAMED), pickle.loads(pickle.dumps(posterior))):
            np.testing.assert_array_equal(again.log_prob(u), posterior.log_prob(u))
            assert again.diagnosis == posterior.diagnosis
            assert again.family == posterior.family
        with pytest.raises(ValueError, match="`like` must be configured as what was saved"):
            fv.load(path, like=fv.Target(named, 3))

    def test_a_second_fit_compiles_nothing_and_is_the_same_to_the_bit(self, posterior):
        before = len(compiled)
        again = quick(NAMED, num_steps=600, num_samples=256)
        assert len(compiled) == before
        jax.tree.map(np.testing.assert_array_equal, again.params, posterior.params)
        assert again.diagnosis == posterior.diagnosis

    def test_pictures(self, posterior):
        plt = pytest.importorskip("matplotlib.pyplot")
        plt.switch_backend("agg")
        figure = fv.plotting.marginals(posterior, KEY, num_samples=500)
        assert [axis.get_xlabel() for axis in figure.axes[:3]] == ["rate", "mean[0]", "mean[1]"]
        figure = posterior.plot(["mean"], num_samples=500)
        assert len(figure.axes) == 4
        with pytest.raises(ValueError, match=r"`names` must be among rate, .*; got 'sigma'"):
            posterior.plot(["sigma"])
        plt.close("all")


@pytest.mark.compilations(100)
def test_minibatches_in_single_precision_and_one_dimension():
    x = np.random.default_rng(0).normal(size=2_000) + 1000.0
    target = fv.Target.from_likelihood(
        lambda mean: -0.5 * jnp.sum(mean**2),
        lambda mean, rows: -0.5 * (rows - mean) ** 2,
        x,
        event_size=1,
    )
    options = {"num_steps": 100, "batch_size": 128, "num_samples": 16}
    posterior = quick(target, family=fv.mean_field(1), **options)
    u = np.asarray(posterior.sample(KEY, 20_000))
    assert u.dtype == np.float32
    sd = 1 / np.sqrt(2_001)
    np.testing.assert_allclose(u.mean(), x.sum() / 2_001, atol=0.1 * sd)
    np.testing.assert_allclose(u.std(), sd, rtol=0.1)


def normal(u):
    return -0.5 * jnp.sum(u**2)


def banana(u):
    return -0.5 * u[0] ** 2 - 0.5 * ((u[1] - u[0] ** 2) / 0.3) ** 2


NORMAL, BANANA = fv.Target(normal, 2), fv.Target(banana, 2)


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fv.PosteriorWarning)
        yield


@pytest.mark.compilations(80)
def test_the_start_is_kept_where_the_fit_is_worse(no_warning):
    posterior = quick(NORMAL, family=fv.mean_field(2), num_steps=30, optimizer=optax.sgd(-1.0))
    assert posterior.family == fv.whitened(fv.mean_field(2))
    assert abs(posterior.diagnosis.elbo.value - LOG_2PI) < 1e-3
    assert posterior.result.num_steps == 30


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        (fv.full_rank(2), functools.partial(objectives.ScoreFunction, num_samples=16)),
        pytest.param(
            fv.mean_field(2),
            functools.partial(objectives.Renyi, alpha=0.5, num_samples=16),
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.compilations(80)
def test_any_family_and_objective(family, objective, no_warning):
    posterior = quick(NORMAL, family=family, objective=objective, num_steps=20)
    assert posterior.family.family == family
    assert np.isfinite(posterior.diagnosis.elbo.value)


class Options(Exception):  # noqa: N818
    """What the loop was called with."""


@pytest.mark.compilations(80)
def test_an_easy_start_takes_few_steps(monkeypatch):
    assert judged(0.0, elbo=-0.04).is_easy
    assert not judged(0.0, elbo=-0.06).is_easy
    assert not judged(0.0, lost=0.1).is_easy

    def fit(loss_fn, params, **options):
        raise Options(options)

    monkeypatch.setattr(stages, "fit", fit)

    def steps(target, **options):
        with pytest.raises(Options) as caught:
            quick(target, **options)
        return caught.value.args[0]

    assert steps(NORMAL)["num_steps"] == 1_000
    assert steps(NORMAL, family=fv.mean_field(2))["num_steps"] == 3_000
    assert steps(NORMAL, optimizer=optax.sgd(1e-3))["num_steps"] == 3_000
    # All other options reach the loop.
    options = steps(NORMAL, checkpoint_dir="there", resume=True, max_bad_steps=3, averaging=0.9)
    assert options | {"checkpoint_dir": "there", "resume": True, "averaging": 0.9} == options
    assert options["max_bad_steps"] == 3
    assert options["plateau"] is stages.PLATEAU


@pytest.mark.slow
@pytest.mark.compilations(120)
def test_a_resumed_fit_is_one_that_was_never_interrupted(tmp_path, no_warning):
    fit = functools.partial(quick, BANANA, family=fv.mean_field(2), num_steps=2_000)
    whole = fit()
    part = fit(checkpoint_dir=tmp_path, callback=lambda progress: True)
    assert part.result.num_steps < whole.result.num_steps
    again = fit(checkpoint_dir=tmp_path, resume=True)
    assert again.diagnosis == whole.diagnosis
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    np.testing.assert_array_equal(again.result.history["loss"], whole.result.history["loss"])


def test_diagnoses_of_weights():
    rng = np.random.default_rng(0)
    assert diagnose(0.1 * rng.normal(size=10_000)).messages == ()
    heavy = diagnose(rng.pareto(0.8, size=10_000) ** 2)
    assert "Pareto k-hat is" in heavy.messages[0]
    assert "The effective sample size is" in heavy.messages[1]
    assert "The standard error of the log evidence is" in heavy.messages[2]
    assert "nats below the log evidence" in heavy.messages[3]
    assert "! Pareto k-hat" in str(heavy)
    holes = diagnose(np.r_[0.01 * rng.normal(size=98), np.nan, -np.inf])
    assert holes.lost == pytest.approx(0.02)
    assert holes.messages == (
        "The log density is not finite at 2.00% of the draws, which were left out. If it is cut "
        "off, perhaps give supports with `fv.Target.from_named`?",
    )
    assert diagnose(np.full(10, np.nan)).messages == (
        "The log density is finite at none of the draws.",
    )
    with pytest.warns(fv.PosteriorWarning, match=r"not be trusted as it is\. First\. The log den"):
        assert holes.warn(["First."], 1).messages == ("First.", *holes.messages)


def test_diagnoses_of_the_steps_and_far_out():
    size = 2
    whitening = {"loc": np.zeros(size), "matrix": np.eye(size)}
    low_rank = {"loc": np.zeros(size), "scale": np.ones(size)}
    low_rank |= {"basis": np.eye(size), "gain": np.ones(size)}
    flat = fv.Target(lambda u: -0.5 * u[0] ** 2 + 0.0 * u[1], size)
    for start in (whitening, low_rank):
        start = types.SimpleNamespace(whitening=start)
        assert count_rising_directions(flat, start) == 2
        assert count_rising_directions(NORMAL, start) == 0

    def messages(target, losses, num_bad_steps=0):
        result = types.SimpleNamespace(
            history={"loss": losses}, num_bad_steps=num_bad_steps, num_steps=len(losses)
        )
        return " ".join(warnings_of_fit(target, start, result))

    falling, still = np.linspace(100, 0, 200), np.zeros(200)
    assert messages(NORMAL, still) == ""
    assert "may not be normalisable" in messages(flat, still)
    assert "The ELBO still rose by 5 nats" in messages(NORMAL, falling)
    assert "50 of 200 steps were skipped" in messages(NORMAL, still, 50)


def judged(khat, elbo=0.0, lost=0.0, params=0.0):
    elbo, evidence = fv.Estimate(elbo, 0.0), fv.Estimate(0.0, 0.0)
    return stages.Attempt(None, params, None, Diagnosis(elbo, evidence, khat, 1.0, lost, ()))


@pytest.mark.parametrize(
    ("khats", "costs", "expected"),
    [
        ([0.2], [], 1.0),  # nothing to mend
        ([0.9, 0.5, 0.29, 0.1], [0, 0, 0], 1.01),  # the first that is below the bound
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0] * 5, 1.04),  # the smallest
        ([0.9, 0.8, 0.1], [0, 0.1], 1.003),  # none that costs too much
        ([0.9, 0.88, 0.87, 0.9, 0.9, 0.9], [0] * 5, 1.0),  # no gain but noise
    ],
)
def test_draws_are_spread_where_that_bounds_the_weights(khats, costs, expected):
    family = types.SimpleNamespace(widen=lambda params, factor: factor)
    rest = iter(zip(khats[1:], costs, strict=True))

    def judge(factor):
        khat, cost = next(rest)
        return judged(khat, -cost, params=factor)

    assert stages.widened(family, judge, judged(khats[0], params=1.0)).params == expected


WARNS = {
    # Tails of |u|^-1.5: no normal distribution or flow of one has them.
    "heavy_tails": (
        lambda u: -0.75 * jnp.sum(jnp.log1p(u**2)),
        "k-hat|effective|standard error",
    ),
    "flat_direction": (lambda u: -0.5 * u[0] ** 2 + 0.0 * u[1], "may not be normalisable"),
    "holes": (
        lambda u: -0.5 * jnp.sum(u**2) + jnp.where(u[0] > 1.5, jnp.nan, 0.0),
        "not finite at .* of the draws",
    ),
}


@pytest.mark.slow
@pytest.mark.compilations(120)
@pytest.mark.parametrize("name", WARNS)
def test_what_should_not_be_trusted_is_warned_of(name):
    log_density, message = WARNS[name]
    with pytest.warns(fv.PosteriorWarning, match=message):
        posterior = quick(fv.Target(log_density, 2), family=fv.mean_field(2), num_steps=20)
    assert posterior.diagnosis.messages


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"family": 3}, TypeError, "`family` must be a family"),
        ({"family": fv.iaf(3)}, ValueError, r"`family` must have event shape \(2,\)"),
        ({"family": fv.iaf(2, context_size=1)}, ValueError, "`family` must take no context"),
        ({"objective": 3}, TypeError, "`objective` must be a function"),
        ({"batch_size": 3}, ValueError, "`batch_size` must be None for a target without rows"),
        ({"tempering": 2.0}, ValueError, "`tempering` must be None or between 0 and 1; got 2.0"),
        (
            {"tempering": 0.1, "objective": objectives.ELBO},
            ValueError,
            "`tempering` must be None where `objective` is given",
        ),
        ({"num_steps": 0}, ValueError, "`num_steps` must be a positive integer"),
        ({"key": 3}, TypeError, "`key` must be a random key"),
        ({"patience": 3}, TypeError, "`options` must be among num_steps, .*; got patience"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        quick(NORMAL, **options)


def test_no_target():
    with pytest.raises(TypeError, match="`target` must be a target, such as"):
        fv.fit_posterior(lambda u: u.sum(), key=KEY)


def test_default_family_is_the_identity():
    x = np.random.default_rng(0).normal(size=(4, 3))
    one, three = default_family(1), default_family(3)

    @jax.jit
    def log_probs(key, x):
        lone = one.distribution(one.init(key)).log_prob(x[:, :1])
        return lone, three.distribution(three.init(key)).log_prob(x)

    for size, found in zip((1, 3), log_probs(KEY, x), strict=True):
        expected = np.sum(-0.5 * x[:, :size] ** 2 - 0.5 * LOG_2PI, -1)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert default_family(201).event_shape == (201,)


def two_modes(u):
    """Two normals of scale 1, ten apart, with weights 0.8 and 0.2."""
    first = -0.5 * (u[0] - 5.0) ** 2 + jnp.log(0.8)
    second = -0.5 * (u[0] + 5.0) ** 2 + jnp.log(0.2)
    return jnp.logaddexp(first, second) - 0.5 * LOG_2PI


TWO_MODES = fv.Target(two_modes, 1)


@pytest.mark.compilations(100)
def test_a_mode_that_is_left_out_is_warned_of_where_a_run_ended_in_it(x64):
    with pytest.warns(fv.PosteriorWarning, match=r"modes are missing.*`tempering=0.1`"):
        posterior = quick(TWO_MODES, num_steps=20, family=fv.mean_field(1))
    # Short chains from around it tell so too.
    assert any("move the log evidence" in each for each in posterior.diagnosis.messages)
    assert posterior.diagnosis.ess > 0.9
    assert abs(posterior.diagnosis.log_evidence.value - np.log(0.8)) < 0.01


@pytest.mark.slow
@pytest.mark.compilations(120)
def test_tempering_finds_all_modes_and_their_weights(x64):
    posterior = quick(TWO_MODES, num_steps=1000, num_samples=64, tempering=0.1)
    u = posterior.sample(jax.random.key(1), 20_000)
    assert abs((u[:, 0] > 0).mean() - 0.8) < 0.05
    assert abs(posterior.diagnosis.log_evidence.value) < 0.05
