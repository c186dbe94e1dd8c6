"""A VAE whose latents come in groups: a mixture as prior, and as posterior.

    python examples/vae_mixture_prior.py [--short] [--output vae_mixture_prior]

Binary digits of 8 x 8 pixels (scikit-learn) and two latents, so that the plane can be drawn:

    a standard normal prior, and a Gaussian posterior
    a learned mixture of ten normals as prior, and a Gaussian posterior
    the same prior, and a mixture of three as posterior, whose components are summed over
    the class of a digit and then its place: p(c) p(z | c), q(c | x) q(z | x, c), classes summed

Prints the test ELBO, rate, distortion and log likelihood of each; writes a picture of the planes,
coloured by digit, and one of what each class of the last model decodes to.
"""

import argparse

import digits
import jax
import matplotlib.pyplot as plt
import numpy as np

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP

LATENT, WIDTH, NUM_CLASSES = 2, 128, 10


def build(shape):
    """By name (the model, its objective)."""
    decoder = MLP(LATENT, (WIDTH, WIDTH), shape)
    size = int(np.prod(shape))

    def model(prior, family, outputs):
        return fv.VAE(
            prior=prior,
            likelihood=fv.conditional(fv.bernoulli(shape), decoder),
            posterior=fv.conditional(family, MLP(shape, (WIDTH, WIDTH), outputs)),
        )

    gaussian, mixture = fv.gaussian(LATENT), fv.mixture(LATENT, 10)
    three = fv.mixture(LATENT, 3, components="predicted")
    classes = fv.categorical((), NUM_CLASSES, one_hot=True)
    inside = MLP(NUM_CLASSES, (), 2 * LATENT)
    grouped = fv.VAE(
        prior=fv.joint(fv.unconditional(classes), fv.conditional(gaussian, inside)),
        likelihood=fv.conditional(
            fv.bernoulli(shape), MLP(NUM_CLASSES + LATENT, (WIDTH, WIDTH), shape)
        ),
        posterior=fv.joint(
            fv.conditional(classes, MLP(shape, (WIDTH,), NUM_CLASSES)),
            fv.conditional(gaussian, MLP(size + NUM_CLASSES, (WIDTH, WIDTH), 2 * LATENT)),
        ),
    )
    plain = model(fv.standard_normal(LATENT), gaussian, 2 * LATENT)
    learned = model(mixture, gaussian, 2 * LATENT)
    both = model(mixture, three, three.context_shape)
    return {
        "normal prior": (plain, plain.loss()),
        "mixture prior": (learned, learned.loss()),
        "mixture prior and posterior": (both, both.loss(ob.Enumeration)),
        "classes and places": (grouped, grouped.loss(ob.Enumeration)),
    }


def place_of(z):
    """The two latents that lie in the plane."""
    return np.asarray(z)[:, -LATENT:]


def draw_planes(models, x, labels, output):
    """Draws of q(z | x) over the density of the prior, for each model."""
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 8), layout="constrained")
    key = jax.random.key(3)
    for axis, (name, model) in zip(axes.ravel(), models.items(), strict=True):
        z = place_of(model.encode(key, x))
        low, high = np.quantile(z, [0.005, 0.995], axis=0)
        low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
        grid = np.stack(
            np.meshgrid(*(np.linspace(a, b, 160) for a, b in zip(low, high, strict=True))), -1
        ).astype(np.float32)
        density = np.exp(log_prior(model, grid))
        axis.contourf(grid[..., 0], grid[..., 1], density**0.5, 12, cmap="Greys", alpha=0.5)
        axis.scatter(*z.T, c=labels, cmap="tab10", s=9, linewidths=0)
        axis.set(title=name, xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axis.title.set_fontsize(10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(f"{output}_planes.png", dpi=110)
    print(f"wrote {output}_planes.png")


def log_prior(model, z):
    """The log density of the prior in the plane; of classes and places, with the class summed."""
    prior, params = model.vae.prior, model.params["prior"]
    if prior.event_shape == (LATENT,):
        return prior.log_prob(params, z)
    classes = np.broadcast_to(np.eye(NUM_CLASSES), (*z.shape[:-1], NUM_CLASSES, NUM_CLASSES))
    places = np.broadcast_to(z[..., None, :], (*classes.shape[:-1], LATENT))
    each = prior.log_prob(params, np.concatenate([classes, places], -1).astype(np.float32))
    return jax.nn.logsumexp(each, axis=-1)


def draw_classes(model, output):
    """What each class decodes to: one row of images for each."""
    count = 12
    z = model.vae.prior.sample(model.params["prior"], jax.random.key(4), 4000)
    classes = np.asarray(z[:, :NUM_CLASSES]).argmax(1)
    # Places of one class, as many as it has, and blanks behind them.
    order = [np.flatnonzero(classes == label)[:count] for label in range(NUM_CLASSES)]
    images = np.asarray(model.decode(z[np.concatenate(order)]))
    height, width = images.shape[1:]
    whole = np.zeros((NUM_CLASSES, height + 1, count, width + 1))
    rows = np.repeat(np.arange(NUM_CLASSES), [len(each) for each in order])
    columns = np.concatenate([np.arange(len(each)) for each in order])
    whole[rows, :-1, columns, :-1] = images
    figure, axis = plt.subplots(figsize=(6, 5.2), layout="constrained")
    axis.imshow(whole.reshape(NUM_CLASSES * (height + 1), -1), cmap="gray_r", vmin=0, vmax=1)
    axis.set_axis_off()
    figure.suptitle("a row for each class: draws of its places, decoded", fontsize=10)
    figure.savefig(f"{output}_classes.png", dpi=110)
    print(f"wrote {output}_classes.png")


def main():
    """Fit all, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument(
        "--output", default="vae_mixture_prior", help="how the pictures' names begin"
    )
    arguments = parser.parse_args()

    x, _, x_test, labels = digits.load()
    num_steps = 40 if arguments.short else 3000
    num_samples = 10 if arguments.short else 1000

    print(f"{'':30}{'ELBO':>9}{'rate':>8}{'distortion':>12}{'log p(x)':>10}")
    models = {}
    for name, (vae, objective) in build(x.shape[1:]).items():
        options = {"num_steps": num_steps, "objective": objective}
        models[name] = model = fv.fit_vae(vae, x, key=jax.random.key(0), **options)
        found = model.evaluate(jax.random.key(1), x_test, num_samples)
        print(
            f"{name:30}{found.elbo.mean():9.2f}{found.rate.mean():8.2f}"
            f"{found.distortion.mean():12.2f}{found.log_likelihood.mean():10.2f}"
        )

    draw_planes(models, x_test, labels, arguments.output)
    draw_classes(model, arguments.output)


if __name__ == "__main__":
    main()
