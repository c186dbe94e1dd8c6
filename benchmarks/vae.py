"""VAEs of MNIST: what a flow posterior brings, what it costs, and what the library costs.

python -m benchmarks.vae --data FOLDER [--quick] [--seeds 3] [--output benchmarks/results/vae.json]
python -m benchmarks.vae --data FOLDER --only speed          the rest stays as it is in the output
python -m benchmarks.vae --data FOLDER --only quality --posteriors coupling

FOLDER holds the four idx files of MNIST or Fashion-MNIST. Pixels are binarised once with a fixed
seed. Networks have two hidden layers of 512, there are 128 latents, batches of 128, 30,000 steps,
and all else is what `fit_vae` does by default.

    the test ELBO, rate, distortion and log likelihood (1,000 importance samples) of a Gaussian and
    an IAF posterior, the median over seeds, and of a coupling posterior with one seed
    steps a second of each, and of the Gaussian VAE as a hand-written compiled loop, in turn
"""

import argparse
import functools
import gzip
import itertools
import json
import pathlib
import statistics
import time

from benchmarks import timing
from benchmarks.training import terminal

log = functools.partial(print, flush=True)

LATENT, WIDTH, BATCH_SIZE = 128, 512, 128

#: The widths of the conditioners of both flows.
FLOW_WIDTH = 320

POSTERIORS = ("Gaussian", "IAF", "coupling")


def read_images(folder, name):
    """Grey levels in [0, 1], of shape [n, 784]."""
    import numpy as np

    found = sorted(pathlib.Path(folder).glob(f"{name}-images*idx3*"))
    if not found:
        raise SystemExit(f"there is no file {name}-images-idx3-ubyte(.gz) in {folder}")
    opener = gzip.open if found[0].suffix == ".gz" else open
    with opener(found[0], "rb") as file:
        content = file.read()
    pixels = np.frombuffer(content, np.uint8, offset=16)
    return pixels.reshape(int.from_bytes(content[4:8]), -1) / np.float32(255)


def load(folder):
    """(training rows, test rows), binarised once."""
    import numpy as np

    rng = np.random.default_rng(0)
    grey = [read_images(folder, name) for name in ("train", "t10k")]
    return [(rng.random(each.shape, np.float32) < each).astype(np.uint8) for each in grey]


def model(size, prior, posterior):
    """A VAE of binary images; `posterior` takes what the encoder says as context."""
    import flowvi as fv
    from flowvi.networks import MLP

    hidden, (latent,) = (WIDTH, WIDTH), prior.event_shape
    encoder = MLP(size, hidden, posterior.context_shape)
    return fv.VAE(
        prior=prior,
        likelihood=fv.conditional(fv.bernoulli(size), MLP(latent, hidden, size)),
        posterior=fv.conditional(posterior, encoder),
    )


def models(size):
    """The same model with each posterior, by name."""
    import flowvi as fv

    gaussian = fv.gaussian(LATENT)
    # Both flows start from the Gaussian, and see what the encoder says of it.
    options = {
        "hidden_sizes": [FLOW_WIDTH],
        "transformer": "affine",
        "context_size": 2 * LATENT,
        "base": gaussian,
    }
    bases = {
        "Gaussian": gaussian,
        "IAF": fv.iaf(LATENT, num_layers=2, **options),
        "coupling": fv.coupling(LATENT, num_layers=4, **options),
    }
    prior = fv.standard_normal(LATENT)
    return {name: model(size, prior, base) for name, base in bases.items()}


# -------------------------------------------------------------------------------- quality


def quality(x, x_test, names, seeds, num_steps, num_samples, save):
    """Test bounds of each posterior and seed, in nats; `save` is called after each."""
    import jax

    import flowvi as fv

    results = {}
    # The coupling flow is here for comparison, and has one seed.
    runs = [(s, name) for s in range(seeds) for name in names if s == 0 or name != "coupling"]
    for seed, name in runs:
        vae = models(x.shape[1])[name]
        result = fv.fit_vae(
            vae,
            x,
            key=jax.random.key(seed),
            num_steps=num_steps,
            batch_size=BATCH_SIZE,
            progress=False,
        )
        begun = time.perf_counter()
        found = result.evaluate(jax.random.key(1), x_test, num_samples)
        row = {field: float(getattr(found, field).mean()) for field in found._fields}
        row["training_elbo"] = -float(result.history["loss"][-500:].mean())
        row["images_per_second"] = num_steps * BATCH_SIZE / result.seconds
        row["evaluation_seconds"] = time.perf_counter() - begun
        row["bad_steps"] = result.num_bad_steps
        results.setdefault(name, []).append(row)
        log(f"  seed {seed}, {name}: {row}")
        save(results)
    return results


def medians(rows):
    """The median of each number over seeds."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


# ---------------------------------------------------------------------------------- speed


def hand_written(x, num_steps):
    """The Gaussian VAE as one would write it by hand: a compiled loop without anything else."""
    import jax
    import jax.numpy as jnp
    import optax

    size = x.shape[1]
    schedule = optax.warmup_cosine_decay_schedule(1e-4, 1e-3, min(num_steps // 10, 500), num_steps)
    optimizer = optax.adam(schedule)

    def init(key, sizes):
        pairs = list(itertools.pairwise(sizes))
        keys = jax.random.split(key, len(pairs))
        return [
            (jax.random.normal(k, pair) / pair[0] ** 0.5, jnp.zeros(pair[1]))
            for k, pair in zip(keys, pairs, strict=True)
        ]

    def apply(layers, h):
        for index, (w, b) in enumerate(layers):
            h = (jax.nn.silu(h) if index else h) @ w + b
        return h

    def loss(params, key, rows):
        loc, raw = jnp.split(apply(params["encoder"], rows), 2, axis=-1)
        scale = jax.nn.softplus(raw)
        z = loc + scale * jax.random.normal(key, loc.shape)
        logits = apply(params["decoder"], z)
        distortion = jnp.sum(jax.nn.softplus(logits) - rows * logits, -1)
        rate = 0.5 * jnp.sum(scale**2 + loc**2 - 1 - 2 * jnp.log(scale), -1)
        return jnp.mean(distortion + rate)

    num_rows = x.shape[0]
    per_epoch = num_rows // BATCH_SIZE

    def step(index, carry):
        params, state, order, key, data = carry
        order = jax.lax.cond(
            index % per_epoch == 0,
            lambda: jax.random.permutation(jax.random.fold_in(key, index), num_rows),
            lambda: order,
        )
        place = index % per_epoch * BATCH_SIZE
        picked = jax.lax.dynamic_slice_in_dim(order, place, BATCH_SIZE)
        rows = data[picked].astype(jnp.float32)
        gradient = jax.grad(loss)(params, jax.random.fold_in(key, index), rows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, order, key, data

    @jax.jit
    def train(key, data):
        keys = jax.random.split(key, 3)
        params = {
            "encoder": init(keys[0], (size, WIDTH, WIDTH, 2 * LATENT)),
            "decoder": init(keys[1], (LATENT, WIDTH, WIDTH, size)),
        }
        carry = params, optimizer.init(params), jnp.arange(num_rows), keys[2], data
        return jax.lax.fori_loop(0, num_steps, step, carry)[0]

    data = jnp.asarray(x)
    return lambda: jax.block_until_ready(train(jax.random.key(0), data))


def speed(x, num_steps, budget):
    """Steps a second of the hand-written loop and of `fit_vae` with each posterior, in turn."""
    import jax

    import flowvi as fv

    def fitting(vae):
        # Its own clock, from the first step on: the checks of the data are no part of a step.
        return lambda: (
            fv.fit_vae(
                vae, x, key=jax.random.key(0), num_steps=num_steps, batch_size=BATCH_SIZE
            ).seconds
        )

    calls = {"hand-written loop": functools.partial(timing.seconds_of, hand_written(x, num_steps))}
    calls |= {name: fitting(vae) for name, vae in models(x.shape[1]).items()}
    with terminal():
        times = timing.interleaved(calls, budget=budget, most=9, time_call=lambda call: call())
    seconds = {name: value["median"] for name, value in times.items()}
    return {
        "steps": num_steps,
        "repeats": {name: value["repeats"] for name, value in times.items()},
        "steps_per_second": {name: num_steps / value for name, value in seconds.items()},
        "images_per_second": {
            name: num_steps * BATCH_SIZE / value for name, value in seconds.items()
        },
        "throughput": seconds["hand-written loop"] / seconds["Gaussian"],
        "cost": {name: seconds[name] / seconds["Gaussian"] for name in ("IAF", "coupling")},
    }


# --------------------------------------------------------------------------------- report


def bars(results):
    """Dicts of "what", "value", "bar", "met"."""
    table = []

    def add(what, value, sign, bar):
        met = value >= bar if sign == "≥" else value <= bar
        table.append({"what": what, "value": value, "bar": f"{sign} {bar:g}", "met": bool(met)})

    if results.get("quality"):
        gaussian, iaf = (medians(results["quality"][name]) for name in ("Gaussian", "IAF"))
        add("Gaussian posterior, test ELBO", gaussian["elbo"], "≥", -95.0)
        add("Gaussian posterior, log p(x)", gaussian["log_likelihood"], "≥", -90.2)
        add("IAF posterior, test ELBO", iaf["elbo"], "≥", -93.0)
        add("IAF posterior, log p(x)", iaf["log_likelihood"], "≥", -88.9)
        pairs = list(zip(results["quality"]["IAF"], results["quality"]["Gaussian"], strict=True))
        for field, what in (("elbo", "test ELBO"), ("log_likelihood", "log p(x)")):
            gain = statistics.median(one[field] - other[field] for one, other in pairs)
            add(f"IAF over Gaussian, {what}", gain, "≥", 1.3)
    if "speed" in results:
        add("throughput against the hand-written loop", results["speed"]["throughput"], "≥", 0.95)
        cost = results["speed"]["cost"]["IAF"]
        add("a step with the IAF posterior, in Gaussian ones", cost, "≤", 1.6)
    return table


def report(results):
    """All of it as Markdown."""
    parts = ["# VAEs of MNIST\n", timing.environment_line(results["environment"]) + "\n"]
    if "quality" in results:
        fields = ("elbo", "rate", "distortion", "log_likelihood", "training_elbo")
        parts.append(
            f"Medians over seeds, in nats an image; {results['steps']} steps, log p(x) from "
            f"{results['samples']} importance samples.\n"
        )
        rows = []
        for name, each in results["quality"].items():
            median = medians(each)
            rows.append([name, str(len(each)), *(f"{median[field]:.2f}" for field in fields)])
        header = [
            "posterior",
            "seeds",
            "ELBO",
            "rate",
            "distortion",
            "log p(x)",
            "ELBO in training",
        ]
        parts.append(timing.table(header, rows))
    if "speed" in results:
        rows = [
            [name, timing.number(value), f"{results['speed']['images_per_second'][name]:.0f}"]
            for name, value in results["speed"]["steps_per_second"].items()
        ]
        parts.append(timing.table(["", "steps/s", "images/s"], rows))
    rows = [
        [row["what"], f"{row['value']:.2f}", row["bar"], "yes" if row["met"] else "no"]
        for row in results["bars"]
    ]
    parts.append(timing.table(["", "measured", "bar", "met"], rows))
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__)
    parser.add_argument("--data", required=True, help="a folder of MNIST's idx files")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that all runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=["quality", "speed"], help="one half of it")
    parser.add_argument("--posteriors", default=",".join(POSTERIORS), help="whose quality")
    parser.add_argument("--output", default="benchmarks/results/vae.json")
    args = parser.parse_args()
    quick, seeds = args.quick, 1 if args.quick else args.seeds
    num_steps, num_samples = (300, 10) if quick else (30_000, 1000)
    x, x_test = load(args.data)
    begun = time.perf_counter()
    results = {
        "environment": timing.environment("flowvi", "jax", "jaxlib", "optax"),
        "steps": num_steps,
        "samples": num_samples,
    }

    kept = {}
    if args.only and pathlib.Path(args.output).exists():
        before = json.loads(pathlib.Path(args.output).read_text())
        if (before["steps"], before["samples"]) == (num_steps, num_samples):
            results |= {name: before[name] for name in ("quality", "speed") if name in before}
            kept = results.get("quality", {})

    def save(**parts):
        results.update(parts)
        results["seconds"] = time.perf_counter() - begun
        # Nothing to compare before both of a seed are there.
        counts = [len(results.get("quality", {}).get(name, ())) for name in ("Gaussian", "IAF")]
        if counts[0] == counts[1] and ("speed" in results or counts[0]):
            results["bars"] = bars(results)
            timing.write(args.output, results, report(results))

    if args.only != "quality":
        log("speed ...")
        save(speed=speed(x, 100 if quick else 2000, budget=3 if quick else 80))
        log(f"  {results['speed']}")
    if args.only != "speed":
        log("quality ...")
        quality(
            x,
            x_test[:500] if quick else x_test,
            args.posteriors.split(","),
            seeds,
            num_steps,
            num_samples,
            lambda found: save(quality=kept | found),
        )
    log(report(results))


if __name__ == "__main__":
    main()
