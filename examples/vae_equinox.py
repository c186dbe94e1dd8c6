"""A VAE whose encoder and decoder are Equinox modules, and whose prior is learned too.

    python examples/vae_equinox.py [--data FOLDER] [--short]

FOLDER holds the four idx files of MNIST or Fashion-MNIST; by default the data are scikit-learn's
digits, 8 x 8.
"""

import argparse
import math

import digits
import equinox as eqx
import jax

import flowvi as fv

LATENT = 8


def network(size_in, size_out):
    """A function of a key that makes a module: each call of `init` makes fresh parameters."""
    return lambda key: eqx.nn.MLP(size_in, size_out, 128, 1, activation=jax.nn.silu, key=key)


def main():
    """Fit, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of MNIST's or Fashion-MNIST's idx files")
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    arguments = parser.parse_args()

    x, _, x_test, _ = digits.load(arguments.data)
    x, x_test = (images.reshape(len(images), -1) for images in (x, x_test))
    size = math.prod(x.shape[1:])
    vae = fv.VAE(
        prior=fv.maf(LATENT, num_layers=2, hidden_sizes=[32], transformer="affine"),
        likelihood=fv.conditional(fv.bernoulli(size), network(LATENT, size), context_shape=LATENT),
        posterior=fv.conditional(
            fv.gaussian(LATENT), network(size, 2 * LATENT), context_shape=size
        ),
    )
    num_steps = 50 if arguments.short else 3000
    model = fv.fit_vae(vae, x, key=jax.random.key(0), num_steps=num_steps)
    found = model.evaluate(jax.random.key(1), x_test, 100)
    print(
        f"test ELBO {found.elbo.mean():.2f} (rate {found.rate.mean():.2f}, distortion "
        f"{found.distortion.mean():.2f}), log p(x) {found.log_likelihood.mean():.2f} nats"
    )


if __name__ == "__main__":
    main()
