"""Families made for latents: joint, relaxed, unconditional."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import distributions
from flowvi.networks import MLP
from flowvi.params import partition
from flowvi.testing import perturbed
from tests import tolerances
from tests.small import SMALL

KEY = jax.random.key(0)


def conditional(family, size):
    return fv.conditional(family, MLP(size, (4,), family.context_shape))


# ------------------------------------------------------------------------------------------ joint

JOINTS = {
    "prior": fv.joint(fv.standard_normal(2), conditional(fv.gaussian(3), 2)),
    "three": fv.joint(
        fv.standard_normal(1), conditional(fv.gaussian(2), 1), conditional(fv.gaussian(3), 2)
    ),
    "posterior": fv.joint(conditional(fv.gaussian(2), (2, 2)), conditional(fv.gaussian(3), 4 + 2)),
    "chain": fv.joint(conditional(fv.gaussian(2), (2, 2)), conditional(fv.gaussian(3), 2)),
    "mixed": fv.joint(
        conditional(fv.categorical(2, 3), (2, 2)),
        conditional(fv.mixture(1, 2, components="predicted"), 4 + 2),
    ),
    "flow": fv.joint(fv.standard_normal(2), fv.iaf(2, **SMALL, context_size=2)),
}


@pytest.mark.parametrize("name", JOINTS)
def test_a_joint_family_is_its_members_one_after_the_other(name):
    family = JOINTS[name]
    params = perturbed(family.init(KEY), 0.3, 0)
    batch = () if family.context_shape is None else (5,)
    context = None if not batch else jax.random.normal(KEY, (*batch, *family.context_shape))
    z, log_prob = family.sample_and_log_prob(params, KEY, 4, context)
    assert z.shape == (4, *batch, *family.event_shape) and log_prob.shape == (4, *batch)
    np.testing.assert_allclose(family.log_prob(params, z, context), log_prob, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(family.sample(params, KEY, 4, context), z, rtol=1e-4, atol=1e-5)
    # By hand.
    expected, start, before = 0.0, 0, None
    for member, own in zip(family.families, params["families"], strict=True):
        size = member.event_shape[0]
        part = z[..., start : start + size]
        if before is None:
            seen = None if context is None else jnp.broadcast_to(context, (4, *context.shape))
        elif member.context_shape == before.shape[-1:]:
            seen = before
        else:
            flat = jnp.broadcast_to(context.reshape(5, -1), (4, 5, 4))
            seen = jnp.concatenate([flat, before], -1)
        expected += member.log_prob(own, part, seen)
        start, before = start + size, part
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)
    # Rows do not share noise, and one row is a row of the batch.
    if batch:
        same = family.sample(params, KEY, (), jnp.zeros((50, *family.context_shape)))
        assert len(np.unique(same[:, -1])) == 50
        one = family.log_prob(params, z[:, 2], context[2])
        np.testing.assert_allclose(one, log_prob[:, 2], rtol=1e-4, atol=1e-4)
    assert family.reparameterized is (name != "mixed")
    assert family == fv.joint(*family.families) and hash(family) == hash(fv.joint(*family.families))


def test_draws_of_a_joint_family_carry_gradients_to_all_members():
    family = JOINTS["three"]
    params = perturbed(family.init(KEY), 0.3, 0)
    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(family.sample(p, KEY, 20))))(params)
    assert all((g != 0).any() for g in jax.tree.leaves(gradients["families"]))


def test_values_of_a_discrete_joint_family():
    family = fv.joint(fv.unconditional(fv.bernoulli(2)), conditional(fv.categorical(1, 3), 2))
    params = perturbed(family.init(KEY), 0.5, 0)
    q = family.distribution(params)
    values = distributions.support(q)
    expected = itertools.product([0, 1], [0, 1], [0, 1, 2])
    assert sorted(map(tuple, values.tolist())) == sorted(expected)
    assert distributions.support_size(q) == 12
    assert distributions.num_choices(q, reparameterized=False) == 12
    total = jnp.exp(family.log_prob(params, values)).sum()
    np.testing.assert_allclose(total, 1, rtol=tolerances.FLOAT32)
    z, log_choice = distributions.draw_each(q, KEY, (), reparameterized=False)
    np.testing.assert_allclose(log_choice, family.log_prob(params, z), rtol=1e-5)
    assert len(np.unique(z, axis=0)) == 12


def test_members_are_in_their_training_form():
    soft = fv.relaxed(fv.bernoulli(2), 0.5)
    counted = fv.conditional(_Counting(), MLP(2, (), 2))
    family = fv.joint(fv.standard_normal(2), counted)
    params = family.init(KEY)
    q, new = family.train_distribution(params, KEY)
    assert new["families"][1]["family"]["count"].value == 1
    assert q.sample(seed=KEY).shape == (4,)
    # Members without anything to hand back hand back the very same parameters.
    params = JOINTS["prior"].init(KEY)
    assert JOINTS["prior"].train_distribution(params, KEY)[1] is params
    hard = fv.joint(fv.unconditional(soft), conditional(fv.gaussian(1), 2))
    params = hard.init(KEY)
    with pytest.raises(ValueError, match=r"`families` of `fv.joint` must not be relaxed"):
        hard.train_distribution(params, KEY)


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


# ------------------------------------------------------------------------------ relaxed families

LOGITS = jnp.array([0.4, -0.7])


def test_binary_concrete_density():
    family = fv.relaxed(fv.bernoulli(1), 0.8)
    q, _ = family.train_distribution(family.init(KEY), KEY, LOGITS[:1])
    edges = jax.nn.sigmoid(jnp.linspace(-12.0, 12.0, 4_001))
    middle = (edges[1:] + edges[:-1]) / 2
    density = jnp.exp(q.log_prob(middle[:, None]))
    assert abs((density * jnp.diff(edges)).sum() - 1) < tolerances.INTEGRAL
    z, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=100)
    np.testing.assert_allclose(q.log_prob(z), log_prob, rtol=1e-2, atol=1e-3)
    # The probability of more than a half is that of 1, at any temperature.
    share = (q.sample(seed=KEY, sample_shape=20_000) > 0.5).mean()
    p = jax.nn.sigmoid(LOGITS[0])
    assert abs(share - p) < tolerances.STANDARD_ERRORS * (p * (1 - p) / 20_000) ** 0.5


def test_gumbel_softmax_density():
    one_hot = fv.categorical((), 2, one_hot=True)
    family, binary = fv.relaxed(one_hot, 0.8), fv.relaxed(fv.bernoulli(1), 0.8)
    q, _ = family.train_distribution(family.init(KEY), KEY, LOGITS)
    # Of two classes it is the binary one, of the difference of the logits.
    p, _ = binary.train_distribution(binary.init(KEY), KEY, LOGITS[:1] - LOGITS[1:])
    first = jnp.linspace(0.02, 0.98, 25)
    z = jnp.stack([first, 1 - first], -1)
    np.testing.assert_allclose(q.log_prob(z), p.log_prob(z[:, :1]), rtol=1e-3, atol=1e-4)
    z, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=(100, 3))
    assert z.shape == (100, 3, 2)
    np.testing.assert_allclose(z.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(q.log_prob(z), log_prob, rtol=1e-2, atol=1e-2)
    # A density in three classes, over the triangle.
    family = fv.relaxed(fv.categorical((), 3, one_hot=True), 1.5)
    q, _ = family.train_distribution(family.init(KEY), KEY, jnp.array([0.4, -0.7, 0.1]))
    side = (jnp.arange(600) + 0.5) / 600
    a, b = jnp.meshgrid(side, side, indexing="ij")
    inside = a + b < 1
    z = jnp.where(inside[..., None], jnp.stack([a, b, 1 - a - b], -1), 1 / 3)
    total = jnp.where(inside, jnp.exp(q.log_prob(z)), 0).sum() / 600**2
    assert abs(total - 1) < 5 * tolerances.INTEGRAL


def test_relaxed_only_in_training():
    family = fv.relaxed(fv.categorical(2, 3, one_hot=True), fv.Annealing(2.0, 0.5, num_steps=10))
    params = family.init(KEY)
    context = jax.random.normal(KEY, (5, 2, 3))
    assert family.reparameterized
    hard = family.sample(params, KEY, 4, context)
    assert hard.shape == (4, 5, 2, 3) and set(np.unique(hard)) == {0.0, 1.0}
    q, new = family.train_distribution(params, KEY, context)
    assert isinstance(q, distributions.RelaxedDistribution) and q.batch_shape == (5,)
    assert new["step"].value == 1
    soft = q.sample(seed=KEY, sample_shape=4)
    assert ((soft > 0) & (soft < 1)).all()

    def total(context):
        return jnp.sum(family.train_distribution(params, KEY, context)[0].sample(seed=KEY) ** 2)

    assert (jax.grad(total)(context) != 0).all()
    # Later draws are colder.
    late = {**params, "step": fv.Fixed(jnp.asarray(10))}
    cold = family.train_distribution(late, KEY, context)[0].sample(seed=KEY, sample_shape=200)
    warm = q.sample(seed=KEY, sample_shape=200)
    assert (cold.max(-1)).mean() > (warm.max(-1)).mean() + 0.1


def test_annealing():
    temperature = fv.Annealing(1.0, 0.25, num_steps=100)
    values = [float(temperature(step)) for step in (0, 50, 100, 10_000)]
    np.testing.assert_allclose(values, [1.0, 0.5, 0.25, 0.25], rtol=1e-6)


# ----------------------------------------------------------------------------------- unconditional


@pytest.mark.parametrize("learned", [True, False])
def test_a_context_of_its_own(learned):
    family = fv.unconditional(fv.bernoulli((2, 2)), learned=learned)
    params = family.init(KEY)
    x = jnp.ones((3, 2, 2))
    np.testing.assert_allclose(family.log_prob(params, x), 4 * np.log(0.5), rtol=1e-6)
    trainable, _ = partition(params)
    assert len(jax.tree.leaves(trainable)) == int(learned)
    assert family.context_shape is None and not family.reparameterized
    with pytest.raises(ValueError, match="`context` must be None"):
        family.distribution(params, x)
    with pytest.raises(ValueError, match="hold only 0 and 1"):
        family.check_support(0.5 * x)


def test_a_flow_at_a_context_of_its_own():
    family = fv.unconditional(fv.iaf(2, num_layers=1, hidden_sizes=[4], context_size=3))
    params = family.init(KEY)
    assert family.reparameterized and family.sample(params, KEY, 5).shape == (5, 2)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fv.joint(fv.mean_field(2)), ValueError, "`families` must be at least two; got 1"),
        (lambda: fv.joint(fv.mean_field(2), 3), TypeError, "`families` must be families; got 3"),
        (
            lambda: fv.joint(fv.standard_normal((2, 2)), fv.mean_field(2)),
            ValueError,
            r"`families` must be over vectors; got event shape \(2, 2\)",
        ),
        (
            lambda: fv.joint(fv.mean_field(2), conditional(fv.gaussian(1), 3)),
            ValueError,
            r"`families` must have in place 1 context shape \(2,\), the event of .*got \(3,\)",
        ),
        (
            lambda: fv.joint(fv.mean_field(2), fv.mean_field(2)),
            ValueError,
            "`families` must have in place 1 context shape .*got None of Flow",
        ),
        (
            lambda: fv.joint(conditional(fv.gaussian(2), 5), conditional(fv.gaussian(1), 3)),
            ValueError,
            r"context shape \(2,\), .*, or \(7,\), that together with the context \(5,\); got \(3,",
        ),
        (
            lambda: fv.relaxed(fv.gaussian(2), 1.0),
            TypeError,
            r"`family` must be `fv.bernoulli\(...\)` or `fv.categorical\(..., one_hot=True\)`",
        ),
        (
            lambda: fv.relaxed(fv.categorical(2, 3), 1.0),
            TypeError,
            r"one_hot=True\)`; got CategoricalFamily",
        ),
        (
            lambda: fv.relaxed(fv.bernoulli(2), 0.0),
            ValueError,
            "`temperature` must be a positive number; got 0.0",
        ),
        (
            lambda: fv.relaxed(fv.bernoulli(2), -1),
            ValueError,
            "`temperature` must be a positive number; got -1",
        ),
        (
            lambda: fv.relaxed(fv.bernoulli(2), "cold"),
            TypeError,
            "`temperature` must be a positive number; got 'cold'",
        ),
        (
            lambda: fv.Annealing(1.0, 0.0, num_steps=5),
            ValueError,
            "`end` must be a positive number; got 0.0",
        ),
        (lambda: fv.unconditional(3), TypeError, "`family` must be a family; got 3"),
        (
            lambda: fv.unconditional(fv.mean_field(2)),
            ValueError,
            "`family` must take a context; got Flow",
        ),
        (
            lambda: fv.mixture(2, 3, components="free"),
            ValueError,
            '`components` must be "predicted" or "learned"; got \'free\'',
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
