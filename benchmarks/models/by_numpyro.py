"""Models as one writes them in numpyro, each beside the same one as a `Target` by hand."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.experimental.ode import odeint
from jax.scipy import stats
from jax.scipy.special import betaln, gammaln, logsumexp
from numpyro.contrib.control_flow import scan

import flowvi as fv

normal = stats.norm.logpdf


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of numpyro with its arguments, and the same by hand."""

    model: Callable[..., object]
    args: tuple[Any, ...]
    parameters: Mapping[str, tuple[int | tuple[int, ...], Any]]
    log_density: Callable[[Mapping[str, Any]], Any]

    def by_hand(self) -> fv.Target:
        return fv.Target.from_named(lambda p: self.log_density(p), self.parameters)

    def by_numpyro(self) -> fv.Target:
        return fv.Target.from_numpyro(self.model, *self.args)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def half_cauchy(x, scale):
    return np.log(2) + stats.cauchy.logpdf(x, 0, scale)


def half_normal(x, scale):
    return np.log(2) + normal(x, 0, scale)


def bernoulli(y, logits):
    return y * logits - jax.nn.softplus(logits)


EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@case
def eight_schools():
    def model(y, sigma):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", len(y)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            theta = numpyro.deterministic("theta", mu + tau * z)
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def log_density(p):
        prior = normal(p["mu"], 0, 5) + half_cauchy(p["tau"], 5) + normal(p["z"]).sum()
        return prior + normal(EFFECTS, p["mu"] + p["tau"] * p["z"], ERRORS).sum()

    shapes = {"mu": ((), "real"), "tau": ((), "positive"), "z": ((8,), "real")}
    return Case(model, (EFFECTS, ERRORS), shapes, log_density)


@case
def eight_schools_centred():
    def model(y, sigma):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def log_density(p):
        prior = normal(p["mu"], 0, 5) + half_cauchy(p["tau"], 5)
        prior += normal(p["theta"], p["mu"], p["tau"]).sum()
        return prior + normal(EFFECTS, p["theta"], ERRORS).sum()

    shapes = {"mu": ((), "real"), "tau": ((), "positive"), "theta": ((8,), "real")}
    return Case(model, (EFFECTS, ERRORS), shapes, log_density)


@case
def correlated_slopes():
    """Varying intercepts and slopes, with an LKJ prior of their correlation."""
    rng = np.random.default_rng(1)
    group, x = np.repeat(np.arange(6), 8), rng.normal(size=48)
    effects = rng.multivariate_normal([1, -1], [[1, 0.5], [0.5, 0.7]], 6)
    y = effects[group, 0] + effects[group, 1] * x + 0.5 * rng.normal(size=48)

    def model(x, group, y):
        mean = numpyro.sample("mean", dist.Normal(0, 2).expand([2]).to_event(1))
        sd = numpyro.sample("sd", dist.HalfNormal(1).expand([2]).to_event(1))
        L = numpyro.sample("L", dist.LKJCholesky(2, 2.0))
        with numpyro.plate("group", 6):
            scale_tril = sd[:, None] * L
            b = numpyro.sample("b", dist.MultivariateNormal(mean, scale_tril=scale_tril))
        noise = numpyro.sample("noise", dist.HalfNormal(1))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(b[group, 0] + b[group, 1] * x, noise), obs=y)

    def log_density(p):
        prior = normal(p["mean"], 0, 2).sum() + half_normal(p["sd"], 1).sum()
        # LKJ of two: det R to the power eta - 1, whose integral is B(eta, eta) 2^(2 eta - 1).
        prior += 2 * jnp.log(p["L"][1, 1]) - (betaln(2.0, 2.0) + 3 * np.log(2))
        scale = p["sd"][:, None] * p["L"]
        z = jax.scipy.linalg.solve_triangular(scale, (p["b"] - p["mean"]).T, lower=True)
        prior += normal(z).sum() - 6 * jnp.log(jnp.diagonal(scale)).sum()
        prior += half_normal(p["noise"], 1)
        return prior + normal(y, p["b"][group, 0] + p["b"][group, 1] * x, p["noise"]).sum()

    shapes = {
        "mean": ((2,), "real"),
        "sd": ((2,), "positive"),
        "L": ((2, 2), "corr_cholesky"),
        "b": ((6, 2), "real"),
        "noise": ((), "positive"),
    }
    return Case(model, (x, group, y), shapes, log_density)


@case
def dirichlet():
    counts = np.array([[12, 3, 5], [8, 7, 1], [20, 4, 9]])

    def model(counts):
        p = numpyro.sample("p", dist.Dirichlet(jnp.array([2.0, 1.5, 1.0])))
        with numpyro.plate("survey", len(counts)):
            total = counts.sum(-1)
            numpyro.sample("counts", dist.Multinomial(total, probs=p), obs=counts)

    def log_density(p):
        alpha = np.array([2.0, 1.5, 1.0])
        prior = gammaln(alpha.sum()) - gammaln(alpha).sum() + ((alpha - 1) * jnp.log(p["p"])).sum()
        each = gammaln(counts.sum(-1) + 1.0) - gammaln(counts + 1.0).sum(-1)
        return prior + (each + (counts * jnp.log(p["p"])).sum(-1)).sum()

    return Case(model, (counts,), {"p": ((3,), "simplex")}, log_density)


@case
def ordered_logistic():
    rng = np.random.default_rng(2)
    x = rng.normal(size=60)
    y = np.digitize(x + rng.logistic(size=60), [-1.0, 0.5, 2.0])

    def model(x, y):
        beta = numpyro.sample("beta", dist.Normal(0, 2))
        ordered = dist.transforms.OrderedTransform()
        base = dist.Normal(0, 1).expand([3]).to_event(1)
        cuts = numpyro.sample("cuts", dist.TransformedDistribution(base, ordered))
        with numpyro.plate("row", len(x)):
            numpyro.sample("y", dist.OrderedLogistic(beta * x, cuts), obs=y)

    def log_density(p):
        steps = jnp.log(jnp.diff(p["cuts"]))
        prior = normal(p["beta"], 0, 2) + normal(p["cuts"][0]) + (normal(steps) - steps).sum()
        below = jax.nn.sigmoid(p["cuts"] - (p["beta"] * x)[:, None])
        ends = jnp.concatenate([jnp.zeros((60, 1)), below, jnp.ones((60, 1))], -1)
        return prior + jnp.log(jnp.diff(ends)[np.arange(60), y]).sum()

    shapes = {"beta": ((), "real"), "cuts": ((3,), "ordered_vector")}
    return Case(model, (x, y), shapes, log_density)


@case
def horseshoe():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 6))
    y = x @ np.array([2.0, 0, 0, -1.5, 0, 0]) + rng.normal(size=50)

    def model(x, y):
        tau = numpyro.sample("tau", dist.HalfCauchy(0.5))
        with numpyro.plate("column", x.shape[1]):
            lam = numpyro.sample("lam", dist.HalfCauchy(1))
            z = numpyro.sample("z", dist.Normal(0, 1))
        beta = numpyro.deterministic("beta", tau * lam * z)
        noise = numpyro.sample("noise", dist.Exponential(1))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(x @ beta, noise), obs=y)

    def log_density(p):
        prior = half_cauchy(p["tau"], 0.5) + half_cauchy(p["lam"], 1).sum() + normal(p["z"]).sum()
        beta = p["tau"] * p["lam"] * p["z"]
        return prior - p["noise"] + normal(y, x @ beta, p["noise"]).sum()

    shapes = {
        "tau": ((), "positive"),
        "lam": ((6,), "positive"),
        "z": ((6,), "real"),
        "noise": ((), "positive"),
    }
    return Case(model, (x, y), shapes, log_density)


@case
def gaussian_process():
    rng = np.random.default_rng(4)
    x = np.linspace(-1, 1, 15)
    y = np.sin(3 * x) + 0.3 * rng.normal(size=15)

    def kernel(amplitude, length, noise):
        square = ((x[:, None] - x) / length) ** 2
        return amplitude**2 * jnp.exp(-0.5 * square) + (noise**2 + 1e-6) * jnp.eye(15)

    def model(y):
        amplitude = numpyro.sample("amplitude", dist.LogNormal(0, 1))
        length = numpyro.sample("length", dist.InverseGamma(3, 2))
        noise = numpyro.sample("noise", dist.HalfNormal(1))
        covariance = kernel(amplitude, length, noise)
        numpyro.sample("y", dist.MultivariateNormal(0.0, covariance), obs=y)

    def log_density(p):
        log_amplitude = jnp.log(p["amplitude"])
        prior = normal(log_amplitude) - log_amplitude + half_normal(p["noise"], 1)
        prior += 3 * np.log(2) - gammaln(3.0) - 4 * jnp.log(p["length"]) - 2 / p["length"]
        return prior + stats.multivariate_normal.logpdf(y, jnp.zeros(15), kernel(**p))

    shapes = dict.fromkeys(("amplitude", "length", "noise"), ((), "positive"))
    return Case(model, (y,), shapes, log_density)


@case
def autoregression():
    rng = np.random.default_rng(5)
    y = [0.0]
    for _ in range(30):
        y.append(0.5 + 0.7 * y[-1] + 0.4 * rng.normal())
    y = np.array(y)

    def model(y):
        a = numpyro.sample("a", dist.Normal(0, 1))
        phi = numpyro.sample("phi", dist.Uniform(-1, 1))
        sd = numpyro.sample("sd", dist.HalfNormal(1))

        def step(last, now):
            numpyro.sample("y", dist.Normal(a + phi * last, sd), obs=now)
            return now, None

        scan(step, y[0], y[1:])

    def log_density(p):
        prior = normal(p["a"]) - np.log(2) + half_normal(p["sd"], 1)
        return prior + normal(y[1:], p["a"] + p["phi"] * y[:-1], p["sd"]).sum()

    shapes = {"a": ((), "real"), "phi": ((), (-1, 1)), "sd": ((), "positive")}
    return Case(model, (jnp.asarray(y),), shapes, log_density)


@case
def mixture():
    """Two normals, whose classes numpyro sums out."""
    rng = np.random.default_rng(6)
    y = np.concatenate([rng.normal(-2, 0.5, 20), rng.normal(1, 1, 30)])

    def model(y):
        w = numpyro.sample("w", dist.Dirichlet(jnp.ones(2) * 2))
        base = dist.Normal(0, 2).expand([2]).to_event(1)
        loc = numpyro.sample(
            "loc", dist.TransformedDistribution(base, dist.transforms.OrderedTransform())
        )
        sd = numpyro.sample("sd", dist.HalfNormal(1).expand([2]).to_event(1))
        with numpyro.plate("row", len(y)):
            k = numpyro.sample("k", dist.Categorical(w), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(loc[k], sd[k]), obs=y)

    def log_density(p):
        step = jnp.log(jnp.diff(p["loc"]))
        prior = np.log(6) + jnp.log(p["w"]).sum() + half_normal(p["sd"], 1).sum()
        prior += normal(p["loc"][0], 0, 2) + (normal(step, 0, 2) - step).sum()
        each = jnp.log(p["w"]) + normal(y[:, None], p["loc"], p["sd"])
        return prior + logsumexp(each, -1).sum()

    shapes = {
        "w": ((2,), "simplex"),
        "loc": ((2,), "ordered_vector"),
        "sd": ((2,), "positive"),
    }
    return Case(model, (y,), shapes, log_density)


@case
def ode():
    """Logistic growth."""
    rng = np.random.default_rng(7)
    t = np.linspace(0, 4, 9)
    y = 10 / (1 + 9 * np.exp(-1.5 * t)) * np.exp(0.1 * rng.normal(size=9))

    def curve(rate, capacity):
        def change(n, t, rate, capacity):
            return rate * n * (1 - n / capacity)

        return odeint(change, jnp.asarray(1.0), jnp.asarray(t), rate, capacity)

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0, 0.5))
        capacity = numpyro.sample("capacity", dist.LogNormal(2, 0.5))
        sd = numpyro.sample("sd", dist.HalfNormal(0.5))
        n = numpyro.deterministic("n", curve(rate, capacity))
        numpyro.sample("y", dist.LogNormal(jnp.log(n), sd).to_event(1), obs=y)

    def log_normal(x, mean, sd):
        return normal(jnp.log(x), mean, sd) - jnp.log(x)

    def log_density(p):
        prior = log_normal(p["rate"], 0, 0.5) + log_normal(p["capacity"], 2, 0.5)
        n = curve(p["rate"], p["capacity"])
        return prior + half_normal(p["sd"], 0.5) + log_normal(y, jnp.log(n), p["sd"]).sum()

    shapes = dict.fromkeys(("rate", "capacity", "sd"), ((), "positive"))
    return Case(model, (y,), shapes, log_density)


@case
def zero_inflated():
    rng = np.random.default_rng(8)
    y = np.where(rng.random(50) < 0.4, 0, rng.poisson(3, 50))

    def model(y):
        gate = numpyro.sample("gate", dist.Beta(2, 2))
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.ZeroInflatedPoisson(gate, rate), obs=y)

    def log_density(p):
        prior = stats.beta.logpdf(p["gate"], 2, 2) + stats.gamma.logpdf(p["rate"], 2)
        poisson = jnp.log1p(-p["gate"]) + stats.poisson.logpmf(y, p["rate"])
        return prior + jnp.where(y == 0, jnp.logaddexp(jnp.log(p["gate"]), poisson), poisson).sum()

    return Case(model, (y,), {"gate": ((), (0, 1)), "rate": ((), "positive")}, log_density)


@case
def survival():
    """Weibull times, some of which are censored, in a factor."""
    rng = np.random.default_rng(9)
    x, time = rng.normal(size=40), 3 * rng.weibull(1.5, 40)
    censored = time > 3
    time = np.minimum(time, 3.0)

    def model(x, time, censored):
        shape = numpyro.sample("shape", dist.Gamma(2, 1))
        a = numpyro.sample("a", dist.Normal(0, 2))
        b = numpyro.sample("b", dist.Normal(0, 1))
        scale = jnp.exp(a + b * x)
        with numpyro.plate("row", len(x)):
            with numpyro.handlers.mask(mask=~censored):
                numpyro.sample("time", dist.Weibull(scale, shape), obs=time)
            numpyro.factor("censored", jnp.where(censored, -((time / scale) ** shape), 0.0))

    def log_density(p):
        prior = stats.gamma.logpdf(p["shape"], 2) + normal(p["a"], 0, 2) + normal(p["b"])
        scale = jnp.exp(p["a"] + p["b"] * x)
        log_hazard = jnp.log(p["shape"] / scale) + (p["shape"] - 1) * jnp.log(time / scale)
        return prior + (jnp.where(censored, 0, log_hazard) - (time / scale) ** p["shape"]).sum()

    shapes = {"shape": ((), "positive"), "a": ((), "real"), "b": ((), "real")}
    return Case(model, (x, time, censored), shapes, log_density)


@case
def item_response():
    """Two parameters an item."""
    rng = np.random.default_rng(10)
    y = (rng.random((15, 5)) < 0.6).astype(int)

    def model(y):
        people = numpyro.plate("person", y.shape[0], dim=-2)
        items = numpyro.plate("item", y.shape[1], dim=-1)
        with people:
            ability = numpyro.sample("ability", dist.Normal(0, 1))
        with items:
            difficulty = numpyro.sample("difficulty", dist.Normal(0, 1))
            slope = numpyro.sample("slope", dist.LogNormal(0, 0.5))
        with people, items:
            logits = slope * (ability - difficulty)
            numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def log_density(p):
        log_slope = jnp.log(p["slope"])
        prior = normal(p["ability"]).sum() + normal(p["difficulty"]).sum()
        prior += (normal(log_slope, 0, 0.5) - log_slope).sum()
        return prior + bernoulli(y, p["slope"] * (p["ability"] - p["difficulty"])).sum()

    shapes = {
        "ability": ((15, 1), "real"),
        "difficulty": ((5,), "real"),
        "slope": ((5,), "positive"),
    }
    return Case(model, (y,), shapes, log_density)


@case
def capture_recapture():
    """Data augmentation: whether an animal is there is summed out."""
    rng = np.random.default_rng(11)
    seen = rng.binomial(5, 0.35, 30) * (rng.random(30) < 0.7)

    def model(seen):
        present = numpyro.sample("present", dist.Beta(1, 1))
        caught = numpyro.sample("caught", dist.Beta(2, 2))
        with numpyro.plate("animal", len(seen)):
            z = numpyro.sample("z", dist.Bernoulli(present), infer={"enumerate": "parallel"})
            numpyro.sample("seen", dist.Binomial(5, z * caught), obs=seen)

    def log_density(p):
        prior = stats.beta.logpdf(p["caught"], 2, 2)
        binomial = gammaln(6.0) - gammaln(seen + 1.0) - gammaln(6.0 - seen)
        binomial += seen * jnp.log(p["caught"]) + (5 - seen) * jnp.log1p(-p["caught"])
        there = jnp.log(p["present"]) + binomial
        return (
            prior + jnp.where(seen > 0, there, jnp.logaddexp(there, jnp.log1p(-p["present"]))).sum()
        )

    return Case(model, (seen,), {"present": ((), (0, 1)), "caught": ((), (0, 1))}, log_density)


@case
def logistic_regression():
    """Over rows, of which a plate takes a subsample."""
    rng = np.random.default_rng(12)
    x = rng.normal(size=(80, 3))
    y = (rng.random(80) < jax.nn.sigmoid(x @ np.array([1.0, -2.0, 0.5]))).astype(int)

    def model(x, y, size=10):
        a = numpyro.sample("a", dist.Normal(0, 3))
        b = numpyro.sample("b", dist.Normal(0, 2).expand([3]).to_event(1))
        with numpyro.plate("row", len(y), subsample_size=size) as rows:
            numpyro.sample("y", dist.Bernoulli(logits=a + x[rows] @ b), obs=y[rows])

    def log_density(p):
        prior = normal(p["a"], 0, 3) + normal(p["b"], 0, 2).sum()
        return prior + bernoulli(y, p["a"] + x @ p["b"]).sum()

    shapes = {"a": ((), "real"), "b": ((3,), "real")}
    return Case(model, (jnp.asarray(x), jnp.asarray(y)), shapes, log_density)


@case
def negative_binomial():
    rng = np.random.default_rng(13)
    x = rng.normal(size=40)
    y = rng.poisson(rng.gamma(2.0, np.exp(1 + 0.5 * x) / 2))

    def model(x, y):
        a = numpyro.sample("a", dist.Normal(0, 2))
        b = numpyro.sample("b", dist.StudentT(4, 0, 1))
        shape = numpyro.sample("shape", dist.Exponential(0.5))
        with numpyro.plate("row", len(y)):
            mean = jnp.exp(a + b * x)
            numpyro.sample("y", dist.NegativeBinomial2(mean, shape), obs=y)

    def log_density(p):
        prior = normal(p["a"], 0, 2) + stats.t.logpdf(p["b"], 4) + np.log(0.5) - 0.5 * p["shape"]
        mean, shape = jnp.exp(p["a"] + p["b"] * x), p["shape"]
        # JAX's `betaln`, which numpyro takes too, is right to six digits only.
        each = -betaln(shape, y + 1.0) - jnp.log(shape + y)
        each += shape * jnp.log(shape / (shape + mean)) + y * jnp.log(mean / (shape + mean))
        return prior + each.sum()

    shapes = {"a": ((), "real"), "b": ((), "real"), "shape": ((), "positive")}
    return Case(model, (x, y), shapes, log_density)


@case
def stochastic_volatility():
    rng = np.random.default_rng(14)
    y = 0.1 * rng.standard_t(5, 20) * np.exp(np.cumsum(0.2 * rng.normal(size=20)))

    def model(y):
        step = numpyro.sample("step", dist.Exponential(5))
        s = numpyro.sample("s", dist.GaussianRandomWalk(step, len(y)))
        df = numpyro.sample("df", dist.Exponential(0.1))
        numpyro.sample("y", dist.StudentT(df, 0, jnp.exp(s)).to_event(1), obs=y)

    def log_density(p):
        prior = np.log(5) - 5 * p["step"] + np.log(0.1) - 0.1 * p["df"]
        prior += normal(jnp.diff(p["s"], prepend=0), 0, p["step"]).sum()
        return prior + stats.t.logpdf(y, p["df"], 0, jnp.exp(p["s"])).sum()

    shapes = {"step": ((), "positive"), "s": ((20,), "real"), "df": ((), "positive")}
    return Case(model, (y,), shapes, log_density)


@case
def improper_priors():
    """Rates of tumours in rats, with a prior by a factor."""
    died, total = np.array([0, 1, 2, 5, 3, 7]), np.array([20, 20, 25, 24, 20, 22])

    def model(died, total):
        improper = dist.ImproperUniform(dist.constraints.positive, (), (2,))
        ab = numpyro.sample("ab", improper)
        numpyro.factor("prior", -2.5 * jnp.log(ab.sum()))
        with numpyro.plate("group", len(died)):
            rate = numpyro.sample("rate", dist.Beta(ab[0], ab[1]))
            numpyro.sample("died", dist.Binomial(total, rate), obs=died)

    def log_density(p):
        a, b = p["ab"]
        value = -2.5 * jnp.log(a + b) + 6 * (gammaln(a + b) - gammaln(a) - gammaln(b))
        value += ((a - 1) * jnp.log(p["rate"]) + (b - 1) * jnp.log1p(-p["rate"])).sum()
        choose = gammaln(total + 1.0) - gammaln(died + 1.0) - gammaln(total - died + 1.0)
        alive = (total - died) * jnp.log1p(-p["rate"])
        return value + (choose + died * jnp.log(p["rate"]) + alive).sum()

    shapes = {"ab": ((2,), "positive"), "rate": ((6,), (0, 1))}
    return Case(model, (died, total), shapes, log_density)


@case
def wishart():
    rng = np.random.default_rng(15)
    y = rng.multivariate_normal([0, 1], [[1, 0.6], [0.6, 2]], 20)

    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0, 3).expand([2]).to_event(1))
        precision = numpyro.sample("precision", dist.Wishart(4.0, 0.5 * jnp.eye(2)))
        with numpyro.plate("row", len(y)):
            each = dist.MultivariateNormal(mean, precision_matrix=precision)
            numpyro.sample("y", each, obs=y)

    def log_density(p):
        log_det = jnp.linalg.slogdet(p["precision"])[1]
        prior = normal(p["mean"], 0, 3).sum() + 0.5 * log_det - jnp.trace(p["precision"])
        prior -= 4 * np.log(2) + 2 * np.log(0.25) + jax.scipy.special.multigammaln(2.0, 2)
        away = y - p["mean"]
        square = jnp.einsum("ni,ij,nj->", away, p["precision"], away)
        return prior + 10 * log_det - 20 * np.log(2 * np.pi) - square / 2

    shapes = {"mean": ((2,), "real"), "precision": ((2, 2), "positive_definite")}
    return Case(model, (y,), shapes, log_density)


@case
def directions():
    """Angles, with a mean on the circle."""
    rng = np.random.default_rng(16)
    y = rng.vonmises(0.5, 3.0, 30)

    def model(y):
        loc = numpyro.sample("loc", dist.VonMises(0.0, 0.5))
        k = numpyro.sample("k", dist.LogNormal(1, 1))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.VonMises(loc, k), obs=y)

    def von_mises(x, loc, k):
        return k * jnp.cos(x - loc) - jnp.log(2 * np.pi * jax.scipy.special.i0e(k)) - k

    def log_density(p):
        log_k = jnp.log(p["k"])
        prior = von_mises(p["loc"], 0, 0.5) + normal(log_k, 1) - log_k
        return prior + von_mises(y, p["loc"], p["k"]).sum()

    shapes = {"loc": ((), (-np.pi, np.pi)), "k": ((), "positive")}
    return Case(model, (y,), shapes, log_density)
