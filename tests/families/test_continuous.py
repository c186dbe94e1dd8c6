"""Continuous flows: solutions that are known, estimates of traces, and flow matching."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, stats

import flowvi as fv
from flowvi.bijectors.continuous import Continuous
from tests import tolerances
from tests.families.test_families import perturbed

A = np.array([[0.3, -1.2], [0.8, -0.5]])
SMALL = {"hidden_sizes": [8]}


@pytest.mark.usefixtures("x64")
def test_a_linear_equation_has_the_exponential_of_its_matrix():
    x = np.random.default_rng(0).normal(size=(3, 2))

    @jax.jit
    def run(A, x):
        def total(A, x):
            y, log_det = Continuous(lambda t, x: x @ A.T).forward_and_log_det(x)
            return (y**2).sum() + log_det.sum(), (y, log_det)

        slopes, found = jax.grad(total, (0, 1), has_aux=True)(A, x)
        exact = lambda A, x: ((x @ jax.scipy.linalg.expm(A).T) ** 2).sum() + 3 * jnp.trace(A)  # noqa: E731
        alone = Continuous(lambda t, x: x @ A.T).forward(x[0])
        return found, alone, slopes, jax.grad(exact, (0, 1))(A, x)

    (y, log_det), alone, slopes, expected = run(A, x)
    np.testing.assert_allclose(y[0], alone, rtol=tolerances.STEPS)
    np.testing.assert_allclose(y, x @ linalg.expm(A).T, rtol=tolerances.STEPS)
    np.testing.assert_allclose(log_det, np.trace(A), rtol=tolerances.STEPS)
    for one, other in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerances.STEPS)


def test_an_equation_without_a_solution_is_nan():
    layer = Continuous(lambda t, x: x**2)  # from x = 2 it is infinite at t = 1/2
    assert np.isnan(np.asarray(jax.jit(layer.forward)(np.full((1, 1), 2.0, np.float32)))).all()


@pytest.mark.slow
def test_hutchinsons_estimate_is_unbiased():
    family = fv.continuous(3, **SMALL, trace="hutchinson")
    params = perturbed(jax.tree.map(np.asarray, jax.jit(family.init)(jax.random.key(0))), 1.0)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)

    @jax.jit
    def run(params, keys):
        one = lambda key: family.train_distribution(params, key)[0].log_prob(x)  # noqa: E731
        return jax.lax.map(one, keys), family.distribution(params).log_prob(x)

    draws, exact = map(np.asarray, run(params, jax.random.split(jax.random.key(1), 4000)))
    error = draws.std(0) / np.sqrt(len(draws))
    assert (error > 1e-5).all()
    assert (np.abs(draws.mean(0) - exact) < tolerances.STANDARD_ERRORS * error + 1e-4).all()


def test_the_loss_of_matching_is_the_error_of_velocities():
    # A new flow stands still: what is left is |x - z|^2, of mean 2 * (1 + 4) here.
    family = fv.continuous(2, **SMALL)
    loss_fn = fv.objectives.FlowMatching(family)
    params = jax.jit(family.init)(jax.random.key(0))
    x = 2 * np.random.default_rng(0).normal(size=(4000, 2)).astype(np.float32)
    loss = jax.jit(loss_fn)(params, jax.random.key(1), {"x": x})
    assert abs(loss - 10) < tolerances.STANDARD_ERRORS * np.sqrt(200 / 4000)
    # Rows of weight zero do not count, and neither does one where t is fixed.
    weight = np.zeros(4000, np.float32)
    assert jax.jit(loss_fn)(params, jax.random.key(1), {"x": x, "weight": weight}) == 0


def test_a_family_says_how_it_is_trained():
    kinds = [
        type(fv.objectives.training_loss(family)).__name__
        for family in (
            fv.continuous(2),
            fv.continuous(2, trained_by="likelihood"),
            fv.maf(2),
        )
    ]
    assert kinds == ["FlowMatching", "NegativeLogLikelihood", "NegativeLogLikelihood"]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(80)
def test_matching_learns_a_conditional_density_of_two_modes():
    rng = np.random.default_rng(0)
    context = rng.uniform(1, 3, (4000, 1))
    x = context * rng.choice([-1.0, 1.0], (4000, 1)) + 0.3 * rng.normal(size=(4000, 1))
    family = fv.continuous(1, hidden_sizes=[32, 32], context_size=1)
    density = fv.fit_density(
        family, x, context=context, key=jax.random.key(0), num_steps=2000, progress=False
    )
    truth = np.logaddexp(*(stats.norm.logpdf(x, s * context, 0.3) for s in (-1, 1))) - np.log(2)
    assert truth.mean() - np.mean(density.log_prob(x, context)) < 0.1


def test_arguments_are_checked(monkeypatch):
    with pytest.raises(ValueError, match='`trained_by` must be "matching" or "likelihood"; got'):
        fv.continuous(2, trained_by="elbo")
    with pytest.raises(ValueError, match='`trace` must be "exact", "hutchinson" or None; got'):
        fv.continuous(2, trace="roulette")
    with pytest.raises(TypeError, match=r"`family` must be a continuous flow, .*; got maf\(2\)"):
        fv.objectives.FlowMatching(fv.maf(2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs diffrax.*flowvi\[continuous\]"):
        fv.continuous(2)
