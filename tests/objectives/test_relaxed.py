"""Relaxations against their own expectation, by quadrature, and the bias that they are known for.

One coin with logit l, or two classes that differ by it: z = sigmoid((l + L) / T), L logistic.
"""

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
NOISE = jax.scipy.special.logit((jnp.arange(40_000) + 0.5) / 40_000)


def concave(z):
    """A log likelihood as of a normal with a linear decoder."""
    return -1.5 * (1.2 - z) ** 2


def wavy(z):
    return jnp.sin(5 * z) + 0.4 * z


FAMILIES = {
    "binary concrete": fv.bernoulli(1),
    "gumbel-softmax": fv.categorical((), 2, one_hot=True),
}


def objective_of(name, temperature, of_z, **options):
    """The likelihood sees the coin, or the first class."""
    family = fv.unconditional(fv.relaxed(FAMILIES[name], temperature))
    prior = fv.unconditional(FAMILIES[name], learned=False)

    def log_likelihood(params, key, z, batch):
        del params, key, batch
        return of_z(z[..., 0])

    objective = ob.ELBO(family, ob.Joint(prior, log_likelihood), **options)
    params = {**objective.init(KEY), "prior": prior.init(KEY)}
    return objective, params


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


def estimates(objective, params, logit, count=4_000):
    def loss(logit, key):
        return objective(at(params, logit), key, None)[0]

    both = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    return map(np.asarray, both(logit, jax.random.split(KEY, count)))


@pytest.mark.parametrize("of_z", [concave, wavy])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("name", FAMILIES)
def test_relaxations_are_unbiased_for_the_relaxed_model(name, temperature, of_z):
    objective, params = objective_of(name, temperature, of_z, num_samples=2)
    losses, gradients = estimates(objective, params, LOGIT)
    assert_mean(losses, relaxed_loss(LOGIT, temperature, of_z), bias=1e-4)
    assert_mean(gradients, jax.grad(relaxed_loss)(LOGIT, temperature, of_z), bias=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bias_of_relaxations_has_the_known_sign_and_size(name):
    def bias(temperature, logit, of_z):
        objective, params = objective_of(name, temperature, of_z)
        losses, gradients = estimates(objective, params, logit)
        exact, slope = jax.value_and_grad(discrete_loss)(logit, of_z)
        assert_mean(losses - exact, relaxed_loss(logit, temperature, of_z) - exact, bias=1e-4)
        return losses - exact, gradients - slope

    # Of a fair coin the mean of z is a half, so a square -a z^2 is flattered by a E z (1 - z).
    for temperature in (2.0, 0.5):
        z = jax.nn.sigmoid(NOISE / temperature)
        size = 1.5 * jnp.mean(z * (1 - z))
        losses, _ = bias(temperature, 0.0, concave)
        assert_mean(losses, -size, bias=1e-4)
        assert size > 0.05
    # For any coin and function it goes with the temperature.
    sizes = [abs(np.mean(bias(t, LOGIT, wavy)[0])) for t in (1.0, 0.3, 0.01)]
    assert sizes[0] > 2 * sizes[1] > 10 * sizes[2]


def test_colder_is_noisier():
    spread = []
    for temperature in (1.0, 0.3, 0.1):
        objective, params = objective_of("binary concrete", temperature, wavy)
        moments = ob.gradient_moments(objective, at(params, LOGIT), KEY, num_draws=4_000)
        spread.append(moments.total_variance)
    assert spread[0] < spread[1] < spread[2]


def test_the_temperature_falls_in_a_fit():
    temperature = fv.Annealing(2.0, 0.5, num_steps=10)
    objective, params = objective_of("binary concrete", temperature, wavy)
    for step in range(3):
        loss, _, params = objective(params, KEY, None)
        assert params["posterior"]["family"]["step"].value == step + 1
        fixed, other = objective_of("binary concrete", float(temperature(step)), wavy)
        np.testing.assert_allclose(loss, fixed(other, KEY, None)[0], rtol=FLOAT32)
    assert objective.kl_rule(params) == "analytic"


def log_likelihood(params, key, z, batch):
    return z.sum(-1)


SOFT = fv.unconditional(fv.relaxed(fv.bernoulli(1), 0.5))
COINS = fv.unconditional(fv.bernoulli(1))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            ob.IWELBO(SOFT, ob.Joint(COINS, log_likelihood)),
            r"`family` must not be relaxed for this objective, .* for IWELBO. Perhaps use `fv.obj",
        ),
        (ob.ScoreFunction(SOFT, ob.Joint(COINS, log_likelihood)), "must not be relaxed .* for Sc"),
        (ob.ForwardKL(SOFT, ob.Joint(COINS, log_likelihood)), "must not be relaxed .* for Forward"),
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
            "`prior` must have a KL divergence in closed form from the discrete .*got Unconditiona",
        ),
    ],
)
def test_bad_input(objective, message):
    params = {**objective.init(KEY), "prior": objective.log_joint.prior.init(KEY)}
    with pytest.raises(ValueError, match=message):
        objective(params, KEY, None)


def test_a_joint_density_of_ones_own_sees_the_relaxed_density():
    """Maddison's form, with a relaxed prior: KL of the two densities, zero where they agree."""
    family = fv.unconditional(fv.relaxed(fv.bernoulli(1), 1.0))
    prior = family.family

    def log_joint(params, key, z, batch):
        del params, key, batch
        q, _ = prior.train_distribution({}, KEY, jnp.zeros(1))
        return q.log_prob(z)

    objective = ob.ELBO(family, log_joint, num_samples=1000)
    params = objective.init(KEY)
    np.testing.assert_allclose(objective(params, KEY, None), 0.0, atol=1e-3)
    params["posterior"]["context"] = {"logits": jnp.array([1.0])}
    assert objective(params, KEY, None) > 0.05
