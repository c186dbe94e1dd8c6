"""The model: three families, its losses, and what it makes of data."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.checks import require
from flowvi.families import Family, as_array, check_key
from flowvi.objectives import ELBO, Joint, Variational
from flowvi.objectives.bounds import KLRule, check_kl_rule
from flowvi.objectives.variational import Batch, DensityAndState, Params
from flowvi.params import Array, Origin, Shape
from flowvi.vae import evaluation
from flowvi.vae.evaluation import CHUNK, DRAWS, NAMES, Chunks, Evaluation

Data = ArrayLike
Size = int | Sequence[int]
Rows = ArrayLike | None


class Options(TypedDict, total=False):
    """The options of `VAE.evaluate`."""

    rows: Rows
    kl: KLRule
    chunk_size: int


@dataclasses.dataclass(frozen=True)
class VAE:
    """A latent-variable model p(z) p(x | z) with a posterior q(z | x): three families.

    The posterior is amortized, a family whose context is x, such as `fv.conditional` of an encoder;
    or each row of the data has its own, a family whose context is the number of the row, such as
    `fv.local`. Then x[i] is row i in all methods, or that of their `rows`.

    Its parameters are a dict with the keys "prior", "likelihood" and "posterior". All methods are
    compiled, take x with any leading axes, and give one number a row in nats, or draws with those
    axes. Memory is bounded; the draws of a row depend on the key and the row's place only.

    Attributes:
        prior: the family of p(z); it takes no context.
        likelihood: the family of p(x | z); its context is z.
        posterior: the family of q(z | x); its context is x, or of shape () the number of a row.

    `fit_vae` has an example.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed, "Variational
    Inference with Normalizing Flows", 2015.
    """

    prior: Family
    likelihood: Family
    posterior: Family

    def __post_init__(self) -> None:
        for name in NAMES:
            family, rule = getattr(self, name), "must be a family, such as `fv.standard_normal(2)`"
            require(isinstance(family, Family), f"`{name}` {rule}", family, error=TypeError)
        is_free = self.prior.context_shape is None
        require(is_free, "`prior` must take no context", self.prior)
        latent, event = self.latent_shape, self.event_shape
        for name, shape, source in (
            ("likelihood", latent, f"z of the prior {self.prior!r}"),
            ("posterior", event, f"x of the likelihood {self.likelihood!r}"),
        ):
            family, fix = getattr(self, name), "Perhaps use `fv.conditional(family, network)`?"
            taken = family.context_shape
            fits = taken == shape or (name == "posterior" and self.is_unamortized)
            rule = f"`{name}` must take {source}, of shape {shape}, as context"
            require(taken is not None, rule, family, f"It takes none. {fix}")
            require(fits, f"{rule} rather than one of shape {taken}", family)
        rule = f"`posterior` must have event shape {latent}, that of the prior {self.prior!r},"
        found = self.posterior.event_shape
        require(found == latent, f"{rule} rather than {found}", self.posterior)

    @property
    def is_unamortized(self) -> bool:
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
        check_key(key)
        return evaluation.init(self, key)

    def loss(self, objective: type[Variational] = ELBO, **options: Any) -> Variational:
        """A loss of this model for `fit` and `fit_vae`, over batches {"x": [B, *event]}.

        Where each row has its own posterior, over batches {"x": [B, *event], "row": [B]}. The
        `init` of the loss makes what stands beside the model's parameters.

        Args:
            objective: one of `fv.objectives`: `ELBO`, `IWELBO`, `Renyi`, `CUBO`, `ForwardKL`,
                `ScoreFunction` or `Enumeration`. `ELBO` and `IWELBO` train all of the model;
                `ForwardKL` gives prior and likelihood no gradient, and `CUBO` is an upper bound,
                which they would lower: both are for the posterior of a frozen model, by
                `optax.multi_transform` with `optax.set_to_zero()`.
            **options: of the objective, such as `num_samples`; of `ELBO` also `kl_weight`,
                `warm_up` and `free_bits`.
        """
        is_one = isinstance(objective, type) and issubclass(objective, Variational)
        rule = "`objective` must be an objective, such as `fv.objectives.ELBO`"
        require(is_one, rule, objective, error=TypeError)
        joint = Joint(self.prior, Likelihood(self.likelihood))
        context = row_of if self.is_unamortized else x_of
        return objective(self.posterior, joint, context=context, **options)

    def log_joint(self, params: Params, x: Data, z: Data) -> Array:
        """log p(x, z) = log p(z) + log p(x | z), of shape [...].

        The leading axes of x [..., *event_shape] and z [..., *latent_shape] broadcast.
        """
        own, x, z = own_params(self, params), self.check_x(x), self._z(z)
        z_rows = z.shape[: z.ndim - len(self.latent_shape)]
        rows = jnp.broadcast_shapes(self._batch_shape(x), z_rows)
        x = jnp.broadcast_to(x, rows + self.event_shape)
        z = jnp.broadcast_to(z, rows + self.latent_shape)
        likelihood = self.likelihood.log_prob(own["likelihood"], x, z)
        return self.prior.log_prob(own["prior"], z) + likelihood

    def evaluate(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int = 1,
        *,
        rows: Rows = None,
        kl: KLRule = "auto",
        chunk_size: int = CHUNK,
    ) -> Evaluation:
        """ELBO, rate, distortion and log likelihood of each row, from the same draws of q(z | x).

            rate = KL(q(z | x) || p(z)),   distortion = -E_q log p(x | z),
            elbo = -rate - distortion,
            log_likelihood = log (1/K sum_k p(x, z_k) / q(z_k | x))

        for K = `num_samples` draws: arrays of shape [*batch] for x of shape [*batch, *event_shape].
        Where each row has its own posterior, `rows`, integers of shape [*batch], say which they
        are; by default 0, 1, 2, ... The rate is that of the draws where `kl` is "sampled", in
        closed form where it is "analytic", and by default where it has one. So many evaluations of
        the decoder as `chunk_size` are in memory together.

        Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016; Alemi,
        Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018.
        """
        check_kl_rule(kl)
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self._rows(x, rows)
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
        rows: Rows = None,
        chunk_size: int = CHUNK,
    ) -> Array:
        """log p(x, z_k) - log q(z_k | x) of shape [K, *batch], at the draws of `evaluate`."""
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self._rows(x, rows)
        own = own_params(self, params, key)
        found = evaluation.log_weights(self, own, key, flat, count, chunks)
        return found.reshape(count, *batch_shape)

    def prior_bound(
        self, params: Params, key: Array, x: Data, num_samples: int, *, chunk_size: int = CHUNK
    ) -> Array:
        """log (1/K sum_k p(x | z_k)) of each row, z_k from the prior: the bound that needs no q.

        All rows share the draws, and K must be very large before it says much.
        """
        count, chunks = _chunks(num_samples, chunk_size)
        x, own = self.check_x(x), own_params(self, params, key)
        flat = x.reshape(-1, *self.event_shape)
        found = evaluation.prior_bound(self, own, key, flat, np.int32(count), chunks)
        return found.reshape(self._batch_shape(x))

    def sample(
        self,
        params: Params,
        key: Array,
        sample_shape: Size = (),
        *,
        num_per_latent: int | None = None,
    ) -> Array:
        """Draws of x, of shape sample_shape + [num_per_latent] + event_shape: z, then x given z.

        There are `sample_shape` z, and `num_per_latent` x for each; None for one, without an axis.
        """
        if num_per_latent is not None:
            num_per_latent = checks.positive_int("num_per_latent", num_per_latent)
        shape = _sample_shape(sample_shape, num_per_latent or 1)
        own, (latent_key, key) = own_params(self, params, key), jax.random.split(key)
        z = self.prior.sample(own["prior"], latent_key, shape)
        x = self.likelihood.sample(own["likelihood"], key, num_per_latent or (), z)
        return x if num_per_latent is None else jnp.moveaxis(x, 0, len(shape))

    def encode(
        self, params: Params, key: Array, x: Data, sample_shape: Size = (), *, rows: Rows = None
    ) -> Array:
        """Draws of z from q(z | x), of shape sample_shape + batch + latent_shape."""
        own, shape = own_params(self, params, key), _sample_shape(sample_shape)
        return self.posterior.sample(own["posterior"], key, shape, self._context(x, rows))

    def decode(self, params: Params, z: Data) -> Array:
        """The mean of p(x | z), of shape [..., *event_shape], for z [..., *latent_shape]."""
        return evaluation.decode(self, own_params(self, params), self._z(z))

    def reconstruct(
        self, params: Params, key: Array, x: Data, num_samples: int = 1, *, rows: Rows = None
    ) -> Array:
        """The mean of p(x' | z), of the shape of x, averaged over `num_samples` z from q(z | x)."""
        num_samples = checks.positive_int("num_samples", num_samples)
        return self.decode(params, self.encode(params, key, x, num_samples, rows=rows)).mean(0)

    def sample_given(
        self,
        params: Params,
        key: Array,
        x: Data,
        sample_shape: Size = (),
        *,
        rows: Rows = None,
        share_latent: bool = False,
    ) -> Array:
        """Draws x' like x, of shape sample_shape + batch + event_shape: x' given z from q(z | x).

        With `share_latent` all x' of an x come from one z; by default each has its own.
        """
        own, shape = own_params(self, params, key), _sample_shape(sample_shape)
        latent_key, key = jax.random.split(key)
        outer, inner = (shape, ()) if share_latent else ((), shape)
        z = self.posterior.sample(own["posterior"], latent_key, inner, self._context(x, rows))
        return self.likelihood.sample(own["likelihood"], key, outer, z)

    def check_x(self, x: Data) -> Array:
        """x of shape [*batch, *event_shape]."""
        x = as_array("x", x)
        checks.trailing_shape("x", x, self.event_shape, f"the likelihood {self.likelihood!r}")
        return jnp.asarray(x)

    def _z(self, z: Data) -> Array:
        z = as_array("z", z)
        checks.trailing_shape("z", z, self.latent_shape, f"the prior {self.prior!r}")
        return jnp.asarray(z)

    def _batch_shape(self, x: Array) -> Shape:
        return x.shape[: x.ndim - len(self.event_shape)]

    def _context(self, x: Data, rows: Data | None) -> Array:
        """The context of the posterior: x, or the numbers of its rows, of shape [*batch]."""
        x = self.check_x(x)
        if not self.is_unamortized:
            rule = "`rows` must be None for an amortized posterior, which needs x alone"
            require(rows is None, rule, rows)
            return as_float(x)
        shape = self._batch_shape(x)
        count = math.prod(shape)
        rows = np.arange(count).reshape(shape) if rows is None else as_array("rows", rows)
        require(rows.shape == shape, f"`rows` must have shape {shape}, as `x` does", rows.shape)
        self.posterior.check_context(rows)
        return jnp.asarray(rows)

    def _rows(self, x: Data, rows: Data | None) -> tuple[tuple[Array, Array], Shape]:
        """x and the posterior's context with one axis of rows, and the axes they had."""
        x, context = self.check_x(x), self._context(x, rows)
        flat = context.reshape(-1, *(self.posterior.context_shape or ()))
        return (x.reshape(-1, *self.event_shape), flat), self._batch_shape(x)


def check_vae(vae: VAE) -> None:
    """Checks that this is a model."""
    require(isinstance(vae, VAE), "`vae` must be a `fv.VAE(...)`", vae, error=TypeError)


def own_params(vae: VAE, params: Params, key: Array | None = None) -> Params:
    """The parameters of a model without what may stand beside them; an error for another's."""
    if key is not None:
        check_key(key)
    if not isinstance(params, dict) or any(name not in params for name in NAMES):
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        fix = " Perhaps use its `.params`?" if hasattr(params, "params") else ""
        rule = "`params` must be a dict with the keys prior, likelihood and posterior, such as"
        raise ValueError(f"{rule} `vae.init(key)`; got {got}.{fix}")
    for name in NAMES:
        family, own = getattr(vae, name), params[name]
        origin = own.get("origin") if isinstance(own, dict) else None
        rule = f'`params["{name}"]` must be those of {family!r}'
        if isinstance(origin, Origin) and origin.family != family:
            raise ValueError(f"{rule}; got those of {origin.family!r}.")
        shapes, expected = [np.shape(leaf) for leaf in jax.tree.leaves(own)], _shapes(family)
        require(shapes == expected, f"{rule}, arrays of shapes {expected}", shapes)
    return {name: params[name] for name in NAMES}


@functools.lru_cache(maxsize=64)
def _shapes(family: Family) -> list[Shape]:
    """The shapes of the leaves of a family's parameters."""
    made = jax.eval_shape(family.init, jax.random.key(0))
    return [leaf.shape for leaf in jax.tree.leaves(made)]


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


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """(params, key, z, batch) -> log p(x | z) of shape [K, B], in its training form."""

    family: Family

    #: Whether z may be of shape [K, 1, *latent], for values that all rows share.
    takes_shared: ClassVar[bool] = True

    def __call__(self, params: Params, key: Array, z: Array, batch: Batch) -> DensityAndState:
        own, x, event = params["likelihood"], jnp.asarray(batch["x"]), self.family.event_shape
        shared = z.shape[1] == 1 != len(x)
        p, new = self.family.train_distribution(own, key, z[:, 0] if shared else z)
        if shared:
            # Mapped over rows, what depends on z alone is computed once.
            shape = (z.shape[0], *event)
            log_prob = jax.vmap(lambda row: p.log_prob(jnp.broadcast_to(row, shape)))(x).T
        else:
            leading = z.shape[: z.ndim - len(self.family.context_shape or ())]
            log_prob = p.log_prob(jnp.broadcast_to(x, leading + event))
        return log_prob, {} if new is own else {"likelihood": new}


def x_of(batch: Batch) -> Array:
    """What an encoder sees of a batch."""
    return as_float(batch["x"])


def row_of(batch: Batch) -> Array:
    """What a posterior without an encoder is conditioned on: the numbers of the rows."""
    return batch["row"]


def weights_of(batch: Batch) -> Array:
    """The weights of a batch's rows."""
    return batch["weight"]


def as_float(x: Data) -> Array:
    """Whole numbers as networks take them; others as they are."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))
