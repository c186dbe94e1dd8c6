"""The networks of this library: dense and convolutional, of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP, ConvDecoder, ConvEncoder
from tests import tolerances

KEY = jax.random.key(0)
SHAPES = [(8, 8), (9, 7, 3), (1, 1, 1), (5, 2, 2)]


def pair(shape, **kwargs):
    return ConvEncoder(shape, 6, **kwargs), ConvDecoder(6, shape, **kwargs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [(), (4, 3)])
def test_any_image_and_any_leading_axes(shape, channels):
    encoder, decoder = pair(shape, channels=channels, hidden_sizes=(8,))
    images = jax.random.normal(KEY, (3, 2, *shape))
    encoding, decoding = encoder.init(KEY), decoder.init(KEY)
    z = encoder.apply(encoding, images)
    assert z.shape == (3, 2, 6)
    x = decoder.apply(decoding, z)
    assert x.shape == images.shape
    one = decoder.apply(decoding, encoder.apply(encoding, images[1, 0]))
    np.testing.assert_allclose(one, x[1, 0], rtol=tolerances.FLOAT32, atol=1e-5)

    def total(encoding, decoding):
        return jnp.sum(decoder.apply(decoding, encoder.apply(encoding, images)) ** 2)

    for gradient in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(encoding, decoding)):
        assert (gradient != 0).any()


def test_they_are_an_encoder_and_a_decoder():
    encoder, decoder = pair((7, 5), channels=(4,), hidden_sizes=(8,))
    posterior = fv.conditional(fv.gaussian(3), encoder)
    params = posterior.init(KEY)
    assert posterior.sample(params, KEY, 2, jnp.zeros((4, 7, 5))).shape == (2, 4, 3)
    likelihood = fv.conditional(fv.bernoulli((7, 5)), decoder)
    x = likelihood.sample(likelihood.init(KEY), KEY, (), jnp.zeros((2, 4, 6)))
    assert x.shape == (2, 4, 7, 5)
    assert encoder == pair((7, 5), channels=[4], hidden_sizes=[8])[0]
    assert hash(encoder) == hash(pair((7, 5), channels=[4], hidden_sizes=[8])[0])


def test_gaussian_images_take_twice_the_channels():
    decoder = ConvDecoder(3, (5, 5, 4), channels=(4,), hidden_sizes=())
    family = fv.conditional(fv.gaussian((5, 5, 2)), decoder)
    assert family.sample(family.init(KEY), KEY, (), jnp.zeros((6, 3))).shape == (6, 5, 5, 2)


def test_dense_networks_take_shapes():
    network = MLP((4, 3), (8,), (2, 5))
    params = network.init(KEY)
    x = jax.random.normal(KEY, (7, 4, 3))
    flat = MLP(12, (8,), 10)
    expected = flat.apply(flat.init(KEY), x.reshape(7, 12)).reshape(7, 2, 5)
    np.testing.assert_array_equal(network.apply(params, x), expected)


def test_only_a_map_that_starts_as_the_identity_starts_at_zero():
    x = jnp.ones((5, 3))
    assert (MLP(3, (8,), 4).apply(MLP(3, (8,), 4).init(KEY), x) != 0).all()
    zero = MLP(3, (8,), 4, zero_output=True)
    assert (zero.apply(zero.init(KEY), x) == 0).all()


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
        (lambda: ConvDecoder("a", (8, 8)), TypeError, "`input_size` must be a positive integer"),
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
        encoder.apply(encoder.init(KEY), jnp.zeros((8, 9)))
    with pytest.raises(ValueError, match=r"`x` must have a shape that ends in \(6,\)"):
        decoder.apply(decoder.init(KEY), jnp.zeros(5))
