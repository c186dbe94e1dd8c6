"""Families made for latents: joint, relaxed, unconditional."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import distributions
from flowvi.params import partition
from tests import tolerances
from tests.families.test_families import CASES, conditional, contexts, perturbed, started

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", ["joint", "joint_posterior", "joint_mixed"])
def test_a_joint_family_is_its_members_one_after_the_other(name):
    family, context = CASES[name], contexts(name, 5)

    @jax.jit
    def found(params, context):
        q = family.distribution(params, context)
        z, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=4)
        total, start, before = 0.0, 0, None
        for member, own in zip(family.families, params["families"], strict=True):
            part = z[..., start : start + member.event_shape[0]]
            seen = context
            if before is not None and member.context_shape == before.shape[-1:]:
                seen = before
            elif before is not None:
                flat = context.reshape(5, -1)
                seen = jnp.concatenate([jnp.broadcast_to(flat, (4, *flat.shape)), before], -1)
            total += member.distribution(own, seen).log_prob(part)
            start, before = start + member.event_shape[0], part
        return log_prob, total

    np.testing.assert_allclose(*found(perturbed(started(name)), context), rtol=1e-4, atol=1e-4)
    assert family.reparameterized is (name != "joint_mixed")
    assert family == fv.joint(*family.families) and hash(family) == hash(fv.joint(*family.families))


def test_values_of_a_discrete_joint_family():
    family = fv.joint(fv.unconditional(fv.bernoulli(2)), conditional(fv.categorical(1, 3), 2))

    @jax.jit
    def found(params):
        q = family.distribution(params)
        values = distributions.support(q)
        z, log_choice = distributions.draw_each(q, KEY, (), reparameterized=False)
        return values, q.log_prob(values), z, log_choice, q.log_prob(z)

    params = perturbed(jax.jit(family.init)(KEY), 0.5)
    values, log_prob, z, log_choice, scored = map(np.asarray, found(params))
    expected = itertools.product([0, 1], [0, 1], [0, 1, 2])
    assert sorted(map(tuple, values.tolist())) == sorted(expected)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1, rtol=tolerances.FLOAT32)
    np.testing.assert_allclose(log_choice, scored, rtol=1e-5)
    assert len(np.unique(z, axis=0)) == 12
    q = family.distribution(params)
    assert distributions.support_size(q) == 12
    assert distributions.num_choices(q, reparameterized=False) == 12


class _Counting(fv.Family):
    """A normal that counts how often it was trained."""

    event_shape, context_shape, reparameterized = (2,), (2,), True

    def init(self, key):
        return {"count": fv.Fixed(jnp.zeros(()))}

    def distribution(self, params, context=None):
        return fv.gaussian(2, scale=1.0).distribution({}, context)

    def train_distribution(self, params, key, context=None):
        new = {"count": fv.Fixed(params["count"].value + 1)}
        return self.distribution(params, context), new


COUNTED = conditional(_Counting(), 2)
WRAPPED = {
    "conditional": (COUNTED, ("family",)),
    "local": (fv.local(_Counting(), 3), ("family",)),
    "unconditional": (fv.unconditional(_Counting()), ("family",)),
    "whitened": (fv.whitened(fv.unconditional(_Counting())), ("family", "family")),
    "standardized": (fv.standardized(COUNTED), ("family", "family")),
    "flow": (fv.mean_field(2), None),
    "joint": (fv.joint(fv.standard_normal(2), COUNTED), ("families", 1, "family")),
}
WRAPPED["flow"] = (
    type(fv.mean_field(2))(fv.unconditional(_Counting()), fv.mean_field(2).transform),
    ("family", "family"),
)


@pytest.mark.parametrize("name", WRAPPED)
def test_new_leaves_come_back_through_every_wrapper(name):
    family, path = WRAPPED[name]
    context = None
    if family.context_shape is not None:
        context = np.zeros(family.context_shape, int if name == "local" else np.float32)
    params = jax.jit(family.init)(KEY)

    @jax.jit
    def trained(params):
        q, new = family.train_distribution(params, KEY, context)
        return q.sample(seed=KEY), new

    z, new = trained(params)
    assert z.shape == family.event_shape
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for step in path:
        new = new[step]
    assert new["count"].value == 1


@pytest.mark.parametrize("name", ["joint", "joint_posterior", "whitened", "local", "maf_context"])
def test_where_nothing_is_new_parameters_are_the_very_same(name):
    params, context = jax.tree.map(jnp.asarray, started(name)), contexts(name)

    def same(key):
        assert CASES[name].train_distribution(params, key, context)[1] is params
        return key

    jax.eval_shape(same, KEY)


def test_members_that_are_relaxed():
    soft = fv.unconditional(fv.relaxed(fv.bernoulli(2), 0.5))
    hard = fv.joint(soft, conditional(fv.gaussian(1), 2))
    with pytest.raises(ValueError, match=r"`families` of `fv.joint` must not be relaxed"):
        hard.train_distribution(jax.jit(hard.init)(KEY), KEY)


# ------------------------------------------------------------------------------ relaxed families

LOGITS = np.array([0.4, -0.7], np.float32)


def trained(family, logits):
    return family.train_distribution(family.init(KEY), KEY, logits)[0]


def test_binary_concrete_density():
    family = fv.relaxed(fv.bernoulli(1), 0.8)

    @jax.jit
    def found(logits):
        q = trained(family, logits)
        edges = jax.nn.sigmoid(jnp.linspace(-12.0, 12.0, 4_001))
        density = jnp.exp(q.log_prob((edges[1:] + edges[:-1])[:, None] / 2))
        z, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=20_000)
        return (density * jnp.diff(edges)).sum(), z, log_prob[:100], q.log_prob(z[:100])

    total, z, log_prob, scored = found(LOGITS[:1])
    assert abs(total - 1) < tolerances.INTEGRAL
    np.testing.assert_allclose(scored, log_prob, rtol=1e-2, atol=1e-3)
    # The probability of more than a half is that of 1, at any temperature.
    p = 1 / (1 + np.exp(-LOGITS[0]))
    error = tolerances.STANDARD_ERRORS * (p * (1 - p) / 20_000) ** 0.5
    assert abs((np.asarray(z) > 0.5).mean() - p) < error


def test_gumbel_softmax_density():
    one_hot = fv.relaxed(fv.categorical((), 2, one_hot=True), 0.8)
    binary = fv.relaxed(fv.bernoulli(1), 0.8)
    three = fv.relaxed(fv.categorical((), 3, one_hot=True), 1.5)
    first = np.linspace(0.02, 0.98, 25)
    pairs = np.stack([first, 1 - first], -1).astype(np.float32)
    a, b = np.meshgrid(*[(np.arange(600) + 0.5) / 600] * 2, indexing="ij")
    inside = a + b < 1
    grid = np.where(inside[..., None], np.stack([a, b, 1 - a - b], -1), 1 / 3).astype(np.float32)

    @jax.jit
    def found(logits, pairs, grid):
        q = trained(one_hot, logits)
        p = trained(binary, logits[:1] - logits[1:])
        z, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=(100, 3))
        triple = trained(three, jnp.append(logits, 0.1)).log_prob(grid)
        return q.log_prob(pairs), p.log_prob(pairs[:, :1]), z, log_prob, q.log_prob(z), triple

    both, one, z, log_prob, scored, triple = map(np.asarray, found(LOGITS, pairs, grid))
    # Of two classes it is the binary one, of the difference of the logits.
    np.testing.assert_allclose(both, one, rtol=1e-3, atol=1e-4)
    assert z.shape == (100, 3, 2)
    np.testing.assert_allclose(z.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(scored, log_prob, rtol=1e-2, atol=1e-2)
    # A density in three classes, over the triangle.
    total = np.where(inside, np.exp(triple), 0).sum() / 600**2
    assert abs(total - 1) < 5 * tolerances.INTEGRAL


def test_relaxed_only_in_training():
    family = fv.relaxed(fv.categorical(2, 3, one_hot=True), fv.Annealing(2.0, 0.5, num_steps=10))
    context = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)

    @jax.jit
    def found(params):
        q, new = family.train_distribution(params, KEY, context)
        assert isinstance(q, distributions.RelaxedDistribution) and q.batch_shape == (5,)

        def total(context):
            q, _ = family.train_distribution(params, KEY, context)
            return jnp.sum(q.sample(seed=KEY) ** 2)

        hard = family.distribution(params, context).sample(seed=KEY, sample_shape=4)
        return hard, q.sample(seed=KEY, sample_shape=200), new, jax.grad(total)(context)

    params = family.init(KEY)
    hard, warm, new, gradient = found(params)
    assert family.reparameterized
    assert hard.shape == (4, 5, 2, 3) and set(np.unique(hard)) == {0.0, 1.0}
    assert new["step"].value == 1
    warm = np.asarray(warm)
    assert ((warm > 0) & (warm < 1)).all() and (np.asarray(gradient) != 0).all()
    # Later draws are colder.
    cold = np.asarray(found({**params, "step": fv.Fixed(np.int32(10))})[1])
    assert cold.max(-1).mean() > warm.max(-1).mean() + 0.1


def test_annealing():
    temperature = fv.Annealing(1.0, 0.25, num_steps=100)
    values = temperature(np.array([0, 50, 100, 10_000]))
    np.testing.assert_allclose(values, [1.0, 0.5, 0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize("learned", [True, False])
def test_a_context_of_its_own(learned):
    family = fv.unconditional(fv.bernoulli((2, 2)), learned=learned)
    params, x = jax.jit(family.init)(KEY), np.ones((3, 2, 2), np.float32)
    np.testing.assert_allclose(family.log_prob(params, x), 4 * np.log(0.5), rtol=1e-6)
    trainable, _ = partition(params)
    assert len(jax.tree.leaves(trainable)) == int(learned)
    assert family.context_shape is None and not family.reparameterized
    with pytest.raises(ValueError, match="`context` must be None"):
        family.distribution(params, x)
