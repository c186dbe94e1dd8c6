import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorflow_probability.substrates import jax as tfp

import flowvi as fv
from flowvi.posteriors.target import as_layout
from tests.tolerances import FLOAT32, FLOAT64

PARAMETERS = {
    "mu": ((2,), "real"),
    "tau": ((), "positive"),
    "p": ((2, 2), (-1, 3)),
    "low": (1, (2.0, None)),
    "high": ((), (None, 1.0)),
}


def log_density(p):
    return (
        -0.5 * jnp.sum(p["mu"] ** 2)
        - p["tau"]
        - jnp.sum(p["p"] ** 2)
        - jnp.sum(p["low"])
        + p["high"]
    )


@functools.cache
def named_target():
    return fv.Target.from_named(log_density, PARAMETERS)


def test_the_jacobian_is_counted_once(x64):
    target = named_target()

    @jax.jit
    def program(u):
        def flat(u):
            return jnp.concatenate([jnp.ravel(leaf) for leaf in target.constrain(u).values()])

        theta = target.constrain(u)
        expected = log_density(theta) + jnp.linalg.slogdet(jax.jacfwd(flat)(u))[1]
        # TensorFlow Probability's own bijector, on one coordinate.
        return expected, theta["tau"], tfp.bijectors.Exp().forward(u[2])

    u = np.random.default_rng(0).normal(size=9)
    expected, tau, exp = program(u)
    np.testing.assert_allclose(target(u), expected, rtol=FLOAT64)
    np.testing.assert_allclose(tau, exp, rtol=FLOAT64)


def test_constrain_and_back():
    target = named_target()
    u = 3 * np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32)

    @jax.jit
    def program(u):
        theta = target.constrain(u)
        # Far out results stay inside.
        return theta, target.unconstrain(theta), target.constrain(jnp.full(9, -500.0))

    theta, again, far = program(u)
    assert {name: leaf.shape for name, leaf in theta.items()} == {
        "mu": (50, 2),
        "tau": (50,),
        "p": (50, 2, 2),
        "low": (50, 1),
        "high": (50,),
    }
    theta, far = jax.device_get((theta, far))
    assert (theta["tau"] > 0).all()
    assert ((theta["p"] > -1) & (theta["p"] < 3)).all()
    assert (theta["low"] > 2).all() and (theta["high"] < 1).all()
    np.testing.assert_allclose(again, u, rtol=1e-2, atol=1e-2)
    assert target.labels()[:4] == ["mu[0]", "mu[1]", "tau", "p[0,0]"]
    assert far["tau"] > 0 and (far["p"] > -1).all()


class Frame:
    """As data frames are: no array, but one for numpy."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def likelihood_target(data):
    return fv.Target.from_likelihood(
        lambda mean: -0.5 * jnp.sum(mean**2),
        lambda mean, rows: -0.5 * jnp.sum((rows - mean) ** 2, -1),
        data,
        event_size=2,
    )


def test_subsamples_are_scaled_without_bias():
    x = np.random.default_rng(0).normal(size=(12, 2)) + [0, 10]
    target = likelihood_target(x)
    assert target.num_rows == 12
    u = np.array([[0.5, 9.0], [1.0, 8.0]], np.float32)
    rows = np.asarray(x, np.float32)
    whole, *parts = jax.jit(
        lambda u: [
            target.log_joint({}, None, u, batch)
            for batch in (rows, *(rows[i : i + 3] for i in range(0, 12, 3)))
        ]
    )(u)
    np.testing.assert_allclose(target(u), whole, rtol=FLOAT32)
    np.testing.assert_allclose(np.mean(parts, 0), whole, rtol=FLOAT32)
    assert np.abs(np.subtract(parts[0], whole)).max() > 1e-2
    # What numpy can make an array of is one.
    for data in (x.tolist(), Frame(x)):
        np.testing.assert_array_equal(likelihood_target(data).data, target.data)
    np.testing.assert_array_equal(target(u.tolist()), target(u))


def test_likelihood_over_named_parameters(x64):
    x = np.random.default_rng(0).gamma(3.0, size=20)
    target = fv.Target.from_likelihood(
        lambda p: -p["rate"],
        lambda p, rows: jnp.log(p["rate"]) - p["rate"] * rows["x"],
        {"x": x},
        parameters={"rate": ((), "positive")},
    )
    rate = np.exp(0.3)
    expected = -rate + np.sum(0.3 - rate * x) + 0.3
    np.testing.assert_allclose(target([0.3]), expected, rtol=FLOAT64)


def test_a_target_of_module_functions_is_pickled():
    target = pickle.loads(pickle.dumps(named_target()))
    np.testing.assert_array_equal(target(np.ones(9)), named_target()(np.ones(9)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fv.Target(3, 2), TypeError, "`log_density` must be a function; got 3"),
        (
            lambda: fv.Target(jnp.sum, 2, layout=1.5),
            ValueError,
            "`layout` must be None or a layout of event size 2, .*; got 1.5",
        ),
        (
            lambda: fv.Target(jnp.sum, 2, layout=as_layout(PARAMETERS)),
            ValueError,
            "`layout` must be None or a layout of event size 2, .*; got Layout",
        ),
        (
            lambda: fv.Target(jnp.sum, 2, data=np.ones(3)),
            ValueError,
            "`data` must be given together with `log_likelihood`",
        ),
        (
            lambda: fv.Target.from_likelihood(3, jnp.sum, np.ones(3), 2),
            TypeError,
            "`log_prior` must be a function; got 3",
        ),
        (
            lambda: fv.Target.from_likelihood(jnp.sum, 3, np.ones(3), 2),
            TypeError,
            "`log_likelihood` must be a function; got 3",
        ),
        (lambda: fv.Target(jnp.sum, 0), ValueError, "`event_size` must be a positive integer"),
        (
            lambda: fv.Target.from_named(log_density, [("mu", 2)]),
            TypeError,
            "`parameters` must be a dict such as",
        ),
        (
            lambda: fv.Target.from_named(log_density, {}),
            ValueError,
            "`parameters` must have at least one name",
        ),
        (
            lambda: fv.Target.from_named(log_density, {3: ((), "real")}),
            TypeError,
            "`parameters` must have strings as names; got 3",
        ),
        (
            lambda: fv.Target.from_named(log_density, {"mu": "real"}),
            TypeError,
            r"`parameters\['mu'\]` must be a pair \(shape, support\)",
        ),
        (
            lambda: fv.Target.from_named(log_density, {"mu": ((2,), "triangle")}),
            ValueError,
            r"In `parameters\['mu'\]`: `support` must be",
        ),
        (
            lambda: fv.Target.from_likelihood(jnp.sum, jnp.sum, np.ones(3)),
            ValueError,
            "`event_size` must be given, or else `parameters`; got neither",
        ),
        (
            lambda: fv.Target.from_likelihood(
                jnp.sum, jnp.sum, np.ones(3), 2, parameters={"mu": ((), "real")}
            ),
            ValueError,
            "`event_size` must be given, or else `parameters`; got both",
        ),
        (
            lambda: fv.Target.from_likelihood(jnp.sum, jnp.sum, 3.0, 2),
            ValueError,
            "`data` must be arrays whose leading axis is the row",
        ),
        (
            lambda: fv.Target.from_likelihood(jnp.sum, jnp.sum, (np.ones(3), np.ones(2)), 2),
            ValueError,
            "`data` must have the same number of rows",
        ),
        (
            lambda: fv.Target(lambda u: u, 2).check(),
            ValueError,
            r"`log_density` must return a scalar for one vector of parameters; got shape \(2,\)",
        ),
        (
            lambda: fv.Target(lambda u: (u.sum(), 1.0), 2).check(),
            ValueError,
            "`log_density` must return a scalar for one vector of parameters; got tuple",
        ),
        (
            lambda: fv.Target(lambda u: jnp.int32(1), 2).check(),
            TypeError,
            "`log_density` must return a floating number; got dtype int32",
        ),
        (
            lambda: fv.Target.from_likelihood(
                jnp.sum, lambda mean, x: jnp.sum(x - mean), np.ones((4, 2)), 2
            ).check(),
            ValueError,
            r"`log_likelihood` must return one log density for each row, of shape \(4,\)",
        ),
        (
            lambda: fv.Target(jnp.sum, 2)(np.ones(3)),
            ValueError,
            r"`u` must have a shape that ends in \(2,\)",
        ),
        (
            lambda: as_layout(PARAMETERS).unconstrain({"mu": np.ones(2)}),
            ValueError,
            "`parameters` must have the names mu, tau, p, low, high; got mu",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
