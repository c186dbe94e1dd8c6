"""Tables of mixed columns, against what is known of them and against other estimates.

    python -m benchmarks.tables [mixed rounded holes given real speed] [--rows 20000] [--folds 5]
                                [--names iris,wine] [--output FOLDER]

All by default but "speed", which takes minutes. "real" needs statsmodels for all but scikit-learn's
own tables; those that are missing are left out.
"""

import argparse
import importlib
import json
import pathlib
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np
import pandas as pd
from sklearn import datasets
from sklearn.model_selection import KFold

import flowvi as fv
from benchmarks.tables import peers, problems
from flowvi.tables import Angle, Real

Array = np.ndarray

#: Rows of a real table at most.
MOST_ROWS = 2_000

SKLEARN = ("iris", "wine", "breast_cancer", "diabetes")
STATSMODELS = (
    "fair", "anes96", "modechoice", "randhie", "star98", "engel", "grunfeld", "ccard", "heart",
    "statecrime", "macrodata", "spector", "strikes", "cancer",
)  # fmt: skip


def fitted(frame: pd.DataFrame, schema: fv.tables.Schema | None = None, seed: int = 0, **options):
    """The density of a frame by `fv.fit_density` with no settings."""
    family = None if schema is None else fv.table(schema)
    options = {"key": jax.random.key(seed), "progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fv.fit_density(family, frame, **options)


def shown(label: str, value: float, error: float | None = None) -> None:
    print(f"{label:<58}{value:>10.4f}" + ("" if error is None else f" +- {error:.4f}"), flush=True)


def gap(label: str, difference: Array) -> None:
    shown(label, difference.mean(), difference.std() / np.sqrt(len(difference)))


def mixed(rows: int) -> None:
    """The joint of eight columns of all kinds: nats below the truth, and frequencies."""
    rng = np.random.default_rng(0)
    train, test = problems.mixed(rng, rows), problems.mixed(rng, 20_000)
    frame = pd.DataFrame(train)
    schema = fv.infer_schema(frame).replace(angle=Angle(), income=Real(0.0))
    density = fitted(frame, schema)
    gap("mixed: nats below the truth", problems.mixed_log_prob(test) - density.log_prob(test))
    drawn = density.sample(jax.random.key(1), 20_000)
    _frequencies(pd.DataFrame(test), drawn)


def _frequencies(test: pd.DataFrame, drawn: pd.DataFrame, bins: int = 4) -> None:
    """The largest difference of frequencies of marginals and pairs, in standard errors."""
    codes = {}
    for name in test:
        if test[name].dtype.kind in "fi":
            edges = np.unique(np.quantile(test[name], np.linspace(0, 1, bins + 1)[1:-1]))
            codes[name] = [np.searchsorted(edges, each[name], "left") for each in (test, drawn)]
        else:
            levels = sorted(set(test[name]))
            codes[name] = [
                np.searchsorted(levels, each[name].astype(str)) for each in (test, drawn)
            ]
    single, double = [], []
    for a in codes:
        for b in codes:
            if a > b:
                continue
            both = [codes[a][i] * (1 + codes[b][i].max()) + codes[b][i] for i in (0, 1)]
            size = max(each.max() for each in both) + 1
            counts = [np.bincount(each, minlength=size) for each in both]
            p, q = (count / count.sum() for count in counts)
            error = np.sqrt(((p + q) / 2) * (1 - (p + q) / 2) * (1 / len(test) + 1 / len(drawn)))
            off = np.abs(p - q) / np.maximum(error, 1e-9)
            (single if a == b else double).append(off[error > 0])
    for label, found in {"marginals": single, "pairs": double}.items():
        all_ = np.concatenate(found)
        shown(f"mixed: frequencies of {label}, most standard errors", all_.max())
        shown(f"mixed: frequencies of {label}, part beyond 3", np.mean(all_ > 3))


def rounded(rows: int) -> None:
    """Integers and rounded columns: the sum of masses, and nats below the truth."""
    rng = np.random.default_rng(0)
    train, test = problems.rounded(rng, rows), problems.rounded(rng, 20_000)
    density = fitted(pd.DataFrame(train))
    gap("rounded: nats below the truth", problems.rounded_log_prob(test) - density.log_prob(test))
    for name, grid in {
        "digit": np.arange(0, 200),
        "skewed": np.arange(0, 200),
        "halves": np.arange(-400, 401) / 2,
    }.items():
        masses = np.exp(density.marginal([name]).log_prob({name: grid}))
        shown(f"rounded: sum of masses of {name}, less 1", masses.sum() - 1)


def holes(rows: int, part: float = 0.3) -> None:
    """A normal in 8 columns with entries missing at random: what is drawn for holes."""
    rng = np.random.default_rng(0)
    whole = problems.normal(rng, rows)
    missing = rng.uniform(size=whole.shape) < part
    names = [f"x{i}" for i in range(8)]
    frame = pd.DataFrame(np.where(missing, np.nan, whole), columns=names)
    density = fitted(frame)
    test = problems.normal(rng, 20_000)
    table = pd.DataFrame(test, columns=names)
    full = fitted(
        pd.DataFrame(whole, columns=names), fv.infer_schema(pd.DataFrame(whole, columns=names))
    )
    difference = full.log_prob(table) - density.log_prob(table)
    gap("holes: nats of whole rows below the fit without holes", difference)
    few, draws = 200, 400
    gone = rng.uniform(size=(few, 8)) < part
    given = pd.DataFrame(np.where(gone, np.nan, test[:few]), columns=names)
    again = pd.concat([given] * draws, ignore_index=True)
    drawn = density.impute(again, jax.random.key(2)).to_numpy().reshape(draws, few, 8)
    means, sds = [], []
    for row in range(few):
        seen = [i for i in range(8) if not gone[row, i]]
        rest = [i for i in range(8) if gone[row, i]]
        if not seen or not rest:
            continue
        _, mean, covariance = problems.conditional("normal", seen, test[row : row + 1, seen])
        sd, own = np.sqrt(np.diag(covariance)), drawn[:, row][:, rest]
        means.append((own.mean(0) - mean[0, 0]) / sd)
        sds.append(own.std(0) / sd - 1)
    means_, sds_ = np.concatenate(means), np.concatenate(sds)
    noise = 1 / np.sqrt(draws)
    # What is left when the noise of the draws is taken off.
    off = lambda x, n: np.sqrt(max(np.mean(x**2) - n**2, 0))  # noqa: E731
    shown("holes: conditional means, root mean square off, in sd", off(means_, noise))
    shown("holes: conditional sds, root mean square off, in sd", off(sds_, noise / np.sqrt(2)))


def given(rows: int) -> None:
    """Any 3 of 8 columns given: a normal and a mixture of three, with closed forms."""
    names = [f"x{i}" for i in range(8)]
    for name, draw in {"normal": problems.normal, "groups": problems.groups}.items():
        rng = np.random.default_rng(0)
        frame = pd.DataFrame(draw(rng, rows), columns=names)
        density = fitted(frame, fv.infer_schema(frame))
        test = draw(rng, 5_000)
        worst, moments = [], []
        for trial in range(10):
            seen = sorted(rng.choice(8, 3, replace=False).tolist())
            rest = [i for i in range(8) if i not in seen]
            truth = problems.conditional_log_prob(name, seen, test)
            table = pd.DataFrame(test, columns=names)
            joint = density.log_prob(table)
            some = [names[i] for i in seen]
            del joint
            scores = _all_orders(density, table, some)
            worst.append(np.mean(truth - scores))
            values = dict(zip(some, test[trial, seen].tolist(), strict=True))
            drawn = density.given(values).sample(jax.random.key(trial), 4_000).to_numpy()
            shares, mean, covariance = problems.conditional(
                name, seen, test[trial : trial + 1, seen]
            )
            loc = shares[0] @ mean[0]
            second = np.diag(covariance) + shares[0] @ mean[0] ** 2
            sd = np.sqrt(second - loc**2)
            moments += [np.abs(drawn.mean(0) - loc) / sd, np.abs(drawn.std(0) / sd - 1)]
            del rest
        shown(f"given 3 of 8, {name}: nats below the closed form, mean", np.mean(worst))
        shown(f"given 3 of 8, {name}: nats below the closed form, worst", np.max(worst))
        shown(f"given 3 of 8, {name}: moments, mean off in sd", np.mean(moments))
        shown(f"given 3 of 8, {name}: moments, worst off in sd", np.max(moments))


def _all_orders(density: fv.TableDensity, table: pd.DataFrame, names: list[str]) -> Array:
    """log p(rest | some columns) of rows, each at its own values, as `given` orders the columns."""
    first = table.iloc[0][names].to_dict()
    conditional = density.given(first)
    rows = density._encoded(table)
    return conditional._log_prob(rows)


def load(name: str) -> pd.DataFrame:
    """A table of scikit-learn's or of statsmodels', with its target as a column."""
    if name in SKLEARN:
        bunch = getattr(datasets, f"load_{name}")(as_frame=True)
        frame = bunch.frame.copy()
        if len(getattr(bunch, "target_names", [])):
            frame["target"] = np.array(bunch.target_names, object)[bunch.target]
    else:
        module = importlib.import_module(f"statsmodels.datasets.{name}")
        frame = module.load_pandas().data.dropna()
    if len(frame) > MOST_ROWS:
        frame = frame.sample(MOST_ROWS, random_state=0)
    return frame.reset_index(drop=True)


def real(folds: int, names: list[str]) -> list[dict]:
    """Held-out scores of real tables by folds, beside a mixture of normals and a copula."""
    results = []
    for name in names:
        try:
            frame = load(name)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        schema = fv.infer_schema(frame)
        # A mixture of normals knows no atoms.
        plain = {
            n: Real(k.lower, k.upper) for n, k in zip(schema.names, schema.kinds, strict=True)
            if isinstance(k, Real)
        }  # fmt: skip
        schema = schema.replace(**plain)
        scores: dict[str, list[Array]] = {"flowvi": [], "mixture": [], "copula": []}
        started = time.perf_counter()
        splits = list(KFold(5, shuffle=True, random_state=0).split(frame))[:folds]
        for rows, rest in splits:
            train, test = (frame.iloc[each].reset_index(drop=True) for each in (rows, rest))
            density = fitted(train, schema)
            scores["flowvi"].append(density.log_prob(test))
            pairs = list(zip(schema.names, schema.kinds, strict=True))
            numbers = [
                {n: kind.numbers(each[n].to_numpy(), n) for n, kind in pairs}
                for each in (train, test)
            ]
            for peer in (peers.mixture, peers.copula):
                scores[peer.__name__].append(peer(density.encoder, *numbers))
        each = {label: np.concatenate(found) for label, found in scores.items()}
        result = {"name": name, "rows": len(frame), "columns": len(schema.names), "folds": folds}
        result |= {label: float(found.mean()) for label, found in each.items()}
        for label in ("mixture", "copula"):
            ahead = each["flowvi"] - each[label]
            result[f"over_{label}"] = float(ahead.mean())
            result[f"over_{label}_error"] = float(ahead.std() / np.sqrt(len(ahead)))
        result["seconds"] = time.perf_counter() - started
        results.append(result)
        line = "  ".join(f"{label} {result[label]:9.3f}" for label in each)
        ahead = "  ".join(
            f"over {p} {result[f'over_{p}']:7.3f} +- {result[f'over_{p}_error']:.3f}"
            for p in ("mixture", "copula")
        )
        chosen = {
            s.name: round(s.weight, 2) for s in density.scores if s.weight and s.name != "all"
        }
        size = f"{len(frame)} x {len(schema.names)}"
        print(
            f"{name:<14}{size:>10}  {line}  {ahead}  {result['seconds']:.0f} s {chosen}", flush=True
        )
    return results


def speed(rows: int = 100_000, columns: int = 30) -> None:
    """Seconds to fit many rows of 30 mixed columns, to score 10^6 of them and to draw 10^5."""
    rng = np.random.default_rng(0)
    table: dict[str, Array] = {}
    base = rng.normal(size=(rows, 5)) @ rng.normal(size=(5, columns)) / 2
    base += 0.7 * rng.normal(size=base.shape)
    for i in range(columns):
        kinds: list[Callable[[Array], Array]] = [
            lambda x: x,
            lambda x: np.exp(x),
            lambda x: np.round(3 * x).astype(int),
            lambda x: np.array(["a", "b", "c", "d"], object)[np.digitize(x, [-1, 0, 1])],
            lambda x: x > 0.5,
        ]
        table[f"c{i}"] = kinds[i % 5](base[:, i])
    frame = pd.DataFrame(table)
    start = time.perf_counter()
    density = fitted(frame)
    shown(f"speed: seconds to fit {rows} rows", time.perf_counter() - start)
    start = time.perf_counter()
    density.log_prob(pd.concat([frame] * (1_000_000 // rows), ignore_index=True))
    shown("speed: seconds to score 10^6 rows", time.perf_counter() - start)
    start = time.perf_counter()
    density.sample(jax.random.key(1), 100_000)
    shown("speed: seconds to draw 10^5 rows", time.perf_counter() - start)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("mixed", "rounded", "holes", "given", "real", "speed")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of simulated tables")
    parser.add_argument("--folds", type=int, default=5, help="folds of real tables, of 5")
    parser.add_argument("--names", default=",".join([*SKLEARN, *STATSMODELS]), help="real tables")
    parser.add_argument("--output", default=None, help="a folder for the results of real tables")
    arguments = parser.parse_args()
    chosen = arguments.parts or list(parts[:-1])
    for part in (mixed, rounded, holes, given):
        if part.__name__ in chosen:
            part(arguments.rows)
    if "real" in chosen:
        results = real(arguments.folds, arguments.names.split(","))
        if arguments.output is not None:
            path = pathlib.Path(arguments.output) / "tables.json"
            path.write_text(json.dumps(results, indent=1) + "\n")
    if "speed" in chosen:
        speed()


if __name__ == "__main__":
    main()
