"""Fit a conditional density p(y | x), and compare its moments with those of the truth.

    python examples/conditional_density.py [--short] [--output conditional_density.png]

Conditional density estimation is the same call with a context. The truth here is one branch of a
wave or the other, with noise that grows with x: no regression to a mean can describe it.
"""

import argparse

import jax
import matplotlib.pyplot as plt
import numpy as np

import flowvi as fv


def simulate(num_rows, seed):
    """Contexts x of shape [n, 1] and events y of shape [n, 1]."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 6, (num_rows, 1))
    branch = rng.choice([-1.0, 1.0], (num_rows, 1))
    noise = 0.05 + 0.05 * x
    return x, branch * (2 + np.sin(x)) + noise * rng.normal(size=(num_rows, 1))


def true_log_density(x, y):
    """Log density of the simulation."""
    noise = 0.05 + 0.05 * x
    logs = [
        -0.5 * ((y - sign * (2 + np.sin(x))) / noise) ** 2 - np.log(noise * np.sqrt(2 * np.pi))
        for sign in (-1, 1)
    ]
    return (np.logaddexp(*logs) - np.log(2))[:, 0]


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument(
        "--output", default="conditional_density.png", help="where the picture goes"
    )
    arguments = parser.parse_args()

    x, y = simulate(10_000, seed=0)
    x_test, y_test = simulate(10_000, seed=1)

    family = fv.maf(1, context_size=1)
    options = {"num_steps": 200} if arguments.short else {}
    density = fv.fit_density(family, y, context=x, key=jax.random.key(0), **options)

    flow = -float(np.mean(density.log_prob(y_test, x_test)))
    truth = -true_log_density(x_test, y_test).mean()
    print(f"test negative log-likelihood: flow {flow:.4f}, truth {truth:.4f} nats per row")

    for value in (1.0, 3.0, 5.0):
        context = np.array([value])
        samples = density.sample(jax.random.key(1), 10_000, context)
        upper = samples[samples > 0]
        print(
            f"x = {value}: share of the upper branch {len(upper) / len(samples):.3f} (0.5), "
            f"its mean {upper.mean():.3f} ({2 + np.sin(value):.3f}), "
            f"its noise {upper.std():.3f} ({0.05 + 0.05 * value:.3f})"
        )

    rows, columns = np.linspace(-4, 4, 300), np.linspace(0, 6, 300)
    events, contexts = np.meshgrid(rows, columns, indexing="ij")
    values = np.exp(density.log_prob(events[..., None], contexts[..., None]))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True)
    panels[0].scatter(x[:4000], y[:4000], s=1.5, linewidths=0, color="black")
    extent = (0, 6, -4, 4)
    # The square root keeps the faint, broad parts of the density visible.
    panels[1].imshow(values**0.5, origin="lower", extent=extent, cmap="magma_r", aspect="auto")
    for panel, title in zip(panels, ("data", "density p(y | x)"), strict=True):
        panel.set(title=title, xlabel="x", ylabel="y", xlim=extent[:2], ylim=extent[2:])
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
