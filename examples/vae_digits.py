"""A VAE of binary digits with a Gaussian posterior, and the same with an IAF posterior.

    python examples/vae_digits.py [--data FOLDER] [--short] [--output vae_digits]

Prints the test ELBO and the test log likelihood of both, and writes pictures: training curves,
draws of the prior, reconstructions. FOLDER holds the four idx files of MNIST or Fashion-MNIST; by
default the data are scikit-learn's digits, 8 x 8.
"""

import argparse

import digits
import jax
import optax

import flowvi as fv
from flowvi.networks import MLP


def build(posterior_name, shape, latent, width):
    """The model: a decoder, an encoder, and what the encoder parametrises."""
    base = fv.gaussian(latent)
    if posterior_name == "IAF":
        # The flow sees what the encoder says of the Gaussian that it starts from.
        base = fv.iaf(
            latent,
            num_layers=2,
            hidden_sizes=[5 * width // 8],
            transformer="affine",
            context_size=2 * latent,
            base=base,
        )
    return fv.VAE(
        prior=fv.standard_normal(latent),
        likelihood=fv.conditional(fv.bernoulli(shape), MLP(latent, (width, width), shape)),
        posterior=fv.conditional(base, MLP(shape, (width, width), 2 * latent)),
    )


def optimizer(num_steps):
    """One optimizer for each part: here the encoder and the flow learn faster than the decoder."""

    def adam(peak):
        schedule = optax.warmup_cosine_decay_schedule(
            peak / 10, peak, num_steps // 10, num_steps, 0.0
        )
        return optax.adam(schedule)

    rates = {"prior": 1e-2, "likelihood": 1e-2, "posterior": 2e-2, "control": 0.0}
    return optax.multi_transform(
        {name: adam(rate) for name, rate in rates.items()}, {name: name for name in rates}
    )


def main():
    """Fit both, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of MNIST's or Fashion-MNIST's idx files")
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="vae_digits", help="how the pictures' names begin")
    arguments = parser.parse_args()

    x, _, x_test, _ = digits.load(arguments.data)
    # Some rows are held out to watch the fit, and to choose the best of its parameters.
    x, x_development = x[: -len(x) // 10], x[-len(x) // 10 :]
    small = arguments.data is None
    latent, width = (16, 128) if small else (128, 512)
    num_steps = 100 if arguments.short else (4000 if small else 30_000)
    num_samples = 10 if arguments.short else 1000

    for name in ("Gaussian", "IAF"):
        vae = build(name, x.shape[1:], latent, width)
        model = fv.fit_vae(
            vae,
            x,
            key=jax.random.key(0),
            num_steps=num_steps,
            # Over the first steps the rate counts less, so that more latents come into use.
            objective=vae.loss(warm_up=num_steps // 20),
            optimizer=optimizer(num_steps),
            validation_data=x_development[:1000],
            validation_samples=8,
        )
        found = model.evaluate(jax.random.key(1), x_test, num_samples)
        print(
            f"{name} posterior: test ELBO {found.elbo.mean():.2f} "
            f"(rate {found.rate.mean():.2f}, distortion {found.distortion.mean():.2f}), "
            f"log p(x) {found.log_likelihood.mean():.2f} nats"
        )

    # The pictures are of the last one.
    key = jax.random.key(2)
    figures = {
        "curves": model.plot(),
        "samples": model.plot_samples(key),
        "reconstructions": model.plot_reconstructions(key, x_test[:24]),
    }
    for name, figure in figures.items():
        figure.savefig(f"{arguments.output}_{name}.png", dpi=110)
        print(f"wrote {arguments.output}_{name}.png")


if __name__ == "__main__":
    main()
