"""A start along curves: parabolas that coordinates follow others along, drawn through particles."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi.families import Flow, Whitened, whitened
from flowvi.families.curved import Curves, curve_of
from flowvi.params import Array, Fixed, PyTree
from flowvi.posteriors import annealing
from flowvi.posteriors.annealing import anneal, near
from flowvi.posteriors.defaults import default_family
from flowvi.posteriors.normals import Dense
from flowvi.posteriors.target import Target

#: Up to so many coordinates a curve is looked for. It has to be worth so many nats; and it is drawn
#: anew while the evidence that is found with it rises by so many, and so often at most.
MOST_CURVED, LEAST_GAIN, LEAST_RISE, MOST_CURVES = 16, 0.5, 0.02, 16


def drawn(
    target: Target, whitening: Mapping[str, ArrayLike], init_key: Array, key: Array
) -> tuple[Whitened, PyTree | None, int]:
    """The default flow around a map along parabolas, parameters of it, and gradients that it took.

    The parameters are None where draws around the start show no such curve.
    """
    size = target.event_size
    family = whitened(Flow(default_family(size), Curves(size)))
    params = family.place(family.init(init_key), whitening)
    evidence, misses, num_gradients, is_curved = -np.inf, 0, 0, False
    for its_key in jax.random.split(key, MOST_CURVES):
        particles = anneal(family, target, params, its_key)
        num_gradients += particles.num_gradients
        u = particles.u[near(particles.u)]
        misses += not particles.log_evidence > evidence + LEAST_RISE
        if misses == 2 or len(u) < annealing.NUM_PARTICLES / 2:
            break
        evidence = max(evidence, particles.log_evidence)
        loc, sd = u.mean(0), u.std(0)
        curve, gain = curve_of((u - loc) / sd)
        if gain < LEAST_GAIN:
            break
        is_curved = True
        params = family.place(params, Dense(loc, np.diag(sd), np.diag(1 / sd)).whitening())
        arrays = {
            name: jnp.asarray(leaf, int if name == "order" else jnp.result_type(float))
            for name, leaf in curve.items()
        }
        params["family"] = {**params["family"], "transform": {"curve": Fixed(arrays)}}
    return family, params if is_curved else None, num_gradients
