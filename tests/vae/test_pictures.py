"""Pictures of models: what they show, and what they refuse."""

import matplotlib

matplotlib.use("Agg")

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import flowvi as fv
from flowvi import plotting
from flowvi.networks import MLP
from flowvi.plotting.vaes import _mosaic
from tests.vae.helpers import KEY, binary_rows, binary_vae


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.mark.compilations(60)
def test_all_of_them(tmp_path):
    vae, x = binary_vae(), binary_rows(30)
    fitted = fv.fit_vae(
        vae,
        x,
        key=KEY,
        num_steps=20,
        validation_data=x[:10],
        validation_samples=2,
        validate_every=5,
        progress=False,
    )
    figures = {
        "samples": fitted.plot_samples(KEY, num_rows=2, num_columns=5),
        "draws": fitted.plot_samples(KEY, means=False),
        "reconstructions": fitted.plot_reconstructions(KEY, x[:7], num_columns=4),
        "latent_space": fitted.plot_latent_space(KEY, x, np.arange(30) % 3),
        "no_labels": fitted.plot_latent_space(KEY, x),
        "manifold": fitted.plot_manifold(size=3),
        "curves": fitted.plot(),
    }
    figures["latent_space"].savefig(tmp_path / "latent_space.png")
    assert [axis.get_title() for axis in figures["curves"].axes] == [
        "ELBO in nats",
        "distortion in nats",
        "rate in nats",
    ]
    elbo = figures["curves"].axes[0].get_lines()
    np.testing.assert_allclose(elbo[1].get_ydata(), -fitted.history["validation"])
    labels = [text.get_text() for text in figures["latent_space"].axes[0].get_legend().get_texts()]
    assert labels == ["0", "1", "2"]


def test_the_manifold_is_a_grid_of_equal_shares():
    vae = binary_vae()
    params = vae.init(KEY)
    figure = plotting.manifold(vae, params, size=3)
    canvas = np.asarray(figure.axes[0].get_images()[0].get_array().filled(np.nan))
    line = jax.scipy.special.ndtri(np.array([1 / 6, 1 / 2, 5 / 6]))
    # The first coordinate runs to the right, the second one upwards.
    top_right = vae.decode(params, np.array([line[2], line[2]]))
    bottom_right = vae.decode(params, np.array([line[2], line[0]]))
    np.testing.assert_allclose(canvas[:3, -4:], top_right, rtol=1e-5)
    np.testing.assert_allclose(canvas[-3:, -4:], bottom_right, rtol=1e-5)


def test_mosaic():
    canvas = _mosaic(np.arange(3)[:, None, None] * np.ones((3, 2, 2)), (2, 2), 2)
    expected = np.full((5, 5), np.nan)
    expected[:2, :2], expected[:2, 3:], expected[3:, :2] = 0, 1, 2
    np.testing.assert_array_equal(canvas, expected)


def test_what_is_no_picture():
    vae = binary_vae()
    params = vae.init(KEY)
    with pytest.raises(ValueError, match=r"`image_shape` must be .*\(3, 4\) has; got \(5, 5\)"):
        plotting.prior_samples(vae, params, KEY, image_shape=(5, 5))
    flat = fv.VAE(
        prior=fv.standard_normal(3),
        likelihood=fv.conditional(fv.bernoulli(7), MLP(3, (4,), 7)),
        posterior=fv.conditional(fv.gaussian(3), MLP(7, (4,), 6)),
    )
    params = flat.init(KEY)
    with pytest.raises(ValueError, match=r"as an event of shape \(7,\) has; got None"):
        plotting.reconstructions(flat, params, KEY, np.zeros((2, 7)))
    for picture in (
        lambda: plotting.latent_space(flat, params, KEY, np.zeros((2, 7))),
        lambda: plotting.manifold(flat, params),
    ):
        with pytest.raises(ValueError, match=r"two latent coordinates .*got latent shape \(3,\)"):
            picture()
