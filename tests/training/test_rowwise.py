"""Parameters per row: which rows a step moves, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed, PerRow, partition
from flowvi.training import TrainingDiverged, fit, load, save, sources, stretch
from flowvi.training.rowwise import rowwise, tables
from flowvi.training.step import train_step
from tests.tolerances import FLOAT32
from tests.training.helpers import assert_trees_equal, compilations

KEY = jax.random.key(0)
NUM_ROWS = 7
X = np.random.default_rng(0).normal(size=(NUM_ROWS, 2)).astype(np.float32)
DATA = {"x": X, "row": np.arange(NUM_ROWS)}


def start(num_rows=NUM_ROWS):
    rows = np.random.default_rng(1).normal(size=(num_rows, 2)).astype(np.float32)
    return {"rows": PerRow({"z": jnp.asarray(rows), "s": jnp.zeros(num_rows)}), "m": jnp.ones(2)}


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
    stepper = rowwise(optimizer)
    params = start() if params is None else params
    state = stepper.init(partition(params)[0])
    step = jax.jit(
        lambda params, state, batch: train_step(distance, stepper, params, state, KEY, batch)
    )
    for rows in batches:
        rows = np.asarray(rows)
        out = step(params, state, {"x": X[rows], "row": rows})
        params, state = out.params, out.opt_state
    return params, state


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
    tree = {"rows": own, "m": None}
    state = optimizer.init(tree)
    for _ in range(3):
        gradient = jax.grad(
            lambda rows: jnp.sum((rows["z"] - X[3]) ** 2) + (rows["s"] - X[3, 0]) ** 2
        )(tree["rows"])
        updates, state = optimizer.update({"rows": gradient, "m": None}, state, tree)
        tree = optax.apply_updates(tree, updates)
    for a, b in zip(
        jax.tree.leaves(mixed["rows"].value), jax.tree.leaves(tree["rows"]), strict=True
    ):
        np.testing.assert_allclose(a[3], b, rtol=FLOAT32)


def frozen_scale():
    return {**start(), "m": Fixed(jnp.ones(2))}


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

    options = {"key": KEY, "num_steps": 40, "data": DATA, "progress": False}
    dense = fit(plain, {**start(), "rows": start()["rows"].value}, ADAM, **options)
    found = fit(distance, start(), ADAM, **options)
    for a, b in zip(jax.tree.leaves(dense.params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)


def fitted(**options):
    defaults = {"key": KEY, "num_steps": 200, "data": DATA, "batch_size": 3, "progress": False}
    return fit(distance, start(), ADAM, **{**defaults, **options})


def test_rows_are_learned_and_a_second_fit_compiles_nothing():
    result = fitted()
    np.testing.assert_allclose(result.params["rows"].value["s"], X[:, 0], atol=0.05)
    with compilations() as names:
        fitted(num_steps=150)
    assert not names


def test_the_average_of_a_row_is_over_its_own_steps():
    plain, averaged = fitted(num_steps=20), fitted(num_steps=20, averaging=0.5)
    assert_trees_equal(plain.params, averaged.last_params)
    a, b = (np.asarray(r.params["rows"].value["s"]) for r in (plain, averaged))
    assert (a != b).all() and abs(a - b).max() < 0.5
    # One that no step has moved is its own average.
    some = {name: leaf[:4] for name, leaf in DATA.items()}
    result = fitted(num_steps=20, averaging=0.5, data=some)
    np.testing.assert_array_equal(
        result.params["rows"].value["z"][4:], start()["rows"].value["z"][4:]
    )


def test_validation_keeps_the_best_rows():
    result = fitted(validation_data=DATA, validate_every=50)
    history = result.history["validation"]
    assert len(history) == 4 and history[-1] < history[0]
    loss = distance(result.params, KEY, jax.tree.map(jnp.asarray, DATA))
    np.testing.assert_allclose(loss, history.min(), rtol=FLOAT32)


def test_an_iterable_of_batches():
    batches = [{"x": X[:4], "row": np.arange(4)}, {"x": X[3:], "row": np.arange(3, 7)}]
    result = fit(
        distance,
        start(),
        ADAM,
        key=KEY,
        num_steps=200,
        data=Batches(batches),
        progress=False,
    )
    np.testing.assert_allclose(result.params["rows"].value["s"], X[:, 0], atol=0.05)


class Batches:
    """An iterable that is no pytree."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_resumed_fits_end_with_the_same_bits(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 10, "resume": True}
    whole = fitted(num_steps=40)
    fitted(num_steps=20, **options)
    again = fitted(num_steps=40, **options)
    assert_trees_equal(again.params, whole.params)


def test_parameters_survive_a_file(tmp_path):
    save(tmp_path / "rows.flowvi", start())
    assert_trees_equal(load(tmp_path / "rows.flowvi", like=start()), start())


def broken(params, key, batch):
    """Not finite for a batch with row 5."""
    loss = distance(params, key, batch)
    return jnp.where((batch["row"] == 5).any(), jnp.nan, loss)


def test_bad_steps_leave_no_trace():
    result = fit(
        broken,
        start(),
        ADAM,
        key=KEY,
        num_steps=100,
        data=DATA,
        batch_size=1,
        progress=False,
    )
    assert 12 <= result.num_bad_steps <= 16  # one in seven
    values, before = result.params["rows"].value, start()["rows"].value
    np.testing.assert_array_equal(values["z"][5], before["z"][5])
    assert (values["s"][:5] != before["s"][:5]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    only = {name: leaf[5:6] for name, leaf in DATA.items()}
    with pytest.raises(TrainingDiverged, match="10 bad steps in a row: at step 0, the loss was"):
        fit(broken, start(), ADAM, key=KEY, num_steps=20, data=only, progress=False)


def test_rows_that_the_batch_does_not_name_are_nan():
    def stray(params, key, batch):
        return distance(params, key, {**batch, "row": batch["row"] + 1})

    few = {name: leaf[:3] for name, leaf in DATA.items()}
    with pytest.raises(TrainingDiverged, match="at step 0, the loss was nan"):
        fit(stray, start(), ADAM, key=KEY, num_steps=20, data=few, progress=False)


@pytest.mark.optimized
def test_a_step_copies_no_table():
    """What is temporary is smaller than the smallest table, in a program of many steps."""
    num_rows = 50_000
    source = sources.make(
        {"x": np.zeros((num_rows, 2), np.float32), "row": np.arange(num_rows)},
        8,
        check_finite=False,
    )
    program = stretch.Program(distance, ADAM, None, 8, num_rows)
    compiled = stretch.build(program)
    state, _ = compiled.begin(start(num_rows), KEY)
    limits = np.array([10, 0, 100, 100, 100, 10], np.int32)
    lowered = compiled.careful.lower(state, source.data, None, limits).compile()
    # The order of the rows, which is made anew each epoch, is all that is of their number.
    order = 4 * num_rows
    assert lowered.memory_analysis().temp_size_in_bytes < 4 * order + 2**18
    table = 8 * num_rows
    assert lowered.memory_analysis().alias_size_in_bytes > 3 * table


BAD = {
    "no data": (
        ValueError,
        '`data` must be a dict with "row", .* got NoneType. Perhaps pass',
        {"data": None, "batch_size": None},
    ),
    "no rows": (
        ValueError,
        '`data` must be a dict with "row", .* got a dict of x',
        {"data": {"x": X}},
    ),
    "an array": (ValueError, '`data` must be a dict with "row", .* got ndarray', {"data": X}),
    "floats": (
        TypeError,
        r'`data\["row"\]` must hold numbers of rows, integers; got dtype float32',
        {"data": {"x": X, "row": np.arange(7, dtype=np.float32)}},
    ),
    "too large": (
        ValueError,
        r'`data\["row"\]` must lie between 0 and 6, .*; got 7 in row 6',
        {"data": {"x": X, "row": np.arange(7) + 1}},
    ),
    "negative": (
        ValueError,
        r'`data\["row"\]` must lie between 0 and 6, .*; got -1 in row 0',
        {"data": {"x": X, "row": np.arange(7) - 1}},
    ),
    "shape": (
        ValueError,
        r'`data\["row"\]` must have shape \[num_rows\]; got shape \(7, 1\)',
        {"data": {"x": X, "row": np.arange(7)[:, None]}},
    ),
    "in a batch": (
        ValueError,
        r'`batch 2 of data\["row"\]` must lie between 0 and 6, .*; got 9 in row 0',
        {
            "data": Batches([{"x": X[:1], "row": np.array([i])} for i in (0, 9)]),
            "batch_size": None,
        },
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_of_data_are_checked(name):
    error, message, options = BAD[name]
    with pytest.raises(error, match=message):
        fitted(**options)


def test_tables_and_optimizers_are_checked():
    ragged = {"rows": PerRow({"a": jnp.zeros(3), "b": jnp.zeros(4)})}
    options = {"key": KEY, "num_steps": 1, "data": DATA, "progress": False}
    with pytest.raises(ValueError, match="`params` must hold tables whose leaves have the same"):
        fit(distance, ragged, ADAM, **options)
    with pytest.raises(ValueError, match="`optimizer` must not search along a line where there"):
        fit(distance, start(), optax.lbfgs(), **options)
    across = optax.apply_if_finite(optax.adam(0.1), 3)
    with pytest.raises(ValueError, match="`optimizer` must keep what it measures row by row"):
        fit(distance, start(), across, **options)
