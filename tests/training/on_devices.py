"""Fits on several devices, in a process that has them: python -m tests.training.on_devices ...

Without arguments it prints, for each fit, how far parameters on 4 devices are from those on one.
With an address, a number and a count it is one of so many processes, and prints its parameters.
"""

import json
import os
import sys
import tempfile

NUM_STEPS = 200


def fits():
    """{name: (options of `fit`) -> a fit}, of sizes that the devices do not divide."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowvi as fv
    from flowvi.networks import MLP

    key, rng = jax.random.key(1), np.random.default_rng(0)
    adam = optax.adam(1e-2)

    def plain(loss_fn, data=None, batch_size=None):
        params = loss_fn.init(key) if hasattr(loss_fn, "init") else loss_fn.family.init(key)
        common = {"key": key, "num_steps": NUM_STEPS, "progress": False}
        common |= {"data": data, "batch_size": batch_size}
        return lambda **options: fv.fit(loss_fn, params, adam, **(common | options))

    def of_vae(posterior, prior, batch_size, **options):
        model = fv.VAE(
            prior=prior,
            likelihood=fv.conditional(fv.bernoulli(6), MLP(2, (8,), 6)),
            posterior=posterior,
        )
        x = rng.integers(0, 2, (200, 6)).astype(float)
        objective = model.loss(**options) if options else None
        options = {"key": key, "num_steps": NUM_STEPS, "progress": False, "objective": objective}
        options["batch_size"] = batch_size
        return lambda **others: fv.fit_vae(model, x, **(options | others))

    def log_joint(params, key, z, batch):
        return -0.5 * jnp.sum((z - 1) ** 2, -1) - 0.1 * jnp.sum(z**4, -1)

    flow = fv.iaf(2, num_layers=1, hidden_sizes=[4], transformer="affine")
    density = fv.maf(2, num_layers=1, hidden_sizes=[4], transformer="affine")
    x = rng.normal(size=(300, 2))
    return {
        "density": lambda **options: fv.fit_density(
            density,
            x,
            key=key,
            **{"num_steps": NUM_STEPS, "batch_size": 50, "progress": False, **options},
            patience=None,
            combine=False,
        ),
        "path": plain(fv.objectives.ELBO(flow, log_joint, num_samples=22, path=True)),
        "iwelbo": plain(fv.objectives.IWELBO(flow, log_joint, num_samples=22)),
        "leave one out": of_vae(
            fv.conditional(fv.bernoulli(2), MLP(6, (8,), 2)),
            fv.unconditional(fv.bernoulli(2)),
            30,
            objective=fv.objectives.ScoreFunction,
            num_samples=3,
            controls=(fv.objectives.LeaveOneOut(),),
        ),
        "local": of_vae(fv.local(fv.gaussian(2), 200), fv.standard_normal(2), 30),
    }


def flat(params):
    import jax
    import numpy as np

    return np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(params)])


def distance(result, other):
    """The largest difference of two fits, relative to parameters of size 1 and above."""
    import numpy as np

    one, two = flat(result.params), flat(other.params)
    return float(np.max(np.abs(one - two) / np.maximum(np.abs(one), 1)))


def on_four():
    found, all_fits = {}, fits()
    alone = {name: fit() for name, fit in all_fits.items()}
    for name, fit in all_fits.items():
        found[name] = distance(alone[name], fit(mesh=4))
    with tempfile.TemporaryDirectory() as folder:
        options = {"checkpoint_dir": folder, "checkpoint_every": 50}
        all_fits["local"](mesh=2, callback=lambda seen: seen.step >= 100, **options)
        resumed = all_fits["local"](mesh=4, resume=True, **options)
    found["resumed"] = distance(alone["local"], resumed)
    return found | evaluations(alone["local"])


def evaluations(model):
    """How far evaluations inside of a mesh are from those outside."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import flowvi as fv
    from flowvi.posteriors.posterior import draws

    key, x = jax.random.key(2), np.random.default_rng(0).integers(0, 2, (50, 6)).astype(float)
    target, family = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2), fv.mean_field(2)
    params = family.init(key)
    functions = {
        "evaluate": lambda: model.evaluate(key, x, 3),
        "weights": lambda: draws(family, target, params, key, 1000),
    }
    found = {}
    for name, function in functions.items():
        one = function()
        with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
            over = function()
        gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), one, over)
        found[name] = float(max(jax.tree.leaves(gaps)))
    return found


def one_of_many(address, number, count, folder):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(number), heartbeat_timeout_seconds=20)
    mesh, seen = 2 * int(count), []
    fit = fits()["local"]
    options = {"checkpoint_dir": folder, "checkpoint_every": 100}
    # A callback is asked in the first process alone, and its answer ends both.
    begun = fit(mesh=mesh, callback=lambda p: seen.append(p.step) or p.step >= 100, **options)
    result = fit(mesh=mesh, resume=True, **options)
    refused = ""
    try:
        fit(mesh=mesh, batch_size=20 + int(number))
    except ValueError as error:
        refused = str(error)
    return {
        "params": flat(result.params).tolist(),
        "calls": len(seen),
        "first": begun.num_steps,
        "refused": refused,
    }


def main():
    flags = f"--xla_force_host_platform_device_count={2 if len(sys.argv) > 1 else 4}"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    found = on_four() if len(sys.argv) == 1 else one_of_many(*sys.argv[1:])
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
