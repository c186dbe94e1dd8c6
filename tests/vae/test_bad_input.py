"""Every message of the room, before anything is trained."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP
from flowvi.params import Origin
from tests.vae.helpers import KEY, binary_rows, binary_vae

LIKELIHOOD = fv.conditional(fv.bernoulli((3, 4)), MLP(2, (8,), (3, 4)))
POSTERIOR = fv.conditional(fv.gaussian(2), MLP((3, 4), (8,), 4))

MODELS = {
    "no family": (
        TypeError,
        r"`prior` must be a family, such as `fv.standard_normal\(2\)`; got 'normal'",
        {"prior": "normal"},
    ),
    "prior with context": (
        ValueError,
        "`prior` must take no context; got iaf",
        {"prior": fv.iaf(2, context_size=3, num_layers=1, hidden_sizes=[4])},
    ),
    "latents of the decoder": (
        ValueError,
        r"`likelihood` must take z of the prior standard_n.*, of shape \(3,\), as context rather "
        r"than one of shape \(2,\); got conditional",
        {"prior": fv.standard_normal(3)},
    ),
    "latents of the posterior": (
        ValueError,
        r"`posterior` must have event shape \(2,\), that of the prior standard_n.*, rather than "
        r"\(3,\); got conditional",
        {"posterior": fv.conditional(fv.gaussian(3), MLP((3, 4), (8,), 6))},
    ),
    "events of the encoder": (
        ValueError,
        r"`posterior` must take x of the likelihood conditional.*, of shape \(3, 4\), as context "
        r"rather than one of shape \(12,\); got conditional",
        {"posterior": fv.conditional(fv.gaussian(2), MLP(12, (8,), 4))},
    ),
    "likelihood without context": (
        ValueError,
        "`likelihood` must take z of the prior .* as context; got mean_f.*It takes none. Perh"
        r"aps use `fv.conditional\(family, network\)`",
        {"likelihood": fv.mean_field(12)},
    ),
    "posterior without context": (
        ValueError,
        "`posterior` must take x of the likelihood .* as context; got mean_field.*It takes none",
        {"posterior": fv.mean_field(2)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    error, message, families = MODELS[name]
    with pytest.raises(error, match=message):
        binary_vae(**families)


def test_networks():
    with pytest.raises(ValueError, match=r"`network` must return .*\(4,\).*got .5,. from MLP"):
        fv.conditional(fv.gaussian(2), MLP(12, (8,), 5))


def grey():
    x = binary_rows()
    x[7, 1, 2] = 0.25
    return x


def missing():
    x = binary_rows()
    x[7, 1, 2] = np.nan
    return x


FITS = {
    "grey pixels": (
        ValueError,
        "`x` must hold only 0 and 1 for .*got 0.25 in row 7.*Perhaps binarise",
        {"x": grey()},
    ),
    "grey pixels to validate": (
        ValueError,
        "`validation_data` must hold only 0 and 1 .*got 0.25 in row 7",
        {"validation_data": grey()},
    ),
    "NaN": (ValueError, "`x` must hold only 0 and 1 .*got nan in row 7", {"x": missing()}),
    "shape": (
        ValueError,
        r"`x` must have at least one row, and shape \[num_rows, 3, 4\] for conditional.*got shape "
        r"\(20, 12\)",
        {"x": binary_rows().reshape(20, 12)},
    ),
    "one row": (ValueError, r"`x` must have .*shape .*got shape \(3, 4\)", {"x": binary_rows()[0]}),
    "no rows": (ValueError, "`x` must have at least one row", {"x": binary_rows()[:0]}),
    "text": (TypeError, "`x` must be an array of numbers", {"x": [[["a"] * 4] * 3]}),
    "no model": (TypeError, r"`vae` must be a `fv.VAE\(...\)`; got 'vae'", {"vae": "vae"}),
    "no key": (TypeError, "`key` must be a random key", {"key": 0}),
    "steps": (ValueError, "`num_steps` must be a positive integer; got 0", {"num_steps": 0}),
    "batch": (ValueError, "`batch_size` must be.*got 21", {"batch_size": 21}),
    "objective": (
        TypeError,
        r"`objective` must be what `vae.loss\(...\)` of this model returns",
        {"objective": ob.ELBO},
    ),
    "objective of another model": (
        TypeError,
        "`objective` must be what `vae.loss",
        {
            "objective": binary_vae(
                posterior=fv.conditional(fv.gaussian(2), MLP((3, 4), (7,), 4))
            ).loss()
        },
    ),
    "shape of weights": (
        ValueError,
        r"`weights` must have shape \(20,\), one for each row of `x`; got shape \(3,\)",
        {"weights": np.ones(3)},
    ),
    "negative weights": (
        ValueError,
        "`weights` must be finite and not negative; got -1.0 in row 2",
        {"weights": np.where(np.arange(20) == 2, -1.0, 1.0)},
    ),
    "no weights": (
        ValueError,
        "`weights` must not all be zero; got only zeros",
        {"weights": np.zeros(20)},
    ),
    "params": (
        ValueError,
        "`params` must be a dict with the keys prior, likelihood and posterior.*got .'posterior'",
        {"params": {"posterior": {}}},
    ),
    "validation samples": (
        ValueError,
        "`validation_samples` must be a positive integer; got 0",
        {"validation_samples": 0},
    ),
    "validation without data": (
        ValueError,
        "`validate_every` must be None where neither",
        {"validate_every": 3},
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_fits(name):
    error, message, options = FITS[name]
    defaults = {"vae": binary_vae(), "x": binary_rows(), "key": KEY, "num_steps": 2}
    with pytest.raises(error, match=message):
        fv.fit_vae(**{**defaults, "progress": False, **options})


@pytest.mark.parametrize("objective", [ob.ELBO, ob.IWELBO, ob.Renyi, ob.CUBO])
def test_a_posterior_without_gradients_through_its_draws(objective):
    discrete = fv.conditional(fv.bernoulli(2), MLP((3, 4), (8,), 2))
    vae = binary_vae(posterior=discrete)
    message = (
        f"`family` must be reparameterised for {objective.__name__}, .*got "
        "conditional.*Perhaps use `fv.objectives.ScoreFunction`"
    )
    with pytest.raises(ValueError, match=message):
        vae.loss(objective)
    vae.loss(ob.ScoreFunction, num_samples=2)


LOSSES = {
    "kl_weight": ({"kl_weight": -1.0}, "`kl_weight` must be at least 0; got -1.0"),
    "warm_up": ({"warm_up": -1}, "`warm_up` must be at least 0; got -1"),
    "free_bits": ({"free_bits": float("nan")}, "`free_bits` must be at least 0; got nan"),
    "num_samples": ({"num_samples": 0}, "`num_samples` must be a positive integer; got 0"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    options, message = LOSSES[name]
    with pytest.raises(ValueError, match=message):
        binary_vae().loss(**options)


def test_losses_of_other_kinds():
    with pytest.raises(TypeError, match=r"`objective` must be an objective, such as .*got 'elbo'"):
        binary_vae().loss("elbo")
    log_joint = lambda params, key, z, batch: z.sum(-1)  # noqa: E731
    for options in ({"kl_weight": 0.5}, {"warm_up": 3}, {"free_bits": 1.0}):
        with pytest.raises(ValueError, match="`log_joint` must be a `Joint` for `"):
            ob.ELBO(fv.mean_field(2), log_joint, **options)


METHODS = {
    "many draws": ("elbo", (binary_rows(), 10**12), "`num_samples` must be at most 2147483647"),
    "masked": ("elbo", (np.ma.masked_equal(binary_rows(), 0),), "`x` must have no masked entries"),
    "ragged": ("elbo", ([[1.0], [1.0, 2.0]],), "`x` must be an array of numbers; got a list"),
    "many x": (
        "sample",
        ((10**6, 10**6),),
        "`sample_shape` must be of at most 2,147,483,647 draws",
    ),
    "fraction of a draw": ("sample", (3.7,), "`sample_shape` must be a sequence of positive int"),
    "text": ("encode", ([["a"] * 4] * 3,), "`x` must be an array of numbers; got a list"),
    "x": ("elbo", (jnp.zeros((5, 12)),), r"`x` must have a shape that ends in \(3, 4\) for the "),
    "z": ("decode", (jnp.zeros((5, 3)),), r"`z` must have a shape that ends in \(2,\) for the "),
    "draws": ("evaluate", (binary_rows(), 0), "`num_samples` must be a positive integer; got 0"),
    "encode": ("encode", (jnp.zeros(3),), "`x` must have a shape that ends in"),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    method, arguments, message = METHODS[name]
    vae = binary_vae()
    params = jax.eval_shape(vae.init, KEY)
    key = () if method == "decode" else (KEY,)
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(vae, method)(params, *key, *arguments)


PARAMS = {
    "a result": (
        lambda own: types.SimpleNamespace(params=own),
        "`params` must be a dict with the keys .*got SimpleNamespace. Perhaps use its `.params`",
    ),
    "another model": (
        lambda own: {**own, "posterior": {**own["posterior"], "origin": Origin(LIKELIHOOD)}},
        r'`params\["posterior"\]` must be those of conditional.*; got those of conditional',
    ),
    "other shapes": (
        lambda own: {**own, "prior": {"loc": np.zeros(3)}},
        r'`params\["prior"\]` must be those of standard_n.*, arrays of shapes .*; got .*\(3,\)',
    ),
}


@pytest.mark.parametrize("name", PARAMS)
def test_params_of_something_else(name):
    change, message = PARAMS[name]
    vae = binary_vae()
    with pytest.raises(ValueError, match=message):
        vae.elbo(change(jax.eval_shape(vae.init, KEY)), KEY, binary_rows())
    with pytest.raises(TypeError, match="`key` must be a random key"):
        vae.sample(jax.eval_shape(vae.init, KEY), 3)


def test_rules_of_the_rate():
    vae, x = binary_vae(), binary_rows()
    params = jax.eval_shape(vae.init, KEY)
    with pytest.raises(ValueError, match="`kl` must be one of auto, analytic, sampled; got 'mc'"):
        vae.elbo(params, KEY, x, kl="mc")
    flow = fv.iaf(2, num_layers=1, hidden_sizes=[4], context_size=4, base=fv.gaussian(2))
    vae = binary_vae(posterior=fv.conditional(flow, MLP((3, 4), (8,), 4)))
    with pytest.raises(NotImplementedError, match="has no closed form"):
        jax.eval_shape(lambda: vae.elbo(vae.init(KEY), KEY, x, kl="analytic"))
