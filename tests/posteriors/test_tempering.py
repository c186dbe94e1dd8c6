import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowvi.objectives import ELBO, ForwardKL
from flowvi.params import Fixed
from flowvi.posteriors.tempering import COOLING, FORWARD, Tempered
from tests.families.test_families import FAMILIES, perturbed
from tests.tolerances import FLOAT64

KEY = jax.random.key(0)
FAMILY = FAMILIES["iaf"](3)


def log_joint(params, key, z, batch):
    del params, key, batch
    return -jnp.sum(jnp.cosh(0.3 * z), -1)


def flattened(params, key, z, batch):
    return 0.1**0.5 * log_joint(params, key, z, batch)


def gradient(loss_fn, step=None):
    params = {"posterior": perturbed(FAMILY.init(KEY))}
    fixed = {} if step is None else {"control": Fixed(jnp.asarray(step))}

    def loss(params):
        out = loss_fn({**params, **fixed}, KEY, None)
        return out[0] if isinstance(out, tuple) else out

    return jax.jit(jax.grad(loss))(params)


def agree(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * max(np.abs(b).max(), 1))


def part_of_effective_draws():
    """That of the seven draws of a step, by their importance weights."""
    draw_key = jax.random.split(KEY, 3)[1]
    q = FAMILY.distribution(perturbed(FAMILY.init(KEY)))
    z, log_q, _ = q.sample_with_score(draw_key, (7,))
    weights = np.exp(log_joint(None, None, z, None) - log_q)
    return weights.sum() ** 2 / (weights**2).sum() / 7


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("part", "density"), [(0.5, flattened), (1.0, log_joint)])
def test_a_flattened_density_and_the_forward_divergence(part, density):
    # Half of the way to temperature 1, the power is the root of the first one.
    options = {"num_samples": 7}
    loss_fn = Tempered(FAMILY, log_joint, power=0.1, num_steps=100, **options)
    reverse = gradient(ELBO(FAMILY, density, path=True, **options))
    forward = gradient(ForwardKL(FAMILY, log_joint, **options))
    weight = FORWARD * part_of_effective_draws()
    expected = jax.tree.map(lambda a, b: a + weight * b, reverse, forward)
    agree(gradient(loss_fn, round(100 * COOLING * part)), expected)


def test_steps_are_counted():
    loss_fn = Tempered(FAMILY, log_joint, num_samples=7)
    params = loss_fn.init(KEY)
    loss, _, params = loss_fn(params, KEY, None)
    assert int(params["control"].value) == 1
    assert loss.shape == ()


@pytest.mark.parametrize("power", [0.0, 1.5])
def test_the_power_is_an_inverse_temperature(power):
    with pytest.raises(ValueError, match="`power` must be above 0 and at most 1; got"):
        Tempered(FAMILY, log_joint, power=power)
