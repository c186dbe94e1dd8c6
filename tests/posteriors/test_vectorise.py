import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.posteriors import vectorise

KEY = jax.random.key(0)
GRID = jnp.linspace(0.0, 1.0, 11)


def gaussian_process(u, rows=None):
    """A log density that factorises an 11 by 11 matrix of its vector."""
    del rows
    cov = jnp.exp(u[0] - jnp.square(GRID[:, None] - GRID) * jnp.exp(u[1])) + 0.1 * jnp.eye(11)
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
@pytest.mark.parametrize("num_rows", [1, 7, 256, 1001])
def test_no_call_is_large_enough_to_be_cut(name, num_rows, cuts):
    u = 0.1 * jax.random.normal(KEY, (num_rows, 2))

    def all_rows(u):
        return vectorise.over(FUNCTIONS[name], u, None)

    assert 0 < vectorise.largest_call(all_rows, u) < vectorise.MOST_WORK
    if num_rows == 1001:
        together = jax.vmap(lambda each: FUNCTIONS[name](each))
        assert vectorise.largest_call(together, u) >= vectorise.MOST_WORK
        np.testing.assert_allclose(all_rows(u), together(u), rtol=1e-4, atol=1e-4)


def test_gradients_of_a_mapped_value_stay_small_too(cuts):
    target = fv.Target(gaussian_process, 2)
    u = 0.1 * jax.random.normal(KEY, (1000, 2))

    def gradient(u):
        return jax.grad(lambda u: target.log_joint({}, KEY, u, None).sum())(u)

    assert 0 < vectorise.largest_call(gradient, u) < vectorise.MOST_WORK


def test_what_needs_no_lapack_is_one_batch(cuts):
    jaxpr = jax.make_jaxpr(lambda u: vectorise.over(lambda v, rows: v.sum(), u, None))
    assert "scan" not in str(jaxpr(jnp.ones((100_000, 2))))


def test_one_large_matrix_is_mapped_row_by_row(cuts):
    def log_density(u, rows):
        return jnp.sum(jnp.linalg.cholesky(jnp.eye(100) * jnp.exp(u[0])))

    u = jnp.arange(3.0)[:, None]
    np.testing.assert_allclose(
        vectorise.over(log_density, u, None), 100 * jnp.exp(u[:, 0] / 2), rtol=1e-5
    )


def test_versions_that_do_not_cut_take_all_rows_together(monkeypatch):
    monkeypatch.setattr(vectorise, "CUTS", ((0, 0), (0, 0)))
    jaxpr = jax.make_jaxpr(lambda u: vectorise.over(gaussian_process, u, None))
    assert "scan" not in str(jaxpr(jnp.ones((1000, 2))))
