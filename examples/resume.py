"""A fit that is interrupted, resumed from its checkpoints, and saved.

python examples/resume.py [--short] [--dir checkpoints]

Press Ctrl-C while it runs and start it again, or kill it: it goes on from the last checkpoint and
ends with the same parameters, to the bit. Without help it interrupts itself once, to show it.
"""

import argparse
import pathlib
import tempfile

import jax
import numpy as np
from sklearn.datasets import make_moons

import flowvi as fv


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--dir", help="where checkpoints go; a temporary folder by default")
    args = parser.parse_args()
    num_steps = 60 if args.short else 2000
    x, _ = make_moons(2000, noise=0.05, random_state=1)
    family = fv.maf(2, num_layers=2, hidden_sizes=[32])

    def fit(directory, **options):
        return fv.fit_density(
            family,
            x,
            key=jax.random.key(0),
            num_steps=num_steps,
            checkpoint_dir=directory,
            checkpoint_every=num_steps // 10,
            resume=True,
            combine=False,  # the flow alone, without textbook estimates beside it
            **options,
        )

    with tempfile.TemporaryDirectory() as scratch:
        where = pathlib.Path(args.dir or scratch)
        if args.dir is None:
            half = fit(where / "run", callback=lambda progress: progress.step >= num_steps // 3)
            print(f"stopped after {half.num_steps} steps: {half.stop_reason}")
        result = fit(where / "run")
        print(f"went on to step {result.num_steps}: {result.stop_reason}")

        whole = fit(where / "whole")
        pairs = zip(jax.tree.leaves(result.params), jax.tree.leaves(whole.params), strict=True)
        same = all(np.array_equal(a, b) for a, b in pairs)
        print(f"the same bits as an uninterrupted run: {same}")

        result.save(where / "moons.flowvi")
        density = fv.load(where / "moons.flowvi")
        print(f"mean log density of the loaded flow: {density.log_prob(x).mean():.4f}")
        try:
            fv.load(where / "moons.flowvi", like=fv.maf(2, num_layers=3, hidden_sizes=[32]))
        except ValueError as error:
            print(f"and into another flow: {error}")


if __name__ == "__main__":
    main()
