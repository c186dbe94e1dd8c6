"""Fitting posteriors from pairs of parameters and simulations."""

import dataclasses
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi.amortized import augmented, simulations
from flowvi.amortized.augmented import MOST_COLUMNS, MOST_PAIRS
from flowvi.amortized.endless import NUM_FIRST, FreshPairs, on_fresh_pairs, size_of
from flowvi.amortized.evidence import by_evidence
from flowvi.amortized.posterior import AmortizedPosterior, LogJoint, LogLikelihood
from flowvi.amortized.prior import Prior, as_prior, layout_of
from flowvi.amortized.range import range_of
from flowvi.amortized.simulations import NUM_SIMULATIONS, Pairs, Simulator
from flowvi.checks import require
from flowvi.densities import textbook
from flowvi.densities.data import Split, num_held_out, shuffled
from flowvi.densities.textbook import Rows, Setting
from flowvi.densities.training import Training, fresh
from flowvi.families import Family, Standardized, check_key, conditional, iaf, maf, standardized
from flowvi.layouts import Layout, Theta
from flowvi.networks import MLP, Network, as_network
from flowvi.networks.sets import SetEncoder
from flowvi.params import Array, Fixed, Origin, PyTree, Shape
from flowvi.supports import Interval
from flowvi.training import FitResult, TrainingOptions, check_names

#: Features that an embedding makes of x, and widths of the networks.
FEATURES, WIDTHS, NUM_LAYERS = 32, (64, 64), 5

#: Validations without a new best that end training; there are 50 over the length of a fit.
PATIENCE = 20


def fit_amortized(
    prior: object,
    simulator: Simulator | None = None,
    *,
    key: Array,
    pairs: tuple[Theta, ArrayLike] | None = None,
    x: ArrayLike | None = None,
    num_simulations: int | None = NUM_SIMULATIONS,
    num_processes: int | None = None,
    log_likelihood: LogLikelihood | None = None,
    family: Family | None = None,
    embedding: PyTree = None,
    validation_fraction: float = 0.1,
    patience: int | None = PATIENCE,
    augment: bool | None = None,
    **options: Unpack[TrainingOptions],
) -> AmortizedPosterior:
    """Fits q(theta | x), the posterior of any observation, to pairs from a simulator.

    Maximum likelihood of pairs (theta_i, x_i) of the joint distribution p(theta) p(x | theta),

        -1/n sum_i log q(theta_i | x_i),

    is least at q = p(theta | x): no likelihood is evaluated. Parameters are mapped from their
    support to the real numbers, so that no draw lies outside of it, and both parameters and
    observations are standardised. A tenth of the pairs is held out; the result holds the parameters
    that score best on it, and training ends early when that stops improving.

    Args:
        prior: a distribution of numpyro's, Distrax's or TFP's; a dict of them by the names of
            parameters; or an `fv.Prior(sample, support)`. Their batch counts as part of an event.
        simulator: (key, theta) -> x of JAX, for one theta, which is vectorised and compiled; with
            `num_processes` a Python function (numpy generator, theta) -> x. x is one array, always
            of the same shape.
        key: a random key.
        pairs: (theta, x), with a leading axis of rows, in the place of a simulator; theta drawn
            from the prior.
        x: observations of shape [n, *x_shape] without parameters, in the place of a simulator,
            where `log_likelihood` is given: q is then trained by the evidence lower bound,
            1/n sum_i E_q [log p(theta) p(x_i | theta) - log q(theta | x_i)], over 5,000 steps.
        num_simulations: pairs to simulate; None for fresh ones in each step, which are not stored,
            by a simulator of JAX: over 20,000 steps.
        num_processes: processes that call a Python simulator; 1 is this one. More need a simulator
            and parameters that can be pickled.
        log_likelihood: (theta, x) -> log p(x | theta) of one observation, a scalar of JAX, where
            it is known: draws then have importance weights.
        family: a family of the unconstrained vector with a context, such as
            `fv.coupling(5, context_size=32)`; by default an autoregressive flow, or a normal whose
            mean is linear in x, a vector, where held-out pairs do not plainly prefer the flow.
        embedding: a network from x to the context of the family, trained along: any that
            `fv.conditional` takes. By default a dense one, of an x that is a vector. For a set see
            `flowvi.networks.SetEncoder`, for a series `SeriesEncoder`, for images `ConvEncoder`.
        validation_fraction: the part of the pairs to hold out.
        patience: end training when so many validations in a row brought no new best; None for
            never. There are 50 over the length of a fit.
        augment: whether a flow of x given theta is fitted too, and q trained on with 300,000 more
            pairs that it makes; of both q the one that scores better on held-out pairs is taken.
            By default for vectors x of up to 40 columns, and up to 100,000 pairs, unless
            `num_steps` is given.
        **options: see `TrainingOptions`; the defaults are those of `fit_density`.

    Returns:
        An `AmortizedPosterior`. Its losses are in nats, of the unconstrained vector.

    Raises:
        TypeError: if the prior has no sampler, or an argument is of the wrong kind.
        ValueError: if x changes its shape or is never finite, theta lies outside of its support,
            there are too few pairs, or sizes do not go together.
        TrainingDiverged: as in `fit`.

    Warns:
        RuntimeWarning: where simulations were left out because they are not finite, or pairs are
            few.

    Source: Papamakarios, Murray, "Fast epsilon-free Inference of Simulation Models with Bayesian
    Conditional Density Estimation", 2016; Greenberg, Nonnenmacher, Macke, "Automatic Posterior
    Transformation for Likelihood-Free Inference", 2019.

    Example:
        >>> import distrax, jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> prior = distrax.Uniform(jnp.zeros(1), jnp.ones(1))
        >>> def simulator(key, theta):
        ...     return theta + 0.1 * jax.random.normal(key, (1,))
        >>> posterior = fv.fit_amortized(
        ...     prior,
        ...     simulator,
        ...     key=jax.random.key(0),
        ...     num_simulations=1000,
        ...     num_steps=100,
        ...     progress=False,
        ... )
        >>> posterior.sample([0.5], jax.random.key(1), 200).shape
        (200, 1)
    """
    check_key(key)
    check_names(options)
    own = as_prior(prior)
    look_key, data_key, split_key, fit_key, range_key, more_key = jax.random.split(key, 6)
    layout, single = layout_of(own, look_key)
    if x is not None:
        rule = "`x` must come with `log_likelihood`, and without `simulator` or `pairs`"
        if log_likelihood is None or simulator is not None or pairs is not None:
            raise ValueError(f"{rule}; got something else.")
        joint = LogJoint(layout, single, own, log_likelihood)
        return _by_evidence(joint, x, family, embedding, data_key, fit_key, dict(options))
    if simulator is not None and num_simulations is None:
        rule = "`num_simulations` must be a number for a simulator of Python"
        require(num_processes is None, rule, None)
    number = NUM_FIRST if num_simulations is None else num_simulations
    pair = simulations.pairs_of(own, simulator, pairs, data_key, number, num_processes)
    data = simulations.cleaned(layout, *pair)
    whole = family_of(layout.event_size, data.x.shape[1:], family, embedding)
    held = num_held_out(validation_fraction, len(data))
    rows = shuffled(split_key, len(data))
    split = Split(data.u, data.x, rows[:held])
    params = placed(whole, split, fit_key)
    if simulator is not None and num_simulations is None:
        loss = FreshPairs(whole, own, layout, simulator, size_of(dict(options)))
        result = on_fresh_pairs(loss, params, data, fit_key, patience, dict(options))
    else:
        training = Training(patience, dict(options))
        result = training.of_part(0, True).run(whole, params, split, fit_key)
        if augment is None:
            augment = (
                data.x.ndim == 2
                and data.x.shape[1] <= MOST_COLUMNS
                and len(data) <= MOST_PAIRS
                and held > 0
                and options.get("num_steps") is None
            )
        if augment:
            result = _augmented(own, layout, data, rows[:held], whole, result, training, more_key)
    if family is None and embedding is None and held > 1:
        whole, result = _simplest(whole, result, data, rows, held)
    return AmortizedPosterior(
        result=result,
        family=whole,
        layout=layout,
        single=single,
        num_pairs=len(data),
        num_dropped=data.num_dropped,
        range=range_of(data.x.reshape(len(data), -1), range_key),
        prior=own,
        log_likelihood=log_likelihood,
    )


def _by_evidence(
    joint: LogJoint,
    x: ArrayLike,
    family: Family | None,
    embedding: PyTree,
    data_key: Array,
    fit_key: Array,
    options: dict[str, Any],
) -> AmortizedPosterior:
    """By the evidence lower bound of observations without parameters."""
    rows = np.asarray(x)
    simulations.check_observations(rows, rows.shape[1:])
    rule = "`prior` must have a `log_prob` to train by the evidence lower bound"
    require(joint.prior.log_prob is not None, rule, None)
    size = joint.layout.event_size
    if family is None:
        family = iaf(size, context_size=FEATURES, hidden_sizes=WIDTHS, transformer="scaled")
    whole = family_of(size, rows.shape[1:], family, embedding)
    theta = jax.device_get(joint.prior.sample(data_key, len(rows)))
    split = Split(simulations.unconstrained(joint.layout, theta), rows, np.arange(0))
    params = placed(whole, split, fit_key)
    result = by_evidence(whole, params, joint, rows, fit_key, options)
    return AmortizedPosterior(
        result=result,
        family=whole,
        layout=joint.layout,
        single=joint.single,
        num_pairs=len(rows),
        range=range_of(rows.reshape(len(rows), -1), data_key),
        prior=joint.prior,
        log_likelihood=joint.log_likelihood,
    )


def _augmented(
    prior: Prior,
    layout: Layout,
    data: Pairs,
    held: np.ndarray,
    family: Standardized,
    first: FitResult,
    training: Training,
    key: Array,
) -> FitResult:
    """The better one of a result and of one from there on, by pairs of a learned likelihood."""
    like_key, made_key, fit_key = jax.random.split(key, 3)
    theta = simulations.constrained(layout, data.u, False)
    context = simulations.vector(layout, theta)
    likelihood = augmented.learned(data.x, context, held, training.of_part(1, True), like_key)
    u, x = augmented.made(likelihood, prior, layout, made_key, augmented.NUM_MADE)
    split = Split(np.concatenate([data.u, u]), np.concatenate([data.x, x]), held)
    training = training.of_part(2, True)
    steps = {"num_steps": augmented.NUM_STEPS, **training.options}
    training = dataclasses.replace(training, options=steps)
    second = training.run(family, first.params, split, fit_key)
    both = [float(np.nanmin(each.history["validation"])) for each in (first, second)]
    better = first if both[0] <= both[1] else second
    return dataclasses.replace(better, seconds=first.seconds + second.seconds)


def _simplest(
    family: Standardized, result: FitResult, data: Pairs, rows: np.ndarray, held: int
) -> tuple[Standardized, FitResult]:
    """The flow, or a normal whose mean is linear in x if held-out pairs do not prefer the flow."""
    out, rest = rows[:held], rows[held:]
    own = Rows.of(data.u[rest], data.x[rest])
    normal, params = textbook.build(Setting("normal", None), own, Interval(data.u.shape[1:]), 0)
    pairs = ((family, result.params), (normal, params))
    scores = [np.asarray(f.log_prob(p, data.u[out], data.x[out]), np.float64) for f, p in pairs]
    gain = scores[0] - scores[1]
    if not isinstance(normal, Standardized) or gain.mean() > 2 * gain.std() / math.sqrt(held):
        return family, result
    return normal, dataclasses.replace(result, params={**params, "origin": Origin(normal)})


def family_of(size: int, x_shape: Shape, family: Family | None, embedding: PyTree) -> Standardized:
    """q(u | x) in units of its own: a family of vectors, behind an embedding of x."""
    if family is not None and family.event_shape != (size,):
        rule = f"`family` must be over the {size} unconstrained numbers that parameters stand for"
        require(False, rule, f"event shape {family.event_shape}", say=str)
    direct = embedding is None and family is not None and family.context_shape == x_shape
    if family is not None and direct:
        return standardized(family)
    if embedding is None:
        if len(x_shape) != 1:
            rule = "`embedding` must be given for observations that are no vectors"
            fix = "Perhaps `flowvi.networks.SetEncoder`, `SeriesEncoder` or `ConvEncoder`?"
            raise ValueError(f"{rule}; got x of shape {x_shape}. {fix}")
        features = FEATURES
        if family is not None and family.context_shape is not None:
            features = math.prod(family.context_shape)
        embedding = MLP(x_shape, WIDTHS, features)
    network: Network = as_network(embedding, getattr(embedding, "input_shape", x_shape))
    rule = f"`embedding` must take x of shape {x_shape}"
    require(network.input_shape == x_shape, rule, network.input_shape)
    if family is None:
        params = jax.eval_shape(network.init, jax.random.key(0))
        batch = jax.ShapeDtypeStruct((1, *x_shape), jnp.result_type(float))
        features = jax.eval_shape(network.apply, params, batch).shape[-1]
        family = default_flow(size, features)
    return standardized(conditional(family, network))


def default_flow(size: int, num_features: int) -> Family:
    """The flow that is fitted where no family is named."""
    options: Any = {"num_layers": NUM_LAYERS, "hidden_sizes": WIDTHS}
    return maf(size, context_size=num_features, transformer="scaled", **options)


def placed(family: Standardized, split: Split, key: Array) -> PyTree:
    """Fresh parameters in the units of pairs."""
    params = family.place(fresh(family, key), *split.whole_training())
    network = getattr(family.family, "network", None)
    if isinstance(network, SetEncoder) and "context_units" in params:
        # What is exchangeable has one unit for all its elements.
        units = params["context_units"].value
        mean = units["shift"].mean(0)
        square = (units["scale"] ** 2 + (units["shift"] - mean) ** 2).mean(0)
        shift, scale = (
            jnp.broadcast_to(each, units["shift"].shape) for each in (mean, square**0.5)
        )
        params["context_units"] = Fixed({"shift": shift, "scale": scale})
    return params
