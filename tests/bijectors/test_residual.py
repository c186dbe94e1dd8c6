"""Residual maps: the bound that makes them invertible, and the estimate of their determinant."""

import jax
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks.lipschitz import LipschitzNetwork
from flowvi.testing import check_bijector
from tests import tolerances
from tests.families.test_families import perturbed

NETWORK = LipschitzNetwork(3, (8, 6), 0.9)
FAMILY = fv.residual(4, num_layers=2, hidden_sizes=[6], log_det="roulette")


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e3, 1e30])
def test_no_parameters_exceed_the_bound(scale):
    params = jax.tree.map(np.asarray, jax.jit(NETWORK.init)(jax.random.key(0)))
    layers = jax.jit(NETWORK.bounded)(perturbed(params, scale))["layers"]
    norms = [np.linalg.norm(np.asarray(each["w"], np.float64), 2) for each in layers]
    assert np.isfinite(norms).all() and np.prod(norms) < 0.9
    if scale > 1:
        assert np.prod(norms) > 0.8  # so that little of it is lost


@pytest.mark.slow
def test_the_estimate_is_unbiased_with_its_gradient():
    params = perturbed(jax.tree.map(np.asarray, jax.jit(FAMILY.init)(jax.random.key(0))), 1.0)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    params = {name: params[name] for name in ("family", "transform")}

    @jax.jit
    def run(params, keys):
        def estimated(params, key):
            return FAMILY.train_distribution(params, key)[0].log_prob(x).sum()

        def exact(params):
            return FAMILY.distribution(params).log_prob(x).sum()

        many = jax.lax.map(lambda key: jax.value_and_grad(estimated)(params, key), keys)
        return many, jax.value_and_grad(exact)(params)

    many, exact = run(params, jax.random.split(jax.random.key(1), 4000))
    for draws, truth in zip(*map(jax.tree.leaves, (many, exact)), strict=True):
        draws = np.asarray(draws, np.float64)
        error = draws.std(0) / np.sqrt(len(draws)) + 1e-5
        assert (np.abs(draws.mean(0) - truth) < tolerances.STANDARD_ERRORS * error).all()
    assert np.asarray(many[0]).std() > 1e-3


def test_evaluation_is_exact():
    params = perturbed(jax.tree.map(np.asarray, jax.jit(FAMILY.init)(jax.random.key(0))), 1.0)
    x = np.ones((2, 4), np.float32)
    twin = fv.residual(4, num_layers=2, hidden_sizes=[6], log_det="exact")
    both = jax.jit(lambda p: [f.distribution(p).log_prob(x) for f in (FAMILY, twin)])(params)
    np.testing.assert_array_equal(*both)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`lipschitz` must be above 0 and below 1; got 1"):
        fv.residual(2, lipschitz=1)
    with pytest.raises(ValueError, match='`log_det` must be "exact", "roulette" or None; got'):
        fv.residual(2, log_det="hutchinson")


@pytest.mark.slow
def test_many_coordinates_are_solved_by_fixed_points():
    family = fv.residual(33, num_layers=1, hidden_sizes=[8], context_size=2, density_first=False)
    params = perturbed(jax.tree.map(np.asarray, jax.jit(family.init)(jax.random.key(0))), 1.0)
    rng = np.random.default_rng(0)
    context, x = (rng.normal(size=(4, size)).astype(np.float32) for size in (2, 33))
    bijector = jax.jit(lambda p: family.distribution(p, context).bijector)(params)
    check_bijector(
        bijector, x[None], batch_shape=(4,), properties=["round_trip", "inverse_jacobian", "dtype"]
    )
