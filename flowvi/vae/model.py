"""The model: three families, its losses, and what it makes of data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.checks import require
from flowvi.families import Labelled, check_key
from flowvi.objectives import ELBO, Enumeration, Joint, Variational
from flowvi.objectives.bounds import KLRule, check_kl_rule
from flowvi.objectives.variational import Params
from flowvi.params import Array, Shape
from flowvi.vae import evaluation
from flowvi.vae.evaluation import CHUNK, DRAWS, Chunks, Evaluation
from flowvi.vae.families import Data, Families, Given, Rows, as_float, own_params
from flowvi.vae.losses import Likelihood, Seen, Supervised

Size = int | Sequence[int]
#: How much the classification of known labels counts beside the bound; see `VAE.loss`.
LABEL_WEIGHT = 1.0


class Options(TypedDict, total=False):
    """The options of `VAE.evaluate`."""

    context: Given
    rows: Given
    kl: KLRule
    chunk_size: int


@dataclasses.dataclass(frozen=True)
class VAE(Families):
    """A latent-variable model p(z) p(x | z) with a posterior q(z | x): three families.

    With covariates y it is p(z | y) p(x | z, y), with q(z | x, y). `context_shape` is the shape of
    one y, and each family sees y where its own context has room for it: the prior's is then y, the
    likelihood's z and y in one vector, the posterior's x and y in one vector. All methods take y as
    `context`, of shape [*batch, *context_shape].

    The posterior is amortized, a family whose context is x, such as `fv.conditional` of an encoder;
    or each row of the data has its own, a family whose context is the number of the row, such as
    `fv.local`. Then x[i] is row i in all methods, or that of their `rows`.

    Its parameters are a dict with the keys "prior", "likelihood" and "posterior". All methods are
    compiled, take x with any leading axes, and give one number a row in nats, or draws with those
    axes. Memory is bounded; the draws of a row depend on the key and the row's place only.

    Attributes:
        prior: the family of p(z); it takes no context, or y.
        likelihood: the family of p(x | z); its context is z, or z and y.
        posterior: the family of q(z | x); its context is x, or x and y, or of shape () the number
            of a row.
        context_shape: the shape of one y, or its size; None if there are no covariates.

    `fit_vae` has an example without covariates; with a y of ten numbers, for 64 pixels:

        >>> import jax, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(64), MLP(2 + 10, (16,), 64)),
        ...     posterior=fv.conditional(fv.gaussian(2), MLP(64 + 10, (16,), 4)),
        ...     context_shape=10,
        ... )
        >>> params, y = vae.init(jax.random.key(0)), jax.numpy.eye(10)
        >>> vae.sample(params, jax.random.key(1), 3, context=y).shape
        (3, 10, 64)

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed, "Variational
    Inference with Normalizing Flows", 2015; with covariates, Sohn, Lee, Yan, "Learning Structured
    Output Representation using Deep Conditional Generative Models", 2015.
    """

    def init(self, key: Array) -> Params:
        """Fresh parameters: {"prior", "likelihood", "posterior"}."""
        check_key(key)
        return evaluation.init(self, key)

    def loss(
        self,
        objective: type[Variational] | None = None,
        *,
        label_weight: float = LABEL_WEIGHT,
        **options: Any,
    ) -> Variational:
        """A loss of this model for `fit` and `fit_vae`, over batches {"x": [B, *event]}.

        Where there are covariates a batch also has them as "context", of shape [B, *context_shape],
        and where each row has its own posterior the numbers of its rows as "row". The `init` of the
        loss makes what stands beside the model's parameters.

        Args:
            objective: one of `fv.objectives`: `ELBO`, `IWELBO`, `Renyi`, `CUBO`, `ForwardKL`,
                `ScoreFunction` or `Enumeration`. `ELBO` and `IWELBO` train all of the model;
                `ForwardKL` gives prior and likelihood no gradient, and `CUBO` is an upper bound,
                which they would lower: both are for the posterior of a frozen model, by
                `optax.multi_transform` with `optax.set_to_zero()`. By default it is `ELBO`, or
                `Enumeration` with a posterior by `fv.labelled`, whose classes are then summed out.
            label_weight: with such a posterior the loss and its distortion get this weight times
                the mean of -log q(y | x) over the rows of a batch whose label is known, without
                which those rows would teach the classifier nothing.
            **options: of the objective, such as `num_samples`; of `ELBO` also `kl_weight`,
                `warm_up` and `free_bits`.
        """
        is_labelled = isinstance(self.posterior, Labelled)
        if objective is None:
            objective = Enumeration if is_labelled else ELBO
        is_one = isinstance(objective, type) and issubclass(objective, Variational)
        rule = "`objective` must be an objective, such as `fv.objectives.ELBO`"
        require(is_one, rule, objective, error=TypeError)
        require(label_weight >= 0, "`label_weight` must be at least 0", label_weight)
        plain = Likelihood(self)
        likelihood = Supervised(plain, label_weight) if is_labelled and label_weight else plain
        joint = Joint(self.prior, likelihood, Seen(self, "prior"))
        return objective(self.posterior, joint, context=Seen(self, "posterior"), **options)

    def log_joint(self, params: Params, x: Data, z: Data, *, context: Given = None) -> Array:
        """log p(x, z) = log p(z) + log p(x | z), of shape [...].

        The leading axes of x [..., *event_shape] and z [..., *latent_shape] broadcast, and those of
        the context to theirs.
        """
        own, x, z = own_params(self, params), self.check_x(x), self._z(z)
        rows = jnp.broadcast_shapes(self._axes(x), z.shape[: z.ndim - len(self.latent_shape)])
        given = {**self._given(rows, context), "z": jnp.broadcast_to(z, rows + self.latent_shape)}
        x = jnp.broadcast_to(x, rows + self.event_shape)
        likelihood = self.likelihood.log_prob(own["likelihood"], x, self.seen("likelihood", given))
        return self.prior.log_prob(own["prior"], given["z"], self.seen("prior", given)) + likelihood

    def evaluate(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int = 1,
        *,
        context: Given = None,
        rows: Given = None,
        kl: KLRule = "auto",
        chunk_size: int = CHUNK,
    ) -> Evaluation:
        """ELBO, rate, distortion and log likelihood of each row, from the same draws of q(z | x).

            rate = KL(q(z | x) || p(z)),   distortion = -E_q log p(x | z),
            elbo = -rate - distortion,
            log_likelihood = log (1/K sum_k p(x, z_k) / q(z_k | x))

        for K = `num_samples` draws: arrays of shape [*batch] for x of shape [*batch, *event_shape].
        All is given y where there is a `context`, whose leading axes broadcast to [*batch]. Where
        each row has its own posterior, `rows`, integers of shape [*batch], say which they are; by
        default 0, 1, 2, ... The rate is that of the draws where `kl` is "sampled", in
        closed form where it is "analytic", and by default where it has one. So many evaluations of
        the decoder as `chunk_size` are in memory together.

        Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016; Alemi,
        Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018.
        """
        check_kl_rule(kl)
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self.flat(self._of_rows(x, context, rows))
        own = own_params(self, params, key)
        found = evaluation.evaluate(self, own, key, flat, np.int32(count), chunks, kl)
        return Evaluation(*(each.reshape(batch_shape) for each in found))

    def elbo(
        self, params: Params, key: Array, x: Data, num_samples: int = 1, **options: Unpack[Options]
    ) -> Array:
        """The evidence lower bound E_q [log p(x, z) - log q(z | x)] of each row; see `evaluate`."""
        return self.evaluate(params, key, x, num_samples, **options).elbo

    def rate_and_distortion(
        self, params: Params, key: Array, x: Data, num_samples: int = 1, **options: Unpack[Options]
    ) -> tuple[Array, Array]:
        """KL(q(z | x) || p(z)) and -E_q log p(x | z) of each row; see `evaluate`."""
        found = self.evaluate(params, key, x, num_samples, **options)
        return found.rate, found.distortion

    def log_likelihood(
        self, params: Params, key: Array, x: Data, num_samples: int, **options: Unpack[Options]
    ) -> Array:
        """A lower bound of log p(x) that rises to it with `num_samples`; see `evaluate`."""
        return self.evaluate(params, key, x, num_samples, **options).log_likelihood

    def log_weights(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int,
        *,
        context: Given = None,
        rows: Given = None,
        chunk_size: int = CHUNK,
    ) -> Array:
        """log p(x, z_k) - log q(z_k | x) of shape [K, *batch], at the draws of `evaluate`."""
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self.flat(self._of_rows(x, context, rows))
        own = own_params(self, params, key)
        found = evaluation.log_weights(self, own, key, flat, count, chunks)
        return found.reshape(count, *batch_shape)

    def prior_bound(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int,
        *,
        context: Given = None,
        chunk_size: int = CHUNK,
    ) -> Array:
        """log (1/K sum_k p(x | z_k)) of each row, z_k from the prior: the bound that needs no q.

        All rows share the noise of the draws, and K must be very large before it says much.
        """
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self.flat(self.given(x, context))
        own = own_params(self, params, key)
        found = evaluation.prior_bound(self, own, key, flat, np.int32(count), chunks)
        return found.reshape(batch_shape)

    def sample(
        self,
        params: Params,
        key: Array,
        sample_shape: Size = (),
        *,
        context: Given = None,
        num_per_latent: int | None = None,
    ) -> Array:
        """Draws of x, of shape sample_shape + batch + [num_per_latent] + event_shape.

        There are `sample_shape` z for each row of a context [*batch, *context_shape], and
        `num_per_latent` x for each z; None for one, without an axis. With no context batch is ().
        """
        if num_per_latent is not None:
            num_per_latent = checks.positive_int("num_per_latent", num_per_latent)
        shape = _sample_shape(sample_shape, num_per_latent or 1)
        own, (latent_key, key) = own_params(self, params, key), jax.random.split(key)
        z, given = self.sample_latents(own, latent_key, shape, context)
        seen = self.seen("likelihood", {**given, "z": z})
        x = self.likelihood.sample(own["likelihood"], key, num_per_latent or (), seen)
        return x if num_per_latent is None else jnp.moveaxis(x, 0, -1 - len(self.event_shape))

    def sample_latents(
        self, params: Params, key: Array, shape: Shape, context: Given
    ) -> tuple[Array, Rows]:
        """Draws of z from the prior, of shape `shape` + batch + latent_shape; and the context."""
        given = self._given(None, context)
        seen, batch = self.seen("prior", given), shape
        if seen is None and given:
            # A prior that is blind to y draws for each y all the same.
            batch = shape + self._batch_of(given["context"])
        return self.prior.sample(params["prior"], key, batch, seen), given

    def encode(
        self,
        params: Params,
        key: Array,
        x: Data,
        sample_shape: Size = (),
        *,
        context: Given = None,
        rows: Given = None,
    ) -> Array:
        """Draws of z from q(z | x), of shape sample_shape + batch + latent_shape."""
        own, shape = own_params(self, params, key), _sample_shape(sample_shape)
        seen = self.seen("posterior", self._of_rows(x, context, rows))
        return self.posterior.sample(own["posterior"], key, shape, seen)

    def classify(self, params: Params, x: Data) -> Array:
        """log q(y | x) of every class, of shape [*batch, K], with a posterior by `fv.labelled`."""
        if not isinstance(posterior := self.posterior, Labelled):
            raise TypeError(f"`posterior` must be one by `fv.labelled`; got {posterior!r}.")
        own = own_params(self, params)["posterior"]
        return evaluation.classify(posterior, own, as_float(self.check_x(x)))

    def decode(self, params: Params, z: Data, *, context: Given = None) -> Array:
        """The mean of p(x | z), of shape [..., *event_shape], for z [..., *latent_shape].

        The leading axes of z and of the context broadcast.
        """
        given = {**self._given(None, context), "z": self._z(z)}
        return evaluation.decode(self, own_params(self, params), given)

    def reconstruct(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int = 1,
        *,
        context: Given = None,
        rows: Given = None,
    ) -> Array:
        """The mean of p(x' | z), of the shape of x, averaged over `num_samples` z from q(z | x)."""
        num_samples = checks.positive_int("num_samples", num_samples)
        z = self.encode(params, key, x, num_samples, context=context, rows=rows)
        return self.decode(params, z, context=context).mean(0)

    def sample_given(
        self,
        params: Params,
        key: Array,
        x: Data,
        sample_shape: Size = (),
        *,
        context: Given = None,
        rows: Given = None,
        share_latent: bool = False,
    ) -> Array:
        """Draws x' like x, of shape sample_shape + batch + event_shape: x' given z from q(z | x).

        With `share_latent` all x' of an x come from one z; by default each has its own.
        """
        own, shape = own_params(self, params, key), _sample_shape(sample_shape)
        latent_key, key = jax.random.split(key)
        outer, inner = (shape, ()) if share_latent else ((), shape)
        given = self._of_rows(x, context, rows)
        z = self.posterior.sample(
            own["posterior"], latent_key, inner, self.seen("posterior", given)
        )
        seen = self.seen("likelihood", {**given, "z": z})
        return self.likelihood.sample(own["likelihood"], key, outer, seen)


def _sample_shape(sample_shape: int | Sequence[int], others: int = 1) -> Shape:
    shape, most = checks.shape("sample_shape", sample_shape), checks.INT32_MAX
    rule = f"`sample_shape` must be of at most {most:,} draws"
    require(math.prod(shape) * others <= most, rule, sample_shape)
    return shape


def _chunks(num_samples: int, chunk_size: int) -> tuple[int, Chunks]:
    """The number of draws of a row, and the chunks that they go through in."""
    count = checks.positive_int("num_samples", num_samples)
    size = checks.positive_int("chunk_size", chunk_size)
    # Powers of two, so that there are few programs.
    draws = min(1 << (count - 1).bit_length(), DRAWS, 1 << (size.bit_length() - 1))
    return count, Chunks(draws, size)


def check_vae(vae: VAE) -> None:
    """Checks that this is a model."""
    require(isinstance(vae, VAE), "`vae` must be a `fv.VAE(...)`", vae, error=TypeError)
