"""Flow matching: a continuous flow learns the velocities of straight lines from noise to data."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi.checks import require
from flowvi.families import Family, Flow
from flowvi.families.continuous import ContinuousMap
from flowvi.objectives.likelihood import NegativeLogLikelihood
from flowvi.params import Array, PyTree


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The mean squared error of velocities, as a loss for `fit`; no equation is solved.

        loss = 1/n sum_i |v(t_i, (1 - t_i) z_i + t_i x_i; context_i) - (x_i - z_i)|^2

    for rows x_i, noise z_i of the base and times t_i, each uniform on (0, 1), which together are
    spread evenly. Its minimum is the velocity that takes the base to the data. It is not in nats,
    and its least value is above zero. The base gets no gradient.

    A batch is a dict as that of `NegativeLogLikelihood`, with the same "weight".

    Attributes:
        family: a continuous flow, as `fv.continuous` makes it.

    Raises:
        TypeError: if the family is no such flow.

    Source: Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow Matching for Generative Modeling", 2023, with
    the paths of section 4.1 of least width 0.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.continuous(2, hidden_sizes=[8])
        >>> loss_fn = fv.objectives.FlowMatching(family)
        >>> params = family.init(jax.random.key(0))
        >>> loss_fn(params, jax.random.key(1), {"x": jnp.zeros((10, 2))}).shape
        ()
    """

    family: Flow

    def __post_init__(self) -> None:
        rule = "`family` must be a continuous flow, such as `fv.continuous(2)`"
        require(_is_continuous(self.family), rule, self.family, error=TypeError)

    def __call__(self, params: PyTree, key: Array, batch: dict[str, Array]) -> Array:
        noise_key, time_key = jax.random.split(key)
        x, context = batch["x"], batch.get("context")
        base = self.family.base.distribution(
            params["family"], self.family.features(params, context)
        )
        count = len(x)
        each = () if base.batch_shape else (count,)  # A context has a row of noise of its own.
        z = base.sample(seed=noise_key, sample_shape=each)
        z = jax.lax.stop_gradient(z).astype(x.dtype)
        t = (jax.random.uniform(time_key, (), x.dtype) + jnp.arange(count) / count) % 1
        t = t.astype(x.dtype)
        place = z + t[:, None] * (x - z)
        transform: ContinuousMap = self.family.transform  # type: ignore[assignment]
        v = transform.velocity(params["transform"], t, place, context)
        return jnp.mean(batch.get("weight", 1.0) * ((v - (x - z)) ** 2).sum(-1))


def _is_continuous(family: Family) -> bool:
    return isinstance(family, Flow) and isinstance(family.transform, ContinuousMap)


def training_loss(family: Family) -> FlowMatching | NegativeLogLikelihood:
    """The loss by which a family says that it is trained on rows of data.

    Args:
        family: any family; a continuous flow of `trained_by="matching"` is matched, and of all
            others the likelihood is raised.

    Example:
        >>> import flowvi as fv
        >>> type(fv.objectives.training_loss(fv.maf(2))).__name__
        'NegativeLogLikelihood'
    """
    if isinstance(family, Flow) and getattr(family.transform, "is_matched", False):
        return FlowMatching(family)
    return NegativeLogLikelihood(family)
