"""What amortization costs, row by row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flowvi import checks
from flowvi.families import Conditional
from flowvi.objectives import Variational
from flowvi.vae.defaults import ROW_STEPS
from flowvi.vae.model import VAE
from flowvi.vae.rows import FittedRows, begin_rows, fit_rows

Array = jax.Array


class AmortizationGap(NamedTuple):
    """Bounds of log p(x) of each row, in nats: arrays of shape [num_rows].

        log p(x) - encoder = (log p(x) - refined) + (refined - encoder)
        inference gap      = approximation gap    + amortization gap

    Attributes:
        encoder: the ELBO of the encoder's posterior.
        refined: that of the row's own posterior, the best of the family as far as steps went.
            Never below `encoder`: a row that its steps did not make better keeps what the encoder
            said.
        importance_weighted: log (1/K sum_k p(x, z_k) / q(z_k | x)) of the refined posterior, in
            expectation at most log p(x), to which it tends; None of a single draw, where it says
            nothing beyond the ELBO.
        rows: the model and the parameters of the refined posteriors.
    """

    encoder: Array
    refined: Array
    importance_weighted: Array | None
    rows: FittedRows

    @property
    def amortization(self) -> Array:
        """refined - encoder, at least 0: what the encoder loses to the best of its family."""
        return self.refined - self.encoder

    @property
    def approximation(self) -> Array | None:
        """importance_weighted - refined: what the family loses, about."""
        if self.importance_weighted is None:
            return None
        return self.importance_weighted - self.refined

    @property
    def inference(self) -> Array | None:
        """importance_weighted - encoder: the sum of the two."""
        if self.importance_weighted is None:
            return None
        return self.importance_weighted - self.encoder


def amortization_gap(
    vae: VAE,
    params: Any,
    x: Any,
    *,
    key: Array,
    num_samples: int = 1000,
    num_steps: int = ROW_STEPS,
    batch_size: int | None = None,
    objective: type[Variational] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    progress: bool = True,
    **options: Any,
) -> AmortizationGap:
    """How much better each row's own posterior is than the encoder's.

    The rows begin where the encoder puts them and are refined by `fit_rows`. Both are then
    evaluated on the same noise, so that their difference is less noisy than either; of each row the
    better one counts, on that noise. The gap therefore is at least 0, and that of a row which has
    nothing to gain is 0 or, from a chance in the noise, a little above.

    Args:
        vae: the model; its posterior is one of `fv.conditional`.
        params: its parameters.
        x: array of shape [num_rows, *event_shape]; rows the model was not fitted to tell more.
        key: a random key.
        num_samples: K, draws of each row in the evaluation.
        num_steps: steps of each row.
        batch_size: as in `fit_rows`, as are those that follow.
        objective: see there.
        optimizer: see there.
        progress: see there.
        **options: of the objective.

    Returns:
        An `AmortizationGap`.

    Raises:
        TypeError: if an argument is of the wrong kind, or there is no encoder.
        ValueError: if shapes disagree, or data are outside of the likelihood's support.

    Source: Cremer, Li, Duvenaud, "Inference Suboptimality in Variational Autoencoders", 2018.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(1),
        ...     likelihood=fv.conditional(fv.gaussian(4), MLP(1, (), 8)),
        ...     posterior=fv.conditional(fv.gaussian(1), MLP(4, (8,), 2)),
        ... )
        >>> x = jax.random.normal(jax.random.key(0), (20, 4))
        >>> params = vae.init(jax.random.key(1))
        >>> gap = fv.amortization_gap(vae, params, x, key=jax.random.key(2), progress=False)
        >>> bool((gap.amortization >= 0).all()), gap.importance_weighted.shape
        (True, (20,))
    """
    if isinstance(vae, VAE) and not isinstance(vae.posterior, Conditional):
        raise TypeError(
            "`vae` must have an encoder, a posterior by `fv.conditional`, to have a gap; got "
            f"{vae.posterior!r}."
        )
    num_samples = checks.positive_int("num_samples", num_samples)
    fit_key, key = jax.random.split(key)
    fitted = fit_rows(
        vae,
        params,
        x,
        key=fit_key,
        num_steps=num_steps,
        batch_size=batch_size,
        objective=objective,
        optimizer=optimizer,
        progress=progress,
        **options,
    )
    encoder = vae.evaluate(params, key, x, num_samples)
    refined = fitted.vae.evaluate(fitted.params, key, x, num_samples)
    better = refined.elbo > encoder.elbo
    weighted = jnp.where(better, refined.log_likelihood, encoder.log_likelihood)
    return AmortizationGap(
        encoder=encoder.elbo,
        refined=jnp.where(better, refined.elbo, encoder.elbo),
        importance_weighted=weighted if num_samples > 1 else None,
        rows=_kept(vae, params, x, fitted, better),
    )


def _kept(vae: VAE, params: Any, x: Any, fitted: FittedRows, better: Array) -> FittedRows:
    """The fitted rows, where they are better, and the encoder's elsewhere."""
    _, start = begin_rows(vae, params, jax.random.key(0), x)
    rows = jax.tree.map(
        lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old),
        fitted.params["posterior"]["rows"].value,
        start["posterior"]["rows"].value,
    )
    own: Any = fitted.vae.posterior
    posterior = own.with_rows(fitted.params["posterior"], rows)
    return fitted._replace(params={**fitted.params, "posterior": posterior})
