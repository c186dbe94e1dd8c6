"""Fitting a density to data, with no settings needed."""

import math
import warnings
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.densities import diagnosis, frames, recipe
from flowvi.densities.data import (
    Split,
    check_context,
    check_weights,
    check_x,
    distinct,
    num_held_out,
    shuffled,
)
from flowvi.densities.density import Density
from flowvi.densities.diagnosis import DensityWarning
from flowvi.densities.frames import Frame
from flowvi.densities.recipe import default_flow
from flowvi.densities.table_density import TableDensity
from flowvi.densities.table_fit import fit_table
from flowvi.densities.table_frames import is_mixed
from flowvi.densities.textbook import Rows
from flowvi.densities.training import PATIENCE, Training, fresh
from flowvi.families import (
    Family,
    Flow,
    Standardized,
    check_key,
    check_params,
    standard_normal,
    standardized,
)
from flowvi.families.flows import Layers
from flowvi.families.placed import check_varies
from flowvi.params import Origin, PyTree
from flowvi.supports import Interval, SupportLike
from flowvi.tables import Table
from flowvi.training import TrainingOptions, check_names

Array = jax.Array

#: Fewer rows are warned of, and no estimates of theirs are compared.
FEW_ROWS = 20

#: Rows that are looked at for what makes a density doubtful.
LOOKED_AT = 100_000


def fit_density(
    family: Family | ArrayLike | Frame | None = None,
    x: ArrayLike | Frame | None = None,
    *,
    key: Array,
    context: ArrayLike | Frame | None = None,
    weights: ArrayLike | None = None,
    support: SupportLike = None,
    params: PyTree = None,
    validation_fraction: float = 0.1,
    patience: int | None = PATIENCE,
    combine: bool | None = None,
    **options: Unpack[TrainingOptions],
) -> Density:
    """Fits a density to data: `fit_density(x, key=key)`, or `fit_density(family, x, key=key)`.

    A family is trained by maximum likelihood: to the least -1/n sum_i log p(x_i | context_i) of
    the training rows. A random tenth of the rows, at most 20,000, is held out: the result holds the
    parameters that score best on it, and training ends early when it stops improving.

    A flow, which is also what is trained where no family is given, is fitted beside textbook
    estimates: a normal, mixtures of normals and a kernel estimate; with a context, what a normal or
    a mixture over rows and contexts says of x. All stand in whitened units of the data or under
    marginal maps with tails of their own, as in `fv.gaussianized`, and are judged on held-out rows.
    Of fewer than 1,500 rows each is held out once, in one of four parts, whatever
    `validation_fraction` above 0, and the flows of all parts are used. The result is the simplest
    estimate that is not plainly worse than the best mixture of all, or else that mixture; its
    `summary()` says which and why. So it is never much worse than the best of them. A kernel
    estimate keeps up to 10,000 of the rows among its parameters. Where no family is given, no flow
    is fitted to fewer than 100 rows, or than 15 for each column of x and context; of fewer than 20
    a normal is all that there is.

    A frame whose columns are of other kinds, or have missing values, and a frame or dict of arrays
    with an `fv.table(schema)`, is fitted as a table: a network for any column given any others, of
    which half of the training is in the natural order of the columns and half in random ones,
    beside what it begins from, a Gaussian copula, and mixtures of a few of these. The result is a
    `TableDensity`, whose log densities are those of its real columns and angles times the masses of
    all others. Without training rows enough to compare them, below 20, the copula is all there is.

    Any other family over the reals is fitted as it is, in the data's own units, as by
    `fv.standardized`: in their support, with mean and standard deviation of the training rows, and
    a floating context likewise. Data are standardised in double precision, before JAX sees them.

    Args:
        family: any family, or None for a flow that suits x. Of a conditional one the fit is
            p(x | context). May be left out.
        x: array-like of shape [num_rows, *event_shape] of finite numbers. An `np.memmap` may be
            larger than memory: its rows are read as they are needed. Or a data frame with columns
            of numbers, whose names the density then knows.
        key: a random key.
        context: array-like of shape [num_rows, *context_shape], where the family takes one.
        weights: array-like of shape [num_rows] of how much each row counts; None for equally. Only
            their ratios matter, and those of whole numbers are repeated rows: in units, training,
            textbook estimates, held-out scores. Minibatches are of rows drawn equally, with
            weighted losses; mixtures, for which scikit-learn takes no weights, are of rows that
            repeat. Beside textbook estimates, of fewer than 1,500 rows those that are equal are
            one, of their total weight.
        support: where draws may lie: None or "real"; "positive"; (low, high), of which either may
            be None or infinite; or a sequence of these, one for each column; of a frame also a
            dict, {"income": "positive"}. Short for `fv.standardized(family, support)`.
        params: parameters to start from, such as an earlier density's, which keep their units.
        validation_fraction: the part of the rows to hold out, of 20,000 at most; 0 for none.
            Without it the result holds the last parameters.
        patience: end training when so many validations in a row brought no new best; None for
            never. There are 50 over the length of a fit. Unless it is None, a flow is also given up
            when its learning curve cannot catch up with the textbook estimates.
        combine: whether to compare and combine with textbook estimates; by default for flows from
            a standard normal, if no `params` are given, some rows are held out, and there are 20
            rows or more.
        **options: see `TrainingOptions`. By default 80 epochs, but at least 1000 steps and at most
            20,000, where `num_steps=0` is for textbook estimates alone; batches of 256 rows; Adam
            with a learning rate that rises over the first steps to 0.01 and falls to zero with the
            last, and gradients clipped to norm 10; averaging with decay 0.995.

    Returns:
        A `Density`, whose losses are in nats a row, in the units of `x`; of a table a
        `TableDensity`.

    Raises:
        TypeError: if data are not floating numbers, or an argument is of the wrong kind.
        ValueError: if data have the wrong shape, hold NaN or infinity, are constant in a column or
            lie outside the support; or sizes do not go together.
        TrainingDiverged: as in `fit`, where there are no textbook estimates to fall back on.

    Warns:
        DensityWarning: where columns hold repeated numbers or pile up at a bound, a few rows carry
            the score, training and held-out rows part ways, or the flow beside textbook estimates
            diverged.

    Source: the choice among estimates is that of Wolpert, "Stacked Generalization", 1992; the flow
    that of `fv.maf`.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> x = 5.0 + jax.random.normal(jax.random.key(0), (500, 2))
        >>> family = fv.mean_field(2)
        >>> density = fv.fit_density(family, x, key=jax.random.key(1), num_steps=50, progress=False)
        >>> density.log_prob(x).shape, density.sample(jax.random.key(2), 3).shape
        ((500,), (3, 2))
    """
    if x is None and not isinstance(family, Family):
        family, x = None, family
    if x is None:
        raise TypeError("`x` must be given, the rows of data; got None.")
    if not isinstance(family, Family | None):
        raise TypeError(f"`family` must be a family, such as `fv.maf(2)`; got {family!r}.")
    check_key(key)
    check_names(options)
    if isinstance(family, Table) or (family is None and context is None and is_mixed(x)):
        others = {"context": context, "support": support, "params": params, "combine": combine}
        return _of_table(
            family,
            x,
            others,
            key=key,
            weights=weights,
            validation_fraction=validation_fraction,
            patience=patience,
            options=dict(options),
        )
    rule = "`combine` must be True, False or None"
    checks.require(isinstance(combine, bool | None), rule, combine, error=TypeError)
    x, columns = frames.read("x", x)
    if context is not None:
        context, context_columns = frames.read("context", context)
    else:
        context_columns = None
    support = frames.support_of(support, columns)
    is_default = family is None
    if family is None:
        family = default_flow(x, context)
    own = _placed_family(family, support)
    rows = check_x(family, x)
    context_rows = check_context(family, context, rows)
    counts = check_weights(weights, len(rows))
    if counts is not None and not isinstance(rows, np.memmap) and not counts.all():
        used = counts > 0
        rows, counts = rows[used], counts[used]
        context_rows = None if context_rows is None else context_rows[used]
    given = rows
    if isinstance(own.support, Interval) and not own.support.is_real:
        rows = np.asarray(own.support.moved_inside(rows))
    with frames.errors_in_names(columns):
        own.check_support(rows)
    num_held = num_held_out(validation_fraction, len(rows))
    if patience is not None:
        checks.positive_int("patience", patience)
    if len(rows) < FEW_ROWS:
        warnings.warn(
            f"`x` has {len(rows)} rows, which are too few to fit a density to and to know how good "
            "it is.",
            RuntimeWarning,
            stacklevel=2,
        )
    may = (
        _is_plain_flow(family)
        and validation_fraction > 0
        and params is None
        and combine is not False
    )
    if may and len(rows) < recipe.FEW_ROWS and not isinstance(rows, np.memmap):
        once = distinct(rows, context_rows, counts)
        rows, context_rows, counts = once or (rows, context_rows, counts)
        num_held = num_held_out(validation_fraction, len(rows))
    init_key, split_key, fit_key = jax.random.split(key, 3)
    training = Training(patience, dict(options))
    order = shuffled(split_key, len(rows))
    can = _is_plain_flow(family) and num_held > 1 and params is None and len(rows) >= FEW_ROWS
    wanted = combine
    if combine is None:
        combine = can
    if combine and not can:
        raise ValueError(
            "`combine` must be False unless `family` is a flow from a standard normal or None, "
            f"without `params`, and at least {FEW_ROWS} rows are given of which some are held out; "
            f"got {family!r} and {len(rows)} rows."
        )
    messages = []
    if isinstance(own.support, Interval) and len(own.event_shape) == 1:
        some = Split(given, None, order[:0]).some(split_key, LOOKED_AT)[0]
        with frames.errors_in_names(columns):
            check_varies(some, some.min(0) == some.max(0))
        messages = diagnosis.about_columns(some, own.support)
    fitted: dict[str, Any]
    are_too_few = is_default and wanted is not False and len(rows) < FEW_ROWS
    if are_too_few and validation_fraction and params is None and isinstance(own, Standardized):
        fitted = recipe.normal_alone(own, Rows.of(rows, context_rows, counts))
    elif combine and isinstance(own, Standardized):
        num_columns = sum(map(math.prod, (own.event_shape, own.context_shape or (0,))))
        has_flow = not is_default or recipe.is_worth_a_flow(len(rows), num_columns)
        has_flow &= options.get("num_steps") != 0
        fitted = recipe.combined(
            own, rows, context_rows, fit_key, order, num_held, training, has_flow, counts
        )
    else:
        split = Split(rows, context_rows, order[:num_held], counts)
        params = _start(own, family, params, init_key, split)
        result = training.run(own, params, split, fit_key)
        fitted = {"result": result, "family": own, "messages": (), "num_rows": split.num_rows}
    messages += fitted.pop("messages")
    messages = [frames.in_names(each, columns) for each in messages]
    if messages:
        warnings.warn(" ".join(messages), DensityWarning, stacklevel=2)
    dtype = rows.dtype if jnp.issubdtype(rows.dtype, jnp.floating) else np.dtype(np.float32)
    return Density(
        **fitted,
        dtype=dtype.name,
        messages=tuple(messages),
        columns=columns,
        context_columns=context_columns,
    )


def _of_table(
    family: Table | None, x: Any, given: dict[str, object], **options: Any
) -> TableDensity:
    """The fit of a table, which takes no arguments of other densities."""
    if unfit := [name for name, value in given.items() if value is not None]:
        rule = f"`{unfit[0]}` must be None for a table"
        fix = ""
        if unfit[0] == "support":
            fix = " Perhaps `fv.table(schema)` with `fv.tables.Real(lower=0)` for that column?"
        raise ValueError(f"{rule}; got {checks.shown(given[unfit[0]])}.{fix}")
    return fit_table(family, x, **options)


def _is_plain_flow(family: Family) -> bool:
    """Whether this is a flow of layers from a standard normal."""
    if not isinstance(family, Flow) or not isinstance(family.transform, Layers):
        return False
    if family.context_shape is not None and len(family.context_shape) != 1:
        return False
    return family.base == standard_normal(family.event_shape)


def _placed_family(family: Family, support: SupportLike) -> Family:
    """The family in units of its own, where it can have them."""
    if isinstance(family, Standardized) or not family.support.is_real:
        if support is not None:
            raise ValueError(
                f"`support` must be None for a family that has one of its own; got {support!r} for "
                f"{family!r}."
            )
        return family
    return standardized(family, support)


def _start(own: Family, family: Family, params: PyTree, key: Array, split: "Split") -> PyTree:
    """The parameters to begin with, in the units of the training rows."""
    if params is None:
        params = fresh(own, key)
    elif _origin(params) == family != own:
        inner = {name: params[name] for name in params if name != "origin"}
        params = {**fresh(own, key), "family": inner}
    else:
        check_params(own, params)
        return params  # with units of their own
    return own.place(params, *split.whole_training()) if isinstance(own, Standardized) else params


def _origin(params: PyTree) -> Family | None:
    origin = params.get("origin") if isinstance(params, dict) else None
    return origin.family if isinstance(origin, Origin) else None
