"""Networks from anywhere, as the network of a conditional family."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import flowvi as fv
from flowvi.networks import MLP, PlainNetwork, as_network
from flowvi.params import Fixed
from tests import tolerances
from tests.networks.foreign import MOMENTUM, NETWORKS, LinenModule, NNXModule, translate

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(np.float32)
LIBRARIES = list(NETWORKS)


@functools.cache
def made(library):
    """A family with this network, and its parameters, equal in all libraries."""
    family = fv.conditional(fv.gaussian(2), NETWORKS[library], context_shape=3)
    params = jax.jit(family.init)(KEY)
    if library != "plain":
        network = translate(library, made("plain")[1]["network"], params["network"])
        params = {**params, "network": network}
    return family, params


def state_of(params):
    return [np.asarray(a) for a in jax.tree.leaves(params["network"]["state"])]


def output(q):
    return jnp.concatenate([q.mean(), q.stddev()], -1)


@functools.cache
def programs(library):
    """Training and evaluation of a family, and how often they were traced."""
    family, _ = made(library)
    traced = []

    @jax.jit
    def train(params, key, x):
        traced.append("train")
        q, new = family.train_distribution(params, key, x)
        return output(q), new

    @jax.jit
    def evaluate(params, x):
        rows = jax.vmap(lambda row: output(family.distribution(params, row)))(x.reshape(-1, 3))
        return output(family.distribution(params, x)), rows

    return train, evaluate, traced


def with_statistics(library):
    """Parameters after a step of training, with mean 0.1 and variance 2."""
    _, params = programs(library)[0](made(library)[1], KEY, X)
    # Equinox keeps (mean, variance) before their bias by the start at zero is corrected.
    factor = 1 - MOMENTUM if library.startswith("equinox") else 1

    def replace(path, leaf):
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        if leaf.dtype.kind != "f":
            return leaf
        is_mean = name.endswith("[0]") if library.startswith("equinox") else "mean" in name
        return np.full_like(leaf, factor * (0.1 if is_mean else 2.0))

    state = jax.tree_util.tree_map_with_path(replace, params["network"]["state"])
    return {**params, "network": {**params["network"], "state": state}}


@pytest.mark.parametrize("library", LIBRARIES)
def test_equal_parameters_give_equal_outputs(library):
    got, rows = programs(library)[1](with_statistics(library), X)
    expected, _ = programs("plain")[1](with_statistics("plain"), X)
    assert got.shape == (5, 2, 4)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(rows.reshape(5, 2, 4), got, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_dropout_and_batch_statistics_are_on_in_training_only(library):
    (train, evaluate, traced), (_, params) = programs(library), made(library)
    found = [train(params, jax.random.key(seed), X) for seed in (1, 1, 2)]
    first, again, other = (np.asarray(each) for each, _ in found)
    assert (first == again).all() and (first != other).any()
    assert len(np.unique(first.reshape(10, 4), axis=0)) > 1
    once, twice = (np.asarray(evaluate(params, X)[0]) for _ in range(2))
    assert (once == twice).all() and (once != first).any()
    new = found[0][1]
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert any((a != b).any() for a, b in zip(state_of(params), state_of(new), strict=True))
    _, newer = train(new, KEY, 3 * X + 1)
    assert any((a != b).any() for a, b in zip(state_of(new), state_of(newer), strict=True))
    # In training a distribution sees the batch's own statistics.
    assert np.abs(evaluate(new, 100 * X)[0][..., :2]).max() > 10
    assert traced == ["train"]


@pytest.mark.parametrize(
    "library",
    [
        each if each in ("haiku", "plain") else pytest.param(each, marks=pytest.mark.slow)
        for each in LIBRARIES
    ],
)
def test_a_fit_trains_parameters_and_statistics(library):
    family, params = made(library)
    result = fv.fit(
        fv.objectives.NegativeLogLikelihood(family),
        params,
        optimizer=optax.adam(0.1),
        key=KEY,
        num_steps=3,
        data={"x": np.ones((10, 2), np.float32), "context": X.reshape(10, 3)},
        batch_size=5,
        progress=False,
    )
    after = result.params["network"]
    moved = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), params["network"], after
    )
    assert all(jax.tree.leaves(moved["params"])) and any(jax.tree.leaves(moved["state"]))
    assert isinstance(after["state"], Fixed)


@pytest.mark.parametrize("library", LIBRARIES)
def test_files_and_static_arguments(library, tmp_path):
    family, params = made(library)
    assert hash(family) == hash(family) and " at 0x" not in repr(family)
    fv.save(tmp_path / "params", params)
    # A new object of the same description reads it too.
    again = fv.conditional(fv.gaussian(2), NETWORKS[library], context_shape=3)
    for like in (family, again):
        loaded = fv.load(tmp_path / "params", like=like)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(loaded["network"]) == jax.tree.structure(params["network"])
    other = fv.conditional(fv.gaussian(2), MLP(3, (), 4))
    with pytest.raises(ValueError, match=r"`like` must be configured as what was saved"):
        fv.load(tmp_path / "params", like=other)


def test_files_tell_networks_apart(tmp_path):
    def one(x):
        return hk.Linear(4)(jnp.tanh(x))

    def other(x):
        return hk.Linear(4)(x)

    pairs = [
        (linen.Dense(4), linen.Dense(4, use_bias=True, precision="high"), "precision"),
        (hk.transform(one), hk.transform(other), "one"),
    ]
    for saved, here, name in pairs:
        first, second = (fv.conditional(fv.gaussian(2), n, context_shape=3) for n in (saved, here))
        fv.save(tmp_path / name, jax.jit(first.init)(KEY))
        with pytest.raises(
            ValueError, match=rf"`like` must be configured.*network.(name|source).*{name}"
        ):
            fv.load(tmp_path / name, like=second)


def test_equal_networks_are_equal():
    assert as_network(LinenModule(), 3) == as_network(LinenModule(), 3)
    assert as_network(NNXModule, 3) == as_network(NNXModule, 3)
    # Arrays are no part of what can be compared.
    module = NNXModule(rngs=nnx.Rngs(0))
    assert as_network(module, 3) != as_network(module, 3)


class TestInstances:
    """A module that there is already keeps its parameters; a function makes new ones."""

    def test_nnx(self):
        module = NNXModule(rngs=nnx.Rngs(7))
        kept = as_network(module, 3)
        for seed in (0, 1):
            params = kept.init(jax.random.key(seed))["params"]
            np.testing.assert_array_equal(params["first"]["kernel"], module.first.kernel[...])
        fresh = as_network(NNXModule, 3)
        first, second = (fresh.init(jax.random.key(seed))["params"] for seed in (0, 1))
        assert (first["first"]["kernel"] != second["first"]["kernel"]).any()

    def test_equinox(self):
        module = eqx.nn.MLP(3, 4, 8, 1, key=KEY)
        kept = as_network(module, 3)
        params = kept.init(jax.random.key(5))
        np.testing.assert_allclose(
            kept.apply(params, X), jax.vmap(jax.vmap(module))(X), rtol=tolerances.FLOAT32
        )
        made = as_network(functools.partial(eqx.nn.MLP, 3, 4, 8, 1), 3)
        np.testing.assert_array_equal(
            made.init(KEY)["params"].layers[0].weight, module.layers[0].weight
        )


class TestPlain:
    """Parameters of `apply` are known by name, in any place."""

    def test_neither_state_nor_flag(self):
        network = as_network((lambda key, x: jnp.ones((x.shape[-1], 2)), lambda w, x: x @ w), 3)
        assert network.apply(network.init(KEY), X).shape == (5, 2, 2)

    def test_an_object(self):
        network = as_network(linen.Dense(2), 3)
        plain = PlainNetwork((linen.Dense(2).init, linen.Dense(2).apply), (3,))
        params = plain.init(KEY)
        expected = network.apply(network.init(KEY), X)
        np.testing.assert_allclose(plain.apply(params, X), expected, atol=1e-6)

    def test_a_flag_of_another_name(self):
        def apply(params, x, noisy, key):
            return x + jax.random.normal(key, x.shape) if noisy else x

        network = as_network((lambda key: {}, apply), 3, train_flag="noisy")
        params = network.init(KEY)
        np.testing.assert_array_equal(network.apply(params, X), X)
        assert (network.train_apply(params, KEY, X)[0] != X).all()


class TestBadInput:
    """The message names the network and what is expected of it."""

    @pytest.mark.parametrize(
        ("network", "message"),
        [
            ({"w": 1}, "`network` must have `init` and `apply`, or be a module of Flax"),
            (lambda x: x, "`network` must have `init` and `apply`.*hk.transform"),
            (LinenModule, "`network` must have `init` and `apply`"),
        ],
    )
    def test_no_network(self, network, message):
        with pytest.raises(TypeError, match=message):
            as_network(network, 3)

    def test_no_shape(self):
        with pytest.raises(ValueError, match="`context_shape` must be given for a network"):
            as_network(LinenModule())
        with pytest.raises(ValueError, match=r"`context_shape` must be \(3,\), the input shape of"):
            as_network(MLP(3, (), 2), 4)

    def test_lists(self):
        class Listed(linen.Module):
            sizes: list

            def __call__(self, x):
                return x

        with pytest.raises(ValueError, match=r"`network` must be hashable.*tuples in place of"):
            as_network(Listed([3]), 3)

    def test_randomness_without_a_flag(self):
        def noisy(x):
            return hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(4)(x))

        with pytest.raises(
            ValueError, match=r"must map inputs of shape \(3,\) in evaluation.*flag"
        ):
            fv.conditional(fv.gaussian(2), hk.transform(noisy), context_shape=3)

    def test_another_input_shape(self):
        with pytest.raises(ValueError, match=r"must map inputs of shape \(7,\) in evaluation"):
            fv.conditional(fv.gaussian(2), NNXModule, context_shape=7)

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ({"loc": 2}, r"a dict of arrays of shapes .*got \{'loc': \(2,\)\} from HaikuNetwork"),
            ({"loc": 2, "std": 2}, r"got \{'loc': \(2,\), 'std': \(2,\)\}"),
            ({"loc": 2, "scale": 3}, r"got \{'loc': \(2,\), 'scale': \(3,\)\}"),
            (5, r"must return an array of shape \(4,\), .*got \(5,\) from HaikuNetwork"),
        ],
    )
    def test_outputs(self, output, message):
        def network(x):
            return jax.tree.map(lambda size: hk.Linear(size)(x), output)

        with pytest.raises(ValueError, match=message):
            fv.conditional(fv.gaussian(2), hk.transform(network), context_shape=3)

    def test_an_output_without_rows(self):
        network = (lambda key: {}, lambda params, x: x.sum(0))
        with pytest.raises(ValueError, match="`network` must keep the leading axis of its input"):
            fv.conditional(fv.gaussian(2), network, context_shape=4)

    def test_another_output_in_training(self):
        def apply(params, x, train):
            return {"loc": x, "scale": x} if train else jnp.concatenate([x, x], -1)

        with pytest.raises(ValueError, match="of the same shapes in training as in evaluation"):
            fv.conditional(fv.gaussian(3), (lambda key: {}, apply), context_shape=3)
