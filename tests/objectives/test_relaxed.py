"""Relaxations against their own expectation, by quadrature, and the bias that they are known for.

One coin with logit l, or two classes that differ by it: z = sigmoid((l + L) / T), L logistic.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import objectives as ob
from tests.objectives.helpers import assert_mean
from tests.tolerances import FLOAT32

KEY = jax.random.key(0)
LOGIT = 0.6

#: Quantiles of the logistic distribution, in the middle of cells of equal probability.
SHARES = (np.arange(40_000, dtype=np.float32) + 0.5) / 40_000
NOISE = np.log(SHARES) - np.log1p(-SHARES)


def concave(z):
    """A log likelihood as of a normal with a linear decoder."""
    return -1.5 * (1.2 - z) ** 2


def wavy(z):
    return jnp.sin(5 * z) + 0.4 * z


FAMILIES = {
    "binary concrete": fv.bernoulli(1),
    "gumbel-softmax": fv.categorical((), 2, one_hot=True),
}


@functools.cache
def objective_of(name, temperature, of_z):
    """The likelihood sees the coin, or the first class."""
    family = fv.unconditional(fv.relaxed(FAMILIES[name], temperature))
    prior = fv.unconditional(FAMILIES[name], learned=False)

    def log_likelihood(params, key, z, batch):
        del params, key, batch
        return of_z(z[..., 0])

    return ob.ELBO(family, ob.Joint(prior, log_likelihood), num_samples=2)


def params_of(objective):
    return {**objective.init(KEY), "prior": objective.log_joint.prior.init(KEY)}


def at(params, logit):
    shape = params["posterior"]["context"]["logits"].shape
    logits = jnp.zeros(shape).at[0].set(logit)
    return {**params, "posterior": {**params["posterior"], "context": {"logits": logits}}}


def rate(logit):
    """KL from a fair coin."""
    p = jax.nn.sigmoid(logit)
    return jnp.log(2.0) + p * jax.nn.log_sigmoid(logit) + (1 - p) * jax.nn.log_sigmoid(-logit)


def relaxed_loss(logit, temperature, of_z):
    return rate(logit) - jnp.mean(of_z(jax.nn.sigmoid((logit + NOISE) / temperature)))


def discrete_loss(logit, of_z):
    p = jax.nn.sigmoid(logit)
    return rate(logit) - p * of_z(1.0) - (1 - p) * of_z(0.0)


@functools.partial(jax.jit, static_argnums=0)
def estimates(objective, logit):
    params = params_of(objective)

    def loss(logit, key):
        return objective(at(params, logit), key, None)[0]

    both = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
    return both(logit, jax.random.split(KEY, 4_000))


@functools.partial(jax.jit, static_argnums=2)
def exact(logit, temperature, of_z):
    """The relaxed loss and its gradient, the discrete loss, and the mean of z (1 - z)."""
    z = jax.nn.sigmoid((logit + NOISE) / temperature)
    relaxed = jax.value_and_grad(relaxed_loss)(logit, temperature, of_z)
    return *relaxed, discrete_loss(logit, of_z), jnp.mean(z * (1 - z))


@pytest.mark.parametrize("name", FAMILIES)
def test_relaxations_have_their_own_expectation_and_the_known_bias(name):
    def bias(temperature, logit, of_z):
        losses, gradients = estimates(objective_of(name, temperature, of_z), logit)
        relaxed, slope, discrete, square = exact(logit, temperature, of_z)
        assert_mean(losses, relaxed, bias=1e-4)
        if temperature > 0.1:  # below, the slope is too steep for the grid
            assert_mean(gradients, slope, bias=1e-3)
        return losses - discrete, square, np.var(gradients)

    # Of a fair coin the mean of z is a half, so a square -a z^2 is flattered by a E z (1 - z).
    for temperature in (2.0, 0.5):
        errors, square, _ = bias(temperature, 0.0, concave)
        assert_mean(errors, -1.5 * square, bias=1e-4)
        assert 1.5 * square > 0.05
    bias(0.5, LOGIT, concave)
    # For any coin and function it goes with the temperature, and what is colder is noisier.
    found = [bias(temperature, LOGIT, wavy) for temperature in (1.0, 0.3, 0.01)]
    sizes = [abs(np.mean(errors)) for errors, _, _ in found]
    assert sizes[0] > 2 * sizes[1] > 10 * sizes[2]
    assert found[0][2] < found[1][2] < found[2][2]


def test_the_temperature_falls_in_a_fit():
    temperature = fv.Annealing(2.0, 0.5, num_steps=10)
    objective = objective_of("binary concrete", temperature, wavy)

    @jax.jit
    def three_steps():
        params, found = params_of(objective), []
        for _ in range(3):
            loss, _, params = objective(params, KEY, None)
            found.append((loss, params["posterior"]["family"]["step"].value))
            assert objective.kl_rule(params) == "analytic"
        return found

    for step, (loss, count) in enumerate(three_steps()):
        assert count == step + 1
        fixed = objective_of("binary concrete", 2.0 * 0.25 ** (step / 10), wavy)
        expected = jax.jit(lambda o=fixed: o(params_of(o), KEY, None)[0])()
        np.testing.assert_allclose(loss, expected, rtol=FLOAT32)


def log_likelihood(params, key, z, batch):
    return z.sum(-1)


SOFT = fv.unconditional(fv.relaxed(fv.bernoulli(1), 0.5))
COINS = fv.unconditional(fv.bernoulli(1))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            ob.IWELBO(SOFT, ob.Joint(COINS, log_likelihood)),
            "`family` must not be relaxed for IWELBO, .*Perhaps use `fv.objectives.ELBO`",
        ),
        (ob.ScoreFunction(SOFT, ob.Joint(COINS, log_likelihood)), "must not be relaxed for Sc"),
        (ob.ForwardKL(SOFT, ob.Joint(COINS, log_likelihood)), "must not be relaxed for Forward"),
        (
            ob.ELBO(SOFT, ob.Joint(COINS, log_likelihood), path=True),
            "`kl` must be .* for a relaxed family.*got kl='auto', path=True",
        ),
        (
            ob.ELBO(SOFT, ob.Joint(COINS, log_likelihood), kl="sampled"),
            "`kl` must be .* for a relaxed family.*got kl='sampled'",
        ),
        (
            ob.ELBO(SOFT, ob.Joint(fv.mixture(1, 2), log_likelihood)),
            "`prior` must have a KL divergence in closed form from the discrete .*got mixture",
        ),
    ],
)
def test_bad_input(objective, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: objective(params_of(objective), KEY, None))


def test_a_joint_density_of_ones_own_sees_the_relaxed_density():
    """Maddison's form, with a relaxed prior: KL of the two densities, zero where they agree."""
    family = fv.unconditional(fv.relaxed(fv.bernoulli(1), 1.0))
    prior = family.family

    def log_joint(params, key, z, batch):
        del params, key, batch
        q, _ = prior.train_distribution({}, KEY, jnp.zeros(1))
        return q.log_prob(z)

    objective = ob.ELBO(family, log_joint, num_samples=1000)

    @jax.jit
    def loss(logits):
        own = {**objective.init(KEY)["posterior"], "context": {"logits": logits}}
        return objective({"posterior": own}, KEY, None)

    np.testing.assert_allclose(loss(np.zeros(1, np.float32)), 0.0, atol=1e-3)
    assert loss(np.ones(1, np.float32)) > 0.05
