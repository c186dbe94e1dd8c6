"""Posteriors of a class that is known of some rows, and of what else there is to a row."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.checks import require
from flowvi.families.discrete import OneHotDistribution
from flowvi.families.family import Context, Family, Params, Trained, Wrapper, bare_init, shown
from flowvi.families.joint import JointDistribution, JointFamily
from flowvi.families.observations import Logits
from flowvi.params import Array, Shape


@dataclasses.dataclass(frozen=True, repr=False)
class Labelled(Wrapper):
    """A joint family whose first part, a class, may be known; see `labelled`."""

    family: JointFamily

    def __repr__(self) -> str:
        return shown("labelled", self.family)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.classifier.event_shape[0]

    @property
    def classifier(self) -> Family:
        """The family of q(y | x)."""
        return self.family.families[0]

    @property
    def context_shape(self) -> Shape:
        """x and the label in one vector."""
        return (math.prod(self.family.context_shape or ()) + 1,)

    def init(self, key: Array) -> Params:
        return bare_init(self.family, key)

    def distribution(self, params: Params, context: Context = None) -> JointDistribution:
        x, label = self.apart(context)
        return self._known(self.family.distribution(params, x), label)

    def train_distribution(self, params: Params, key: Array, context: Context = None) -> Trained:
        x, label = self.apart(context)
        joint, new = self.family.train_distribution(params, key, x)
        return self._known(joint, label), new

    def apart(self, context: Context) -> tuple[Array, Array]:
        """x and the label, which stand in one vector."""
        batch = self.check_context(context)
        context = jnp.asarray(context)
        return context[..., :-1].reshape(*batch, *(self.family.context_shape or ())), context[
            ..., -1
        ]

    def _known(self, joint: JointDistribution, label: Array) -> JointDistribution:
        """The joint distribution, in which a known class has the probability 1."""
        first = joint.first
        certain = jnp.where(label[..., None] == jnp.arange(self.num_classes), 0.0, -jnp.inf)
        logits = jnp.where((label >= 0)[..., None], certain, first.logits)
        return joint.with_first(OneHotDistribution(logits, dtype=first.dtype))

    def label_log_prob(self, params: Params, key: Array, context: Context) -> tuple[Array, Array]:
        """log q(label | x) in training form, 0 where there is no label; and where there is one."""
        x, label = self.apart(context)
        is_known = label >= 0
        index = jnp.where(is_known, label, 0).astype(int)
        q, _ = self.classifier.train_distribution(params["families"][0], key, x)
        log_prob = q.log_prob(jax.nn.one_hot(index, self.num_classes))
        return jnp.where(is_known, log_prob, 0), is_known

    def check_labels(self, labels: Array | np.ndarray, name: str) -> Array | np.ndarray:
        """Labels, numbers of classes, with -1 for those that are missing, which are -1 or NaN."""
        if isinstance(labels, jax.core.Tracer):
            return labels
        values, last = np.asarray(labels), self.num_classes - 1
        good = np.isnan(values) | np.isin(values, np.arange(-1, last + 1))
        rule = f"`{name}` must hold labels from 0 to {last}, or -1 or NaN for missing ones"
        if not good.all():
            raise ValueError(f"{rule}; got {values[~good][0]}.")
        return np.where(np.isnan(values), -1, values).astype(np.int32)


def labelled(family: Family) -> Labelled:
    """A posterior of (class, latents) for semi-supervised models: the class is known of some rows.

        q(y, z | x, label) = q(y | x) q(z | x, y),    q(y | x) = 1 at y = label where there is one

    So a model of (y, z), with p(y, z) as its prior and p(x | y, z) as its likelihood, is fitted to
    rows with and without labels by one bound: of log p(x, y) where the label is known, of log p(x)
    where it is missing.

    Its context is x and the label in one vector: the label is what a `fv.VAE` with
    `context_shape=()` takes as context, a number of a class, or -1 or NaN where it is missing.

    Args:
        family: `fv.joint(classifier, ...)`, whose first family is over rows of the identity, as
            `fv.conditional(fv.categorical((), num_classes, one_hot=True), network)` is.

    Raises:
        TypeError: if `family` is no `fv.joint` with a context.
        ValueError: if it does not begin with one class as a row of the identity.

    Example:
        >>> import jax, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> classes = fv.categorical((), 3, one_hot=True)
        >>> vae = fv.VAE(
        ...     prior=fv.joint(fv.unconditional(classes), fv.standard_normal(2)),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(3 + 2, (16,), 8)),
        ...     posterior=fv.labelled(
        ...         fv.joint(
        ...             fv.conditional(classes, MLP(8, (16,), 3)),
        ...             fv.conditional(fv.gaussian(2), MLP(8 + 3, (16,), 4)),
        ...         )
        ...     ),
        ...     context_shape=(),
        ... )
        >>> x, labels = jax.random.bernoulli(jax.random.key(0), 0.3, (4, 8)), [0, -1, 2, -1]
        >>> vae.elbo(vae.init(jax.random.key(1)), jax.random.key(2), x, context=labels).shape
        (4,)

    Source: Kingma, Rezende, Mohamed, Welling, "Semi-supervised Learning with Deep Generative
    Models", 2014, model M2.
    """
    if not isinstance(family, JointFamily) or family.context_shape is None:
        raise TypeError(f"`family` must be a `fv.joint` with a context; got {family!r}.")
    first = family.families[0]
    inner = getattr(first, "family", first)
    is_class = isinstance(inner, Logits) and inner.kind == "one_hot" and inner.shape == ()
    rule = "`family` must begin with one class: `fv.categorical((), K, one_hot=True)` of a network"
    require(is_class, rule, first)
    return Labelled(family)
