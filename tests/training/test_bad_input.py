import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import fit
from tests.training.helpers import compilations, quadratic, rows, start

SGD = optax.sgd(0.1)


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


LOSS = jnp.float32(0)
CASES = {
    "steps zero": (ValueError, "`num_steps` must be a positive integer; got 0", {"num_steps": 0}),
    "steps float": (
        TypeError,
        "`num_steps` must be a positive integer; got 1.5",
        {"num_steps": 1.5},
    ),
    "bad steps": (ValueError, "`max_bad_steps` must be a positive", {"max_bad_steps": 0}),
    "key": (
        TypeError,
        r"`key` must be a random key, such as `jax.random.key\(0\)`; got 3",
        {"key": 3},
    ),
    "loss no function": (TypeError, "`loss_fn` must be a function; got 3", {"loss_fn": 3}),
    "loss unhashable": (
        TypeError,
        "`loss_fn` must be hashable.*frozen dataclass",
        {"loss_fn": Unhashable()},
    ),
    "callback": (TypeError, "`callback` must be a function; got True", {"callback": True}),
    "optimizer": (
        TypeError,
        r"`optimizer` must be an Optax optimizer, .* got 0.1",
        {"optimizer": 0.1},
    ),
    "params integer": (
        TypeError,
        r"`params\['n'\]` must be a floating array; got dtype int32. Perhaps wrap it in `Fixed`",
        {"params": start() | {"n": jnp.arange(3)}},
    ),
    "params string": (
        TypeError,
        r"`params\['n'\]` must be a floating array; got 'a'",
        {"params": start() | {"n": "a"}},
    ),
    "params fixed": (
        ValueError,
        "`params` must have at least one leaf outside `Fixed`; got none",
        {"params": {"mean": Fixed(jnp.zeros(3))}},
    ),
    "params empty": (ValueError, "`params` must have at least one leaf", {"params": {}}),
    "data text": (
        TypeError,
        r"`data\['x'\]` must hold numbers; got dtype <U1",
        {"data": {"x": np.array(["a"])}},
    ),
    "data object": (
        TypeError,
        "`data` must hold numbers; got dtype object",
        {"data": np.array([None, 1])},
    ),
    "data scalar": (
        ValueError,
        r"`data\['x'\]` must have a leading axis of rows",
        {"data": {"x": 1.0}},
    ),
    "data empty": (
        ValueError,
        "`data` must have at least one row; got none",
        {"data": np.zeros((0, 3))},
    ),
    "data nothing": (ValueError, "`data` must hold at least one array; got {}", {"data": {}}),
    "data unequal": (
        ValueError,
        r"`data\[1\]` must have as many rows as `data\[0\]`, which has 4; got 5",
        {"data": (np.zeros(4), np.zeros(5))},
    ),
    "batch too large": (
        ValueError,
        "`batch_size` must be at most the number of rows, 60; got 61. Perhaps leave it out",
        {"batch_size": 61},
    ),
    "batch zero": (ValueError, "`batch_size` must be a positive integer; got 0", {"batch_size": 0}),
    "batch without data": (
        ValueError,
        "`batch_size` must be None where there is no `data`; got 5",
        {"batch_size": 5, "data": None},
    ),
    "validate without every": (
        ValueError,
        "`validate_every` must be a positive integer where `validate` is given; got None",
        {"validate": quadratic},
    ),
    "validation data without every": (
        ValueError,
        "`validate_every` must be a positive integer where `validation_data` is given",
        {"validation_data": rows()},
    ),
    "patience without every": (
        ValueError,
        "`validate_every` must be a positive integer where `patience` is given",
        {"patience": 3},
    ),
    "every without validation": (
        ValueError,
        "`validate_every` must be None where neither `validate` nor `validation_data`.*got 4",
        {"validate_every": 4},
    ),
    "every zero": (
        ValueError,
        "`validate_every` must be a positive integer; got 0",
        {"validate_every": 0, "validation_data": rows()},
    ),
    "patience zero": (
        ValueError,
        "`patience` must be a positive integer; got 0",
        {"validate_every": 1, "validation_data": rows(), "patience": 0},
    ),
    "validation data text": (
        TypeError,
        r"`validation_data\['a'\]` must hold numbers",
        {"validate_every": 1, "validation_data": {"a": np.array(["b"])}},
    ),
    "validation not scalar": (
        ValueError,
        r"`validate` must return a scalar loss; got shape \(3,\)",
        {"validate_every": 1, "validate": returning(jnp.zeros(3))},
    ),
    "loss not scalar": (
        ValueError,
        r"`loss_fn` must return a scalar loss; got shape \(3,\) and dtype float32. Perhaps take",
        {"loss_fn": returning(lambda params: params["mean"])},
    ),
    "loss integer": (
        TypeError,
        "`loss_fn` must return a floating loss; got shape .* and dtype int32",
        {"loss_fn": returning(jnp.int32(1))},
    ),
    "loss nothing": (
        ValueError,
        "`loss_fn` must return a scalar loss; got None",
        {"loss_fn": returning(None)},
    ),
    "loss of four": (
        TypeError,
        r"`loss_fn` must return loss, \(loss, metrics\) or .*; got a tuple of length 4",
        {"loss_fn": returning((LOSS, {}, {}, {}))},
    ),
    "metrics list": (
        TypeError,
        "`loss_fn` must return its metrics as a dict from names to scalars",
        {"loss_fn": returning((LOSS, [LOSS]))},
    ),
    "metrics vector": (
        ValueError,
        r"`loss_fn` must return scalar metrics; got shape \(3,\) and dtype float32 for 'kl'",
        {"loss_fn": returning(lambda params: (LOSS, {"kl": params["mean"]}))},
    ),
    "metrics name": (
        ValueError,
        "`loss_fn` must not name a metric 'loss', which the history keeps for itself",
        {"loss_fn": returning((LOSS, {"loss": LOSS}))},
    ),
    "handed back structure": (
        ValueError,
        "`loss_fn` must hand back parameters of the structure it was given",
        {"loss_fn": returning((LOSS, {}, {}))},
    ),
    "handed back shape": (
        ValueError,
        r"keep the shape and dtype of the Fixed leaf `params\['s'\].value`, shape \(\) .* \(2,\)",
        {
            "params": start() | {"s": Fixed(jnp.zeros(()))},
            "loss_fn": returning(lambda params: (LOSS, {}, params | {"s": Fixed(jnp.zeros(2))})),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    kind, message, changes = CASES[case]
    arguments = {
        "loss_fn": quadratic,
        "params": start(),
        "optimizer": SGD,
        "key": jax.random.key(0),
        "num_steps": 5,
        "data": rows(),
        "progress": False,
    } | changes
    with compilations() as names, pytest.raises(kind, match=message):
        fit(
            arguments.pop("loss_fn"),
            arguments.pop("params"),
            arguments.pop("optimizer"),
            **arguments,
        )
    assert not any("_run" in name or "_begin" in name for name in names)
