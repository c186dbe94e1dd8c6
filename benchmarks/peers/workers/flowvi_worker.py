"""flowvi, in the environment that runs the benchmark."""

import jax
import jax.numpy as jnp
import optax
from protocol import TRAIN, Clock, jax_task, moons_data, serve, train_rows, train_target

import flowvi as fv
from flowvi.testing import perturbed

#: How two moons are fitted: arguments of `fv.maf` and of `fv.fit_density`.
MOONS_FAMILY = {}
MOONS_FIT = {}


def build(task, size):
    family = {"maf": fv.maf, "iaf": fv.iaf}[task.split("_")[0]](
        size["event_size"],
        num_layers=size["layers"],
        hidden_sizes=size["hidden"],
        transformer="affine",
        activation=size["activation"],
    )
    # A new flow is the identity; away from it there is nothing that a compiler could leave out.
    params = perturbed(family.init(jax.random.key(0)), scale=0.1, seed=0)

    def log_prob(params, x):
        return family.distribution(params).log_prob(x)

    def sample(params, key):
        return family.distribution(params).sample(seed=key, sample_shape=(size["batch"],))

    return jax_task(task, size, params, log_prob, sample)


def moons(request):
    x, test = moons_data()
    family = fv.maf(2, **MOONS_FAMILY)
    scores = []
    clock = Clock()

    def score(params):
        with clock:
            # In parts: the memory of 20,000 rows at once is no part of the comparison.
            parts = [family.log_prob(params, part) for part in test.reshape(4, -1, 2)]
            scores.append(-float(sum(part.mean() for part in parts)) / 4)
        return scores[-1] <= request["bar"]

    result = fv.fit_density(
        family,
        x,
        key=jax.random.key(request["seed"]),
        combine=False,
        progress=False,
        callback=lambda look: score(look.params),
        **MOONS_FIT | ({"num_steps": 40} if request["quick"] else {}),
    )
    seconds = clock.seconds()
    reached = scores[-1] <= request["bar"] or score(result.params)
    return {
        "seconds": seconds,
        "reached": bool(reached),
        "test_nll": scores[-1],
        "best_test_nll": min(scores),
        "steps": result.num_steps,
        "stop_reason": str(result.stop_reason),
    }


def train(what, steps):
    optimizer = optax.adam(TRAIN["rate"])
    if what == "density":
        sizes = {"num_layers": TRAIN["layers"], "hidden_sizes": [TRAIN["width"]]}
        family = fv.maf(TRAIN["event_size"], transformer="affine", activation="relu", **sizes)
        rows = train_rows()

        def fit():
            fv.fit_density(
                family,
                rows,
                key=jax.random.key(0),
                num_steps=steps,
                batch_size=TRAIN["batch"],
                optimizer=optimizer,
                patience=None,
                combine=False,
            )

        return fit
    family = fv.mean_field(TRAIN["posterior_size"])
    params = family.init(jax.random.key(1))

    def fit():
        fv.fit(negative_elbo, params, optimizer, key=jax.random.key(0), num_steps=steps)

    def negative_elbo(params, key, batch):
        del batch
        q = family.distribution(params)
        x, log_q = q.sample_and_log_prob(seed=key, sample_shape=(TRAIN["draws"],))
        return jnp.mean(log_q - jax.vmap(train_target)(x))

    return fit


if __name__ == "__main__":
    serve(["flowvi", "jax", "jaxlib", "distrax", "dm-haiku"], build, moons, train)
