import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.training import fit
from flowvi.training.order import AHEAD, Stream, epoch_order

KEY = jax.random.key(3)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def batches(num_rows, batch_size, num_steps, ahead=1):
    """The rows of each batch, as a loss sees them."""
    stream = Stream(num_rows, batch_size, ahead)

    def step(order, _):
        order = stream.turn(order, KEY)
        return stream.go_on(order, 1), stream.take(jnp.arange(num_rows), order, 0)

    first = jax.tree.map(jnp.asarray, stream.start())
    return jax.lax.scan(step, first, length=num_steps)[1]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (7, 7), (8, 2), (5, 4), (9, 1)])
def test_every_row_once_an_epoch(num_rows, batch_size):
    stream = np.asarray(batches(num_rows, batch_size, 3 * num_rows)).ravel()
    epochs = stream[: len(stream) // num_rows * num_rows].reshape(-1, num_rows)
    assert len(epochs) >= 3
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_rows), (len(epochs), 1)))


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (7, 7), (5, 4), (2**16 + 1, 2**14)])
def test_the_stream_is_the_same_however_far_ahead_it_is_made(num_rows, batch_size):
    num_steps = 40 if num_rows < 100 else 10
    stream = np.asarray(batches(num_rows, batch_size, num_steps))
    for ahead in (3, 17):
        np.testing.assert_array_equal(batches(num_rows, batch_size, num_steps, ahead), stream)
    num_epochs = -(-stream.size // num_rows)
    each = np.concatenate([epoch_order(KEY, e, num_rows) for e in range(num_epochs)])
    np.testing.assert_array_equal(stream.ravel(), each[: stream.size])


@pytest.mark.parametrize("passed", [0, 2, 5, 13])
def test_batches_to_come_are_those_of_the_stream(passed):
    num_rows, batch_size = 10, 4
    stream = Stream(num_rows, batch_size, 8)
    order = jax.tree.map(jnp.asarray, stream.start())
    order = stream.turn(stream.go_on(order, passed), KEY)
    rows = np.concatenate([epoch_order(KEY, e, num_rows) for e in range(12)])
    left = int(stream.batches_left(order))
    # Five epochs are ahead: eight batches, and what is used up of the first of them.
    assert left == (50 - passed * batch_size % num_rows) // batch_size
    for number in range(left):
        place = (passed + number) * batch_size
        batch = stream.take(jnp.arange(num_rows), order, number)
        np.testing.assert_array_equal(batch, rows[place : place + batch_size])


def test_no_more_is_made_ahead_than_is_asked_for():
    def ahead(num_rows, batch_size, num_batches):
        made = Stream(num_rows, batch_size, num_batches).start().rows
        return (made.size - batch_size) / num_rows, made.dtype

    assert ahead(10, 3, 1) == (2, np.uint16)
    assert ahead(10, 3, 20) == (7, np.uint16)
    assert ahead(2**15, 2**13, 1000) == (AHEAD / 2**16, np.uint16)
    assert ahead(2**16, 2**13, 1000) == (AHEAD / 2**17, np.uint16)
    assert ahead(2**16 + 1, 100, 1000) == (2, np.int32)


def test_epochs_differ_and_depend_on_the_key_alone():
    first, second = (np.asarray(epoch_order(KEY, epoch, 50)) for epoch in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, epoch_order(KEY, 0, 50))
    assert (first != np.asarray(epoch_order(jax.random.key(4), 0, 50))).any()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 1000, 1024, 2500])
def test_order_is_a_permutation(num_rows):
    order = np.asarray(epoch_order(KEY, 5, num_rows))
    np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))


def test_shuffles_are_uniform():
    # All 24 orders of 4 rows, equally often: chi squared with 23 degrees of freedom stays below
    # 49.7 in all but one of a thousand cases.
    num = 24_000
    epochs = jnp.arange(num)
    orders = jax.jit(jax.vmap(lambda epoch: epoch_order(jax.random.key(0), epoch, 4)))(epochs)
    _, counts = np.unique(np.asarray(orders) @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert ((counts - num / 24) ** 2 / (num / 24)).sum() < 49.7


def test_neighbours_do_not_stay_together():
    # The rank correlation of the places of rows r and r + lag is 0 within 4 / sqrt(n).
    num_rows = 4000
    places = np.argsort(np.asarray(epoch_order(KEY, 0, num_rows)))
    for lag in (1, 2, 64):
        correlation = np.corrcoef(places[:-lag], places[lag:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(num_rows)


def test_fit_uses_this_order():
    num_rows, batch_size, num_steps = 10, 4, 15

    def loss_fn(params, key, batch):
        del key
        picked = jnp.zeros(num_rows).at[batch["row"]].add(1.0)
        metrics = {f"row {i}": picked[i] for i in range(num_rows)}
        return jnp.sum((params - jnp.mean(batch["x"])) ** 2), metrics

    data = {"x": np.ones((num_rows, 2)), "row": np.arange(num_rows)}
    result = fit(
        loss_fn,
        jnp.zeros(()),
        optax.sgd(0.1),
        key=KEY,
        num_steps=num_steps,
        data=data,
        batch_size=batch_size,
        progress=False,
    )
    counts = np.stack([result.history[f"row {i}"] for i in range(num_rows)], axis=1)
    assert (counts.sum(axis=1) == batch_size).all()
    # 15 batches of 4 are exactly 6 epochs of 10 rows.
    assert (counts.sum(axis=0) == 6).all()
    # Five batches are two epochs.
    assert (counts[:5].sum(axis=0) == 2).all()
    assert len(np.unique(counts, axis=0)) > 5
    assert result.history["row 0"].dtype == np.float32
