"""Several families, each the context of the next: hierarchies of latent variables."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from distrax import Distribution

from flowvi import distributions
from flowvi.families.family import Array, Family, Params, Trained, as_family, bare_init, replaced
from flowvi.params import PyTree
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
        self._first = member(0, None)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (sum(self._sizes),)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self._first.batch_shape

    @property
    def dtype(self) -> jnp.dtype:
        """A float, whatever the dtypes of the members."""
        return jnp.result_type(float)

    def log_prob(self, value: Array) -> Array:
        ends = tuple(itertools.accumulate(self._sizes))[:-1]
        parts = jnp.split(jnp.asarray(value), ends, axis=-1)
        total = self._first.log_prob(parts[0])
        for number, (before, part) in enumerate(itertools.pairwise(parts), 1):
            total = total + self._member(number, before).log_prob(part)
        return total

    def _sample_n(self, key: Array, n: int) -> Array:
        def one(q: Distribution, key: Array, shape: tuple[int, ...], flag: bool) -> Draws:
            return q.sample(seed=key, sample_shape=shape), jnp.zeros(())

        return self._draws(key, (n,), one)[0]

    def _sample_n_and_log_prob(self, key: Array, n: int) -> Draws:
        def one(q: Distribution, key: Array, shape: tuple[int, ...], flag: bool) -> Draws:
            return q.sample_and_log_prob(seed=key, sample_shape=shape)

        return self._draws(key, (n,), one)

    def draw(self, key: Array, sample_shape: tuple[int, ...], reparameterized: bool) -> Draws:
        def one(q: Distribution, key: Array, shape: tuple[int, ...], flag: bool) -> Draws:
            return distributions.draw(q, key, shape, reparameterized=flag)

        return self._draws(key, sample_shape, one)

    def draw_each(self, key: Array, sample_shape: tuple[int, ...], reparameterized: bool) -> Draws:
        def one(q: Distribution, key: Array, shape: tuple[int, ...], flag: bool) -> Draws:
            return distributions.draw_each(q, key, shape, reparameterized=flag)

        return self._draws(key, sample_shape, one, combine=True)

    def _draws(
        self, key: Array, shape: tuple[int, ...], one: Callable[..., Draws], combine: bool = False
    ) -> Draws:
        """Draws of one member after the other, and the sum of a number that comes with each."""
        whole: PyTree = None
        total, keys = jnp.zeros(()), jax.random.split(key, len(self._sizes))
        for number, (key, flag) in enumerate(zip(keys, self._flags, strict=True)):
            before = None if number == 0 else whole[..., -self._sizes[number - 1] :]
            q = self._member(number, before) if number else self._first
            part, value = one(q, key, () if number else shape, flag)
            part, total = part.astype(self.dtype), value + total
            if number and combine:
                # Every choice of this member with every one of those before.
                whole = jnp.broadcast_to(whole, (len(part), *whole.shape))
            if number:
                part = jnp.concatenate([whole, part], -1)
            if number and combine:
                part, total = (a.reshape(-1, *a.shape[2:]) for a in (part, total))
            whole = part
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
        return [self._first, *(self._member(i, z) for i, z in enumerate(before, 1))]


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
    def event_shape(self) -> tuple[int, ...]:
        return (sum(family.event_shape[0] for family in self.families),)

    @property
    def context_shape(self) -> tuple[int, ...] | None:
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
        old = params["families"]
        same = all(a is b for a, b in zip(new, old, strict=True))
        new_params = replaced(params, families=old if same else tuple(new))
        return JointDistribution(member, self.families), new_params

    def _seen(self, number: int, before: Array | None, context: PyTree) -> Array | None:
        """The context of a family: the z before it, where it wants that with the context too."""
        if before is None:
            return context
        before = before.astype(jnp.result_type(float))
        if context is None or self.families[number].context_shape == before.shape[-1:]:
            return before
        batch = self.check_context(context)
        flat = jnp.asarray(context).reshape(*batch, math.prod(self.context_shape or ()))
        leading = jnp.broadcast_shapes(batch, before.shape[:-1])
        wide = [jnp.broadcast_to(a, leading + a.shape[-1:]) for a in (flat, before)]
        return jnp.concatenate(wide, -1)


def joint(*families: Family) -> JointFamily:
    """Several families of vectors, each the context of the next.

        p(z) = p(z_1) p(z_2 | z_1) p(z_3 | z_2) ...

    As a prior, whose first family takes no context, it is a hierarchy of latents. As a posterior
    its first family sees x, and each later one the z before it; or, where its context is so long, x
    and that z in one vector, q(z_1 | x) q(z_2 | x, z_1) .... Events are the vectors in a row, which
    the likelihood sees. Its KL divergence from another one is estimated from draws.

    Members may be discrete: `fv.objectives.ScoreFunction` then takes the score of their choices
    only, and `fv.objectives.Enumeration` sums over them.

    Args:
        *families: at least two, over vectors. The context of each but the first is as long as the
            event before it; or as that and the joint family's own context together.

    Source: Rezende, Mohamed, Wierstra, "Stochastic Backpropagation and Approximate Inference in
    Deep Generative Models", 2014; Sonderby, Raiko, Maaloe, Sonderby, Winther, "Ladder Variational
    Autoencoders", 2016.
    """
    for number, family in enumerate(families):
        if len(as_family(family, f"families[{number}]").event_shape) != 1:
            got = f"event shape {family.event_shape} of {family!r} in place {number}"
            raise ValueError(f"`families` must be over vectors; got {got}.")
    if len(families) < 2:
        raise ValueError(f"`families` must be at least two; got {len(families)}.")
    own = families[0].context_shape
    for number, (before, family) in enumerate(itertools.pairwise(families), 1):
        size = before.event_shape[0]
        allowed = [(size,)] if own is None else [(size,), (math.prod(own) + size,)]
        if family.context_shape not in allowed:
            both = "" if own is None else f", or {allowed[1]}, that together with the context {own}"
            rule = f"context shape {allowed[0]}, the event of the family before{both}"
            got = f"{family.context_shape} of {family!r}"
            raise ValueError(f"`families` must have in place {number} {rule}; got {got}.")
    return JointFamily(families)
