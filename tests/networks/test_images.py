"""The networks of this library: dense and convolutional, of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP, ConvDecoder, ConvEncoder
from tests import tolerances

KEY = jax.random.key(0)


def pair(shape, **kwargs):
    return ConvEncoder(shape, 6, **kwargs), ConvDecoder(6, shape, **kwargs)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((8, 8), (4, 3)), ((9, 7, 3), (4, 3)), ((1, 1, 1), (4,)), ((5, 2, 2), ())],
)
def test_any_image_and_any_leading_axes(shape, channels):
    encoder, decoder = pair(shape, channels=channels, hidden_sizes=(8,))

    @jax.jit
    def found(key, images):
        params = encoder.init(key), decoder.init(key)

        def both(params, images):
            z = encoder.apply(params[0], images)
            return z, decoder.apply(params[1], z)

        one = both(params, images[1, 0])[1]
        total = lambda params: jnp.sum(both(params, images)[1] ** 2)  # noqa: E731
        return both(params, images), one, jax.grad(total)(params)

    images = np.random.default_rng(0).normal(size=(3, 2, *shape)).astype(np.float32)
    (z, x), one, gradients = found(KEY, images)
    assert z.shape == (3, 2, 6) and x.shape == images.shape
    np.testing.assert_allclose(one, x[1, 0], rtol=tolerances.FLOAT32, atol=1e-5)
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(gradients))


def test_they_are_an_encoder_and_a_decoder():
    encoder, decoder = pair((7, 5), channels=(4,), hidden_sizes=(8,))
    assert repr(encoder) == "ConvEncoder((7, 5) -> 6)"
    assert repr(decoder) == "ConvDecoder(6 -> (7, 5))"
    posterior, likelihood = (
        fv.conditional(fv.gaussian(3), encoder),
        fv.conditional(fv.bernoulli((7, 5)), decoder),
    )
    # A normal of two channels takes four: locations and scales.
    wide = ConvDecoder(3, (5, 5, 4), channels=(4,), hidden_sizes=())
    images = fv.conditional(fv.gaussian((5, 5, 2)), wide)
    for family, shape in ((posterior, (4, 7, 5)), (likelihood, (2, 4, 6)), (images, (6, 3))):
        draw = lambda key, c, f=family: f.distribution(f.init(key), c).sample(seed=key)  # noqa: E731
        x = jax.eval_shape(draw, KEY, jax.ShapeDtypeStruct(shape, np.float32))
        batch = shape[: len(shape) - len(family.context_shape)]
        assert x.shape == batch + family.event_shape
    again = pair((7, 5), channels=[4], hidden_sizes=[8])[0]
    assert encoder == again and hash(encoder) == hash(again)


def test_dense_networks():
    network, flat = MLP((4, 3), (8,), (2, 5)), MLP(12, (8,), 10)
    zero = MLP(12, (8,), 4, zero_output=True)
    assert repr(network) == "MLP((4, 3) -> (2, 5))" and repr(MLP((3,), (), 1)) == "MLP(3 -> 1)"

    @jax.jit
    def found(key, x):
        rows = x.reshape(7, 12)
        results = [n.apply(n.init(key), rows) for n in (flat, zero)]
        return network.apply(network.init(key), x), *results

    x = np.random.default_rng(0).normal(size=(7, 4, 3)).astype(np.float32)
    with jax.numpy_rank_promotion("raise"):
        shaped, expected, nothing = map(np.asarray, found(KEY, x))
    np.testing.assert_array_equal(shaped, expected.reshape(7, 2, 5))
    # Only a map that starts as the identity starts at zero.
    assert (shaped != 0).all() and (nothing == 0).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConvEncoder((8,), 2), ValueError, r"`image_shape` must be \(height, width\) or"),
        (
            lambda: ConvDecoder(2, (8, 0)),
            ValueError,
            "`image_shape` must be a sequence of posit",
        ),
        (lambda: ConvEncoder((8, 8), 0), ValueError, "`output_size` must be a positive integer"),
        (lambda: ConvDecoder(2.5, (8, 8)), TypeError, "`input_size` must be a positive integer"),
        (lambda: ConvEncoder((8, 8), 2, channels=3), TypeError, "`channels` must be a sequence"),
        (lambda: ConvEncoder((8, 8), 2, kernel_size=0), ValueError, "`kernel_size` must be a posi"),
        (lambda: ConvEncoder((8, 8), 2, activation="x"), ValueError, "`activation` must be a func"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_wrong_images():
    encoder, decoder = pair((8, 8), channels=(4,), hidden_sizes=())
    with pytest.raises(ValueError, match=r"`x` must have a shape that ends in \(8, 8\)"):
        encoder.apply({}, np.zeros((8, 9)))
    with pytest.raises(ValueError, match=r"`x` must have a shape that ends in \(6,\)"):
        decoder.apply({}, np.zeros(5))
