"""Binary latents on MNIST by score function: what control variates bring.

python -m benchmarks.discrete --data FOLDER [--quick] [--seeds 1] [--output ...]

FOLDER holds the four idx files of MNIST. The model is that of `benchmarks.vae` with 200 binary
latents and a learned Bernoulli prior; batches of 128, 4 draws of each row in a step, 20,000 steps,
and all else is what `fit_vae` does by default. Fits differ in their control variates alone:

    none              the bare score function
    baseline          a network's prediction of the signal from the image
    leave-one-out     the mean signal of the row's other draws
    both              the baseline, and then leave-one-out

    the test ELBO, rate, distortion and log likelihood (100 importance samples), medians over seeds
    the variance of the encoder's gradient on one batch: of each fit's own estimator at its own
    parameters, and of every estimator at the parameters of the fit with both
"""

import argparse
import functools
import time

from benchmarks import timing
from benchmarks.vae import BATCH_SIZE, load, medians, model

log = functools.partial(print, flush=True)

LATENT, NUM_SAMPLES = 200, 4

#: The two that the bar is about, and what each part of the chain does alone.
NAMES = ("none", "both", "baseline", "leave-one-out")


def controls(name, size):
    """The chain of control variates of a fit."""
    from flowvi import objectives as ob
    from flowvi.networks import MLP

    baseline, leave = ob.LearnedBaseline(MLP(size, (100,), 1)), ob.LeaveOneOut()
    return {
        "none": (),
        "baseline": (baseline,),
        "leave-one-out": (leave,),
        "both": (baseline, leave),
    }[name]


def objective(vae, name):
    """The loss of a fit."""
    from flowvi import objectives as ob

    chain = controls(name, vae.event_shape[0])
    return vae.loss(ob.ScoreFunction, num_samples=NUM_SAMPLES, controls=chain)


def variance(vae, name, params, batch, num_draws):
    """The variance of the encoder's gradient, summed over its parameters."""
    import jax

    from flowvi import objectives as ob

    moments = ob.gradient_moments(
        objective(vae, name), params, jax.random.key(2), batch, num_draws=num_draws
    )
    return float(moments.total_variance)


def fit(vae, name, x, x_test, seed, num_steps, num_samples):
    """(what is to be reported of a fit, its parameters)."""
    import jax

    import flowvi as fv

    result = fv.fit_vae(
        vae,
        x,
        key=jax.random.key(seed),
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        objective=objective(vae, name),
        progress=False,
    )
    found = result.evaluate(jax.random.key(1), x_test, num_samples)
    row = {field: float(getattr(found, field).mean()) for field in found._fields}
    row["training_elbo"] = -float(result.history["loss"][-500:].mean())
    row["steps_per_second"] = num_steps / result.seconds
    row["bad_steps"] = result.num_bad_steps
    return row, result.params


def quality(x, x_test, names, seeds, num_steps, num_samples, num_draws, save):
    """Bounds and variances of each fit and seed; `save` is called after each seed."""
    import flowvi as fv

    vae = model(x.shape[1], fv.unconditional(fv.bernoulli(LATENT)), fv.bernoulli(LATENT))
    batch = {"x": x[:BATCH_SIZE]}
    results = {}
    for seed in range(seeds):
        for name in names:
            row, params = fit(vae, name, x, x_test, seed, num_steps, num_samples)
            row["own_variance"] = variance(vae, name, params, batch, num_draws)
            if name == "both":
                states = {
                    "none": (),
                    "leave-one-out": ((),),
                    "baseline": params["control"][:1],
                    "both": params["control"],
                }
                for other, state in states.items():
                    there = {**params, "control": state}
                    row[f"variance of {other}"] = variance(vae, other, there, batch, num_draws)
            results.setdefault(name, []).append(row)
            log(f"  seed {seed}, {name}: {row}")
        save(results)
    return results


# --------------------------------------------------------------------------------- report


def bars(found):
    """Dicts of "what", "value", "bar", "met"."""
    gain = found["both"]["elbo"] - found["none"]["elbo"]
    what = "test ELBO, with control variates above without"
    return [{"what": what, "value": gain, "bar": "≥ 2", "met": bool(gain >= 2)}]


def report(results):
    """All of it as Markdown."""
    found = {name: medians(rows) for name, rows in results["quality"].items()}
    fields = ("elbo", "rate", "distortion", "log_likelihood", "training_elbo")
    rows = [
        [
            name,
            *(f"{row[field]:.2f}" for field in fields),
            f"{row['own_variance']:.3g}",
            timing.number(row["steps_per_second"]),
        ]
        for name, row in found.items()
    ]
    header = ["control variates", "ELBO", "rate", "distortion", "log p(x)", "ELBO in training"]
    header += ["variance of the gradient", "steps/s"]
    parts = [
        "# Binary latents on MNIST\n",
        timing.environment_line(results["environment"]) + "\n",
        f"{LATENT} binary latents, {NUM_SAMPLES} draws of a row in each of {results['steps']} "
        f"steps; medians over {results['seeds']} seeds, in nats an image.\n",
        timing.table(header, rows),
    ]
    both = found["both"]
    variances = {name: both[f"variance of {name}"] for name in NAMES}
    parts.append("The variance of each estimator at the parameters of the fit with both:\n")
    rows = [
        [name, f"{value:.3g}", f"{value / variances['none']:.2g}"]
        for name, value in variances.items()
    ]
    parts.append(timing.table(["control variates", "variance", "of that of none"], rows))
    rows = [
        [row["what"], f"{row['value']:.2f}", row["bar"], "yes" if row["met"] else "no"]
        for row in results["bars"]
    ]
    parts.append(timing.table(["", "measured", "bar", "met"], rows))
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.discrete", description=__doc__)
    parser.add_argument("--data", required=True, help="a folder of MNIST's idx files")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that all runs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="also each part of the chain alone")
    parser.add_argument("--output", default="benchmarks/results/discrete.json")
    args = parser.parse_args()
    num_steps, num_samples, num_draws = (30, 10, 4) if args.quick else (20_000, 100, 200)
    x, x_test = load(args.data)
    begun = time.perf_counter()
    seeds = 1 if args.quick else args.seeds
    results = {
        "environment": timing.environment("flowvi", "jax", "jaxlib", "optax"),
        "steps": num_steps,
        "samples": num_samples,
        "seeds": seeds,
    }

    def save(found):
        results["quality"] = found
        results["bars"] = bars({name: medians(rows) for name, rows in found.items()})
        results["seconds"] = time.perf_counter() - begun
        timing.write(args.output, results, report(results))

    names = NAMES if args.all else NAMES[:2]
    x_test = x_test[:200] if args.quick else x_test
    quality(x, x_test, names, seeds, num_steps, num_samples, num_draws, save)
    log(report(results))


if __name__ == "__main__":
    main()
