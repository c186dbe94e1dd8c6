"""Each objective against its own expectation on normal distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP
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


FAMILY = fv.mean_field(1)


def transform(loc, scale):
    # The family's softplus is 1 at 0.
    inverse = jnp.log(jnp.expm1(jnp.reshape(scale, 1))) - jnp.log(jnp.e - 1)
    return {"loc": jnp.reshape(loc, 1), "raw_scale": inverse}


def params_of(objective, loc=LOC, scale=SCALE, **more):
    params = objective.init(KEY)
    return {
        **params,
        "posterior": {**params["posterior"], "transform": transform(loc, scale)},
        **more,
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def _estimates(objective, loc, scale, count, control, proposal):
    params = params_of(objective, loc, scale)
    if control is not None:
        params["control"] = control
    if proposal is not None:
        inner = objective.proposal.init(KEY)
        params["proposal"] = fv.Fixed({**inner, "transform": transform(*proposal)})

    def loss(trainable, key):
        new = {**params, "posterior": {**params["posterior"], "transform": trainable}}
        out = objective(new, key, None)
        return out[:2] if isinstance(out, tuple) else (out, {})

    both = jax.vmap(jax.value_and_grad(loss, has_aux=True), in_axes=(None, 0))
    keys = jax.random.split(jax.random.key(1), count)
    (values, metrics), gradients = both(params["posterior"]["transform"], keys)
    return values, jnp.concatenate([gradients["loc"], gradients["raw_scale"]], -1), metrics


def losses_and_gradients(
    objective, count=400, *, loc=LOC, scale=SCALE, control=None, proposal=None
):
    """Losses of shape [count], and gradients with respect to loc and raw scale, [count, 2]."""
    found = _estimates(objective, loc, scale, count, control, proposal)
    return tuple(map(np.asarray, found[:2]))


def kl(loc, scale):
    """KL(q || p)."""
    return jnp.log(SD / scale) + 0.5 * ((scale**2 + (loc - MEAN) ** 2) / SD**2 - 1)


def exact(function, scale=SCALE):
    """A function of loc and scale, and its derivative with respect to loc and raw scale."""

    @jax.jit
    def both():
        place = transform(LOC, scale)

        def of_raw(loc, raw_scale):
            return function(loc, jax.nn.softplus(raw_scale + jnp.log(jnp.e - 1)))

        return jax.value_and_grad(of_raw, (0, 1))(place["loc"][0], place["raw_scale"][0])

    value, derivative = both()
    return float(value), np.asarray(derivative)


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
def test_elbo_and_its_gradient(name):
    objective = ELBOS[name]
    losses, gradients = losses_and_gradients(objective)
    value, derivative = exact(kl)
    assert_mean(losses, value - LOG_Z)
    assert_mean(gradients, derivative)
    # At the optimum.
    losses, gradients = losses_and_gradients(objective, loc=MEAN, scale=SD)
    np.testing.assert_allclose(losses, -LOG_Z, atol=1e-5)
    noise = gradients.std(0)
    without_noise = {"path", "one_draw_iwelbo", "leave_one_out", "self_critic", "composed"}
    if name in without_noise:
        assert (noise < 1e-5).all()
    else:
        # The score itself remains, whose mean is zero; so a test that saw none would be blind.
        assert (noise > 1e-2).all()


def test_path_gradient_has_less_variance_near_the_optimum():
    path, plain = (
        losses_and_gradients(ELBOS[name], loc=MEAN + 0.02, scale=0.98 * SD)[1].std(0)
        for name in ("path", "reparameterised")
    )
    assert (path < 0.2 * plain).all()


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
    losses, gradients = losses_and_gradients(make(num_samples=4_000), 100, scale=scale)
    limit, derivative = exact(lambda loc, scale: log_power_mean(loc, scale, power) / power, scale)
    # The bias is of order 1 / num_samples.
    assert_mean(losses, sign * (LOG_Z + limit), bias=1 / 4_000)
    assert_mean(gradients, sign * derivative, bias=1 / 4_000)


@pytest.mark.parametrize("name", POWERS)
def test_the_doubly_reparameterised_gradient_has_the_plain_ones_mean(name):
    _, _, scale, make = POWERS[name]
    objectives = make(num_samples=5), make(num_samples=5, doubly=False)
    first, second = (losses_and_gradients(o, 4_000, scale=scale)[1] for o in objectives)
    # The same draws, so that the comparison is sharp.
    assert_mean(first - second, 0.0)
    assert (abs(first - second).max(0) > 1e-2).all()
    doubly, plain = (
        losses_and_gradients(o, 4_000, loc=MEAN, scale=SD)[1].std(0) for o in objectives
    )
    assert (doubly < 1e-5).all() and (plain > 1e-2).all()


def test_bounds_come_in_their_order():
    def mean(name):
        return losses_and_gradients(POWERS[name][-1](num_samples=4_000), 100)[0].mean()

    elbo = losses_and_gradients(ELBOS["reparameterised"])[0].mean()
    bounds = [-mean("renyi_two"), -elbo, -mean("renyi_half"), -mean("iwelbo"), mean("cubo")]
    assert bounds == sorted(bounds)
    assert bounds[3] < LOG_Z + 0.01 < bounds[4]


def cross_entropy(loc, scale):
    log_scale = 0.5 * jnp.log(2 * jnp.pi) + jnp.log(scale)
    return log_scale + (SD**2 + (MEAN - loc) ** 2) / (2 * scale**2)


@pytest.mark.parametrize("proposal", [None, (0.0, 1.5)])
def test_forward_kl(proposal):
    family = proposal and fv.mean_field(1)
    objective = ob.ForwardKL(FAMILY, log_joint, num_samples=4_000, proposal=family)
    losses, gradients = losses_and_gradients(objective, 100, proposal=proposal)
    value, derivative = exact(cross_entropy)
    np.testing.assert_allclose(losses.mean(), value, atol=2e-2)
    np.testing.assert_allclose(gradients.mean(0), derivative, atol=5e-2)
    at_optimum = losses_and_gradients(objective, 100, loc=MEAN, scale=SD, proposal=proposal)
    noise = at_optimum[1].std(0)
    # The score of foreign draws remains; so a test that saw none would be blind.
    assert (noise < 1e-5).all() if proposal is None else (noise > 1e-3).all()


def past(mean):
    return fv.Fixed({"mean": np.float32(mean), "weight": np.float32(1)})


def test_running_scale_keeps_the_direction():
    scaled = ob.ScoreFunction(FAMILY, log_joint, num_samples=4, controls=(ob.RunningScale(),))
    # A past of signals of variance 4 halves the gradient.
    first = losses_and_gradients(ELBOS["score"])[1]
    second = losses_and_gradients(scaled, control=(past(4.0),))[1]
    np.testing.assert_allclose(second, first / 2, rtol=1e-4)

    @jax.jit
    def states():
        params = params_of(scaled, control=(past(4.0),))
        out = scaled(params, KEY, None)[2]["control"][0].value
        return out, scaled(scaled.init(KEY), KEY, None)[2]["control"][0].value["weight"]

    kept, begun = states()
    assert kept["weight"] == pytest.approx(0.9 + 0.1) and begun == pytest.approx(0.1)
    assert 3.6 < kept["mean"] < 4.0


def test_control_variates_reduce_the_variance_of_a_shifted_signal():
    spread = {}
    for name, control in {
        "none": (),
        "leave_one_out": (ob.LeaveOneOut(),),
        "self_critic": (ob.SelfCritic(),),
        "running_mean": (ob.RunningMean(),),
    }.items():
        objective = ob.ScoreFunction(FAMILY, shifted, num_samples=4, controls=control)
        state = (past(30.0),) if name == "running_mean" else None
        spread[name] = losses_and_gradients(objective, control=state)[1].std(0)
    for name in ("leave_one_out", "self_critic", "running_mean"):
        assert (spread[name] < 0.2 * spread["none"]).all()


def shifted(params, key, z, batch):
    return 30.0 + log_joint(params, key, z, batch)


# ------------------------------------------------------------------------------- rows of a context


def conditional_joint(params, key, z, batch):
    """N(z; 0, 1) N(x; z, 1): the posterior of each row is N(x / 2, 1 / 2)."""
    del params, key
    return jnp.sum(log_normal(z, 0.0, 1.0) + log_normal(batch, z, 1.0), -1)


ROWS = fv.iaf(1, num_layers=1, hidden_sizes=[4], transformer="affine", context_size=1)
X = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)


def itself(batch):
    return batch


@pytest.mark.parametrize("path", [False, True])
def test_rows_have_their_own_draws_and_their_own_context(path):
    objective = ob.ELBO(ROWS, conditional_joint, num_samples=3, context=itself, path=path)

    @jax.jit
    def values():
        params = objective.init(KEY)
        return jax.vmap(lambda key: objective(params, key, X))(jax.random.split(KEY, 200))

    # A new family is standard normal: KL(q || prior) = 0 and E log p(x | z) is known.
    assert_mean(values(), np.mean(0.5 * np.log(2 * np.pi) + 0.5 * (X**2 + 1)))


def test_learned_baseline_learns_from_the_context():
    options = {"num_samples": 2, "context": itself}
    controls = (ob.LearnedBaseline(MLP(1, (8,), 1)),)
    learned = ob.ScoreFunction(ROWS, conditional_joint, controls=controls, **options)
    plain = ob.ScoreFunction(ROWS, conditional_joint, controls=(), **options)

    @jax.jit
    def both():
        params = learned.init(KEY)
        out = lambda p: (lambda o: (o[0], o[1:]))(learned(p, KEY, X))  # noqa: E731
        found, gradient = jax.value_and_grad(out, has_aux=True)(params)
        return params, found, gradient, plain(plain.init(KEY), KEY, X)[0]

    params, (loss, (metrics, new)), gradient, expected = both()
    assert metrics["baseline_loss"] > 0
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert abs(np.asarray(gradient["control"][0]["layers"][-1]["b"])).sum() > 0
    # The loss that is shown is the ELBO's alone.
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# -------------------------------------------------------------------------------- closed-form KL


def joint(prior=None):
    def log_likelihood(params, key, z, batch):
        del params, key
        return jnp.sum(log_normal(batch, z, 1.0), -1)

    return ob.Joint(fv.standard_normal(2) if prior is None else prior, log_likelihood)


AT = np.array([0.3, -0.2], np.float32)


def test_closed_kl_is_chosen_by_itself_and_visible():
    for family, rule in (
        (fv.mean_field(2), "analytic"),
        (fv.full_rank(2), "analytic"),
        (fv.whitened(fv.full_rank(2)), "analytic"),
        (fv.iaf(2, num_layers=1, hidden_sizes=[4]), "base"),
        (fv.iaf(2, num_layers=1, hidden_sizes=[4], base=fv.maf(2, num_layers=1)), "sampled"),
    ):
        objective = ob.ELBO(family, joint(), num_samples=2)
        assert objective.kl_rule(jax.eval_shape(objective.init, KEY), AT) == rule


@pytest.mark.parametrize(
    "family", [fv.full_rank(2), fv.iaf(2, **SMALL, base=fv.mean_field(2))], ids=["closed", "base"]
)
def test_closed_and_sampled_rates_agree(family):
    log_joint = joint()
    objectives = [ob.ELBO(family, log_joint, num_samples=4, kl=kl) for kl in ("auto", "sampled")]

    @jax.jit
    def found():
        keys = jax.random.split(KEY, 1000)
        start = objectives[0].init(KEY)
        params = fv.testing.perturbed(start, 0.5, 3)

        def both(objective):
            def loss(params, key):
                return objective(params, key, AT)[0]

            grad = jax.value_and_grad(loss, allow_int=True)
            values, gradients = jax.vmap(grad, in_axes=(None, 0))(params, keys)
            return values, [leaf.reshape(1000, -1) for leaf in jax.tree.leaves(gradients)]

        rates = jax.vmap(lambda key: objectives[0](start, key, AT)[1]["rate"])(keys)
        return both(objectives[0]), both(objectives[1]), rates

    (first, first_gradients), (second, second_gradients), rates = found()
    assert_mean(first - second, 0.0)
    if isinstance(family.base, type(fv.standard_normal(2))):
        assert np.std(first) < np.std(second)
    for a, b in zip(first_gradients, second_gradients, strict=True):
        assert_mean(a - b, 0.0)
    # Where the flow is the identity nothing of the rate is left to chance.
    assert np.std(rates) < 1e-6


@pytest.mark.parametrize("q", ["mean_field", "full_rank"])
@pytest.mark.parametrize("p", ["mean_field", "full_rank"])
def test_closed_kl_against_draws(q, p):
    families = {"mean_field": fv.mean_field(3), "full_rank": fv.full_rank(3)}

    @jax.jit
    def found():
        first, second = (
            families[name].distribution(fv.testing.perturbed(families[name].init(KEY), 0.5, seed))
            for seed, name in enumerate((q, p))
        )
        z, log_q = first.sample_and_log_prob(seed=KEY, sample_shape=20_000)
        return log_q - second.log_prob(z), ob.closed_form.kl_divergence(first, second)

    assert_mean(*found())


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
    assert np.isnan(losses_and_gradients(make(), 4)[0]).all()
    found = _estimates(make(skip_nonfinite=True), LOC, SCALE, 4, None, None)
    losses, gradients, metrics = jax.tree.map(np.asarray, found)
    assert np.isfinite(losses).all() and np.isfinite(gradients).all()
    assert (metrics["skipped"] > 0.1).all() and (metrics["skipped"] < 0.5).all()


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
            lambda: losses_and_gradients(ob.ScoreFunction(FAMILY, log_joint)),
            ValueError,
            "`num_samples` must be at least 2 for `LeaveOneOut`",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
