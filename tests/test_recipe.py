"""What `fit_density` does with no settings: marginal maps, textbook estimates, a flow, weights."""

import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.covariance import ledoit_wolf

import flowvi as fv
from flowvi.bijectors import Marginal
from flowvi.densities import DensityWarning, diagnosis, recipe, textbook, training
from flowvi.densities.textbook import Rows, Setting
from flowvi.families import Gaussianized, gaussianized, marginals
from flowvi.families.known import Stacked
from flowvi.supports import as_support
from tests.training.helpers import assert_trees_equal

KEY = jax.random.key(0)
SMALL = fv.maf(2, num_layers=1, hidden_sizes=[8], transformer="affine")
REAL = as_support(None, (2,))


def two_groups(num_rows, seed=0):
    generator = np.random.default_rng(seed)
    far = generator.uniform(size=(num_rows, 1)) < 0.3
    return 1e6 + 10.0 * (generator.normal(size=(num_rows, 2)) + 20.0 * far)


# --------------------------------------------------------------------------------- marginal maps

TAILS = {
    "normal": (stats.norm(3, 10), (-np.inf, np.inf)),
    "student": (stats.t(2), (-np.inf, np.inf)),
    "log-normal": (stats.lognorm(1.5), (-np.inf, np.inf)),
    "gamma": (stats.gamma(0.3), (0, np.inf)),
    "beta": (stats.beta(0.5, 0.5), (0, 1)),
    "uniform": (stats.uniform(), (-np.inf, np.inf)),
}


@pytest.mark.parametrize("name", TAILS)
def test_a_marginal_map_has_the_density_and_the_quantiles_of_its_column(name):
    true, support = TAILS[name]
    generator = np.random.default_rng(0)
    x, new = (true.rvs(size=(n, 1), random_state=generator) for n in (10_000, 20_000))
    family = gaussianized(fv.standard_normal(1), [support], num_bins=24)
    params = family.place(jax.jit(family.init)(KEY), x)
    z, log_det, _ = family.standardize(params, new)
    gap = np.mean(true.logpdf(new[:, 0]) - stats.norm.logpdf(z[:, 0]) - log_det)
    assert -0.003 < gap < 0.02
    part = np.array([1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    found = family.unstandardize(params, stats.norm.ppf(part)[:, None])[:, 0]
    back = true.cdf(found)
    error = np.sqrt(part * (1 - part) / 10_000)
    assert (np.abs(back - part) < 4 * error + 3e-4).all()


def test_far_away_and_on_a_bound():
    x = np.random.default_rng(0).beta(0.5, 0.5, size=(2000, 1)).astype(np.float32)
    x[:3, 0] = 0, 1, 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        density = fv.fit_density(
            fv.mean_field(1), x, support=(0, 1), key=KEY, num_steps=1, progress=False
        )
    ends = density.log_prob(np.array([[0.0], [1.0], [0.5], [-0.1], [1.1]], np.float32))
    assert np.isfinite(ends[:3]).all() and np.isneginf(ends[3:]).all()
    family = gaussianized(fv.standard_normal(1), num_bins=None)
    x = 1.7e9 + 100 * np.random.default_rng(1).normal(size=(1000, 1))
    params = family.place(jax.jit(family.init)(KEY), x)
    gap = stats.norm(1.7e9, 100).logpdf(x[:, 0]) - family.log_prob(params, x)
    assert np.abs(gap.mean()) < 0.01
    draws = family.sample_exactly(params, KEY, 1000)[0]
    assert len(np.unique(draws)) == 1000 and abs(draws.std() - 100) < 10


def test_neither_an_outlier_nor_a_far_group_sets_the_units():
    x = np.random.default_rng(0).normal(size=2000)
    clean = marginals.units(x)
    x[:20] = 1e6
    np.testing.assert_allclose(marginals.units(x), clean, atol=0.05)


def test_tables_of_ties_constants_and_few_rows_are_maps():
    generator = np.random.default_rng(0)
    for column in (
        np.repeat(np.arange(3.0), 100),
        generator.integers(0, 60, 1000).astype(float),
        np.concatenate([np.zeros(500), generator.normal(size=500)]),
        generator.normal(size=20),
    ):
        table = marginals.fitted(column, 8)
        assert (np.diff(table["x"]) > 0).all() and (np.diff(table["z"]) > 0).all()
        assert (table["slope"] > 0).all() and np.isfinite(table["slope"]).all()


def test_a_covariance_is_shrunk_where_that_helps():
    generator = np.random.default_rng(0)
    narrow = generator.multivariate_normal([0, 0], [[1, 0.9999], [0.9999, 1]], 5000)
    assert np.linalg.det(marginals.covariance(narrow)) < 3e-4
    few = generator.normal(size=(30, 20))
    smallest = np.linalg.eigvalsh(marginals.covariance(few))[0]
    assert smallest > 0.2 > np.linalg.eigvalsh(np.cov(few.T))[0]
    # With many columns every eigenvalue has a shrinkage of its own.
    spread = np.geomspace(0.01, 1, 60)
    for count in (400, 100):
        rows = np.sqrt(spread) * generator.normal(size=(count, 60))
        new = np.sqrt(spread) * generator.normal(size=(1000, 60))
        alike, own = (
            stats.multivariate_normal(rows.mean(0), found).logpdf(new).mean()
            for found in (ledoit_wolf(rows)[0], marginals.covariance(rows))
        )
        assert own > alike + 0.2


# ---------------------------------------------------------------------------- textbook estimates


@pytest.mark.parametrize("kind", ["normal", "mixture", "kernel"])
def test_an_estimate_is_built_as_it_was_scored(kind):
    rows = Rows.of(two_groups(400), None)
    held_out = two_groups(300, seed=1)
    found = textbook.scores(rows, Rows.of(held_out, None), REAL, 0)
    setting = max((s for s in found if s.kind == kind), key=lambda s: found[s].mean())
    family, params = textbook.build(setting, rows, REAL, 0)
    log_prob = family.log_prob(params, held_out)
    np.testing.assert_allclose(log_prob, found[setting], rtol=1e-4, atol=2e-4)
    draws, its_log_prob = family.sample_exactly(params, KEY, 2000)
    np.testing.assert_allclose(its_log_prob, family.log_prob(params, draws), atol=2e-3)
    np.testing.assert_allclose(draws.mean(0), held_out.mean(0), atol=20)
    if kind == "mixture":
        assert setting.size >= 2
        assert found[setting].mean() > found[Setting("normal", None)].mean() + 0.3


def test_a_normal_of_many_columns_keeps_its_shrinkage():
    # A second covariance, of the whitened rows, would undo that of the first.
    generator, scale = np.random.default_rng(0), np.geomspace(0.1, 1, 60)
    x, new = (scale * generator.normal(size=(count, 60)) for count in (100, 1000))
    real = as_support(None, (60,))
    family, params = textbook.build(Setting("normal", None), Rows.of(x, None), real, 0)
    alike = stats.multivariate_normal(x.mean(0), ledoit_wolf(x / scale)[0] * np.outer(scale, scale))
    assert np.mean(family.log_prob(params, new)) > np.mean(alike.logpdf(new)) - 1


@pytest.mark.slow
@pytest.mark.compilations(60)
def test_a_mixture_given_a_context(monkeypatch):
    monkeypatch.setattr(textbook, "COMPONENTS", (4,))

    def rows(num_rows, seed):
        generator = np.random.default_rng(seed)
        c = generator.uniform(-1, 1, (num_rows, 2))
        sign = np.where(generator.uniform(size=num_rows) < 0.3, 1, -1)
        x = 10 * (sign * c[:, 0] + 0.1 * generator.normal(size=num_rows))
        return np.stack([x, generator.normal(size=num_rows)], 1), c

    x, context = rows(3000, 0)
    new, new_context = rows(300, 1)
    given = Rows.of(x, context), Rows.of(new, new_context)
    found = textbook.scores(*given, REAL, 0)
    assert {each.kind for each in found} == {"normal", "mixture"}
    setting = max(found, key=lambda s: found[s].mean())
    assert found[setting].mean() > found[Setting("normal", None)].mean() + 0.3
    family, params = textbook.build(setting, given[0], REAL, 0)
    log_prob = family.log_prob(params, new, new_context)
    np.testing.assert_allclose(log_prob, found[setting], rtol=1e-4, atol=1e-3)
    draws, its_log_prob = family.sample_exactly(params, KEY, 2000, [0.8, 0.0])
    np.testing.assert_allclose(its_log_prob, family.log_prob(params, draws, [0.8, 0.0]), atol=2e-3)
    assert abs(np.mean(draws[:, 0] > 0) - 0.3) < 0.1


def test_a_flow_is_given_up_only_where_it_cannot_catch_up():
    steps, rule = np.arange(1, 51), training.Hopeless(50)

    def end(behind, error=0.01):
        found = {"validation_behind": behind, "validation_behind_error": np.full(50, error)}
        known = [{name: each[:k] for name, each in found.items()} for k in steps]
        return next((k for k, history in zip(steps, known, strict=True) if rule(history)), None)

    assert end(0.3 + 0.5 / steps) == training.LEAST_VALIDATIONS
    assert end(0.3 + 0.1 * steps) == training.LEAST_VALIDATIONS  # it overfits
    assert end(0.1 * steps - 0.15) is None  # so it does, but was ahead at first
    assert end(0.3 + 0.5 / steps, error=0.2) is None  # it may be chance
    assert end(0.3 - 0.1 * np.log2(steps)) is None  # at step 8 it draws level
    assert 8 < end(0.05 + 1 / steps) < 40
    assert end(-0.1 + 0.5 / steps) is None


def test_weights():
    generator = np.random.default_rng(0)
    x = np.where(generator.uniform(size=20_000) < 0.2, generator.normal(size=20_000), 8.0)
    x = x + generator.normal(size=20_000)
    table = np.stack([stats.norm(loc, s).logpdf(x) for loc, s in ((0, 2**0.5), (8, 1), (30, 1))], 1)
    np.testing.assert_allclose(recipe.stacking_weights(table), [0.2, 0.8, 0], atol=0.01)
    # What is plainly not worse than the mixture, and simpler, has it all.
    right, chance = stats.norm.logpdf(x), 0.01 * generator.normal(size=len(x))
    assert recipe.chosen_weights({"normal": right, "flow": right + chance}) == {"normal": 1.0}
    columns = {"normal": table[:, 0], "kernel": table[:, 1]}
    assert recipe.chosen_weights(columns).keys() == columns.keys()


# --------------------------------------------------------------------------------------- the whole


def fit(x, family=SMALL, **options):
    options = {"num_steps": 20, "progress": False, "key": KEY, **options}
    return fv.fit_density(family, x, **options)


@pytest.fixture(scope="module")
def few():
    return fit(two_groups(300))


@pytest.mark.compilations(150)
def test_a_mixture_of_estimates(few, tmp_path):
    assert isinstance(few.family, Stacked) and few.num_rows == 300
    names = [each.name for each in few.scores]
    assert names == ["normal", "mixture", "kernel", "flow", "all"]
    weights = [each.weight for each in few.scores[:-1]]
    np.testing.assert_allclose(sum(weights), 1, rtol=1e-6)
    best = max(each.log_prob.value for each in few.scores[:-1])
    assert few.scores[-1].log_prob.value > best - 3 * few.scores[-1].log_prob.standard_error
    assert "held-out nats" in few.summary() and "mixture" in few.summary()
    assert len(repr(few)) < 400
    new = two_groups(2000, seed=1)
    log_prob = few.log_prob(new)
    assert log_prob.mean() > -8.5
    # Of numbers near zero, the compiled form says the same.
    x, its_log_prob = few.sample_and_log_prob(KEY, 500)
    assert x.shape == (500, 2) and x.dtype == np.float64
    np.testing.assert_allclose(its_log_prob, few.log_prob(x), rtol=1e-5)
    assert abs(np.mean(x[:, 0] > 1e6 + 100) - 0.3) < 0.08
    few.save(tmp_path / "few.flowvi")
    for again in (fv.load(tmp_path / "few.flowvi"), pickle.loads(pickle.dumps(few))):
        np.testing.assert_array_equal(again.log_prob(new), log_prob)
        assert again.scores == few.scores


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_a_flow_far_behind_is_not_trained_on(few, capsys):
    # In each part of few rows it would have to catch up: one is enough to see that it cannot.
    density = fit(two_groups(300), num_steps=100, progress=True)
    assert density.stop_reason == "hopeless" and density.num_steps < 50
    flow = density.scores[-2]
    assert flow.weight == 0 and "given up after" in flow.estimate
    assert flow.log_prob.value < density.scores[-1].log_prob.value
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("mixture ") and lines[-1].startswith("step ")
    # Without patience it goes on.
    with_all = fit(two_groups(300), num_steps=20, patience=None)
    assert with_all.stop_reason == "max_steps" and with_all.num_steps == 20


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_the_same_key_gives_the_same_bits_and_the_distribution_the_same_numbers():
    x = np.random.default_rng(0).normal(size=(100, 2))
    one, other = fit(x), fit(x.tolist())
    assert_trees_equal(one.params, other.params)
    distribution = one.distribution()
    np.testing.assert_allclose(
        jax.jit(distribution.log_prob)(jnp.float32(x)), one.log_prob(x), atol=1e-4
    )
    assert distribution.sample(seed=KEY, sample_shape=(3,)).shape == (3, 2)


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_it_resumes(tmp_path):
    x, options = two_groups(120), {"checkpoint_dir": tmp_path, "checkpoint_every": 5}
    whole = fit(x)
    fit(x, **options, callback=lambda progress: progress.step >= 5)
    again = fit(x, **options, resume=True)
    assert_trees_equal(again.params, whole.params)


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_a_context():
    generator = np.random.default_rng(0)
    context = 1e5 + 1e-2 * generator.uniform(-1, 1, size=(200, 1))
    x = generator.normal(size=(200, 2)) + 100 * (context - 1e5)
    family = fv.maf(2, num_layers=1, hidden_sizes=[8], transformer="affine", context_size=1)
    density = fit(x, family, context=context, num_steps=100)
    assert [each.name for each in density.scores] == ["normal", "mixture", "flow", "all"]
    # A linear regression with normal noise is the truth.
    true = stats.norm.logpdf(x - 100 * (context - 1e5)).sum(1)
    assert np.mean(true - density.log_prob(x, context)) < 0.02
    assert density.log_prob(x[:5], context[:5]).shape == (5,)
    draws = density.sample(KEY, 7, context[:3])
    assert draws.shape == (7, 3, 2)
    low, high = (density.sample(KEY, 500, c).mean() for c in ([1e5 - 1e-2], [1e5 + 1e-2]))
    assert high > low + 0.3


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_a_memory_map_is_the_array(tmp_path):
    x = two_groups(100).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    here, there = fit(x), fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert [each.weight for each in here.scores] == [each.weight for each in there.scores]
    np.testing.assert_allclose(here.log_prob(x), there.log_prob(x), rtol=1e-5)


def test_few_rows_have_textbook_estimates_alone():
    assert recipe.is_worth_a_flow(150, 10) and not recipe.is_worth_a_flow(149, 10)
    assert not recipe.is_worth_a_flow(99, 1)
    x = np.random.default_rng(0).normal(size=(60, 1))
    density = fv.fit_density(x, key=KEY, progress=False)
    assert density.num_steps == 0 and density.log_prob(x).shape == (60,)
    assert [each.name for each in density.scores] == ["normal", "mixture", "kernel", "all"]
    with pytest.warns(RuntimeWarning, match="`x` has 12 rows, which are too few"):
        density = fv.fit_density(x[:12], key=KEY, progress=False)
    np.testing.assert_allclose(
        density.log_prob(x), stats.norm(x[:12].mean(), x[:12].std()).logpdf(x[:, 0]), atol=1e-3
    )
    assert density.scores == () and density.summary() == "nothing was compared"


def test_no_steps_leave_the_textbook_estimates():
    density = fit(two_groups(100), num_steps=0)
    assert "flow" not in [each.name for each in density.scores]
    with pytest.raises(ValueError, match="`num_steps` must be a positive integer; got 0"):
        fit(two_groups(100), num_steps=0, combine=False)


def test_what_no_family_needs():
    x = np.zeros((60, 1))
    with pytest.raises(TypeError, match="`x` must be given"):
        fv.fit_density(key=KEY)
    with pytest.raises(ValueError, match=r"`x` must have shape \[num_rows, D\]"):
        fv.fit_density(x[:, 0], key=KEY)


def test_what_is_not_combined():
    x = np.random.default_rng(0).normal(size=(60, 2))
    for options in ({"combine": False}, {"validation_fraction": 0}, {"family": fv.mean_field(2)}):
        density = fit(x, **options)
        assert density.scores == () and not isinstance(density.family, Stacked)
    with pytest.raises(ValueError, match="`combine` must be False unless"):
        fit(x, fv.mean_field(2), combine=True)
    with pytest.raises(TypeError, match="`combine` must be True, False or None; got 'flow'"):
        fit(x, combine="flow")


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_a_flow_that_diverges_leaves_the_textbook_estimates():
    x = np.random.default_rng(0).normal(size=(100, 2))
    options = {"optimizer": optax.sgd(np.nan), "max_bad_steps": 3}
    with pytest.warns(DensityWarning, match="The flow diverged: it was judged as it stood before"):
        density = fit(x, **options)
    assert density.stop_reason == "error" and len(density.messages) == 1
    assert density.scores[0].weight == 1
    gap = stats.norm.logpdf(x).sum(1) - density.log_prob(x)
    assert abs(gap.mean()) < 0.1
    with pytest.raises(fv.TrainingDiverged, match="after 3 bad steps in a row") as caught:
        fit(x, combine=False, **options)
    for params in (caught.value.params, caught.value.result.params):
        assert fv.standardized(SMALL).log_prob(params, x).shape == (100,)


# -------------------------------------------------------------------------------------- diagnosis


def test_messages_about_columns():
    generator = np.random.default_rng(0)
    normal = generator.normal(size=1000)
    x = np.stack([normal, np.round(normal), np.maximum(normal, -0.5), np.exp(normal)], 1)
    messages = diagnosis.about_columns(x, as_support(None, (4,)))
    assert len(messages) == 3
    assert "olumn 1 holds" in messages[0] and "add uniform noise" in messages[0]
    assert "of column 2 equal their smallest number" in messages[1]
    assert "olumn 3: no number is below zero" in messages[2] and "positive" in messages[2]
    assert not diagnosis.about_columns(x[:, :1], as_support(None, (1,)))
    assert not diagnosis.about_columns(x[:, 3:], as_support("positive", (1,)))
    assert not diagnosis.about_columns(4.1 + x[:, :1], as_support(None, (1,)))
    with pytest.warns(DensityWarning, match="Column 1 holds . different numbers in 1000 rows"):
        fit(x, fv.mean_field(4))


def test_dependent_and_rare_columns():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 2))
    (message,) = diagnosis.about_columns(np.c_[x, x.sum(1)], as_support(None, (3,)))
    assert message.startswith("A column is a linear function of others")
    assert not diagnosis.about_columns(
        np.c_[x, x.sum(1) + 1e-2 * generator.normal(size=200)], as_support(None, (3,))
    )
    found = marginals.covariance(np.c_[x[:99], np.zeros(99)])
    assert np.linalg.eigvalsh(found)[0] > 0


def test_messages_about_scores():
    scores, numbers = np.random.default_rng(0).normal(size=500), np.arange(500) + 7
    assert not diagnosis.about_scores(scores, numbers, scores)
    scores[3] = -1e4
    (message,) = diagnosis.about_scores(scores, numbers, None)
    assert message.startswith("Row 10 alone lowers the held-out score by 20")
    scores[3] = 0
    (message,) = diagnosis.about_scores(scores, numbers, scores + 2)
    assert "Training rows score 2 nats above held-out ones" in message


def test_calibration():
    x = np.random.default_rng(0).normal(size=(2000, 2))
    density = fit(x, fv.mean_field(2), num_steps=300, optimizer=None)
    new = np.random.default_rng(1).normal(size=(1000, 2)) * [1, 2]
    found = density.calibration(new, key=KEY)
    assert found.pit.shape == (1000, 2)
    assert found.p_value[0] > 1e-3 > 1e-6 > found.p_value[1]
    assert len(found.plot(["one", "two"]).axes) == 2


def test_ties_and_draws_of_each_row():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 3, (3000, 1)).astype(float)
    draws = generator.integers(0, 3, (3000, 1)).astype(float)
    assert diagnosis.calibration(x, draws, 0).p_value > 1e-3
    own = generator.normal(size=(200, 500, 1)) + np.arange(500)[:, None]
    rows = generator.normal(size=(500, 1)) + np.arange(500)[:, None]
    assert diagnosis.calibration(rows, own, 0).p_value > 1e-3


@pytest.fixture(scope="module")
def marginal():
    generator = np.random.default_rng(0)
    columns = [
        generator.standard_t(2, 3000),
        generator.normal(size=3000),
        generator.gamma(2, size=3000),
    ]
    support = [None, None, "positive"]
    family = gaussianized(fv.standard_normal(3), support, num_bins=6)
    assert isinstance(family, Gaussianized)
    tables = family.place(jax.jit(family.init)(KEY), np.stack(columns, 1))["marginals"].value
    return tables, np.float32(2.5 * generator.normal(size=(200, 3)))


def test_a_marginal_bijector(marginal):
    tables, z = marginal

    @jax.jit
    def walk(z):
        bijector = Marginal(**tables)
        x, log_det = bijector.forward_and_log_det(z)
        back, its_log_det = bijector.inverse_and_log_det(x)
        jacobian = jax.vmap(jax.jacfwd(bijector.forward))(z)
        return back, log_det + its_log_det, log_det - jnp.linalg.slogdet(jacobian)[1]

    back, both, gap = walk(z)
    np.testing.assert_allclose(back, z, atol=2e-4)
    np.testing.assert_allclose(both, 0, atol=2e-3)
    np.testing.assert_allclose(gap, 0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.compilations(200)
def test_it_has_all_properties_of_a_bijector(marginal):
    tables, z = marginal
    fv.testing.check_bijector(Marginal(**tables), jnp.asarray(z[:6]))


# ------------------------------------------------------------------------- what it must reach, slow


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(150)
def test_heavy_tails_and_their_draws():
    true = stats.t(2), stats.cauchy()

    def rows(num_rows, seed):
        generator = np.random.default_rng(seed)
        return np.stack([each.rvs(size=num_rows, random_state=generator) for each in true], 1)

    density = fv.fit_density(rows(10_000, 0), key=KEY, progress=False)
    x = rows(20_000, 1)
    log_prob = sum(each.logpdf(x[:, i]) for i, each in enumerate(true))
    gap = log_prob - density.log_prob(x)
    assert np.mean(gap) < 0.03 and np.max(gap) < 5
    draws = density.sample(KEY, 100_000)
    for column, each in zip(draws.T, true, strict=True):
        found = np.quantile(column, [1e-3, 0.1, 0.9, 1 - 1e-3])
        np.testing.assert_allclose(found / each.ppf([1e-3, 0.1, 0.9, 1 - 1e-3]), 1, atol=0.4)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(150)
def test_one_row_far_away_and_few_rows():
    x = np.random.default_rng(0).normal(size=(2000, 1))
    x[700] = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DensityWarning)
        density = fv.fit_density(x, key=KEY, progress=False)
    new = np.random.default_rng(1).normal(size=(20_000, 1))
    assert np.mean(stats.norm.logpdf(new)[:, 0] - density.log_prob(new)) < 0.02
    factors = np.random.default_rng(2).normal(size=(10, 10))
    normal = stats.multivariate_normal(cov=factors @ factors.T / 10 + 0.1 * np.eye(10))
    x, new = normal.rvs(200, random_state=0), normal.rvs(20_000, random_state=1)
    small = fv.maf(10, num_layers=1, hidden_sizes=[16], transformer="affine")
    density = fv.fit_density(small, x, key=KEY, progress=False)
    plain = stats.multivariate_normal(x.mean(0), np.cov(x.T, bias=True)).logpdf(new)
    assert np.mean(plain - density.log_prob(new)) < 0.02


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(150)
def test_scales_that_depend_on_a_context():
    def rows(num_rows, seed):
        generator = np.random.default_rng(seed)
        context = generator.uniform(-1, 1, (num_rows, 1))
        return np.exp(3 * context) * generator.normal(size=(num_rows, 1)), context

    x, context = rows(4000, 0)
    density = fv.fit_density(x, context=context, key=KEY, progress=False)
    x, context = rows(5000, 1)
    true = stats.norm(0, np.exp(3 * context)).logpdf(x)[:, 0]
    assert np.mean(true - density.log_prob(x, context)) < 0.05


# ---------------------------------------------------------------------------------------- questions


@pytest.fixture(scope="module")
def asked():
    x = np.random.default_rng(0).normal(size=(1000, 2)) * [1, 10]
    return fv.fit_density(x, key=KEY, num_steps=0, progress=False)


def test_the_probability_of_a_box(asked):
    found = asked.probability([-1, -np.inf], [1, 10], key=KEY)
    true = (stats.norm.cdf(1) - stats.norm.cdf(-1)) * stats.norm.cdf(1)
    assert abs(found.value - true) < 4 * found.standard_error + 0.03
    assert 0.003 < found.standard_error < 0.006
    assert asked.probability(-np.inf, np.inf, key=KEY).value == 1
    none = asked.probability(50, 60, key=KEY)
    assert none.value == 0 and 0 < none.standard_error < 2e-3


def test_the_rank_of_an_anomaly(asked):
    new = np.random.default_rng(1).normal(size=(1000, 2)) * [1, 10]
    ranks = asked.anomaly_rank(new)
    assert stats.kstest(ranks, "uniform").statistic < 0.08
    assert asked.anomaly_rank(np.array([[6.0, 60.0]])) == 1 / 1001
    assert asked.anomaly_rank(np.array([[0.0, 0.0]])) > 0.95


def test_bad_questions(asked):
    with pytest.raises(ValueError, match=r"`lower` must be a number or of shape \(2,\); got shape"):
        asked.probability(np.zeros(3), 1, key=KEY)
    with pytest.raises(ValueError, match="`upper` must not be NaN; got nan"):
        asked.probability(0, np.nan, key=KEY)
    with pytest.raises(ValueError, match=r"`upper` must name columns .*; got 'age' for \[\]"):
        asked.probability(0, {"age": 1}, key=KEY)
    alone = fit(np.random.default_rng(0).normal(size=(60, 2)), fv.mean_field(2))
    with pytest.raises(ValueError, match="`anomaly_rank` needs scores of held-out rows"):
        alone.anomaly_rank(np.zeros((1, 2)))
