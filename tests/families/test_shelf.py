"""Flows whose slow direction is a search, and flows of angles."""

import jax
import numpy as np
import pytest

import flowvi as fv
from flowvi.testing import perturbed
from tests.tolerances import FLOAT32, INTEGRAL

FAMILIES = {
    "planar": lambda d: fv.planar(d, num_layers=2),
    "radial": lambda d: fv.radial(d, num_layers=2),
    "sylvester": lambda d: fv.sylvester(d, num_layers=2),
    "triangular": lambda d: fv.sylvester(d, kind="triangular", num_layers=2),
    "bnaf": lambda d: fv.bnaf(d, num_layers=2, hidden_sizes=[4]),
    "svd": lambda d: fv.maf(d, num_layers=2, hidden_sizes=[4], transformer="affine", mixing="svd"),
    "torus": lambda d: fv.torus(d, num_layers=2, hidden_sizes=[8]),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_densities_integrate_to_one(name, size):
    family = FAMILIES[name](size)
    params = perturbed(jax.jit(family.init)(jax.random.key(0)), 0.3, 0)
    # Two affine layers have wide tails: 0.002 of the mass lies outside of 12.
    end, count = {"torus": (np.pi, 480), "svd": (24.0, 960)}.get(name, (12.0, 480))
    # Midpoints, so that angles stay inside.
    grid = (np.arange(count) + 0.5) / count * 2 * end - end
    points = np.stack(np.meshgrid(*[grid] * size), -1).reshape(-1, size).astype(np.float32)
    mass = np.exp(family.log_prob(params, points)).sum() * (2 * end / count) ** size
    assert abs(mass - 1) < INTEGRAL


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_a_new_flow_is_its_base(name):
    family = FAMILIES[name](3)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    params = jax.jit(family.init)(jax.random.key(0))
    expected = -0.5 * (x**2).sum(1) - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(family.log_prob(params, x), expected, rtol=FLOAT32)


def test_a_density_of_angles_has_no_step():
    family = FAMILIES["torus"](2)
    params = perturbed(jax.jit(family.init)(jax.random.key(0)), 0.5, 0)
    other = np.linspace(-3, 3, 7)
    at = lambda a, b: family.log_prob(params, np.stack([a, b], 1).astype(np.float32))  # noqa: E731
    end = np.full(7, np.pi - 1e-5)
    for low, high in ((at(-end, other), at(end, other)), (at(other, -end), at(other, end))):
        np.testing.assert_allclose(low, high, atol=2e-3)
    draws = family.sample(params, jax.random.key(1), 100)
    family.check_support(draws)
    with pytest.raises(ValueError, match=r"`x` must .*; got 4.0 in row 0, column 1"):
        family.check_support(np.array([[0.0, 4.0]]))


def test_what_no_flow_can_be():
    with pytest.raises(ValueError, match='`kind` must be "householder" or "triangular"; got'):
        fv.sylvester(3, kind="orthogonal")
    with pytest.raises(ValueError, match='`rank` must be 3 for "triangular"; got 2'):
        fv.sylvester(3, kind="triangular", rank=2)
    with pytest.raises(ValueError, match="`rank` must be at most 3; got 4"):
        fv.sylvester(3, rank=4)
    with pytest.raises(ValueError, match="`hidden_sizes` must hold at least one size"):
        fv.bnaf(2, hidden_sizes=[])
    with pytest.raises(ValueError, match="`num_bins` must be at least 2; got 1"):
        fv.torus(2, num_bins=1)
