"""One network, written for every library, and the way from one set of parameters to each."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen, nnx

EPS = 1e-5
MOMENTUM = 0.9
RATE = 0.5


def haiku_function(x, is_training):
    h = hk.Linear(4, name="first")(x)
    h = hk.BatchNorm(True, True, MOMENTUM, eps=EPS, name="norm")(h, is_training)
    h = jax.nn.relu(h)
    if is_training:
        h = hk.dropout(hk.next_rng_key(), RATE, h)
    return {"loc": hk.Linear(2, name="loc")(h), "scale": hk.Linear(2, name="scale")(h)}


class LinenModule(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        h = linen.Dense(4, name="first")(x)
        h = linen.BatchNorm(not train, momentum=MOMENTUM, epsilon=EPS, name="norm")(h)
        h = linen.Dropout(RATE, deterministic=not train)(jax.nn.relu(h))
        return {"loc": linen.Dense(2, name="loc")(h), "scale": linen.Dense(2, name="scale")(h)}


class NNXModule(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=MOMENTUM, epsilon=EPS, rngs=rngs)
        self.dropout = nnx.Dropout(RATE, rngs=rngs)
        self.loc = nnx.Linear(4, 2, rngs=rngs)
        self.scale = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        h = self.dropout(jax.nn.relu(self.norm(self.first(x))))
        return {"loc": self.loc(h), "scale": self.scale(h)}


class EquinoxModule(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    loc: eqx.nn.Linear
    scale: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(3, 4, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, "batch", eps=EPS, momentum=MOMENTUM, mode="batch")
        self.dropout = eqx.nn.Dropout(RATE)
        self.loc = eqx.nn.Linear(4, 2, key=keys[1])
        self.scale = eqx.nn.Linear(4, 2, key=keys[2])

    def __call__(self, x, state, key):
        h, state = self.norm(self.first(x), state)
        h = self.dropout(jax.nn.relu(h), key=key)
        return {"loc": self.loc(h), "scale": self.scale(h)}, state


def plain_init(key):
    keys = jax.random.split(key, 3)
    sizes = {"first": (3, 4), "loc": (4, 2), "scale": (4, 2)}
    params = {
        name: {"w": jax.random.normal(k, size), "b": jnp.zeros(size[1])}
        for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    params["norm"] = {"w": jnp.ones(4), "b": jnp.zeros(4)}
    return params, {"mean": jnp.zeros(4), "var": jnp.ones(4)}


def plain_apply(params, state, x, *, rng, training):
    def dense(name, h):
        return h @ params[name]["w"] + params[name]["b"]

    h = dense("first", x)
    mean, var = state["mean"], state["var"]
    if training:
        mean, var = h.mean(0), h.var(0)
        pairs = {"mean": (state["mean"], mean), "var": (state["var"], var)}
        state = {n: MOMENTUM * old + (1 - MOMENTUM) * new for n, (old, new) in pairs.items()}
    h = (h - mean) / jnp.sqrt(var + EPS) * params["norm"]["w"] + params["norm"]["b"]
    h = jax.nn.relu(h)
    if training:
        h = jnp.where(jax.random.bernoulli(rng, 1 - RATE, h.shape), h / (1 - RATE), 0)
    return {"loc": dense("loc", h), "scale": dense("scale", h)}, state


#: What to pass as the network, for every library.
NETWORKS = {
    "haiku": hk.transform_with_state(haiku_function),
    "linen": LinenModule(),
    "nnx": NNXModule,
    "nnx_module": NNXModule(rngs=nnx.Rngs(1)),
    "equinox": eqx.nn.make_with_state(EquinoxModule),
    "equinox_module": eqx.nn.make_with_state(EquinoxModule)(jax.random.key(1)),
    "plain": (plain_init, plain_apply),
}

#: Names of a layer's weights and biases.
NAMES = {
    "haiku": {"w": "w", "b": "b", "norm_w": "scale", "norm_b": "offset"},
    "linen": {"w": "kernel", "b": "bias", "norm_w": "scale", "norm_b": "bias"},
    "nnx": {"w": "kernel", "b": "bias", "norm_w": "scale", "norm_b": "bias"},
    "plain": {"w": "w", "b": "b", "norm_w": "w", "norm_b": "b"},
}


def translate(library, plain, like):
    """Parameters of the plain network as those of a library, whose own are `like`."""
    params, state = plain["params"], plain["state"].value
    if library.startswith("equinox"):
        module = like["params"]
        for name, layer in params.items():
            weight = layer["w"].T
            module = eqx.tree_at(
                lambda m, name=name: (getattr(m, name).weight, getattr(m, name).bias),
                module,
                (weight, layer["b"]),
            )
        return {**like, "params": module}
    names = NAMES[library.removesuffix("_module")]
    result = {}
    for name, layer in params.items():
        prefix = "norm_" if name == "norm" else ""
        result[name] = {names[prefix + each]: value for each, value in layer.items()}
    shaped = jax.tree.map(lambda new, own: new.reshape(own.shape), result, like["params"])
    del state
    return {**like, "params": shaped}
