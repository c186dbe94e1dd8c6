import dataclasses

import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import Plateau
from tests.training.helpers import compilations, quadratic, rows, run, start

SGD = optax.sgd(0.1)
ZEROS = np.zeros(3, np.float32)


@dataclasses.dataclass
class Unhashable:
    def __call__(self, params, key, batch):
        return quadratic(params, key, batch)


def returning(value):
    """A loss that returns `value`, or what it makes of the parameters."""

    def loss_fn(params, key, batch):
        del key, batch
        return value(params) if callable(value) else value

    return loss_fn


LOSS = np.float32(0)
#: What each message is said to, by the kind of error.
CASES = {
    TypeError: {
        "`num_steps` must be a positive integer; got 1.5": {"num_steps": 1.5},
        r"`key` must be a random key, such as `jax.random.key\(0\)`; got 3": {"key": 3},
        "`loss_fn` must be a function; got 3": {"loss_fn": 3},
        "`loss_fn` must be hashable.*frozen dataclass": {"loss_fn": Unhashable()},
        "`callback` must be a function; got 3": {"callback": 3},
        "`validate` must be a function; got 3": {"validate": 3, "validate_every": 2},
        "`progress` must be True or False; got -1": {"progress": -1},
        "`resume` must be True or False; got 'yes'": {
            "resume": "yes",
            "checkpoint_dir": "/nowhere",
        },
        r"`plateau` must be an `fv.Plateau\(...\)` or None; got 5": {"plateau": 5},
        "`averaging` must be a number between 0 and 1 or None; got '0.9'": {"averaging": "0.9"},
        "`averaging` must be a number": {"averaging": True},
        "`batch_size` must be a positive integer": {"batch_size": "5"},
        "`key` must be a random key": {"key": np.zeros((2, 2), np.uint32)},
        r"`optimizer` must be an Optax optimizer, .* got 0.1": {"optimizer": 0.1},
        r"`params\['n'\]` must be a floating array; got dtype int32. Perhaps wrap it in `Fixed`": {
            "params": start() | {"n": np.arange(3, dtype=np.int32)}
        },
        r"`params\['n'\]` must be a floating array; got 'a'": {"params": start() | {"n": "a"}},
        r"`data\['x'\]` must be an array of numbers; got": {"data": {"x": np.array(["a"])}},
        "`data` must be an array of numbers; got": {"data": np.array([None, 1])},
        r"`validation_data\['a'\]` must be an array of numbers": {
            "validate_every": 1,
            "validation_data": {"a": np.array(["b"])},
        },
        "`loss_fn` must return a floating loss; got shape .* and dtype int32": {
            "loss_fn": returning(np.int32(1))
        },
        r"`loss_fn` must return loss, \(loss, metrics\) or .*; got a tuple of length 4": {
            "loss_fn": returning((LOSS, {}, {}, {}))
        },
        "`loss_fn` must return its metrics as a dict from names to scalars": {
            "loss_fn": returning((LOSS, [LOSS]))
        },
    },
    ValueError: {
        "`num_steps` must be a positive integer; got 0": {"num_steps": 0},
        "`max_bad_steps` must be a positive": {"max_bad_steps": 0},
        "`checkpoint_every` must be a positive integer; got 0": {
            "checkpoint_every": 0,
            "checkpoint_dir": "/nowhere",
        },
        "`averaging` must lie between 0 and 1; got 1.0": {"averaging": 1.0},
        "`averaging` must lie between 0 and 1; got 0.0": {"averaging": 0.0},
        "`averaging` must lie between 0 and 1; got nan": {"averaging": np.nan},
        "`params` must have at least one leaf outside `Fixed`; got none": {
            "params": {"mean": Fixed(ZEROS)}
        },
        "`params` must have at least one leaf": {"params": {}},
        r"`data\['x'\]` must have a leading axis of rows": {"data": {"x": 1.0}},
        "`data` must have at least one row; got none": {"data": np.zeros((0, 3))},
        "`data` must hold at least one array; got {}": {"data": {}},
        r"`data\[1\]` must have as many rows as `data\[0\]`, which has 4; got 5": {
            "data": (np.zeros(4), np.zeros(5))
        },
        "`batch_size` must be at most the number of rows, 60; got 61. Perhaps leave it out": {
            "batch_size": 61
        },
        "`batch_size` must be a positive integer; got 0": {"batch_size": 0},
        "`batch_size` must be None where there is no `data`; got 5": {
            "batch_size": 5,
            "data": None,
        },
        "`validate_every` must be a positive integer where `validate` is given; got None": {
            "validate": quadratic
        },
        "`validate_every` must be a positive integer where `validation_data` is given": {
            "validation_data": rows()
        },
        "`validate_every` must be a positive integer where `patience` is given": {"patience": 3},
        "`validate_every` must be None where neither `validate` nor `validation_data`.*got 4": {
            "validate_every": 4
        },
        "`validate_every` must be a positive integer; got 0": {
            "validate_every": 0,
            "validation_data": rows(),
        },
        "`patience` must be a positive integer; got 0": {
            "validate_every": 1,
            "validation_data": rows(),
            "patience": 0,
        },
        r"`validate` must return a scalar loss; got shape \(3,\)": {
            "validate_every": 1,
            "validate": returning(ZEROS),
        },
        r"`loss_fn` must return a scalar loss; got shape \(3,\) and dtype float32. Perhaps take": {
            "loss_fn": returning(lambda params: params["mean"])
        },
        "`loss_fn` must return a scalar loss; got None": {"loss_fn": returning(None)},
        r"`loss_fn` must return scalar metrics; got shape \(3,\) and dtype float32 for 'kl'": {
            "loss_fn": returning(lambda params: (LOSS, {"kl": params["mean"]}))
        },
        "`loss_fn` must not name a metric 'loss', which the history keeps for itself": {
            "loss_fn": returning((LOSS, {"loss": LOSS}))
        },
        "`loss_fn` must hand back parameters of the structure it was given": {
            "loss_fn": returning((LOSS, {}, {}))
        },
        r"keep the shape and dtype of the Fixed leaf `params\['s'\].value`, shape \(\) .* \(2,\)": {
            "params": start() | {"s": Fixed(np.float32(0))},
            "loss_fn": returning(lambda params: (LOSS, {}, params | {"s": Fixed(ZEROS[:2])})),
        },
    },
}


@pytest.mark.parametrize(("kind", "message"), [(k, m) for k, c in CASES.items() for m in c])
def test_message(kind, message):
    arguments = {"optimizer": SGD, "num_steps": 5, "data": rows()} | CASES[kind][message]
    with compilations() as names, pytest.raises(kind, match=message) as caught:
        run(**arguments)
    assert not [name for name in names if "stage" not in name]  # shapes are looked at first
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "`window` must be a positive integer; got 0"),
        ({"patience": -1}, "`patience` must be a positive integer; got -1"),
        ({"tolerance": 0}, "`tolerance` must be a positive number or None; got 0"),
        ({"tolerance": np.inf}, "`tolerance` must be a positive number or None; got inf"),
    ],
)
def test_plateaus(options, message):
    with pytest.raises(ValueError, match=message):
        Plateau(**options)


def test_metrics_of_the_validation():
    def named(params, key, batch):
        return quadratic(params, key, batch), {"validation_kl": LOSS, "kl": LOSS}

    def validation(params, key, batch):
        return quadratic(params, key, batch), {"kl": LOSS}

    options = {"data": rows(), "validation_data": rows(), "validate_every": 2}
    with pytest.raises(ValueError, match="`loss_fn` must not name a metric 'validation_kl', under"):
        run(named, validate=validation, **options)
