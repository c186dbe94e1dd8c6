"""Densities that are fitted to data, in the units of the data."""

import dataclasses
import pickle
import warnings

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi import supports
from flowvi.families import Family, Standardized
from flowvi.objectives import NegativeLogLikelihood, likelihood
from flowvi.params import Fixed
from flowvi.training import sources
from tests.small import SMALL
from tests.training.helpers import assert_trees_equal, compilations

KEY = jax.random.key(0)
NORMAL = fv.mean_field(2)
CONDITIONAL = fv.conditional(fv.gaussian(2), fv.networks.MLP(2, [8], 4))
AFFINE = fv.maf(2, num_layers=1, hidden_sizes=[8], transformer="affine")


@dataclasses.dataclass(frozen=True)
class Counting(Family):
    """A Gaussian that counts its training batches in a Fixed leaf."""

    event_shape: tuple[int, ...] = (2,)
    context_shape: tuple[int, ...] | None = None
    reparameterized: bool = True

    def init(self, key):
        del key
        return {"loc": jnp.zeros(2), "seen": Fixed(jnp.zeros((), jnp.int32))}

    def distribution(self, params, context=None):
        return distrax.Independent(distrax.Normal(params["loc"], 1.0), 1)

    def train_distribution(self, params, key, context=None):
        del key
        new = {**params, "seen": Fixed(params["seen"].value + 1)}
        return self.distribution(params, context), new


def normal(num_rows=400, seed=0):
    """Rows in units of their own."""
    return 500.0 + 100.0 * np.random.default_rng(seed).normal(size=(num_rows, 2))


ENTROPY = 2 * (0.5 * np.log(2 * np.pi * np.e) + np.log(100.0))


def quick(family, x, **options):
    defaults = {"num_steps": 20, "validation_fraction": 0, "progress": False}
    return fv.fit_density(family, x, **{"key": KEY, **defaults, **options})


def units(density, name="units"):
    return density.params[name].value


def gap(density, context=None):
    """Nats to the entropy on new rows, less the noise of these rows."""
    x = normal(4000, seed=1)
    noise = (((x - 500) / 100) ** 2 - 1).sum(1).mean() / 2
    return -np.mean(density.log_prob(x, context)) - noise - ENTROPY


# ------------------------------------------------------------------------------ units of the data


@pytest.fixture(scope="module")
def fitted():
    return quick(NORMAL, normal(), num_steps=200, validation_fraction=0.1, patience=None)


def test_a_density_in_its_own_units(fitted):
    assert gap(fitted) < 0.05
    assert repr(fitted).startswith(
        "Density(standardized(mean_field(2)), num_rows=360, stop_reason="
    )
    assert len(repr(fitted)) < 250
    assert (fitted.dtype, fitted.num_steps, fitted.stop_reason) == ("float64", 200, "max_steps")
    assert isinstance(fitted.family, Standardized)
    x = fitted.sample(jax.random.key(1), 1000)
    assert x.dtype == np.float64 and x.shape == (1000, 2)
    np.testing.assert_allclose(x.mean(0), 500, atol=4 * 100 / np.sqrt(1000) + 20)
    np.testing.assert_allclose(x.std(0), 100, rtol=0.15)
    # Of draws the density is the same by itself, and of the functional form.
    y, log_prob = fitted.sample_and_log_prob(jax.random.key(1), 1000)
    np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(log_prob, fitted.log_prob(x), rtol=1e-5)
    direct = fitted.family.log_prob(fitted.params, x.astype(np.float32))
    np.testing.assert_allclose(log_prob, direct, rtol=1e-4)
    assert fitted.distribution().event_shape == (2,)
    assert fitted.sample(KEY, (2, 3)).shape == (2, 3, 2)


def test_it_comes_back_from_a_file_and_from_pickle(fitted, tmp_path):
    fitted.save(tmp_path / "density.flowvi")
    x = normal(20)
    for loaded in (fv.load(tmp_path / "density.flowvi"), pickle.loads(pickle.dumps(fitted))):
        assert repr(loaded) == repr(fitted)
        assert_trees_equal(loaded.params, fitted.params)
        assert_trees_equal(loaded.history, fitted.history)
        assert loaded.stop_reason is fitted.stop_reason
        assert loaded.family == fitted.family
        np.testing.assert_array_equal(loaded.log_prob(x), fitted.log_prob(x))
        np.testing.assert_array_equal(loaded.sample(KEY, 5), fitted.sample(KEY, 5))
    assert fv.load(tmp_path / "density.flowvi").result.opt_state is None
    with pytest.raises(ValueError, match="`like` must be configured as what was saved"):
        fv.load(tmp_path / "density.flowvi", like=AFFINE)


def test_units_of_the_training_rows(fitted):
    x = normal()
    found = units(quick(NORMAL, x))
    np.testing.assert_allclose(found["shift"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["scale"], x.std(0), rtol=1e-5)
    # A row that is held out has no say.
    assert (np.abs(units(fitted)["shift"] - x.mean(0)) > 1e-3).all()


def test_history_is_in_the_users_units(fitted):
    loss = fitted.history["loss"][-50:].mean()
    assert abs(loss - ENTROPY) < 0.1
    np.testing.assert_allclose(loss, -np.mean(fitted.log_prob(normal())), atol=0.05)


def test_held_out_rows(fitted):
    np.testing.assert_array_equal(fitted.history["validation_step"], np.arange(4, 201, 4))
    assert fitted.result.best_step is not None
    # The validation is in the same units.
    assert abs(fitted.history["validation"].min() - ENTROPY) < 0.3
    # Rows are not held out where there are too few of them.
    with pytest.warns(RuntimeWarning, match="`x` has 9 rows, which are too few to fit"):
        assert "validation" not in quick(NORMAL, normal(9), validation_fraction=0.1).history


def test_overfitting_stops_early():
    options = {"num_steps": 2000, "optimizer": optax.adam(0.03), "patience": 5}
    density = quick(AFFINE, normal(20), validation_fraction=0.5, **options)
    assert density.stop_reason == "patience"
    assert density.num_steps < 2000
    assert density.history["validation"].min() < density.history["validation"][-1]


def test_fixed_leaves_of_the_training_form():
    params = Counting().init(KEY)
    x = jnp.asarray(normal(8))
    assert isinstance(NegativeLogLikelihood(Counting())(params, KEY, {"x": x}), tuple)
    density = quick(Counting(), normal())
    assert int(density.params["family"]["seen"].value) == 20


def test_held_out_likelihood_in_chunks(monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", 16)
    x, params = normal(50).astype(np.float32) / 100, jax.jit(NORMAL.init)(KEY)
    loss = NegativeLogLikelihood(NORMAL, training=False)
    for num_rows in (50, 48, 7):
        batch = {"x": x[:num_rows]}
        whole = -np.mean(NORMAL.log_prob(params, batch["x"]))
        np.testing.assert_allclose(jax.jit(loss)(params, KEY, batch), whole, rtol=1e-5)


def test_a_second_fit_compiles_nothing(fitted):
    with compilations() as names:
        quick(NORMAL, normal() + 1, num_steps=200, validation_fraction=0.1, patience=None)
    assert names == []


def test_the_callers_context():
    rng, x = np.random.default_rng(1), normal(300)
    context = np.stack([10 + 3 * rng.normal(size=300), np.full(300, 7.0)], 1)
    found = units(quick(CONDITIONAL, x, context=context), "context_units")
    np.testing.assert_allclose(found["shift"], context.mean(0), rtol=1e-5)
    # A constant column is no error in a context, and has scale 1.
    np.testing.assert_allclose(found["scale"], [context[:, 0].std(), 1.0], rtol=1e-5)
    # Integers are labels.
    found = units(quick(CONDITIONAL, x, context=context.astype(int)), "context_units")
    np.testing.assert_array_equal(found["scale"], [1, 1])
    np.testing.assert_array_equal(found["shift"], [0, 0])


def test_params_to_start_from():
    x, stands = normal(), {"num_steps": 1, "optimizer": optax.sgd(0.0), "averaging": None}
    first = quick(NORMAL, x)
    second = quick(NORMAL, x - 50.0, params=first.params, **stands)
    assert_trees_equal(second.params, first.params)
    # Those of the bare family get units.
    bare = jax.jit(NORMAL.init)(KEY)
    third = quick(NORMAL, x, params=bare, **stands)
    assert_trees_equal(third.params["family"]["transform"], bare["transform"])
    np.testing.assert_allclose(units(third)["shift"], x.mean(0), rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"`params` must be those of .*mean_field\(2\)\); got those"
    ):
        quick(NORMAL, x, params=jax.jit(AFFINE.init)(KEY))
    with pytest.raises(ValueError, match=r"`params` must be those of .*; got those of .*full_rank"):
        quick(NORMAL, x, params=quick(fv.full_rank(2), x).params)
    with pytest.raises(TypeError, match=r"Perhaps pass `result.params`\?"):
        quick(NORMAL, x, params=first)


# --------------------------------------------------------------------------------- far from zero


FAR = 1.7e9 + 100 * np.random.default_rng(3).normal(size=(2000, 2))


def test_numbers_far_from_zero_without_double_precision():
    """Of single precision there are six different numbers between 1.7e9 - 300 and 1.7e9 + 300."""
    density = quick(NORMAL, FAR, num_steps=300, validation_fraction=0.1)
    x, log_prob = density.sample_and_log_prob(jax.random.key(1), 1000)
    assert x.dtype == np.float64
    assert len(np.unique(x[:, 0])) > 990
    np.testing.assert_allclose(x.std(0), FAR.std(0), rtol=0.1)
    # The mean is known to the spacing of single precision.
    np.testing.assert_allclose(x.mean(0), FAR.mean(0), atol=20)
    np.testing.assert_allclose(density.log_prob(x), log_prob, atol=1e-3)
    assert (
        abs(-np.mean(density.log_prob(FAR)) - (np.log(FAR.std(0)).sum() + np.log(2 * np.pi * np.e)))
        < 0.05
    )
    assert abs(density.history["validation"].min() - ENTROPY) < 0.2


def test_contexts_far_from_zero():
    """x is a function of the context, of which single precision would leave nothing."""
    rng = np.random.default_rng(4)
    x = (FAR - 1.7e9) / 100 + 0.1 * rng.normal(size=FAR.shape)
    options = {"num_steps": 300, "optimizer": optax.adam(0.02), "batch_size": 200}
    density = quick(CONDITIONAL, x, context=FAR, **options)
    # Noise of 0.1: -1.77 nats; without the context 2.84.
    assert -np.mean(density.log_prob(x, FAR)) < 0
    draws = density.sample(KEY, context=FAR[:500])
    assert np.abs(draws - (FAR[:500] - 1.7e9) / 100).mean() < 0.4
    _, log_prob = density.sample_and_log_prob(KEY, context=FAR[:500])
    np.testing.assert_allclose(density.log_prob(draws, FAR[:500]), log_prob, atol=1e-2)


def test_double_precision(x64):
    density = quick(NORMAL, normal(), num_steps=3)
    assert {leaf.dtype for leaf in jax.tree.leaves(density.params)} == {np.dtype(np.float64)}


def test_single_precision_is_that_of_the_draws():
    density = quick(NORMAL, normal().astype(np.float32))
    assert density.dtype == "float32"
    assert density.sample(KEY, 3).dtype == np.float32
    assert units(density)["shift"].dtype == np.float32


# -------------------------------------------------------------------------------- kinds of arrays


class Frame:
    """What a data frame has in common with others."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.array(self.x, dtype)


def test_array_likes(tmp_path):
    x = normal(50)
    expected = quick(NORMAL, x)
    for given in (x.tolist(), Frame(x), np.ma.masked_array(x), [tuple(row) for row in x]):
        assert_trees_equal(quick(NORMAL, given).params, expected.params)
    np.testing.assert_array_equal(expected.log_prob(x.tolist()), expected.log_prob(x))
    context = Frame(x / 100)
    found = quick(CONDITIONAL, x, context=context)
    assert_trees_equal(found.params, quick(CONDITIONAL, x, context=x / 100).params)


def test_memory_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 3 * 256 * 12)
    x = normal(2000)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    options = {"num_steps": 100, "validation_fraction": 0.1}
    here, there = quick(NORMAL, x, **options), quick(NORMAL, mapped, **options)
    # Units come from all rows there, and from those that are not held out here.
    np.testing.assert_allclose(units(there)["shift"], x.mean(0), rtol=1e-5)
    assert abs(np.mean(here.log_prob(x)) - np.mean(there.log_prob(x))) < 0.02
    assert there.result.best_step is not None
    assert there.num_rows == here.num_rows == 1800
    # The same rows are held out, and the others come in the same order.
    np.testing.assert_allclose(there.history["loss"][:20], here.history["loss"][:20], atol=0.1)
    # With a map of contexts too.
    found = quick(CONDITIONAL, x, context=mapped, num_steps=5)
    assert np.isfinite(found.log_prob(x[:3], mapped[:3])).all()
    # And rows are named.
    x[1117, 1] = np.inf
    np.save(tmp_path / "y.npy", x)
    monkeypatch.setattr(supports, "CHUNK_SIZE", 40)
    with pytest.raises(ValueError, match="`x` must be finite; got inf in row 1117, column 1"):
        quick(NORMAL, np.load(tmp_path / "y.npy", mmap_mode="r"))


# ---------------------------------------------------------------------------------------- support


def test_a_support():
    rng = np.random.default_rng(0)
    x = np.stack([rng.exponential(size=500), rng.beta(0.5, 0.5, size=500)], 1)
    support = ["positive", (0, 1)]
    density = quick(NORMAL, x, support=support, num_steps=50)
    v = np.stack([np.log(x[:, 0]), np.log(x[:, 1] / (1 - x[:, 1]))], 1)
    np.testing.assert_allclose(units(density)["shift"], v.mean(0), rtol=1e-4)
    np.testing.assert_allclose(units(density)["scale"], v.std(0), rtol=1e-4)
    draws, log_prob = density.sample_and_log_prob(KEY, 2000)
    assert (draws > 0).all() and (draws[:, 1] < 1).all()
    assert np.isfinite(log_prob).all()
    inside = quick(fv.standardized(NORMAL, support), x, num_steps=50)
    assert_trees_equal(inside.params, density.params)
    with pytest.raises(ValueError, match="`support` must be None for a family that has one of its"):
        quick(fv.standardized(NORMAL, support), x, support="positive")
    with pytest.raises(ValueError, match=r"`x` must hold only 0 and 1 .*; got 5"):
        quick(fv.unconditional(fv.bernoulli(2)), np.full((30, 2), 5))


def test_discrete_families():
    x = np.random.default_rng(0).integers(0, 2, (200, 2))
    density = quick(fv.unconditional(fv.bernoulli(2)), x, num_steps=100)
    rates = x.mean(0)
    entropy = -np.sum(rates * np.log(rates) + (1 - rates) * np.log(1 - rates))
    assert abs(-np.mean(density.log_prob(x)) - entropy) < 0.05
    assert set(np.unique(density.sample(KEY, 50))) <= {0, 1}


# ---------------------------------------------------------------------------------------- resumed


def test_it_resumes(tmp_path):
    x, options = normal(300), {"num_steps": 60, "validation_fraction": 0.1, "patience": None}
    whole = quick(NORMAL, x, **options)
    options |= {"checkpoint_dir": tmp_path, "checkpoint_every": 25}
    quick(NORMAL, x, **options, callback=lambda progress: progress.step > 30)
    again = quick(NORMAL, x, **options, resume=True)
    assert_trees_equal(again.params, whole.params)
    assert_trees_equal(again.history, whole.history)

    def refused(message, x=x, **others):
        with pytest.raises(ValueError, match=f"of this very fit; in .*{message}"):
            quick(NORMAL, x, **{**options, "resume": True, **others})

    # The default schedule depends on it.
    refused("num_steps is 60 there and 80 here", num_steps=80)
    refused("family.*support.lower is -inf there and 0.0 here", support="positive")
    refused("the digest of .* is", x=2 * x)


def test_an_own_schedule_may_be_extended(tmp_path):
    x, options = normal(300), {"optimizer": optax.adam(0.01), "checkpoint_dir": tmp_path}
    quick(NORMAL, x, num_steps=30, **options)
    again = quick(NORMAL, x, num_steps=60, resume=True, **options)
    straight = quick(NORMAL, x, num_steps=60, optimizer=options["optimizer"])
    assert_trees_equal(again.params, straight.params)


# -------------------------------------------------------------------------------------- bad input


X = np.random.default_rng(0).normal(size=(50, 2))
POSITIVE = np.abs(X) + 0.1


def changed(*entries):
    x = X.copy()
    for row, column, value in entries:
        x[row, column] = value
    return x


MASKED = np.ma.masked_array(X, np.arange(100).reshape(50, 2) == 15)
TWO = np.ones((50, 2))

#: What each message is said to, by the kind of error.
CASES = {
    TypeError: {
        r"`family` must be a family, such as `fv.maf\(2\)`; got 'maf'": {"family": "maf"},
        "`key` must be a random key": {"key": 0},
        r"`x` must hold floating numbers; got dtype int64. .* `x.astype\(float\)`": {
            "x": np.arange(10).reshape(5, 2)
        },
        "`x` must hold floating numbers; got dtype bool": {"x": X > 0},
        "`x` must hold floating numbers; got dtype complex128": {"x": X + 0j},
        "`x` must be an array of numbers; got a list": {"x": [["a", "b"]]},
        "`support` must be None, .* of these.*got 3": {"support": 3},
        "`support` must be .*; got 3": {"support": ["positive", 3]},
        "`context` must be an array of numbers; got dtype <U1": {
            "family": CONDITIONAL,
            "context": np.full((50, 2), "a"),
        },
        "`validation_fraction` must be a number; got '10%'": {"validation_fraction": "10%"},
        "`options` must be among num_steps, .*; got steps": {"steps": 3},
    },
    ValueError: {
        r"`x` must have shape \[num_rows, 2\].*got shape \(50,\)\.$": {"x": X[:, 0]},
        r"`x` must have shape \[num_rows, 1\].*got shape \(50,\). .* `x\[:, None\]`": {
            "x": X[:, 0],
            "family": fv.mean_field(1),
        },
        r"`x` must have shape \[num_rows, 3\].*got shape \(50, 2\). .* event size 2\?": {
            "family": fv.mean_field(3)
        },
        r"`x` must have at least one row; got shape \(0, 2\)": {"x": X[:0]},
        "`x` must be finite; got nan in row 7, column 1. Perhaps drop or fill in": {
            "x": changed((7, 1, np.nan))
        },
        "`x` must be finite; got -inf in row 3, column 0, and 1 more": {
            "x": changed((3, 0, -np.inf), (9, 1, np.nan))
        },
        "`x` must have no masked entries; got one in row 7": {"x": MASKED},
        r"`x` must vary in every column; got the constant 3.0 in column 1. Perhaps drop": {
            "x": changed(*((row, 1, 3.0) for row in range(50)))
        },
        r"must lie strictly inside its support \(0, inf\); got -1.5 in row 4, column 1. .*widen": {
            "x": np.where(np.arange(100).reshape(50, 2) == 9, -1.5, POSITIVE),
            "support": "positive",
        },
        r"strictly inside its support \(0, 1\); got 1.5 in row 0, column 1, and 49 more": {
            "x": np.stack([X[:, 0], np.full(50, 1.5)], 1),
            "support": [None, (0, 1)],
        },
        "`support` must be None, .*; got 'negative'": {"support": "negative"},
        "must have one entry for each column .*got 3 entries": {"support": ["positive"] * 3},
        r"`support` must have low < high; got \(1, 0\)": {"support": (1, 0)},
        "`support` must have low < high": {"support": (0, np.nan)},
        "`context` must be an array .* got None": {"family": CONDITIONAL},
        "`context` must be None for .* which takes none": {"context": TWO},
        r"`context` must have shape \[num_rows, 2\], a row for each .*got shape \(50, 3\)": {
            "family": CONDITIONAL,
            "context": np.ones((50, 3)),
        },
        r"`context` must have shape .* each of the 50 rows of `x`; got shape \(49, 2\)": {
            "family": CONDITIONAL,
            "context": TWO[:49],
        },
        "`context` must be finite; got nan in row 0, column 0, and 99 more": {
            "family": CONDITIONAL,
            "context": TWO * np.nan,
        },
        "`context` must have no masked entries; got one in row 7": {
            "family": CONDITIONAL,
            "context": MASKED,
        },
        "`batch_size` must be at most the number of rows, 45; got 46": {"batch_size": 46},
        "`batch_size` must be a positive integer; got 0": {"batch_size": 0},
        "`num_steps` must be a positive integer; got -1": {"num_steps": -1},
        "`patience` must be a positive integer; got 0": {"patience": 0},
        "`validation_fraction` must be at least 0 and below 1; got 1.0": {
            "validation_fraction": 1.0
        },
    },
}


@pytest.mark.parametrize(("kind", "message"), [(k, m) for k, c in CASES.items() for m in c])
def test_message(kind, message):
    options = {"family": NORMAL, "x": X, "validation_fraction": 0.1} | CASES[kind][message]
    with compilations() as names, pytest.raises(kind, match=message) as caught:
        quick(options.pop("family"), options.pop("x"), **options)
    assert not any("_run" in name for name in names)
    assert len(str(caught.value)) < 300


def test_one_row():
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match="`x` must vary in every column"),
    ):
        quick(NORMAL, X[:1])


# --------------------------------------------------------------------------------------- learning


LEARNERS = {
    "full_rank": lambda: fv.full_rank(2),
    "mixture": lambda: fv.mixture(2, 1),
    "unconditional": lambda: fv.unconditional(fv.gaussian(2)),
    "whitened": lambda: fv.whitened(fv.full_rank(2)),
    "maf": lambda: fv.maf(2),
    "iaf": lambda: fv.iaf(2, **SMALL),
    "coupling": lambda: fv.coupling(2, **SMALL),
    "flow on a flow": lambda: fv.maf(2, **SMALL, base=fv.full_rank(2)),
}


@pytest.mark.parametrize("name", ["mixture", "unconditional"])
def test_quick_learners(name):
    assert gap(quick(LEARNERS[name](), normal(2000), num_steps=1000)) < 0.05


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(200)
@pytest.mark.parametrize("name", [n for n in LEARNERS if n not in ("mixture", "unconditional")])
def test_every_family_alone(name):
    """A shear, which leaves the entropy as it is: of a line, or of a curve for those that bend."""
    bend = 0.0 if name in ("full_rank", "whitened") else 0.5
    z = np.random.default_rng(0).normal(size=(9_000, 2))
    x = 500 + 100 * np.stack([z[:, 0], z[:, 1] + z[:, 0] + bend * z[:, 0] ** 2], 1)
    options = {"num_steps": 500, "combine": False, "progress": False}
    density = fv.fit_density(LEARNERS[name](), x[4_000:], key=KEY, **options)
    noise = (z[:4_000] ** 2 - 1).sum(1).mean() / 2
    assert -np.mean(density.log_prob(x[:4_000])) - noise - ENTROPY < 0.05


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(200)
def test_conditional_families_with_no_settings():
    # A context far from zero, too.
    z = np.random.default_rng(5).normal(size=(20_000, 1))
    x = 500 + 100 * (z + np.random.default_rng(6).normal(size=z.shape))
    c = 1e4 + 7 * z
    family = fv.conditional(fv.gaussian(1), fv.networks.MLP(1, [32], 2))
    density = fv.fit_density(family, x, context=c, key=KEY, progress=False)
    assert abs(-np.mean(density.log_prob(x, c)) - ENTROPY / 2) < 0.05


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(200)
def test_two_moons_with_no_settings():
    datasets = pytest.importorskip("sklearn.datasets")
    x, _ = datasets.make_moons(10_000, noise=0.05, random_state=1)
    test, _ = datasets.make_moons(4_000, noise=0.05, random_state=99)
    density = fv.fit_density(fv.maf(2), x, key=KEY, progress=False)
    # Two half circles of radius 1, convolved with the noise, by an integral over the angle.
    angle = (np.arange(2000) + 0.5) * np.pi / 2000
    outer = np.stack([np.cos(angle), np.sin(angle)], 1)
    inner = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)
    means = np.concatenate([outer, inner])
    square = (test**2).sum(1)[:, None] - 2 * test @ means.T + (means**2).sum(1)
    exact = np.exp(-square / (2 * 0.05**2)).mean(1) / (2 * np.pi * 0.05**2)
    assert np.mean(np.log(exact) - density.log_prob(test)) <= 0.015
