"""The compiled functions of a model, in bounded memory at any number of draws and rows.

Rows go through in chunks, and so do the draws of a row. The draws of row i depend on the key and on
i alone, and the first K of them are the same whatever comes after: no result depends on the chunks,
nor on which other rows there are.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.compiling import compiled
from flowvi.objectives import closed_form
from flowvi.params import PyTree

if TYPE_CHECKING:
    from flowvi.vae.model import VAE

Array = jax.Array
Params = dict[str, PyTree]
Shape = tuple[int, ...]
KLRule = Literal["auto", "analytic", "sampled"]

#: Evaluations of the decoder that are in memory together.
CHUNK = 4096

#: Draws of one row that are, at most.
DRAWS = 64


class Evaluation(NamedTuple):
    """What K draws of q(z | x) say about each row, in nats.

    Attributes:
        elbo: the evidence lower bound, -rate - distortion.
        rate: KL(q(z | x) || p(z)).
        distortion: -E_q log p(x | z).
        log_likelihood: log (1/K sum_k p(x, z_k) / q(z_k | x)), at most log p(x) in expectation.
    """

    elbo: Array
    rate: Array
    distortion: Array
    log_likelihood: Array


class Terms(NamedTuple):
    """log p(z), log p(x | z) and log q(z | x) of draws."""

    prior: Array
    likelihood: Array
    posterior: Array

    @property
    def log_weights(self) -> Array:
        """log p(z) + log p(x | z) - log q(z | x)."""
        return self.prior + self.likelihood - self.posterior


class WeightSum(NamedTuple):
    """The sum of weights so far, relative to the largest."""

    largest: Array
    total: Array

    def add(self, log_weights: Array) -> "WeightSum":
        """With those along the last axis of log weights."""
        largest = jnp.maximum(self.largest, jnp.max(log_weights, -1))
        # Where no draw has had a weight yet there is nothing to subtract.
        middle = jnp.where(jnp.isneginf(largest), 0, largest)
        total = self.total * jnp.exp(self.largest - middle)
        return WeightSum(largest, total + jnp.sum(jnp.exp(log_weights - middle[..., None]), -1))

    def log_mean(self, count: Array | np.int32) -> Array:
        """The logarithm of the mean of so many weights."""
        return self.largest + jnp.log(self.total / count)


def no_weights(shape: Shape, dtype: jnp.dtype) -> WeightSum:
    """The sum of none."""
    return WeightSum(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))


class Chunks(NamedTuple):
    """Draws of a row, and evaluations of the decoder, that are in memory together."""

    draws: int
    size: int = CHUNK


def row_keys(key: Array, num_rows: int) -> Array:
    """A key for each row."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_rows))


def draw_keys(row_key: Array, first: Array, count: int) -> Array:
    """The keys of draws number first, ..., first + count - 1 of a row."""
    return jax.vmap(functools.partial(jax.random.fold_in, row_key))(first + jnp.arange(count))


def over_rows(function: Callable[..., PyTree], rows: tuple[Array, ...], chunks: Chunks) -> PyTree:
    """`function` of each row, as many rows together as chunks allow."""
    together = max(1, min(len(rows[0]), chunks.size // chunks.draws))
    return jax.lax.map(lambda row: function(*row), rows, batch_size=together)


def _draw_terms(vae: "VAE", params: Params, q: distrax.Distribution, x: Array, key: Array) -> Terms:
    z, log_q = q.sample_and_log_prob(seed=key)
    p = vae.likelihood.distribution(params["likelihood"], z)
    log_prior = vae.prior.distribution(params["prior"]).log_prob(z)
    return Terms(log_prior, p.log_prob(x), log_q)


def closed_rate(vae: "VAE", params: Params, q: distrax.Distribution, kl: str) -> Array | None:
    """KL(q || p(z)) where it has a closed form and is to be taken; else None."""
    if kl == "sampled":
        return None
    try:
        return closed_form.kl_divergence(q, vae.prior.distribution(params["prior"]))
    except NotImplementedError:
        if kl == "analytic":
            raise
        return None


@compiled(static_argnums=(6, 7))
def evaluate(
    vae: "VAE",
    params: Params,
    key: Array,
    x: Array,
    context: Array,
    num_samples: Array | np.int32,
    chunks: Chunks,
    kl: KLRule,
) -> Evaluation:
    """The evaluation of rows x of shape [N, *event]: arrays of shape [N].

    `num_samples` is traced, so that one program serves any number. The context is that of the
    posterior: x itself, or the row's number.
    """
    draws = chunks.draws

    def of_row(key: Array, x: Array, context: Array) -> Evaluation:
        q = vae.posterior.distribution(params["posterior"], context)
        of_draw = functools.partial(_draw_terms, vae, params, q, x)

        def chunk(index: Array, sums: tuple[Terms, WeightSum]) -> tuple[Terms, WeightSum]:
            terms = jax.vmap(of_draw)(draw_keys(key, index * draws, draws))
            counts = index * draws + jnp.arange(draws) < num_samples
            total = jax.tree.map(
                lambda old, new: old + jnp.sum(jnp.where(counts, new, 0)), sums[0], terms
            )
            return total, sums[1].add(jnp.where(counts, terms.log_weights, -jnp.inf))

        shapes = jax.eval_shape(of_draw, key)
        zero = Terms(*(jnp.zeros((), shape.dtype) for shape in shapes))
        start = (zero, no_weights((), jnp.result_type(*shapes)))
        total, weights = jax.lax.fori_loop(0, -(-num_samples // draws), chunk, start)
        mean = jax.tree.map(lambda total: total / num_samples, total)
        rate = closed_rate(vae, params, q, kl)
        rate = mean.posterior - mean.prior if rate is None else rate
        return Evaluation(
            elbo=mean.likelihood - rate,
            rate=rate,
            distortion=-mean.likelihood,
            log_likelihood=weights.log_mean(num_samples),
        )

    return over_rows(of_row, (row_keys(key, len(x)), x, context), chunks)


@compiled(static_argnums=(5, 6))
def log_weights(
    vae: "VAE",
    params: Params,
    key: Array,
    x: Array,
    context: Array,
    num_samples: int,
    chunks: Chunks,
) -> Array:
    """log p(x, z_k) - log q(z_k | x) of shape [K, N], at the draws that `evaluate` takes."""
    draws = chunks.draws

    def of_row(key: Array, x: Array, context: Array) -> Array:
        q = vae.posterior.distribution(params["posterior"], context)

        def chunk(index: Array) -> Array:
            keys = draw_keys(key, index * draws, draws)
            of_draw = functools.partial(_draw_terms, vae, params, q, x)
            return jax.vmap(of_draw)(keys).log_weights

        indices = jnp.arange(-(-num_samples // draws))
        return jax.lax.map(chunk, indices).reshape(-1)[:num_samples]

    return over_rows(of_row, (row_keys(key, len(x)), x, context), chunks).T


@compiled(static_argnums=(5,))
def prior_bound(
    vae: "VAE", params: Params, key: Array, x: Array, num_samples: Array | np.int32, chunks: Chunks
) -> Array:
    """log (1/K sum_k p(x | z_k)) of shape [N], with draws of the prior that all rows share."""
    draws = chunks.draws
    prior = vae.prior.distribution(params["prior"])

    def of_rows(x: Array) -> Array:
        def chunk(index: Array, weights: WeightSum) -> WeightSum:
            keys = draw_keys(key, index * draws, draws)
            z = jax.vmap(lambda key: prior.sample(seed=key))(keys)
            # The decoder sees each draw once, whatever the number of rows.
            p = vae.likelihood.distribution(params["likelihood"], z)
            terms = jax.vmap(lambda x: p.log_prob(jnp.broadcast_to(x, (draws, *x.shape))))(x)
            counts = index * draws + jnp.arange(draws) < num_samples
            return weights.add(jnp.where(counts, terms, -jnp.inf))

        start = no_weights((len(x),), jnp.result_type(float))
        weights = jax.lax.fori_loop(0, -(-num_samples // draws), chunk, start)
        return weights.log_mean(num_samples)

    return over_blocks(of_rows, x, max(1, chunks.size // draws))


def over_blocks(function: Callable[[Array], Array], x: Array, size: int) -> Array:
    """`function` of blocks of rows, put together again."""
    size = min(size, len(x))
    whole = len(x) - len(x) % size
    parts = []
    if whole:
        blocks = jax.lax.map(function, x[:whole].reshape(-1, size, *x.shape[1:]))
        parts.append(blocks.reshape(-1))
    if whole < len(x):
        parts.append(function(x[whole:]))
    return jnp.concatenate(parts)


@compiled()
def init(vae: "VAE", key: Array) -> Params:
    """Fresh parameters."""
    keys = jax.random.split(key, 3)
    return {
        "prior": vae.prior.init(keys[0]),
        "likelihood": vae.likelihood.init(keys[1]),
        "posterior": vae.posterior.init(keys[2]),
    }


@compiled()
def log_joint(vae: "VAE", params: Params, x: Array, z: Array) -> Array:
    """log p(z) + log p(x | z)."""
    batch_shape = jnp.broadcast_shapes(
        x.shape[: x.ndim - len(vae.event_shape)], z.shape[: z.ndim - len(vae.latent_shape)]
    )
    x = jnp.broadcast_to(x, batch_shape + vae.event_shape)
    z = jnp.broadcast_to(z, batch_shape + vae.latent_shape)
    p = vae.likelihood.distribution(params["likelihood"], z)
    return vae.prior.distribution(params["prior"]).log_prob(z) + p.log_prob(x)


@compiled(static_argnums=(3, 4))
def sample(
    vae: "VAE", params: Params, key: Array, sample_shape: Shape, num_per_latent: int | None
) -> Array:
    """Draws of p(x)."""
    latent_key, key = jax.random.split(key)
    prior = vae.prior.distribution(params["prior"])
    z = prior.sample(seed=latent_key, sample_shape=sample_shape)
    p = vae.likelihood.distribution(params["likelihood"], z)
    if num_per_latent is None:
        return p.sample(seed=key)
    return jnp.moveaxis(p.sample(seed=key, sample_shape=num_per_latent), 0, len(sample_shape))


@compiled()
def decode(vae: "VAE", params: Params, z: Array) -> Array:
    """The mean of p(x | z)."""
    return vae.likelihood.distribution(params["likelihood"], z).mean()


@compiled(static_argnums=(4, 5))
def sample_given(
    vae: "VAE", params: Params, key: Array, context: Array, sample_shape: Shape, share: bool
) -> Array:
    """Draws of x' like x, whose posterior has this context."""
    latent_key, key = jax.random.split(key)
    q = vae.posterior.distribution(params["posterior"], context)
    z = q.sample(seed=latent_key, sample_shape=() if share else sample_shape)
    p = vae.likelihood.distribution(params["likelihood"], z)
    return p.sample(seed=key, sample_shape=sample_shape if share else ())
