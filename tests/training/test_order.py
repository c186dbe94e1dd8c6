import jax
import numpy as np
import optax
import pytest

from flowvi.training.order import Order
from tests.training.helpers import run

KEY = jax.random.key(3)


def rows_at(key, place, count, num_rows):
    return Order(key, num_rows).rows(place, count)


def epochs(num_rows, count, key=KEY):
    return rows_at(key, 0, count * num_rows, num_rows).reshape(count, num_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 1000, 1024, 2**17 + 1])
def test_every_row_once_an_epoch(num_rows):
    found = epochs(num_rows, 3)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(np.sort(found, 1), np.tile(np.arange(num_rows), (3, 1)))


def test_epochs_differ_and_depend_on_the_key_alone():
    found = epochs(50, 4)
    assert len(np.unique(found, axis=0)) == 4
    np.testing.assert_array_equal(found, epochs(50, 4, jax.random.PRNGKey(3)))
    # Keys that differ in either of their two numbers.
    for key in (jax.random.key(4), jax.random.wrap_key_data(np.array([1, 3], np.uint32))):
        assert (found != epochs(50, 4, key)).any(1).all()


@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_slices_agree_with_one_another(num_rows):
    stream = rows_at(KEY, 0, 3 * num_rows + 20, num_rows)
    for place, count in ((0, 1), (3, 20), (num_rows - 1, 2), (num_rows, num_rows), (17, 3)):
        found = rows_at(KEY, place, count, num_rows)
        np.testing.assert_array_equal(found, stream[place : place + count])
    assert not Order(KEY, num_rows).rows(5, 0).size


def test_shuffles_are_uniform():
    # All 24 orders of 4 rows, equally often: chi squared with 23 degrees of freedom stays below
    # 49.7 in all but one of a thousand cases.
    num = 24_000
    _, counts = np.unique(epochs(4, num, jax.random.key(0)) @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert ((counts - num / 24) ** 2 / (num / 24)).sum() < 49.7


def test_neighbours_do_not_stay_together():
    # The rank correlation of the places of rows r and r + lag is 0 within 4 / sqrt(n).
    num_rows = 4000
    places = np.argsort(epochs(num_rows, 1)[0])
    for lag in (1, 2, 64):
        correlation = np.corrcoef(places[:-lag], places[lag:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(num_rows)


def row_seen(params, key, batch):
    del key
    return (params**2).sum(), {f"at {i}": batch["row"][i] for i in range(4)}


def test_fit_uses_this_order():
    data = {"x": np.ones((10, 2), np.float32), "row": np.arange(10)}
    optimizer = optax.sgd(0.1)
    result = run(row_seen, np.zeros(1), optimizer, num_steps=15, data=data, batch_size=4, key=KEY)
    seen = np.stack([result.history[f"at {i}"] for i in range(4)], 1)
    assert seen.dtype == np.int32
    # 15 batches of 4 are exactly 6 epochs of 10 rows.
    np.testing.assert_array_equal(np.sort(seen.reshape(6, 10), 1), np.tile(np.arange(10), (6, 1)))
    np.testing.assert_array_equal(seen.ravel(), rows_at(jax.random.split(KEY, 3)[1], 0, 60, 10))
