"""The likelihood learned from simulations: theta as context, and targets made of it."""

import dataclasses
import functools
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.amortized import simulations
from flowvi.amortized.prior import ONLY, Prior, as_prior, layout_of
from flowvi.amortized.simulations import NUM_SIMULATIONS, Simulator, vector
from flowvi.densities import Density, fit_density
from flowvi.families import Family, check_key, maf
from flowvi.layouts import Layout, Theta
from flowvi.params import Array
from flowvi.posteriors import Target
from flowvi.supports import SupportLike
from flowvi.training import Fitted, TrainingOptions


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AmortizedLikelihood(Fitted):
    """What `fit_likelihood` learned: the density of x given theta.

    Attributes:
        density: the density of x, whose context is the parameters made one vector.
        layout: the names and supports of the parameters.
        single: whether parameters are one array without a name.
        num_dropped: simulations that were left out, because they were not finite.
        prior: the prior; None where it comes from a file.
    """

    density: Density
    layout: Layout
    single: bool
    num_dropped: int = 0
    prior: Prior | None = dataclasses.field(default=None, metadata={"file": False})

    def __repr__(self) -> str:
        return f"AmortizedLikelihood({self.density!r})"

    def log_prob(self, x: ArrayLike, theta: Theta) -> Array:
        """log p(x | theta), of the shape of the leading axes, which broadcast."""
        return self.density.log_prob(x, vector(self.layout, theta))

    def sample(self, theta: Theta, key: Array, num_samples: int) -> np.ndarray:
        """Simulations [num_samples, *batch, columns] at parameters of shape [*batch, *shape]."""
        return self.density.sample(key, num_samples, vector(self.layout, theta))

    def log_likelihood(self, theta: Theta, x: Array) -> Array:
        """log p(x | theta) of one observation, to be traced: as `fit_amortized` takes it."""
        context = vector(self.layout, theta)
        return self.density.family.distribution(self.params, context).log_prob(x)

    def target(self, x: ArrayLike) -> Target:
        """The posterior of observations, as a target of `fit_posterior`.

            log p(theta) + sum_i log p(x_i | theta)

        Args:
            x: one observation [columns], or independent ones [n, columns] of one theta.

        Raises:
            ValueError: if the density of the prior is not known.
        """
        rows = np.asarray(simulations.check_observations(x, self.density.family.event_shape))
        checks.require(rows.ndim <= 2, "`x` must be of shape [columns] or [n, columns]", rows.shape)
        if self.prior is None or self.prior.log_prob is None:
            rule = "`target` needs a prior's `log_prob`, which `fit_likelihood` was not given"
            raise ValueError(f"{rule}; got none. Perhaps `fv.Prior(sample, support, log_prob)`?")
        own = _LogJoint(self, jnp.atleast_2d(jnp.asarray(rows, jnp.result_type(float))))
        return Target(own, self.layout.event_size, layout=self.layout)


@dataclasses.dataclass(frozen=True, eq=False)
class _LogJoint:
    """log p(theta, x_1, ..., x_n) of named parameters."""

    likelihood: AmortizedLikelihood
    rows: Array

    def __call__(self, named: Theta) -> Array:
        own = self.likelihood
        theta = named[ONLY] if own.single else named
        each = jax.vmap(functools.partial(own.log_likelihood, theta))(self.rows)
        return own.prior.log_prob(theta) + each.sum()  # type: ignore[union-attr, misc]


def fit_likelihood(
    prior: object,
    simulator: Simulator | None = None,
    *,
    key: Array,
    pairs: tuple[Theta, ArrayLike] | None = None,
    num_simulations: int = NUM_SIMULATIONS,
    num_processes: int | None = None,
    family: Family | None = None,
    support: SupportLike = None,
    **options: Unpack[TrainingOptions],
) -> AmortizedLikelihood:
    """Fits p(x | theta) to pairs from a simulator: the likelihood that it does not tell.

    It suits a simulator whose x is simpler than the posterior of theta, and many independent
    observations of one theta. `likelihood.target(x)` is a target for `fv.fit_posterior`, and
    `log_likelihood=likelihood.log_likelihood` weighs the draws of an amortized posterior.

    Args:
        prior: as in `fit_amortized`, as are `simulator`, `key`, `pairs`, `num_simulations` and
            `num_processes`.
        simulator: see there. x is a vector of real numbers.
        key: see there.
        pairs: see there; theta need not be drawn from the prior here.
        num_simulations: see there.
        num_processes: see there.
        family: a family of x whose context is the vector of all parameters; by default a flow.
        support: where x may lie, as in `fit_density`.
        **options: see `TrainingOptions`; the defaults are those of `fit_density`.

    Raises:
        ValueError: if observations are no vectors, or too few are finite.
        TypeError: if an option is unknown.

    Source: Papamakarios, Sterratt, Murray, "Sequential Neural Likelihood", 2019.

    Example:
        >>> import distrax, jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> prior = distrax.Normal(jnp.zeros(1), jnp.ones(1))
        >>> likelihood = fv.fit_likelihood(
        ...     prior,
        ...     lambda key, theta: theta + jax.random.normal(key, (1,)),
        ...     key=jax.random.key(0),
        ...     num_simulations=1000,
        ...     num_steps=50,
        ...     progress=False,
        ... )
        >>> likelihood.target([0.3]).event_size
        1
    """
    check_key(key)
    own = as_prior(prior)
    look_key, data_key, fit_key = jax.random.split(key, 3)
    layout, single = layout_of(own, look_key)
    pair = simulations.pairs_of(own, simulator, pairs, data_key, num_simulations, num_processes)
    data = simulations.cleaned(layout, *pair)
    rule = "`x` must be vectors, of shape [num, columns]"
    checks.require(data.x.ndim == 2, rule, f"shape {data.x.shape}", say=str)
    context = vector(layout, simulations.constrained(layout, data.u, single))
    if family is None:
        family = maf(data.x.shape[1], context_size=context.shape[1], transformer="scaled")
    x = np.asarray(data.x, np.result_type(data.x.dtype, np.float32))
    density = fit_density(
        family, x, context=context, key=fit_key, support=support, combine=False, **options
    )
    return AmortizedLikelihood(
        result=density.result,
        density=density,
        layout=layout,
        single=single,
        num_dropped=data.num_dropped,
        prior=own,
    )
