"""Kinds of columns: inference, reading, encoding. All of it is numpy."""

import dataclasses
import datetime

import numpy as np
import pytest
from scipy import stats

import flowvi as fv
from flowvi.densities import table_frames
from flowvi.tables import Angle, Category, Constant, Encoder, Integer, Real, Schema

RNG = np.random.default_rng(0)
N = 400

COLUMNS = {
    "height": RNG.normal(170, 10, N),
    "income": np.where(RNG.uniform(size=N) < 0.3, 0.0, np.exp(RNG.normal(size=N))),
    "age": RNG.integers(0, 90, N),
    "grade": np.round(2 * RNG.normal(6, 1, N)) / 2,
    "sex": np.where(RNG.uniform(size=N) < 0.5, "f", "m"),
    "ok": RNG.uniform(size=N) < 0.2,
    "pair": RNG.integers(0, 2, N),
    "one": np.full(N, 3.0),
    "dir": RNG.uniform(0, 360, N),
}
KINDS = {
    "height": Real(),
    "income": Real(0.0, atoms=(0.0,)),
    "age": Integer(lower=0.0),
    "grade": Integer(0.5),
    "sex": Category(("f", "m")),
    "ok": Category((False, True)),
    "pair": Category((0, 1), ordered=True),
    "one": Constant(3.0),
    "dir": Real(),
}


def test_kinds_by_inference():
    schema = fv.infer_schema(COLUMNS)
    assert dict(zip(schema.names, schema.kinds, strict=True)) == KINDS
    assert hash(schema) == hash(fv.infer_schema(COLUMNS))
    assert str(schema).splitlines()[4].split() == [
        "sex",
        "Category(levels=('f',",
        "'m'),",
        "ordered=False)",
    ]
    assert schema.replace(dir=Angle(360)).kinds[-1] == Angle(360)
    assert schema.replace(one=Integer()).names == schema.names


def test_kinds_of_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "size": pandas.Categorical(["s", "l", None] * 4, ["s", "m", "l"], ordered=True),
            "count": pandas.array([1, 2, None, 4] * 3, "Int64"),
            "flag": pandas.array([True, None, False] * 4, "boolean"),
            "word": pandas.Series(["a", None, "c"] * 4),
        }
    )
    kinds = fv.infer_schema(frame).kinds
    assert kinds[0] == Category(("s", "m", "l"), ordered=True)
    assert isinstance(kinds[1], Integer) and kinds[2] == Category((False, True))
    assert kinds[3] == Category(("a", "c"))


@pytest.fixture(scope="module")
def encoder():
    schema = fv.infer_schema(COLUMNS).replace(dir=Angle(360))
    values = table_frames.read("x", COLUMNS)
    pairs = zip(schema.names, schema.kinds, strict=True)
    found = {n: kind.numbers(values[n], n) for n, kind in pairs}
    return Encoder.fitted(schema, found, None), found


def test_rows_there_and_back(encoder):
    encoder, found = encoder
    rows = encoder.encode(found)
    assert rows.shape == (N, 9, 4)  # income is two fields, one of height is none
    back = encoder.decode(rows[..., 0])
    for name in found:
        np.testing.assert_allclose(back[name], found[name], rtol=1e-6, atol=1e-6, err_msg=name)
        kind = encoder.schema.kinds[encoder.schema.names.index(name)]
        assert np.array_equal(
            kind.values(found[name])[:9].astype(str), kind.values(back[name])[:9].astype(str)
        ) or (isinstance(kind, Real | Angle))
    # A hole is one in all of its fields.
    holes = {name: np.full(2, np.nan) for name in found}
    assert np.isnan(encoder.encode(holes)[..., 0]).all()


def test_cells_are_next_to_each_other(encoder):
    """Each ends where the next one begins, and the counted masses are those of the data."""
    encoder, found = encoder
    grid = np.arange(0, 120.0)
    rows = encoder.encode({n: np.resize(e, 120) for n, e in found.items()} | {"age": grid})
    z, below, above, _ = rows[:, 3].T
    np.testing.assert_allclose((z + above)[:-1], (z - below)[1:], atol=1e-9)
    assert z[0] - below[0] < -10 and np.all(np.diff(z) > 0)
    mass = stats.norm.cdf(z + above) - stats.norm.cdf(z - below)
    assert abs(mass.sum() - 1) < 1e-6
    assert abs(mass[:45].sum() - (found["age"] < 45).mean()) < 0.02


def test_weights_are_repeated_rows(encoder):
    encoder, found = encoder
    schema, counts = encoder.schema, RNG.integers(1, 4, N)
    twice = {name: np.repeat(each, counts) for name, each in found.items()}
    one = Encoder.fitted(schema, found, counts.astype(float))
    other = Encoder.fitted(schema, twice, None)
    # The number of knots is that of the rows there are.
    for a, b in zip(one.cells, other.cells, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name])


NOW = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


def objects(values):
    found = np.empty(len(values), object)
    found[:] = values
    return found


MESSAGES = {
    ValueError: {
        r"Column 'c' of `x` must be finite; got inf in row 1. Perhaps mark": np.array([1, np.inf]),
        "Column 'c' of `x` must hold values; got only missing ones. Perhaps drop": np.full(
            9, np.nan
        ),
        "Column 'c' of `x` must have at most 1000 different levels; got 10000. Perhaps drop": (
            np.arange(10_000).astype(str)
        ),
        "`x` must have at least one row": np.zeros(0),
    },
    TypeError: {
        r"Column 'c' of `x` must hold numbers.*got dtype datetime64\[s\]. Perhaps give days": (
            np.array(["2020-01-01"] * 9, "datetime64[s]")
        ),
        "Column 'c' of `x` must hold .*got a datetime and dtype object. Perhaps give days": (
            objects([NOW, None] * 5)
        ),
        "Column 'c' of `x` must hold .*got a list and dtype object. Perhaps drop": objects(
            [[1]] * 9
        ),
        "Column 'c' of `x` must hold .*all of one type; got int and str. Perhaps convert": (
            objects([1, "a"] * 5)
        ),
    },
}


@pytest.mark.parametrize(("kind", "message"), [(k, m) for k, c in MESSAGES.items() for m in c])
def test_messages_of_frames(kind, message):
    with pytest.raises(kind, match=message):
        fv.infer_schema({"c": MESSAGES[kind][message]})


VALUES = {
    "must lie in .*got -1 in row 1. Perhaps drop": (Real(0.0), [1.0, -1.0]),
    "must hold multiples of 1; got 1.5 in row 0. Perhaps make it a `Real`": (Integer(), [1.5, 2]),
    "must hold multiples of 0.5 from 0.25 on; got 0.5": (Integer(0.5, 0.25), [0.75, 0.5]),
    r"must lie in \[0, 9\]; got 10 in row 1": (Integer(lower=0, upper=9), [9, 10]),
    r"must hold one of its levels \['f', 'm'\]; got 'x' in row 1": (
        Category(("f", "m")),
        ["f", "x"],
    ),
    "must hold the constant 3.0; got 4.0 in row 1": (Constant(3.0), [3.0, 4.0]),
}


@pytest.mark.parametrize("message", VALUES)
def test_messages_of_values(message):
    kind, values = VALUES[message]
    with pytest.raises(ValueError, match=message):
        kind.numbers(objects(values), "Column 'c'")


def test_messages_of_schemas():
    with pytest.raises(ValueError, match=r"must have the columns that are replaced.*got 'b'"):
        Schema.of(a=Real()).replace(b=Real())
    with pytest.raises(TypeError, match="`schema` must have kinds of columns"):
        Schema.of(a="real")
    with pytest.raises(ValueError, match="`levels` must be two different ones or more"):
        Category(("a", "a"))
    with pytest.raises(ValueError, match="`lower` must be below `upper`"):
        Real(1.0, 0.0)
    with pytest.raises(ValueError, match="`period` must be positive"):
        Angle(0.0)
    with pytest.raises(TypeError, match="`schema` must be a schema"):
        fv.table({"a": Real()})
    with pytest.raises(ValueError, match="`schema` must have a column that varies"):
        fv.table(Schema.of(a=Constant(1)))
    with pytest.raises(TypeError, match="`x` must be a data frame, or a dict of arrays"):
        fv.infer_schema(np.zeros((3, 2)))


def test_affine_units_there_and_back(encoder):
    encoder, found = encoder
    rows = encoder.encode(found)
    family = fv.table(encoder.schema)
    plain = dataclasses.replace(family, plain=True)
    assert family.in_units(encoder.units(), rows) is rows
    assert plain.is_plain.tolist() == [True, False, False, True, True] + 4 * [False]
    units = plain.in_units(encoder.units(), rows)
    np.testing.assert_array_equal(units[:, ~plain.is_plain], rows[:, ~plain.is_plain])
    back = encoder.decode(encoder.scores(units[..., 0]))
    np.testing.assert_array_equal(back["age"], found["age"])
    np.testing.assert_array_equal(back["grade"], found["grade"])
    y, below, above, _ = units[:, 3].T
    first = found["age"] == 0
    assert np.all(below[first] > 50) and np.ptp(below[~first]) < 1e-9
    slope = np.polyfit(found["age"], y, 1)[0]
    np.testing.assert_allclose(above, 0.5 * slope)
    np.testing.assert_allclose(back["height"], found["height"], rtol=1e-9)
    slope = np.polyfit(found["height"], units[:, 0, 0], 1)[0]
    np.testing.assert_allclose(np.log(slope), units[:, 0, 1])
