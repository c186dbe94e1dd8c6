"""Targets with a known normalising constant. Those that need data files are left out without them.

Nothing here needs flowvi, so that other libraries can be run on the same targets.

A `Case` holds the log density of an unconstrained vector, log Z and what the gap may be; where
there are reference draws, also the map from the vector to the reference's parameters.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

LOG_2PI = math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    log_density: Callable[[Any], Any]
    size: int
    log_z: float | None
    bar: float | None
    mean: np.ndarray | None = None
    sd: np.ndarray | None = None
    constrain: Callable[[Any], Any] | None = None  # vector -> the reference's parameters
    draws: np.ndarray | None = None
    # (draws of the vector -> the number of the mode that each lies in, the modes' weights)
    modes: tuple[Callable[[np.ndarray], np.ndarray], list[float]] | None = None


def normal(x, mean, sd):
    return -0.5 * LOG_2PI - jnp.log(sd) - 0.5 * ((x - mean) / sd) ** 2


def cauchy(x, scale):
    return -jnp.log(jnp.pi * scale) - jnp.log1p((x / scale) ** 2)


def student(x, nu, mean, scale):
    z = (x - mean) / scale
    constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
    return constant - jnp.log(scale) - (nu + 1) / 2 * jnp.log1p(z**2 / nu)


def gamma(x, shape, rate):
    return shape * math.log(rate) - math.lgamma(shape) + (shape - 1) * jnp.log(x) - rate * x


# ------------------------------------------------------------------------------- inside the project


def funnel(size=10, scale_last=False):
    def log_density(u):
        u = u[::-1] if scale_last else u
        return normal(u[0], 0.0, 3.0) + jnp.sum(normal(u[1:], 0.0, jnp.exp(u[0] / 2)))

    return Case(log_density, size, 0.0, 0.02)


def banana():
    def log_density(u):
        return normal(u[0], 0.0, 10.0) + normal(u[1], 0.03 * (u[0] ** 2 - 100), 1.0)

    sd = np.array([10.0, math.sqrt(19.0)])
    return Case(log_density, 2, 0.0, 0.01, np.zeros(2), sd, lambda u: u)


EIGHT_Y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
EIGHT_SIGMA = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
EIGHT_LOG_Z = -32.00449


def eight_schools():
    def log_density(u):
        z, mu, w = u[:8], u[8], u[9]
        tau = jnp.exp(w)
        prior = jnp.sum(normal(z, 0.0, 1.0)) + normal(mu, 0.0, 5.0) + cauchy(tau, 5.0) + w
        return prior + jnp.sum(normal(EIGHT_Y, mu + tau * z, EIGHT_SIGMA))

    def constrain(u):
        tau = jnp.exp(u[9:])
        return jnp.concatenate([u[8] + tau * u[:8], u[8:9], tau])

    return Case(log_density, 10, EIGHT_LOG_Z, 0.01, constrain=constrain)


def eight_schools_centred():
    def log_density(u):
        theta, mu, w = u[:8], u[8], u[9]
        tau = jnp.exp(w)
        prior = jnp.sum(normal(theta, mu, tau)) + normal(mu, 0.0, 5.0) + cauchy(tau, 5.0) + w
        return prior + jnp.sum(normal(EIGHT_Y, theta, EIGHT_SIGMA))

    def constrain(u):
        return jnp.concatenate([u[:9], jnp.exp(u[9:])])

    return Case(log_density, 10, EIGHT_LOG_Z, 0.02, constrain=constrain)


def many_well(pairs=16):
    def log_density(u):
        d, v = u[0::2], u[1::2]
        return jnp.sum(0.5 * d + 6 * d**2 - d**4 - 0.5 * v**2)

    return Case(log_density, 2 * pairs, 164.69568 / 16 * pairs, None)


SEEDS = {
    "r": "10 23 23 26 17 5 53 55 32 46 10 8 10 8 23 0 3 22 15 32 3",
    "n": "39 62 81 51 39 6 74 72 51 79 13 16 30 28 45 4 12 41 30 51 7",
}


def seeds():
    r, n = (np.array(SEEDS[name].split(), float) for name in ("r", "n"))
    x1 = np.r_[np.zeros(11), np.ones(10)]
    x2 = np.r_[np.zeros(5), np.ones(6), np.zeros(5), np.ones(5)]
    x = np.stack([np.ones(21), x1, x2, x1 * x2], 1)
    binomial = float(
        sum(
            math.comb(int(a), int(b)) and math.log(math.comb(int(a), int(b)))
            for a, b in zip(n, r, strict=True)
        )
    )

    def log_density(u):
        w, a, b = u[0], u[1:5], u[5:]
        tau = jnp.exp(w)
        logits = x @ a + b
        likelihood = jnp.sum(r * logits - n * jax.nn.softplus(logits)) + binomial
        prior = gamma(tau, 0.01, 0.01) + w + jnp.sum(normal(a, 0.0, 10.0))
        return prior + jnp.sum(normal(b, 0.0, tau**-0.5)) + likelihood

    return Case(log_density, 26, -73.41, 0.06)


def correlated(size=50, spread=6.0):
    """A normal distribution whose standard deviations span many orders of magnitude."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    scales = np.logspace(-spread / 2, spread / 2, size)
    root = basis / scales
    constant = -0.5 * size * LOG_2PI - np.log(scales).sum()

    def log_density(u):
        return constant - 0.5 * jnp.sum(((u - 3.0) @ root) ** 2)

    sd = np.sqrt((basis**2) @ scales**2)
    return Case(log_density, size, 0.0, 0.01, np.full(size, 3.0), sd, lambda u: u)


def student_t(size=5, nu=5.0):
    def log_density(u):
        return jnp.sum(student(u, nu, 0.0, 1.0))

    return Case(log_density, size, 0.0, 0.05)


INSIDE = {
    "funnel": funnel,
    "funnel_last": lambda: funnel(scale_last=True),
    "banana": banana,
    "eight_schools": eight_schools,
    "eight_schools_centred": eight_schools_centred,
    "seeds": seeds,
    "many_well": many_well,
    "correlated": correlated,
    "student_t": student_t,
}


# ---------------------------------------------------------------------------- with the data folder


def reference(name, function, size, bar, constrain=None, select=None):
    """A case of `posteriordb/<name>.npz`; `function` makes the log density from its data."""

    def make(folder):
        with np.load(folder / "posteriordb" / f"{name}.npz") as file:
            data = {key[5:]: file[key] for key in file.files if key.startswith("data_")}
            arrays = {key: file[key] for key in ("draws", "ref_mean", "ref_sd")}
            log_z = float(file["logZ"])
        mean, sd = arrays["ref_mean"], arrays["ref_sd"]
        log_draws = arrays["draws"].reshape(-1, mean.shape[0]).astype(np.float64)
        to_reference = constrain(data) if constrain else lambda u: u
        return Case(function(data), size, log_z, bar, mean, sd, to_reference, log_draws)

    return make


def exp_last(_):
    return lambda u: jnp.concatenate([u[:-1], jnp.exp(u[-1:])])


def regression(x, y, prior):
    def log_density(u):
        beta, w = u[:-1], u[-1]
        sigma = jnp.exp(w)
        return jnp.sum(normal(y, x @ beta, sigma)) + prior(beta, sigma) + w

    return log_density


def sblrc(data):
    return regression(
        data["X"],
        data["y"],
        lambda b, s: jnp.sum(normal(b, 0.0, 10.0)) + normal(s, 0.0, 10.0),
    )


def ark(data):
    y, lags = data["y"], 5
    x = np.stack([np.ones(len(y) - lags)] + [y[lags - k : len(y) - k] for k in range(1, 6)], 1)
    return regression(x, y[lags:], lambda b, s: jnp.sum(normal(b, 0.0, 10.0)) + cauchy(s, 2.5))


def kidscore(data):
    hs, iq = (np.asarray(data[name], float) for name in ("mom_hs", "mom_iq"))
    x = np.stack([np.ones_like(hs), hs, iq, hs * iq], 1)
    return regression(x, np.asarray(data["kid_score"], float), lambda b, s: cauchy(s, 2.5))


def logearn(data):
    h, m = (np.asarray(data[name], float) for name in ("height", "male"))
    x = np.stack([np.ones_like(h), h, m, h * m], 1)
    return regression(x, np.log(np.asarray(data["earn"], float)), lambda b, s: 0.0)


def nes(data):
    age = data["age_discrete"]
    columns = [np.ones(len(age)), data["real_ideo"], data["race_adj"]]
    columns += [(age == k).astype(float) for k in (2, 3, 4)]
    columns += [data["educ1"], data["gender"], data["income"]]
    x = np.stack([np.asarray(c, float) for c in columns], 1)
    return regression(x, np.asarray(data["partyid7"], float), lambda b, s: 0.0)


def diamonds(data):
    x = np.asarray(data["X"], float)[:, 1:]
    y = np.asarray(data["Y"], float)
    x = x - x.mean(0)
    n, gram, xy, yy, sum_y = len(y), x.T @ x, x.T @ y, y @ y, y.sum()

    def log_density(u):
        b, intercept, w = u[:24], u[24], u[25]
        sigma = jnp.exp(w)
        # X is centred: the cross term of the intercept vanishes.
        square = yy - 2 * b @ xy + b @ gram @ b + n * intercept**2 - 2 * intercept * sum_y
        likelihood = -0.5 * n * LOG_2PI - n * w - 0.5 * square / sigma**2
        prior = jnp.sum(normal(b, 0.0, 1.0)) + student(intercept, 3, 8.0, 10.0)
        return likelihood + prior + student(sigma, 3, 0.0, 10.0) + math.log(2) + w

    return log_density


def gauss_mix(data):
    y = np.asarray(data["y"], float)

    def log_density(u):
        m, a, s1, s2, v = u
        first = jax.nn.log_sigmoid(v) + normal(y, m, jnp.exp(s1))
        second = jax.nn.log_sigmoid(-v) + normal(y, m + jnp.exp(a), jnp.exp(s2))
        prior = normal(m, 0.0, 2.0) + normal(m + jnp.exp(a), 0.0, 2.0)
        prior += normal(jnp.exp(s1), 0.0, 2.0) + normal(jnp.exp(s2), 0.0, 2.0)
        beta = 4 * jax.nn.log_sigmoid(v) + 4 * jax.nn.log_sigmoid(-v)
        beta += math.lgamma(10) - 2 * math.lgamma(5)
        jacobian = a + s1 + s2 + jax.nn.log_sigmoid(v) + jax.nn.log_sigmoid(-v)
        return jnp.sum(jnp.logaddexp(first, second)) + prior + beta + jacobian

    return log_density


def gauss_mix_constrain(_):
    def constrain(u):
        m, a, s1, s2, v = u
        return jnp.stack([m, m + jnp.exp(a), jnp.exp(s1), jnp.exp(s2), jax.nn.sigmoid(v)])

    return constrain


def kernel(x, rho, alpha):
    return alpha**2 * jnp.exp(-0.5 * (x[:, None] - x[None]) ** 2 / rho**2)


def gp_pois(data):
    x, k = np.asarray(data["x"], float), np.asarray(data["k"], float)

    def log_density(u):
        rho, alpha, z = jnp.exp(u[0]), jnp.exp(u[1]), u[2:]
        f = jnp.linalg.cholesky(kernel(x, rho, alpha) + 1e-10 * jnp.eye(len(x))) @ z
        likelihood = jnp.sum(k * f - jnp.exp(f) - gammaln(k + 1))
        prior = gamma(rho, 25.0, 4.0) + normal(alpha, 0.0, 2.0) + jnp.sum(normal(z, 0.0, 1.0))
        return likelihood + prior + u[0] + u[1]

    return log_density


def gp_pois_constrain(data):
    x = np.asarray(data["x"], float)

    def constrain(u):
        rho, alpha = jnp.exp(u[0]), jnp.exp(u[1])
        root = jnp.linalg.cholesky(kernel(x, rho, alpha) + 1e-10 * jnp.eye(len(x)))
        return jnp.concatenate([jnp.stack([rho, alpha]), root @ u[2:]])

    return constrain


def gp_regr(data):
    x, y = np.asarray(data["x"], float), np.asarray(data["y"], float)

    def log_density(u):
        rho, alpha, sigma = jnp.exp(u)
        root = jnp.linalg.cholesky(kernel(x, rho, alpha) + sigma * jnp.eye(len(x)))
        z = jax.scipy.linalg.solve_triangular(root, y, lower=True)
        likelihood = -0.5 * len(x) * LOG_2PI - jnp.sum(jnp.log(jnp.diag(root))) - 0.5 * z @ z
        prior = gamma(rho, 25.0, 4.0) + normal(alpha, 0.0, 2.0) + normal(sigma, 0.0, 1.0)
        return likelihood + prior + jnp.sum(u)

    return log_density


def arma(data):
    y = np.asarray(data["y"], float)

    def log_density(u):
        mu, phi, theta, w = u
        sigma = jnp.exp(w)

        def step(error, pair):
            now, before = pair
            error = now - (mu + phi * before + theta * error)
            return error, error

        first = y[0] - (mu + phi * mu)
        _, errors = jax.lax.scan(step, first, (y[1:], y[:-1]))
        likelihood = normal(first, 0.0, sigma) + jnp.sum(normal(errors, 0.0, sigma))
        prior = normal(mu, 0.0, 10.0) + normal(phi, 0.0, 2.0) + normal(theta, 0.0, 2.0)
        return likelihood + prior + cauchy(sigma, 2.5) + w

    return log_density


def logistic(name, bar):
    def make(folder):
        with np.load(folder / "targets" / f"{name}.npz") as file:
            x, y = np.asarray(file["X"], float), np.asarray(file["y"], float)
            variance = np.asarray(file["prior_var"], float)
            log_z = float(file["logZ"])
            draws = np.asarray(file["draws"], float)
        flat = not np.isfinite(variance).all() or (variance <= 0).any()

        def log_density(u):
            z = x @ u
            value = jnp.sum(y * z - jax.nn.softplus(z))
            return value if flat else value + jnp.sum(normal(u, 0.0, jnp.sqrt(variance)))

        draws = draws.reshape(-1, x.shape[1])
        return Case(
            log_density,
            x.shape[1],
            log_z,
            bar,
            draws.mean(0),
            draws.std(0),
            lambda u: u,
            draws,
        )

    return make


def cox(folder):
    with np.load(folder / "targets" / "lgcp_pines.npz") as file:
        counts = np.asarray(file["counts"], float).ravel()
    index = np.arange(40.0)
    grid = np.stack(np.meshgrid(index, index, indexing="ij"), -1).reshape(-1, 2)
    distance = np.sqrt(((grid[:, None] - grid[None]) ** 2).sum(-1))
    covariance = 1.91 * np.exp(-distance * 33 / 40)
    mean = math.log(126) - 1.91 / 2
    root = np.linalg.cholesky(covariance)
    inverse = np.linalg.inv(root)
    constant = -0.5 * 1600 * LOG_2PI - np.log(np.diag(root)).sum()
    del root

    def log_density(u):
        z = jnp.asarray(inverse) @ (u - mean)
        return constant - 0.5 * z @ z + jnp.sum(counts * u - jnp.exp(u) / 1600)

    return Case(log_density, 1600, 501.9, 3.1)  # the bound of the best normal distribution


OUTSIDE = {
    "sblrc": reference("sblrc", sblrc, 6, 0.01, exp_last),
    "arK": reference("arK", ark, 7, 0.01, exp_last),
    "kidscore_interaction": reference("kidscore_interaction", kidscore, 5, 0.01, exp_last),
    "logearn_interaction": reference("logearn_interaction", logearn, 5, 0.01, exp_last),
    "nes2000": reference("nes2000", nes, 10, 0.01, exp_last),
    "diamonds": reference("diamonds", diamonds, 26, 0.01, exp_last),
    "low_dim_gauss_mix": reference("low_dim_gauss_mix", gauss_mix, 5, 0.01, gauss_mix_constrain),
    "gp_pois_regr": reference("gp_pois_regr", gp_pois, 13, 0.02, gp_pois_constrain),
    "gp_regr": reference("gp_regr", gp_regr, 3, 0.01, lambda _: jnp.exp),
    "arma11": reference("arma11", arma, 4, 0.01, exp_last),
    "sonar": logistic("sonar", 0.2),
    "credit_blessing_flat": logistic("credit_blessing_flat", 0.02),
    "credit_gym": logistic("credit_gym", 0.02),
    "cox": cox,
}


def names(folder=None):
    return [*INSIDE, *(OUTSIDE if folder is not None else ())]


def load(name, folder=None):
    from benchmarks.posteriors.hard import HARD

    if name in HARD:
        return HARD[name]()
    if name in INSIDE:
        case = INSIDE[name]()
        if name.startswith("eight_schools") and folder is not None:
            # Both forms share the reference.
            path = pathlib.Path(folder) / "posteriordb" / "eight_schools.npz"
            if path.exists():
                with np.load(path) as file:
                    draws = file["draws"].reshape(-1, 10).astype(np.float64)
                    mean, sd = file["ref_mean"], file["ref_sd"]
                case = dataclasses.replace(case, mean=mean, sd=sd, draws=draws)
        return case
    return OUTSIDE[name](pathlib.Path(folder))
