"""Every estimator for choices, and every chain of control variates, on models that can be summed.

Rows are two contexts; q has a linear network from context to logits, whose weights are what the
gradient is taken of. The joint density is a table, so that sums over it are exact.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import distributions
from flowvi import objectives as ob
from flowvi.networks import MLP
from flowvi.objectives.enumeration import count_choices, support_size
from flowvi.testing import perturbed
from tests.objectives.helpers import assert_mean
from tests.tolerances import FLOAT32

KEY = jax.random.key(0)
CONTEXT = np.array([[0.5, -1.0], [-0.3, 0.8]], np.float32)


def conditional(family):
    return fv.conditional(family, MLP(2, (), family.context_shape))


#: Discrete posteriors with their values, listed by hand.
DISCRETE = {
    "bernoulli": (
        conditional(fv.bernoulli(3)),
        [list(z) for z in itertools.product([0, 1], repeat=3)],
    ),
    "categorical": (
        conditional(fv.categorical(2, 3)),
        [list(z) for z in itertools.product(range(3), repeat=2)],
    ),
    "one_hot": (
        conditional(fv.categorical(2, 2, one_hot=True)),
        [[np.eye(2)[i], np.eye(2)[j]] for i, j in itertools.product(range(2), repeat=2)],
    ),
}


def log_joint(params, key, z, batch):
    """Some function of z and of the row, with a mean far from zero."""
    del params, key
    flat = z.reshape(*z.shape[: batch.ndim], -1).astype(float)
    slopes = jnp.arange(1.0, flat.shape[-1] + 1)
    return 4.0 + jnp.sin(flat @ slopes + batch[..., 0]) + (flat @ slopes) * batch[..., 1] / 2


def itself(batch):
    return batch


def params_of(objective, seed=3):
    params = objective.init(KEY)
    own = perturbed(objective.family.init(KEY), 1.0, seed)
    return {**params, "posterior": own}


def with_weights(params, weights):
    return {**params, "posterior": {**params["posterior"], "network": weights}}


def flat(tree, axes=0):
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.reshape(a, (*a.shape[:axes], -1)) for a in leaves], -1)


@functools.cache
def exact(name):
    """The loss and its gradient, from the definition: a sum over the values."""
    family, values = DISCRETE[name]
    values = np.array(values, np.float32)
    own = perturbed(jax.jit(family.init)(KEY), 1.0, 3)

    @jax.jit
    @jax.value_and_grad
    def loss(weights):
        q = family.distribution({**own, "network": weights}, CONTEXT)
        z = jnp.broadcast_to(values[:, None], (len(values), len(CONTEXT), *values.shape[1:]))
        log_q = q.log_prob(z)
        return -jnp.mean(jnp.sum(jnp.exp(log_q) * (log_joint({}, None, z, CONTEXT) - log_q), 0))

    value, gradient = loss(own["network"])
    return value, flat(gradient)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _estimates(objective, control, count):
    params = params_of(objective)
    if control is not None:
        params["control"] = control

    def loss(weights, key):
        out = objective(with_weights(params, weights), key, CONTEXT)
        return out[0] if isinstance(out, tuple) else out

    both = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
    return both(params["posterior"]["network"], jax.random.split(jax.random.key(1), count))


def estimates(objective, control=None, count=3_000):
    """Losses of shape [count] and gradients of shape [count, parameters]."""
    values, gradients = _estimates(objective, control, count)
    return np.asarray(values), flat(gradients, 1)


# -------------------------------------------------------------------------------- control variates

CONTROLS = {
    "mean": ob.RunningMean(),
    "scale": ob.RunningScale(),
    "leave": ob.LeaveOneOut(),
    "critic": ob.SelfCritic(),
    "learned": ob.LearnedBaseline(MLP(2, (), 1)),
}

#: What the running ones remember: a mean signal of 3 and a variance of 4.
PAST = {
    "mean": fv.Fixed({"mean": np.float32(3), "weight": np.float32(1)}),
    "scale": fv.Fixed({"mean": np.float32(4), "weight": np.float32(1)}),
}

#: The chains of all five, both ways, hold each pair in both orders.
ALL = tuple(CONTROLS)
CHAINS = [(), *((name,) for name in CONTROLS), ALL, ALL[::-1]]


def chained(family, chain):
    """The objective, and the states of its controls."""
    controls = tuple(CONTROLS[name] for name in chain)
    objective = ob.ScoreFunction(
        family, log_joint, num_samples=3, controls=controls, context=itself
    )
    return objective, tuple(PAST[n] if n in PAST else _fresh(CONTROLS[n]) for n in chain)


@functools.cache
def _fresh(control):
    return jax.jit(control.init)(KEY)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(chain) or "none")
def test_chains_of_control_variates_are_unbiased(chain):
    loss, gradient = exact("bernoulli")
    losses, gradients = estimates(*chained(DISCRETE["bernoulli"][0], chain))
    assert_mean(losses, loss)
    # A running scale of 2 halves the step, and keeps its direction.
    assert_mean(gradients, gradient / (2 if "scale" in chain else 1))
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("name", ["categorical", "one_hot"])
@pytest.mark.parametrize("chain", [(), ("learned", "critic", "leave")])
def test_the_score_function_of_classes_is_unbiased(name, chain):
    loss, gradient = exact(name)
    losses, gradients = estimates(*chained(DISCRETE[name][0], chain))
    assert_mean(losses, loss)
    assert_mean(gradients, gradient)


def test_a_wrong_control_variate_would_be_seen():
    class Own:
        """Subtracts the mean signal of a row with the draw itself in it."""

        def init(self, key):
            return ()

        def apply(self, state, signal, draws):
            return signal - jnp.mean(signal, axis=0), state, jnp.zeros(())

    family = DISCRETE["bernoulli"][0]
    objective = ob.ScoreFunction(
        family, log_joint, num_samples=3, controls=(Own(),), context=itself
    )
    gradients, expected = estimates(objective)[1], exact("bernoulli")[1]
    # It shrinks the gradient by 1 - 1 / 3, which the draws can tell.
    assert_mean(gradients, expected * 2 / 3)
    with pytest.raises(AssertionError):
        assert_mean(gradients, expected)


def variance(*chain):
    objective, control = chained(DISCRETE["bernoulli"][0], chain)
    # A baseline that has learned the mean of each row, by the exact sum.
    control = tuple(learned() if n == "learned" else c for n, c in zip(chain, control, strict=True))
    return estimates(objective, control)[1].var(0).sum()


@functools.cache
def learned():
    family, values = DISCRETE["bernoulli"]
    z = np.broadcast_to(np.array(values, np.float32)[:, None], (len(values), len(CONTEXT), 3))

    @jax.jit
    def means():
        own = perturbed(family.init(KEY), 1.0, 3)
        log_q = family.distribution(own, CONTEXT).log_prob(z)
        return jnp.sum(jnp.exp(log_q) * (log_joint({}, None, z, CONTEXT) - log_q), 0)

    # Two rows and a line through them.
    design = np.concatenate([CONTEXT / np.sqrt(2), np.ones((2, 1))], 1)
    w0, w1, bias = np.linalg.lstsq(design, np.asarray(means()), rcond=None)[0].astype(np.float32)
    return {"layers": ({"w": np.array([[w0], [w1]]), "b": np.array([bias])},)}


def test_each_control_variate_reduces_the_variance():
    plain = variance()
    # The signal has a mean of about 4 and a deviation of about 1.
    for name in ("mean", "leave", "critic", "learned"):
        assert variance(name) < 0.5 * plain, name
    # Among three draws, the mean of two others is noisier than the mean of all of them.
    assert variance("learned") < variance("leave")
    # What is the same for all draws of a row does nothing before leave-one-out.
    np.testing.assert_allclose(variance("mean", "leave"), variance("leave"), rtol=1e-3)


def test_moments_of_gradients_are_those_of_numpy():
    objective, _ = chained(DISCRETE["bernoulli"][0], ("leave",))
    params = jax.jit(lambda: params_of(objective))()
    moments = ob.gradient_moments(objective, params, KEY, CONTEXT, num_draws=50)

    @jax.jit
    def each():
        def loss(weights, index):
            key = jax.random.fold_in(KEY, index)
            return objective(with_weights(params, weights), key, CONTEXT)[0]

        both = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
        return both(params["posterior"]["network"], jnp.arange(50))

    losses, gradients = jax.tree.map(np.asarray, each())
    np.testing.assert_allclose(moments.loss, losses.mean(), rtol=FLOAT32)
    np.testing.assert_allclose(moments.loss_variance, losses.var(ddof=1), rtol=1e-3)
    gradients = flat(gradients, 1)
    np.testing.assert_allclose(flat(moments.mean), gradients.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(moments.total_variance, gradients.var(0, ddof=1).sum(), rtol=1e-3)


# ------------------------------------------------------------------------------------ enumeration


@pytest.mark.parametrize("name", DISCRETE)
def test_enumeration_is_exact(name):
    family, values = DISCRETE[name]
    loss, gradient = exact(name)
    objective = ob.Enumeration(family, log_joint, context=itself)
    losses, gradients = estimates(objective, count=2)
    np.testing.assert_allclose(losses, loss, rtol=FLOAT32)
    np.testing.assert_allclose(gradients, np.stack([gradient] * 2), rtol=1e-3, atol=1e-5)
    assert count_choices(family) == support_size(family) == len(values)


def test_what_cannot_happen_does_not_count():
    def broken(params, key, z, batch):
        return jnp.where(z[..., 0] == 1, -jnp.inf, log_joint(params, key, z, batch))

    objective = ob.Enumeration(fv.unconditional(fv.bernoulli(2)), broken)

    @jax.jit
    @jax.value_and_grad
    def loss(logits):
        own = {**objective.init(KEY)["posterior"], "context": {"logits": logits}}
        return objective({"posterior": own}, KEY, np.zeros(2, np.float32))

    value, gradient = loss(np.array([-200.0, 0.3], np.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()


# ------------------------------------------------------------------ mixtures, and joint posteriors


def smooth_joint(params, key, z, batch):
    del params, key
    first = z[..., 0]
    return -0.5 * (first - batch[..., 0]) ** 2 + jnp.sin(2 * z.sum(-1)) + 2.0


MIXTURE = conditional(fv.mixture(1, 2, components="predicted"))
CODED = fv.joint(conditional(fv.bernoulli(1)), fv.conditional(fv.gaussian(1), MLP(3, (), 2)))
MIXED = {
    "mixture": (MIXTURE, 2),
    "flow over a mixture": (
        fv.conditional(
            fv.iaf(
                1,
                num_layers=1,
                hidden_sizes=[4],
                transformer="affine",
                context_size=2,
                base=MIXTURE,
            ),
            MLP(2, (), 2),
        ),
        2,
    ),
    "joint": (CODED, 2),
}
#: Two Gaussians, of which one has a hole in the middle of the other's place.
GRID = np.linspace(-30.0, 30.0, 4_001, dtype=np.float32)


@functools.partial(jax.jit, static_argnums=0)
def smooth_exact(name):
    """The loss and its gradient by a fine grid."""
    family = MIXED[name][0]

    def loss(own):
        q = family.distribution(own, CONTEXT)
        total = 0.0
        for code in (0.0, 1.0) if name == "joint" else (None,):
            z = GRID[:, None, None]
            if code is not None:
                z = np.stack([np.full_like(GRID, code), GRID], -1)[:, None]
            z = jnp.broadcast_to(z, (len(GRID), len(CONTEXT), z.shape[-1]))
            log_q = q.log_prob(z)
            terms = jnp.exp(log_q) * (smooth_joint({}, None, z, CONTEXT) - log_q)
            total += jnp.sum(terms, 0) * (GRID[1] - GRID[0])
        return -jnp.mean(total)

    return jax.value_and_grad(loss, allow_int=True)(perturbed(family.init(KEY), 1.0, 5))


@functools.partial(jax.jit, static_argnums=0)
def posterior_estimates(objective):
    params = params_of(objective, seed=5)

    def loss(own, key):
        out = objective({**params, "posterior": own}, key, CONTEXT)
        return out[0] if isinstance(out, tuple) else out

    both = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
    return both(params["posterior"], jax.random.split(KEY, 3_000))


def mixed_objective(kind, family):
    options = {"context": itself, "num_samples": 2}
    if kind == "enumeration":
        return ob.Enumeration(family, smooth_joint, **options)
    path = {"score of all": False, "score of choices": None}[kind]
    return ob.ScoreFunction(family, smooth_joint, path=path, **options)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * ("flow" in each)) for each in MIXED]
)
def test_choices_and_points_together(name):
    spread = {}
    family, count = MIXED[name]
    assert not family.reparameterized and count_choices(family) == count
    assert support_size(family) is None
    loss, gradient = smooth_exact(name)
    for kind in ("score of all", "score of choices", "enumeration"):
        losses, gradients = posterior_estimates(mixed_objective(kind, family))
        gradients = flat(gradients, 1)
        # The grid is good to float32.
        assert_mean(losses, loss, bias=1e-4)
        assert_mean(gradients, flat(gradient), bias=1e-4)
        spread[kind] = gradients.var(0).sum()
    assert spread["enumeration"] < spread["score of choices"] < spread["score of all"]


def test_points_of_a_mixture_move_and_choices_do_not():
    family = fv.mixture(2, 3)

    @jax.jit
    def gradients():
        def total(params):
            z, log_choice = distributions.draw(
                family.distribution(params), KEY, (50,), reparameterized=False
            )
            return jnp.sum(z), jnp.sum(log_choice)

        return jax.jacrev(total)(family.init(KEY))

    points, choices = (jax.tree.map(np.asarray, each["context"]) for each in gradients())
    assert (points["logits"] == 0).all() and (points["loc"] != 0).all()
    assert (points["scale"] != 0).all() and (choices["logits"] != 0).all()
    assert (choices["loc"] == 0).all()


# ----------------------------------------------------------------------------------- bad input


HUGE = fv.unconditional(fv.bernoulli(200))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ob.Enumeration(HUGE, log_joint),
            r"`family` must have at most 65,536 values .*got about 10\^60 of uncond",
        ),
        (
            lambda: ob.Enumeration(fv.unconditional(fv.categorical(7, 6)), log_joint),
            "at most 65,536 values .*got 279,936 of .*Perhaps use `fv.objectives.ScoreFunction`",
        ),
        (
            lambda: ob.Enumeration(fv.custom(lambda z: -z.sum(), 1), log_joint),
            "at most 65,536 .*which is continuous and has no end of them",
        ),
        (
            lambda: ob.Enumeration(
                fv.unconditional(fv.bernoulli(2)), log_joint, skip_nonfinite=True
            ),
            "`skip_nonfinite` must be False for `Enumeration`",
        ),
        (
            lambda: ob.ELBO(fv.mean_field(2), log_joint, controls=(ob.LeaveOneOut(),)),
            r"`controls` must be empty for ELBO of mean_.*no score term.*got \(LeaveOneOut\(\),\).*"
            "Perhaps use `fv.objectives.ScoreFunction`",
        ),
        (
            lambda: ob.ScoreFunction(fv.mean_field(2), log_joint, path=True),
            "`controls` must be empty for ScoreFunction of mean_field.*no score term",
        ),
        (
            lambda: ob.Enumeration(
                fv.unconditional(fv.bernoulli(2)), log_joint, controls=[ob.RunningMean()]
            ),
            "`controls` must be empty for Enumeration",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_draw_for_moments():
    with pytest.raises(ValueError, match="`num_draws` must be at least 2; got 1"):
        ob.gradient_moments(lambda *_: 0.0, {"posterior": {}}, KEY, num_draws=1)
