"""Ensembles: members are what fits in turn give, whatever happens beside them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.training import TrainingDiverged, together
from tests.training.helpers import noisy, rows, run

KEYS = jax.random.split(jax.random.key(5), 3)


@pytest.fixture
def groups(monkeypatch):
    """The sizes of the groups that are trained together."""
    sizes, train = [], together.train

    def counted(runs):
        sizes.append(len(runs))
        train(runs)

    monkeypatch.setattr(together, "train", counted)
    return sizes


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert one.num_steps == other.num_steps and one.stop_reason == other.stop_reason
    np.testing.assert_allclose(one.history["loss"], other.history["loss"], rtol=1e-5)


def test_members_are_fits_in_turn_each_stopped_by_its_own_rule(groups):
    def fit(key):
        options = {"validation_data": rows(20), "validate_every": 4, "patience": 2}
        return run(noisy, key=key, data=rows(), batch_size=11, num_steps=60, **options)

    keys = jax.random.split(jax.random.key(5), 4)
    found = fv.ensemble(fit, keys)
    assert groups == [4] and found.mixture is None
    for member, key in zip(found.members, keys, strict=True):
        assert_same(member, fit(key))
    assert len({member.num_steps for member in found.members}) > 1
    assert len({member.best_step for member in found.members}) > 1
    with pytest.raises(TypeError, match="`disagreement` needs an ensemble of densities"):
        found.disagreement(KEYS[0])


def test_what_is_not_alike_is_done_apart(groups):
    def fit(size):
        first = run(data=rows(), batch_size=size, num_steps=3)
        return run(data=rows(), num_steps=3, params=first.params)

    found = together.together([functools.partial(fit, size) for size in (5, 6, 5)])
    assert groups == [2, 1, 3]
    for result, size in zip(found, (5, 6, 5), strict=True):
        assert_same(result, fit(size))


def poisoned(params, key, batch):
    """Not finite for one member from its fifth step on."""
    del key
    bad = (batch["bad"][0] > 0) & (params["mean"][0] > 0.2)
    return jnp.mean((batch["x"] - params["mean"]) ** 2) + jnp.where(bad, jnp.nan, 0.0)


def test_a_member_that_diverges_leaves_the_others_alone():
    def fit(bad):
        data = {"x": rows(), "bad": np.full(60, bad)}
        try:
            return run(poisoned, data=data, batch_size=10, max_bad_steps=4)
        except TrainingDiverged as error:
            return error.result

    found = together.together([functools.partial(fit, bad) for bad in (0, 1, 0)])
    assert [each.stop_reason for each in found] == ["max_steps", "error", "max_steps"]
    assert found[1].num_bad_steps == 4
    for result, bad in zip(found, (0, 1, 0), strict=True):
        assert_same(result, fit(bad))


def test_an_exception_of_one_ends_all():
    ended = []

    def fit(number):
        if number == 2:
            raise KeyError("mine")
        try:
            run(data=rows(), num_steps=3)
        finally:
            ended.append(number)

    with pytest.raises(KeyError, match="mine"):
        together.together([functools.partial(fit, number) for number in range(4)])
    assert ended == [0, 1]


@pytest.mark.slow
@pytest.mark.compilations(60)
def test_the_mixture_of_densities(x64, groups):
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(60, 2))

    def fit(key):
        return fv.fit_density(fv.mean_field(2), x, key=key, num_steps=20, progress=False)

    found = fv.ensemble(fit, KEYS)
    assert groups == [3]
    for member, key in zip(found.members, KEYS, strict=True):
        assert_same(member, fit(key))
    each = np.array([member.log_prob(x) for member in found.members])
    expected = np.logaddexp.reduce(each, 0) - np.log(3)
    np.testing.assert_allclose(found.mixture.log_prob(x), expected, rtol=1e-9)
    apart = found.disagreement(jax.random.key(0), 4000)
    assert apart.shape == (3,) and (abs(apart) < 0.1).all()
    far = fv.fit_density(fv.mean_field(2), x + 100.0, key=KEYS[0], num_steps=20, progress=False)
    pair = {0: found.members[0], 1: far}
    both = fv.ensemble(lambda key: pair[int(key[1])], np.uint32([[0, 0], [0, 1]]))
    np.testing.assert_allclose(both.disagreement(jax.random.key(0), 500), np.log(2), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.compilations(70)
def test_the_mixture_of_posteriors_has_weights_by_evidence():
    target = fv.Target(lambda u: -0.5 * jnp.sum((u - 3.0) ** 2), 1)

    def fit(key):
        return fv.fit_posterior(
            target, key=key, family=fv.mean_field(1), num_steps=10, progress=False
        )

    found = fv.ensemble(fit, KEYS[:2])
    evidences = [member.diagnosis.log_evidence.value for member in found.members]
    expected = np.exp(evidences) / np.exp(evidences).sum()
    np.testing.assert_allclose(np.exp(found.log_weights), expected, rtol=1e-6)
    assert abs(found.mixture.sample(jax.random.key(0), 2000).mean() - 3) < 0.2
    assert abs(found.mixture.diagnosis.log_evidence.value - 0.5 * np.log(2 * np.pi)) < 0.05
    other = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 1)
    pair = {0: found.members[0], 1: dataclasses.replace(found.members[1], target=other)}
    with pytest.raises(ValueError, match="`fit` must fit posteriors of one target"):
        fv.ensemble(lambda key: pair[int(key[1])], np.uint32([[0, 0], [0, 1]]))


def test_bad_input():
    with pytest.raises(TypeError, match="`fit` must be a function of a key"):
        fv.ensemble(3, KEYS)
    with pytest.raises(TypeError, match=r"`key` must be a random key.*split"):
        fv.ensemble(run, [1, 2])
    with pytest.raises(ValueError, match="`keys` must hold at least one key"):
        fv.ensemble(run, [])
