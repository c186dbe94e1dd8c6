"""A VAE with a binary code: five estimators of one gradient, against the exact sums.

    python examples/vae_discrete.py [--short] [--output vae_discrete]

Binary digits of 8 x 8 pixels (scikit-learn), six binary latents. A code has 64 values, so the
likelihood and the ELBO can be summed exactly, and so can the gradient. The posterior is fitted by

    exact enumeration
    the score function, bare
    the score function with a mean of the row's other draws (leave-one-out)
    the same with a learned baseline instead, and a running scale
    Gumbel-softmax, whose temperature falls from 1 to 0.3

Prints for each the exact ELBO of the rows that it was fitted to and of test rows; of these also
log p(x) and the gap between them; and the variance of its gradient. Writes a picture of the fits,
and one of what each code decodes to.
"""

import argparse

import digits
import jax
import matplotlib.pyplot as plt
import numpy as np

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP

NUM_BITS, WIDTH, NUM_SAMPLES = 6, 128, 4


def build(shape, num_steps):
    """By name (the model, its objective): the families are the same in evaluation."""

    def model(bits):
        return fv.VAE(
            prior=fv.unconditional(fv.bernoulli(NUM_BITS)),
            likelihood=fv.conditional(fv.bernoulli(shape), MLP(NUM_BITS, (WIDTH, WIDTH), shape)),
            posterior=fv.conditional(bits, MLP(shape, (WIDTH, WIDTH), NUM_BITS)),
        )

    bits = fv.bernoulli(NUM_BITS)
    coins = model(bits)
    # The temperature has fallen after half of the steps.
    soft = model(fv.relaxed(bits, fv.Annealing(1.0, 0.3, num_steps=max(num_steps // 2, 1))))
    baseline = (ob.LearnedBaseline(MLP(shape, (64,), 1)), ob.RunningScale())
    draws = {"num_samples": NUM_SAMPLES}
    return {
        "exact enumeration": (coins, coins.loss(ob.Enumeration)),
        "score, bare": (coins, coins.loss(ob.ScoreFunction, controls=(), **draws)),
        "score, leave-one-out": (coins, coins.loss(ob.ScoreFunction, **draws)),
        "score, baseline": (coins, coins.loss(ob.ScoreFunction, controls=baseline, **draws)),
        "Gumbel-softmax": (soft, soft.loss(**draws)),
    }


def exact_elbo(model, x):
    """The ELBO of each row, by a sum over the codes."""
    z, log_posterior = model.exact_posterior(x)
    q = model.vae.posterior.distribution(model.params["posterior"], x.astype(np.float32))
    log_q = q.log_prob(np.broadcast_to(z[:, None], (len(z), *x.shape[:1], NUM_BITS)))
    # ELBO = log p(x) - KL(q || p(z | x)).
    kl = np.sum(np.exp(log_q) * (log_q - log_posterior), axis=0)
    return model.log_marginal(x) - kl


def compare(curves, output):
    """The training curves of all fits, smoothed."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, elbo in curves.items():
        width = max(len(elbo) // 60, 1)
        whole = len(elbo) // width * width
        means = elbo[:whole].reshape(-1, width).mean(1)
        axis.plot((np.arange(len(means)) + 0.5) * width, means, label=name, linewidth=1.4)
    late = np.concatenate([elbo[len(elbo) // 10 :] for elbo in curves.values()])
    axis.set_ylim(np.quantile(late, 0.02), np.quantile(late, 0.995))
    axis.set(xlabel="steps", ylabel="ELBO in nats, as each fit sees it")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(f"{output}_curves.png", dpi=110)
    print(f"wrote {output}_curves.png")


def draw_codes(model, output):
    """What each code decodes to, where half of the bits give the row and half the column."""
    z, _ = model.exact_posterior(np.zeros(model.vae.event_shape))
    side = 2 ** (NUM_BITS // 2)
    images = np.pad(model.decode(z), [(0, 0), (0, 1), (0, 1)])
    shares = np.exp(model.vae.prior.log_prob(model.params["prior"], z))
    # A code that the prior hardly uses is pale.
    images *= np.minimum(1, 0.15 + 40 * shares)[:, None, None]
    _, height, width = images.shape
    whole = images.reshape(side, side, height, width).swapaxes(1, 2)
    figure, axis = plt.subplots(figsize=(5.6, 5.8), layout="constrained")
    axis.imshow(whole.reshape(side * height, -1)[:-1, :-1], cmap="gray_r", vmin=0, vmax=1)
    axis.set_axis_off()
    figure.suptitle("what each of the 64 codes decodes to; rare ones are pale", fontsize=10)
    figure.savefig(f"{output}_codes.png", dpi=110)
    print(f"wrote {output}_codes.png")


def main():
    """Fit all, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="vae_discrete", help="how the pictures' names begin")
    arguments = parser.parse_args()

    x, _, x_test, _ = digits.load()
    # In short, as many rows as there are to test on: what is compiled for these serves both.
    x = x[: len(x_test)] if arguments.short else x
    num_steps = 40 if arguments.short else 2000
    num_draws = 5 if arguments.short else 100
    batch = {"x": x[:64]}

    print(f"{'':22}{'ELBO':>10}{'test ELBO':>11}{'log p(x)':>10}{'gap':>7}{'variance':>11}")
    models = {}
    for name, (vae, objective) in build(x.shape[1:], num_steps).items():
        model = fv.fit_vae(
            vae, x, key=jax.random.key(0), num_steps=num_steps, batch_size=64, objective=objective
        )
        elbo, log_p = exact_elbo(model, x_test).mean(), model.log_marginal(x_test).mean()
        moments = ob.gradient_moments(
            objective, model.params, jax.random.key(1), batch, num_draws=num_draws
        )
        print(
            f"{name:22}{exact_elbo(model, x).mean():10.2f}"
            f"{elbo:11.2f}{log_p:10.2f}{log_p - elbo:7.2f}{float(moments.total_variance):11.3g}"
        )
        models[name] = model

    compare({name: -model.history["loss"] for name, model in models.items()}, arguments.output)
    draw_codes(models["score, leave-one-out"], arguments.output)


if __name__ == "__main__":
    main()
