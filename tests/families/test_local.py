"""A family of which each row has its own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from tests.small import SMALL
from tests.tolerances import FLOAT32

KEY = jax.random.key(0)
FAMILIES = {
    "gaussian": fv.gaussian(2),
    "full": fv.gaussian(2, scale="full"),
    "bernoulli": fv.bernoulli(2),
    "flow": fv.iaf(2, **SMALL, context_size=3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_the_contexts_of_the_inner_family(name):
    inner = FAMILIES[name]
    family = fv.local(inner, 5)
    params = fv.testing.perturbed(family.init(KEY), 0.3, 0)
    table = params["rows"].value
    assert table.shape == (5, *inner.context_shape)
    assert family.reparameterized is inner.reparameterized
    rows = jnp.array([[4, 0, 0], [1, 2, 3]])
    distribution = family.distribution(params, rows)
    assert distribution.batch_shape == (2, 3) and distribution.event_shape == (2,)
    x = family.sample(params, KEY, 4, rows)
    np.testing.assert_array_equal(x, inner.sample(params["family"], KEY, 4, table[rows]))
    np.testing.assert_allclose(
        family.log_prob(params, x, rows),
        inner.log_prob(params["family"], x, table[rows]),
        rtol=FLOAT32,
    )
    assert family.sample(params, KEY, context=jnp.array(3)).shape == (2,)


def test_a_row_that_is_not_there_is_nan_inside_of_a_program():
    family = fv.local(fv.gaussian(2), 5)
    params = family.init(KEY)
    log_prob = jax.jit(lambda rows: family.distribution(params, rows).log_prob(jnp.zeros(2)))
    np.testing.assert_array_equal(
        jnp.isnan(log_prob(jnp.array([0, 4, 5, -1]))), [False, False, True, True]
    )


def test_equal_by_configuration_and_saved(tmp_path):
    family = fv.local(fv.gaussian(2), 5)
    assert family == fv.local(fv.gaussian(2), 5) != fv.local(fv.gaussian(2), 6)
    assert hash(family) == hash(fv.local(fv.gaussian(2), 5))
    params = fv.testing.perturbed(family.init(KEY), 0.3, 0)
    fv.save(tmp_path / "rows.flowvi", params)
    again = fv.load(tmp_path / "rows.flowvi", like=family)
    np.testing.assert_array_equal(again["rows"].value, params["rows"].value)
    with pytest.raises(ValueError, match="num_rows is 5 there and 6 here"):
        fv.load(tmp_path / "rows.flowvi", like=fv.local(fv.gaussian(2), 6))


BAD = {
    "no family": (TypeError, "`family` must be a family, such as", lambda: fv.local("normal", 5)),
    "no context": (
        ValueError,
        r"`family` must take a context, .* got Flow.*Perhaps use `fv.gaussian\(...\)`",
        lambda: fv.local(fv.mean_field(2), 5),
    ),
    "no rows": (
        ValueError,
        "`num_rows` must be a positive integer; got 0",
        lambda: fv.local(fv.gaussian(2), 0),
    ),
    "floats": (
        TypeError,
        "`context` must hold numbers of rows, integers, for Local.*; got dtype float32",
        lambda: sample(jnp.array([0.0])),
    ),
    "too large": (
        ValueError,
        "`context` must hold numbers of rows from 0 to 4, .*; got 5. Perhaps fit new rows with "
        "`fv.fit_rows`",
        lambda: sample(jnp.array([0, 5])),
    ),
    "negative": (ValueError, "from 0 to 4, .*; got -1", lambda: sample(jnp.array([-1, 0]))),
    "none": (ValueError, "`context` must be an array", lambda: sample(None)),
}


def sample(rows):
    family = fv.local(fv.gaussian(2), 5)
    return family.sample(family.init(KEY), KEY, (), rows)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()
