"""Densities with a known entropy, conditional ones, and real tables.

A problem draws rows from a numpy generator and, where the truth is known, scores rows by it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import special, stats

Array = np.ndarray
Draw = Callable[[np.random.Generator, int], Array]
Score = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows to fit and rows to be scored on.

    Attributes:
        draw: (generator, n) -> n rows; of a conditional problem the context comes first.
        log_prob: the true log density of rows, or None.
        num_rows: rows to fit.
        num_context: columns at the front that are a context.
        num_test: rows to score.
    """

    draw: Draw
    log_prob: Score | None = None
    num_rows: int = 10_000
    num_context: int = 0
    num_test: int = 20_000


def _mixture(means: Array, scales: Array, weights: Array) -> tuple[Draw, Score]:
    """Normals with a scale each, the same in all coordinates."""

    def draw(generator: np.random.Generator, n: int) -> Array:
        which = generator.choice(len(means), n, p=weights)
        return means[which] + scales[which, None] * generator.normal(size=(n, means.shape[1]))

    def log_prob(x: Array) -> Array:
        each = stats.norm.logpdf(x[:, None], means, scales[:, None]).sum(-1)
        return special.logsumexp(each + np.log(weights), axis=1)

    return draw, log_prob


def _ring() -> tuple[Draw, Score]:
    angles = np.arange(8) * np.pi / 4
    means = 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
    return _mixture(means, np.full(8, 0.2), np.full(8, 1 / 8))


def _checkerboard() -> tuple[Draw, Score]:
    def draw(generator: np.random.Generator, n: int) -> Array:
        column = generator.integers(0, 4, n)
        row = 2 * generator.integers(0, 2, n) + column % 2
        return np.stack([column, row], 1) + generator.uniform(size=(n, 2)) - 2

    def log_prob(x: Array) -> Array:
        return np.full(len(x), -np.log(8.0))

    return draw, log_prob


def _rings(sd: float = 0.08) -> tuple[Draw, Score]:
    radii = np.array([1.0, 2.0, 3.0, 4.0])

    def draw(generator: np.random.Generator, n: int) -> Array:
        angle = generator.uniform(0, 2 * np.pi, n)
        radius = radii[generator.integers(0, 4, n)] + sd * generator.normal(size=n)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)

    def log_prob(x: Array) -> Array:
        radius = np.hypot(x[:, 0], x[:, 1])
        each = stats.norm.pdf(radius[:, None], radii, sd).mean(1)
        return np.log(each) - np.log(2 * np.pi * radius)

    return draw, log_prob


def _spirals(noise: float = 0.1) -> tuple[Draw, Score]:
    """Two arms r = angle / 2 of three half-turns, the angle being uniform."""
    grid = np.linspace(0, 3 * np.pi, 20_001)
    arm = np.stack([np.cos(grid), np.sin(grid)], 1) * grid[:, None] / 2

    def draw(generator: np.random.Generator, n: int) -> Array:
        angle = generator.uniform(0, 3 * np.pi, n)
        sign = generator.choice([-1.0, 1.0], n)
        point = np.stack([np.cos(angle), np.sin(angle)], 1) * (sign * angle / 2)[:, None]
        return point + noise * generator.normal(size=(n, 2))

    def log_prob(x: Array) -> Array:
        result = []
        for part in np.array_split(x, max(len(x) // 200, 1)):
            squares = [((part[:, None] - s * arm) ** 2).sum(-1) for s in (-1, 1)]
            each = -np.concatenate(squares, 1) / (2 * noise**2)
            result.append(special.logsumexp(each, axis=1) - np.log(2 * len(grid)))
        return np.concatenate(result) - np.log(2 * np.pi * noise**2)

    return draw, log_prob


def _independent(*columns: stats.rv_continuous) -> tuple[Draw, Score]:
    def draw(generator: np.random.Generator, n: int) -> Array:
        return np.stack([each.rvs(size=n, random_state=generator) for each in columns], 1)

    def log_prob(x: Array) -> Array:
        return sum(each.logpdf(x[:, i]) for i, each in enumerate(columns))

    return draw, log_prob


def _normal(covariance: Array) -> tuple[Draw, Score]:
    normal = stats.multivariate_normal(np.zeros(len(covariance)), covariance)

    def draw(generator: np.random.Generator, n: int) -> Array:
        return generator.multivariate_normal(np.zeros(len(covariance)), covariance, n)

    return draw, normal.logpdf


def _correlated(size: int, seed: int = 0) -> Array:
    """A covariance with correlations of all sizes."""
    factors = np.random.default_rng(seed).normal(size=(size, size))
    return factors @ factors.T / size + 0.1 * np.eye(size)


def _log_normal() -> tuple[Draw, Score]:
    covariance = 1.5**2 * np.array([[1.0, 0.5], [0.5, 1.0]])
    draw, log_prob = _normal(covariance)

    def score(x: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            y = np.log(x)
        return log_prob(y) - y.sum(1)

    return lambda generator, n: np.exp(draw(generator, n)), score


def _far() -> tuple[Draw, Score]:
    means = np.array([[0.0, 0.0], [50.0, 50.0]])
    return _mixture(means, np.ones(2), np.array([0.99, 0.01]))


def _outlier(generator: np.random.Generator, n: int) -> Array:
    x = generator.normal(size=(n, 1))
    if n == 2_000:  # the rows to fit
        x[n // 2] = 1e6
    return x


def _conditional(size_of: Callable[[Array], Array], low: float = -1.0) -> tuple[Draw, Score]:
    """x | c ~ N(0, size(c)^2), c uniform on (low, 1)."""

    def draw(generator: np.random.Generator, n: int) -> Array:
        c = generator.uniform(low, 1, n)
        return np.stack([c, size_of(c) * generator.normal(size=n)], 1)

    def log_prob(rows: Array) -> Array:
        return stats.norm.logpdf(rows[:, 1], 0, size_of(rows[:, 0]))

    return draw, log_prob


def _moons() -> tuple[Draw, Score]:
    noise, angles = 0.05, np.linspace(0, np.pi, 4001)
    first = np.stack([np.cos(angles), np.sin(angles)], 1)
    arms = [first, np.array([1.0, 0.5]) - first]

    def draw(generator: np.random.Generator, n: int) -> Array:
        angle = generator.uniform(0, np.pi, n)
        point = np.stack([np.cos(angle), np.sin(angle)], 1)
        second = generator.integers(0, 2, n)[:, None] == 1
        point = np.where(second, np.array([1.0, 0.5]) - point, point)
        return point + noise * generator.normal(size=(n, 2))

    def log_prob(x: Array) -> Array:
        result = []
        for part in np.array_split(x, max(len(x) // 500, 1)):
            squares = [((part[:, None] - arm) ** 2).sum(-1) for arm in arms]
            each = -np.concatenate(squares, 1) / (2 * noise**2)
            result.append(special.logsumexp(each, axis=1) - np.log(2 * len(angles)))
        return np.concatenate(result) - np.log(2 * np.pi * noise**2)

    return draw, log_prob


def _table(name: str) -> Problem:
    """A table of scikit-learn's, of which a fifth is scored."""
    from sklearn import datasets

    rows = getattr(datasets, f"load_{name}")().data.astype(float)
    num_rows = int(0.8 * len(rows))

    def draw(generator: np.random.Generator, n: int) -> Array:
        del n
        return rows[generator.permutation(len(rows))]

    return Problem(draw, None, num_rows, num_test=len(rows) - num_rows)


def _narrow_and_wide() -> tuple[Draw, Score]:
    means = np.zeros((2, 2))
    return _mixture(means, np.array([1.0, 1e-3]), np.array([0.5, 0.5]))


def problems() -> dict[str, Problem]:
    """All problems by name."""
    student = stats.t(1.5)
    return {
        "eight normals": Problem(*_ring()),
        "checkerboard": Problem(*_checkerboard()),
        "four rings": Problem(*_rings()),
        "two spirals": Problem(*_spirals()),
        "square": Problem(*_independent(stats.uniform(), stats.uniform())),
        "two moons": Problem(*_moons()),
        "t2 x Cauchy": Problem(*_independent(stats.t(2), stats.cauchy())),
        "correlation .9999": Problem(*_normal(np.array([[1, 0.9999], [0.9999, 1]]))),
        "log-normal pair": Problem(*_log_normal()),
        "far 1 %": Problem(*_far()),
        "narrow and wide": Problem(*_narrow_and_wide()),
        "scale exp(3 c)": Problem(*_conditional(lambda c: np.exp(3 * c)), num_context=1),
        "normal, 50 columns": Problem(*_normal(_correlated(50)), num_rows=2_000),
        "normal, 200 rows": Problem(*_normal(_correlated(10)), num_rows=200),
        "t 1.5": Problem(*_independent(student), num_rows=2_000),
        "one at 1e6": Problem(_outlier, lambda x: stats.norm.logpdf(x[:, 0]), num_rows=2_000),
        "gamma .3": Problem(*_independent(stats.gamma(0.3))),
        "exponential": Problem(*_independent(stats.expon())),
        "skewed and bimodal": Problem(
            *_independent(stats.gumbel_r(), stats.lognorm(0.5)), num_rows=1_000
        ),
        "wine": _table("wine"),
        "breast cancer": _table("breast_cancer"),
        "diabetes": _table("diabetes"),
        "iris": _table("iris"),
    }
