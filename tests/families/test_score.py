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

#: Each kind of layer, and a base that is a flow of its own.
QUICK = ["iaf", "maf_lu", "coupling", "flow_on_normal"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "context_size"),
    [
        *((name, None) for name in QUICK),
        ("maf", 2),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [
                *((name, None) for name in FAMILIES if name not in QUICK),
                ("coupling", 2),
                ("iaf_affine", 2),
            ]
        ),
    ],
)
def test_the_score_is_the_gradient_of_the_log_density(name, context_size):
    options = {} if context_size is None else {"context_size": context_size}
    family = FAMILIES[name](3, **options)
    params = perturbed(jax.jit(family.init)(KEY))
    context = None
    if context_size is not None:
        context = np.random.default_rng(0).normal(size=(5, context_size))

    @jax.jit
    def draw(params):
        q = family.distribution(params, context)
        y, log_prob, score = q.sample_with_score(KEY, (4,))
        exact, pull = jax.vjp(q.log_prob, y)
        gradient = pull(jnp.ones_like(exact))[0]
        return y, log_prob, score, exact, gradient, q.sample(seed=KEY, sample_shape=4)

    y, log_prob, score, exact, gradient, expected = draw(params)
    np.testing.assert_allclose(y, expected, rtol=FLOAT64, atol=FLOAT64)
    np.testing.assert_allclose(log_prob, exact, rtol=FLOAT64, atol=FLOAT64)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(score, gradient, rtol=0, atol=FLOAT64 * scale)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        "iaf_affine",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("iaf", "maf_lu")),
        "coupling_affine",
    ],
)
def test_each_part_has_the_gradient_of_its_own_meaning(name):
    family = FAMILIES[name](3)
    params = perturbed(jax.jit(family.init)(KEY))

    @jax.jit
    def gradients(params):
        y = jax.lax.stop_gradient(family.distribution(params).sample(seed=KEY, sample_shape=4))

        def parts(params):
            return family.distribution(params).sample_with_score(KEY, (4,))

        def expected(params):
            # The path of the draw; the density at a frozen point; nothing.
            q = family.distribution(params)
            return q.sample(seed=KEY, sample_shape=4), q.log_prob(y), jnp.zeros((4, 3))

        sums = lambda f: lambda p: jnp.stack([jnp.sin(a).sum() for a in f(p)])  # noqa: E731
        return [jax.jacrev(sums(f))(params) for f in (parts, expected)]

    found, exact = gradients(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * max(np.abs(b).max(), 1))


@pytest.mark.usefixtures("x64")
def test_bijectors_without_a_way_of_their_own():
    before = lambda x: jnp.roll(x, 1, -1).at[..., 0].set(0)  # noqa: E731
    layer = fv.IAF(lambda x: jnp.stack([before(x), 0.3 * before(x)], -1))
    scale = distrax.Block(distrax.ScalarAffine(shift=jnp.ones(3), scale=2.0), 1)
    bijectors = (layer, scale, distrax.Chain([scale, layer]), fv.MAF(layer.conditioner))

    @jax.jit
    def found(x):
        results = []
        for bijector in bijectors:
            y, log_det, score = forward_with_score(bijector, x, -x)

            def log_prob(y, bijector=bijector):
                x, log_det = bijector.inverse_and_log_det(y)
                return (log_det - 0.5 * (x**2).sum(-1)).sum()

            direct = bijector.forward_log_det_jacobian(x)
            results.append((score, jax.grad(log_prob)(y), log_det, direct))
        return results

    for score, gradient, log_det, direct in found(np.random.default_rng(0).normal(size=(4, 3))):
        np.testing.assert_allclose(score, gradient, rtol=FLOAT64, atol=FLOAT64)
        np.testing.assert_allclose(log_det, direct, rtol=FLOAT64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", ["iaf_affine", pytest.param("flow_on_flow", marks=pytest.mark.slow)]
)
def test_the_gradient_of_the_elbo_is_that_of_the_frozen_density(name):
    family = FAMILIES[name](3)
    params = perturbed(jax.jit(family.init)(KEY))

    def log_joint(_, key, z, batch):
        del key, batch
        return -jnp.sum(jnp.cosh(0.3 * z), -1)

    loss_fn = fv.objectives.ELBO(family, log_joint, num_samples=5, path=True)

    def frozen(params):
        draw_key = jax.random.split(KEY, 3)[1]
        z = family.distribution(params).sample(seed=draw_key, sample_shape=5)
        log_q = family.distribution(jax.lax.stop_gradient(params)).log_prob(z)
        return -(log_joint(None, None, z, None) - log_q).mean()

    both = jax.jit(
        lambda params: [
            jax.value_and_grad(f)(params)
            for f in (lambda p: loss_fn({"posterior": p}, KEY, None), frozen)
        ]
    )
    (value, gradient), (expected, slow) = both(params)
    np.testing.assert_allclose(value, expected, rtol=FLOAT64)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * max(np.abs(b).max(), 1))
