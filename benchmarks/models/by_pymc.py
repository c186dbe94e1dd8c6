"""Some of the same models in PyMC, under the same names."""

from collections.abc import Callable

import numpy as np
import pymc as pm

from benchmarks.models.by_numpyro import CASES

MODELS: dict[str, Callable[..., None]] = {}


def model_of(name: str) -> pm.Model:
    with pm.Model() as model:
        MODELS[name](*map(np.asarray, CASES[name]().args))
    return model


def model(make: Callable[..., None]) -> Callable[..., None]:
    MODELS[make.__name__] = make
    return make


@model
def eight_schools(y, sigma):
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    z = pm.Normal("z", 0, 1, shape=8)
    theta = pm.Deterministic("theta", mu + tau * z)
    pm.Normal("y", theta, sigma, observed=y)


@model
def eight_schools_centred(y, sigma):
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    theta = pm.Normal("theta", mu, tau, shape=8)
    pm.Normal("y", theta, sigma, observed=y)


@model
def dirichlet(counts):
    p = pm.Dirichlet("p", [2.0, 1.5, 1.0])
    pm.Multinomial("counts", counts.sum(-1), p, observed=counts)


@model
def horseshoe(x, y):
    tau = pm.HalfCauchy("tau", 0.5)
    lam = pm.HalfCauchy("lam", 1, shape=6)
    z = pm.Normal("z", 0, 1, shape=6)
    beta = pm.Deterministic("beta", tau * lam * z)
    noise = pm.Exponential("noise", 1)
    pm.Normal("y", x @ beta, noise, observed=y)


@model
def autoregression(y):
    a = pm.Normal("a", 0, 1)
    phi = pm.Uniform("phi", -1, 1)
    sd = pm.HalfNormal("sd", 1)
    pm.Normal("y", a + phi * y[:-1], sd, observed=y[1:])


@model
def mixture(y):
    w = pm.Dirichlet("w", [2.0, 2.0])
    # numpyro's order by transformation, with its density.
    first = pm.Normal("first", 0, 2)
    step = pm.LogNormal("step", 0, 2)
    loc = pm.Deterministic("loc", pm.math.stack([first, first + step]))
    sd = pm.HalfNormal("sd", 1, shape=2)
    pm.NormalMixture("y", w, loc, sigma=sd, observed=y)


@model
def zero_inflated(y):
    gate = pm.Beta("gate", 2, 2)
    rate = pm.Gamma("rate", 2, 1)
    pm.ZeroInflatedPoisson("y", 1 - gate, rate, observed=y)


@model
def survival(x, time, censored):
    shape = pm.Gamma("shape", 2, 1)
    a = pm.Normal("a", 0, 2)
    b = pm.Normal("b", 0, 1)
    scale = pm.math.exp(a + b * x)
    pm.Weibull("time", shape, scale[~censored], observed=time[~censored])
    pm.Potential("censored", -((time[censored] / scale[censored]) ** shape))


@model
def item_response(y):
    ability = pm.Normal("ability", 0, 1, shape=(15, 1))
    difficulty = pm.Normal("difficulty", 0, 1, shape=5)
    slope = pm.LogNormal("slope", 0, 0.5, shape=5)
    pm.Bernoulli("y", logit_p=slope * (ability - difficulty), observed=y)


@model
def logistic_regression(x, y):
    a = pm.Normal("a", 0, 3)
    b = pm.Normal("b", 0, 2, shape=3)
    pm.Bernoulli("y", logit_p=a + x @ b, observed=y)


@model
def directions(y):
    loc = pm.VonMises("loc", 0, 0.5)
    k = pm.LogNormal("k", 1, 1)
    pm.VonMises("y", loc, k, observed=y)
