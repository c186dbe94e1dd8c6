"""Data frames into and out of `fit_density` and the density."""

import pickle

import jax
import numpy as np
import pytest

import flowvi as fv
from flowvi.densities import DensityWarning, frames

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TABLE = {"age": 40 + 10 * RNG.normal(size=120), "income": np.exp(RNG.normal(size=120))}
ROWS = np.stack(list(TABLE.values()), 1)


class Column:
    columns = ()

    def __init__(self, values):
        self.values = np.asarray(values)
        self.dtype = self.values.dtype

    def to_numpy(self):
        return self.values


class Frame:
    """The least that a frame has, of a library that nobody knows."""

    def __init__(self, table):
        self.table = dict(table)
        self.columns = list(self.table)

    def to_numpy(self):
        return np.stack(list(self.table.values()), 1)

    def __getitem__(self, name):
        return Column(self.table[name])


def fit(x, family=None, **options):
    options = {"key": KEY, "num_steps": 0, "progress": False, **options}
    return fv.fit_density(family, x, **options)


def make(library):
    return Frame if library is None else pytest.importorskip(library).DataFrame


@pytest.fixture(scope="module")
def plain():
    return fit(ROWS, support=[None, "positive"])


@pytest.mark.parametrize("library", [None, "pandas", "polars"])
def test_a_frame_is_its_numbers_with_names(library, plain, tmp_path):
    frame = make(library)
    density = fit(frame(TABLE), support={"income": "positive"})
    np.testing.assert_array_equal(density.log_prob(ROWS), plain.log_prob(ROWS))
    backwards = frame(dict(reversed(TABLE.items())))
    np.testing.assert_array_equal(density.log_prob(backwards), plain.log_prob(ROWS))
    draws, log_prob = density.sample_and_log_prob(KEY, 50)
    np.testing.assert_array_equal(np.asarray(draws), plain.sample(KEY, 50))
    if library is not None:
        assert isinstance(draws, frame) and list(draws.columns) == ["age", "income"]
        np.testing.assert_allclose(density.log_prob(draws), log_prob, atol=1e-4)
    assert np.shape(density.columns.frame(np.zeros((2, 3, 2)))) == (2, 3, 2)
    density.save(tmp_path / "density.flowvi")
    for again in (fv.load(tmp_path / "density.flowvi"), pickle.loads(pickle.dumps(density))):
        assert again.columns == density.columns
        np.testing.assert_array_equal(again.log_prob(backwards), density.log_prob(backwards))
    assert density.calibration(backwards, key=KEY, num_draws=50).pit.shape == (120, 2)


def test_types_of_columns():
    pandas = pytest.importorskip("pandas")
    table = {
        "a": RNG.normal(size=80).astype(np.float32),
        "b": RNG.permutation(80),
        "c": ROWS[:80, 0],
    }
    frame = pandas.DataFrame(table)
    draws = fit(frame[["a", "c"]]).sample(KEY, 5)
    assert [each.name for each in draws.dtypes] == ["float32", "float64"]
    # To a family of real numbers whole ones are some of them.
    draws = fit(frame, fv.mean_field(3), num_steps=10).sample(KEY, 5)
    assert [each.name for each in draws.dtypes] == ["float32", "float64", "float64"]


@pytest.mark.compilations(60)
@pytest.mark.parametrize("library", [None, "pandas"])
def test_a_frame_of_contexts(library):
    frame = make(library)
    x, context = frame({"y": ROWS[:, 0]}), frame({"age": ROWS[:, 1], "z": ROWS[::-1, 0]})
    density = fit(x, context=context)
    there = frame({"z": ROWS[::-1, 0], "age": ROWS[:, 1]})
    np.testing.assert_array_equal(density.log_prob(x, there), density.log_prob(x, context))
    assert np.shape(density.sample(KEY, (), there)) == (120, 1)
    with pytest.raises(ValueError, match=r"`context` must have the columns .*without 'z'"):
        density.sample(KEY, (), frame({"age": ROWS[:, 0]}))


def changed(**columns):
    return Frame({**TABLE, **{name: np.asarray(each) for name, each in columns.items()}})


def with_value(value):
    return np.where(np.arange(120) == 7, value, TABLE["age"])


MESSAGES = {
    TypeError: {
        "Column 'sex' of `x` must hold numbers; got dtype <U1. Perhaps": changed(sex=["f"] * 120),
        "Column 'sex' of `x` must hold numbers; got dtype object": changed(
            sex=np.array(["f", None] * 60, object)
        ),
        "Columns of `x` must have strings as names; got 0. .* `x.to_numpy": Frame({0: ROWS[:, 0]}),
    },
    ValueError: {
        "Column 'age' of `x` must be finite; got inf in row 7. Perhaps": changed(
            age=with_value(np.inf)
        ),
        "Column 'age' of `x` must be finite; got nan in row 7": changed(age=with_value(np.nan)),
        "`x` must vary in every column; got the constant 3.0 in column 'c'": changed(
            c=np.full(120, 3.0)
        ),
        r"support \(0, inf\); got -1.0 in row 7, column 'age'": changed(age=with_value(-1.0)),
    },
}


@pytest.mark.parametrize(("kind", "message"), [(k, m) for k, c in MESSAGES.items() for m in c])
def test_message(kind, message):
    x = MESSAGES[kind][message]
    # Without a family, columns of other kinds go into a table.
    family = fv.mean_field(len(x.columns))
    support = {"age": "positive"} if "support" in message else None
    with pytest.raises(kind, match=message):
        fit(x, family, support=support)


def test_messages_about_names(plain):
    density = fit(Frame(TABLE), support={"income": "positive"})
    with pytest.raises(
        ValueError, match=r"the columns \['age', 'income'\]; got .* without 'income'"
    ):
        density.log_prob(Frame({"age": TABLE["age"]}))
    with pytest.raises(ValueError, match=r"the columns .*; got 'sex' too. Perhaps drop it"):
        density.log_prob(changed(sex=np.zeros(120)))
    with pytest.raises(ValueError, match=r"`support` must name columns of `x`, .*; got 'incomes'"):
        fit(Frame(TABLE), support={"incomes": "positive"})
    with pytest.raises(TypeError, match="`support` may be a dict only where `x` is a data frame"):
        fit(ROWS, support={"income": "positive"})
    with pytest.warns(DensityWarning, match="Column 'tied' holds 3 different numbers"):
        fit(changed(tied=np.arange(120.0) % 3))
    twice = Frame(TABLE)
    twice.columns = ["age", "age"]
    with pytest.raises(ValueError, match="must have different names; got 'age' twice"):
        frames.read("x", twice)


def test_probabilities_by_names(plain):
    density = fit(Frame(TABLE), support={"income": "positive"})
    found = density.probability({"age": 40}, {}, key=KEY)
    assert found == plain.probability([40, -np.inf], np.inf, key=KEY)
    assert abs(found.value - np.mean(TABLE["age"] > 40)) < 0.1
