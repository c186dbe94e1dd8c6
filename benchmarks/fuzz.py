"""Calls public functions with one wrong argument each, and looks at what they say.

python -m benchmarks.fuzz [--calls 400] [--seed 0] [--output benchmarks/results/fuzz.json]

A call is clear if it raises a ValueError or a TypeError that names the argument, or gives a result.
It runs under a limit of memory. Anything else (another exception, a message without the name) is
listed.
"""

import argparse
import collections
import functools
import random
import resource
import time
import warnings

from benchmarks import timing

log = functools.partial(print, flush=True)

#: Bytes of address space.
MEMORY = 16 * 2**30

#: Values that are of the wrong type, sign, size or content for nearly every argument.
VALUES = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "10**12": lambda: 10**12,
    "2**31": lambda: 2**31,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "-inf": lambda: float("-inf"),
    "a string": lambda: "flow",
    "an empty list": list,
    "a ragged list": lambda: [[1.0], [2.0, 3.0]],
    "a dict": dict,
    "an object": object,
    "a function": lambda: len,
    "an empty array": lambda: _numpy().zeros((0, 2)),
    "a large array": lambda: _numpy().ones((3, 7, 2)),
    "an array of NaN": lambda: _numpy().full((40, 2), _numpy().nan),
    "an array of text": lambda: _numpy().array([["a", "b"]]),
    "complex": lambda: _numpy().ones((40, 2), complex),
}


def _numpy():
    import numpy

    return numpy


def calls():
    """Name -> (function, the arguments of a call that works)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowvi as fv
    from flowvi.networks import MLP

    key = jax.random.key(0)
    x = np.random.default_rng(0).normal(size=(40, 2))
    family = fv.mean_field(2)
    params = family.init(key)
    given = fv.conditional(fv.gaussian(1), MLP(2, (4,), 2))
    given_params = given.init(key)
    target = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
    vae = fv.VAE(
        prior=fv.standard_normal(1),
        likelihood=fv.conditional(fv.gaussian(2), MLP(1, (4,), 4)),
        posterior=fv.conditional(fv.gaussian(1), MLP(2, (4,), 2)),
    )
    vae_params = vae.init(key)
    short = {"num_steps": 2, "progress": False}
    density = fv.fit_density(family, x, key=key, **short)

    def loss_fn(params, key, batch):
        return jnp.mean((batch - params["mean"]) ** 2)

    optimizer = optax.sgd(0.1)
    return {
        "maf": (fv.maf, {"event_size": 2, "num_layers": 1, "hidden_sizes": [4]}),
        "iaf": (fv.iaf, {"event_size": 2, "transformer": "affine", "context_size": 1}),
        "coupling": (fv.coupling, {"event_size": 2, "num_layers": 1}),
        "mean_field": (fv.mean_field, {"event_size": 2}),
        "full_rank": (fv.full_rank, {"event_size": 2}),
        "gaussian": (fv.gaussian, {"event_shape": 2, "scale": "predicted"}),
        "bernoulli": (fv.bernoulli, {"event_shape": 2}),
        "categorical": (fv.categorical, {"event_shape": 2, "num_classes": 3}),
        "mixture": (fv.mixture, {"event_shape": 2, "num_components": 2}),
        "conditional": (fv.conditional, {"family": fv.gaussian(1), "network": MLP(2, (4,), 2)}),
        "unconditional": (fv.unconditional, {"family": fv.gaussian(1), "learned": True}),
        "local": (fv.local, {"family": fv.gaussian(1), "num_rows": 3}),
        "standardized": (fv.standardized, {"family": family, "support": "positive"}),
        "whitened": (fv.whitened, {"family": family, "rank": 1}),
        "Permutation": (fv.Permutation, {"permutation": [1, 0]}),
        "Plateau": (fv.Plateau, {"window": 10, "patience": 2, "tolerance": 0.1}),
        "Target": (fv.Target, {"log_density": target.log_density, "event_size": 2, "layout": None}),
        "log_prob": (family.log_prob, {"params": params, "x": x}),
        "sample": (family.sample, {"params": params, "key": key, "sample_shape": 3}),
        "log_prob given": (given.log_prob, {"params": given_params, "x": x[:, :1], "context": x}),
        "Density.log_prob": (density.log_prob, {"x": x}),
        "Density.sample": (density.sample, {"key": key, "sample_shape": 3}),
        "fit_density": (
            fv.fit_density,
            {
                "family": family,
                "x": x,
                "key": key,
                "support": None,
                "validation_fraction": 0.1,
                "patience": 3,
                "batch_size": 20,
                "averaging": 0.9,
                "optimizer": optimizer,
                "max_bad_steps": 3,
                **short,
            },
        ),
        "fit": (
            fv.fit,
            {
                "loss_fn": loss_fn,
                "params": {"mean": jnp.zeros(2)},
                "optimizer": optimizer,
                "key": key,
                "data": x,
                "batch_size": 20,
                "validation_data": x,
                "validate_every": 1,
                "patience": 3,
                "plateau": None,
                "checkpoint_every": None,
                "resume": False,
                "callback": None,
                **short,
            },
        ),
        "fit_posterior": (
            fv.fit_posterior,
            {"target": target, "key": key, "family": family, "num_samples": 4, **short},
        ),
        "fit_vae": (
            fv.fit_vae,
            {"vae": vae, "x": x, "key": key, "batch_size": 20, "weights": np.ones(40), **short},
        ),
        "VAE.elbo": (vae.elbo, {"params": vae_params, "key": key, "x": x, "num_samples": 2}),
        "VAE.sample": (vae.sample, {"params": vae_params, "key": key, "sample_shape": 2}),
        "load": (fv.load, {"path": "/nonexistent/flow.flowvi"}),
    }


def outcome(function, arguments, name):
    """("result" | "clear" | "unclear", what was said)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
    except (ValueError, TypeError) as error:
        text = str(error)
        return (
            "clear" if name in text.split("\n")[0] else "unclear"
        ), f"{type(error).__name__}: {text}"
    except FileNotFoundError as error:
        return "clear", str(error)
    except Exception as error:
        return "unclear", f"{type(error).__name__}: {error}"
    return "result", ""


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="benchmarks/results/fuzz.json")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    known = calls()
    every = [
        (name, argument, value)
        for name, (_, arguments) in known.items()
        for argument in arguments
        for value in VALUES
    ]
    chosen = random.Random(args.seed).sample(every, args.calls)
    counts, unclear = collections.Counter(), []
    for name, argument, value in chosen:
        function, arguments = known[name]
        begun = time.perf_counter()
        verdict, said = outcome(function, arguments | {argument: VALUES[value]()}, argument)
        counts[verdict] += 1
        if verdict == "unclear":
            unclear.append({"call": name, "argument": argument, "value": value, "said": said[:300]})
            log(f"{name}({argument}={value}): {said[:200]}")
        if (seconds := time.perf_counter() - begun) > 20:
            log(f"{name}({argument}={value}) took {seconds:.0f} s")
    share = len(unclear) / args.calls
    results = {
        "environment": timing.environment("flowvi", "jax", "numpy"),
        "counts": dict(counts),
        "unclear": unclear,
    }
    text = (
        f"# Wrong arguments\n\n{timing.environment_line(results['environment'])}\n\n"
        f"Of {args.calls} calls with one wrong argument {counts['clear']} ended with an error that "
        f"names it, {counts['result']} with a result, {len(unclear)} ({share:.1%}) otherwise.\n"
    )
    timing.write(args.output, results, text)
    log(text)
    raise SystemExit(share > 0.01)


if __name__ == "__main__":
    main()
