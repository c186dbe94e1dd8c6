"""Models with discrete and with hierarchical latents, against sums and against Gaussian algebra."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP
from tests.tolerances import FLOAT32, STANDARD_ERRORS
from tests.vae.helpers import (
    KEY,
    binary_rows,
    binary_vae,
    gaussian_log_prob,
    linear,
    perturbed,
    raw_factor,
    single,
)


def coded(bits=None, num_bits=4):
    """Binary codes."""
    return binary_vae(
        prior=fv.unconditional(fv.bernoulli(num_bits)),
        likelihood=fv.conditional(fv.bernoulli((3, 4)), MLP(num_bits, (8,), (3, 4))),
        posterior=fv.conditional(bits or fv.bernoulli(num_bits), MLP((3, 4), (8,), num_bits)),
    )


VALUES = np.array(list(itertools.product([0.0, 1.0], repeat=4)), np.float32)


def by_hand(vae, params, x):
    """log p(x, z) of shape [16, N], value by value."""
    return jnp.stack([vae.log_joint(params, x, np.broadcast_to(z, (len(x), 4))) for z in VALUES])


def log_q_by_hand(vae, params, x, values=VALUES):
    q = vae.posterior.distribution(params["posterior"], x)
    return q.log_prob(jnp.broadcast_to(values[:, None], (16, len(x), 4)))


def test_log_marginal_and_posterior_are_sums():
    vae, x = coded(), binary_rows(6)
    params = perturbed(vae, 0.5)
    log_joint = np.asarray(jax.jit(by_hand, static_argnums=0)(vae, params, x))
    expected = np.logaddexp.reduce(log_joint, 0)
    np.testing.assert_allclose(fv.log_marginal(vae, params, x), expected, rtol=FLOAT32)
    z, log_prob = map(np.asarray, fv.exact_posterior(vae, params, x))
    order = np.lexsort(z.T[::-1])
    np.testing.assert_allclose(log_prob[order], log_joint - expected, rtol=FLOAT32, atol=1e-4)
    np.testing.assert_allclose(np.exp(log_prob).sum(0), 1, rtol=1e-5)
    # Any leading axes.
    found = fv.log_marginal(vae, params, x.reshape(2, 3, 3, 4))
    np.testing.assert_allclose(found, expected.reshape(2, 3), rtol=FLOAT32)
    assert fv.exact_posterior(vae, params, x[0])[1].shape == (16,)
    # The ELBO is below by the KL divergence, the importance-weighted bound hardly.
    assert (np.asarray(vae.elbo(params, KEY, x, 2000)) < expected - 0.01).all()
    keys = jax.random.split(KEY, 8)
    bounds = np.stack([vae.log_likelihood(params, key, x, 5_000) for key in keys])
    error = bounds.std(0, ddof=1) / 8**0.5
    assert (abs(bounds.mean(0) - expected) < STANDARD_ERRORS * error).all()


@pytest.mark.parametrize("num_rows", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_enumeration_of_a_model_is_exact(num_rows):
    vae, x = coded(), binary_rows(num_rows)
    params = perturbed(vae, 0.5)
    loss_fn = vae.loss(ob.Enumeration)

    @jax.jit
    def both(params):
        def by_definition(params):
            log_joint, log_q = by_hand(vae, params, x), log_q_by_hand(vae, params, x)
            return -jnp.mean(jnp.sum(jnp.exp(log_q) * (log_joint - log_q), 0))

        def loss(params):
            return loss_fn(params, KEY, {"x": x})[0]

        # It is the ELBO of the evaluation, and log p(x) less the KL divergence.
        z, log_posterior = fv.exact_posterior(vae, params, x)
        log_q = log_q_by_hand(vae, params, x, z)
        gap = jnp.sum(jnp.exp(log_q) * (log_q - log_posterior), 0)
        elbo = jnp.mean(fv.log_marginal(vae, params, x) - gap)
        return *(jax.value_and_grad(f)(params) for f in (loss, by_definition)), elbo

    found, wanted, elbo = both(params)
    np.testing.assert_allclose(found[0], wanted[0], rtol=FLOAT32)
    for a, b in zip(*map(jax.tree.leaves, (found[1], wanted[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(-found[0], elbo, rtol=FLOAT32)


def test_blocks_of_rows_do_not_matter(monkeypatch):
    from flowvi.vae import enumeration, evaluation

    vae, x = coded(), binary_rows(7)
    params = perturbed(vae, 0.5)
    whole = fv.log_marginal(vae, params, x)
    monkeypatch.setattr(enumeration, "VALUES", 3)
    monkeypatch.setattr(enumeration, "Chunks", lambda draws: evaluation.Chunks(draws, 6))
    # Another model, since programs are remembered.
    again = coded()
    again = fv.VAE(again.prior, fv.conditional(fv.bernoulli((3, 4)), _renamed()), again.posterior)
    found = fv.log_marginal(again, perturbed(again, 0.5), x)
    np.testing.assert_allclose(found, whole, rtol=1e-5)


def _renamed():
    class Same(MLP):
        """Another network for the compiler."""

    return Same(4, (8,), (3, 4))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["enumeration", "score", "relaxed"])
def test_codes_are_learned(kind):
    """Two kinds of images, and one bit to tell them apart."""
    rng = np.random.default_rng(0)
    patterns = np.array([[1] * 6 + [0] * 6, [0] * 6 + [1] * 6], float).reshape(2, 3, 4)
    p = 0.1 + 0.8 * patterns[rng.integers(0, 2, 200)]
    x = (rng.uniform(size=p.shape) < p).astype(np.float32)
    best = np.logaddexp(
        *(
            (x * np.log(0.1 + 0.8 * m) + (1 - x) * np.log(0.9 - 0.8 * m)).sum((1, 2))
            for m in patterns
        )
    ).mean() - np.log(2)
    bit = fv.bernoulli(1)
    soft = fv.relaxed(bit, fv.Annealing(1.0, 0.3, num_steps=300))
    vae = binary_vae(
        prior=fv.unconditional(bit),
        likelihood=fv.conditional(fv.bernoulli((3, 4)), MLP(1, (), (3, 4))),
        posterior=fv.conditional(soft if kind == "relaxed" else bit, MLP((3, 4), (), 1)),
    )
    objective = {
        "enumeration": lambda: vae.loss(ob.Enumeration),
        "score": lambda: vae.loss(ob.ScoreFunction, num_samples=4),
        "relaxed": lambda: vae.loss(num_samples=4),
    }[kind]()
    result = fv.fit_vae(
        vae, x, key=KEY, num_steps=600, batch_size=100, objective=objective, progress=False
    )
    log_p = fv.log_marginal(vae, result.params, x).mean()
    assert best - 0.2 < log_p < best + 0.5
    assert vae.elbo(result.params, KEY, x, 200).mean() > log_p - 0.2
    if kind == "enumeration":
        np.testing.assert_allclose(
            result.history["loss"], result.history["rate"] + result.history["distortion"], rtol=1e-4
        )


# ------------------------------------------------------------------------------------- hierarchies


class Hierarchy:
    """z_2 ~ N(0, I), z_1 = A z_2 + a e, x = B z_1 + b e in float64, and its exact posterior."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.A, self.B = rng.normal(size=(3, 2)), rng.normal(size=(5, 3))
        self.a, self.b = 0.7, 0.5
        upper = self.B @ self.A
        self.of_x = upper @ upper.T + self.a**2 * self.B @ self.B.T + self.b**2 * np.eye(5)

    def log_prob(self, x):
        return gaussian_log_prob(x, np.zeros(5), self.of_x)

    def rows(self, count):
        rng = np.random.default_rng(1)
        return rng.normal(size=(count, 5)) @ np.linalg.cholesky(self.of_x).T

    def vae(self):
        """q(z_2 | x) q(z_1 | x, z_2)."""
        return fv.VAE(
            prior=fv.joint(
                fv.standard_normal(2), fv.conditional(fv.gaussian(3, scale=self.a), MLP(2, (), 3))
            ),
            likelihood=fv.conditional(fv.gaussian(5, scale=self.b), MLP(5, (), 5)),
            posterior=fv.joint(
                fv.conditional(fv.gaussian(2, scale="full"), MLP(5, (), 5)),
                fv.conditional(fv.gaussian(3, scale="full"), MLP(7, (), 9)),
            ),
        )

    def params(self, vae):
        """Those at which the model is this one and the posterior exact."""
        params = vae.init(KEY)
        upper = self.B @ self.A
        noise = self.a**2 * self.B @ self.B.T + self.b**2 * np.eye(5)
        top = _posterior(np.eye(2), upper, noise)
        bottom = _posterior(self.a**2 * np.eye(3), self.B, self.b**2 * np.eye(5))
        gain, covariance = bottom
        # The mean of z_1 given x and z_2: A z_2 + gain (x - B A z_2).
        given = np.concatenate([gain, (np.eye(3) - gain @ self.B) @ self.A], 1)
        params["prior"]["families"][1]["network"] = linear(self.A, np.zeros(3))
        decoder = np.concatenate([np.zeros((5, 2)), self.B], 1)
        params["likelihood"]["network"] = linear(decoder, np.zeros(5))
        for place, (matrix, cov) in enumerate([top, (given, covariance)]):
            raw = raw_factor(cov)
            matrix = np.concatenate([matrix, np.zeros((len(raw), matrix.shape[1]))])
            bias = np.concatenate([np.zeros(len(cov)), raw])
            params["posterior"]["families"][place]["network"] = linear(matrix, bias)
        return params


def _posterior(prior, matrix, noise):
    """(gain, covariance) of z given x = M z + e."""
    covariance = np.linalg.inv(np.linalg.inv(prior) + matrix.T @ np.linalg.inv(noise) @ matrix)
    return covariance @ matrix.T @ np.linalg.inv(noise), covariance


def test_a_hierarchy_with_its_exact_posterior(x64):
    truth = Hierarchy()
    vae, x = truth.vae(), truth.rows(6)
    params = truth.params(vae)
    expected = truth.log_prob(x)
    # Draw by draw: the weights do not depend on z.
    np.testing.assert_allclose(
        vae.log_weights(params, KEY, x, 3), np.stack([expected] * 3), rtol=1e-8
    )
    np.testing.assert_allclose(vae.elbo(params, KEY, x, 3), expected, rtol=1e-8)
    loss, metrics = jax.jit(vae.loss(num_samples=3))(params, KEY, {"x": x})
    np.testing.assert_allclose(-loss, expected.mean(), rtol=1e-8)
    np.testing.assert_allclose(metrics["rate"] + metrics["distortion"], loss, rtol=1e-8)
    # A draw of the prior has the covariance of the model.
    draws = np.asarray(vae.sample(params, KEY, 50_000))
    error = STANDARD_ERRORS * np.abs(truth.of_x).max() * (2 / 50_000) ** 0.5
    assert np.abs(np.cov(draws.T) - truth.of_x).max() < error


def test_a_hierarchy_with_another_posterior(x64):
    truth = Hierarchy()
    vae, x = truth.vae(), truth.rows(3)
    params = truth.params(vae)
    exact = params["posterior"]["families"]
    # Broken in one place each: z_2 shifted; z_1 shifted. The KL divergence is then known.
    for place, size in ((0, 2), (1, 3)):
        network = exact[place]["network"]["layers"][0]
        shift = np.zeros(len(network["b"]))
        shift[0] = 0.4
        layer = {**network, "b": network["b"] + shift}
        broken = [*exact]
        broken[place] = {**exact[place], "network": {"layers": (layer,)}}
        there = {**params, "posterior": {**params["posterior"], "families": tuple(broken)}}
        prior = np.eye(2) if place == 0 else truth.a**2 * np.eye(3)
        upper = truth.B @ truth.A if place == 0 else truth.B
        noise = truth.b**2 * np.eye(5)
        if place == 0:
            noise = noise + truth.a**2 * truth.B @ truth.B.T
        covariance = _posterior(prior, upper, noise)[1]
        step = np.eye(size)[0] * 0.4
        kl = 0.5 * step @ np.linalg.solve(covariance, step)
        elbos = np.stack([vae.elbo(there, key, x, 500) for key in jax.random.split(KEY, 20)])
        gap = truth.log_prob(x) - elbos
        error = gap.std(0, ddof=1) / 20**0.5
        assert (abs(gap.mean(0) - kl) < STANDARD_ERRORS * error).all()
        assert kl > 0.05


def test_objectives_of_a_hierarchy_agree():
    truth = Hierarchy()
    vae = truth.vae()
    params = single(truth.params(vae))
    x = np.asarray(truth.rows(3), np.float32)

    @jax.jit
    def values():
        found = []
        for objective in (ob.ELBO, ob.IWELBO, ob.ScoreFunction, ob.Enumeration):
            loss = vae.loss(objective, num_samples=2)
            out = loss({**loss.init(KEY), **params}, KEY, {"x": x})
            found.append(out[0] if isinstance(out, tuple) else out)
        return found

    np.testing.assert_allclose(-np.array(values()), truth.log_prob(x).mean(), rtol=1e-3)


# ---------------------------------------------------------------------------------- bad input


def test_priors_that_cannot_be_summed():
    many = coded(num_bits=40)
    params = jax.eval_shape(many.init, KEY)
    for function in (fv.log_marginal, fv.exact_posterior):
        with pytest.raises(
            ValueError, match=r"`prior` must have at most 65,536 .*1,099,511,627,776"
        ):
            function(many, params, binary_rows())
        with pytest.raises(ValueError, match=r"`prior` must have at most .*which is continuous"):
            function(binary_vae(), params, binary_rows())
        with pytest.raises(TypeError, match=r"`vae` must be a `fv.VAE\(...\)`; got 3"):
            function(3, params, binary_rows())
        with pytest.raises(ValueError, match="`x` must have a shape that ends in"):
            function(coded(), params, np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"`family` must have at most 65,536 values"):
        many.loss(ob.Enumeration)


def test_control_variates_without_a_score():
    for objective in (ob.ELBO, ob.IWELBO, ob.ForwardKL):
        with pytest.raises(ValueError, match=r"`controls` must be empty for .*no score term"):
            binary_vae().loss(objective, controls=(ob.RunningMean(),))
