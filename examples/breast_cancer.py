"""Bayesian logistic regression on scikit-learn's breast cancer data: a picture and a diagnosis.

    python examples/breast_cancer.py [--short] [--output breast_cancer.png]

A quarter of the rows is held out; the posterior's predictions are scored on it beside those of the
best single point.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import flowvi as fv
from flowvi import plotting

jax.config.update("jax_enable_x64", True)


def main():
    """Fit, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="breast_cancer.png", help="where the picture goes")
    arguments = parser.parse_args()

    x, y = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0)
    mean, sd = x_train.mean(0), x_train.std(0)
    x_train, x_test = (x_train - mean) / sd, (x_test - mean) / sd

    def log_density(p):
        """Logistic regression whose weights have a common, unknown scale."""
        logits = x_train @ p["weights"] + p["intercept"]
        likelihood = jnp.sum(y_train * logits - jax.nn.softplus(logits))
        prior = -0.5 * jnp.sum((p["weights"] / p["scale"]) ** 2)
        prior -= len(p["weights"]) * jnp.log(p["scale"])
        return likelihood + prior - 0.5 * (p["intercept"] / 5) ** 2 - 0.5 * p["scale"] ** 2

    target = fv.Target.from_named(
        log_density,
        {"weights": ((30,), "real"), "intercept": ((), "real"), "scale": ((), "positive")},
    )
    options = {"num_steps": 200} if arguments.short else {}
    posterior = fv.fit_posterior(target, key=jax.random.key(0), **options)

    def score(draws):
        """Mean log probability of the held-out labels under the mean prediction of the draws."""
        logits = draws["weights"] @ x_test.T + draws["intercept"][:, None]
        chance = np.clip(jax.nn.sigmoid(logits).mean(0), 1e-12, 1 - 1e-12)
        return np.mean(np.where(y_test == 1, np.log(chance), np.log1p(-chance)))

    draws = posterior.sample(jax.random.key(1), 4_000)
    point = posterior.constrain(posterior.start.mode[None])
    print(posterior.summary(jax.random.key(2)))
    print()
    print(f"held-out log score a row: posterior {score(draws):.4f}, its mode {score(point):.4f}")
    print(posterior.diagnosis)

    figure = plotting.marginals(posterior, jax.random.key(3), names=["scale", "weights"])
    figure.savefig(arguments.output, dpi=80)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
