"""What amortization costs in a linear factor model: an encoder, and parameters for each row.

    python examples/factor_model.py [--short] [--output factor_model.png]

x = W z + noise, with 200 observations of 500 variables and 3 factors; factors and loadings have a
standard deviation of 0.5, the noise of 0.3. The model is fitted twice: with a network that maps x
to the posterior of its factors, and with a posterior for each row. Prints the ELBO of both beside
the best that any such model can reach, which is known (probabilistic PCA: Tipping and Bishop,
1999), how close predictions are, and the gap that the network leaves. Draws the loss of both fits,
and predictions against observations.
"""

import argparse

import jax
import matplotlib.pyplot as plt
import numpy as np

import flowvi as fv
from flowvi.networks import MLP

NUM_ROWS, SIZE, FACTORS, SPREAD, NOISE = 200, 500, 3, 0.5, 0.3


def generate(num_rows=NUM_ROWS, size=SIZE, seed=0):
    """(observations, what they are without noise)."""
    rng = np.random.default_rng(seed)
    loadings = SPREAD * rng.normal(size=(FACTORS, size))
    signal = SPREAD * rng.normal(size=(num_rows, FACTORS)) @ loadings
    x = signal + NOISE * rng.normal(size=signal.shape)
    return x.astype(np.float32), signal


def pca_optimum(x):
    """The mean log likelihood of probabilistic PCA at its best, in nats a row."""
    num_rows, size = x.shape
    centred = x.astype(np.float64) - x.mean(0)
    # The eigenvalues of the covariance are the squares of these; the others are 0.
    values = np.linalg.svd(centred, compute_uv=False) ** 2 / num_rows
    noise = values[FACTORS:].sum() / (size - FACTORS)
    log_det = np.log(values[:FACTORS]).sum() + (size - FACTORS) * np.log(noise)
    return -0.5 * (size * np.log(2 * np.pi) + log_det + size)


def models(num_rows=NUM_ROWS, size=SIZE):
    """The same prior and linear likelihood, with each of two posteriors."""
    # Of any covariance, as the posterior of a linear model is: then nothing is left of the bound.
    normal = fv.gaussian(FACTORS, scale="full")
    posteriors = {
        "amortized": fv.conditional(normal, MLP(size, (64,), normal.context_shape)),
        "unamortized": fv.local(normal, num_rows),
    }
    likelihood = fv.conditional(fv.gaussian(size, scale="learned"), MLP(FACTORS, (), size))
    return {
        name: fv.VAE(fv.standard_normal(FACTORS), likelihood, posterior)
        for name, posterior in posteriors.items()
    }


def draw(losses, best, predictions, x):
    """Both losses above their optimum, on a log scale; three predictions against observations."""
    figure = plt.figure(figsize=(10, 6.4), layout="constrained")
    top, *below = figure.subplot_mosaic("aaa\nbcd").values()
    colours = {"oracle": "#777777", "amortized": "#c1521f", "unamortized": "#1f4e79"}
    for name, loss in losses.items():
        width = max(len(loss) // 200, 1)
        means = loss[: len(loss) // width * width].reshape(-1, width).mean(1)
        steps = (np.arange(len(means)) + 0.5) * width
        top.plot(steps, means + best, color=colours[name], label=name, linewidth=1.4)
    top.set_yscale("log")
    top.set(xlabel="steps", ylabel="nats", title="loss above the optimum of probabilistic PCA")
    top.legend(frameon=False)
    some = np.random.default_rng(1).choice(x.size, 3000, replace=False)
    limits = 1.05 * np.abs(x.ravel()[some]).max() * np.array([-1, 1])
    for axis, (name, prediction) in zip(below, predictions.items(), strict=True):
        axis.plot(limits, limits, color="#cccccc", linewidth=1, zorder=0)
        axis.scatter(
            prediction.ravel()[some],
            x.ravel()[some],
            s=4,
            linewidths=0,
            alpha=0.4,
            color=colours[name],
        )
        error = np.sqrt(np.mean((prediction - x) ** 2))
        axis.set(
            xlabel="predicted",
            title=f"{name}: r.m.s. error {error:.3f}",
            xlim=limits,
            ylim=limits,
            aspect="equal",
        )
    below[0].set_ylabel("observed")
    for axis in (top, *below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    return figure


def main():
    """Fit both, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="factor_model.png", help="where the picture goes")
    arguments = parser.parse_args()
    num_steps = 50 if arguments.short else 4000
    num_samples = 10 if arguments.short else 2000

    x, signal = generate()
    best = pca_optimum(x)
    print(f"optimum of probabilistic PCA: {best:.3f} nats a row")
    predictions, fitted = {"oracle": signal}, {}
    for name, vae in models().items():
        # Every step sees all rows.
        model = fv.fit_vae(
            vae,
            x,
            key=jax.random.key(0),
            num_steps=num_steps,
            batch_size=len(x),
            # The gradient of the path: its noise vanishes as q comes close to the posterior.
            objective=vae.loss(num_samples=4, path=True),
        )
        fitted[name] = model
        found = model.evaluate(jax.random.key(1), x, num_samples)
        draws = 10 if arguments.short else 100
        predictions[name] = np.asarray(model.reconstruct(jax.random.key(2), x, draws))
        print(
            f"{name}: ELBO {found.elbo.mean():.3f} nats a row (rate {found.rate.mean():.3f}, "
            f"distortion {found.distortion.mean():.3f}), {best - found.elbo.mean():.3f} below it"
        )
    for name, prediction in predictions.items():
        errors = [np.sqrt(np.mean((prediction - other) ** 2)) for other in (x, signal)]
        print(f"{name}: r.m.s. error {errors[0]:.4f} to observations, {errors[1]:.4f} to the truth")

    gap = fv.amortization_gap(
        fitted["amortized"].vae,
        fitted["amortized"].params,
        x,
        key=jax.random.key(3),
        num_steps=20 if arguments.short else 500,
        num_samples=num_samples,
    )
    print(
        f"same decoder, in nats a row: encoder {gap.encoder.mean():.3f}, refined "
        f"{gap.refined.mean():.3f}, importance-weighted {gap.importance_weighted.mean():.3f}; "
        f"amortization gap {gap.amortization.mean():.4f} (from {gap.amortization.min():.4f} to "
        f"{gap.amortization.max():.4f}), approximation gap {gap.approximation.mean():.4f}"
    )
    losses = {name: np.asarray(m.history["loss"], np.float64) for name, m in fitted.items()}
    draw(losses, best, predictions, x).savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
