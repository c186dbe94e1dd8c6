"""Small models, and the linear Gaussian one, whose likelihood is known."""

import functools

import jax
import numpy as np

import flowvi as fv
from flowvi.networks import MLP

KEY = jax.random.key(0)


def binary_vae(**families):
    """Binary images of 3 x 4 and two latents."""
    return fv.VAE(
        **{
            "prior": fv.standard_normal(2),
            "likelihood": fv.conditional(fv.bernoulli((3, 4)), MLP(2, (8,), (3, 4))),
            "posterior": fv.conditional(fv.gaussian(2), MLP((3, 4), (8,), 4)),
            **families,
        }
    )


@functools.cache
def perturbed(vae, scale, seed=0):
    """Parameters of a model, moved from where they begin; numpy, so that nothing eager compiles."""
    params = jax.jit(lambda: fv.testing.perturbed(vae.init(KEY), scale, seed))()
    return jax.tree.map(np.asarray, params)


def single(params):
    """Parameters in single precision."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


def binary_rows(num_rows=20, seed=0):
    return (np.random.default_rng(seed).uniform(size=(num_rows, 3, 4)) < 0.4).astype(np.float32)


class Linear:
    """x = W z + m + s e in float64, its exact posterior, and its density.

    Source: Tipping, Bishop, "Probabilistic Principal Component Analysis", 1999.
    """

    def __init__(self, size=5, latent=2, noise=0.4, seed=0):
        rng = np.random.default_rng(seed)
        self.W, self.m, self.s = rng.normal(size=(size, latent)), rng.normal(size=size), noise
        self.size, self.latent = size, latent

    def rows(self, num_rows, seed=1):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(num_rows, self.latent))
        return z @ self.W.T + self.m + self.s * rng.normal(size=(num_rows, self.size))

    def log_prob(self, x):
        return gaussian_log_prob(x, self.m, self.W @ self.W.T + self.s**2 * np.eye(self.size))

    def vae(self):
        return fv.VAE(
            prior=fv.standard_normal(self.latent),
            likelihood=fv.conditional(
                fv.gaussian(self.size, scale=self.s), MLP(self.latent, (), self.size)
            ),
            posterior=fv.conditional(
                fv.gaussian(self.latent, scale="full"),
                MLP(self.size, (), self.latent * (self.latent + 3) // 2),
            ),
        )

    def params(self, vae):
        """The parameters at which the model is this one and the posterior exact."""
        params = vae.init(KEY)
        precision = np.eye(self.latent) + self.W.T @ self.W / self.s**2
        covariance = np.linalg.inv(precision)
        gain = covariance @ self.W.T / self.s**2
        raw = raw_factor(covariance)
        encoder = np.concatenate([gain, np.zeros((len(raw), self.size))])
        bias = np.concatenate([-gain @ self.m, raw])
        params["likelihood"]["network"] = linear(self.W, self.m)
        params["posterior"]["network"] = linear(encoder, bias)
        return params


def linear(matrix, bias):
    """Parameters of an `MLP` without hidden layers, which divides by the root of the fan-in."""
    return {"layers": ({"w": matrix.T * matrix.shape[1] ** 0.5, "b": bias},)}


def raw_factor(covariance):
    """The arguments at which a full Gaussian has this covariance."""
    root = np.linalg.cholesky(covariance)
    rows, columns = np.tril_indices(len(root))
    # The family's softplus is 1 at 0; a row is in units of its diagonal and of sqrt(D).
    diagonal = np.log(np.expm1(abs(root[rows, columns]))) - np.log(np.e - 1)
    entries = root[rows, columns] / root[rows, rows] * len(root) ** 0.5
    return np.where(rows == columns, diagonal, entries)


def gaussian_log_prob(x, mean, covariance):
    sign, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    assert sign > 0
    centred = x - mean
    return -0.5 * (log_det + np.sum(centred * np.linalg.solve(covariance, centred.T).T, -1))
