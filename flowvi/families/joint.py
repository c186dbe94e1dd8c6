"""Several families, each the context of the next: hierarchies of latent variables."""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from distrax import Distribution

from flowvi import distributions
from flowvi.checks import require
from flowvi.families.family import Context, Family, Params, Trained, as_family, bare_init
from flowvi.families.parts import Parts, fitting
from flowvi.params import Array, PyTree, Shape
from flowvi.supports import Support, concatenated

Draws = tuple[Array, Array]


class JointDistribution(Distribution):
    """The distribution of vectors z_1, z_2, ... in a row, each drawn given the one before.

        log p(z) = log p(z_1) + log p(z_2 | z_1) + log p(z_3 | z_2) + ...

    `member` is (number, the z before it or None) -> the distribution of z number so and so, whose
    batch axes are those of the z before it. Draws and choices are as in `flowvi.distributions`.
    """

    def __init__(self, member: Callable[..., Distribution], families: tuple[Family, ...]):
        super().__init__()
        self._member = member
        self._sizes = tuple(family.event_shape[0] for family in families)
        self._flags = tuple(family.reparameterized for family in families)
        self.first = member(0, None)

    def with_first(self, first: Distribution) -> "JointDistribution":
        """The same with another distribution of the first vector."""
        changed = copy.copy(self)
        changed.first = first
        return changed

    @property
    def event_shape(self) -> Shape:
        return (sum(self._sizes),)

    @property
    def batch_shape(self) -> Shape:
        return self.first.batch_shape

    @property
    def dtype(self) -> jnp.dtype:
        """A float, whatever the dtypes of the members."""
        return jnp.result_type(float)

    def log_prob(self, value: Array) -> Array:
        ends = tuple(itertools.accumulate(self._sizes))[:-1]
        parts = jnp.split(jnp.asarray(value), ends, axis=-1)
        total = self.first.log_prob(parts[0])
        for number, (before, part) in enumerate(itertools.pairwise(parts), 1):
            total = total + self._member(number, before).log_prob(part)
        return total

    def _sample_n(self, key: Array, n: int) -> Array:
        return self._draws(key, (n,), _sample)[0]

    def _sample_n_and_log_prob(self, key: Array, n: int) -> Draws:
        return self._draws(key, (n,), _sample_and_log_prob)

    def draw(self, key: Array, sample_shape: Shape, reparameterized: bool) -> Draws:
        return self._draws(key, sample_shape, distributions.draw)

    def draw_each(self, key: Array, sample_shape: Shape, reparameterized: bool) -> Draws:
        return self._draws(key, sample_shape, distributions.draw_each)

    def _draws(self, key: Array, shape: Shape, one: Callable[..., Draws]) -> Draws:
        """Draws of one member after the other, and the sum of a number that comes with each."""
        keys, combine = jax.random.split(key, len(self._sizes)), one is distributions.draw_each
        whole, total = one(self.first, keys[0], shape, reparameterized=self._flags[0])
        whole = whole.astype(self.dtype)
        for number, flag in enumerate(self._flags[1:], 1):
            q = self._member(number, whole[..., -self._sizes[number - 1] :])
            # A member without a context has no rows of its own.
            rows = whole.shape[: whole.ndim - 1 - len(q.batch_shape)]
            part, value = one(q, keys[number], rows, reparameterized=flag)
            part, total = part.astype(self.dtype), value + total
            if combine:  # every choice of this member with every one of those before
                whole = jnp.broadcast_to(whole, (len(part), *whole.shape))
            whole = jnp.concatenate([whole, part], -1)
            if combine:
                whole, total = (a.reshape(-1, *a.shape[2:]) for a in (whole, total))
        return whole, total

    def num_choices(self, reparameterized: bool) -> int | None:
        pairs = zip(self._members(), self._flags, strict=True)
        return _product(distributions.num_choices(q, reparameterized=flag) for q, flag in pairs)

    def support_size(self) -> int | None:
        return _product(distributions.support_size(q) for q in self._members())

    def support(self) -> Array:
        parts = [distributions.support(q) for q in self._members()]
        places = jnp.meshgrid(*(jnp.arange(len(part)) for part in parts), indexing="ij")
        rows = [part[place.ravel()] for part, place in zip(parts, places, strict=True)]
        return jnp.concatenate([row.astype(self.dtype) for row in rows], -1)

    def _members(self) -> list[Distribution]:
        """All members, at some values of those before."""
        before = [jnp.zeros((*self.batch_shape, size)) for size in self._sizes[:-1]]
        return [self.first, *(self._member(i, z) for i, z in enumerate(before, 1))]


def _sample(q: Distribution, key: Array, shape: Shape, reparameterized: bool) -> Draws:
    return q.sample(seed=key, sample_shape=shape), jnp.zeros(())


def _sample_and_log_prob(q: Distribution, key: Array, shape: Shape, reparameterized: bool) -> Draws:
    return q.sample_and_log_prob(seed=key, sample_shape=shape)


def _product(counts: Iterable[int | None]) -> int | None:
    """The product of counts that are all known."""
    known = list(counts)
    return None if None in known else math.prod(known)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, repr=False)
class JointFamily(Family):
    """Several families, each the context of the next; see `joint`."""

    families: tuple[Family, ...]

    def __repr__(self) -> str:
        return f"joint({', '.join(map(repr, self.families))})"

    @functools.cached_property
    def support(self) -> Support:
        return concatenated([family.support for family in self.families])

    @property
    def event_shape(self) -> Shape:
        return (sum(family.event_shape[0] for family in self.families),)

    @property
    def context_shape(self) -> Shape | None:
        return self.families[0].context_shape

    @property
    def reparameterized(self) -> bool:
        return all(family.reparameterized for family in self.families)

    def init(self, key: Array) -> Params:
        keys = jax.random.split(key, len(self.families))
        return {"families": tuple(map(bare_init, self.families, keys))}

    def distribution(self, params: Params, context: PyTree = None) -> Distribution:
        self.check_context(context)

        def member(number: int, before: Array | None) -> Distribution:
            seen = self._seen(number, before, context)
            return self.families[number].distribution(params["families"][number], seen)

        return JointDistribution(member, self.families)

    def train_distribution(self, params: Params, key: Array, context: PyTree = None) -> Trained:
        self.check_context(context)
        draw_key, *keys = jax.random.split(key, 1 + len(self.families))

        def trained(number: int, before: Array | None) -> Trained:
            seen = self._seen(number, before, context)
            family, own = self.families[number], params["families"][number]
            return family.train_distribution(own, keys[number], seen)

        def member(number: int, before: Array | None) -> Distribution:
            distribution = trained(number, before)[0]
            if isinstance(distribution, distributions.RelaxedDistribution):
                rule = "`families` of `fv.joint` must not be relaxed: their rate has no closed form"
                raise ValueError(f"{rule}; got {self.families[number]!r}.")
            return distribution

        # What the members hand back may depend on what they are given, so draws are made for them;
        # where nothing is handed back they are never computed.
        new, before = [], None
        for number in range(len(self.families)):
            distribution, own = trained(number, before)
            new.append(own)
            key = jax.random.fold_in(draw_key, number)
            before = jax.lax.stop_gradient(distribution.sample(seed=key))
        if any(a is not b for a, b in zip(new, params["families"], strict=True)):
            params = {**params, "families": tuple(new)}
        return JointDistribution(member, self.families), params

    def _seen(self, number: int, before: Array | None, context: PyTree) -> Context:
        """The context of a family: the z before it, or the joint family's own context and that."""
        if before is None:
            return context
        parts = _parts(self.families, number)
        return parts({"context": context, "before": before.astype(jnp.result_type(float))})  # type: ignore[dict-item]


def _parts(families: Sequence[Family], number: int) -> Parts:
    """What a family after the first one sees; an error where its context fits nothing."""
    family, own = families[number], families[0].context_shape
    shapes, both = {"before": families[number - 1].event_shape}, ""
    choices: list[tuple[str, ...]] = [(), ("before",)]
    if own is not None:
        shapes["context"] = own
        choices.append(("context", "before"))
        size = math.prod(own) + math.prod(shapes["before"])
        both = f", or {(size,)}, that together with the context {own}"
    if (parts := fitting(family.context_shape, shapes, choices)) is None:
        rule = (
            f"no context, or context shape {shapes['before']}, the event of the family before{both}"
        )
        got = f"{family.context_shape} of {family!r}"
        raise ValueError(f"`families` must have in place {number} {rule}; got {got}.")
    return parts


def joint(*families: Family) -> JointFamily:
    """Several families of vectors, each the context of the next.

        p(z) = p(z_1) p(z_2 | z_1) p(z_3 | z_2) ...

    As a prior, whose first family takes no context, it is a hierarchy of latents. As a posterior
    its first family sees x, and each later one the z before it; or, where its context is so long, x
    and that z in one vector, q(z_1 | x) q(z_2 | x, z_1) .... A later family without a context is
    independent of those before. Events are the vectors in a row, which the likelihood sees. Its KL
    divergence from another one is estimated from draws.

    Members may be discrete: `fv.objectives.ScoreFunction` then takes the score of their choices
    only, and `fv.objectives.Enumeration` sums over them.

    Args:
        *families: at least two, over vectors. Each but the first takes no context, or one as long
            as the event before it, or as that and the joint family's own context together.

    Raises:
        ValueError: if there are fewer than two, one is not over vectors, or a context does not
            fit.

    Source: Rezende, Mohamed, Wierstra, "Stochastic Backpropagation and Approximate Inference in
    Deep Generative Models", 2014; Sonderby, Raiko, Maaloe, Sonderby, Winther, "Ladder Variational
    Autoencoders", 2016.

    Example:
        >>> import jax, flowvi as fv
        >>> prior = fv.joint(fv.standard_normal(2), fv.maf(3, context_size=2))
        >>> prior.sample(prior.init(jax.random.key(0)), jax.random.key(1), (4,)).shape
        (4, 5)
    """
    for number, family in enumerate(families):
        if len(as_family(family, f"families[{number}]").event_shape) != 1:
            got = f"event shape {family.event_shape} of {family!r} in place {number}"
            raise ValueError(f"`families` must be over vectors; got {got}.")
    require(len(families) >= 2, "`families` must be at least two", len(families))
    for number in range(1, len(families)):
        _parts(families, number)
    return JointFamily(families)
