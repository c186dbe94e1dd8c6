import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.bijectors import Dense, LowRank
from flowvi.testing import check_bijector, perturbed
from tests.small import SMALL
from tests.tolerances import STANDARD_ERRORS

KEY = jax.random.key(0)


def dense(size=3):
    matrix = np.eye(size) + 0.5 * np.random.default_rng(0).normal(size=(size, size))
    log_det = np.linalg.slogdet(matrix)[1]
    return {
        "loc": jnp.arange(float(size)),
        "matrix": jnp.asarray(matrix),
        "inverse": jnp.asarray(np.linalg.inv(matrix)),
        "log_det": jnp.asarray(log_det),
    }


def low_rank(size=3, rank=2):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(size, rank)))
    return {
        "loc": jnp.arange(float(size)),
        "scale": jnp.asarray(np.exp(rng.normal(size=size))),
        "basis": jnp.asarray(basis),
        "gain": jnp.asarray([2.0, -0.5][:rank]),
    }


@pytest.mark.parametrize("name", ["dense", "low_rank"])
def test_laws_of_the_affine_maps(name, x64):
    bijector = Dense(**dense()) if name == "dense" else LowRank(**low_rank())
    check_bijector(bijector, np.random.default_rng(1).normal(size=(5, 3)))


@pytest.mark.parametrize("name", ["dense", "low_rank"])
@pytest.mark.parametrize("inner", [fv.full_rank(3), fv.iaf(3, **SMALL)])
def test_a_whitened_family_is_the_family_in_other_units(name, inner):
    family = fv.whitened(inner, rank=None if name == "dense" else 2)
    whitening = dense() if name == "dense" else low_rank()
    params = perturbed(family.init(KEY), 0.3, 0)
    # No optimizer and no perturbation moves the units.
    np.testing.assert_array_equal(params["whitening"].value["loc"], 0.0)
    params = family.place(params, whitening)
    bijector = Dense(**whitening) if name == "dense" else LowRank(**whitening)
    y, log_prob = family.sample_and_log_prob(params, KEY, 50)
    x = bijector.inverse(y)
    expected = inner.log_prob(params["family"], x) - bijector.forward_log_det_jacobian(x)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(family.log_prob(params, y), log_prob, rtol=1e-3, atol=1e-3)
    assert family == fv.whitened(inner, rank=family.rank)
    assert hash(family) == hash(fv.whitened(inner, rank=family.rank))


@pytest.mark.parametrize("name", ["dense", "low_rank"])
def test_marginal_maps_stand_in_the_units_of_the_data(name):
    rank = None if name == "dense" else 2
    family = fv.whitened(fv.mean_field(3), rank=rank, marginal="spline")
    plain = fv.whitened(fv.mean_field(3), rank=rank)
    whitening = dense() if name == "dense" else low_rank()
    params = family.place(family.init(KEY), whitening)
    start = plain.place(plain.init(KEY), whitening)
    y = plain.sample(start, KEY, 50)
    np.testing.assert_allclose(family.sample(params, KEY, 50), y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(family.log_prob(params, y), plain.log_prob(start, y), rtol=1e-4)
    moved = perturbed(params, 1.0, 0)
    y, log_prob = family.sample_and_log_prob(moved, KEY, 50)
    np.testing.assert_allclose(family.log_prob(moved, y), log_prob, rtol=1e-3, atol=1e-3)
    assert abs(log_prob - plain.log_prob(start, y)).max() > 0.1


WIDENED = {
    "dense": (fv.full_rank(3), None, None),
    "low_rank": (fv.iaf(3, **SMALL), 2, None),
    "marginal": (fv.mean_field(3), 2, "spline"),
    "base": (fv.standard_normal(3), None, None),
}


@pytest.mark.parametrize("name", WIDENED)
def test_a_wider_one_has_a_wider_base(name, x64):
    inner, rank, marginal = WIDENED[name]
    family = fv.whitened(inner, rank=rank, marginal=marginal)
    whitening = dense() if rank is None else low_rank()
    params = family.place(perturbed(family.init(KEY), 0.3, 0), whitening)
    q = family.distribution(params)
    x = q.sample_root(KEY, (20,))
    expected, log_prob, _ = q.push_with_score(1.5 * x)
    change = q.root.log_prob(x) - q.root.log_prob(1.5 * x) - 3 * np.log(1.5)
    wide = family.widen(family.widen(params, 1.2), 1.25)
    y, found = family.sample_and_log_prob(wide, KEY, 20)
    np.testing.assert_allclose(y, expected, rtol=1e-9)
    np.testing.assert_allclose(found, log_prob + change, rtol=1e-9)
    np.testing.assert_allclose(family.log_prob(wide, y), found, rtol=1e-6)


def test_a_saved_one_keeps_its_width(tmp_path):
    family = fv.whitened(fv.mean_field(2))
    params = family.widen(family.init(KEY), 1.5)
    fv.save(tmp_path / "wide", params)
    loaded = fv.load(tmp_path / "wide", like=family)
    np.testing.assert_array_equal(loaded["width"].value, 1.5)
    np.testing.assert_array_equal(family.sample(loaded, KEY, 5), family.sample(params, KEY, 5))


def test_moments_of_a_whitened_normal():
    family = fv.whitened(fv.full_rank(3))
    params = family.place(perturbed(family.init(KEY), 0.3, 0), dense())
    distribution = family.distribution(params)
    x = distribution.sample(seed=KEY, sample_shape=50_000)
    error = STANDARD_ERRORS * x.std(0) / np.sqrt(len(x))
    assert (abs(x.mean(0) - distribution.mean()) < error).all()
    np.testing.assert_allclose(distribution.covariance(), jnp.cov(x.T), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fv.whitened(3), TypeError, "`family` must be a family; got 3"),
        (
            lambda: fv.whitened(fv.standard_normal((2, 2))),
            ValueError,
            r"`family` must be over vectors; got event shape \(2, 2\)",
        ),
        (lambda: fv.whitened(fv.iaf(2), rank=3), ValueError, "`rank` must be at most 2; got 3"),
        (
            lambda: Dense(jnp.ones(2), jnp.eye(3), jnp.eye(2), 0.0),
            ValueError,
            r"`matrix` must have shape \(2, 2\), for a `loc` of shape \(2,\); got shape \(3, 3\)",
        ),
        (
            lambda: LowRank(jnp.ones(2), jnp.ones(2), jnp.ones((3, 1)), jnp.ones(1)),
            ValueError,
            r"`basis` must have a shape that ends in \(2, 1\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
