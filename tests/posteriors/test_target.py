import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorflow_probability.substrates import jax as tfp

import flowvi as fv
from flowvi.posteriors.supports import as_layout
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


def test_the_jacobian_is_counted_once(x64):
    target = fv.Target.from_named(log_density, PARAMETERS)
    u = jnp.asarray(np.random.default_rng(0).normal(size=9))

    def flat(u):
        return jnp.concatenate([jnp.ravel(leaf) for leaf in target.constrain(u).values()])

    jacobian = jax.jacfwd(flat)(u)
    expected = log_density(target.constrain(u)) + jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(target(u), expected, rtol=FLOAT64)
    # TensorFlow Probability's own bijector, on one coordinate.
    bijector = tfp.bijectors.Exp()
    np.testing.assert_allclose(target.constrain(u)["tau"], bijector.forward(u[2]), rtol=FLOAT64)


def test_constrain_and_back():
    target = fv.Target.from_named(log_density, PARAMETERS)
    u = 3 * jax.random.normal(jax.random.key(0), (50, 9))
    theta = target.constrain(u)
    assert {name: leaf.shape for name, leaf in theta.items()} == {
        "mu": (50, 2),
        "tau": (50,),
        "p": (50, 2, 2),
        "low": (50, 1),
        "high": (50,),
    }
    assert (theta["tau"] > 0).all()
    assert ((theta["p"] > -1) & (theta["p"] < 3)).all()
    assert (theta["low"] > 2).all() and (theta["high"] < 1).all()
    np.testing.assert_allclose(target.unconstrain(theta), u, rtol=1e-2, atol=1e-2)
    assert target.labels()[:4] == ["mu[0]", "mu[1]", "tau", "p[0,0]"]
    # Far out results stay inside.
    far = target.constrain(jnp.full(9, -500.0))
    assert far["tau"] > 0 and (far["p"] > -1).all()


def bivariate_means(num_rows=12):
    x = np.random.default_rng(0).normal(size=(num_rows, 2)) + [0, 10]
    return fv.Target.from_likelihood(
        lambda mean: -0.5 * jnp.sum(mean**2),
        lambda mean, rows: -0.5 * jnp.sum((rows - mean) ** 2, -1),
        x,
        event_size=2,
    )


def test_subsamples_are_scaled_without_bias():
    target = bivariate_means()
    u = jnp.array([[0.5, 9.0], [1.0, 8.0]])
    whole = target.log_joint({}, None, u, target.data)
    np.testing.assert_allclose(target(u), whole, rtol=FLOAT32)
    parts = [target.log_joint({}, None, u, target.data[i : i + 3]) for i in range(0, 12, 3)]
    np.testing.assert_allclose(np.mean(parts, 0), whole, rtol=FLOAT32)
    assert abs(parts[0] - whole).max() > 1e-2


def test_likelihood_over_named_parameters(x64):
    x = np.random.default_rng(0).gamma(3.0, size=20)
    target = fv.Target.from_likelihood(
        lambda p: -p["rate"],
        lambda p, rows: jnp.log(p["rate"]) - p["rate"] * rows["x"],
        {"x": x},
        parameters={"rate": ((), "positive")},
    )
    u = jnp.array([0.3])
    rate = np.exp(0.3)
    expected = -rate + np.sum(0.3 - rate * x) + 0.3
    np.testing.assert_allclose(target(u), expected, rtol=FLOAT64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fv.Target(3, 2), TypeError, "`log_density` must be a function; got 3"),
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
            lambda: fv.Target.from_named(log_density, {"mu": ((2,), "simplex")}),
            ValueError,
            r"In `parameters\['mu'\]`: `support` must be",
        ),
        (
            lambda: fv.Target.from_likelihood(jnp.sum, jnp.sum, jnp.ones(3)),
            ValueError,
            "`event_size` must be given, or else `parameters`; got neither",
        ),
        (
            lambda: fv.Target.from_likelihood(
                jnp.sum, jnp.sum, jnp.ones(3), 2, parameters={"mu": ((), "real")}
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
            lambda: fv.Target.from_likelihood(jnp.sum, jnp.sum, (jnp.ones(3), jnp.ones(2)), 2),
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
                jnp.sum, lambda mean, x: jnp.sum(x - mean), jnp.ones((4, 2)), 2
            ).check(),
            ValueError,
            r"`log_likelihood` must return one log density for each row, of shape \(4,\)",
        ),
        (
            lambda: fv.Target(jnp.sum, 2)(jnp.ones(3)),
            ValueError,
            r"`u` must have a shape that ends in \(2,\)",
        ),
        (
            lambda: as_layout(PARAMETERS).unconstrain({"mu": jnp.ones(2)}),
            ValueError,
            "`parameters` must have the names mu, tau, p, low, high; got mu",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
