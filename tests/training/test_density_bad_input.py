import jax
import numpy as np
import pytest

import flowvi as fv
from flowvi.training import fit_density
from tests.training.helpers import Counting, Gauss, compilations

X = np.random.default_rng(0).normal(size=(50, 2))


def changed(*entries):
    x = X.copy()
    for row, column, value in entries:
        x[row, column] = value
    return x


POSITIVE = np.abs(X) + 0.1
CONDITIONAL = Gauss(context_shape=(3,))

CASES = {
    "family": (
        TypeError,
        r"`family` must be a family, such as `fv.maf\(2\)`; got 'maf'",
        {"family": "maf"},
    ),
    "key": (TypeError, "`key` must be a random key", {"key": 0}),
    "integers": (
        TypeError,
        r"`x` must hold floating numbers; got dtype int64. .* `x.astype\(float\)`",
        {"x": np.arange(10).reshape(5, 2)},
    ),
    "booleans": (TypeError, "`x` must hold floating numbers; got dtype bool", {"x": X > 0}),
    "complex": (TypeError, "`x` must hold floating numbers; got dtype complex128", {"x": X + 0j}),
    "text": (
        TypeError,
        "`x` must hold floating numbers; got dtype <U1",
        {"x": np.array([["a", "b"]])},
    ),
    "one-dimensional": (
        ValueError,
        r"`x` must have shape \[num_rows, 2\].*got shape \(50,\)\.$",
        {"x": X[:, 0]},
    ),
    "one-dimensional of one": (
        ValueError,
        r"`x` must have shape \[num_rows, 1\].*got shape \(50,\). .* `x\[:, None\]`",
        {"x": X[:, 0], "family": Gauss((1,))},
    ),
    "event size": (
        ValueError,
        r"`x` must have shape \[num_rows, 3\].*got shape \(50, 2\). .* event size 2\?",
        {"family": Gauss((3,))},
    ),
    "empty": (ValueError, r"`x` must have at least one row; got shape \(0, 2\)", {"x": X[:0]}),
    "nan": (
        ValueError,
        "`x` must be finite; got nan in row 7, column 1. Perhaps drop or fill in",
        {"x": changed((7, 1, np.nan))},
    ),
    "inf": (
        ValueError,
        "`x` must be finite; got -inf in row 3, column 0, and 1 more",
        {"x": changed((3, 0, -np.inf), (9, 1, np.nan))},
    ),
    "too large for single precision": (
        ValueError,
        "`x` must be finite in float32; got 1e.300 in row 4, column 0",
        {"x": changed((4, 0, 1e300))},
    ),
    "constant": (
        ValueError,
        r"`x` must vary in every column; got the constant 3.0 in column 1. Perhaps drop",
        {"x": changed(*((row, 1, 3.0) for row in range(50)))},
    ),
    "one row": (ValueError, "`x` must vary in every column", {"x": X[:1]}),
    "outside": (
        ValueError,
        r"must lie strictly inside its support \(0, inf\); got -1.5 in row 4, column 1. .*widen",
        {"x": np.where(np.arange(100).reshape(50, 2) == 9, -1.5, POSITIVE), "support": "positive"},
    ),
    "on the edge": (
        ValueError,
        r"strictly inside its support \(0, 1\); got 1.0 in row 0, column 1, and 49 more",
        {"x": np.stack([X[:, 0], np.ones(50)], 1), "support": [None, (0, 1)]},
    ),
    "support name": (
        ValueError,
        r"`support` must be None, 'real', 'positive' or \(low, high\); got 'negative'",
        {"support": "negative"},
    ),
    "support kind": (
        TypeError,
        "`support` must be None, .* or a sequence of these.*got 3",
        {"support": 3},
    ),
    "support entry": (
        TypeError,
        r"`support` must be None, 'real', 'positive' or \(low, high\); got 3",
        {"support": ["positive", 3]},
    ),
    "support length": (
        ValueError,
        r"`support` must have one entry for each column of events of shape \(2,\); got 3 entries",
        {"support": ["positive"] * 3},
    ),
    "support order": (
        ValueError,
        r"`support` must have low < high; got \(1, 0\)",
        {"support": (1, 0)},
    ),
    "support nan": (ValueError, "`support` must have low < high", {"support": (0, np.nan)}),
    "support of no flow": (
        ValueError,
        "`support` must be None for a family that is no flow; got 'positive'",
        {"support": "positive", "family": Counting(), "x": POSITIVE},
    ),
    "support and params": (
        ValueError,
        "`support` must be None where `params` are given",
        {"support": "positive", "x": POSITIVE, "params": Gauss().init(None)},
    ),
    "context missing": (
        ValueError,
        "`context` must be an array .* got None",
        {"family": CONDITIONAL},
    ),
    "context superfluous": (
        ValueError,
        "`context` must be None for .* which takes none",
        {"context": np.ones((50, 3))},
    ),
    "context shape": (
        ValueError,
        r"`context` must have a shape that ends in \(3,\)",
        {"family": CONDITIONAL, "context": np.ones((50, 2))},
    ),
    "context rows": (
        ValueError,
        r"`context` must have shape \(50, 3\), a row for each row of `x`; got shape \(49, 3\)",
        {"family": CONDITIONAL, "context": np.ones((49, 3))},
    ),
    "context nan": (
        ValueError,
        "`context` must be finite; got nan in row 0, column 0, and 149 more",
        {"family": CONDITIONAL, "context": np.full((50, 3), np.nan)},
    ),
    "context text": (
        TypeError,
        "`context` must hold floating numbers; got dtype <U1",
        {"family": CONDITIONAL, "context": np.full((50, 3), "a")},
    ),
    "batch": (
        ValueError,
        "`batch_size` must be at most the number of training rows, 45; got 46",
        {"batch_size": 46},
    ),
    "batch zero": (ValueError, "`batch_size` must be a positive integer; got 0", {"batch_size": 0}),
    "steps": (ValueError, "`num_steps` must be a positive integer; got -1", {"num_steps": -1}),
    "patience": (ValueError, "`patience` must be a positive integer; got 0", {"patience": 0}),
    "fraction": (
        ValueError,
        "`validation_fraction` must be at least 0 and below 1; got 1.0",
        {"validation_fraction": 1.0},
    ),
    "fraction kind": (
        TypeError,
        "`validation_fraction` must be a number; got '10%'",
        {"validation_fraction": "10%"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    kind, message, changes = CASES[case]
    arguments = {
        "family": Gauss(),
        "x": X,
        "key": jax.random.key(0),
        "num_steps": 5,
        "progress": False,
    } | changes
    with compilations() as names, pytest.raises(kind, match=message):
        fit_density(arguments.pop("family"), arguments.pop("x"), **arguments)
    assert not any("_run" in name or "_begin" in name for name in names)


def test_integers_of_jax():
    x = jax.numpy.arange(10).reshape(5, 2)
    with pytest.raises(TypeError, match="got dtype int32"):
        fit_density(fv.maf(2), x, key=jax.random.key(0))
