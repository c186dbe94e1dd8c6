"""Priors: what parameters are drawn from, and where they may lie."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi._tfp import tfd
from flowvi.checks import require, shown
from flowvi.compiling import compiled
from flowvi.families.family import check_key
from flowvi.layouts import Layout, Parameters, Theta, as_layout
from flowvi.params import Array, Shape
from flowvi.supports import Interval, Support, SupportLike, as_support

#: The name of parameters that are one array without a name.
ONLY = "theta"

#: Draws by which a prior is looked at.
NUM_TRIED = 8


@dataclasses.dataclass(frozen=True)
class Prior:
    """A prior by functions: what `fit_amortized` takes where a distribution is not at hand.

    Attributes:
        sample: (key, number) -> draws of shape [number, *event_shape], or {name: draws}; JAX can
            trace it where pairs are to be simulated as training goes.
        support: where they may lie, as in `fit_density`; of named draws {name: support}.
        log_prob: one draw -> its log density, a scalar; needed only where posteriors are weighted
            by a likelihood.

    Raises:
        TypeError: if `sample` or `log_prob` is no function.

    Source: Cranmer, Brehmer, Louppe, "The Frontier of Simulation-Based Inference", 2020.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> prior = fv.Prior(lambda key, n: jax.random.uniform(key, (n, 2)), support=(0, 1))
        >>> prior.sample(jax.random.key(0), 5).shape
        (5, 2)
    """

    sample: Callable[[Array, int], Theta]
    support: SupportLike | Mapping[str, SupportLike] = None
    log_prob: Callable[[Theta], Array] | None = None

    def __post_init__(self) -> None:
        for name in ("sample", "log_prob"):
            value = getattr(self, name)
            is_one = callable(value) or (value is None and name == "log_prob")
            require(is_one, f"`{name}` must be a function", value, error=TypeError)


def as_prior(prior: object) -> Prior:
    """The prior behind a distribution of numpyro's, Distrax's or TFP's, or a dict of them.

    Raises:
        TypeError: if it cannot be sampled from.
    """
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, Mapping) and prior:
        each = {name: as_prior(one) for name, one in prior.items()}
        return _joined(each)
    is_numpyro = type(prior).__module__.partition(".")[0] == "numpyro"
    if is_numpyro or isinstance(prior, distrax.DistributionLike):
        made: Any = prior if is_numpyro else distrax.as_distribution(prior)
        return Prior(_sampler(made, is_numpyro), _support_of(made, prior), _density(made))
    rule = "`prior` must be a distribution with a sampler, of numpyro, Distrax or TFP"
    fix = "Perhaps `fv.Prior(sample, support)`?"
    raise TypeError(f"{rule}, or a dict of them; got {shown(prior)}. {fix}")


def _joined(each: Mapping[str, Prior]) -> Prior:
    def sample(key: Array, number: int) -> Theta:
        keys = jax.random.split(key, len(each))
        return {
            name: one.sample(k, number) for k, (name, one) in zip(keys, each.items(), strict=True)
        }

    def log_prob(theta: Theta) -> Array:
        parts = [one.log_prob(theta[name]) for name, one in each.items() if one.log_prob]
        return jnp.sum(jnp.stack(parts))

    known = all(one.log_prob is not None for one in each.values())
    support = {name: one.support for name, one in each.items()}
    return Prior(sample, support, log_prob if known else None)


def _sampler(made: Any, is_numpyro: bool) -> Callable[[Array, int], Array]:
    @compiled()
    def draws(number: int, key: Array) -> Array:
        if is_numpyro:
            return made.sample(key, (number,))
        return made.sample(seed=key, sample_shape=(number,))

    return lambda key, number: draws(number, key)


def _density(made: Any) -> Callable[[Theta], Array]:
    # Coordinates that are a batch rather than an event are as independent.
    return lambda theta: jnp.sum(made.log_prob(theta))


def _support_of(made: Any, given: object) -> SupportLike:
    """Where draws of a distribution may lie."""
    if hasattr(made, "support"):  # of numpyro
        return made.support
    inner: Any = given if isinstance(given, tfd.Distribution) else made
    while isinstance(inner, distrax.Independent):
        inner = inner.distribution
    if isinstance(inner, distrax.Uniform):
        return _interval(inner.low, inner.high, made)
    if isinstance(inner, tfd.Distribution):
        return inner.experimental_default_event_space_bijector()
    if isinstance(inner, distrax.Gamma):
        return "positive"
    if isinstance(inner, distrax.Beta):
        return (0.0, 1.0)
    if isinstance(inner, distrax.Dirichlet):
        return "simplex"
    # Normal distributions of vectors are subclasses.
    if type(inner) is distrax.Transformed:
        rule = "`prior` must say where its draws may lie"
        fix = "Perhaps `fv.Prior(prior.sample, support)`?"
        raise TypeError(f"{rule}; got {shown(given)}. {fix}")
    return None


def _interval(low: Any, high: Any, made: Any) -> Interval:
    shape = tuple(made.batch_shape) + tuple(made.event_shape)
    ends = (np.broadcast_to(np.asarray(end, float), shape).ravel().tolist() for end in (low, high))
    lower, upper = map(tuple, ends)
    return Interval(shape, lower, upper)


def layout_of(prior: Prior, key: Array) -> tuple[Layout, bool]:
    """(names, shapes and supports of parameters, whether they are one array), by a few draws.

    Raises:
        ValueError: if draws have another number of rows than was asked for.
        TypeError: if they are not floating numbers.
    """
    check_key(key)
    found = prior.sample(key, NUM_TRIED)
    named = found if isinstance(found, Mapping) else {ONLY: found}
    supports = (
        prior.support if isinstance(prior.support, Mapping) else dict.fromkeys(named, prior.support)
    )
    parameters: dict[str, tuple[Shape, Support]] = {}
    for name, draws in named.items():
        rule = f"`prior` must give draws of {name!r} whose leading axis is the number of them"
        fits = jnp.ndim(draws) > 0 and jnp.shape(draws)[0] == NUM_TRIED
        require(fits, f"{rule}, {NUM_TRIED}", f"shape {jnp.shape(draws)}", say=str)
        is_float = jnp.issubdtype(jnp.result_type(draws), jnp.floating)
        rule = f"`prior` must give floating numbers for {name!r}"
        fix = "Perhaps sum it out, or give each value a fit of its own?"
        require(is_float, rule, jnp.result_type(draws), fix, error=TypeError, say=str)
        shape = tuple(jnp.shape(draws)[1:])
        parameters[name] = (shape, as_support(supports.get(name), shape))
    as_parameters: Parameters = parameters
    return as_layout(as_parameters), not isinstance(found, Mapping)
