"""The recipe behind a fit with no settings: a flow and textbook estimates, combined.

Everything is judged on rows that it was not made of: one part of many rows, or every part of few
rows in turn.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import stats

from flowvi.densities import data, diagnosis, textbook
from flowvi.densities.data import Split
from flowvi.densities.textbook import Rows, Setting
from flowvi.densities.training import Rival, Training, fresh, held_out_score
from flowvi.diagnostics import Estimate, mean
from flowvi.families import Family, Standardized, as_array, gaussianized, maf, marginals
from flowvi.families.family import bare
from flowvi.families.known import Stacked
from flowvi.params import PyTree
from flowvi.training import FitResult, StopReason, TrainingDiverged
from flowvi.training.progress import display

Array = jax.Array

#: With fewer rows each is held out once, in one of so many parts.
FEW_ROWS, PARTS = 1_500, 4

#: An estimate of less weight is left out; a mixture of them must gain so many standard errors.
LEAST_WEIGHT, LEAST_ERRORS = 0.01, 2.0

#: A flow that nobody named needs so many rows, and so many for each column of x and context: with
#: fewer it loses to the textbook estimates, and would take most of the time to do so.
LEAST_FLOW_ROWS, LEAST_ROWS_EACH = 100, 15

#: With more columns a flow has fewer layers, of so many units at most.
MANY_COLUMNS, MOST_WIDTH = 64, 256

#: Rows that marginal maps are taken from at most.
MAX_ROWS = 100_000

DIVERGED = (
    "The flow diverged: it was judged as it stood before, beside the textbook estimates. Perhaps a "
    "smaller learning rate?"
)


@dataclasses.dataclass(frozen=True)
class Score:
    """How one estimate describes held-out rows.

    Attributes:
        name: "normal", "mixture", "kernel", "flow", or "all" for their mixture.
        log_prob: the mean log density of a held-out row, in nats, with its standard error.
        weight: the part of it in the fitted density.
        estimate: what it is.
    """

    name: str
    log_prob: Estimate
    weight: float
    estimate: str


def default_flow(x: ArrayLike, context: ArrayLike | None) -> Family:
    """The flow for rows of data, where the user names none."""
    array = as_array("x", x)
    if array.ndim != 2 or not array.size:
        rule = "`x` must have shape [num_rows, D], where no family is given"
        fix = " Perhaps `x[:, None]`?" if array.ndim == 1 else ""
        raise ValueError(f"{rule}; got shape {array.shape}.{fix}")
    size = None
    if context is not None:
        shape = as_array("context", context).shape
        if len(shape) != 2:
            rule = "`context` must have shape [num_rows, C], where no family is given"
            raise ValueError(f"{rule}; got shape {shape}.")
        size = shape[1]
    columns = array.shape[1]
    if columns <= MANY_COLUMNS:
        return maf(columns, context_size=size, mixing="lu")
    # Marginal maps and whitening have done the most; what is left must not take hours.
    widths = (min(columns, MOST_WIDTH),) * 2
    transformer = "spline" if columns <= 2 * MANY_COLUMNS else "affine"
    return maf(
        columns, context_size=size, num_layers=3, hidden_sizes=widths, transformer=transformer
    )


def is_worth_a_flow(num_rows: int, num_columns: int) -> bool:
    """Whether rows of x and context may tell a flow more than the textbook estimates."""
    return num_rows >= max(LEAST_FLOW_ROWS, LEAST_ROWS_EACH * num_columns)


def normal_alone(own: Standardized, rows: Rows) -> dict[str, Any]:
    """The fields of a density of rows that are too few to compare anything: a normal."""
    start = time.monotonic()
    bins = None if own.support.is_real else marginals.num_bins(len(rows.x))
    family, params = textbook.build(Setting("normal", bins), rows, own.support, 0)
    stacked = Stacked((family,))
    result = FitResult.untrained(stacked.joined([params], np.zeros(1)), time.monotonic() - start)
    return {"family": stacked, "result": result, "messages": [], "num_rows": len(rows.x)}


def combined(
    own: Standardized,
    x: np.ndarray,
    context: np.ndarray | None,
    key: Array,
    order: np.ndarray,
    num_held_out: int,
    training: Training,
    has_flow: bool,
    weights: np.ndarray | None,
) -> dict[str, Any]:
    """The fields of a density: the flow and textbook estimates with weights by held-out scores."""
    start_time = time.monotonic()
    flow, support = own.family, own.support
    some_key, fit_key = jax.random.split(key)
    seed = int(jax.random.randint(some_key, (), 0, 2**31 - 1))
    few = len(x) < FEW_ROWS
    parts = np.split(order[: len(x) // PARTS * PARTS], PARTS) if few else [order[:num_held_out]]
    splits = [Split(x, context, part, weights) for part in parts]

    tried: list[dict[Setting, np.ndarray]] = []
    floors: list[np.ndarray] = []
    has_diverged = False
    sizes, is_shown = len(textbook.COMPONENTS), bool(training.options.get("progress", True))
    with display(sizes * len(splits), is_shown, "mixture") as shown:
        for split in splits:
            held_out = split.held_out()
            rows = Rows.of(*split.some(some_key, textbook.MAX_ROWS))
            new = Rows.of(*data.parts(held_out))
            done = sizes * len(tried)
            tell = lambda number, loss, done=done: shown.update(done + number, loss, None)  # noqa: E731
            tried.append(textbook.scores(rows, new, support, seed, tell))
            floors.append(floor(rows.x, new.x, rows.weights))
    counts = None if weights is None else weights[np.concatenate([s.rows_out for s in splits])]
    chosen = _best(tried, floors, counts)
    # A fresh flow is the identity: so it begins where the normal stands.
    placed = gaussianized(flow, support, num_bins=chosen["normal"][0].num_bins)

    columns = {name: each for name, (_, each) in chosen.items()}
    least = np.concatenate(floors)
    best = max(
        (np.logaddexp(each, least) for each in columns.values()),
        key=lambda scores: mean(scores, counts).value,
    )
    results: list[FitResult] = []
    flow_scores, first = [], 0
    for number, split in enumerate(splits if has_flow else []):
        start = placed.place(fresh(placed, fit_key), *split.some(fit_key, MAX_ROWS))
        end = first + len(split.rows_out)
        rival = Rival(best[first:end], least[first:end])
        try:
            result = training.of_part(number, few).run(placed, start, split, fit_key, rival)
        except TrainingDiverged as error:
            # What it was before may still be of use, and is judged as anything else.
            result, has_diverged = error.result, True
        results.append(result)
        if result.stop_reason == StopReason.HOPELESS:
            break
        held_out = split.held_out()
        scored = _scores(placed, result.params, held_out["x"], held_out.get("context"))
        flow_scores.append(scored)
        first = end
        if result.stop_reason == StopReason.INTERRUPTED:
            break
    is_hopeless = has_flow and results[-1].stop_reason == StopReason.HOPELESS
    if flow_scores and not is_hopeless:
        columns["flow"] = np.concatenate(flow_scores)
        columns = {name: each[:first] for name, each in columns.items()}
        least, counts = least[:first], None if counts is None else counts[:first]
    shares = chosen_weights({n: np.logaddexp(e, least) for n, e in columns.items()}, counts)

    # Textbook estimates are made anew of all rows; of few rows, the flows of all parts see them.
    # But a held-out row that none of them explains must not spoil what was chosen without it.
    is_strange = not few and any((columns[name] < least).any() for name in shares)
    whole = splits[0] if is_strange else Split(x, context, order[:0], weights)
    members: list[tuple[Family, PyTree, float]] = []
    for name, weight in shares.items():
        if name == "flow":
            share = weight / len(results)
            members += [(placed, bare(each.params), share) for each in results]
        else:
            # What many rows tell of a normal costs little.
            count = MAX_ROWS if name == "normal" else textbook.MAX_ROWS
            rows = Rows.of(*whole.some(some_key, count))
            members.append((*textbook.build(chosen[name][0], rows, support, seed), weight))
    family = Stacked(tuple(member for member, _, _ in members))
    log_weights = jnp.log(jnp.asarray([weight for _, _, weight in members]))
    params = family.joined([each for _, each, _ in members], log_weights)

    columns["all"] = mixed(columns, shares)
    described = {name: str(setting) for name, (setting, _) in chosen.items()}
    described |= {"flow": f"{len(results)} x {placed!r}" if few else repr(placed), "all": ""}
    scores = [
        Score(name, mean(each, counts), shares.get(name, float(name == "all")), described[name])
        for name, each in columns.items()
    ]
    if is_hopeless:
        early = f"{placed!r}, given up after {results[-1].num_steps} steps"
        scores.insert(-1, Score("flow", held_out_score(results[-1]), 0.0, early))
    seen = None
    if "flow" in shares:
        seen = _scores(placed, results[-1].params, *split.some(some_key, len(split.rows_out))[:2])
    numbers = np.concatenate([split.rows_out for split in splits])
    messages = diagnosis.about_scores(columns["all"], numbers, seen)
    if has_diverged:
        messages.append(DIVERGED)
    result = FitResult.untrained(params, time.monotonic() - start_time)
    if results:
        result = dataclasses.replace(results[-1], params=params, last_params=None)
    return {
        "family": family,
        "result": result,
        "scores": tuple(scores),
        "held_out": np.sort(columns["all"]),
        "messages": messages,
        "num_rows": len(x),
    }


def mixed(columns: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """Scores by a mixture of estimates."""
    each = [np.log(weight) + columns[name] for name, weight in weights.items()]
    return np.logaddexp.reduce(np.stack(each), axis=0)


def _double(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


def _scores(
    family: Family, params: PyTree, x: np.ndarray, context: np.ndarray | None
) -> np.ndarray:
    return _double(np.asarray(family.log_prob(bare(params), x, context)))


def floor(rows: np.ndarray, held_out: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """What a broad density of the weight of one row says of held-out ones, in nats.

    It stands beside every estimate when these are compared, so that one row which none of them
    explains does not decide.
    """
    rows = np.stack([marginals.equally_weighted(column, weights) for column in rows.T], 1)
    low, loc, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
    scale = np.where(high > low, high - low, rows.std(0))
    scale = np.where(scale > 0, scale, 1)
    each = stats.cauchy.logpdf(held_out, loc, scale)
    return each.sum(1) - np.log(len(rows))


def _best(
    tried: list[dict[Setting, np.ndarray]], floors: list[np.ndarray], counts: np.ndarray | None
) -> dict[str, tuple[Setting, np.ndarray]]:
    """Of each kind the setting that scores best on all parts, and its scores."""
    least = np.concatenate(floors)
    score = lambda found: mean(np.logaddexp(found, least), counts).value  # noqa: E731
    best: dict[str, tuple[Setting, np.ndarray]] = {}
    for kind in ("normal", "mixture", "kernel"):
        if kind == "kernel":
            # A bandwidth of its own for each part.
            for bins in {s.num_bins for s in tried[0] if s.kind == kind}:
                each = [
                    next(s for s in part if s.kind == kind and s.num_bins == bins) for part in tried
                ]
                found = np.concatenate([part[s] for part, s in zip(tried, each, strict=True)])
                setting = Setting(kind, bins, float(np.median([s.size for s in each])))
                if kind not in best or score(found) > score(best[kind][1]):
                    best[kind] = setting, found
            continue
        for setting in tried[0]:
            if setting.kind == kind and all(setting in part for part in tried):
                found = np.concatenate([part[setting] for part in tried])
                if kind not in best or score(found) > score(best[kind][1]):
                    best[kind] = setting, found
    return best


def chosen_weights(
    columns: dict[str, np.ndarray], counts: np.ndarray | None = None
) -> dict[str, float]:
    """Weights of estimates by their scores of the same rows, of which each counts so much.

    The first of them that is not plainly worse than their best mixture has it all: what a few
    held-out rows seem to gain by more is chance.
    """
    best = stacking_weights(np.stack(list(columns.values()), 1), counts)
    mixture = mixed(columns, dict(zip(columns, np.maximum(best, 1e-300), strict=True)))
    for name, each in columns.items():
        loss = mean(mixture - each, counts)
        if loss.value < LEAST_ERRORS * loss.standard_error:
            return {name: 1.0}
    kept = {n: w for n, w in zip(columns, best, strict=True) if w >= LEAST_WEIGHT}
    return {name: float(weight / sum(kept.values())) for name, weight in kept.items()}


def stacking_weights(log_probs: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Weights [M] of a mixture that score rows [n, M] best, by expectation maximisation.

    Source: Smyth, Wolpert, "Linearly Combining Density Estimators via Stacking", 1999.
    """
    weights = np.full(log_probs.shape[1], 1 / log_probs.shape[1])
    relative = np.exp(log_probs - log_probs.max(1, keepdims=True))
    for _ in range(1000):
        share = weights * relative
        weights = np.average(share / share.sum(1, keepdims=True), 0, counts)
    return weights
