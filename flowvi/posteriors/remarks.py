"""What is remarked on a fit besides its importance weights, which see none of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.posteriors.start import Start
from flowvi.posteriors.target import Target
from flowvi.training import FitResult

Array = jax.Array

#: Nats in the last twentieth of the steps that are no convergence.
STILL_RISING = 0.5

#: A mode is missing if weights around it are so many nats above the log evidence, and it has at
#: least this part of the mass.
LEFT_OUT, LEAST_MASS = 5.0, 3e-5

#: Directions in which the density is followed outwards.
MOST_DIRECTIONS = 32


def on_the_fit(target: Target, found: Start, result: FitResult) -> list[str]:
    """What the density does far out, and how the steps ended."""
    remarks = []
    rising = directions_that_do_not_fall(target, found)
    if rising:
        remarks.append(
            f"The log density does not fall off in {rising} of the directions that were tried: it "
            "may not be normalisable."
        )
    losses = result.history["loss"]
    part = len(losses) // 20
    late, before = (
        each[np.isfinite(each)]
        for each in (losses[len(losses) - part :], losses[-2 * part : -part])
    )
    if min(len(late), len(before)) > 1:
        gain = float(np.mean(before) - np.mean(late))
        noise = float(np.std(late)) / np.sqrt(len(late))
        if gain > max(STILL_RISING, 5 * noise):
            remarks.append(
                f"The ELBO still rose by {gain:.2g} nats in the last twentieth of the steps. "
                "Perhaps allow more with `num_steps`?"
            )
    if result.num_bad_steps > 0.1 * result.num_steps:
        remarks.append(
            f"{result.num_bad_steps} of {result.num_steps} steps were skipped, because the loss or "
            "its gradient was not finite."
        )
    return remarks


def on_modes(
    log_prob: Callable[[Array], Array], target: Target, found: Start, log_evidence: float
) -> list[str]:
    """Modes that runs of the optimiser ended in, and that the posterior leaves out.

    Args:
        log_prob: that of the posterior, at vectors of shape [..., D].
        target: the target.
        found: what the search for a start found.
        log_evidence: by importance weights.
    """
    if not len(found.ends):
        return []
    log_q = np.asarray(log_prob(jnp.asarray(found.ends)), np.float64)
    excess = np.asarray(target(found.ends), np.float64) - log_q
    excess = np.where(np.isfinite(excess), excess, -np.inf).mean(-1) - log_evidence
    mass = found.end_elbos - log_evidence
    lost = (excess > LEFT_OUT) & (mass > np.log(LEAST_MASS))
    if not lost.any():
        return []
    return [
        f"{lost.sum()} of {len(lost)} runs of the optimiser ended where the posterior has next to "
        f"no density, around modes of up to {np.exp(mass[lost].max()):.1g} times the mass that it "
        "found: modes are missing. Perhaps fit with `tempering=0.1`?"
    ]


def directions_that_do_not_fall(target: Target, found: Start) -> int:
    """How many directions there are along which the density does not fall off as 1 / distance.

    The widest directions of the start are tried, both ways, a hundred and ten thousand of its
    standard deviations away. Where the density of a line falls more slowly than that, and has not
    fallen to nothing before, it has no integral.
    """
    loc = found.whitening["loc"]
    if "matrix" in found.whitening:
        columns = found.whitening["matrix"].T
    else:
        basis, gain = found.whitening["basis"].T, found.whitening["gain"]
        columns = found.whitening["scale"] * basis * (1 + gain[:, None])
    widest = np.argsort(-np.linalg.norm(columns, axis=-1))[:MOST_DIRECTIONS]
    steps = np.concatenate([columns[widest], -columns[widest]])
    near, far = 1e2, 1e4
    points = np.stack([loc + 0 * steps, loc + near * steps, loc + far * steps])
    values = np.asarray(target(points), np.float64)
    with np.errstate(invalid="ignore"):
        falls = values[1] - values[2] >= np.log(far / near)
        gone = values[0] - values[2] > 4 * np.log(far)
    return int((np.isfinite(values).all(0) & ~falls & ~gone).sum())
