"""Ten labels a class, and all other images without one: the semi-supervised model M2.

    python examples/vae_semi_supervised.py [--labels 10] [--seeds 5] [--short]

The model of scikit-learn's digits, binary, is p(y) p(z) p(x | y, z), with q(y | x) q(z | x, y).
Where the label is missing, y is summed out. Prints, for each seed, the test accuracy of q(y | x),
that of the same network trained on the labelled images alone, and at the end their mean difference
with its standard error over the seeds.

Source: Kingma, Rezende, Mohamed, Welling, "Semi-supervised Learning with Deep Generative Models",
2014.
"""

import argparse

import digits
import jax
import numpy as np
import optax

import flowvi as fv
from flowvi.networks import MLP
from flowvi.objectives import NegativeLogLikelihood

LATENT, WIDTH = 8, (64, 64)


def build(size):
    """The model: its prior of y and z, its decoder of both, and q(y | x) q(z | x, y)."""
    classes = fv.categorical((), 10, one_hot=True)
    encoder = fv.conditional(fv.gaussian(LATENT), MLP(size + 10, WIDTH, 2 * LATENT))
    return fv.VAE(
        prior=fv.joint(fv.unconditional(classes, learned=False), fv.standard_normal(LATENT)),
        likelihood=fv.conditional(fv.bernoulli(size), MLP(10 + LATENT, WIDTH, size)),
        posterior=fv.labelled(fv.joint(fv.conditional(classes, MLP(size, WIDTH, 10)), encoder)),
        context_shape=(),
    )


def accuracy_of_labels_alone(classifier, x, labels, x_test, labels_test, key):
    """The test accuracy of a classifier that sees nothing but labelled images."""
    data = {"x": np.eye(10, dtype=np.float32)[labels], "context": x}
    params, optimizer = classifier.init(key), optax.adam(1e-2)
    loss = NegativeLogLikelihood(classifier)
    options = {"key": key, "data": data, "num_steps": 300, "progress": False}
    params = fv.fit(loss, params, optimizer, **options).params
    return np.mean(classifier.distribution(params, x_test).logits.argmax(-1) == labels_test)


def main():
    """Fit both for each seed, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=10, help="how many there are of each class")
    parser.add_argument("--seeds", type=int, default=5, help="how many repetitions")
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    arguments = parser.parse_args()

    num_steps, num_seeds = (50, 1) if arguments.short else (2000, arguments.seeds)
    differences = []
    for seed in range(num_seeds):
        x, labels, x_test, labels_test = digits.load(seed=seed)
        x, x_test = (each.reshape(len(each), -1).astype(np.float32) for each in (x, x_test))
        vae, key = build(x.shape[1]), jax.random.key(seed)
        known = np.concatenate([np.flatnonzero(labels == y)[: arguments.labels] for y in range(10)])
        given = np.full(len(labels), -1)
        given[known] = labels[known]
        model = fv.fit_vae(vae, x, context=given, key=key, num_steps=num_steps, progress=False)
        accuracy = np.mean(model.classify(x_test).argmax(-1) == labels_test)
        classifier = vae.posterior.classifier
        alone = accuracy_of_labels_alone(
            classifier, x[known], labels[known], x_test, labels_test, key
        )
        differences.append(accuracy - alone)
        print(f"seed {seed}: accuracy {accuracy:.1%}, of the labels alone {alone:.1%}", flush=True)
    mean = np.mean(differences)
    if num_seeds > 1:
        error = np.std(differences, ddof=1) / num_seeds**0.5
        print(f"difference {mean:.1%}, with a standard error of {error:.1%}")


if __name__ == "__main__":
    main()
