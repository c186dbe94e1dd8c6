"""Transformers whose inverse is a search: the search, its derivatives, and the walk around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import masked
from flowvi.bijectors.autoregressive import invert_by_passes
from flowvi.monotone import UMNN, Bernstein, DeepSigmoid, SumOfSquares
from flowvi.roots import root
from flowvi.testing import perturbed
from flowvi.transformers import TRANSFORMERS, as_transformer
from flowvi.triangular import solve
from tests.tolerances import FLOAT64, INTEGRAL

NEW = {
    "umnn": UMNN(),
    "deep_sigmoid": DeepSigmoid(),
    "sum_of_squares": SumOfSquares(),
    "bernstein": Bernstein(),
}
each = pytest.mark.parametrize("name", NEW)


@each
def test_the_identity_at_zero_and_an_inverse_for_every_parameter(name, x64):
    del x64
    transformer = NEW[name]
    assert as_transformer(name) == transformer and name in TRANSFORMERS
    x = np.linspace(-12, 12, 200)
    noise = np.random.default_rng(0).normal(size=(200, transformer.num_params))

    @jax.jit
    def run(theta):
        bijector = transformer(theta)
        y, log_det = bijector.forward_and_log_det(x)
        slope = jax.jvp(bijector.forward, (x,), (jnp.ones_like(x),))[1]
        return y, log_det, jnp.log(slope), *bijector.inverse_and_log_det(y)

    for scale in (0.0, 3.0, 100.0):
        y, log_det, expected, back, inverse_log_det = run(scale * noise)
        np.testing.assert_allclose(back, x, atol=1e-7 if scale else FLOAT64)
        np.testing.assert_allclose(log_det, expected, atol=FLOAT64)
        np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-7)
        assert abs(log_det).max() < 10
        if not scale:
            np.testing.assert_allclose(y, x, atol=FLOAT64)


@each
@pytest.mark.parametrize("make", [fv.maf, fv.iaf, fv.coupling])
def test_every_flow_takes_them_by_name_and_by_object(name, make):
    options = {"num_layers": 2, "hidden_sizes": [4]}
    family = make(3, transformer=name, **options)
    assert family == make(3, transformer=NEW[name], **options)
    params = jax.eval_shape(family.init, jax.random.key(0))
    run = lambda p, k: family.distribution(p).sample_and_log_prob(seed=k, sample_shape=5)  # noqa: E731
    draws, log_prob = jax.eval_shape(run, params, jax.random.key(0))
    assert draws.shape == (5, 3) and log_prob.shape == (5,)


@each
def test_nan_is_not_replaced_and_spoils_no_other(name):
    transformer = NEW[name]
    run = jax.jit(lambda theta, y: transformer(theta).inverse_and_log_det(y))
    y = np.float32([0.5, np.nan, 9.0])
    theta = np.zeros((3, transformer.num_params), np.float32)
    for part in run(theta, y):
        np.testing.assert_array_equal(np.isnan(part), [False, True, False])
    theta[0] = np.nan
    for part in run(theta, y):
        np.testing.assert_array_equal(np.isnan(part), [True, True, False])


class Cubic:
    """y = theta_0 x + theta_1 x^3."""

    def evaluate(self, theta, x):
        return theta[0] * x + theta[1] * x**3, theta[0] + 3 * theta[1] * x**2

    def bracket(self, theta, y):
        end = abs(y) / theta[0]
        return -end, end


def test_the_search_is_exact_and_differentiable_to_every_order(x64):
    del x64
    cubic, theta = Cubic(), np.array([1e-3, 1.0])

    @jax.jit
    def run(theta, y):
        find = lambda theta, y: root(cubic, theta, y)  # noqa: E731
        return (
            find(theta, y),
            jax.grad(find, 0)(theta, y),
            jax.grad(jax.grad(find, 1), 1)(theta, y),
            jax.jacfwd(jax.grad(find, 1))(theta, y),
        )

    for y in (1e-7, 0.3, -2e5):
        x, slopes, second, mixed = run(theta, y)
        np.testing.assert_allclose(cubic.evaluate(theta, x)[0], y, rtol=1e-14)
        f_x, f_xx = theta[0] + 3 * theta[1] * x**2, 6 * theta[1] * x
        np.testing.assert_allclose(slopes, [-x / f_x, -(x**3) / f_x], rtol=FLOAT64)
        np.testing.assert_allclose(second, -f_xx / f_x**3, rtol=FLOAT64)
        expected = f_xx * x / f_x**3 - 1 / f_x**2
        np.testing.assert_allclose(mixed[0], expected, rtol=1e-8)


SLOW = pytest.param(SumOfSquares(2, 1), marks=pytest.mark.slow)


@pytest.mark.parametrize("transformer", [DeepSigmoid(2), SLOW], ids=repr)
def test_the_triangular_solve_serves_them(transformer, x64):
    """One walk instead of D passes, with its gradients: see `tests/test_triangular.py`."""
    del x64
    network = masked.MaskedNetwork(
        4, (6,), transformer.num_params, context_size=2, order=(2, 0, 1, 3)
    )
    params = perturbed(jax.jit(network.init)(jax.random.key(1)), 0.5, 1)
    rng = np.random.default_rng(1)
    y, context = rng.normal(size=(3, 4)), rng.normal(size=(3, 2))

    def walk(params, y):
        return solve.inverse_and_log_det(network.bind(params, context), transformer, y)

    def passes(params, y):
        bound = network.bind(params, context)
        return invert_by_passes(lambda x: transformer(bound(x)), y)

    def everything(inverse):
        def loss(params, y):
            x, log_det = inverse(params, y)
            return jnp.sin(x).sum() + (log_det**2).sum()

        return inverse(params, y), jax.grad(loss, (0, 1))(params, y)

    got, want = jax.jit(lambda: (everything(walk), everything(passes)))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * max(1, abs(b).max()))


@pytest.mark.slow
@each
def test_densities_of_two_dimensions_integrate_to_one(name):
    family = fv.maf(2, num_layers=1, hidden_sizes=[8], transformer=name)
    params = perturbed(jax.jit(family.init)(jax.random.key(0)), 0.3, 0)
    grid = np.linspace(-12, 12, 481, dtype=np.float32)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    mass = np.exp(family.log_prob(params, points)).sum() * (grid[1] - grid[0]) ** 2
    assert abs(mass - 1) < INTEGRAL
