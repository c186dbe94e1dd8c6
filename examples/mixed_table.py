"""The joint density of a table with columns of every kind, and what can be asked of it.

    python examples/mixed_table.py [--short] [--output mixed_table.png]

Measurements of wines, rounded as they were written down, with their cultivar; a tenth of the
entries is taken away. Missing values are drawn given the rest of their rows; the density of some
columns given others is a density again; and synthetic rows are compared with those of the fit.
"""

import argparse

import jax
import numpy as np
from sklearn.datasets import load_wine

import flowvi as fv


def main():
    """Fit, ask, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="mixed_table.png", help="where the picture goes")
    arguments = parser.parse_args()

    bunch = load_wine(as_frame=True)
    names = ["alcohol", "malic_acid", "color_intensity", "hue", "proline"]
    table = bunch.data[names].copy()
    table["cultivar"] = np.array(["first", "second", "third"])[bunch.target]
    rng = np.random.default_rng(0)
    order = rng.permutation(len(table))
    train, test = table.iloc[order[:140]], table.iloc[order[140:]]
    whole = train
    train = train.mask(rng.uniform(size=train.shape) < 0.1)

    schema = fv.infer_schema(train)
    print(schema)
    density = fv.fit_density(
        fv.table(schema),
        train,
        key=jax.random.key(0),
        **({"num_steps": 30} if arguments.short else {}),
    )
    print(density.summary())
    # Which rows have no holes, so that there is more of them to score.
    print(f"new rows, without holes: {density.log_prob(test).mean():.3f} nats each")

    # Missing values, given the rest of their rows.
    holes = train.isna().to_numpy()
    filled = density.impute(train, jax.random.key(1))
    right = (filled["cultivar"] == whole["cultivar"].to_numpy())[holes[:, -1]].mean()
    print(f"missing cultivars drawn right: {right:.0%}")

    # A cultivar given its alcohol and its colour, by Bayes' rule of three masses.
    seen = {"alcohol": 13.5, "color_intensity": 5.0}
    cultivar = density.given(seen).marginal("cultivar")
    levels = ["first", "second", "third"]
    masses = np.exp(cultivar.log_prob({"cultivar": np.array(levels, object)}))
    print({level: round(float(mass), 3) for level, mass in zip(levels, masses, strict=True)})

    # Quantiles of the proline of the third one, and what the cultivar tells of the hue.
    third = density.given({"cultivar": "third"}).marginal("proline")
    print(third.quantiles([0.1, 0.5, 0.9], key=jax.random.key(2)))
    print(density.mutual_information("cultivar", "hue", key=jax.random.key(3)))

    # Synthetic rows are not anonymous: are they closer to rows of the fit than new rows are?
    print(density.privacy(whole, test, jax.random.key(4), num_draws=500))

    density.plot(whole, key=jax.random.key(5)).savefig(arguments.output, dpi=80)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
