"""Models with discrete latents, exactly: by a sum over all values of z."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from flowvi import distributions
from flowvi.compiling import compiled
from flowvi.objectives.enumeration import check_count, support_size
from flowvi.objectives.variational import Params
from flowvi.vae.evaluation import Chunks, over_rows
from flowvi.vae.families import Rows, as_float, own_params
from flowvi.vae.model import VAE, check_vae

Array = jax.Array

#: Values of z that are decoded together.
VALUES = 64


class ExactPosterior(NamedTuple):
    """The posterior of a discrete latent, value by value.

    Attributes:
        z: all its values, of shape [C, *latent_shape].
        log_prob: log p(z | x) of shape [C, *batch].
    """

    z: Array
    log_prob: Array


def log_marginal(
    vae: VAE, params: Params, x: ArrayLike, *, context: ArrayLike | None = None
) -> Array:
    """log p(x) of each row, exactly: the sum over all values of a discrete z.

        log p(x) = log sum_z p(z) p(x | z)

    It is what every bound is to be compared with. The decoder is evaluated at each value once for
    all rows, or for as many as fit into memory.

    Args:
        vae: a model whose prior is discrete, of at most 65,536 values.
        params: its parameters.
        x: of shape [*batch, *event_shape].
        context: of shape [*batch, *context_shape], where the model takes one.

    Returns:
        An array of shape [*batch], in nats.

    Raises:
        ValueError: if the prior is not discrete, or has more values.

    Source: Bishop, "Pattern Recognition and Machine Learning", 2006, section 9.2: a latent variable
    is summed out.

    Example:
        >>> import jax, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.unconditional(fv.bernoulli(3)),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(3, (16,), 8)),
        ...     posterior=fv.conditional(fv.bernoulli(3), MLP(8, (16,), 3)),
        ... )
        >>> params, x = vae.init(jax.random.key(0)), jax.numpy.ones((5, 8))
        >>> bool(
        ...     (vae.elbo(params, jax.random.key(1), x, 1000) < log_marginal(vae, params, x)).all()
        ... )
        True
        >>> z, log_prob = exact_posterior(vae, params, x)
        >>> z.shape, log_prob.shape
        ((8, 3), (8, 5))
    """
    own, rows, batch_shape = _checked(vae, params, x, context)
    return _log_marginal(vae, own, rows).reshape(batch_shape)


def exact_posterior(
    vae: VAE, params: Params, x: ArrayLike, *, context: ArrayLike | None = None
) -> ExactPosterior:
    """p(z | x) of each row, exactly, for every value of a discrete z.

        log p(z | x) = log p(z) + log p(x | z) - log p(x)

    Arguments are those of `log_marginal`, whose example shows both.

    Args:
        vae: a model whose prior is discrete, of at most 65,536 values.
        params: its parameters.
        x: of shape [*batch, *event_shape].
        context: of shape [*batch, *context_shape], where the model takes one.

    Raises:
        ValueError: if the prior is not discrete, or has more values.

    Source: Bayes, "An Essay Towards Solving a Problem in the Doctrine of Chances", 1763.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.unconditional(fv.bernoulli(3)),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(3, (16,), 8)),
        ...     posterior=fv.conditional(fv.bernoulli(3), MLP(8, (16,), 3)),
        ... )
        >>> posterior = fv.exact_posterior(vae, vae.init(jax.random.key(0)), jnp.ones((5, 8)))
        >>> bool(jnp.allclose(jnp.exp(posterior.log_prob).sum(0), 1.0))
        True
    """
    own, rows, batch_shape = _checked(vae, params, x, context)
    z, log_joint = _table(vae, own, rows)
    log_prob = jax.nn.log_softmax(log_joint, axis=0)
    return ExactPosterior(z, log_prob.reshape(len(z), *batch_shape))


def _checked(
    vae: VAE, params: Params, x: ArrayLike, context: ArrayLike | None
) -> tuple[Params, Rows, tuple[int, ...]]:
    """The parameters of the joint density, rows with one axis of them, and the axes they had."""
    check_vae(vae)
    check_count("prior", vae.prior, support_size(vae.prior))
    rows, batch_shape = vae.flat(vae.given(as_float(vae.check_x(x)), context))
    own = own_params(vae, params)
    del own["posterior"]
    return own, rows, batch_shape


def _of_row(vae: VAE, params: Params, rows: Rows) -> tuple[Array, Callable[[Rows], Array]]:
    """(all z, row -> log p(x, z) of each of them)."""
    z = distributions.support(vae.distribution("prior", params, jax.tree.map(lambda a: a[0], rows)))

    def log_joint(row: Rows) -> Array:
        def log_likelihood(z: Array) -> Array:
            p = vae.distribution("likelihood", params, {**row, "z": z})
            return p.log_prob(row["x"])

        found = jax.lax.map(log_likelihood, z, batch_size=min(len(z), VALUES))
        return vae.distribution("prior", params, row).log_prob(z) + found

    return z, log_joint


@compiled()
def _table(vae: VAE, params: Params, rows: Rows) -> tuple[Array, Array]:
    """(all z, log p(x, z) of shape [C, N])."""
    z, log_joint = _of_row(vae, params, rows)
    return z, over_rows(log_joint, (rows,), Chunks(min(len(z), VALUES))).T


@compiled()
def _log_marginal(vae: VAE, params: Params, rows: Rows) -> Array:
    z, log_joint = _of_row(vae, params, rows)
    chunks = Chunks(min(len(z), VALUES))
    return over_rows(lambda row: jax.nn.logsumexp(log_joint(row)), (rows,), chunks)
