"""Densities of tables: frames in and out, and questions."""

import pickle

import jax
import numpy as np
import pytest

import flowvi as fv
from flowvi.densities import DensityWarning
from flowvi.params import combine, partition
from flowvi.tables import Angle

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
N = 300


def make(count):
    z = RNG.normal(size=(count, 3))
    return {
        "sex": np.where(z[:, 0] + 0.5 * RNG.normal(size=count) > 0, "f", "m").astype(object),
        "age": np.round(40 + 10 * z[:, 0] + 3 * z[:, 1]).clip(0).astype(int),
        "income": np.where(RNG.uniform(size=count) < 0.3, 0.0, np.exp(z[:, 2])),
        "wind": (z[:, 1] * 60 + 180) % 360,
        "height": 100 + 3 * z[:, 1],
        "same": np.full(count, "x", object),
    }


TABLE = make(N)
TABLE["height"][::7] = np.nan
SCHEMA = fv.infer_schema(TABLE).replace(wind=Angle(360))


def fit(x, **options):
    options = {"key": KEY, "num_steps": 0, "progress": False, **options}
    return fv.fit_density(fv.table(SCHEMA, width=8), x, **options)


@pytest.fixture(scope="module")
def density():
    """A density whose network is no start; how good it is does not matter."""
    found = fit(TABLE, validation_fraction=0)
    trainable, fixed = partition(found.params)
    move = lambda x: np.asarray(x) + 0.1 * RNG.normal(size=x.shape).astype(np.float32)  # noqa: E731
    found.result.params.update(combine(jax.tree.map(move, trainable), fixed))
    return found


@pytest.mark.compilations(60)
def test_masses_and_densities_of_columns(density):
    age = np.exp(density.marginal("age").log_prob({"age": np.arange(0, 400)}))
    assert abs(age.sum() - 1) < 1e-3
    both = {"sex": np.repeat(["f", "m"], 400), "age": np.tile(np.arange(400), 2)}
    assert abs(np.exp(density.marginal(["sex", "age"]).log_prob(both)).sum() - 1) < 1e-3
    for name, grid in {
        "height": np.linspace(60, 140, 4001),
        "wind": np.linspace(0, 360, 3000, endpoint=False),
        "income": np.concatenate([np.linspace(1e-4, 8, 4000), np.geomspace(8, 8e4, 4000)]),
    }.items():
        values = np.exp(density.marginal(name).log_prob({name: grid}))
        total = np.trapezoid(values, grid) if name != "wind" else values.sum() * 360 / 3000
        if name == "income":
            total += np.exp(density.marginal(name).log_prob({name: [0.0]}))[0]
        assert abs(total - 1) < 4e-3, name


def test_marginals_are_rows_with_holes(density):
    names = ["age", "height"]
    holes = {n: np.full(N, np.nan) if n not in names else TABLE[n] for n in TABLE}
    holes["sex"] = holes["same"] = np.full(N, None, object)
    part = density.marginal(names)
    assert part.names == ("age", "height") and repr(part) == "TableDensity(age, height)"
    np.testing.assert_allclose(
        part.log_prob({n: TABLE[n] for n in names}), density.log_prob(holes), atol=1e-5
    )


def test_conditionals(density):
    given = density.given({"sex": "f"})
    rest = {n: TABLE[n] for n in TABLE if n != "sex"}
    joint = density.log_prob({**TABLE, "sex": np.full(N, "f")})
    alone = density.marginal("sex").log_prob({"sex": ["f"]})
    # Sex is the first in the natural order as well.
    np.testing.assert_allclose(given.log_prob(rest), joint - alone, atol=2e-4)
    drawn = given.sample(KEY, 400)
    assert list(drawn) == list(rest) and abs(drawn["age"].mean() - 45) < 3
    both = given.given({"age": 40}).marginal("height")
    assert repr(both) == "TableDensity(height | sex='f', age=40)"
    assert both.sample(KEY, 5)["height"].shape == (5,)
    grid = np.linspace(60, 140, 2001)
    assert abs(np.trapezoid(np.exp(both.log_prob({"height": grid})), grid) - 1) < 1e-3


def test_draws_and_questions(density):
    drawn, log_prob = density.sample_and_log_prob(KEY, 500)
    np.testing.assert_allclose(density.log_prob(drawn), log_prob, atol=1e-5)
    assert list(drawn) == list(TABLE) and drawn["age"].dtype == int
    assert set(drawn["sex"]) == {"f", "m"} and set(drawn["same"]) == {"x"}
    assert np.all((drawn["wind"] >= 0) & (drawn["wind"] < 360)) and drawn["income"].min() == 0
    quantiles = density.quantiles([0.1, 0.5, 0.9], key=KEY, num_draws=1000)
    assert list(quantiles) == ["age", "income", "wind", "height"]
    assert np.all(np.diff(quantiles["age"]) > 0)
    told = density.mutual_information("sex", "age", key=KEY, num_draws=1000)
    assert 0.05 < told.value < 0.69
    found = density.probability({"age": 40}, {}, key=KEY, num_draws=1000)
    assert abs(found.value - (drawn["age"] > 40).mean()) < 0.1
    whole = {name: each[~np.isnan(TABLE["height"])] for name, each in TABLE.items()}
    assert density.calibration(whole, key=KEY, num_draws=100).pit.shape == (257, 6)
    with pytest.raises(ValueError, match="Column 'height' of `x` must have no missing values here"):
        density.calibration(TABLE, key=KEY)


def test_holes_are_drawn_and_the_rest_stays(density):
    holes = {**TABLE, "sex": np.where(np.arange(N) % 3 == 0, None, TABLE["sex"])}
    one, two = density.impute(holes, KEY, 2)
    for made in (one, two):
        np.testing.assert_array_equal(made["age"], TABLE["age"])
        there = ~np.isnan(TABLE["height"])
        np.testing.assert_array_equal(made["height"][there], TABLE["height"][there])
        assert not np.isnan(made["height"]).any() and set(made["sex"]) == {"f", "m"}
    assert np.any(one["height"] != two["height"])
    old = np.arange(N) % 3 == 0
    older = one["sex"][old] == np.where(TABLE["age"][old] > 40, "f", "m")
    assert older.mean() > 0.6  # given the age, which goes with the sex


@pytest.mark.compilations(60)
def test_frames_and_files(density, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(TABLE).astype({"sex": "category", "height": "float32"})
    found = fit(frame, validation_fraction=0)
    np.testing.assert_allclose(
        found.log_prob(frame[list(reversed(TABLE))]), found.log_prob(TABLE), atol=1e-3
    )
    drawn = found.sample(KEY, 20)
    assert list(drawn.dtypes.map(str))[:3] == ["category", "int64", "float64"]
    assert drawn["height"].dtype == "float32"
    assert list(drawn["sex"].cat.categories) == ["f", "m"]
    found.save(tmp_path / "table.flowvi")
    for again in (fv.load(tmp_path / "table.flowvi"), pickle.loads(pickle.dumps(found))):
        assert again.schema == SCHEMA and again.frame_type == found.frame_type
        np.testing.assert_array_equal(again.log_prob(frame), found.log_prob(frame))
    assert np.isfinite(found.impute(frame.head(9), KEY)["height"]).all()


@pytest.mark.slow
@pytest.mark.compilations(80)
def test_comparison_and_ranks():
    """Of few rows each is held out once, and what is chosen beats columns for themselves."""
    found = fit(TABLE, num_steps=30)
    names = [each.name for each in found.scores]
    assert names[:2] == ["marginals", "copula"] and names[-2:] == ["network", "all"]
    score = {each.name: each.log_prob.value for each in found.scores}
    assert score["all"] > score["marginals"] + 0.2 and len(found.held_out) == N
    rank = found.anomaly_rank({**TABLE, "age": np.where(np.arange(N) < 5, 400, TABLE["age"])})
    assert rank[:5].max() < 0.02 and abs(rank[5:].mean() - 0.5) < 0.1
    with pytest.warns(DensityWarning, match="The columns look independent"):
        fv.fit_density({n: RNG.permutation(TABLE[n]) for n in ("sex", "age")}, **PLAIN)


PLAIN = {"key": KEY, "num_steps": 0, "progress": False}


def test_rows_that_are_repeated_are_told(density):
    fresh = make(200)
    rows = {name: each[:200] for name, each in TABLE.items()}
    assert density.privacy(rows, fresh, KEY).message == ""

    class Copies(type(density)):
        def _numbers(self, key, count):
            return {n: self._kind(n).numbers(rows[n], n) for n in rows}

    fields = {n: getattr(density, n) for n in density.__dataclass_fields__}
    with pytest.warns(DensityWarning, match="100.0% are copies, against"):
        assert Copies(**fields).privacy(rows, fresh, KEY).close > 0.9


MESSAGES = {
    "`names` must name columns of .*; got 'b'": lambda d: d.marginal(["b"]),
    "`values` must leave some columns": lambda d: d.marginal("age").given({"age": 1}),
    r"`values\['sex'\]` must hold one of its levels": lambda d: d.given({"sex": "x"}),
    r"`values\['age'\]` must be a value; got nan": lambda d: d.given({"age": np.nan}),
    "`x` must have the columns .*; got a frame without 'same'": lambda d: d.log_prob(
        {n: TABLE[n] for n in TABLE if n != "same"}
    ),
    "Column 'age' of `x` must hold multiples of 1": lambda d: d.marginal("age").log_prob(
        {"age": [1.5]}
    ),
    "`parts` must be numbers between 0 and 1": lambda d: d.quantiles([2.0], key=KEY),
    "`support` must be None for a table.*tables.Real": lambda d: fit(
        TABLE, support={"age": "positive"}
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_message(message, density):
    with pytest.raises(ValueError, match=message):
        MESSAGES[message](density)
