"""What a semi-supervised model says of the classes of rows."""

import jax
from jax.typing import ArrayLike

from flowvi.compiling import compiled
from flowvi.families import Labelled
from flowvi.objectives.variational import Params
from flowvi.params import Array
from flowvi.vae.families import as_float, own_params
from flowvi.vae.model import VAE, check_vae


def classify(vae: VAE, params: Params, x: ArrayLike) -> Array:
    """log q(y | x) of every class, of shape [*batch, num_classes] for x of [*batch, *event_shape].

    Args:
        vae: a model with a posterior by `fv.labelled`.
        params: its parameters.
        x: the rows.
    """
    check_vae(vae)
    if not isinstance(posterior := vae.posterior, Labelled):
        raise TypeError(f"`vae` must have a posterior by `fv.labelled`; got {posterior!r}.")
    x = as_float(vae.check_x(x))
    return _classify(posterior, own_params(vae, params)["posterior"], x)


@compiled()
def _classify(posterior: Labelled, params: Params, x: Array) -> Array:
    q = posterior.classifier.distribution(params["families"][0], x)
    return jax.nn.log_softmax(q.logits)
