"""What finds the modes of a posterior, leaves an approximation, and draws exactly."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import flowvi as fv
from flowvi import diagnostics
from flowvi.diagnostics import Estimate
from flowvi.families.copies import Copies
from flowvi.families.curved import Curves, curve_of
from flowvi.posteriors import modes
from flowvi.posteriors.annealing import Particles, anneal
from flowvi.posteriors.leaving import departure
from flowvi.posteriors.normals import Dense
from tests.tolerances import STANDARD_ERRORS

KEY = jax.random.key(0)
LOG_2PI = np.log(2 * np.pi)
CENTERS, WEIGHTS = np.array([[0.0, 0.0], [12.0, 5.0]]), np.array([0.7, 0.3])


def two_modes(u):
    """Two normals of scale 1 and 1/2, 13 apart: log Z = 0."""
    squares = jnp.sum((u - CENTERS) ** 2, -1) * jnp.array([1.0, 4.0])
    return logsumexp(jnp.log(WEIGHTS) - 0.5 * squares - LOG_2PI + jnp.array([0.0, 2 * np.log(2)]))


TWO_MODES = fv.Target(two_modes, 2)
NORMAL = fv.whitened(fv.standard_normal(2))


def normal(loc, scale):
    return Dense(np.asarray(loc, float), scale * np.eye(2), np.eye(2) / scale)


@pytest.fixture(scope="module")
def start():
    return NORMAL.place(NORMAL.init(KEY), normal([0, 0], 1.0).whitening())


@pytest.fixture(scope="module")
def far(start):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(float), start)
        return anneal(NORMAL, TWO_MODES, params, KEY, widths=(50.0,), least_ess=0.6)


def test_particles_from_far_away_find_both_modes_and_the_evidence(far):
    assert abs(far.log_evidence) < STANDARD_ERRORS * far.error
    assert far.error < 0.2
    share = (far.u[:, 0] > 6).mean()
    assert abs(share - 0.3) < 0.08
    assert far.num_rungs > 3
    assert far.num_gradients > 1000 * far.num_rungs
    np.testing.assert_allclose(far.u.mean(0), WEIGHTS @ CENTERS, atol=1.2)


def test_a_mixture_of_normals_describes_them(far):
    with jax.enable_x64(True):
        mixture = modes.mixture_of(TWO_MODES, far, [], np.random.default_rng(0))
    assert len(mixture.normals) == 2
    order = np.argsort([each.loc[0] for each in mixture.normals])
    found = np.exp(mixture.log_weights[order])
    np.testing.assert_allclose(found, WEIGHTS, atol=0.03)
    assert abs(mixture.log_evidence) < 0.03
    assert mixture.log_evidence - mixture.elbo < 0.02
    u = mixture.draw(np.random.default_rng(1), 2000)
    assert abs((u[:, 0] > 6).mean() - 0.3) < 0.05


def test_a_normal_that_is_seen_elsewhere_joins_the_mixture(far):
    lone = Particles(*[far.u[far.u[:, 0] < 6]] * 2, *list(vars(far).values())[2:])
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        mixture = modes.mixture_of(TWO_MODES, lone, [normal([12, 5], 0.5)], rng)
        alone = modes.mixture_of(TWO_MODES, lone, [normal([0.1, 0], 1.0)], rng)
    assert abs(mixture.log_evidence) < 0.05
    assert len(alone.normals) == 1


def test_ends_that_others_cover_are_no_modes():
    def end(loc, elbo, scale=1.0):
        return types.SimpleNamespace(normal=normal(loc, scale), elbo=elbo)

    whitening = normal([0, 0], 1.0).whitening()
    found = types.SimpleNamespace(start=types.SimpleNamespace(elbo=-1.0, whitening=whitening))
    ends = [end([0, 0.1], -1.0), end([20, 0], -3.0), end([20, 0.2], -3.1), end([-20, 0], -9.0)]
    kept = modes.distinct(found, ends, np.random.default_rng(0))
    assert [each.loc.tolist() for each in kept] == [[0.0, 0.0], [20.0, 0.0]]


@pytest.mark.usefixtures("x64")
def test_parts_add_up_to_the_density():
    mixture = modes.Mixture((normal([0, 0], 1.0), normal([12, 5], 0.5)), np.log(WEIGHTS))
    u = np.random.default_rng(0).normal(size=(50, 2)) * 6 + 5
    part = modes.Part(TWO_MODES)
    arrays = jax.tree.map(jnp.asarray, mixture.arrays)

    @jax.jit
    def parts(u):
        own = [{"part": fv.Fixed({"mixture": arrays, "index": jnp.asarray(k)})} for k in (0, 1)]
        return logsumexp(jnp.stack([part(each, None, u, None) for each in own]), 0)

    np.testing.assert_allclose(parts(u), TWO_MODES(u), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_mixture_of_copies_is_their_mixture():
    family = Copies(NORMAL, 2)
    params = family.init(KEY)
    each = [
        NORMAL.place(NORMAL.init(KEY), normal(c, s).whitening())
        for c, s in zip(CENTERS, (1, 0.5), strict=True)
    ]
    params["copies"] = jax.tree.map(
        lambda *a: jnp.stack(a), *[{n: p[n] for n in params["copies"]} for p in each]
    )
    params["log_weights"] = fv.Fixed(jnp.log(WEIGHTS))
    u = np.random.default_rng(0).normal(size=(20, 2)) + 6
    np.testing.assert_allclose(family.log_prob(params, u), TWO_MODES(u), rtol=1e-9)
    draws = np.asarray(family.sample(params, KEY, 4000))
    assert abs((draws[:, 0] > 6).mean() - 0.3) < 0.03


def leaving(u, log_density, log_q, own, change=0.0):
    particles = Particles(u, u, log_density, change, 0.02, 1, 0)
    return departure(particles, log_q, own, Estimate(0.0, 0.01))


def test_what_left_an_approximation_is_told_in_words():
    rng = np.random.default_rng(0)
    u, own, zeros = rng.normal(size=(1000, 3)), rng.normal(size=(2000, 3)), np.zeros(1000)
    labels = ["a", "b", "c"]
    assert not leaving(u, zeros, zeros, own).is_suspicious
    words = [
        (leaving(u, zeros, zeros, own, change=0.5), r"log evidence by \+0.50 \+- 0.02 nats"),
        (leaving(u, np.where(np.arange(1000) < 20, 9.0, 0.0), zeros, own), "2.0% of short chains"),
        (leaving(u + [0, 0.6, 0], zeros, zeros, own), r"the mean of b by \+0.[56]\d of its"),
        (leaving(u * [1, 1, 1.7], zeros, zeros, own), r"widen c by a factor of 1.[67]"),
    ]
    for found, message in words:
        assert found.is_suspicious
        text = " ".join(found.messages(labels))
        assert len(list(found.messages(labels))) == 1
        assert re.search(message, text), text


def test_bridge_sampling_is_right_with_tails_on_either_side():
    rng = np.random.default_rng(0)
    for scale in (0.6, 1.6):  # q = N(0, scale^2), p = N(0, 1) times e^2
        own, other = scale * rng.normal(size=20_000), rng.normal(size=20_000)

        def weight(x, scale=scale):
            return 2 - 0.5 * x**2 + 0.5 * (x / scale) ** 2 + np.log(scale)

        found = diagnostics.bridge(weight(own), weight(other))
        assert abs(found.value - 2) < STANDARD_ERRORS * found.standard_error
        assert found.standard_error < 0.02
        rough = diagnostics.bridge(weight(own), weight(other), effective=100)
        assert rough.standard_error > found.standard_error
    assert diagnostics.bridge([-np.inf, -np.inf], [0.0]).standard_error == np.inf


def narrow_and_wide(u):
    """1/2 N(0.5, 0.05^2) + 1/2 N(0, 1) in five coordinates: log Z = 0."""
    narrow = -0.5 * jnp.sum((u - 0.5) ** 2) / 0.05**2 - 5 * jnp.log(0.05)
    return jnp.logaddexp(narrow, -0.5 * jnp.sum(u**2)) - 2.5 * LOG_2PI + jnp.log(0.5)


def ridge(u):
    """x_1 ~ N(0, 10), x_2 ~ N(0.1 x_1^2, 0.05): log Z = 0."""
    residual = (u[1] - 0.1 * u[0] ** 2) / 0.05
    return -0.5 * ((u[0] / 10) ** 2 + residual**2) - LOG_2PI - jnp.log(0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.compilations(300)
@pytest.mark.parametrize(
    ("log_density", "size"),
    [(two_modes, 2), (narrow_and_wide, 5), (ridge, 2)],
    ids=["far", "two_scales", "ridge"],
)
def test_the_default_finds_modes_and_chains_are_exact(log_density, size):
    posterior = fv.fit_posterior(fv.Target(log_density, size), key=KEY, progress=False)
    assert posterior.diagnosis.messages == ()
    elbo = posterior.elbo(jax.random.key(1), 20_000)
    assert -elbo.value < 0.03
    assert posterior.diagnosis.cost.num_gradients < 1_000_000
    refined = posterior.refine(jax.random.key(2), 500, num_chains=4)
    assert refined.messages == ()
    assert abs(refined.log_evidence.value) < STANDARD_ERRORS * refined.log_evidence.standard_error
    if log_density is two_modes:
        share = (refined.u[..., 0] > 6).mean()
        assert abs(share - 0.3) < STANDARD_ERRORS * np.sqrt(0.21 / refined.ess.min())
    assert "rhat" in str(refined)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.compilations(200)
def test_a_gradient_that_is_no_number_is_named():
    def log_density(u):
        return -0.5 * jnp.where(u[0] > 0, jnp.sqrt(u[0]) ** 4, u[0] ** 2) - 0.5 * u[1] ** 2

    with pytest.warns(fv.PosteriorWarning, match="The gradient is not finite at .* of the draws"):
        fv.fit_posterior(
            fv.Target(log_density, 2),
            key=KEY,
            family=fv.mean_field(2),
            num_steps=20,
            progress=False,
        )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.compilations(200)
def test_a_budget_is_kept_and_a_density_that_is_cut_off_is_named():
    def log_density(u):
        return jnp.where(jnp.all(u < 1), -0.5 * jnp.sum(u**2), -jnp.inf)

    with pytest.warns(fv.PosteriorWarning, match="If it is cut off, perhaps give supports"):
        posterior = fv.fit_posterior(
            fv.Target(log_density, 2), key=KEY, max_gradients=60_000, progress=False
        )
    assert posterior.diagnosis.cost.num_gradients < 75_000
    with pytest.raises(ValueError, match="`max_seconds` must be None or positive"):
        fv.fit_posterior(TWO_MODES, key=KEY, max_seconds=-1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.compilations(200)
def test_a_fit_that_is_stopped_goes_on_with_nothing_else():
    with pytest.warns(fv.PosteriorWarning, match="modes are missing|short chains"):
        posterior = fv.fit_posterior(
            TWO_MODES, key=KEY, progress=False, callback=lambda progress: True
        )
    assert not isinstance(posterior.family, Copies)
    assert posterior.stop_reason == "callback"


def parabolas(rng, count, spread=1.0):
    """x_0 normal, x_2 and x_1 along parabolas of it, and a coordinate that follows none."""
    first = spread * rng.normal(size=count)
    second = 0.5 * first**2 + 0.1 * rng.normal(size=count)
    third = 1 - first + 0.3 * first * second + 0.01 * rng.normal(size=count)
    return np.stack([rng.normal(size=count), second, third, first], 1)


@pytest.mark.usefixtures("x64")
def test_a_curve_is_read_off_draws_and_holds_far_from_them():
    rng = np.random.default_rng(0)
    curve, gain = curve_of(parabolas(rng, 1000))
    assert gain > 2
    assert curve_of(rng.normal(size=(1000, 4)))[1] < 0.1  # noise has no curve
    family = Curves(4)
    params = {"curve": fv.Fixed(jax.tree.map(jnp.asarray, curve))}
    x = parabolas(rng, 500, spread=2.0)
    z, log_det = jax.jit(lambda x: family.bijector(params, None).inverse_and_log_det(x))(x)
    assert np.asarray(z)[:, :3].std(0) == pytest.approx(np.ones(3), abs=0.25)
    scales = np.array([1.0, 0.1, 0.01, 1.0])
    assert np.asarray(log_det) == pytest.approx(-np.log(scales).sum(), abs=0.15)


@pytest.mark.usefixtures("x64")
def test_scales_that_follow_a_coordinate_are_read_off_draws():
    rng = np.random.default_rng(2)
    for first in (True, False):
        v = rng.normal(size=(1000, 1))
        columns = [np.exp(0.9 * v - 1) * rng.normal(size=(1000, 3)), v][:: 1 if first else -1]
        curve, gain = curve_of(np.concatenate(columns, 1))
        assert gain == pytest.approx(3 * 0.9**2, rel=0.2)  # half the log of E exp(2 * 0.9 v)
        slopes = curve["log_slope"][:, 3 if first else 0]
        assert np.delete(slopes, 3 if first else 0) == pytest.approx(np.full(3, 0.9), abs=0.1)


@pytest.mark.compilations(50)
def test_the_map_along_curves_has_its_inverse_and_its_determinant():
    rng = np.random.default_rng(1)
    curve = curve_of(parabolas(rng, 300))[0]
    params = {"curve": fv.Fixed(jax.tree.map(jnp.asarray, curve))}
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    fv.testing.check_bijector(Curves(4).bijector(params, None), x)
