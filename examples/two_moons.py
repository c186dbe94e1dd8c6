"""Fit a density to two moons, compare it with the truth, draw a picture.

    python examples/two_moons.py [--short] [--output two_moons.png]

Prints the negative log-likelihood per point, in nats, of the fitted flow on its training points and
on 20,000 fresh ones, beside that of the true density on the same points.
"""

import argparse
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import logsumexp
from sklearn.datasets import make_moons

import flowvi as fv

NOISE = 0.05


def true_log_density(x, num_angles=2000):
    """Log density of two half circles with noise: a mean of normals over the angle."""
    angle = (np.arange(num_angles) + 0.5) / num_angles * np.pi
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
    centers = np.concatenate([upper, lower])
    log_density = []
    for rows in np.array_split(x, max(1, len(x) // 500)):
        squares = ((rows[:, None] - centers) ** 2).sum(-1)
        log_density.append(logsumexp(-squares / (2 * NOISE**2), axis=1))
    return np.concatenate(log_density) - np.log(len(centers) * 2 * np.pi * NOISE**2)


def draw(path, x, density):
    """Data, density and samples side by side."""
    low, high = x.min(0) - 0.3, x.max(0) + 0.3
    axes = [np.linspace(a, b, 300, dtype=np.float32) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes), -1)
    values = np.exp(density.log_prob(grid))
    samples = density.sample(jax.random.key(1), 4000)
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharex=True, sharey=True)
    extent = (low[0], high[0], low[1], high[1])
    panels[0].scatter(*x[:4000].T, s=1.5, linewidths=0, color="black")
    panels[1].imshow(values, origin="lower", extent=extent, cmap="magma_r", aspect="auto")
    panels[2].scatter(*samples.T, s=1.5, linewidths=0, color="black")
    for panel, title in zip(panels, ("data", "density", "samples"), strict=True):
        panel.set(title=title, xlim=extent[:2], ylim=extent[2:])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="two_moons.png", help="where the picture goes")
    arguments = parser.parse_args()

    x, _ = make_moons(10_000, noise=NOISE, random_state=1)
    x_test, _ = make_moons(20_000, noise=NOISE, random_state=99)

    start = time.perf_counter()
    options = {"num_steps": 200} if arguments.short else {}
    density = fv.fit_density(fv.maf(2), x, key=jax.random.key(0), **options)
    seconds = time.perf_counter() - start

    # A change of units adds a constant to both densities; these units make runs comparable.
    log_units = np.log(x.std(0)).sum()
    print(f"{density.num_steps} steps in {seconds:.1f} s, stopped by {density.stop_reason}")
    print("negative log-likelihood in nats per point, of standardised data")
    print(f"{'':8}{'flow':>10}{'truth':>10}{'gap':>10}")
    for name, points in (("train", x), ("test", x_test)):
        flow = -float(np.mean(density.log_prob(points))) - log_units
        truth = -true_log_density(points).mean() - log_units
        print(f"{name:8}{flow:10.4f}{truth:10.4f}{flow - truth:10.4f}")

    draw(arguments.output, x, density)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
