"""A VAE with two latents: where the digits lie in the plane, and what each place decodes to.

    python examples/vae_latent_2d.py [--data FOLDER] [--short] [--output vae_latent_2d]

FOLDER holds the four idx files of MNIST or Fashion-MNIST; by default the data are scikit-learn's
digits, 8 x 8.
"""

import argparse

import digits
import jax

import flowvi as fv
from flowvi.networks import MLP


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of MNIST's or Fashion-MNIST's idx files")
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="vae_latent_2d", help="how the pictures' names begin")
    arguments = parser.parse_args()

    x, _, x_test, labels = digits.load(arguments.data)
    shape = x.shape[1:]
    width = 128 if arguments.data is None else 512
    # A spline flow in two dimensions: the posterior of an image may be bent, or in two parts.
    flow = fv.iaf(2, num_layers=3, hidden_sizes=[64], context_size=4, base=fv.gaussian(2))
    vae = fv.VAE(
        prior=fv.standard_normal(2),
        likelihood=fv.conditional(fv.bernoulli(shape), MLP(2, (width, width), shape)),
        posterior=fv.conditional(flow, MLP(shape, (width, width), 4)),
    )
    model = fv.fit_vae(vae, x, key=jax.random.key(0), num_steps=100 if arguments.short else 3000)
    found = model.evaluate(jax.random.key(1), x_test, 10 if arguments.short else 1000)
    print(
        f"test ELBO {found.elbo.mean():.2f} (rate {found.rate.mean():.2f}, distortion "
        f"{found.distortion.mean():.2f}), log p(x) {found.log_likelihood.mean():.2f} nats"
    )

    key = jax.random.key(2)
    figures = {
        "space": model.plot_latent_space(key, x_test, labels),
        "manifold": model.plot_manifold(),
    }
    for name, figure in figures.items():
        figure.savefig(f"{arguments.output}_{name}.png", dpi=110)
        print(f"wrote {arguments.output}_{name}.png")


if __name__ == "__main__":
    main()
