"""A conditional VAE of binary digits: z is the hand, y the digit, and both make the image.

    python examples/vae_conditional.py [--data FOLDER] [--digit 7] [--short]
        [--output vae_conditional]

Fits p(z) p(x | z, y) with q(z | x, y), where y is the digit, a row of the identity. Prints the test
ELBO of log p(x | y) at the right digits and at wrong ones, and how often Bayes' rule, by the ELBO
of each digit, finds the right one. Writes pictures: draws of the chosen digit, reconstructions, and
all ten digits in the same hands, one column for each z. FOLDER holds MNIST's idx files; by default
the data are scikit-learn's digits, 8 x 8.
"""

import argparse
import math

import digits
import jax
import matplotlib.pyplot as plt
import numpy as np

import flowvi as fv
from flowvi.networks import MLP


def build(shape, latent, width):
    """The model: a decoder of z and y, an encoder of x and y, each in one vector."""
    hidden, size = (width, width), math.prod(shape)
    return fv.VAE(
        prior=fv.standard_normal(latent),
        likelihood=fv.conditional(fv.bernoulli(shape), MLP(latent + 10, hidden, shape)),
        posterior=fv.conditional(fv.gaussian(latent), MLP(size + 10, hidden, 2 * latent)),
        context_shape=10,
    )


def draw_hands(model, key, one_hot, num_hands=12):
    """All digits, row by row, with the same z in each column."""
    z = model.vae.prior.sample(model.params["prior"], key, num_hands)
    images = np.pad(model.decode(z, context=one_hot[:, None]), [(0, 0)] * 2 + [(0, 1)] * 2)
    rows = images.swapaxes(1, 2)
    figure, axis = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    axis.imshow(rows.reshape(math.prod(rows.shape[:2]), -1), cmap="gray_r", vmin=0, vmax=1)
    axis.set_axis_off()
    figure.suptitle("each column is one z, each row one digit", fontsize=10)
    return figure


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of MNIST's or Fashion-MNIST's idx files")
    parser.add_argument("--digit", type=int, default=7, help="which digit to draw")
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="vae_conditional", help="how the pictures' names begin")
    arguments = parser.parse_args()

    x, labels, x_test, labels_test = digits.load(arguments.data)
    small, one_hot = arguments.data is None, np.eye(10, dtype=np.float32)
    y, y_test = one_hot[labels], one_hot[labels_test]
    vae = build(x.shape[1:], *((8, 128) if small else (32, 512)))
    num_steps = 100 if arguments.short else (3000 if small else 30_000)
    held = len(x) // 10
    model = fv.fit_vae(
        vae,
        x[held:],
        context=y[held:],
        key=jax.random.key(0),
        num_steps=num_steps,
        validation_data=x[:held],
        validation_context=y[:held],
        validation_samples=8,
    )

    num_samples = 10 if arguments.short else 200
    key = jax.random.key(1)
    # One row for each digit, one column for each image.
    elbo = np.stack([model.elbo(key, x_test, num_samples, context=each) for each in one_hot])
    right = np.take_along_axis(elbo, labels_test[None], 0)[0]
    wrong = (elbo.sum(0) - right) / 9
    found = np.mean(elbo.argmax(0) == labels_test)
    print(f"test ELBO {right.mean():.2f} nats at the right digit, {wrong.mean():.2f} at wrong ones")
    print(f"the digit of the highest ELBO is the right one for {found:.1%} of the test images")

    chosen = np.repeat(one_hot[[arguments.digit]], 4, axis=0)
    figures = {
        f"digit_{arguments.digit}": model.plot_samples(jax.random.key(2), context=chosen),
        "reconstructions": model.plot_reconstructions(key, x_test[:24], context=y_test[:24]),
        "hands": draw_hands(model, jax.random.key(3), one_hot),
    }
    for name, figure in figures.items():
        figure.savefig(f"{arguments.output}_{name}.png", dpi=110)
        print(f"wrote {arguments.output}_{name}.png")


if __name__ == "__main__":
    main()
