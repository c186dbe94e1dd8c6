"""What `fit_vae` learns, and what it hands to the objectives."""

import dataclasses
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP, Network
from flowvi.vae.fit import default_optimizer
from flowvi.vae.losses import weights_of
from tests.small import SMALL
from tests.tolerances import FLOAT32
from tests.training.helpers import assert_trees_equal
from tests.vae.helpers import KEY, Linear, binary_rows, binary_vae, gaussian_log_prob, perturbed


def pca_log_prob(x, latent):
    """The mean log likelihood of probabilistic PCA at its optimum (Tipping and Bishop, 1999)."""
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    noise = values[latent:].mean()
    W = vectors[:, :latent] * np.sqrt(values[:latent] - noise)
    return gaussian_log_prob(x, x.mean(0), W @ W.T + noise * np.eye(x.shape[1])).mean()


@pytest.mark.slow
@pytest.mark.optimized
def test_a_linear_model_is_probabilistic_pca():
    x = Linear().rows(300)
    vae = fv.VAE(
        prior=fv.standard_normal(2),
        likelihood=fv.conditional(fv.gaussian(5, scale="learned"), MLP(2, (), 5)),
        posterior=fv.conditional(fv.gaussian(2, scale="full"), MLP(5, (), 5)),
    )
    loss = vae.loss(num_samples=8)
    options = {"num_steps": 1500, "objective": loss, "batch_size": 300, "progress": False}
    params = fv.fit_vae(vae, x, key=KEY, **options).params
    mean = np.asarray(vae.decode(params, jnp.zeros(2)), np.float64)
    W = np.asarray(vae.decode(params, jnp.eye(2)), np.float64) - mean
    z = jnp.zeros((20_000, 2))
    noise = np.std(np.asarray(vae.likelihood.sample(params["likelihood"], KEY, (), z)) - mean)
    # The marginal is that of the fit, not a bound of it.
    fitted = gaussian_log_prob(x, mean, W.T @ W + noise**2 * np.eye(5)).mean()
    best = pca_log_prob(x, 2)
    assert best - 0.01 < fitted <= best + 1e-6
    assert best - 0.05 < vae.elbo(params, KEY, x, 100).mean() < best + 0.05


OBJECTIVES = {
    "elbo": (ob.ELBO, {"num_samples": 2}),
    "path": (ob.ELBO, {"num_samples": 2, "path": True}),
    "iwelbo": (ob.IWELBO, {"num_samples": 3}),
    "renyi": (ob.Renyi, {"num_samples": 3, "alpha": 0.3}),
    "cubo": (ob.CUBO, {"num_samples": 3}),
    "forward": (ob.ForwardKL, {"num_samples": 3}),
    "score": (ob.ScoreFunction, {"num_samples": 3}),
    "enumeration": (ob.Enumeration, {"num_samples": 3}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_linear_in_the_weights_of_rows(name):
    objective, options = OBJECTIVES[name]
    vae, x = binary_vae(), binary_rows(3)
    loss_fn = vae.loss(objective, **options)
    weighted = dataclasses.replace(loss_fn, row_weights=weights_of)
    own = perturbed(vae, 0.3)

    @jax.jit
    def found():
        params = {**loss_fn.init(KEY), **own}

        def gradient(weights):
            def loss(posterior):
                there = {**params, "posterior": posterior}
                output = weighted(there, KEY, {"x": x, "weight": weights})
                return output[0] if isinstance(output, tuple) else output

            return jax.value_and_grad(loss)(params["posterior"])

        weights = np.array([*np.eye(3), [0.5, 2.5, 0.0], np.ones(3)], np.float32)
        plain = loss_fn(params, KEY, {"x": x})
        plain = plain[0] if isinstance(plain, tuple) else plain
        return jax.vmap(gradient)(weights), plain

    each, plain = jax.tree.map(np.asarray, found())
    for leaf in jax.tree.leaves(each):
        np.testing.assert_allclose(leaf[3], 0.5 * leaf[0] + 2.5 * leaf[1], rtol=FLOAT32, atol=1e-4)
    np.testing.assert_allclose(each[0][4], plain, rtol=1e-5)
    assert abs(each[0][0] - each[0][1]) > 1e-3


def test_weights_of_rows_in_a_fit():
    rows = binary_rows(40)
    rows[20:] = 1.0
    vae = binary_vae()
    options = {"key": KEY, "num_steps": 300, "progress": False}
    weights = np.r_[np.full(20, 7.0), np.zeros(20)]

    def elbo(**more):
        params = fv.fit_vae(vae, rows, **options, **more).params
        return np.asarray(vae.elbo(params, KEY, rows, 50))

    blind, both = elbo(weights=weights), elbo()
    # What has no weight is not learned; and the scale of weights does not matter.
    assert blind[20:].mean() < both[20:].mean() - 2
    assert blind[:20].mean() > both[:20].mean()
    np.testing.assert_allclose(elbo(weights=weights / 7), blind, rtol=1e-3)


def test_the_rate_is_weighed():
    vae, batch = binary_vae(), {"x": binary_rows()}
    params = perturbed(vae, 0.3)

    def run(*options):
        found = jax.jit(lambda: [vae.loss(**each)(params, KEY, batch) for each in options])()
        return jax.tree.map(float, found)

    (plain, metrics), (loss, _), (sampled, noisy) = run(
        {}, {"kl_weight": 0.3}, {"kl": "sampled", "kl_weight": 0.3}
    )
    rate, distortion = metrics["rate"], metrics["distortion"]
    np.testing.assert_allclose(plain, rate + distortion, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.3 * rate + distortion, rtol=1e-6)
    np.testing.assert_allclose(sampled, 0.3 * noisy["rate"] + noisy["distortion"], rtol=1e-6)
    assert abs(noisy["rate"] - rate) > 1e-3
    all_bits = (0.5 * rate, 2 * rate)
    found = run(*({"free_bits": bits, "kl_weight": 2.0} for bits in all_bits))
    for (loss, _), bits in zip(found, all_bits, strict=True):
        np.testing.assert_allclose(loss, distortion + 2 * max(rate, bits), rtol=1e-6)


@pytest.mark.slow
def test_the_rate_warms_up():
    vae = binary_vae()
    loss = vae.loss(warm_up=4, kl_weight=2.0)
    options = {"key": KEY, "num_steps": 6, "objective": loss, "progress": False}
    result = fv.fit_vae(vae, binary_rows(), batch_size=5, **options)
    history = result.history
    weights = (history["loss"] - history["distortion"]) / history["rate"]
    np.testing.assert_allclose(weights, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rtol=1e-3)
    assert result.params["control"]["step"].value == 6
    # A second fit goes on where the first one ended; another objective begins anew.
    again = fv.fit_vae(vae, binary_rows(), params=result.params, batch_size=5, **options)
    assert again.params["control"]["step"].value == 12
    options["objective"] = vae.loss(ob.ScoreFunction, num_samples=2)
    other = fv.fit_vae(vae, binary_rows(), params=result.params, batch_size=5, **options)
    assert other.params["control"] == ((),)


def test_development_curves():
    vae, x = binary_vae(), binary_rows(40)
    options = {"key": KEY, "num_steps": 20, "validate_every": 10, "progress": False}
    result = fv.fit_vae(vae, x[:30], validation_data=x[30:], validation_samples=5, **options)
    history = result.history
    assert list(history["validation_step"]) == [10, 20]
    parts = ("rate", "distortion", "log_likelihood")
    rate, distortion, log_likelihood = (history[f"validation_{name}"] for name in parts)
    np.testing.assert_allclose(history["validation"], rate + distortion, rtol=1e-5)
    assert (-log_likelihood < history["validation"]).all()
    assert set(history) == {
        *("loss", "rate", "distortion", "validation", "validation_step"),
        *(f"validation_{name}" for name in parts),
    }
    found = vae.evaluate(result.params, KEY, x[30:], 200)
    np.testing.assert_allclose(
        history["validation"].min(), -np.mean(np.asarray(found.elbo)), atol=0.5
    )


@dataclasses.dataclass(frozen=True)
class Counting(Network):
    """A dense network that counts its training calls and is shifted by the count."""

    mlp: MLP

    @property
    def input_shape(self):
        return self.mlp.input_shape

    def init(self, key):
        return {"mlp": self.mlp.init(key), "count": fv.Fixed(jnp.zeros(()))}

    def apply(self, params, x):
        return self.mlp.apply(params["mlp"], x) + 0 * params["count"].value

    def train_apply(self, params, key, x):
        count = fv.Fixed(params["count"].value + 1)
        # Dropout would use this key.
        noise = 1e-3 * jax.random.normal(key)
        return self.apply(params, x) + noise, {**params, "count": count}


@pytest.mark.parametrize("name", ["elbo", "iwelbo", "forward", "score"])
def test_states_of_networks_come_back(name):
    objective, options = OBJECTIVES[name]
    vae = binary_vae(
        likelihood=fv.conditional(fv.bernoulli((3, 4)), Counting(MLP(2, (8,), (3, 4)))),
        posterior=fv.conditional(fv.gaussian(2), Counting(MLP((3, 4), (8,), 4))),
    )
    loss = vae.loss(objective, **options)

    @jax.jit
    def two_steps():
        params = {**loss.init(KEY), **vae.init(KEY)}
        for key in jax.random.split(KEY):
            params = loss(params, key, {"x": binary_rows(5)})[2]
        return params

    params = two_steps()
    for part in ("likelihood", "posterior"):
        assert params[part]["network"]["count"].value == 2


@dataclasses.dataclass(frozen=True)
class Standard(Network):
    """The function of an `MLP`, whose weights are stored as they are used."""

    mlp: MLP

    @property
    def input_shape(self):
        return self.mlp.input_shape

    def init(self, key):
        return _rescaled(self.mlp.init(key), -0.5)

    def apply(self, params, x):
        return self.mlp.apply(_rescaled(params, 0.5), x)


def _rescaled(params, power):
    layers = [
        {"w": layer["w"] * layer["w"].shape[0] ** power, "b": layer["b"]}
        for layer in params["layers"]
    ]
    return {"layers": tuple(layers)}


@pytest.mark.slow
def test_networks_learn_alike_however_they_store_their_weights():
    x = binary_rows(40)
    decoder, encoder = MLP(2, (16,), (3, 4)), MLP((3, 4), (16,), 4)
    elbos = []
    for wrap in (lambda network: network, Standard):
        vae = fv.VAE(
            prior=fv.standard_normal(2),
            likelihood=fv.conditional(fv.bernoulli((3, 4)), wrap(decoder)),
            posterior=fv.conditional(fv.gaussian(2), wrap(encoder)),
        )
        result = fv.fit_vae(vae, x, key=KEY, num_steps=50, progress=False)
        elbos.append(np.asarray(vae.elbo(result.params, KEY, x, 20)))
        begun = vae.init(jax.random.split(KEY, 3)[0])
        start = np.asarray(vae.elbo(begun, KEY, x, 20))
    np.testing.assert_allclose(elbos[0], elbos[1], atol=0.02)
    assert (elbos[0].mean() - start.mean()) > 0.5


def test_an_optimizer_for_each_part():
    vae, x = binary_vae(prior=fv.mean_field(2)), binary_rows()
    optimizer = optax.multi_transform(
        {"still": optax.set_to_zero(), "slow": optax.adam(1e-3), "fast": optax.adam(1e-2)},
        {"prior": "still", "likelihood": "slow", "posterior": "fast", "control": "still"},
    )
    loss = vae.loss(warm_up=2)
    options = {"num_steps": 5, "objective": loss, "optimizer": optimizer, "progress": False}
    start = vae.init(KEY)
    end = fv.fit_vae(vae, x, key=KEY, params=start, **options).params

    def moved(part):
        pairs = zip(jax.tree.leaves(start[part]), jax.tree.leaves(end[part]), strict=True)
        return max(float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)

    assert moved("prior") == 0
    assert 0 < moved("likelihood") < 0.006 < 0.02 < moved("posterior") < 0.06


def test_default_optimizer_is_the_same_object():
    assert default_optimizer(100) is default_optimizer(100)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_flow_posterior_learns_what_a_normal_one_cannot():
    # Data whose posterior of z is a ring: |z| is seen, the angle is not.
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 2))
    x = np.linalg.norm(z, axis=1, keepdims=True) + 0.1 * rng.normal(size=(500, 1))

    @dataclasses.dataclass(frozen=True)
    class Radius(Network):
        input_shape = (2,)

        def init(self, key):
            return {}

        def apply(self, params, z):
            return jnp.linalg.norm(z, axis=-1, keepdims=True)

    found = {}
    for name, base in (
        ("normal", fv.gaussian(2)),
        ("flow", fv.iaf(2, **SMALL, context_size=4, base=fv.gaussian(2))),
    ):
        vae = fv.VAE(
            prior=fv.standard_normal(2),
            likelihood=fv.conditional(fv.gaussian(1, scale=0.1), Radius()),
            posterior=fv.conditional(base, MLP(1, (16,), 4)),
        )
        result = fv.fit_vae(vae, x, key=KEY, num_steps=700, progress=False)
        found[name] = vae.evaluate(result.params, KEY, x, 100)
    assert found["flow"].elbo.mean() > found["normal"].elbo.mean() + 0.3


def test_a_fit_returns_the_fitted_model(tmp_path):
    vae, x = binary_vae(), binary_rows()
    fitted = fv.fit_vae(vae, x.tolist(), key=KEY, num_steps=2, batch_size=5, progress=False)
    params = fitted.params
    assert repr(fitted).startswith(
        "FittedVAE(event_shape=(3, 4), latent_shape=(2,), stop_reason='max_steps', num_steps=2, lo"
    )
    again = pickle.loads(pickle.dumps(fitted))
    assert_trees_equal(again.params, params)
    fitted.save(tmp_path / "vae.flowvi")
    loaded = fv.load(tmp_path / "vae.flowvi")
    assert loaded.vae == vae
    assert_trees_equal(loaded.params, params)
    other = binary_vae(posterior=fv.conditional(fv.gaussian(2), MLP((3, 4), (7,), 4)))
    with pytest.raises(ValueError, match="hidden_sizes"):
        fv.load(tmp_path / "vae.flowvi", like=other)
    for found, expected in (
        (fitted.sample(KEY, 4), vae.sample(params, KEY, 4)),
        (again.evaluate(KEY, x, 3), vae.evaluate(params, KEY, x, 3)),
        (fitted.encode(KEY, x), vae.encode(params, KEY, x)),
        (fitted.decode([0.0, 1.0]), vae.decode(params, np.array([0.0, 1.0]))),
    ):
        assert_trees_equal(found, expected)
    # Editors complete the arguments of the model's methods, without the parameters.
    assert list(inspect.signature(type(fitted).elbo).parameters)[:3] == ["self", "key", "x"]
    assert "params:" not in type(fitted).sample.__doc__
    assert "There are `sample_shape` z" in type(fitted).sample.__doc__
