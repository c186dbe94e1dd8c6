"""Tables whose density is known: what a fit is held against."""

import numpy as np
from scipy import special, stats

Array = np.ndarray
Columns = dict[str, Array]

A = np.array([0.5, 0.3, 0.2])
B = np.array([[0.6, 0.2, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
CENTER, SPREAD = np.array([0.5, 2.5, 4.5]), np.array([2.0, 6.0, 1.0])
LOC = np.array([-1.5, 0.0, 1.0, 2.0])
LEVELS_A, LEVELS_B = np.array(["low", "mid", "top"], object), np.array(["n", "e", "s", "w"], object)


def mixed(generator: np.random.Generator, n: int) -> Columns:
    """3 reals, of which one is positive, 2 integers, 2 categories and an angle."""
    a = generator.choice(3, n, p=A)
    b = (generator.uniform(size=(n, 1)) > B[a].cumsum(1)).sum(1)
    angle = generator.vonmises(CENTER[a], SPREAD[a]) % (2 * np.pi)
    x = LOC[b] + np.where(a == 0, 0.5, 1.0) * generator.normal(size=n)
    y = 0.5 * x + 1.5 * np.sin(angle) + (0.3 + 0.2 * (a == 1)) * generator.normal(size=n)
    income = np.exp(0.6 * y + 0.5 * generator.normal(size=n) + 8)
    count = generator.poisson(np.exp(0.3 * y + 0.2 * a + 1))
    score = generator.binomial(9, special.expit(x))
    return {
        "a": LEVELS_A[a],
        "b": LEVELS_B[b],
        "angle": angle,
        "x": x,
        "y": y,
        "income": income,
        "count": count,
        "score": score,
    }


def mixed_log_prob(table: Columns) -> Array:
    """The log density of rows of `mixed`, in nats."""
    a = np.searchsorted(LEVELS_A.astype(str), table["a"].astype(str))
    b = np.array([list(LEVELS_B).index(each) for each in table["b"]])
    angle, x, y = table["angle"], table["x"], table["y"]
    found = np.log(A[a]) + np.log(B[a, b]) + stats.vonmises.logpdf(angle, SPREAD[a], CENTER[a])
    found += stats.norm.logpdf(x, LOC[b], np.where(a == 0, 0.5, 1.0))
    found += stats.norm.logpdf(y, 0.5 * x + 1.5 * np.sin(angle), 0.3 + 0.2 * (a == 1))
    logs = np.log(table["income"])
    found += stats.norm.logpdf(logs, 0.6 * y + 8, 0.5) - logs
    found += stats.poisson.logpmf(table["count"], np.exp(0.3 * y + 0.2 * a + 1))
    return found + stats.binom.logpmf(table["score"], 9, special.expit(x))


def rounded(generator: np.random.Generator, n: int) -> Columns:
    """Integers 0 to 9, evenly; a skewed one; and a number rounded to halves."""
    return {
        "digit": generator.integers(0, 10, n),
        "skewed": generator.binomial(9, 0.15, n),
        "halves": np.round(2 * 3 * generator.normal(size=n)) / 2,
    }


def rounded_log_prob(table: Columns) -> Array:
    """The log mass of rows of `rounded`."""
    found = np.full(len(table["digit"]), -np.log(10.0))
    found += stats.binom.logpmf(table["skewed"], 9, 0.15)
    edge = lambda side: stats.norm.cdf(table["halves"] + side, scale=3)  # noqa: E731
    return found + np.log(edge(0.25) - edge(-0.25))


def factor(size: int = 8) -> Array:
    """The factor of a covariance of some columns."""
    return np.random.default_rng(7).normal(size=(size, size)) / np.sqrt(size) + 0.5 * np.eye(size)


def normal(generator: np.random.Generator, n: int, size: int = 8) -> Array:
    """Rows of a normal in some columns."""
    return generator.normal(size=(n, size)) @ factor(size).T


def groups(generator: np.random.Generator, n: int, size: int = 8) -> Array:
    """Rows of a mixture of three normals."""
    means = 1.5 * np.random.default_rng(8).normal(size=(3, size))
    which = generator.choice(3, n, p=[0.5, 0.3, 0.2])
    return means[which] + 0.7 * normal(generator, n, size)


def parts_of(name: str, size: int = 8) -> tuple[Array, Array, Array]:
    """(weights [K], means [K, D], covariance) of "normal" or "groups"."""
    covariance = factor(size) @ factor(size).T
    if name == "normal":
        return np.ones(1), np.zeros((1, size)), covariance
    means = 1.5 * np.random.default_rng(8).normal(size=(3, size))
    return np.array([0.5, 0.3, 0.2]), means, 0.49 * covariance


def conditional(name: str, given: list[int], values: Array) -> tuple[Array, Array, Array]:
    """(weights [n, K], means [n, K, R], covariance) of the other columns given some [n, G]."""
    weights, means, covariance = parts_of(name)
    rest = [i for i in range(len(covariance)) if i not in given]
    inner = covariance[np.ix_(given, given)]
    gain = np.linalg.solve(inner, covariance[np.ix_(given, rest)]).T
    off = values[:, None] - means[:, given]
    logs = np.log(weights) + np.stack(
        [stats.multivariate_normal.logpdf(values, m[given], inner).reshape(-1) for m in means], 1
    )
    shares = np.exp(logs - special.logsumexp(logs, 1, keepdims=True))
    return (
        shares,
        means[:, rest] + off @ gain.T,
        covariance[np.ix_(rest, rest)] - gain @ covariance[np.ix_(given, rest)],
    )


def conditional_log_prob(name: str, given: list[int], rows: Array) -> Array:
    """log p(rest | given) of rows."""
    shares, means, covariance = conditional(name, given, rows[:, given])
    rest = [i for i in range(rows.shape[1]) if i not in given]
    off = rows[:, None, rest] - means
    each = stats.multivariate_normal.logpdf(off, np.zeros(len(rest)), covariance)
    return special.logsumexp(np.log(shares) + each.reshape(len(rows), -1), axis=1)
