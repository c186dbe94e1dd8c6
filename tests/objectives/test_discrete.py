"""Every estimator for choices, and every chain of control variates, on models that can be summed.

Rows are two contexts; q has a linear network from context to logits, whose weights are what the
gradient is taken of. The joint density is a table, so that sums over it are exact.
"""

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
CONTEXT = jnp.array([[0.5, -1.0], [-0.3, 0.8]])


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


def params_of(objective, seed=3):
    params = objective.init(KEY)
    return {**params, "posterior": perturbed(params["posterior"], 1.0, seed)}


def weights_of(params):
    return params["posterior"]["network"]


def with_weights(params, weights):
    return {**params, "posterior": {**params["posterior"], "network": weights}}


def flat(tree, axes=0):
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.reshape(a, (*a.shape[:axes], -1)) for a in leaves], -1)


def exact(family, values, params):
    """The loss and its gradient, from the definition: a sum over the values."""
    values = jnp.asarray(np.array(values), jnp.float32)

    def loss(weights):
        own = with_weights(params, weights)["posterior"]
        q = family.distribution(own, CONTEXT)
        total = 0.0
        for value in values:
            z = jnp.broadcast_to(value, (len(CONTEXT), *value.shape))
            log_q = q.log_prob(z)
            total += jnp.exp(log_q) * (log_joint({}, None, z[None], CONTEXT)[0] - log_q)
        return -jnp.mean(total)

    value, gradient = jax.value_and_grad(loss)(weights_of(params))
    return value, flat(gradient)


def estimates(objective, params, batch=CONTEXT, count=3_000, seed=1):
    """Losses of shape [count] and gradients of shape [count, parameters]."""

    def loss(weights, key):
        out = objective(with_weights(params, weights), key, batch)
        return out[0] if isinstance(out, tuple) else out

    # Not compiled: the chains share nearly all operations, and each would be a program of its own.
    both = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
    values, gradients = both(weights_of(params), jax.random.split(jax.random.key(seed), count))
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
    "mean": fv.Fixed({"mean": jnp.asarray(3.0), "weight": jnp.ones(())}),
    "scale": fv.Fixed({"mean": jnp.asarray(4.0), "weight": jnp.ones(())}),
}

CHAINS = [chain for length in (0, 1, 2) for chain in itertools.permutations(CONTROLS, length)] + [
    tuple(CONTROLS),
    tuple(reversed(CONTROLS)),
]


def chained(family, chain, **options):
    objective = ob.ScoreFunction(
        family,
        log_joint,
        num_samples=3,
        controls=tuple(CONTROLS[name] for name in chain),
        context=lambda batch: batch,
        **options,
    )
    params = params_of(objective)
    states = zip(chain, params["control"], strict=True)
    return objective, {**params, "control": tuple(PAST.get(name, own) for name, own in states)}


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(chain) or "none")
def test_chains_of_control_variates_are_unbiased(chain):
    family, values = DISCRETE["bernoulli"]
    objective, params = chained(family, chain)
    loss, gradient = exact(family, values, params)
    losses, gradients = estimates(objective, params)
    assert_mean(losses, loss)
    # A running scale of 2 halves the step, and keeps its direction.
    assert_mean(gradients, gradient / (2 if "scale" in chain else 1))
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("name", ["categorical", "one_hot"])
@pytest.mark.parametrize("chain", [(), ("leave",), ("learned", "critic", "leave")])
def test_the_score_function_of_classes_is_unbiased(name, chain):
    family, values = DISCRETE[name]
    objective, params = chained(family, chain)
    loss, gradient = exact(family, values, params)
    losses, gradients = estimates(objective, params)
    assert_mean(losses, loss)
    assert_mean(gradients, gradient)


def test_a_wrong_control_variate_would_be_seen():
    class Own:
        """Subtracts the mean signal of a row with the draw itself in it."""

        def init(self, key):
            return ()

        def apply(self, state, signal, draws):
            return signal - jnp.mean(signal, axis=0), state, jnp.zeros(())

    family, values = DISCRETE["bernoulli"]
    objective = ob.ScoreFunction(
        family, log_joint, num_samples=3, controls=(Own(),), context=lambda batch: batch
    )
    params = params_of(objective)
    gradients = estimates(objective, params)[1]
    expected = exact(family, values, params)[1]
    # It shrinks the gradient by 1 - 1 / 3, which the draws can tell.
    assert_mean(gradients, expected * 2 / 3)
    with pytest.raises(AssertionError):
        assert_mean(gradients, expected)


def variance(chain, **options):
    objective, params = chained(DISCRETE["bernoulli"][0], chain, **options)
    if "learned" in chain:
        # A baseline that has learned the mean of each row, by the exact sum.
        params = learned(objective, params)
    moments = ob.gradient_moments(objective, params, KEY, CONTEXT, num_draws=2_000)
    return float(moments.total_variance)


def learned(objective, params):
    family, values = DISCRETE["bernoulli"]
    z = jnp.asarray(np.array(values), jnp.float32)
    z = jnp.broadcast_to(z[:, None], (len(values), len(CONTEXT), 3))
    log_q = family.distribution(params["posterior"], CONTEXT).log_prob(z)
    means = jnp.sum(jnp.exp(log_q) * (log_joint({}, None, z, CONTEXT) - log_q), 0)
    # Two rows and a line through them.
    design = np.concatenate([CONTEXT / np.sqrt(2), np.ones((2, 1))], 1)
    w0, w1, bias = np.linalg.lstsq(design, np.asarray(means), rcond=None)[0]
    layer = {"w": jnp.array([[w0], [w1]]), "b": jnp.array([bias])}
    control = list(params["control"])
    for place, each in enumerate(objective.controls):
        if isinstance(each, ob.LearnedBaseline):
            control[place] = {"layers": (layer,)}
    return {**params, "control": tuple(control)}


def test_each_control_variate_reduces_the_variance():
    plain = variance(())
    # The signal has a mean of about 4 and a deviation of about 1.
    for chain in (("mean",), ("leave",), ("critic",), ("learned",), ("learned", "leave")):
        assert variance(chain) < 0.5 * plain, chain
    # Among three draws, the mean of two others is noisier than the mean of all of them.
    assert variance(("learned",)) < variance(("leave",))
    # What is the same for all draws of a row does nothing before leave-one-out.
    np.testing.assert_allclose(variance(("mean", "leave")), variance(("leave",)), rtol=1e-3)


def test_moments_of_gradients_are_those_of_numpy():
    objective, params = chained(DISCRETE["bernoulli"][0], ("leave",))
    moments = ob.gradient_moments(objective, params, KEY, CONTEXT, num_draws=50)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(50))

    def loss(weights, key):
        return objective(with_weights(params, weights), key, CONTEXT)[0]

    each = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(weights_of(params), keys)
    np.testing.assert_allclose(moments.loss, each[0].mean(), rtol=FLOAT32)
    np.testing.assert_allclose(moments.loss_variance, each[0].var(ddof=1), rtol=1e-3)
    gradients = flat(each[1], 1)
    np.testing.assert_allclose(flat(moments.mean), gradients.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(moments.total_variance, gradients.var(0, ddof=1).sum(), rtol=1e-3)


# ------------------------------------------------------------------------------------ enumeration


@pytest.mark.parametrize("name", DISCRETE)
def test_enumeration_is_exact(name):
    family, values = DISCRETE[name]
    objective = ob.Enumeration(family, log_joint, context=lambda batch: batch)
    params = params_of(objective)
    loss, gradient = exact(family, values, params)
    losses, gradients = estimates(objective, params, count=2)
    np.testing.assert_allclose(losses, loss, rtol=FLOAT32)
    np.testing.assert_allclose(gradients, np.stack([gradient] * 2), rtol=1e-3, atol=1e-5)
    assert count_choices(family) == support_size(family) == len(values)


def test_what_cannot_happen_does_not_count():
    def broken(params, key, z, batch):
        return jnp.where(z[..., 0] == 1, -jnp.inf, log_joint(params, key, z, batch))

    family = fv.unconditional(fv.bernoulli(2))
    objective = ob.Enumeration(family, broken)
    params = objective.init(KEY)
    params["posterior"]["context"] = {"logits": jnp.array([-200.0, 0.3])}

    def loss(logits):
        own = {**params["posterior"], "context": {"logits": logits}}
        return objective({"posterior": own}, KEY, jnp.zeros(2))

    value, gradient = jax.value_and_grad(loss)(params["posterior"]["context"]["logits"])
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
GRID = jnp.linspace(-30.0, 30.0, 20_001)


def smooth_exact(name, params):
    """The loss and its gradient by a fine grid."""
    family = MIXED[name][0]

    def loss(own):
        q = family.distribution(own, CONTEXT)
        total = 0.0
        for code in (0.0, 1.0) if name == "joint" else (None,):
            z = (
                GRID[:, None, None]
                if code is None
                else jnp.stack([jnp.full_like(GRID, code), GRID], -1)[:, None]
            )
            z = jnp.broadcast_to(z, (len(GRID), len(CONTEXT), z.shape[-1]))
            log_q = q.log_prob(z)
            terms = jnp.exp(log_q) * (smooth_joint({}, None, z, CONTEXT) - log_q)
            total += jnp.sum(terms, 0) * (GRID[1] - GRID[0])
        return -jnp.mean(total)

    value, gradient = jax.jit(jax.value_and_grad(loss, allow_int=True))(params["posterior"])
    return value, flat(gradient)


def posterior_estimates(objective, params, count=3_000):
    def loss(own, key):
        out = objective({**params, "posterior": own}, key, CONTEXT)
        return out[0] if isinstance(out, tuple) else out

    both = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    values, gradients = both(params["posterior"], jax.random.split(KEY, count))
    return np.asarray(values), flat(gradients, 1)


def mixed_objective(kind, family):
    options = {"context": lambda batch: batch, "num_samples": 2}
    if kind == "enumeration":
        return ob.Enumeration(family, smooth_joint, **options)
    path = {"score of all": False, "score of choices": None}[kind]
    return ob.ScoreFunction(family, smooth_joint, path=path, **options)


@pytest.mark.parametrize("name", MIXED)
def test_choices_and_points_together(name):
    spread = {}
    family, count = MIXED[name]
    assert not family.reparameterized and count_choices(family) == count
    assert support_size(family) is None
    for kind in ("score of all", "score of choices", "enumeration"):
        objective = mixed_objective(kind, family)
        params = params_of(objective, seed=5)
        loss, gradient = smooth_exact(name, params)
        losses, gradients = posterior_estimates(objective, params)
        # The grid is good to float32.
        assert_mean(losses, loss, bias=1e-4)
        assert_mean(gradients, gradient, bias=1e-4)
        spread[kind] = gradients.var(0).sum()
    assert spread["enumeration"] < spread["score of choices"] < spread["score of all"]


def test_points_of_a_mixture_move_and_choices_do_not():
    family = fv.mixture(2, 3)
    params = family.init(KEY)

    def total(params, what):
        z, log_choice = distributions.draw(
            family.distribution(params), KEY, (50,), reparameterized=False
        )
        return jnp.sum(z if what == "z" else log_choice)

    own = jax.grad(total)(params, "z")["context"]
    assert (own["logits"] == 0).all() and (own["loc"] != 0).all() and (own["scale"] != 0).all()
    own = jax.grad(total)(params, "choice")["context"]
    assert (own["logits"] != 0).all() and (own["loc"] == 0).all()


# ----------------------------------------------------------------------------------- bad input


HUGE = fv.unconditional(fv.bernoulli(200))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ob.Enumeration(HUGE, log_joint),
            r"`family` must have at most 65,536 values .*got about 10\^60 of Uncond",
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
            r"`controls` must be empty for ELBO of Flow.*no score term.*got \(LeaveOneOut\(\),\).*"
            "Perhaps use `fv.objectives.ScoreFunction`",
        ),
        (
            lambda: ob.ScoreFunction(fv.mean_field(2), log_joint, path=True),
            "`controls` must be empty for ScoreFunction of Flow.*no score term",
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
