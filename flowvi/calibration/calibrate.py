"""Whether posteriors are calibrated: ranks, coverage and TARP over pairs that they never saw."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks, plotting
from flowvi.calibration.uniform import Uniformity, uniformity
from flowvi.diagnostics import Estimate
from flowvi.families import check_key
from flowvi.layouts import Theta
from flowvi.params import Array, host_generator
from flowvi.plotting.samples import as_table

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

#: Draws of each posterior; pairs of which there should be as many at least.
NUM_DRAWS, FEW_PAIRS = 500, 100

#: Overconfidence is warned of from so many standard errors on, where uniformity is refused.
ERRORS, REFUSED = 3.0, 0.01

#: Observations whose draws are made together.
CHUNK = 500


class CalibrationWarning(UserWarning):
    """A posterior that is narrower than it may be."""


class _Amortized(Protocol):
    """The posteriors of many observations."""

    def sample_and_log_prob(
        self, x: ArrayLike, key: Array, num_samples: int, /
    ) -> tuple[Theta, np.ndarray]: ...
    def log_prob(self, x: ArrayLike, theta: Theta, /) -> np.ndarray: ...


#: From one observation to its posterior, such as a function that calls `fv.fit_posterior`.
Global = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class PosteriorCalibration:
    """How posteriors meet parameters that made their observations.

    Attributes:
        ranks: of each parameter, its place among draws of its posterior: simulation-based
            calibration.
        coverage: the part of the draws whose density is above that of the true parameters; it is
            the content of the smallest region of highest density that holds them. None where
            posteriors have no density.
        tarp: the part of the draws that are nearer to a random point than the true parameters.
        excess: how much more than it should a region of highest density holds, on average over
            levels, as a probability; negative where posteriors are too narrow.
        labels: the names of the parameters.
        messages: what is wrong; empty where nothing is.

    Source: Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian Inference Algorithms
    with Simulation-Based Calibration", 2018; Hermans et al., "A Trust Crisis in Simulation-Based
    Inference?", 2022; Lemos, Coogan, Hezaveh, Perreault-Levasseur, "Sampling-Based Accuracy Testing
    of Posterior Estimators for General Inference", 2023.
    """

    ranks: Uniformity
    coverage: Uniformity | None
    tarp: Uniformity
    excess: Estimate | None
    labels: tuple[str, ...]
    messages: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Uniformity]:
        """The checks by name."""
        parts = {"ranks": self.ranks, "coverage": self.coverage, "TARP": self.tarp}
        return {name: each for name, each in parts.items() if each is not None}

    def __str__(self) -> str:
        rows = []
        for name, each in self.parts.items():
            is_fine = each.p_value > 1 - 0.95
            verdict = "inside of" if is_fine else "outside of"
            value, error = each.spread.value, each.spread.standard_error
            rows.append(
                f"{name:<9} spread {value:+.3f} +- {error:.3f}, p = {each.p_value:.3f}: "
                f"{verdict} the 95 % band"
            )
        if self.excess is not None:
            value, error = self.excess.value, self.excess.standard_error
            rows.append(f"regions   hold {value:+.3f} +- {error:.3f} more than they should")
        return "\n".join([*rows, *(f"! {message}" for message in self.messages)])

    def plot(self) -> "Figure":
        """A picture: how far each distribution function is from that of uniform numbers."""
        titles = {name: (each.values, each.band) for name, each in self.parts.items()}
        return plotting.uniformity(titles, self.labels)


def calibrate(
    posterior: _Amortized | Global,
    theta: Theta,
    x: ArrayLike,
    *,
    key: Array,
    num_draws: int = NUM_DRAWS,
) -> PosteriorCalibration:
    """Whether posteriors are calibrated, by fresh pairs of parameters and observations.

    Where theta_i is drawn from the prior and x_i simulated at it, theta_i is one more draw of the
    posterior of x_i. So its rank among draws of q is uniform if q is that posterior: of each
    coordinate (ranks), of the density of q (coverage), and of the distance to a random point
    (TARP). Each is held to a band that all distribution functions leave with probability 0.05.

    Args:
        posterior: an `AmortizedPosterior`; or a function from one observation to its posterior,
            which has `sample(key, number)`, such as what `fv.fit_posterior` returns. It is called
            for each pair.
        theta: parameters of shape [n, *shape], or {name: array}, drawn from the prior.
        x: observations of shape [n, *x_shape], one made at each of them, that the posterior was not
            trained on.
        key: a random key.
        num_draws: draws of each posterior.

    Raises:
        ValueError: if rows of `x` and `theta` are not as many, or too few.

    Warns:
        CalibrationWarning: where q is overconfident, narrower than it may be.

    Source: as in `PosteriorCalibration`.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> import flowvi as fv
        >>> class Exact:  # of theta from N(0, 1) and x from N(theta, 1)
        ...     def __init__(self, x):
        ...         self.loc = x / 2
        ...
        ...     def sample(self, key, number):
        ...         return self.loc + np.sqrt(0.5) * jax.random.normal(key, (number, 1))
        >>> theta = np.random.default_rng(0).normal(size=(200, 1))
        >>> x = theta + np.random.default_rng(1).normal(size=(200, 1))
        >>> found = fv.calibrate(Exact, theta, x, key=jax.random.key(0), num_draws=100)
        >>> found.ranks.values.shape, found.messages
        ((200, 1), ())
    """
    check_key(key)
    checks.positive_int("num_draws", num_draws)
    labels, truth = _table(theta)
    x = np.asarray(x)
    rule = f"`x` must have a row for each of the {len(truth)} rows of `theta`"
    checks.require(x.shape[:1] == truth.shape[:1], rule, f"shape {x.shape}", say=str)
    if len(truth) < FEW_PAIRS:
        warnings.warn(
            f"{len(truth)} pairs tell little of calibration: give {FEW_PAIRS} or more.",
            RuntimeWarning,
            stacklevel=2,
        )
    rng = host_generator(key)
    scale = np.where(truth.std(0) > 0, truth.std(0), 1)
    places: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]] = []
    for first, draws, log_q, log_true in _posteriors(posterior, theta, x, key, num_draws):
        true = truth[first : first + draws.shape[1]]
        ranks = _rank(draws, true, rng)
        # Points at random among the parameters, whatever x is.
        points = truth[rng.integers(0, len(truth), len(true))] + scale * rng.normal(size=true.shape)
        near, far = (np.linalg.norm((each - points) / scale, axis=-1) for each in (draws, true))
        densities = None if log_q is None else 1 - _rank(log_q, log_true, rng)
        places.append((ranks, densities, _rank(near, far, rng)))
    each_rank, each_density, each_near = zip(*places, strict=True)
    coverage, excess = None, None
    if each_density[0] is not None:
        contents = np.concatenate(each_density)
        coverage = uniformity(contents[:, None])
        # A region of level c holds the truth where the content is at most c.
        excess = Estimate(float(0.5 - contents.mean()), float(np.sqrt(1 / 12 / len(contents))))
    found = PosteriorCalibration(
        uniformity(np.concatenate(each_rank)),
        coverage,
        uniformity(np.concatenate(each_near)[:, None]),
        excess,
        labels,
    )
    messages = tuple(_messages(found))
    if messages:
        warnings.warn(" ".join(messages), CalibrationWarning, stacklevel=2)
    return dataclasses.replace(found, messages=messages)


def _messages(found: PosteriorCalibration) -> list[str]:
    """What is wrong with a posterior, in sentences."""
    narrow = {}
    for name, each in (("ranks", found.ranks), ("TARP", found.tarp)):
        value, error = each.spread.value, each.spread.standard_error
        if value > ERRORS * error and each.p_value < REFUSED:
            narrow[name] = f"{name} crowd at their ends ({value:+.3f} +- {error:.3f})"
    if found.excess is not None and found.coverage is not None:
        value, error = found.excess.value, found.excess.standard_error
        if value < -ERRORS * error and found.coverage.p_value < REFUSED:
            narrow["coverage"] = f"its regions hold {-value:.3f} +- {error:.3f} too little"
    if not narrow:
        return []
    what = ", ".join(narrow.values())
    return [
        f"The posterior is overconfident: {what}. Its intervals are narrower than they may be. "
        "Perhaps more simulations, or weights of a likelihood?"
    ]


def _rank(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The place of the truth [n, ...] among draws [num_draws, n, ...], between 0 and 1."""
    below, upto = (draws < truth).sum(0), (draws <= truth).sum(0)
    # Among equal draws and between two of them any place is as good; a uniform one is uniform.
    return (below + rng.random(truth.shape) * (upto - below + 1)) / (len(draws) + 1)


def _posteriors(posterior: Any, theta: Theta, x: np.ndarray, key: Array, num_draws: int) -> Any:
    """(first row, draws [num_draws, rows, D], their log densities, those of the truth)."""

    def some(rows: slice) -> Theta:
        return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], theta)

    if hasattr(posterior, "sample_and_log_prob") and hasattr(posterior, "log_prob"):
        for start in range(0, len(x), CHUNK):
            rows = slice(start, min(start + CHUNK, len(x)))
            own = jax.random.fold_in(key, start)
            with warnings.catch_warnings():
                # Pairs of the simulator are no strangers, however far out some are.
                warnings.simplefilter("ignore", UserWarning)
                draws, log_q = posterior.sample_and_log_prob(x[rows], own, num_draws)
            log_true = np.asarray(posterior.log_prob(x[rows], some(rows)))
            yield start, table_of_draws(draws), np.asarray(log_q), log_true
        return
    rule = "`posterior` must be an `AmortizedPosterior`, or a function from x to a posterior"
    checks.require(callable(posterior), rule, posterior, error=TypeError)
    for row, observed in enumerate(x):
        own = jax.random.fold_in(key, row)
        found = posterior(observed)
        draws = found.sample(own, num_draws)
        table = as_table(draws)[:, None]
        if not hasattr(found, "target"):
            yield row, table, None, None
            continue
        # Regions of highest density of the unconstrained vector are regions as good.
        _, log_q = found.sample_and_log_prob(own, num_draws)
        true = jax.tree.map(lambda leaf: leaf[0], some(slice(row, row + 1)))
        log_true = np.asarray(found.log_prob(found.target.unconstrain(true)))
        yield row, table, np.asarray(log_q)[:, None], log_true[None]


def _table(theta: Theta) -> tuple[tuple[str, ...], np.ndarray]:
    """(labels, parameters of shape [n, D])."""
    named = theta if isinstance(theta, Mapping) else {"theta": theta}
    labels = [
        f"{name}[{','.join(map(str, index))}]" if np.ndim(each) > 1 else name
        for name, each in named.items()
        for index in np.ndindex(*np.shape(each)[1:])
    ]
    return tuple(labels), as_table(theta)


def table_of_draws(draws: Theta) -> np.ndarray:
    """Draws [num_draws, n, *shape] of all parameters, as [num_draws, n, D]."""
    leaves = list(draws.values()) if isinstance(draws, Mapping) else [draws]
    flat = [np.asarray(each).reshape(*np.shape(each)[:2], -1) for each in leaves]
    return np.concatenate(flat, -1)
