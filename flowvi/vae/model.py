"""The model: three families."""

import dataclasses
from typing import Any

import jax
import numpy as np

from flowvi import checks
from flowvi.families import Family
from flowvi.objectives import CUBO, ELBO, IWELBO, Joint, Renyi, Variational
from flowvi.vae import evaluation, inputs, programs
from flowvi.vae.batches import Likelihood, context_of, row_of
from flowvi.vae.evaluation import CHUNK, KL_RULES, Evaluation

Array = jax.Array
Params = dict[str, Any]

#: Objectives whose gradients flow through the draws.
PATHWISE = (ELBO, IWELBO, Renyi, CUBO)


@dataclasses.dataclass(frozen=True)
class VAE:
    """A latent-variable model p(z) p(x | z) with a posterior q(z | x): three families.

    The posterior is amortized, a family whose context is x, such as `fv.conditional` of an encoder;
    or each row of the data has its own, a family whose context is the number of the row, such as
    `fv.local`. Then x[i] is row i in all methods, or that of their `rows`.

    Its parameters are a dict with the keys "prior", "likelihood" and "posterior". All methods are
    compiled, take x of shape [*batch, *event] with any leading axes, and give one number a row in
    nats, or draws with the axes of the batch. Their memory is bounded whatever the number of rows
    and draws, and the draws of a row depend on the key and the row's place only.

    Attributes:
        prior: the family of p(z); it takes no context.
        likelihood: the family of p(x | z); its context is z.
        posterior: the family of q(z | x); its context is x, or of shape () the number of a row.

    Raises:
        TypeError: if one of them is no family.
        ValueError: if their shapes disagree, or a family's context is missing or superfluous.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed, "Variational
    Inference with Normalizing Flows", 2015.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(64), MLP(2, (32,), 64)),
        ...     posterior=fv.conditional(fv.gaussian(2), MLP(64, (32,), 4)),
        ... )
        >>> params = vae.init(jax.random.key(0))
        >>> x = jax.random.bernoulli(jax.random.key(1), shape=(5, 64))
        >>> vae.elbo(params, jax.random.key(2), x).shape
        (5,)
        >>> vae.sample(params, jax.random.key(3), 10).shape
        (10, 64)
    """

    prior: Family
    likelihood: Family
    posterior: Family

    def __post_init__(self) -> None:
        for name in inputs.NAMES:
            family = getattr(self, name)
            if not isinstance(family, Family):
                raise TypeError(
                    f"`{name}` must be a family, such as `fv.standard_normal(2)`; got {family!r}."
                )
        if self.prior.context_shape is not None:
            raise ValueError(
                "`prior` must take no context; got context shape "
                f"{self.prior.context_shape} of {self.prior!r}."
            )
        latent, event = self.latent_shape, self.event_shape
        for name, family, shape, source in (
            ("likelihood", self.likelihood, latent, f"z of the prior {self.prior!r}"),
            ("posterior", self.posterior, event, f"x of the likelihood {self.likelihood!r}"),
        ):
            if family.context_shape is None:
                raise ValueError(
                    f"`{name}` must take {source} as context; got {family!r}, which takes none. "
                    "Perhaps use `fv.conditional(family, network)`?"
                )
            by_row = name == "posterior" and self.is_local
            if family.context_shape != shape and not by_row:
                raise ValueError(
                    f"`{name}` must have context shape {shape}, the shape of {source}; got "
                    f"{family.context_shape} of {family!r}."
                )
        if self.posterior.event_shape != latent:
            raise ValueError(
                f"`posterior` must have event shape {latent}, that of the prior {self.prior!r}; "
                f"got {self.posterior.event_shape} of {self.posterior!r}."
            )

    @property
    def is_local(self) -> bool:
        """Whether each row has its own posterior, whose context is the row's number."""
        return self.posterior.context_shape == () != self.event_shape

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return self.likelihood.event_shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one z."""
        return self.prior.event_shape

    def init(self, key: Array) -> Params:
        """Fresh parameters: {"prior", "likelihood", "posterior"}."""
        return programs.init(self, key)

    def loss(self, objective: type[Variational] = ELBO, **options: Any) -> Any:
        """A loss of this model for `fit` and `fit_vae`, over batches {"x": [B, *event]}.

        Where each row has its own posterior, over batches {"x": [B, *event], "row": [B]}.

        Args:
            objective: one of `fv.objectives`: `ELBO`, `IWELBO`, `Renyi`, `CUBO`, `ForwardKL`,
                `ScoreFunction` or `Enumeration`.
            **options: of the objective, such as `num_samples`; of `ELBO` also `kl_weight`,
                `warm_up` and `free_bits`.

        `ELBO` and `IWELBO` train all of the model. `ForwardKL` gives prior and likelihood no
        gradient, and `CUBO` is an upper bound of log p(x), which they would lower: both are for a
        posterior whose model is held fixed, by `optax.multi_transform` with
        `optax.set_to_zero()`.

        Returns:
            The objective, a loss whose `init` makes what stands beside the model's parameters.

        Raises:
            TypeError: if it is no objective.
            ValueError: if the objective needs draws that carry gradients, and the posterior's carry
                none.

        Example:
            >>> import flowvi as fv
            >>> from flowvi.networks import MLP
            >>> vae = fv.VAE(
            ...     prior=fv.standard_normal(2),
            ...     likelihood=fv.conditional(fv.bernoulli(64), MLP(2, (32,), 64)),
            ...     posterior=fv.conditional(fv.gaussian(2), MLP(64, (32,), 4)),
            ... )
            >>> vae.loss(fv.objectives.IWELBO, num_samples=8).num_samples
            8
        """
        if not (isinstance(objective, type) and issubclass(objective, Variational)):
            raise TypeError(
                "`objective` must be an objective, such as `fv.objectives.ELBO`; got "
                f"{objective!r}."
            )
        if issubclass(objective, PATHWISE) and not self.posterior.reparameterized:
            raise ValueError(
                f"`posterior` must be reparameterised for the objective {objective.__name__}, "
                f"whose gradients flow through the draws; got {self.posterior!r}. Perhaps use "
                "`fv.objectives.ScoreFunction`?"
            )
        joint = Joint(self.prior, Likelihood(self.likelihood))
        context = row_of if self.is_local else context_of
        return objective(self.posterior, joint, context=context, **options)

    def log_joint(self, params: Params, x: Any, z: Any) -> Array:
        """log p(x, z) = log p(z) + log p(x | z), of shape [...].

        Args:
            params: the parameters.
            x: of shape [..., *event_shape].
            z: of shape [..., *latent_shape]; the leading axes of both broadcast.

        Raises:
            ValueError: if a shape is wrong.
        """
        x, z = inputs.check_x(self, x), inputs.check_z(self, z)
        return programs.log_joint(self, params, x, z)

    def evaluate(
        self,
        params: Params,
        key: Array,
        x: Any,
        num_samples: int = 1,
        *,
        rows: Any = None,
        kl: str = "auto",
        chunk_size: int = CHUNK,
    ) -> Evaluation:
        """ELBO, rate, distortion and log likelihood of each row, from the same draws of q(z | x).

            rate = KL(q(z | x) || p(z)),   distortion = -E_q log p(x | z),
            elbo = -rate - distortion,
            log_likelihood = log (1/K sum_k p(x, z_k) / q(z_k | x))

        Args:
            params: the parameters.
            key: a random key.
            x: of shape [*batch, *event_shape].
            num_samples: K, the draws of each row.
            rows: integers of shape [*batch], which rows x are of a posterior that each row has for
                itself; by default 0, 1, 2, ...
            kl: the rule for the rate: "analytic", "sampled", or "auto": analytic where it exists.
            chunk_size: evaluations of the decoder that are in memory together.

        Returns:
            An `Evaluation` of arrays of shape [*batch].

        Raises:
            ValueError: if a shape or an option is wrong, or a row has no posterior.
            TypeError: if `rows` are no integers.
            NotImplementedError: if `kl` is "analytic" and there is no closed form.

        Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016; Alemi,
        Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018.
        """
        if kl not in KL_RULES:
            raise ValueError(f"`kl` must be one of {', '.join(KL_RULES)}; got {kl!r}.")
        num_samples, draws, chunk_size = inputs.counts(num_samples, chunk_size)
        x, context, batch_shape = inputs.with_context(self, x, rows)
        found = evaluation.evaluate(
            self, inputs.own(params), key, x, context, np.int32(num_samples), draws, kl, chunk_size
        )
        return Evaluation(*(each.reshape(batch_shape) for each in found))

    def elbo(
        self, params: Params, key: Array, x: Any, num_samples: int = 1, **options: Any
    ) -> Array:
        """The evidence lower bound E_q [log p(x, z) - log q(z | x)] of each row; see `evaluate`."""
        return self.evaluate(params, key, x, num_samples, **options).elbo

    def rate_and_distortion(
        self, params: Params, key: Array, x: Any, num_samples: int = 1, **options: Any
    ) -> tuple[Array, Array]:
        """KL(q(z | x) || p(z)) and -E_q log p(x | z) of each row; see `evaluate`."""
        found = self.evaluate(params, key, x, num_samples, **options)
        return found.rate, found.distortion

    def log_likelihood(
        self, params: Params, key: Array, x: Any, num_samples: int, **options: Any
    ) -> Array:
        """log p(x) of each row from K importance-weighted draws; see `evaluate`.

        In expectation a lower bound, which rises with K and tends to log p(x).
        """
        return self.evaluate(params, key, x, num_samples, **options).log_likelihood

    def log_weights(
        self,
        params: Params,
        key: Array,
        x: Any,
        num_samples: int,
        *,
        rows: Any = None,
        chunk_size: int = CHUNK,
    ) -> Array:
        """log p(x, z_k) - log q(z_k | x) of shape [K, *batch], at the draws of `evaluate`."""
        num_samples, draws, chunk_size = inputs.counts(num_samples, chunk_size)
        x, context, batch_shape = inputs.with_context(self, x, rows)
        found = evaluation.log_weights(
            self, inputs.own(params), key, x, context, num_samples, draws, chunk_size
        )
        return found.reshape(num_samples, *batch_shape)

    def prior_bound(
        self, params: Params, key: Array, x: Any, num_samples: int, *, chunk_size: int = CHUNK
    ) -> Array:
        """log (1/K sum_k p(x | z_k)) of each row, z_k from the prior: the bound that needs no q.

        All rows share the draws, so K must be very large before it says much; but it holds whatever
        the posterior.
        """
        num_samples, draws, chunk_size = inputs.counts(num_samples, chunk_size)
        x, batch_shape = inputs.as_rows(self, x)
        found = evaluation.prior_bound(
            self, inputs.own(params), key, x, np.int32(num_samples), draws, chunk_size
        )
        return found.reshape(batch_shape)

    def sample(
        self,
        params: Params,
        key: Array,
        sample_shape: Any = (),
        *,
        num_per_latent: int | None = None,
    ) -> Array:
        """Draws of x from the model: z from the prior, x given z.

        Args:
            params: the parameters.
            key: a random key.
            sample_shape: how many z.
            num_per_latent: how many x for one z; None for one, without an axis of its own.

        Returns:
            sample_shape + event_shape, or sample_shape + (num_per_latent,) + event_shape.
        """
        count = (
            None
            if num_per_latent is None
            else checks.positive_int("num_per_latent", num_per_latent)
        )
        return programs.sample(self, inputs.own(params), key, inputs.as_shape(sample_shape), count)

    def encode(
        self, params: Params, key: Array, x: Any, sample_shape: Any = (), *, rows: Any = None
    ) -> Array:
        """Draws of z from q(z | x), of shape sample_shape + batch + latent_shape."""
        context = inputs.context(self, x, rows)
        return self.posterior.sample(params["posterior"], key, sample_shape, context)

    def decode(self, params: Params, z: Any) -> Array:
        """The mean of p(x | z), of shape [..., *event_shape] for z of shape [..., *latent_shape].

        Raises:
            ValueError: if z has the wrong shape.
            NotImplementedError: if the likelihood does not know its mean.
        """
        return programs.decode(self, inputs.own(params), inputs.check_z(self, z))

    def reconstruct(
        self, params: Params, key: Array, x: Any, num_samples: int = 1, *, rows: Any = None
    ) -> Array:
        """The mean of p(x' | z) for z from q(z | x), of the shape of x.

        Args:
            params: the parameters.
            key: a random key.
            x: of shape [*batch, *event_shape].
            num_samples: draws of z, over which the means are averaged.
            rows: as in `evaluate`.

        Raises:
            ValueError: if x has the wrong shape.
            NotImplementedError: if the likelihood does not know its mean.
        """
        num_samples = checks.positive_int("num_samples", num_samples)
        z = self.encode(params, key, x, num_samples, rows=rows)
        return self.decode(params, z).mean(0)

    def sample_given(
        self,
        params: Params,
        key: Array,
        x: Any,
        sample_shape: Any = (),
        *,
        rows: Any = None,
        hold_latent: bool = False,
    ) -> Array:
        """Draws x' like x: z from q(z | x), x' given z.

        Args:
            params: the parameters.
            key: a random key.
            x: of shape [*batch, *event_shape].
            sample_shape: how many x' for each x.
            rows: as in `evaluate`.
            hold_latent: whether all x' of an x come from one z; by default each has its own.

        Returns:
            sample_shape + batch + event_shape.
        """
        context = inputs.context(self, x, rows)
        return programs.sample_given(
            self, inputs.own(params), key, context, inputs.as_shape(sample_shape), bool(hold_latent)
        )
