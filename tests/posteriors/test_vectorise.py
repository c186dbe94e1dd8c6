import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.posteriors import vectorise

GRID = np.linspace(0.0, 1.0, 11)
VECTORS = 0.1 * np.random.default_rng(0).normal(size=(1001, 2)).astype(np.float32)


def gaussian_process(u, rows=None):
    """A log density that factorises an 11 by 11 matrix of its vector."""
    del rows
    cov = jnp.exp(u[0] - np.square(GRID[:, None] - GRID) * jnp.exp(u[1])) + 0.1 * np.eye(11)
    factor = jnp.linalg.cholesky(cov)
    white = jax.scipy.linalg.solve_triangular(factor, GRID, lower=True)
    return -0.5 * jnp.sum(white**2) - jnp.sum(jnp.log(jnp.diag(factor))) - jnp.sum(u**2)


FUNCTIONS = {
    "value": gaussian_process,
    "gradient": jax.grad(gaussian_process),
    "hessian": jax.hessian(gaussian_process),
}


@pytest.fixture
def cuts(monkeypatch):
    """As if this version of JAX were one that cuts calls of LAPACK."""
    monkeypatch.setattr(vectorise, "CUTS", ((0, 0), (99, 0)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_call_is_large_enough_to_be_cut(name, cuts):
    def in_batches(u):
        return vectorise.over(FUNCTIONS[name], u, None)

    for num_rows in (1, 7, 256, 1001):
        assert 0 < vectorise.largest_call(in_batches, VECTORS[:num_rows]) < vectorise.MOST_WORK
    together = jax.vmap(lambda each: FUNCTIONS[name](each))
    assert vectorise.largest_call(together, VECTORS) >= vectorise.MOST_WORK
    if name == "gradient":
        found, expected = jax.jit(lambda u: (in_batches(u), together(u)))(VECTORS)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_mapped_value_stay_small_too(cuts):
    target = fv.Target(gaussian_process, 2)

    def gradient(u):
        return jax.grad(lambda u: target.log_joint({}, None, u, None).sum())(u)

    assert 0 < vectorise.largest_call(gradient, VECTORS) < vectorise.MOST_WORK


def test_what_needs_no_lapack_is_one_batch(cuts):
    jaxpr = jax.make_jaxpr(lambda u: vectorise.over(lambda v, rows: v.sum(), u, None))
    assert "scan" not in str(jaxpr(np.ones((100_000, 2))))


def test_one_large_matrix_is_mapped_row_by_row(cuts):
    def log_density(u, rows):
        return jnp.sum(jnp.linalg.cholesky(np.eye(100) * jnp.exp(u[0])))

    u = np.arange(3.0)[:, None]
    found = jax.jit(lambda u: vectorise.over(log_density, u, None))(u)
    np.testing.assert_allclose(found, 100 * np.exp(u[:, 0] / 2), rtol=1e-5)


def test_versions_that_do_not_cut_take_all_rows_together(monkeypatch):
    monkeypatch.setattr(vectorise, "CUTS", ((0, 0), (0, 0)))
    jaxpr = jax.make_jaxpr(lambda u: vectorise.over(gaussian_process, u, None))
    assert "scan" not in str(jaxpr(VECTORS))
