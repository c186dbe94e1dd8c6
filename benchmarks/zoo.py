"""Every flow of the library on the same toys, tables and posteriors.

python -m benchmarks.zoo [--quick] [--only FLOW ...] [--problems NAME ...] [--output FILE]
python -m benchmarks.zoo --page    # writes the tables of the results into docs/which_flow.md

Of densities: nats below the truth of new rows, of tables, where there is no truth, the negative log
density; each flow is fitted alone, with the same number of steps, but four times as many of flow
matching. Of posteriors: KL(q || p) in nats, log evidence less ELBO, of the flow with samples first
where it has both directions. Seconds are those of 1,000 log densities and of 1,000 samples of the
first problem, compiled; parameters are of that, too.
"""

import argparse
import dataclasses
import json
import pathlib
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np

import flowvi as fv
from benchmarks import timing
from benchmarks.densities.__main__ import rows_of
from benchmarks.densities.problems import problems
from benchmarks.posteriors import targets
from flowvi.params import partition
from flowvi.transformers import TRANSFORMERS

TOYS = ("eight normals", "checkerboard", "four rings", "two spirals", "square", "two moons")
TABLES = ("wine", "breast cancer")
POSTERIORS = ("banana", "funnel", "eight_schools", "student_t")

ROWS, STEPS, POSTERIOR_STEPS, DRAWS = 1_000, 3_000, 3_000, 10_000
QUICK = {"steps": 10, "draws": 100}
PAGE, START, END = "docs/which_flow.md", "<!-- results -->", "<!-- end of results -->"


@dataclasses.dataclass(frozen=True)
class Flow:
    """How a flow of D coordinates is made for densities and for posteriors; None: not at all."""

    density: Callable[[int], fv.Family] | None
    posterior: Callable[[int], fv.Family] | None
    step_factor: int = 1


def flows():
    """The flows of this library by name. Those whose functions there are not are left out."""
    found = {}
    for name in TRANSFORMERS:
        found[f"maf / iaf, {name}"] = Flow(
            lambda d, name=name: fv.maf(d, transformer=name),
            lambda d, name=name: fv.iaf(d, transformer=name),
        )
    for name in ("affine", "spline"):
        make = lambda d, name=name: fv.coupling(d, transformer=name)  # noqa: E731
        found[f"coupling, {name}"] = Flow(make, make)
    for name in ("transformer_flow", "residual"):
        make = getattr(fv, name)
        found[name] = Flow(make, lambda d, make=make: make(d, density_first=False))
    found["continuous, matching"] = Flow(fv.continuous, None, step_factor=4)
    make = lambda d: fv.continuous(d, trained_by="likelihood")  # noqa: E731
    found["continuous, likelihood"] = Flow(make, make)
    for name in ("bnaf",):
        if hasattr(fv, name):
            found[name] = Flow(getattr(fv, name), None)
    for name in ("planar", "radial", "sylvester"):
        if hasattr(fv, name):
            found[name] = Flow(None, getattr(fv, name))
    return found


def parameters_of(family):
    """How many numbers an optimizer moves."""
    params = jax.eval_shape(family.init, jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(partition(params)[0]))


def directions(family, event_size):
    """Seconds of both directions of a flow, perturbed by what keeps it a map of ordinary slopes."""
    params = jax.jit(family.init)(jax.random.key(0))
    params = fv.testing.perturbed(params, scale=0.1, seed=0)
    x = np.random.default_rng(0).normal(size=(ROWS, event_size)).astype(np.float32)
    key = jax.random.key(1)
    calls = {
        "log_prob": lambda: jax.block_until_ready(family.log_prob(params, x)),
        "sample": lambda: jax.block_until_ready(family.sample(params, key, ROWS)),
    }
    return {n: each["median"] for n, each in timing.interleaved(calls, budget=1.0).items()}


def density_nats(family, name, steps):
    """(nats below the truth, seconds of the fit)."""
    train, test, truth = rows_of(problems()[name], 0)
    start = time.perf_counter()
    density = fv.fit_density(
        family, train, key=jax.random.key(0), num_steps=steps, combine=False, progress=False
    )
    seconds = time.perf_counter() - start
    scores = np.asarray(density.log_prob(test), float)
    return float(np.mean((0 if truth is None else truth) - scores)), seconds


def posterior_nats(family, name, steps, draws):
    """(KL(q || p), seconds of the fit)."""
    case = targets.load(name)
    start = time.perf_counter()
    posterior = fv.fit_posterior(
        fv.Target(case.log_density, case.size),
        key=jax.random.key(0),
        family=family,
        num_steps=steps,
        progress=False,
    )
    seconds = time.perf_counter() - start
    return float(case.log_z - posterior.elbo(jax.random.key(1), draws).value), seconds


def size_of(name):
    if name in POSTERIORS:
        return targets.load(name).size
    problem = problems()[name]
    return problem.draw(np.random.default_rng(0), 2).shape[1]


def measure(flow, name, quick):
    """One cell, or why there is none."""
    is_posterior = name in POSTERIORS
    make = flow.posterior if is_posterior else flow.density
    if make is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            family = make(size_of(name))
            if is_posterior:
                steps = QUICK["steps"] if quick else POSTERIOR_STEPS
                draws = QUICK["draws"] if quick else DRAWS
                nats, seconds = posterior_nats(family, name, steps, draws)
            else:
                steps = flow.step_factor * (QUICK["steps"] if quick else STEPS)
                nats, seconds = density_nats(family, name, steps)
    except Exception as error:  # one flow of many: the others go on, and the table says so
        return {"failure": f"{type(error).__name__}: {error}"[:300]}
    return {"nats": nats, "seconds": seconds}


def cost_of(flow):
    """Parameters and seconds of both directions, in two coordinates."""
    family = (flow.density or flow.posterior)(2)
    return {"parameters": parameters_of(family), **directions(family, 2)}


def nats_of(cell):
    """A cell of a table."""
    if cell is None:
        return "–"
    return "failed" if "failure" in cell else timing.number(cell["nats"])


def report(results):
    """Markdown."""
    show = timing.number
    parts = [timing.environment_line(results["environment"]) + "\n"]
    if results["quick"]:
        parts.append("**Ten steps each, to see that all runs: these numbers say nothing.**\n")
    for title, names in results["problems"].items():
        if names:
            rows = [
                [flow, *(nats_of(cells.get(name)) for name in names)]
                for flow, cells in results["nats"].items()
                if any(cells.get(name) for name in names)
            ]
            parts.append(f"{title}:\n\n{timing.table(['', *names], rows)}")
    rows = []
    for flow, cost in results["cost"].items():
        fits = [c["seconds"] for c in results["nats"][flow].values() if c and "seconds" in c]
        fit = show(float(np.median(fits))) if fits else show(None)
        ms = [show(1e3 * cost[name]) for name in ("log_prob", "sample")]
        rows.append([flow, cost["parameters"], *ms, fit])
    header = ["", "parameters", "1,000 log densities, ms", "1,000 samples, ms", "a fit, s (median)"]
    parts.append(f"In two coordinates:\n\n{timing.table(header, rows)}")
    return "\n".join(parts)


def write_page(path, markdown):
    """Puts tables between the marks of the page."""
    page = pathlib.Path(path)
    text = page.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n\n{markdown}\n{END}{after}")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that all runs")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--problems", nargs="*", default=None)
    parser.add_argument("--output", default="benchmarks/results/zoo.json")
    parser.add_argument("--page", action="store_true", help=f"write the results into {PAGE}")
    args = parser.parse_args()
    if args.page:
        write_page(PAGE, report(json.loads(pathlib.Path(args.output).read_text())))
        return
    chosen = {n: f for n, f in flows().items() if args.only is None or n in args.only}
    groups = {
        "Toys, nats below the truth": TOYS,
        "Tables, negative log density": TABLES,
        "Posteriors, KL(q || p)": POSTERIORS,
    }
    wanted = lambda name: args.problems is None or name in args.problems  # noqa: E731
    groups = {title: [n for n in names if wanted(n)] for title, names in groups.items()}
    results = {
        "environment": timing.environment("flowvi", "jax", "jaxlib", "diffrax"),
        "quick": args.quick,
        "problems": groups,
        "nats": {},
        "cost": {},
    }
    for flow_name, flow in chosen.items():
        results["cost"][flow_name] = cost_of(flow)
        cells = results["nats"][flow_name] = {}
        for name in [name for names in groups.values() for name in names]:
            cells[name] = measure(flow, name, args.quick)
            print(flow_name, "|", name, "|", cells[name], flush=True)
        timing.write(args.output, results, report(results))
    print(report(results))


if __name__ == "__main__":
    main()
