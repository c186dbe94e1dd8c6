"""The strategies make what they say, and our bijectors have the properties on it."""

import jax
from hypothesis import given, settings
from hypothesis import strategies as st

from flowvi.testing import check_bijector, strategies


@settings(max_examples=3)
@given(st.data())
def test_our_bijectors_have_the_properties_on_whatever_is_drawn(data):
    with jax.enable_x64(True):
        size = data.draw(strategies.event_sizes(4))
        bijector = data.draw(strategies.bijectors(size, max_layers=2))
        x = data.draw(strategies.events((size,), (3,)))
        check_bijector(
            bijector, x, properties=["shape", "dtype", "finite", "round_trip", "inverse_log_det"]
        )


@settings(max_examples=20)
@given(st.data())
def test_shapes(data):
    batch_shape = data.draw(strategies.batch_shapes())
    assert data.draw(strategies.events((2, 3), batch_shape)).shape == (*batch_shape, 2, 3)
    order = data.draw(strategies.orders(5))
    assert sorted(order) == list(range(5))
