"""Supports, families in the units of data, and families moved by an affine map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import supports
from flowvi.bijectors import Dense, LowRank
from flowvi.networks import MLP
from flowvi.supports import Interval, Values, as_support, concatenated
from flowvi.testing import check_bijector
from tests.families.test_families import perturbed
from tests.small import AFFINE
from tests.tolerances import FLOAT32, FLOAT64, STANDARD_ERRORS

KEY = jax.random.key(0)
INF = np.inf
ENDS = ["real", "positive", (None, 3), (-1, 4)]


def rows(count=200):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(count, 4))
    return np.stack(
        [500 + 100 * z[:, 0], np.exp(z[:, 1]), 3 - np.exp(2 + z[:, 2]), rng.uniform(-1, 4, count)],
        1,
    )


# -------------------------------------------------------------------------------------- supports


def test_supports_are_values():
    assert as_support("positive", (2,)) == as_support([(0, None), "positive"], (2,))
    assert hash(as_support("positive", (2,))) == hash(as_support([(0, INF)] * 2, (2,)))
    for real in (None, "real", (None, None), [None, "real"], Interval((2,))):
        assert as_support(real, (2,)) == Interval((2,)) and as_support(real, (2,)).is_real
        assert as_support(real, (2,)).bijector() is None
    mixed = concatenated([as_support("positive", ()), as_support((0, 1), (2, 2))])
    assert mixed == Interval((5,), 0.0, (INF, 1.0, 1.0, 1.0, 1.0)) and not mixed.is_real
    assert repr(mixed) == "[(0, inf), (0, 1), (0, 1), (0, 1), (0, 1)]"


@pytest.mark.usefixtures("x64")
def test_the_map_of_a_support():
    bijector = as_support(ENDS, (4,)).bijector()
    u = np.random.default_rng(0).normal(size=(5, 4))

    @jax.jit
    def found(u):
        y, log_det = bijector.forward_and_log_det(u)
        return y, log_det, bijector.inverse(y)

    y, log_det, back = found(u)
    logistic = 1 / (1 + np.exp(-u[:, 3]))
    expected = [u[:, 0], np.exp(u[:, 1]), 3 - np.exp(u[:, 2]), -1 + 5 * logistic]
    np.testing.assert_allclose(y, np.stack(expected, 1), rtol=FLOAT64)
    slope = u[:, 1] + u[:, 2] + np.log(5 * logistic * (1 - logistic))
    np.testing.assert_allclose(log_det, slope, rtol=FLOAT64)
    np.testing.assert_allclose(back, u, rtol=FLOAT64)


def test_a_check_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(supports, "CHUNK_SIZE", 8)
    x = rows()
    support = as_support(ENDS, (4,))
    support.check(x)
    np.save(tmp_path / "x.npy", np.float32(x))
    support.check(np.load(tmp_path / "x.npy", mmap_mode="r"))
    x[57, 1], x[130, 3] = -2.5, 4.0
    message = (
        r"`y` must lie strictly inside its support \(0, inf\); got -2.5 in row 57, column 1, and 1 "
        "more. Perhaps widen `support`, or drop those rows"
    )
    with pytest.raises(ValueError, match=message):
        support.check(x, "y")
    x[57, 1] = 1.0
    with pytest.raises(ValueError, match=r"support \(-1, 4\); got 4.0 in row 130, column 3\. Per"):
        support.check(x.tolist())


OUTSIDE = {
    "bernoulli": (
        fv.bernoulli(2),
        r"`images` must hold only 0 and 1 for .*; got 0.5 in row 1, column 1, and 1 "
        r"more. Perhaps binarise it, `x > 0.5` .*`fv.continuous_bernoulli`",
    ),
    "continuous": (
        fv.continuous_bernoulli(2),
        r"must hold only numbers from 0 to 1 .*got 2.0 in row 2, column 0. .*largest",
    ),
    "categorical": (fv.categorical(2, 3), r"hold only the numbers 0, ..., 2 of classes.*got 0.5"),
    "one_hot": (
        fv.categorical((), 2, one_hot=True),
        r"must hold only rows of the identity for .*got 1.0 in row 1, column 0",
    ),
    "positive": (
        fv.custom(jnp.sum, 2, support=(-1, 2)),
        r"must lie strictly inside its support \(-1, 2\); got 2.0 in row 2, column 0",
    ),
    "joint": (
        fv.joint(fv.standard_normal(1), fv.conditional(fv.bernoulli(1), MLP(1, (), 1))),
        r"must hold only 0 and 1 for joint.*got 0.5 in row 1, column 1",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_families_check_their_support(name):
    family, message = OUTSIDE[name]
    inside, outside = np.array([[0, 1], [1, 0]]), np.array([[0, 1], [1, 0.5], [2, 0]])
    each = [family]
    if family.context_shape is not None:
        decoder = fv.conditional(family, MLP(3, (), family.context_shape))
        each += [decoder, fv.local(family, 3), fv.unconditional(family)]
    for one in each:
        one.check_support(inside)
        with pytest.raises(ValueError, match=message):
            one.check_support(outside, "images")
    fv.gaussian(2).check_support(outside)


def test_counts_are_whole():
    counts = Values((), "counts")
    counts.check([0, 3, 10**6])
    with pytest.raises(ValueError, match=r"`x` must hold only whole numbers from 0 on; got -1 in"):
        counts.check([0, -1])
    with pytest.raises(TypeError, match="must be one of real numbers between bounds"):
        counts.bijector()


BAD_SUPPORTS = {
    "name": (ValueError, "`support` must be None, 'real', 'positive' or .*; got 'half'", "half"),
    "empty": (ValueError, r"`support` must have low < high; got \(1, 0\)", (1, 0)),
    "nan": (ValueError, "`support` must have low < high", (float("nan"), 1)),
    "count": (ValueError, r"one entry for each column .* \(2,\); got 3 entries", ["real"] * 3),
    "kind": (TypeError, "or a sequence of these, one a column; got 3", 3),
    "inner": (TypeError, r"`support` must be None, 'real', .* got \(0, 1, 2\)", [(0, 1, 2)] * 2),
    "shape": (ValueError, r"`support` must be for events of shape \(2,\); got", Interval((3,))),
    "discrete": (TypeError, "`support` must be one of real numbers", Values((2,), "counts")),
}


@pytest.mark.parametrize("name", BAD_SUPPORTS)
def test_bad_supports(name):
    error, message, support = BAD_SUPPORTS[name]
    with pytest.raises(error, match=message):
        fv.standardized(fv.mean_field(2), support)


# ------------------------------------------------------------------------------- units of data

INNER = fv.maf(4, **AFFINE, context_size=2)
PLACED = fv.standardized(INNER, ENDS)


def placed():
    context = 1e3 + 50 * np.random.default_rng(1).normal(size=(200, 2))
    context[:, 1] = 7.0  # constant
    params = perturbed(jax.jit(PLACED.init)(KEY))
    return rows(), context, PLACED.place(params, rows(), context)


def test_a_placed_family_has_the_density_of_the_data():
    x, context, params = placed()
    fresh = jax.eval_shape(PLACED.init, KEY)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert [a.dtype for a in jax.tree.leaves(params)] == [a.dtype for a in jax.tree.leaves(fresh)]
    y, log_det, seen = PLACED.standardize(params, x, context)
    np.testing.assert_allclose([y.mean(0), y.std(0)], [[0] * 4, [1] * 4], atol=1e-5)
    np.testing.assert_allclose([seen.mean(0), seen.std(0)], [[0, 0], [1, 0]], atol=1e-5)
    np.testing.assert_allclose(PLACED.unstandardize(params, y), x, rtol=FLOAT64)

    @jax.jit
    def found(params, x, context, y, seen):
        q = PLACED.distribution(params, context)
        inner = INNER.distribution(params["family"], seen)
        draws, log_prob = q.sample_and_log_prob(seed=KEY)
        scored = q.sample_with_score(KEY, ())
        return q.log_prob(x), inner.log_prob(y), draws, log_prob, q.log_prob(draws), scored

    args = (np.float32(each) for each in (x, context, y, seen))
    whole, inner, draws, claimed, scored, path = found(params, *args)
    np.testing.assert_allclose(whole, inner + log_det, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scored, claimed, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(path[0], draws, rtol=1e-4)
    np.testing.assert_allclose(path[1], claimed, rtol=1e-3, atol=2e-3)
    PLACED.check_support(draws)
    # In double precision on the host it is the same, and outside there is nothing.
    np.testing.assert_allclose(PLACED.log_prob(params, x, context), whole, rtol=1e-3, atol=1e-3)
    assert PLACED.log_prob(params, np.array([0.0, -1.0, 0.0, 0.0]), context[0]) == -INF
    # By hand, of the second coordinate.
    log = np.log(x[:, 1])
    np.testing.assert_allclose(y[:, 1], (log - log.mean()) / log.std(), rtol=1e-4, atol=1e-6)


def test_large_offsets_lose_nothing():
    x = 1.7e9 + 100 * np.random.default_rng(0).normal(size=(500, 2))
    family = fv.standardized(fv.mean_field(2))
    params = family.place(jax.jit(family.init)(KEY), x)
    y, log_det, context = family.standardize(params, x)
    assert context is None and len(np.unique(y)) == 1000
    scale = np.asarray(params["units"].value["scale"], np.float64)
    np.testing.assert_allclose(y.std(0), x.std(0) / scale, rtol=FLOAT64)
    np.testing.assert_allclose(log_det, -np.log(scale).sum(), rtol=FLOAT64)
    np.testing.assert_allclose(family.unstandardize(params, y), x, rtol=1e-15)
    expected = log_det - 0.5 * (y**2).sum(1) - np.log(2 * np.pi)
    np.testing.assert_allclose(family.log_prob(params, x), expected, rtol=FLOAT32)


def test_moments_in_chunks(tmp_path, monkeypatch):
    x, _, params = placed()
    whole = params["units"].value
    monkeypatch.setattr(supports, "CHUNK_SIZE", 200)
    np.save(tmp_path / "x.npy", x)
    mapped = PLACED.place(params, np.load(tmp_path / "x.npy", mmap_mode="r"))
    for name in ("shift", "scale"):
        np.testing.assert_allclose(mapped["units"].value[name], whole[name], rtol=1e-6)
    np.testing.assert_array_equal(
        mapped["context_units"].value["shift"], params["context_units"].value["shift"]
    )


def test_contexts_of_integers_are_left_alone():
    labels = np.arange(200)[:, None] % 3
    family = fv.standardized(fv.maf(4, **AFFINE, context_size=1))
    params = family.place(jax.jit(family.init)(KEY), rows(), labels)
    np.testing.assert_array_equal(params["context_units"].value["scale"], 1.0)
    assert family.standardize(params, rows(), labels)[2] is labels
    local = fv.standardized(fv.local(fv.gaussian(4), 200))
    params = local.place(jax.jit(local.init)(KEY), rows(), np.arange(200))
    assert set(params) == {"family", "units", "origin"}
    assert local.log_prob(params, rows(), np.arange(200)).shape == (200,)


# ------------------------------------------------------------------------------------ affine maps


def dense(size=3):
    matrix = np.eye(size) + 0.5 * np.random.default_rng(0).normal(size=(size, size))
    log_det, inverse = np.linalg.slogdet(matrix)[1], np.linalg.inv(matrix)
    return {"loc": np.arange(3.0), "matrix": matrix, "inverse": inverse, "log_det": log_det}


def low_rank(size=3):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(size, 2)))
    scale = np.exp(rng.normal(size=size))
    return {"loc": np.arange(3.0), "scale": scale, "basis": basis, "gain": np.array([2.0, -0.5])}


MAPS = {"dense": (Dense, dense, None), "low_rank": (LowRank, low_rank, 2)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("dense", fv.full_rank(3)),
        ("low_rank", fv.iaf(3, **AFFINE)),
        pytest.param("dense", fv.iaf(3, **AFFINE), marks=pytest.mark.slow),
        pytest.param("low_rank", fv.full_rank(3), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_whitened_family_is_the_family_in_other_units(name, inner):
    kind, whitening, rank = MAPS[name]
    family, marginal = (fv.whitened(inner, rank=rank, marginal=m) for m in (None, "spline"))
    bijector = kind(**{n: jnp.asarray(a) for n, a in whitening().items()})
    if (name == "dense") == (inner == fv.full_rank(3)):
        check_bijector(bijector, np.random.default_rng(1).normal(size=(5, 3)))
    params = perturbed(jax.jit(family.init)(KEY))
    np.testing.assert_array_equal(params["whitening"].value["loc"], 0.0)
    params = family.place(params, whitening())

    @jax.jit
    def found(params, width):
        q = family.distribution(params)
        y, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=50)
        x, log_det = bijector.inverse_and_log_det(y)
        moved = inner.distribution(params["family"]).log_prob(x) + log_det
        identity = jnp.zeros((3, marginal.marginal.num_params))
        same = marginal.place({**params, "marginal": identity}, whitening())
        root = q.sample_root(KEY, (20,))
        far, far_log_prob, _ = q.push_with_score(1.5 * root)
        far_log_prob += q.root.log_prob(root) - q.root.log_prob(1.5 * root) - 3 * jnp.log(1.5)
        wide = family.distribution(family.widen(family.widen(params, width), 1.5 / width))
        drawn = wide.sample_and_log_prob(seed=KEY, sample_shape=20)
        again = wide.log_prob(drawn[0]), marginal.distribution(same).log_prob(y)
        return log_prob, moved, q.log_prob(y), again, (far, far_log_prob), drawn

    log_prob, moved, scored, again, far, drawn = found(params, 1.2)
    for other in (moved, scored, again[1]):
        np.testing.assert_allclose(other, log_prob, rtol=1e-6)
    # A wider one has a wider base.
    for one, other in zip(far, drawn, strict=True):
        np.testing.assert_allclose(other, one, rtol=FLOAT64)
    np.testing.assert_allclose(again[0], drawn[1], rtol=1e-6)


def test_a_saved_one_keeps_its_width(tmp_path):
    family = fv.whitened(fv.mean_field(2))
    params = family.widen(jax.jit(family.init)(KEY), 1.5)
    fv.save(tmp_path / "wide", params)
    loaded = fv.load(tmp_path / "wide", like=family)
    np.testing.assert_array_equal(loaded["width"].value, 1.5)
    np.testing.assert_array_equal(family.sample(loaded, KEY, 5), family.sample(params, KEY, 5))


def test_marginal_maps_and_moments():
    family = fv.whitened(fv.full_rank(3))
    params = family.place(perturbed(jax.jit(family.init)(KEY)), dense())
    bent = fv.whitened(fv.mean_field(3), rank=2, marginal="spline")
    moved = perturbed(bent.place(jax.jit(bent.init)(KEY), low_rank()), 1.0)

    @jax.jit
    def found(params, moved):
        q, p = family.distribution(params), bent.distribution(moved)
        y, log_prob = p.sample_and_log_prob(seed=KEY, sample_shape=50)
        x = q.sample(seed=KEY, sample_shape=50_000)
        return x, q.mean(), q.covariance(), log_prob, p.log_prob(y)

    x, mean, covariance, log_prob, scored = map(np.asarray, found(params, moved))
    assert (abs(x.mean(0) - mean) < STANDARD_ERRORS * x.std(0) / np.sqrt(len(x))).all()
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=0.1, atol=0.1)
    np.testing.assert_allclose(scored, log_prob, rtol=1e-3, atol=1e-3)
