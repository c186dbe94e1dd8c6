"""Draws that carry the score of their density with them."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.bijectors.score import forward_with_score
from tests.families.test_families import FAMILIES, perturbed
from tests.tolerances import FLOAT64

KEY = jax.random.key(0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "context_size"),
    # The base of the last one takes no context.
    [(n, c) for n in FAMILIES for c in (None, 2) if (n, c) != ("flow_on_normal", 2)],
)
def test_the_score_is_the_gradient_of_the_log_density(name, context_size):
    options = {} if context_size is None else {"context_size": context_size}
    family = FAMILIES[name](3, **options)
    params = perturbed(family.init(KEY))
    context = None if context_size is None else jax.random.normal(KEY, (5, context_size))

    @jax.jit
    def draw(params):
        y, log_prob, score = family.distribution(params, context).sample_with_score(KEY, (4,))
        exact, pull = jax.vjp(lambda y: family.log_prob(params, y, context), y)
        return y, log_prob, score, exact, pull(jnp.ones_like(exact))[0]

    y, log_prob, score, exact, gradient = draw(params)
    expected = family.sample(params, KEY, (4,), context)
    np.testing.assert_allclose(y, expected, rtol=FLOAT64, atol=FLOAT64)
    np.testing.assert_allclose(log_prob, exact, rtol=FLOAT64, atol=FLOAT64)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(score, gradient, rtol=0, atol=FLOAT64 * scale)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["iaf", "maf_lu", "coupling", "flow_on_flow", "flow_on_normal"])
def test_each_part_has_the_gradient_of_its_own_meaning(name):
    family = FAMILIES[name](3)
    params = perturbed(family.init(KEY))
    y = family.sample(params, KEY, (4,))

    def parts(params):
        return family.distribution(params).sample_with_score(KEY, (4,))

    def expected(params):
        # The path of the draw; the density at a point held fixed; nothing.
        return family.sample(params, KEY, (4,)), family.log_prob(params, y), jnp.zeros((4, 3))

    found, exact = (
        jax.jit(jax.jacrev(lambda p, f=f: [jnp.sin(each).sum() for each in f(p)]))(params)
        for f in (parts, expected)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * max(np.abs(b).max(), 1))


@pytest.mark.usefixtures("x64")
def test_bijectors_without_a_way_of_their_own():
    before = lambda x: jnp.roll(x, 1, -1).at[..., 0].set(0)  # noqa: E731
    layer = fv.IAF(lambda x: jnp.stack([before(x), 0.3 * before(x)], -1))
    scale = distrax.Block(distrax.ScalarAffine(shift=jnp.ones(3), scale=2.0), 1)
    x = jax.random.normal(KEY, (4, 3))
    for bijector in (layer, scale, distrax.Chain([scale, layer]), fv.MAF(layer.conditioner)):
        y, log_det, score = forward_with_score(bijector, x, -x)

        def log_prob(y, bijector=bijector):
            x, log_det = bijector.inverse_and_log_det(y)
            return (log_det - 0.5 * (x**2).sum(-1)).sum()

        np.testing.assert_allclose(score, jax.grad(log_prob)(y), rtol=FLOAT64, atol=FLOAT64)
        np.testing.assert_allclose(log_det, bijector.forward_log_det_jacobian(x), rtol=FLOAT64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["iaf", "maf", "flow_on_flow"])
def test_the_gradient_of_the_elbo_is_that_of_the_frozen_density(name):
    family = FAMILIES[name](3)
    params = perturbed(family.init(KEY))

    def log_joint(_, key, z, batch):
        del key, batch
        return -jnp.sum(jnp.cosh(0.3 * z), -1)

    loss_fn = fv.objectives.ELBO(family, log_joint, num_samples=5, path=True)

    def frozen(params):
        draw_key = jax.random.split(KEY, 3)[1]
        z = family.sample(params, draw_key, 5)
        log_q = family.log_prob(jax.lax.stop_gradient(params), z)
        return -(log_joint(None, None, z, None) - log_q).mean()

    value, gradient = jax.value_and_grad(lambda p: loss_fn({"posterior": p}, KEY, None))(params)
    expected, slow = jax.value_and_grad(frozen)(params)
    np.testing.assert_allclose(value, expected, rtol=FLOAT64)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * max(np.abs(b).max(), 1))
