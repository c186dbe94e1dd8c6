"""Each objective against its own expectation on normal distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import objectives as ob
from tests.objectives.helpers import assert_mean
from tests.small import SMALL

KEY = jax.random.key(0)

#: The target is N(MEAN, SD^2), times e^LOG_Z; q is N(0.5, 0.8^2).
MEAN, SD, LOG_Z = 0.3, 1.2, 0.7
LOC, SCALE = 0.5, 0.8


def log_normal(z, mean, sd):
    return -0.5 * jnp.log(2 * jnp.pi) - jnp.log(sd) - 0.5 * ((z - mean) / sd) ** 2


def log_joint(params, key, z, batch):
    del params, key, batch
    return LOG_Z + log_normal(z[..., 0], MEAN, SD)


def q_params(family, loc=LOC, scale=SCALE):
    params = family.init(KEY)
    # The family's softplus is 1 at 0.
    inverse = jnp.log(jnp.expm1(jnp.asarray([scale]))) - jnp.log(jnp.e - 1)
    params["transform"] = {"loc": jnp.asarray([loc]), "raw_scale": inverse}
    return params


FAMILY = fv.mean_field(1)


def params_of(objective, **where):
    return {**objective.init(KEY), "posterior": q_params(FAMILY, **where)}


def losses_and_gradients(objective, params, count=400):
    """Losses of shape [count], and gradients with respect to loc and raw scale, [count, 2]."""

    def loss(trainable, key):
        new = {**params, "posterior": {**params["posterior"], "transform": trainable}}
        out = objective(new, key, None)
        return out[0] if isinstance(out, tuple) else out

    value_and_grad = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    values, gradients = value_and_grad(
        params["posterior"]["transform"], jax.random.split(jax.random.key(1), count)
    )
    return np.asarray(values), np.concatenate([gradients["loc"], gradients["raw_scale"]], -1)


def kl(loc=LOC, scale=SCALE, mean=MEAN, sd=SD):
    """KL(q || p)."""
    return jnp.log(sd / scale) + 0.5 * ((scale**2 + (loc - mean) ** 2) / sd**2 - 1)


def derivative(function, scale=SCALE):
    """That of a function of loc and scale, with respect to loc and raw scale."""
    place = q_params(FAMILY, scale=scale)["transform"]

    def of_raw(loc, raw_scale):
        return function(loc, jax.nn.softplus(raw_scale + jnp.log(jnp.e - 1)))

    gradients = jax.grad(of_raw, argnums=(0, 1))(place["loc"][0], place["raw_scale"][0])
    return np.asarray(gradients)


def log_power_mean(loc, scale, power):
    """log E_q w^power for the target without its e^LOG_Z, by a fine grid."""
    x = jnp.linspace(-12.0, 12.0, 20_001)
    log_q = log_normal(x, loc, scale)
    terms = power * (log_normal(x, MEAN, SD) - log_q) + log_q
    return jax.nn.logsumexp(terms) + jnp.log(x[1] - x[0])


ELBOS = {
    "reparameterised": ob.ELBO(FAMILY, log_joint, num_samples=4),
    "path": ob.ELBO(FAMILY, log_joint, num_samples=4, path=True),
    "one_draw_iwelbo": ob.IWELBO(FAMILY, log_joint, num_samples=1),
    "score": ob.ScoreFunction(FAMILY, log_joint, num_samples=4, controls=()),
    "leave_one_out": ob.ScoreFunction(FAMILY, log_joint, num_samples=4),
    "running_mean": ob.ScoreFunction(
        FAMILY, log_joint, num_samples=4, controls=(ob.RunningMean(),)
    ),
    "self_critic": ob.ScoreFunction(FAMILY, log_joint, num_samples=4, controls=(ob.SelfCritic(),)),
    "composed": ob.ScoreFunction(
        FAMILY, log_joint, num_samples=4, controls=(ob.RunningMean(), ob.LeaveOneOut())
    ),
}


@pytest.mark.parametrize("name", ELBOS)
def test_elbo_and_its_gradient_are_unbiased(name):
    objective = ELBOS[name]
    losses, gradients = losses_and_gradients(objective, params_of(objective))
    assert_mean(losses, kl() - LOG_Z)
    assert_mean(gradients, derivative(kl))


@pytest.mark.parametrize("name", ELBOS)
def test_what_vanishes_at_the_optimum(name):
    objective = ELBOS[name]
    losses, gradients = losses_and_gradients(objective, params_of(objective, loc=MEAN, scale=SD))
    np.testing.assert_allclose(losses, -LOG_Z, atol=1e-5)
    noise = gradients.std(0)
    without_noise = {"path", "one_draw_iwelbo", "leave_one_out", "self_critic", "composed"}
    if name in without_noise:
        assert (noise < 1e-5).all()
    else:
        # The score itself remains, whose mean is zero; so a test that saw none would be blind.
        assert (noise > 1e-2).all()


def test_path_gradient_has_less_variance_near_the_optimum():
    spread = {}
    for name in ("reparameterised", "path"):
        objective = ELBOS[name]
        place = params_of(objective, loc=MEAN + 0.02, scale=0.98 * SD)
        spread[name] = losses_and_gradients(objective, place)[1].std(0)
    assert (spread["path"] < 0.2 * spread["reparameterised"]).all()


#: Power, sign, a scale of q at which its weights have a variance, and the objective.
POWERS = {
    "renyi_half": (0.5, -1, SCALE, lambda **kw: ob.Renyi(FAMILY, log_joint, alpha=0.5, **kw)),
    "renyi_two": (-1.0, -1, SCALE, lambda **kw: ob.Renyi(FAMILY, log_joint, alpha=2.0, **kw)),
    "iwelbo": (1.0, -1, 1.6, lambda **kw: ob.IWELBO(FAMILY, log_joint, **kw)),
    "cubo": (2.0, 1, 1.6, lambda **kw: ob.CUBO(FAMILY, log_joint, **kw)),
}


@pytest.mark.parametrize("name", POWERS)
def test_power_bounds_approach_their_limits(name):
    power, sign, scale, make = POWERS[name]
    objective = make(num_samples=4_000)
    losses, gradients = losses_and_gradients(objective, params_of(objective, scale=scale), 100)

    def bound(loc, scale):
        return log_power_mean(loc, scale, power) / power

    limit = sign * (LOG_Z + bound(jnp.asarray(LOC), jnp.asarray(scale)))
    # The bias is of order 1 / num_samples.
    assert_mean(losses, limit, bias=1 / 4_000)
    assert_mean(gradients, sign * derivative(bound, scale), bias=1 / 4_000)


@pytest.mark.parametrize("name", POWERS)
def test_the_doubly_reparameterised_gradient_has_the_plain_ones_mean(name):
    _, _, scale, make = POWERS[name]
    doubly, plain = make(num_samples=5), make(num_samples=5, doubly=False)
    first = losses_and_gradients(doubly, params_of(doubly, scale=scale), 4_000)[1]
    second = losses_and_gradients(plain, params_of(plain, scale=scale), 4_000)[1]
    # The same draws, so that the comparison is sharp.
    assert_mean(first - second, 0.0)
    assert (abs(first - second).max(0) > 1e-2).all()
    at_optimum = [
        losses_and_gradients(o, params_of(o, loc=MEAN, scale=SD))[1].std(0) for o in (doubly, plain)
    ]
    assert (at_optimum[0] < 1e-5).all()
    assert (at_optimum[1] > 1e-2).all()


def test_bounds_come_in_their_order():
    order = [
        ob.Renyi(FAMILY, log_joint, alpha=2.0, num_samples=500),
        ob.ELBO(FAMILY, log_joint, num_samples=500),
        ob.Renyi(FAMILY, log_joint, alpha=0.5, num_samples=500),
        ob.IWELBO(FAMILY, log_joint, num_samples=500),
    ]
    bounds = [-losses_and_gradients(o, params_of(o), 100)[0].mean() for o in order]
    cubo = ob.CUBO(FAMILY, log_joint, num_samples=500)
    bounds.append(losses_and_gradients(cubo, params_of(cubo), 100)[0].mean())
    assert bounds == sorted(bounds)
    assert bounds[3] < LOG_Z + 0.01 < bounds[4]


@pytest.mark.parametrize("proposal", [None, fv.mean_field(1)])
def test_forward_kl_is_the_cross_entropy(proposal):
    objective = ob.ForwardKL(FAMILY, log_joint, num_samples=4_000, proposal=proposal)
    params = params_of(objective)
    if proposal is not None:
        params["proposal"] = fv.Fixed(q_params(proposal, loc=0.0, scale=1.5))
    losses, gradients = losses_and_gradients(objective, params, 100)

    def cross_entropy(loc, scale):
        return (
            0.5 * jnp.log(2 * jnp.pi)
            + jnp.log(scale)
            + (SD**2 + (MEAN - loc) ** 2) / (2 * scale**2)
        )

    expected = cross_entropy(jnp.asarray(LOC), jnp.asarray(SCALE))
    np.testing.assert_allclose(losses.mean(), expected, atol=2e-2)
    np.testing.assert_allclose(gradients.mean(0), derivative(cross_entropy), atol=5e-2)


def test_forward_kl_by_draws_of_its_own_vanishes_at_the_optimum():
    proposal = fv.mean_field(1)
    own, foreign = (
        ob.ForwardKL(FAMILY, log_joint, num_samples=64, proposal=each) for each in (None, proposal)
    )
    at_optimum = params_of(own, loc=MEAN, scale=SD)
    assert (losses_and_gradients(own, at_optimum)[1].std(0) < 1e-5).all()
    # The score of foreign draws remains; so a test that saw none would be blind.
    at_optimum["proposal"] = fv.Fixed(q_params(proposal, loc=0.0, scale=1.5))
    assert (losses_and_gradients(foreign, at_optimum)[1].std(0) > 1e-2).all()


def test_running_scale_keeps_the_direction():
    plain = ELBOS["score"]
    scaled = ob.ScoreFunction(FAMILY, log_joint, num_samples=4, controls=(ob.RunningScale(),))
    params = params_of(scaled)
    # A past of signals of variance 4 halves the gradient.
    past = {"mean": jnp.asarray(4.0), "weight": jnp.asarray(1.0)}
    params["control"] = (fv.Fixed(past),)
    first = losses_and_gradients(plain, params_of(plain))[1]
    second = losses_and_gradients(scaled, params)[1]
    np.testing.assert_allclose(second, first / 2, rtol=1e-4)
    _, _, new = scaled(params, KEY, None)
    assert new["control"][0].value["weight"] == pytest.approx(0.9 + 0.1)


def test_control_variates_reduce_the_variance_of_a_shifted_signal():
    def shifted(params, key, z, batch):
        return 30.0 + log_joint(params, key, z, batch)

    spread = {}
    for name, control in {
        "none": (),
        "leave_one_out": (ob.LeaveOneOut(),),
        "self_critic": (ob.SelfCritic(),),
        "running_mean": (ob.RunningMean(),),
    }.items():
        objective = ob.ScoreFunction(FAMILY, shifted, num_samples=4, controls=control)
        params = params_of(objective)
        if name == "running_mean":
            params["control"] = (fv.Fixed({"mean": jnp.asarray(30.0), "weight": jnp.ones(())}),)
        spread[name] = losses_and_gradients(objective, params)[1].std(0)
    for name in ("leave_one_out", "self_critic", "running_mean"):
        assert (spread[name] < 0.2 * spread["none"]).all()


# ------------------------------------------------------------------------------- rows of a context


def conditional_joint(params, key, z, batch):
    """N(z; 0, 1) N(x; z, 1): the posterior of each row is N(x / 2, 1 / 2)."""
    del params, key
    return jnp.sum(log_normal(z, 0.0, 1.0) + log_normal(batch, z, 1.0), -1)


@pytest.mark.parametrize("path", [False, True])
def test_rows_have_their_own_draws_and_their_own_context(path):
    family = fv.iaf(1, num_layers=1, hidden_sizes=[4], transformer="affine", context_size=1)
    objective = ob.ELBO(
        family, conditional_joint, num_samples=3, context=lambda batch: batch, path=path
    )
    x = jax.random.normal(KEY, (6, 1))
    params = objective.init(KEY)
    loss = jax.jit(objective)
    values = np.array([loss(params, jax.random.key(s), x) for s in range(200)])
    # A new family is standard normal: KL(q || prior) = 0 and E log p(x | z) is known.
    expected = np.mean(0.5 * np.log(2 * np.pi) + 0.5 * (x**2 + 1))
    assert_mean(values, expected)


def test_learned_baseline_learns_from_the_context():
    from flowvi.networks import MLP

    family = fv.iaf(1, num_layers=1, hidden_sizes=[4], transformer="affine", context_size=1)
    network = MLP(1, (8,), 1)
    objective = ob.ScoreFunction(
        family,
        conditional_joint,
        num_samples=2,
        controls=(ob.LearnedBaseline(network),),
        context=lambda batch: batch,
    )
    params = objective.init(KEY)
    x = jax.random.normal(KEY, (6, 1))
    loss, metrics, new = objective(params, KEY, x)
    assert metrics["baseline_loss"] > 0
    assert jax.tree.structure(new) == jax.tree.structure(params)
    gradient = jax.grad(lambda p: objective(p, KEY, x)[0])(params)
    assert abs(gradient["control"][0]["layers"][-1]["b"]).sum() > 0
    # The loss that is shown is the ELBO's alone.
    plain = ob.ScoreFunction(
        family, conditional_joint, num_samples=2, controls=(), context=lambda batch: batch
    )
    np.testing.assert_allclose(loss, plain(plain.init(KEY), KEY, x)[0], rtol=1e-5)


# -------------------------------------------------------------------------------- closed-form KL


def joint(prior=None):
    def log_likelihood(params, key, z, batch):
        del params, key
        return jnp.sum(log_normal(batch, z, 1.0), -1)

    return ob.Joint(fv.standard_normal(2) if prior is None else prior, log_likelihood)


def test_closed_kl_is_chosen_by_itself_and_visible():
    x = jnp.array([0.3, -0.2])
    for family, rule in (
        (fv.mean_field(2), "analytic"),
        (fv.full_rank(2), "analytic"),
        (fv.whitened(fv.full_rank(2)), "analytic"),
        (fv.iaf(2, num_layers=1, hidden_sizes=[4]), "base"),
        (fv.iaf(2, num_layers=1, hidden_sizes=[4], base=fv.maf(2, num_layers=1)), "sampled"),
    ):
        objective = ob.ELBO(family, joint(), num_samples=2)
        params = objective.init(KEY)
        assert objective.kl_rule(params, x) == rule
    analytic = ob.ELBO(fv.full_rank(2), joint(), num_samples=4)
    sampled = ob.ELBO(fv.full_rank(2), joint(), num_samples=4, kl="sampled")
    params = fv.testing.perturbed(analytic.init(KEY), 0.5, 3)
    keys = jax.random.split(KEY, 1000)
    first = jax.jit(jax.vmap(lambda k: analytic(params, k, x)[0]))(keys)
    second = jax.jit(jax.vmap(lambda k: sampled(params, k, x)[0]))(keys)
    assert_mean(first - second, 0.0)
    assert first.std() < second.std()


def test_the_base_of_a_flow_is_integrated_exactly():
    x = jnp.array([0.3, -0.2])
    flow = fv.iaf(2, **SMALL, base=fv.mean_field(2))
    base, sampled = (ob.ELBO(flow, joint(), num_samples=4, kl=kl) for kl in ("auto", "sampled"))
    params = fv.testing.perturbed(base.init(KEY), 0.5, 3)
    keys = jax.random.split(KEY, 1000)

    def gradients(objective):
        grad = jax.grad(lambda params, key: objective(params, key, x)[0], allow_int=True)
        found = jax.jit(jax.vmap(grad, in_axes=(None, 0)))(params, keys)
        return np.concatenate([leaf.reshape(1000, -1) for leaf in jax.tree.leaves(found)], -1)

    first, second = gradients(base), gradients(sampled)
    assert_mean(first - second, 0.0)
    values = [jax.jit(jax.vmap(lambda k, o=o: o(params, k, x)[0]))(keys) for o in (base, sampled)]
    assert_mean(values[0] - values[1], 0.0)
    # Where the flow is the identity nothing of the rate is left to chance.
    start = base.init(KEY)
    rates = jax.jit(jax.vmap(lambda k: base(start, k, x)[1]["rate"]))(keys)
    assert rates.std() < 1e-6


@pytest.mark.parametrize("q", ["mean_field", "full_rank"])
@pytest.mark.parametrize("p", ["mean_field", "full_rank"])
def test_closed_kl_against_draws(q, p):
    families = {"mean_field": fv.mean_field(3), "full_rank": fv.full_rank(3)}
    distributions = [
        families[name].distribution(fv.testing.perturbed(families[name].init(KEY), 0.5, seed))
        for seed, name in enumerate((q, p))
    ]
    exact = ob.closed_form.kl_divergence(*distributions)
    z, log_q = distributions[0].sample_and_log_prob(seed=KEY, sample_shape=20_000)
    assert_mean(log_q - distributions[1].log_prob(z), exact)


# ------------------------------------------------------------------------ draws without density


def broken_joint(params, key, z, batch):
    value = log_joint(params, key, z, batch)
    return jnp.where(z[..., 0] > 1.0, jnp.log(1.0 - z[..., 0]), value)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: ob.ELBO(FAMILY, broken_joint, num_samples=64, **kw),
        lambda **kw: ob.ELBO(FAMILY, broken_joint, num_samples=64, path=True, **kw),
        lambda **kw: ob.IWELBO(FAMILY, broken_joint, num_samples=64, **kw),
        lambda **kw: ob.ForwardKL(FAMILY, broken_joint, num_samples=64, **kw),
        lambda **kw: ob.ScoreFunction(FAMILY, broken_joint, num_samples=64, **kw),
    ],
)
def test_draws_without_a_density_are_skipped_only_where_asked_for(make):
    strict = make()
    losses, _ = losses_and_gradients(strict, params_of(strict), 4)
    assert np.isnan(losses).all()
    lenient = make(skip_nonfinite=True)
    losses, gradients = losses_and_gradients(lenient, params_of(lenient), 4)
    assert np.isfinite(losses).all() and np.isfinite(gradients).all()
    metrics = lenient(params_of(lenient), KEY, None)[1]
    assert 0.1 < metrics["skipped"] < 0.5


def test_configurations_are_equal_by_value():
    make = lambda: ob.ELBO(fv.iaf(2), log_joint, num_samples=3, path=True)  # noqa: E731
    assert make() == make() and hash(make()) == hash(make())
    make = lambda: ob.ScoreFunction(FAMILY, log_joint, controls=[ob.RunningMean(0.5)])  # noqa: E731
    assert make() == make() and hash(make()) == hash(make())


def categorical():
    class Discrete(fv.Family):
        event_shape, context_shape, reparameterized = (1,), None, False

        def init(self, key):
            return {}

        def distribution(self, params, context=None):
            raise NotImplementedError

    return Discrete()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ob.ELBO(3, log_joint), TypeError, "`family` must be a family"),
        (lambda: ob.ELBO(FAMILY, 3), TypeError, "`log_joint` must be a function; got 3"),
        (lambda: ob.ELBO(FAMILY, log_joint, num_samples=0), ValueError, "`num_samples` must be"),
        (lambda: ob.ELBO(FAMILY, log_joint, kl="exact"), ValueError, "`kl` must be one of auto"),
        (
            lambda: ob.ELBO(FAMILY, log_joint, kl="analytic"),
            ValueError,
            '`log_joint` must be a `Joint` for `kl="analytic"`',
        ),
        (
            lambda: ob.ELBO(FAMILY, joint(), kl="analytic", path=True),
            ValueError,
            '`kl` must be "auto" or "sampled" with `path`',
        ),
        (
            lambda: ob.ELBO(categorical(), log_joint),
            ValueError,
            "`family` must be reparameterised.*Perhaps use `fv.objectives.ScoreFunction`",
        ),
        (lambda: ob.Renyi(FAMILY, log_joint, alpha=1), ValueError, "`alpha` must be at least 0"),
        (lambda: ob.CUBO(FAMILY, log_joint, order=1), ValueError, "`order` must be above 1"),
        (lambda: ob.RunningMean(1.0), ValueError, "`decay` must be between 0 and 1; got 1.0"),
        (
            lambda: ob.ScoreFunction(FAMILY, log_joint, controls=[3]),
            TypeError,
            "`controls` must be control variates",
        ),
        (
            lambda: ob.ForwardKL(FAMILY, log_joint, proposal=3),
            TypeError,
            "`proposal` must be a family or None; got 3",
        ),
        (
            lambda: losses_and_gradients(o := ob.ScoreFunction(FAMILY, log_joint), params_of(o)),
            ValueError,
            "`num_samples` must be at least 2 for `LeaveOneOut`",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
