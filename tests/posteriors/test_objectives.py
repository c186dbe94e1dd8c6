"""The losses of the recipe: wide draws and tempered fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.objectives import ELBO, ForwardKL
from flowvi.params import Fixed
from flowvi.posteriors.objectives import COOLING, FORWARD, Tempered, WideELBO
from flowvi.testing import perturbed
from tests.small import AFFINE
from tests.tolerances import FLOAT64, STANDARD_ERRORS

KEY = jax.random.key(0)
FLOW = fv.whitened(fv.iaf(3, **AFFINE))
MEAN_FIELD = fv.mean_field(2)


def normal(params, key, z, batch):
    """log N(z; 0, I)."""
    del params, key, batch
    return jnp.sum(-0.5 * z**2 - 0.5 * np.log(2 * np.pi), -1)


def steep(params, key, z, batch):
    del params, key, batch
    return -jnp.sum(jnp.cosh(0.3 * z), -1)


def flattened(params, key, z, batch):
    return 0.1**0.5 * steep(params, key, z, batch)


def values_and_grads(params, *losses, **others):
    """(loss, gradient of the parameters of q) of each loss, from one program."""

    def one(loss_fn, q):
        out = loss_fn({"posterior": q, **others}, KEY, None)
        return out[0] if isinstance(out, tuple) else out

    def all_of_them(params):
        return [jax.value_and_grad(one, 1)(loss_fn, params) for loss_fn in losses]

    return jax.device_get(jax.jit(all_of_them)(params))


def agree(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * max(np.abs(b).max(), 1))


@pytest.fixture(scope="module")
def flow_params():
    with jax.enable_x64(True):
        return perturbed(jax.jit(FLOW.init)(KEY), 0.3, 0)


@pytest.fixture(scope="module")
def mean_field_params():
    with jax.enable_x64(True):
        return perturbed(jax.jit(MEAN_FIELD.init)(KEY), 1.0, 0)


@pytest.mark.usefixtures("x64")
class TestWideELBO:
    def test_of_width_one_it_is_the_elbo_and_at_the_posterior_its_gradient_vanishes(
        self, flow_params
    ):
        def posterior(_, key, z, batch):
            return FLOW.distribution(flow_params).log_prob(z)

        one, elbo, (_, vanishing) = values_and_grads(
            flow_params,
            WideELBO(FLOW, normal, num_samples=7, width=1.0),
            ELBO(FLOW, normal, num_samples=7, path=True),
            WideELBO(FLOW, posterior, num_samples=3, width=1.5),
        )
        agree(one, elbo)
        agree(vanishing, jax.tree.map(np.zeros_like, vanishing))

    def test_its_value_is_that_of_the_elbo(self, mean_field_params):
        loss_fn = WideELBO(MEAN_FIELD, normal, num_samples=10_000, width=1.3)

        @jax.jit
        def program(params, keys):
            q = MEAN_FIELD.distribution(params)
            losses = jax.lax.map(lambda key: loss_fn({"posterior": params}, key, None), keys)
            return q.mean(), q.variance(), losses

        keys = jax.random.split(KEY, 100)
        mean, variance, losses = map(np.asarray, program(mean_field_params, keys))
        kl = 0.5 * np.sum(variance + mean**2 - 1 - np.log(variance))
        assert kl > 0.1
        assert abs(losses.mean() - kl) < STANDARD_ERRORS * losses.std() / np.sqrt(len(keys))

    def test_of_a_centred_normal_its_gradient_is_the_elbos_times_the_variance(
        self, mean_field_params
    ):
        # d/dy [log q - log p] = y - y / s^2 at y = w s x, with dy = w x ds.
        transform = {name: 0 * leaf for name, leaf in mean_field_params["transform"].items()}
        transform["raw_scale"] = transform["raw_scale"] + np.array([0.9, 0.4])
        params = {**mean_field_params, "transform": transform}
        losses = [WideELBO(MEAN_FIELD, normal, num_samples=50, width=w) for w in (1.0, 1.5)]
        once, wide = (
            grad["transform"]["raw_scale"] for _, grad in values_and_grads(params, *losses)
        )
        assert abs(once).min() > 0.01
        np.testing.assert_allclose(wide, 1.5**2 * once, rtol=1e-6)

    def test_skipped_draws_leave_the_value_where_it_is(self):
        # q is the posterior, shifted by 500 nats, with a hole in the tails, where wide draws are.
        def with_hole(params, key, z, batch):
            hole = jnp.linalg.norm(z, axis=-1) > 2
            return jnp.where(hole, jnp.nan, normal(params, key, z, batch) - 500)

        loss_fn = WideELBO(MEAN_FIELD, with_hole, num_samples=50, width=1.5, skip_nonfinite=True)

        @jax.jit
        def program(key):
            return loss_fn({"posterior": MEAN_FIELD.init(key)}, key, None)

        loss, metrics = program(KEY)
        assert metrics["skipped"] > 0.2
        np.testing.assert_allclose(loss, 500, rtol=1e-9)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"`width` must be at least 1; got 0\.5\."):
            WideELBO(MEAN_FIELD, normal, width=0.5)
        with pytest.raises(ValueError, match=r"`family` must be a flow; got standard_normal"):
            WideELBO(fv.standard_normal(2), normal)({"posterior": {}}, KEY, None)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("part", "density"), [(0.5, flattened), (1.0, steep)])
def test_a_flattened_density_and_the_forward_divergence(part, density, flow_params):
    # Half of the way to temperature 1, the power is the root of the first one.
    tempered, reverse, forward = values_and_grads(
        flow_params,
        Tempered(FLOW, steep, power=0.1, num_steps=100, num_samples=7),
        ELBO(FLOW, density, path=True, num_samples=7),
        ForwardKL(FLOW, steep, num_samples=7),
        control=Fixed(np.int32(round(100 * COOLING * part))),
    )

    @jax.jit
    def draw(params):
        draw_key = jax.random.split(KEY, 3)[1]
        z, log_q, _ = FLOW.distribution(params).sample_with_score(draw_key, (7,))
        return steep(None, None, z, None) - log_q

    weights = np.exp(draw(flow_params))
    weight = FORWARD * weights.sum() ** 2 / (weights**2).sum() / 7
    agree(tempered[0], reverse[0])
    agree(tempered[1], jax.tree.map(lambda a, b: a + weight * b, reverse[1], forward[1]))


def test_steps_are_counted():
    loss_fn = Tempered(MEAN_FIELD, steep, num_samples=7)
    loss, _, params = jax.jit(lambda key: loss_fn(loss_fn.init(key), key, None))(KEY)
    assert int(params["control"].value) == 1
    assert loss.shape == ()


@pytest.mark.parametrize("power", [0.0, 1.5])
def test_the_power_is_an_inverse_temperature(power):
    with pytest.raises(ValueError, match="`power` must be above 0 and at most 1; got"):
        Tempered(MEAN_FIELD, steep, power=power)
