"""A fitted posterior: draws in the user's names, densities, and what to make of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks, devices, diagnostics, interop, plotting
from flowvi.compiling import compiled
from flowvi.diagnostics import PSIS, Estimate
from flowvi.families import Family
from flowvi.params import Array, PyTree, host_generator
from flowvi.plotting.samples import as_table
from flowvi.posteriors import vectorise
from flowvi.posteriors.diagnosis import Diagnosis, diagnose
from flowvi.posteriors.refined import Refined, refine
from flowvi.posteriors.start import Start
from flowvi.posteriors.target import Target, Theta, as_float
from flowvi.training import Fitted

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

Draws = tuple[np.ndarray, np.ndarray, np.ndarray]
#: Labels along axes, by the name of the axis.
Axes = Mapping[str, Sequence[object] | np.ndarray]

#: Draws of a diagnosis, and how many of them are evaluated together.
NUM_DIAGNOSIS, CHUNK = 10_000, 1000


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Posterior(Fitted):
    """What `fit_posterior` learned: a distribution over the unconstrained vector u.

    Attributes:
        target: the target.
        family: the family of the approximation q(u).
        start: where the fit started; None of an amortized one.
        diagnosis: what 10,000 importance weights said right after the fit.
    """

    target: Target
    family: Family
    start: Start | None
    diagnosis: Diagnosis

    def __repr__(self) -> str:
        found = self.diagnosis
        return (
            f"Posterior(event_size={self.target.event_size}, elbo={found.elbo.value:.4f}, "
            f"log_evidence={found.log_evidence.value:.4f}, khat={found.khat:.3f}, "
            f"ess={found.ess:.3f}, num_warnings={len(found.messages)})"
        )

    def sample(self, key: Array, num_samples: int) -> Theta:
        """Draws: {name: array of shape [num_samples, *shape]}, or an array [num_samples, D]."""
        return self.constrain(self._draws(key, num_samples)[0])

    def sample_and_log_prob(self, key: Array, num_samples: int) -> tuple[Array, Array]:
        """Draws u of shape [num_samples, D], unconstrained, and log q(u) of shape [num_samples]."""
        u, log_q, _ = self._draws(key, num_samples)
        return jnp.asarray(u), jnp.asarray(log_q)

    def log_prob(self, u: ArrayLike) -> Array:
        """log q(u) of shape [...], for unconstrained u of shape [..., D]."""
        return self.family.log_prob(self.params, as_float(u))

    def constrain(self, u: ArrayLike) -> Theta:
        """The user's parameters at u of shape [..., D]: {name: array}, or u itself."""
        return self.target.constrain(u)

    def log_weights(self, key: Array, num_samples: int) -> np.ndarray:
        """log p(u) - log q(u) at draws u of q, of shape [num_samples]."""
        return self._draws(key, num_samples)[2]

    def elbo(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> Estimate:
        """The evidence lower bound E_q [log p(u) - log q(u)], in nats; no draw may be NaN."""
        return diagnostics.elbo(self.log_weights(key, num_samples))

    def log_evidence(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> Estimate:
        """The log of the normalising constant, in nats, by importance sampling from q."""
        return diagnostics.log_evidence(_weightless(self.log_weights(key, num_samples)))

    def psis(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> PSIS:
        """Pareto-smoothed importance weights of the draws that `sample` gives at the same key."""
        return diagnostics.psis(_weightless(self.log_weights(key, num_samples)))

    def resample(self, key: Array, num_samples: int, *, num_proposals: int | None = None) -> Theta:
        """Draws as `sample` gives them, corrected by importance resampling.

        Draws of q, by default 10 times as many, are drawn again, with replacement, by their
        smoothed weights. That mends what k-hat below 0.7 leaves to be mended; it cannot find a
        missing mode.
        """
        return self.constrain(self._resampled(key, num_samples, num_proposals)[0])

    def _resampled(self, key: Array, num_samples: int, num_proposals: int | None = None) -> Draws:
        num_samples = checks.positive_int("num_samples", num_samples)
        count = 10 * num_samples if num_proposals is None else num_proposals
        draw_key, choice_key = jax.random.split(key)
        u, log_q, weights = self._draws(draw_key, count, "num_proposals")
        smoothed = diagnostics.psis(_weightless(weights)).log_weights
        # One stratum for each draw: less noise than independent choices.
        rng = host_generator(choice_key)
        places = (np.arange(num_samples) + rng.random(num_samples)) / num_samples
        index = np.searchsorted(np.cumsum(np.exp(smoothed)), places).clip(0, len(u) - 1)
        index = rng.permutation(index)
        return u[index], log_q[index], weights[index]

    def flow_coordinates(self) -> "FlowCoordinates":
        """The target where the flow comes from: nearly a standard normal distribution there.

        Any sampler of log densities moves easily in these coordinates, and what it draws is exact
        even where the fit is not; `constrain` takes its draws back.

        Raises:
            TypeError: if the family is no map of a base, as a mixture is none.

        Source: Hoffman et al., "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural
        Transport", 2019.

        Example:
            With NUTS of BlackJAX, four chains of 1000 draws:

            >>> import blackjax  # doctest: +SKIP
            >>> flow = posterior.flow_coordinates()  # doctest: +SKIP
            >>> warmup = blackjax.window_adaptation(blackjax.nuts, flow.log_density)
            ... # doctest: +SKIP
            >>> def chain(key, z):  # doctest: +SKIP
            ...     (state, tuned), _ = warmup.run(key, z, 500)
            ...     step = blackjax.nuts(flow.log_density, **tuned).step
            ...     keys = jax.random.split(key, 1000)
            ...     return jax.lax.scan(lambda s, k: (step(k, s)[0], s.position), state, keys)[1]
            >>> starts = flow.sample(key, 4)  # doctest: +SKIP
            >>> z = jax.vmap(chain)(jax.random.split(key, 4), starts)  # doctest: +SKIP
            >>> flow.constrain(z)  # doctest: +SKIP
        """
        made = self.family.distribution(self.params)
        rule = "`family` must be a map of a base, as flows are, to have coordinates"
        is_map = hasattr(made, "bijector") and hasattr(made, "distribution")
        fix = "Perhaps use `posterior.refine`?"
        checks.require(is_map, rule, self.family, fix, error=TypeError)
        return FlowCoordinates(self)

    def to_arviz(
        self,
        key: Array,
        num_draws: int = 1000,
        num_chains: int = 4,
        *,
        resample: bool = True,
        predictive: bool = True,
        coords: Axes | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Draws in the form of ArviZ, for `az.summary`, `az.plot_pair`, `az.loo`, `az.plot_ppc`.

        The group `posterior` has what `resample` gives, or `sample` where `resample` is False;
        either way draws are independent of each other, and chains no more than parts of them.
        `sample_stats` has `lp`, the log density of the unconstrained vector, and `log_weight`, the
        importance weight log p - log q of each draw before it was resampled. Where the target is a
        model of another library, `log_likelihood`, `observed_data`, `posterior_predictive`,
        `prior` and `prior_predictive` are there as far as it can give them; of a target over rows,
        `log_likelihood`. What the effective sample size of ArviZ does not see is that resampled
        draws repeat: see `diagnosis`, whose numbers are among the attributes.

        Args:
            key: a random key.
            num_draws: draws of each chain.
            num_chains: chains.
            resample: whether draws are corrected by importance resampling.
            predictive: whether new data and draws of the prior are added where there is a model.
            coords: labels along axes, {axis: labels}, beside those of the model.
            dims: names of axes, {name: axes}, beside those of the model.

        Raises:
            ImportError: if ArviZ is not installed.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> import flowvi as fv
            >>> target = fv.Target.from_named(lambda p: -p["rate"], {"rate": ((), "positive")})
            >>> posterior = fv.fit_posterior(
            ...     target, key=jax.random.key(0), num_steps=10, progress=False
            ... )  # doctest: +SKIP
            >>> data = posterior.to_arviz(jax.random.key(1))  # doctest: +SKIP
            >>> data.posterior["rate"].shape  # doctest: +SKIP
            (4, 1000)
        """
        adapter = interop.adapter("arviz", "posterior.to_arviz")
        num_draws = checks.positive_int("num_draws", num_draws)
        num_chains = checks.positive_int("num_chains", num_chains)
        draw_key, data_key, prior_key = jax.random.split(key, 3)
        source = self._resampled if resample else self._draws
        u, log_q, log_weights = source(draw_key, num_draws * num_chains)
        values = self._named(u)
        groups = {
            "posterior": values,
            "sample_stats": {"lp": log_q + log_weights, "log_weight": log_weights},
            "log_likelihood": self._pointwise(u, values),
        }
        model = self.target.model
        if model is not None and predictive:
            groups["posterior_predictive"] = model.posterior_predictive(data_key, values)

        def split(array: np.ndarray) -> np.ndarray:  # into chains
            return np.asarray(array).reshape(num_chains, num_draws, *np.shape(array)[1:])

        parts = {group: {n: split(x) for n, x in each.items()} for group, each in groups.items()}
        if model is not None:
            parts["observed_data"] = model.observed_data()
            prior = model.prior(prior_key, num_draws) if predictive else ({}, {})
            for group, drawn in zip(("prior", "prior_predictive"), prior, strict=True):
                parts[group] = {n: np.asarray(x)[None] for n, x in drawn.items()}
        notes: dict[str, object] = {"inference_library": "flowvi"}
        notes["draws"] = "importance-resampled" if resample else "of the approximation, as they are"
        if self.diagnosis is not None:
            notes |= {"khat": self.diagnosis.khat, "effective_share": self.diagnosis.ess}
        return adapter.as_data(parts, *self._axes(coords, dims), notes)

    def to_dataframe(self, key: Array, num_draws: int = 4000, *, resample: bool = True) -> Any:
        """Draws as a data frame of pandas: one row each, and a column for each of the labels."""
        adapter = interop.adapter("pandas", "posterior.to_dataframe")
        draw = self._resampled if resample else self._draws
        values = self._named(draw(key, num_draws)[0])
        return adapter.as_frame(values, self.target.labels())

    def to_xarray(
        self,
        key: Array,
        num_draws: int = 4000,
        *,
        resample: bool = True,
        coords: Axes | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Draws as a dataset of xarray, with an axis `draw`; for the rest, see `to_arviz`."""
        adapter = interop.adapter("xarray", "posterior.to_xarray")
        draw = self._resampled if resample else self._draws
        return adapter.as_dataset(self._named(draw(key, num_draws)[0]), *self._axes(coords, dims))

    def _named(self, u: np.ndarray) -> dict[str, np.ndarray]:
        """What `constrain` gives, by name, on the host."""
        values = self.constrain(u)
        values = values if isinstance(values, dict) else {"u": values}
        return {name: np.asarray(each) for name, each in values.items()}  # in their order

    def _axes(
        self, coords: Axes | None, dims: Mapping[str, Sequence[str]] | None
    ) -> tuple[Axes, Mapping[str, Sequence[str]]]:
        model = self.target.model
        known = ({}, {}) if model is None else (model.coords, model.dims)
        return {**known[0], **(coords or {})}, {**known[1], **(dims or {})}

    def _pointwise(
        self, u: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """The log likelihood of each datum at each draw, where there is one."""
        if self.target.model is not None:
            return self.target.model.pointwise(values)
        if self.target.log_likelihood is None:
            return {}
        parts = [
            _rows(self.target, jnp.asarray(u[i : i + CHUNK]), self.target.data)
            for i in range(0, len(u), CHUNK)
        ]
        return {"rows": np.concatenate(jax.device_get(parts))}

    def refine(
        self,
        key: Array,
        num_draws: int = 1000,
        num_chains: int = 4,
        *,
        num_warmup: int = 200,
    ) -> Refined:
        """Exact draws: chains by NUTS that move where the flow comes from.

        There the target is nearly a standard normal distribution, so chains need little warm-up and
        few steps; a Metropolis move to a draw of the posterior after each step takes them from mode
        to mode. What the flow left out near its draws, they find; a mode that neither the fit nor a
        chain ever saw, they do not.

        Args:
            key: a random key.
            num_draws: draws of each chain.
            num_chains: chains.
            num_warmup: steps that adapt the step size of a chain, and are dropped.

        Raises:
            ImportError: if BlackJAX or arviz-stats is not installed.

        Source: Hoffman et al., "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural
        Transport", 2019; Gabrie, Rotskoff, Vanden-Eijnden, "Adaptive Monte Carlo Augmented with
        Normalizing Flows", 2022, for the moves between modes.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> import flowvi as fv
            >>> target = fv.Target(lambda u: -0.5 * jnp.sum((u - 3.0) ** 2), 1)
            >>> posterior = fv.fit_posterior(
            ...     target,
            ...     key=jax.random.key(0),
            ...     family=fv.mean_field(1),
            ...     num_steps=10,
            ...     progress=False,
            ... )
            >>> refined = posterior.refine(jax.random.key(1), 500, 2)
            >>> refined.draws.shape
            (2, 500, 1)
        """
        return refine(self, key, num_draws, num_chains, num_warmup)

    def diagnose(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> Diagnosis:
        """The diagnosis of fresh draws."""
        return diagnose(self.log_weights(key, num_samples))

    def summary(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> "Summary":
        """Mean, standard deviation and quantiles of every parameter, under q and reweighted."""
        u, _, log_weights = self._draws(key, num_samples)
        x = as_table(self.constrain(u))
        weights = np.exp(diagnostics.psis(_weightless(log_weights)).log_weights)
        mean = weights @ x
        sd = np.sqrt(weights @ (x - mean) ** 2)
        q05, median, q95 = np.quantile(x, [0.05, 0.5, 0.95], axis=0)
        return Summary(self.target.labels(), x.mean(0), x.std(0), q05, median, q95, mean, sd)

    def plot(
        self,
        names: Sequence[str] | None = None,
        *,
        key: Array | None = None,
        num_samples: int = 4_000,
        reference: ArrayLike | None = None,
    ) -> "Figure":
        """A picture of marginals and pairs; see `flowvi.plotting.pairs`."""
        key = jax.random.key(0) if key is None else key
        return plotting.pairs(self, key, names=names, num_samples=num_samples, reference=reference)

    def _draws(self, key: Array, num_samples: int, name: str = "num_samples") -> Draws:
        count = checks.positive_int(name, num_samples)
        return draws(self.family, self.target, self.params, key, count)


@dataclasses.dataclass(frozen=True, eq=False)
class FlowCoordinates:
    """A target at u = f(z), where f is the map of a fitted flow and z what it maps.

        log density(z) = log p(f(z)) + log |det df / dz|

    Attributes:
        posterior: the posterior whose flow it is.
    """

    posterior: Posterior

    @property
    def event_size(self) -> int:
        """The length of z."""
        return self.posterior.target.event_size

    def log_density(self, z: Array) -> Array:
        """The log density at one z, of shape [D], to be traced and differentiated by samplers."""
        u, log_det = self._made.bijector.forward_and_log_det(z)
        target = self.posterior.target
        return target.at(u, target.data) + log_det

    def unconstrained(self, z: ArrayLike) -> Array:
        """u = f(z), of shape [..., D]."""
        return _pushed(self.posterior.family, self.posterior.params, as_float(z))

    def constrain(self, z: ArrayLike) -> Theta:
        """The user's parameters at z of shape [..., D]: {name: array}, or u itself."""
        return self.posterior.constrain(self.unconstrained(z))

    def sample(self, key: Array, num_samples: int) -> Array:
        """Draws of the base, of shape [num_samples, D], where chains may start."""
        count = checks.positive_int("num_samples", num_samples)
        return self._made.distribution.sample(seed=key, sample_shape=count)

    @property
    def _made(self) -> Any:
        return self.posterior.family.distribution(self.posterior.params)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table of the parameters: one number for each of the `labels`.

    The first columns are those of draws, the weighted ones of the same by their importance weights.
    """

    labels: list[str]
    mean: np.ndarray
    sd: np.ndarray
    q05: np.ndarray
    median: np.ndarray
    q95: np.ndarray
    weighted_mean: np.ndarray
    weighted_sd: np.ndarray

    def __str__(self) -> str:
        labels, *columns = vars(self).values()
        width = max(10, *map(len, labels))
        heads = [name.replace("_", " ") for name in vars(self)][1:]
        rows = [" " * width + "".join(f"{head:>15}" for head in heads)]
        for label, *cells in zip(labels, *columns, strict=True):
            rows.append(f"{label:<{width}}" + "".join(f"{cell:15.4g}" for cell in cells))
        return "\n".join(rows)


def _weightless(log_weights: np.ndarray) -> np.ndarray:
    """Log weights, in which a draw without a density has no weight."""
    return np.where(np.isnan(log_weights), -np.inf, log_weights)


@compiled()
def _pushed(family: Family, params: PyTree, z: Array) -> Array:
    bijector = family.distribution(params).bijector
    return bijector.forward(z.reshape(-1, z.shape[-1])).reshape(z.shape)


@compiled()
def _rows(target: Target, u: Array, data: PyTree) -> Array:
    """The log likelihood of each row at each u."""
    return vectorise.over(lambda each, rows: target.row_terms(each, rows), u, data)


def draws(
    family: Family, target: Target, params: PyTree, key: Array, num_samples: int = NUM_DIAGNOSIS
) -> Draws:
    """(u, log q, log p - log q) of draws of q, by one program for any number of them."""
    keys = (jax.random.fold_in(key, index) for index in range(-(-num_samples // CHUNK)))
    parts = [jax.device_get(_chunk(family, target, params, k, target.data)) for k in keys]
    u, log_q, log_p = (np.concatenate(column)[:num_samples] for column in zip(*parts, strict=True))
    return u, log_q, log_p.astype(np.float64) - log_q


@compiled(2)
def _chunk(family: Family, target: Target, params: PyTree, key: Array, data: PyTree) -> PyTree:
    u, log_q = family.distribution(params).sample_and_log_prob(seed=key, sample_shape=CHUNK)
    u = devices.split(u)
    return devices.placed((u, log_q, target.log_joint({}, key, u, data)))
