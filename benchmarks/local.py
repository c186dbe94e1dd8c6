"""What parameters per row cost, and what amortization costs.

python -m benchmarks.local [--quick] [--output benchmarks/results/local.json]

    a step on the same batch, with a million rows of 32 parameters each against a thousand
    the linear factor model of `examples/factor_model.py`: both posteriors against the optimum of
        probabilistic PCA, and the amortized against refined ones with the same decoder
"""

import argparse
import functools
import time

from benchmarks import timing

log = functools.partial(print, flush=True)

LATENT, SIZE, WIDTH, BATCH_SIZE = 16, 64, 64, 256


# ----------------------------------------------------------------------------------- cost


def fitting(num_rows, num_steps):
    """What returns the seconds of a step with so many rows, start and compilation left out."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowvi as fv
    from flowvi.networks import MLP

    vae = fv.VAE(
        prior=fv.standard_normal(LATENT),
        likelihood=fv.conditional(fv.bernoulli(SIZE), MLP(LATENT, (WIDTH,), SIZE)),
        posterior=fv.local(fv.gaussian(LATENT), num_rows),
    )
    params, loss_fn, optimizer = vae.init(jax.random.key(0)), vae.loss(), optax.adam(1e-2)
    x = jnp.asarray(np.random.default_rng(0).random((num_rows, SIZE), np.float32) < 0.3)
    data = {"x": x.astype(jnp.float32), "row": jnp.arange(num_rows)}

    def seconds(steps):
        begun = time.perf_counter()
        fv.fit(
            loss_fn,
            params,
            optimizer,
            key=jax.random.key(1),
            num_steps=steps,
            data=data,
            batch_size=BATCH_SIZE,
            check_finite=False,
            progress=False,
        )
        return time.perf_counter() - begun

    # The difference of two fits: each of them copies its parameters once, and shuffles at once.
    return lambda: (seconds(num_steps + num_steps // 8) - seconds(num_steps // 8)) / num_steps


def cost(quick):
    """Seconds of a step at both numbers of rows, in turn."""
    few, many, num_steps = (100, 10_000, 200) if quick else (1000, 1_000_000, 8000)
    few = max(few, BATCH_SIZE)
    calls = {num_rows: fitting(num_rows, num_steps) for num_rows in (few, many)}
    times = timing.interleaved(
        calls, budget=1, most=3 if quick else 7, least=3 if quick else 7, time_call=lambda f: f()
    )
    median = {name: value["median"] for name, value in times.items()}
    return {
        "rows": [few, many],
        "parameters": 2 * LATENT,
        "batch": BATCH_SIZE,
        "steps": num_steps,
        "microseconds": {str(name): 1e6 * value for name, value in median.items()},
        "ratio": median[many] / median[few],
    }


# -------------------------------------------------------------------------------- quality


def factor_model(quick):
    """ELBO of both posteriors, and the gap, in nats a row."""
    import jax
    import numpy as np

    import flowvi as fv
    from examples import factor_model

    x, _ = factor_model.generate()
    num_steps, num_samples = (100, 20) if quick else (4000, 2000)
    results = {"steps": num_steps, "optimum": float(factor_model.pca_optimum(x))}
    for name, vae in factor_model.models().items():
        result = fv.fit_vae(
            vae,
            x,
            key=jax.random.key(0),
            num_steps=num_steps,
            batch_size=len(x),
            objective=vae.loss(num_samples=4, path=True),
            progress=False,
        )
        elbo = result.elbo(jax.random.key(1), x, num_samples, kl="sampled")
        results[name] = float(np.mean(elbo))
        log(f"  {name}: {results[name]:.4f}, optimum {results['optimum']:.4f}")
        if name == "amortized":
            gap = fv.amortization_gap(
                vae,
                result.params,
                x,
                key=jax.random.key(2),
                num_steps=20 if quick else 500,
                num_samples=num_samples,
                progress=False,
            )
            # Judged on noise that had no part in the choice between the two.
            key = jax.random.key(3)
            encoder = np.asarray(result.elbo(key, x, num_samples))
            refined = np.asarray(gap.rows.elbo(key, x, num_samples))
            difference = encoder - refined
            error = difference.std(ddof=1) / len(x) ** 0.5
            results["gap"] = {
                "encoder": float(gap.encoder.mean()),
                "refined": float(gap.refined.mean()),
                "importance_weighted": float(gap.importance_weighted.mean()),
                "smallest": float(gap.amortization.min()),
                "largest": float(gap.amortization.max()),
                "above": float(difference.mean() / error) if error > 0 else 0.0,
            }
    return results


# --------------------------------------------------------------------------------- report


def bars(results):
    """Dicts of "what", "value", "bar", "met"."""
    model = results["factor_model"]
    few, many = results["cost"]["rows"]
    distance = abs(model["optimum"] - model["unamortized"])
    rows = [
        (f"a step with {many} rows, in steps with {few}", results["cost"]["ratio"], "≤", 1.3),
        ("unamortized ELBO from the optimum of PCA, nats a row", distance, "≤", 0.05),
        ("amortized above refined, in standard errors", model["gap"]["above"], "≤", 2.0),
        ("smallest amortization gap of a row, nats", model["gap"]["smallest"], "≥", 0.0),
    ]
    return [
        {
            "what": what,
            "value": value,
            "bar": f"{sign} {bar:g}",
            "met": bool(value <= bar if sign == "≤" else value >= bar),
        }
        for what, value, sign, bar in rows
    ]


def report(results):
    """All of it as Markdown."""
    rows = [
        [row["what"], f"{row['value']:.3f}", row["bar"], "yes" if row["met"] else "no"]
        for row in results["bars"]
    ]
    model, cost = results["factor_model"], results["cost"]
    gap = model["gap"]
    nats = [
        ["optimum of probabilistic PCA", f"{model['optimum']:.4f}"],
        ["amortized", f"{model['amortized']:.4f}"],
        ["unamortized", f"{model['unamortized']:.4f}"],
        ["amortized, decoder held fixed", f"{gap['encoder']:.4f}"],
        ["refined, the same decoder", f"{gap['refined']:.4f}"],
        ["importance-weighted, the same decoder", f"{gap['importance_weighted']:.4f}"],
    ]
    took = ", ".join(f"{value:.0f} with {name}" for name, value in cost["microseconds"].items())
    return "\n".join(
        [
            "# Parameters per row\n",
            timing.environment_line(results["environment"]) + "\n",
            timing.table(["", "measured", "bar", "met"], rows),
            f"Microseconds of a step with {cost['parameters']} parameters per row and batches of "
            f"{cost['batch']}, medians: {took} rows.\n",
            f"The linear factor model after {model['steps']} steps:\n",
            timing.table(["", "nats a row"], nats),
        ]
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--output", default="benchmarks/results/local.json")
    args = parser.parse_args()
    begun = time.perf_counter()
    results = {"environment": timing.environment("flowvi", "jax", "jaxlib", "optax")}
    for name, measure in {"cost": cost, "factor_model": factor_model}.items():
        log(f"{name} ...")
        results[name] = measure(args.quick)
        log(f"  {results[name]}")
    results["bars"] = bars(results)
    results["seconds"] = time.perf_counter() - begun
    timing.write(args.output, results, report(results))
    log(report(results))


if __name__ == "__main__":
    main()
