"""A model together with what a fit found."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from flowvi import plotting
from flowvi.training import Fitted
from flowvi.vae.enumeration import exact_posterior, log_marginal
from flowvi.vae.evaluation import Params
from flowvi.vae.model import VAE

P = ParamSpec("P")
R = TypeVar("R")


def _fitted(
    function: Callable[Concatenate[Any, Params, P], R],
) -> Callable[Concatenate["FittedVAE", P], R]:
    """A function of a model and its parameters, as a method of `FittedVAE`."""

    @functools.wraps(function)
    def method(self: "FittedVAE", *args: P.args, **kwargs: P.kwargs) -> R:
        return function(self.vae, self.params, *args, **kwargs)

    # As editors and `help` show it: without the model and its parameters.
    signature = inspect.signature(function)
    owner, _, *rest = signature.parameters.values()
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[owner.replace(name="self", annotation=inspect.Parameter.empty), *rest]
    )
    lines = (method.__doc__ or "").splitlines(keepends=True)
    own = ("vae: a", "params: the parameters", "params: its parameters")
    method.__doc__ = "".join(line for line in lines if not line.strip().startswith(own))
    return cast(Callable[Concatenate["FittedVAE", P], R], method)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FittedVAE(Fitted):
    """A model that was fitted: the methods of `VAE`, at the parameters that were learned.

    Attributes:
        vae: the model.
        result: the parameters, the history, and why training ended.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> x = jax.random.bernoulli(jax.random.key(0), 0.3, (100, 8))
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(2, (16,), 8)),
        ...     posterior=fv.conditional(fv.gaussian(2), MLP(8, (16,), 4)),
        ... )
        >>> fitted = fv.fit_vae(vae, x, key=jax.random.key(1), num_steps=50, progress=False)
        >>> fitted.sample(jax.random.key(2), 10).shape, fitted.elbo(jax.random.key(3), x).shape
        ((10, 8), (100,))
        >>> fitted
        FittedVAE(event_shape=(8,), latent_shape=(2,), stop_reason='max_steps', num_steps=50)
    """

    vae: VAE

    sample = _fitted(VAE.sample)
    sample_given = _fitted(VAE.sample_given)
    encode = _fitted(VAE.encode)
    decode = _fitted(VAE.decode)
    reconstruct = _fitted(VAE.reconstruct)
    evaluate = _fitted(VAE.evaluate)
    elbo = _fitted(VAE.elbo)
    rate_and_distortion = _fitted(VAE.rate_and_distortion)
    log_likelihood = _fitted(VAE.log_likelihood)
    log_weights = _fitted(VAE.log_weights)
    log_joint = _fitted(VAE.log_joint)
    prior_bound = _fitted(VAE.prior_bound)
    log_marginal = _fitted(log_marginal)
    exact_posterior = _fitted(exact_posterior)

    plot_samples = _fitted(plotting.prior_samples)
    plot_reconstructions = _fitted(plotting.reconstructions)
    plot_latent_space = _fitted(plotting.latent_space)
    plot_manifold = _fitted(plotting.manifold)

    def plot(self) -> Any:
        """ELBO, distortion and rate over the steps: a matplotlib figure."""
        return plotting.curves(self.result)

    def __repr__(self) -> str:
        vae, result = self.vae, self.result
        return (
            f"{type(self).__name__}(event_shape={vae.event_shape}, "
            f"latent_shape={vae.latent_shape}, stop_reason={result.stop_reason.value!r}, "
            f"num_steps={result.num_steps})"
        )
