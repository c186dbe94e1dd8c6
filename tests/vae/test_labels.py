"""Models of a class that is known of some rows: M2, against sums over the classes by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP
from tests.training.helpers import assert_trees_equal
from tests.vae.helpers import KEY, binary_rows, binary_vae, perturbed

CLASSES = fv.categorical((), 3, one_hot=True)
X, LABELS = binary_rows(6).reshape(6, 12), np.array([0, -1, 2, -1, 1, np.nan])
KNOWN = np.array([True, False, True, False, True, False])


def labelled_vae(rest=None, prior=None, size=2):
    """Binary vectors of 12, three classes, and two latents, by default normal ones."""
    rest = rest or fv.conditional(fv.gaussian(2), MLP(12 + 3, (8,), 4))
    return fv.VAE(
        prior=fv.joint(fv.unconditional(CLASSES), prior or fv.standard_normal(2)),
        likelihood=fv.conditional(fv.bernoulli(12), MLP(3 + size, (8,), 12)),
        posterior=fv.labelled(fv.joint(fv.conditional(CLASSES, MLP(12, (8,), 3)), rest)),
        context_shape=(),
    )


def coded_vae():
    """The same with one binary latent, so that all can be summed."""
    rest = fv.conditional(fv.bernoulli(1), MLP(12 + 3, (8,), 1))
    return labelled_vae(rest, fv.unconditional(fv.bernoulli(1)), size=1)


def test_the_bound_is_the_sum_over_classes_that_are_not_known():
    vae = coded_vae()
    params = perturbed(vae, 0.5)
    z = np.array([[*np.eye(3)[k], code] for k in range(3) for code in (0, 1)], np.float32)

    @jax.jit
    def by_hand():
        joint = jax.vmap(lambda each: vae.log_joint(params, X, each))(z)
        q = vae.posterior.family.distribution(params["posterior"], X)
        log_q = jax.vmap(lambda each: q.log_prob(jnp.broadcast_to(each, (6, 4))))(z)
        log_class = jax.nn.log_softmax(q.first.logits)
        batch = {"x": X, "context": LABELS}
        losses = [
            jax.value_and_grad(lambda p, w=w: vae.loss(label_weight=w)(p, KEY, batch)[0])(params)
            for w in (0.0, 0.7)
        ]
        return joint, log_q, log_class, losses

    joint, log_q, log_class, ((plain, gradient), (supervised, _)) = jax.tree.map(
        np.asarray, by_hand()
    )
    number = np.where(KNOWN, LABELS, 0).astype(int)
    expected = np.zeros(6)
    for row in range(6):
        here = np.repeat(np.arange(3), 2) == number[row] if KNOWN[row] else np.ones(6, bool)
        # Given the class, q is what remains of it, and its log is that of the rest alone.
        log_rest = log_q[:, row] - (log_class[row][number[row]] if KNOWN[row] else 0)
        terms = np.exp(log_rest) * (joint[:, row] - log_rest)
        expected[row] = terms[here].sum()
    np.testing.assert_allclose(plain, -expected.mean(), rtol=1e-5)
    label_terms = log_class[np.arange(6), number][KNOWN]
    np.testing.assert_allclose(supervised - plain, -0.7 * label_terms.mean(), rtol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(vae.classify(params, X), log_class, rtol=1e-5)
    # log p(x) needs no label.
    total = np.log(np.exp(joint).sum(0))
    np.testing.assert_allclose(fv.log_marginal(vae, params, X), total, rtol=1e-5)


def test_draws_of_known_classes():
    vae = labelled_vae()
    params = perturbed(vae, 0.5)
    z = np.asarray(vae.encode(params, KEY, X, 500, context=LABELS))
    classes = z[..., :3]
    assert (classes[:, KNOWN] == np.eye(3)[LABELS[KNOWN].astype(int)]).all()
    shares = np.exp(vae.classify(params, X))[~KNOWN]
    np.testing.assert_allclose(classes[:, ~KNOWN].mean(0), shares, atol=4 * 0.5 / 500**0.5)
    # The rest of a draw is not shared by rows or draws, also where the prior's takes no context.
    assert np.unique(z[..., 3]).size == 3000
    drawn = np.asarray(vae.prior.sample(params["prior"], KEY, (4, 5)))
    assert drawn.shape == (4, 5, 5) and np.unique(drawn[..., 3]).size == 20
    # Bounds: of log p(x, y) where the class is known, of log p(x) where it is not.
    bound = vae.evaluate(params, KEY, X, 2000, context=LABELS).log_likelihood
    table = []
    for k in range(3):
        table.append(vae.evaluate(params, KEY, X, 2000, context=k).log_likelihood)
    table = np.asarray(table)
    found = np.where(
        KNOWN,
        table[np.where(KNOWN, LABELS, 0).astype(int), np.arange(6)],
        np.log(np.exp(table).sum(0)),
    )
    np.testing.assert_allclose(bound, found, atol=0.05)


def test_gradients_of_the_score_agree_with_the_sum():
    vae = coded_vae()
    params = {**perturbed(vae, 0.5), "control": ((),)}
    batch = {"x": X, "context": LABELS}
    score, exact = vae.loss(ob.ScoreFunction, num_samples=400), vae.loss()
    found = ob.gradient_moments(score, params, KEY, batch, num_draws=30)
    expected = jax.tree.leaves(
        jax.jit(jax.grad(lambda p: exact(p, KEY, batch)[0], allow_int=True))(params)["posterior"]
    )
    triples = zip(
        jax.tree.leaves(found.mean), jax.tree.leaves(found.variance), expected, strict=True
    )
    for mean, variance, there in triples:
        error = np.sqrt(np.asarray(variance) / 30)
        assert (abs(np.asarray(mean) - there) <= 5 * error + 1e-5).all()


def test_a_fit_with_labels(tmp_path):
    vae = labelled_vae()
    options = {"key": KEY, "num_steps": 3, "progress": False}
    fitted = fv.fit_vae(vae, X, context=LABELS, **options)
    assert fitted.classify(X).shape == (6, 3)
    fitted.save(tmp_path / "vae.flowvi")
    assert_trees_equal(fv.load(tmp_path / "vae.flowvi").classify(X), fitted.classify(X))
    assert fitted.sample(KEY, 4).shape == (4, 12)


MESSAGES = {
    "label": (
        ValueError,
        "`context` must hold labels from 0 to 2, or -1 or NaN for missing ones; got 3",
        lambda: fv.fit_vae(labelled_vae(), X, context=[0, 1, 2, 3, -1, -1], key=KEY),
    ),
    "fraction": (
        ValueError,
        "`context` must hold labels from 0 to 2, .*; got 0.5",
        lambda: labelled_vae().elbo({}, KEY, X, context=0.5),
    ),
    "no joint": (
        TypeError,
        "`family` must be a `fv.joint` with a context; got conditional",
        lambda: fv.labelled(fv.conditional(CLASSES, MLP(12, (8,), 3))),
    ),
    "no class": (
        ValueError,
        r"`family` must begin with one class: `fv.categorical\(\(\), K, one_hot=True\)`.*; got",
        lambda: fv.labelled(
            fv.joint(
                fv.conditional(fv.gaussian(2), MLP(12, (), 4)),
                fv.conditional(fv.gaussian(2), MLP(2, (), 4)),
            )
        ),
    ),
    "weight": (
        ValueError,
        "`label_weight` must be at least 0; got -1.0",
        lambda: labelled_vae().loss(label_weight=-1.0),
    ),
    "classify": (
        TypeError,
        "`posterior` must be one by `fv.labelled`; got conditional",
        lambda: binary_vae().classify({}, X),
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    error, message, call = MESSAGES[name]
    with pytest.raises(error, match=message):
        call()
