"""A VAE whose encoder and decoder are Flax modules, with dropout and batch normalisation.

    python examples/vae_flax.py [--data FOLDER] [--short]

FOLDER holds the four idx files of MNIST or Fashion-MNIST; by default the data are scikit-learn's
digits, 8 x 8.
"""

import argparse
import math

import digits
import flax.linen as nn
import jax

import flowvi as fv

LATENT = 8


class Encoder(nn.Module):
    """An image to the location and the scale of q(z | x), by name."""

    @nn.compact
    def __call__(self, x, train):
        h = x.reshape(*x.shape[:-2], -1)
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(128)(h))
        h = nn.Dropout(0.1, deterministic=not train)(nn.silu(h))
        return {"loc": nn.Dense(LATENT)(h), "scale": nn.Dense(LATENT)(h)}


class Decoder(nn.Module):
    """z to the logits of the pixels."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self, z):
        h = nn.silu(nn.Dense(128)(z))
        return nn.Dense(math.prod(self.shape))(h).reshape(*z.shape[:-1], *self.shape)


def main():
    """Fit, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of MNIST's or Fashion-MNIST's idx files")
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    arguments = parser.parse_args()

    x, _, x_test, _ = digits.load(arguments.data)
    shape = x.shape[1:]
    vae = fv.VAE(
        prior=fv.standard_normal(LATENT),
        likelihood=fv.conditional(fv.bernoulli(shape), Decoder(shape), context_shape=LATENT),
        posterior=fv.conditional(fv.gaussian(LATENT), Encoder(), context_shape=shape),
    )
    num_steps = 50 if arguments.short else 3000
    model = fv.fit_vae(vae, x, key=jax.random.key(0), num_steps=num_steps)
    # Dropout and batch statistics are at rest here.
    found = model.evaluate(jax.random.key(1), x_test, 100)
    print(
        f"test ELBO {found.elbo.mean():.2f}, log p(x) {found.log_likelihood.mean():.2f} nats; "
        f"parameters of Flax: {sorted(model.params['posterior']['network']['params'])}"
    )


if __name__ == "__main__":
    main()
