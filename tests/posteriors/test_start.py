"""Optimisation paths and the normal distributions along them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.posteriors import normals, start
from flowvi.posteriors.search import NUM_PATHS, WIDTHS, Candidate, Path, lbfgs

KEY = jax.random.key(0)


def test_lbfgs_reaches_the_minimum_of_a_stiff_valley(x64):
    def rosenbrock(x):
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    @jax.jit
    def program(x):
        path = lbfgs(rosenbrock, x, 200)
        return path, jax.vmap(jax.value_and_grad(rosenbrock))(path.x)

    path, (values, gradients) = jax.device_get(program(np.array([-1.2, 1.0, -1.2, 1.0])))
    np.testing.assert_allclose(path.x[-1], 1.0, atol=1e-6)
    length = int(path.length)
    assert length < 200
    assert (np.diff(path.value[:length]) <= 0).all()
    np.testing.assert_array_equal(path.x[length], path.x[-1])
    np.testing.assert_allclose(path.value, values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(path.gradient, gradients, rtol=1e-6, atol=1e-9)


def test_lbfgs_stays_where_the_function_is_finite(x64):
    def function(x):
        return jnp.sum(x - jnp.log(x))

    starts = np.array([[1e-3, 50.0], [-1.0, -1.0]])
    path = jax.device_get(jax.jit(jax.vmap(lambda x: lbfgs(function, x, 100)))(starts))
    np.testing.assert_allclose(path.x[0, -1], 1.0, atol=1e-6)
    assert (path.x[0] > 0).all()
    assert path.length[1] == 0
    np.testing.assert_array_equal(path.x[1], -1.0)


@functools.cache
def stiff(size=4):
    """A normal distribution of scales 0.01 to 100, off zero, with its log Z."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    scales = np.logspace(-2, 2, size)
    root, mean = basis / scales, np.arange(size)
    log_z = 0.5 * size * np.log(2 * np.pi) + np.log(scales).sum()
    covariance = (basis * scales**2) @ basis.T
    return fv.Target(lambda u: -0.5 * jnp.sum(((u - mean) @ root) ** 2), size), covariance, log_z


def test_the_start_is_exact_for_a_normal_target(x64):
    target, covariance, log_z = stiff()
    found = start.find(target, KEY).start
    assert abs(found.elbo - log_z) < 1e-6
    matrix = found.whitening["matrix"]
    np.testing.assert_allclose(matrix @ matrix.T, covariance, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.whitening["inverse"] @ matrix, np.eye(4), atol=1e-8)
    np.testing.assert_allclose(found.whitening["log_det"], np.linalg.slogdet(matrix)[1], rtol=1e-9)
    # All runs end at one point, so none begins between their ends.
    assert len(found.ends) == NUM_PATHS + 2 * len(WIDTHS)
    low_rank = start.find(target, KEY, rank=20).start
    assert low_rank.origin == "pathfinder"
    assert log_z - 3.0 < low_rank.elbo < log_z + 1e-6
    basis = low_rank.whitening["basis"]
    assert basis.shape == (4, 20)
    gram = basis.T @ basis
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-6)


def test_what_overflows_on_a_steep_path_is_no_candidate_and_makes_no_noise():
    steps = np.array([[1.0, 1.0], [1.0, 0.5]])
    diagonal, useful = normals.diagonals(steps, 1e200 * steps)
    assert not useful.any()
    np.testing.assert_array_equal(diagonal, 1.0)
    found = normals.pathfinder(np.zeros(2), np.ones(2), steps, 1e200 * steps, diagonal[-1])
    assert found is None


def test_both_forms_of_a_normal_distribution_are_the_same_map():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(4, 2)))
    low_rank = normals.LowRank(rng.normal(size=4), np.array([1, 2, 3, 0.5]), basis, np.ones(2))
    dense, z = low_rank.padded(3).dense(), rng.normal(size=(5, 4))
    np.testing.assert_allclose(dense.draw(z), low_rank.draw(z))
    np.testing.assert_allclose(dense.log_det, low_rank.log_det)
    np.testing.assert_allclose(dense.inverse @ dense.matrix, np.eye(4), atol=1e-12)


def test_a_newton_step_goes_to_the_normal_distribution_of_the_hessian():
    covariance, mean = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([0.3, -0.2])
    precision, dense = np.linalg.inv(covariance), normals.Dense(np.zeros(2), np.eye(2), np.eye(2))
    found = normals.newton(dense, precision @ mean, -precision, 1.0, 10.0)
    np.testing.assert_allclose(found.loc, mean, rtol=1e-9)
    np.testing.assert_allclose(found.matrix @ found.matrix.T, covariance, rtol=1e-9)
    assert normals.newton(dense, mean, np.full((2, 2), np.nan), 1.0, 10.0) is None


def test_without_second_derivatives_pathfinder_remains(x64):
    @jax.custom_vjp
    def square(u):
        return jnp.sum(u**2)

    square.defvjp(lambda u: (square(u), u), lambda u, g: (2 * g * u,))
    target = fv.Target(lambda u: -0.5 * square(u), 2)
    assert not start.has_hessian(target)
    found = start.find(target, KEY).start
    assert found.origin == "pathfinder"
    assert abs(found.elbo - np.log(2 * np.pi)) < 1e-3
    assert len(found.ends) == 0


def points(log_density, points=None):
    target = fv.Target(log_density, 2)
    return start.starting_points(target, np.random.default_rng(0), points)


@pytest.mark.parametrize(
    ("log_density", "message"),
    [
        (lambda u: jnp.log(-jnp.sum(u**2) - 1), "`target` must have a finite log density.*got nan"),
        (
            lambda u: jnp.where(u[0] > 1e6, 0.0, -jnp.inf) - jnp.sum(u**2),
            "`target` must have a finite log density.*got -inf at the first.*Perhaps give",
        ),
        (lambda u: 0.0 * jnp.sum(u) + 3.0, "`target` must depend on its vector; got the constant"),
    ],
)
def test_targets_without_a_starting_point(log_density, message, x64):
    with pytest.raises(ValueError, match=message):
        points(log_density)


def test_targets_that_rise_without_end(x64):
    message = "`target` must be bounded above and fall off"
    with pytest.raises(ValueError, match=message):
        start.find(fv.Target(jnp.sum, 2), KEY)
    end = np.full((1, 1, 2), np.inf)
    with pytest.raises(ValueError, match=message):
        start._check_bounded(Path(end, -end, -end[..., 0], np.ones(1), np.ones(1)))


def test_a_support_away_from_zero_needs_a_point_inside(x64):
    def log_density(u):
        return jnp.where(jnp.all(u > 1e3), -0.5 * jnp.sum((u - 2e3) ** 2), -jnp.inf)

    with pytest.raises(ValueError, match="`target` must have a finite log density"):
        points(log_density)
    found = points(log_density, [[1500.0, 2500.0], [0.0, 0.0]])
    np.testing.assert_array_equal(found, np.tile([[1500.0, 2500.0]], (NUM_PATHS, 1)))


def candidate(elbo, scale=1.0, path=0, origin="variational"):
    normal = normals.Dense(np.zeros(2), scale * np.eye(2), np.eye(2) / scale)
    return Candidate(normal, elbo, origin, (path, 0))


def test_the_narrowest_of_nearly_equal_starts_is_taken():
    wide, narrow, bad = candidate(-1.0, 2.0), candidate(-1.9, 0.5), candidate(-2.1, 0.1)
    assert start._narrowest_of_good([wide, narrow, bad]) is narrow


def test_each_run_gives_its_best_candidate_to_be_refined():
    elbos = [(-3.0, 0), (-1.0, 1), (-2.0, 0), (-4.0, 2)]
    best = start._best_of_paths([candidate(elbo, path=path) for elbo, path in elbos])
    assert [(each.place[0], each.elbo) for each in best] == [(1, -1.0), (0, -2.0), (2, -4.0)]


@pytest.mark.slow
def test_the_best_start_is_kept_beside_the_narrowest(x64):
    # The start is narrower than the best normal distribution, and says which that was.
    def funnel(u):
        return -0.5 * u[0] ** 2 / 9 - 0.5 * jnp.sum(u[1:] ** 2) * jnp.exp(-u[0]) - 2 * u[0]

    found = start.find(fv.Target(funnel, 5), KEY).start
    volume = [np.linalg.slogdet(each["matrix"])[1] for each in (found.whitening, found.best)]
    assert volume[0] <= volume[1]
    assert np.isfinite(found.elbo)


@pytest.mark.slow
def test_between_ends_of_next_to_no_mass_there_are_modes_of_more(x64):
    # 16 coordinates of two modes each: a run ends in one of 65536, most of them with no mass.
    weights = np.array([0.84, 0.16])

    def wells(u):
        terms = jnp.log(weights) - 0.5 * (u[:, None] - np.array([5.0, -5.0])) ** 2
        return jnp.sum(jax.nn.logsumexp(terms, -1))

    target = fv.Target(wells, 16)
    points = np.random.default_rng(0).choice([5.0, -5.0], (NUM_PATHS, 16))
    points[:, :9] = -5.0
    points[0] = 5.0
    found = start.find(target, KEY, points).start
    log_mass = found.end_elbos - 8 * np.log(2 * np.pi)
    best, *others = log_mass[:NUM_PATHS]
    np.testing.assert_allclose(best, 16 * np.log(0.84), atol=1e-3)
    assert max(others) - best < -14
    between = log_mass[NUM_PATHS + 2 * len(WIDTHS) :]
    assert len(between) == NUM_PATHS
    assert -10 < max(between[between < best - 1]) - best < -1
    assert len(found.ends) == len(log_mass)


@pytest.mark.parametrize("size", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_runs_from_far_away_end_in_a_mode_that_those_near_zero_miss(size, x64):
    away = 10.0 * np.eye(size)[0]

    def both(u):
        return jnp.logaddexp(-0.5 * jnp.sum(u**2), -0.5 * jnp.sum((u - away) ** 2))

    found = start.find(fv.Target(both, size), KEY).start
    place = found.ends[..., 0].mean(-1)
    assert (place[:NUM_PATHS] < 5).all()
    assert (place[NUM_PATHS:] > 5).any()
    np.testing.assert_allclose(found.end_elbos, 0.5 * size * np.log(2 * np.pi), atol=1e-4)
