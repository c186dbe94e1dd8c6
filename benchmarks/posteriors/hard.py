"""Targets of kinds that posteriors are silently wrong about: modes, ridges, tails, cuts, scales.

Where log Z is not zero by construction it comes from enumeration or quadrature, here and now.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logsumexp
from jax.scipy.stats import multivariate_normal

from benchmarks.posteriors.targets import LOG_2PI, Case, cauchy, funnel, normal, student


def mixed(log_densities, weights):
    return logsumexp(jnp.stack(log_densities) + jnp.log(jnp.asarray(weights)), axis=0)


def two_scales(offset=0.0):
    """1/2 N(offset, 0.05^2) + 1/2 N(0, 1) in 5 coordinates."""

    def log_density(u):
        narrow = jnp.sum(normal(u, offset, 0.05))
        return mixed([narrow, jnp.sum(normal(u, 0.0, 1.0))], [0.5, 0.5])

    mean = np.full(5, offset / 2)
    sd = np.sqrt((0.05**2 + 1 + offset**2) / 2 - mean**2)
    modes = (lambda u: (np.linalg.norm(u - offset, axis=-1) < 0.35) * 1, [0.5, 0.5])
    return Case(log_density, 5, 0.0, 0.03, mean, sd, lambda u: u, modes=modes)


def rosenbrock(blocks=3, length=4, a=0.05, b=5.0):
    """The hybrid Rosenbrock density of Pagani, Wiegand, Nadarajah, 2022, in 10 coordinates."""

    def log_density(u):
        first, rest = u[0], u[1:].reshape(blocks, length - 1)
        before = jnp.concatenate([jnp.full((blocks, 1), first), rest[:, :-1]], 1)
        value = normal(first, 1.0, (2 * a) ** -0.5)
        return value + jnp.sum(normal(rest, before**2, (2 * b) ** -0.5))

    # The moments by simulation.
    rng = np.random.default_rng(0)
    first = 1 + (2 * a) ** -0.5 * rng.standard_normal((400_000, 1))
    columns = [first]
    for _ in range(blocks):
        before = first
        for _ in range(length - 1):
            before = before**2 + (2 * b) ** -0.5 * rng.standard_normal(before.shape)
            columns.append(before)
    draws = np.concatenate(columns, 1)
    size = 1 + blocks * (length - 1)
    return Case(log_density, size, 0.0, 0.03, draws.mean(0), draws.std(0), lambda u: u)


def ridge(sd=10.0):
    """x2 ~ N(0.1 x1^2, 0.05), x1 ~ N(0, sd)."""

    def log_density(u):
        return normal(u[0], 0.0, sd) + normal(u[1], 0.1 * u[0] ** 2, 0.05)

    spread = np.array([sd, math.sqrt(2 * (0.1 * sd**2) ** 2 + 0.05**2)])
    return Case(log_density, 2, 0.0, 0.03, np.array([0, 0.1 * sd**2]), spread, lambda u: u)


def student_1():
    """Two independent Cauchy variables."""
    return Case(lambda u: jnp.sum(student(u, 1.0, 0.0, 1.0)), 2, 0.0, 0.03)


def log_gamma(shape=0.1):
    """The logarithm of a Gamma(0.1) variable."""
    constant = -math.lgamma(shape)
    mean, sd = _log_gamma_moments(shape)
    return Case(
        lambda u: constant + shape * u[0] - jnp.exp(u[0]), 1, 0.0, 0.05, mean, sd, lambda u: u
    )


def _log_gamma_moments(shape):
    from scipy.special import polygamma, psi

    return np.array([psi(shape)]), np.sqrt(np.array([polygamma(1, shape)]))


def far_modes():
    """0.9 N(0, 1) + 0.1 N(c, 1), |c| = 20, in 5 coordinates."""
    center = np.full(5, 20 / math.sqrt(5))

    def log_density(u):
        return mixed([jnp.sum(normal(u, m, 1.0)) for m in (0.0, center)], [0.9, 0.1])

    modes = (lambda u: (u.sum(-1) > center.sum() / 2) * 1, [0.9, 0.1])
    sd = np.sqrt(1 + 0.09 * center**2)
    return Case(log_density, 5, 0.0, 0.1, 0.1 * center, sd, lambda u: u, modes=modes)


def label_switching():
    """A mixture of three normals with exchangeable labels: means, log sd, logits; d = 6."""
    rng = np.random.default_rng(1)
    means = np.array([-4.0, 0.0, 5.0])
    y = np.concatenate([m + rng.normal(size=40) for m in means])

    def log_density(u):
        mu, w, logits = u[:3], u[3], jnp.concatenate([u[4:], jnp.zeros(1)])
        log_weights = jax.nn.log_softmax(logits)
        each = log_weights[:, None] + normal(y[None], mu[:, None], jnp.exp(w))
        # A flat Dirichlet on the weights, whose Jacobian is their product.
        prior = jnp.sum(normal(mu, 0.0, 10.0)) + normal(w, 0.0, 1.0) + jnp.sum(log_weights)
        return jnp.sum(logsumexp(each, axis=0)) + prior + math.log(2)

    orders = np.array(list(itertools.permutations(range(3))))

    def place(u):
        order = np.argsort(u[:, :3], axis=-1)
        return (orders[None] == order[:, None]).all(-1).argmax(-1)

    return Case(log_density, 6, None, 0.1, modes=(place, [1 / 6] * 6))


def factor_signs():
    """One factor behind six variables: all loadings may change their sign; d = 12."""
    rng = np.random.default_rng(2)
    loadings = np.array([1.0, 0.8, 1.2, -0.7, 0.9, 1.1])
    y = rng.normal(size=(100, 1)) * loadings + 0.5 * rng.normal(size=(100, 6))

    def log_density(u):
        loading, w = u[:6], u[6:]
        covariance = loading[:, None] * loading + jnp.diag(jnp.exp(2 * w))
        likelihood = jnp.sum(multivariate_normal.logpdf(y, jnp.zeros(6), covariance))
        return likelihood + jnp.sum(normal(loading, 0.0, 1.0)) + jnp.sum(normal(w, 0.0, 1.0))

    return Case(log_density, 12, None, 0.1, modes=(lambda u: (u[:, 0] > 0) * 1, [0.5, 0.5]))


def spike_and_slab(size=6):
    """Regression with a prior 1/2 N(0, 0.1^2) + 1/2 N(0, 2^2) on each coefficient, collinear."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, size))
    x[:, 1] = x[:, 0] + 0.3 * rng.normal(size=60)
    y = x[:, 0] + 0.8 * x[:, 2] + rng.normal(size=60)

    def log_density(u):
        prior = mixed([normal(u, 0.0, 0.1), normal(u, 0.0, 2.0)], [[0.5], [0.5]])
        return jnp.sum(prior) + jnp.sum(normal(y, x @ u, 1.0))

    # All combinations: each is a normal.
    log_weights, means, seconds = [], [], []
    for scales in itertools.product((0.1, 2.0), repeat=size):
        prior = np.diag(np.square(scales))
        covariance = np.eye(60) + x @ prior @ x.T
        log_weights.append(
            -0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
            - 0.5 * y @ np.linalg.solve(covariance, y)
            - size * math.log(2)
        )
        posterior = np.linalg.inv(np.linalg.inv(prior) + x.T @ x)
        means.append(posterior @ x.T @ y)
        seconds.append(np.diag(posterior) + means[-1] ** 2)
    top = float(logsumexp(jnp.array(log_weights)))
    shares = np.exp(np.array(log_weights) - top)
    mean = shares @ np.array(means)
    sd = np.sqrt(shares @ np.array(seconds) - mean**2)
    return Case(log_density, size, top, 0.1, mean, sd, lambda u: u)


def sinusoid():
    """The frequency of a sinusoid in noise, from 20 points: several aliases; d = 3."""
    rng = np.random.default_rng(4)
    t = np.sort(rng.uniform(0, 6, size=20))
    y = 0.7 * np.cos(4.3 * t) + 0.4 * np.sin(4.3 * t) + 0.9 * rng.normal(size=20)

    def log_density(u):
        a, b, omega = u[0], u[1], 10 * jax.nn.sigmoid(u[2])
        jacobian = jax.nn.log_sigmoid(u[2]) + jax.nn.log_sigmoid(-u[2])  # omega uniform on (0, 10)
        fitted = a * jnp.cos(omega * t) + b * jnp.sin(omega * t)
        return (
            jnp.sum(normal(y, fitted, 0.9)) + normal(a, 0.0, 1.0) + normal(b, 0.0, 1.0) + jacobian
        )

    grid = np.linspace(0, 10, 20_001)
    grid = 0.5 * (grid[1:] + grid[:-1])
    values, means, seconds = [], [], []
    for omega in grid:
        x = np.stack([np.cos(omega * t), np.sin(omega * t)], 1)
        precision = np.eye(2) + x.T @ x / 0.81
        mean = np.linalg.solve(precision, x.T @ y / 0.81)
        values.append(
            -0.5 * 20 * math.log(2 * math.pi * 0.81)
            - 0.5 * np.linalg.slogdet(precision)[1]
            - 0.5 * (y @ y / 0.81 - mean @ precision @ mean)
        )
        means.append(mean)
        seconds.append(np.diag(np.linalg.inv(precision)) + mean**2)
    values = np.array(values)
    log_z = float(logsumexp(values)) - math.log(len(grid))
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    mean = np.append(shares @ np.array(means), shares @ grid)
    second = np.append(shares @ np.array(seconds), shares @ grid**2)

    def constrain(u):
        return jnp.stack([u[0], u[1], 10 * jax.nn.sigmoid(u[2])])

    return Case(log_density, 3, log_z, 0.1, mean, np.sqrt(second - mean**2), constrain)


def unsafe_where():
    """A normal density whose gradient is NaN where its first coordinate is negative."""

    def log_density(u):
        root = jnp.where(u[0] > 0, jnp.sqrt(u[0]) ** 4, u[0] ** 2)
        return -0.5 * (root + u[1] ** 2) - LOG_2PI

    return Case(log_density, 2, 0.0, None, np.zeros(2), np.ones(2), lambda u: u)


def box():
    """A normal density cut off at 1 in each of two coordinates, by -inf."""
    log_z = 2 * math.log(0.8413447460685429)

    def log_density(u):
        return jnp.where(jnp.all(u < 1), jnp.sum(normal(u, 0.0, 1.0)), -jnp.inf)

    return Case(log_density, 2, log_z, None)


def scales():
    """Independent normals with standard deviations from 1e-8 to 1e8."""
    sd = np.logspace(-8, 8, 17)
    return Case(lambda u: jnp.sum(normal(u, 0.0, sd)), 17, 0.0, None, np.zeros(17), sd, lambda u: u)


def hierarchy(groups=200):
    """A centred hierarchy with 200 groups of which each has one observation."""
    rng = np.random.default_rng(5)
    y = rng.normal(size=groups) * 0.5 + rng.normal(size=groups)

    def log_density(u):
        theta, mu, w = u[:groups], u[groups], u[groups + 1]
        tau = jnp.exp(w)
        prior = normal(mu, 0.0, 5.0) + cauchy(tau, 5.0) + w + jnp.sum(normal(theta, mu, tau))
        return prior + jnp.sum(normal(y, theta, 1.0))

    return Case(log_density, groups + 2, None, None)


def gmm40():
    """40 normals in two coordinates, centres uniform in [-40, 40]."""
    rng = np.random.default_rng(0)
    centers = rng.uniform(-40, 40, size=(40, 2))
    scale = math.log1p(math.e)

    def log_density(u):
        each = jnp.sum(normal(u[None], jnp.asarray(centers), scale), -1)
        return logsumexp(each) - math.log(40)

    modes = (
        lambda u: np.argmin(((u[:, None] - centers[None]) ** 2).sum(-1), -1),
        [1 / 40] * 40,
    )
    sd = np.sqrt(centers.var(0) + scale**2)
    return Case(log_density, 2, 0.0, 0.05, centers.mean(0), sd, lambda u: u, modes=modes)


def sir():
    """An epidemic with a negative binomial likelihood: rates and overdispersion; d = 4."""
    days = 40
    rng = np.random.default_rng(6)

    def incidence(beta, gamma_, start):
        def step(state, _):
            s, i = state
            new = jnp.minimum(beta * s * i / 1000.0, 0.99 * s)
            return (s - new, i + new - gamma_ * i), new

        _, new = jax.lax.scan(step, (1000.0 - start, start), None, length=days)
        return new

    truth = np.asarray(incidence(0.5, 0.2, 3.0))
    y = rng.negative_binomial(5, 5 / (5 + truth)).astype(float)

    def log_density(u):
        beta, gamma_, start, phi = jnp.exp(u)
        mu = incidence(beta, gamma_, start) + 1e-6
        terms = gammaln(y + phi) - gammaln(phi) - gammaln(y + 1)
        terms += phi * jnp.log(phi / (phi + mu)) + y * jnp.log(mu / (phi + mu))
        prior = normal(u[0], -1.0, 0.5) + normal(u[1], -1.5, 0.5)
        return jnp.sum(terms) + prior + normal(u[2], 1.0, 0.5) + normal(u[3], 1.5, 1.0)

    return Case(log_density, 4, None, None)


HARD = {
    "two_scales": two_scales,
    "two_scales_off": lambda: two_scales(0.5),
    "rosenbrock": rosenbrock,
    "ridge": ridge,
    "ridge_5": lambda: ridge(5.0),
    "student_1": student_1,
    "funnel_50": lambda: funnel(50),
    "log_gamma": log_gamma,
    "far_modes": far_modes,
    "label_switching": label_switching,
    "factor_signs": factor_signs,
    "spike_and_slab": spike_and_slab,
    "sinusoid": sinusoid,
    "gmm40": gmm40,
    "unsafe_where": unsafe_where,
    "box": box,
    "scales": scales,
    "hierarchy": hierarchy,
    "sir": sir,
}
