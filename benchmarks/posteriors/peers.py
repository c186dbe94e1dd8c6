"""What other libraries make of the same targets, kept in a JSON file with their versions.

python -m benchmarks.posteriors.peers [--data FOLDER] [--targets funnel,banana] [--seeds 3]
    [--methods numpyro_mvn,numpyro_iaf,numpyro_bnaf,flowjax_stl,blackjax_pathfinder,blackjax_mfvi]

It needs nothing of flowvi's, so it may run in another environment than flowvi does: the libraries
asked for must be importable there. Methods whose library is missing are left out. Each method maps
a log density to a function that draws from its fit and gives log p - log q.
"""

import argparse
import functools
import json
import os
import pathlib
import time

from benchmarks import timing
from benchmarks.posteriors import measures, targets

log = functools.partial(print, flush=True)

STEPS, PARTICLES, RATE = 10_000, 16, 1e-3


def numpyro_guide(name):
    """Adam 1e-3, 10,000 steps, 16 particles; the guide's own start."""

    def method(log_density, size, key):
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist
        from numpyro.infer import SVI, Trace_ELBO, autoguide

        def model():
            u = numpyro.sample("u", dist.ImproperUniform(dist.constraints.real_vector, (), (size,)))
            numpyro.factor("log_density", log_density(u))

        guide = getattr(autoguide, name)(model)
        svi = SVI(model, guide, numpyro.optim.Adam(RATE), Trace_ELBO(PARTICLES))
        fitted = svi.run(key, STEPS, progress_bar=False)
        posterior = guide.get_posterior(fitted.params)

        @functools.partial(jax.jit, static_argnums=1)
        def sample(key, count):
            if isinstance(posterior, dist.TransformedDistribution):
                u, intermediates = posterior.sample_with_intermediates(key, (count,))
                log_q = posterior.log_prob(u, intermediates)
            else:
                u = posterior.sample(key, (count,))
                log_q = posterior.log_prob(u)
            return u, jax.vmap(log_density)(u) - jnp.asarray(log_q)

        return sample

    return method


def flowjax_stl(log_density, size, key):
    """A masked autoregressive flow, inverted, with its sticking-the-landing loss."""
    import equinox as eqx
    import jax
    import optax
    from flowjax.distributions import StandardNormal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_key_based_loss
    from flowjax.train.losses import ElboLoss

    flow_key, fit_key = jax.random.split(key)
    flow = masked_autoregressive_flow(
        flow_key, base_dist=StandardNormal((size,)), invert=False, flow_layers=4, nn_width=64
    )
    loss = ElboLoss(log_density, num_samples=PARTICLES, stick_the_landing=True)
    fitted, _ = fit_to_key_based_loss(
        fit_key,
        flow,
        loss_fn=loss,
        steps=STEPS,
        optimizer=optax.adam(RATE),
        show_progress=False,
    )

    @functools.partial(eqx.filter_jit)
    def sample(key, count):
        u, log_q = fitted.sample_and_log_prob(key, (count,))
        return u, jax.vmap(log_density)(u) - log_q

    return sample


def blackjax_pathfinder(log_density, size, key):
    """A single path from a standard normal draw."""
    import blackjax
    import jax

    start_key, run_key = jax.random.split(key)
    start = jax.random.normal(start_key, (size,))
    state, _ = jax.jit(
        lambda key: blackjax.vi.pathfinder.approximate(key, log_density, start, 200)
    )(run_key)

    @functools.partial(jax.jit, static_argnums=1)
    def sample(key, count):
        u, log_q = blackjax.vi.pathfinder.sample(key, state, count)
        return u, jax.vmap(log_density)(u) - log_q

    return sample


def blackjax_mfvi(log_density, size, key):
    """A normal distribution with independent coordinates."""
    import blackjax
    import jax
    import jax.numpy as jnp
    import optax

    algorithm = blackjax.meanfield_vi(log_density, optax.adam(RATE * 10), PARTICLES)

    @jax.jit
    def train(key):
        state = algorithm.init(jnp.zeros(size))
        step = lambda state, key: (algorithm.step(key, state)[0], None)  # noqa: E731
        return jax.lax.scan(step, state, jax.random.split(key, STEPS))[0]

    state = train(key)

    @functools.partial(jax.jit, static_argnums=1)
    def sample(key, count):
        scale = jnp.exp(state.rho)
        z = jax.random.normal(key, (count, size))
        u = state.mu + scale * z
        log_q = jnp.sum(-0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi) - state.rho, -1)
        return u, jax.vmap(log_density)(u) - log_q

    return sample


METHODS = {
    "numpyro_mvn": numpyro_guide("AutoMultivariateNormal"),
    "numpyro_iaf": numpyro_guide("AutoIAFNormal"),
    "numpyro_bnaf": numpyro_guide("AutoBNAFNormal"),
    "flowjax_stl": flowjax_stl,
    "blackjax_pathfinder": blackjax_pathfinder,
    "blackjax_mfvi": blackjax_mfvi,
}


def run(method, case, seed, num_draws):
    import jax
    import numpy as np

    start = time.perf_counter()
    sample = METHODS[method](case.log_density, case.size, jax.random.key(seed))
    jax.block_until_ready(sample(jax.random.key(5), 1000))
    seconds = time.perf_counter() - start
    draw_key = jax.random.key(1000 + seed)
    u, weights = measures.draws_of(
        sample, lambda index: jax.random.fold_in(draw_key, index), num_draws
    )
    result = measures.of_weights(weights, case.log_z) | {"seconds": seconds}
    if case.mean is not None:
        values = np.asarray(jax.jit(jax.vmap(case.constrain))(u[:50_000]))
        result |= measures.of_moments(values, case.mean, case.sd)
    return {name: value if np.isfinite(value) else None for name, value in result.items()}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posteriors.peers")
    parser.add_argument("--data", default=os.environ.get("FLOWVI_DATA"))
    parser.add_argument("--targets")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--output", default="benchmarks/results/posteriors_peers.json")
    args = parser.parse_args()

    import jax

    jax.config.update("jax_enable_x64", True)
    path = pathlib.Path(args.output)
    results = {"versions": {}, "targets": {}}
    if path.exists():
        results = json.loads(path.read_text())
    results["versions"] |= timing.versions("jax", "numpyro", "flowjax", "blackjax")
    names = args.targets.split(",") if args.targets else targets.names(args.data)
    for name in names:
        if name == "cox" and not args.targets:
            continue
        case = targets.load(name, args.data)
        entry = results["targets"].setdefault(name, {})
        for method in args.methods.split(","):
            runs = []
            for seed in range(args.seeds):
                try:
                    runs.append(run(method, case, seed, args.draws))
                except ImportError as error:
                    log(f"{method}: {error}")
                    break
                except Exception as error:  # a benchmark goes on
                    runs.append({"error": repr(error)[:500]})
                log(f"{name}, {method}, seed {seed}: {runs[-1]}")
            if runs:
                entry[method] = runs
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
