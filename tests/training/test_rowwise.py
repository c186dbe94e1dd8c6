"""Parameters per row: which rows a step moves, and where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.optimizers.rowwise import rowwise, tables
from flowvi.params import Fixed, PerRow, partition
from flowvi.training import TrainingDiverged, program
from flowvi.training.step import train_step
from tests.tolerances import FLOAT32
from tests.training.helpers import KEY, assert_trees_equal, compilations, run

NUM_ROWS = 7
X = np.random.default_rng(0).normal(size=(NUM_ROWS, 2)).astype(np.float32)
DATA = {"x": X, "row": np.arange(NUM_ROWS)}


def start(num_rows=NUM_ROWS):
    rows = np.random.default_rng(1).normal(size=(num_rows, 2)).astype(np.float32)
    table = {"z": rows, "s": np.zeros(num_rows, np.float32)}
    return {"rows": PerRow(table), "m": np.ones(2, np.float32)}


def distance(params, key, batch):
    """Each row to its own datum, on a scale that all share."""
    del key
    rows, scale = params["rows"].take(batch["row"]), params["m"]
    scale = scale.value if isinstance(scale, Fixed) else scale
    square = jnp.sum((rows["z"] * scale - batch["x"]) ** 2, -1)
    return jnp.mean(square) + jnp.mean((rows["s"] - batch["x"][:, 0]) ** 2)


ADAM = optax.adam(0.1)
OPTIMIZERS = {
    "adam": ADAM,
    "momentum": optax.sgd(0.1, momentum=0.9),
    "clipped, decayed": optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.1, 300))
    ),
    "adafactor": optax.adafactor(0.1),
    "injected": optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.1, 300)),
    "one for each": optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.rmsprop(0.1)}, {"rows": "a", "m": "b"}
    ),
}


def steps(optimizer, batches, params=None):
    """Parameters and state after a step on each of these batches of rows."""
    params = jax.tree.map(jnp.asarray, start() if params is None else params)
    step = stepped(optimizer)
    state = step[0](params)
    for rows in batches:
        rows = np.asarray(rows)
        out = step[1](params, state, {"x": X[rows], "row": rows})
        params, state = out.params, out.opt_state
    return params, state


@functools.cache
def stepped(optimizer):
    stepper = rowwise(optimizer)
    return (
        jax.jit(lambda params: stepper.init(partition(params)[0])),
        jax.jit(
            lambda params, state, batch: train_step(distance, stepper, params, state, KEY, batch)
        ),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_absent_rows_are_the_same_to_the_bit(name):
    optimizer = OPTIMIZERS[name]
    # Every row has moments before some of them are absent.
    before = steps(optimizer, [[0, 1, 2, 3], [4, 5, 6, 0]])
    after = steps(optimizer, [[0, 1, 2, 3], [4, 5, 6, 0], [5, 2], [2, 5]])
    absent, present = np.array([0, 1, 3, 4, 6]), np.array([2, 5])
    found = tables(before), tables(after)
    assert len(found[0]) > 1  # some are the optimizer's
    for old, new in zip(*found, strict=True):
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert len(a) == NUM_ROWS
            np.testing.assert_array_equal(a[absent], b[absent])
    z = [np.asarray(params["rows"].value["z"]) for params, _ in (before, after)]
    assert (z[0][present] != z[1][present]).all()


@pytest.mark.parametrize("name", ["adam", "momentum", "adafactor", "one for each"])
def test_a_row_moves_as_if_it_were_alone(name):
    """Its steps are those of the optimizer on its own parameters, whatever was between them.

    A schedule alone counts the steps between as well.
    """
    optimizer = OPTIMIZERS[name]
    mixed, _ = steps(optimizer, [[3], [0], [3], [5], [1], [3]], frozen_scale())
    alone, _ = steps(optimizer, [[3], [3], [3]], frozen_scale())
    for a, b in zip(jax.tree.leaves(mixed["rows"]), jax.tree.leaves(alone["rows"]), strict=True):
        np.testing.assert_array_equal(a[3], b[3])

    own = jax.tree.map(lambda leaf: leaf[3], start()["rows"].value)

    @jax.jit
    def three_steps(rows):
        tree = {"rows": rows, "m": None}
        state = optimizer.init(tree)
        for _ in range(3):
            gradient = jax.grad(
                lambda rows: jnp.sum((rows["z"] - X[3]) ** 2) + (rows["s"] - X[3, 0]) ** 2
            )(tree["rows"])
            updates, state = optimizer.update({"rows": gradient, "m": None}, state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree

    tree = three_steps(own)
    for a, b in zip(
        jax.tree.leaves(mixed["rows"].value), jax.tree.leaves(tree["rows"]), strict=True
    ):
        np.testing.assert_allclose(a[3], b, rtol=FLOAT32)


def frozen_scale():
    return {**start(), "m": Fixed(np.ones(2, np.float32))}


def test_a_row_that_is_twice_in_a_batch_moves_once_by_the_sum_of_both():
    sgd = optax.sgd(0.1)
    twice, _ = steps(sgd, [[2, 4, 2, 2]], frozen_scale())
    z, x = start()["rows"].value["z"], X
    expected = z - 0.1 * 2 * np.array([0, 0, 3, 0, 1, 0, 0])[:, None] / 4 * (z - x)
    np.testing.assert_allclose(twice["rows"].value["z"], expected, rtol=FLOAT32)


def test_all_rows_in_each_step_are_a_plain_fit():
    """With every row in every batch, rowwise Adam is Adam on the table."""

    def plain(params, key, batch):
        return distance({**params, "rows": PerRow(params["rows"])}, key, batch)

    options = {"num_steps": 40, "data": DATA}
    dense = run(plain, {**start(), "rows": start()["rows"].value}, ADAM, **options)
    found = run(distance, start(), ADAM, **options)
    for a, b in zip(jax.tree.leaves(dense.params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)


def fitted(**options):
    defaults = {"num_steps": 200, "data": DATA, "batch_size": 3}
    defaults |= {"validation_data": DATA, "validate_every": 50}
    return run(distance, start(), ADAM, **{**defaults, **options})


def test_rows_are_learned_and_a_second_fit_compiles_nothing():
    result = fitted()
    np.testing.assert_allclose(result.params["rows"].value["s"], X[:, 0], atol=0.05)
    with compilations() as names:
        fitted(num_steps=150)
    assert not names


def test_the_average_of_a_row_is_over_its_own_steps():
    plain, averaged = fitted(num_steps=20), fitted(num_steps=20, averaging=0.5)
    assert_trees_equal(plain.last_params, averaged.last_params)
    a, b = (np.asarray(r.params["rows"].value["s"]) for r in (plain, averaged))
    assert (a != b).all() and abs(a - b).max() < 0.5
    # One that no step has moved is its own average.
    z = [
        np.asarray(fitted(num_steps=1, averaging=0.5).params["rows"].value["z"]),
        start()["rows"].value["z"],
    ]
    assert (z[0] == z[1]).all(1).sum() == NUM_ROWS - 3


def test_validation_keeps_the_best_rows():
    result = fitted()
    history = result.history["validation"]
    assert len(history) == 4 and history[-1] < history[0]
    loss = jax.jit(distance)(result.params, KEY, DATA)
    np.testing.assert_allclose(loss, history.min(), rtol=FLOAT32)


def test_an_iterable_of_batches():
    batches = [{"x": X[:4], "row": np.arange(4)}, {"x": X[3:], "row": np.arange(3, 7)}]
    result = fitted(data=Batches(batches), batch_size=None)
    np.testing.assert_allclose(result.params["rows"].value["s"], X[:, 0], atol=0.05)


class Batches:
    """An iterable that is no pytree."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def broken(params, key, batch):
    """Not finite for a batch with row 5."""
    loss = distance(params, key, batch)
    return jnp.where((batch["row"] == 5).any(), jnp.nan, loss)


def test_bad_steps_leave_no_trace():
    with pytest.warns(RuntimeWarning, match="of 98 steps were skipped"):
        result = run(broken, start(), ADAM, num_steps=98, data=DATA, batch_size=1)
    assert result.num_bad_steps == 14  # one in seven
    values, before = result.params["rows"].value, start()["rows"].value
    np.testing.assert_array_equal(values["z"][5], before["z"][5])
    assert (np.asarray(values["s"])[:5] != before["s"][:5]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    # Nor in what the optimizer keeps for the row.
    for table in tables(result.opt_state):
        for leaf in jax.tree.leaves(table):
            assert not np.asarray(leaf)[5].any()
    only = {name: leaf[5:6] for name, leaf in DATA.items()}
    with pytest.raises(TrainingDiverged, match="in a row: from step 0 on, the loss was nan"):
        run(broken, start(), ADAM, data=only)


def test_rows_that_the_batch_does_not_name_are_nan():
    def stray(params, key, batch):
        return distance(params, key, {**batch, "row": batch["row"] + 1})

    few = {name: leaf[:3] for name, leaf in DATA.items()}
    with pytest.raises(TrainingDiverged, match="from step 0 on, the loss was nan"):
        run(stray, start(), ADAM, data=few)


@pytest.mark.optimized
def test_a_step_copies_no_table():
    """What is temporary is smaller than the smallest table, in a program of many steps."""
    num_rows = 50_000
    data = {"x": np.zeros((num_rows, 2), np.float32), "row": np.arange(num_rows)}
    compiled = program.build(program.Program(distance, ADAM))
    state = compiled.begin(start(num_rows))
    rows = np.zeros((10, 8), np.int32)
    numbers = np.array([0, 10, 10], np.int32)
    analysis = compiled.run.lower(state, KEY, data, rows, *numbers).compile().memory_analysis()
    table = 4 * num_rows
    assert analysis.temp_size_in_bytes < table // 2
    assert analysis.alias_size_in_bytes > 6 * table


#: What each message is said to, by the kind of error.
BAD = {
    TypeError: {
        r'`data\["row"\]` must hold numbers of rows, integers; got dtype float32': {
            "data": {"x": X, "row": np.arange(7, dtype=np.float32)}
        }
    },
    ValueError: {
        '`data` must be a dict with "row", .* got NoneType. Perhaps pass': {
            "data": None,
            "batch_size": None,
        },
        '`data` must be a dict with "row", .* got a dict of x': {"data": {"x": X}},
        '`data` must be a dict with "row", .* got ndarray': {"data": X},
        r'`data\["row"\]` must lie between 0 and 6, .*; got 7 in row 6': {
            "data": {"x": X, "row": np.arange(7) + 1}
        },
        r'`data\["row"\]` must lie between 0 and 6, .*; got -1 in row 0': {
            "data": {"x": X, "row": np.arange(7) - 1}
        },
        r'`data\["row"\]` must have shape \[num_rows\]; got shape \(7, 1\)': {
            "data": {"x": X, "row": np.arange(7)[:, None]}
        },
        r'`batch 2 of data\["row"\]` must lie between 0 and 6, .*; got 9 in row 0': {
            "data": Batches([{"x": X[:1], "row": np.array([i])} for i in (0, 9)]),
            "batch_size": None,
        },
    },
}


@pytest.mark.parametrize(("kind", "message"), [(k, m) for k, c in BAD.items() for m in c])
def test_rows_of_data_are_checked(kind, message):
    with pytest.raises(kind, match=message):
        fitted(**BAD[kind][message])


def test_tables_and_optimizers_are_checked():
    ragged = {"rows": PerRow({"a": np.zeros(3), "b": np.zeros(4)})}
    with pytest.raises(ValueError, match="`params` must hold tables whose leaves have the same"):
        run(distance, ragged, ADAM, data=DATA)
    with pytest.raises(ValueError, match="`optimizer` must not search along a line where there"):
        run(distance, start(), optax.lbfgs(), data=DATA)
    across = optax.apply_if_finite(optax.adam(0.1), 3)
    with pytest.raises(ValueError, match="`optimizer` must keep what it measures row by row"):
        run(distance, start(), across, data=DATA)
