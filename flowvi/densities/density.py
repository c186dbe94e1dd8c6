"""A density that was fitted to data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks, plotting
from flowvi.densities import frames
from flowvi.densities.diagnosis import Calibration, calibration
from flowvi.densities.frames import Columns, Frame
from flowvi.densities.recipe import Score
from flowvi.diagnostics import Estimate
from flowvi.families import Family
from flowvi.training import Fitted

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

Array = jax.Array
#: A number, one for each column, or a dict by the names of columns.
Bound = ArrayLike | Mapping[str, float]


#: Draws that a calibration compares with, and numbers in them where each row has draws of its own.
LEAST_DRAWS, MAX_DRAWS, MAX_NUMBERS = 50, 4_000, 20_000_000


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Density(Fitted):
    """A density that was fitted to data: it scores, samples and draws pictures, in their units.

    Attributes:
        family: the family, in the units of the data; with `params` it is all that a jitted function
            of one's own needs, as in `family.log_prob(params, x)`.
        dtype: the type of numbers that the data had, which draws have too.
        num_rows: how many rows it was fitted to.
        scores: how the flow, textbook estimates and the whole describe held-out rows, in nats a
            row; empty where nothing was compared.
        messages: what is doubtful about the data or the fit; empty where nothing is.
        held_out: log densities of held-out rows by estimates that were not made of them, in order
            of size; empty where nothing was compared.
        columns: those of the data frame that it was fitted to; None where it was an array. Of a
            frame, draws are frames of the same library, and frames may have columns in any order.
        context_columns: those of the context.
    """

    family: Family
    dtype: str
    num_rows: int
    scores: tuple[Score, ...] = ()
    messages: tuple[str, ...] = ()
    held_out: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    columns: Columns | None = None
    context_columns: Columns | None = None

    def __repr__(self) -> str:
        return f"Density({self.family!r}, num_rows={self.num_rows}, {self.result.summary()})"

    def summary(self) -> str:
        """What was compared and chosen, and what is doubtful, in a few lines."""
        if not self.scores:
            return "\n".join(["nothing was compared", *(f"! {each}" for each in self.messages)])
        head = f"{'':<10}{'held-out nats':>15}{'error':>9}{'weight':>9}"
        rows = [
            f"{each.name:<10}{each.log_prob.value:>15.4f}{each.log_prob.standard_error:>9.4f}"
            f"{each.weight:>9.3f}  {each.estimate}".rstrip()
            for each in self.scores
        ]
        return "\n".join([head, *rows, *(f"! {message}" for message in self.messages)])

    def calibration(
        self,
        x: ArrayLike | Frame,
        context: ArrayLike | Frame | None = None,
        *,
        key: Array,
        num_draws: int | None = None,
    ) -> Calibration:
        """How the marginals of the density meet rows that it was not fitted to.

        Args:
            x: rows of shape [n, D].
            context: of shape [n, *context_shape], where the family takes one.
            key: a random key.
            num_draws: draws to compare with; of each row's own at its context. By default 4,000, or
                with contexts so many, from 50 on, that all of them are 20 million numbers at most.

        Example:
            >>> import jax, flowvi as fv
            >>> x = jax.random.normal(jax.random.key(0), (300, 1))
            >>> family = fv.mean_field(1)
            >>> key = jax.random.key(1)
            >>> density = fv.fit_density(family, x[:200], key=key, num_steps=200, progress=False)
            >>> density.calibration(x[200:], key=key).pit.shape
            (100, 1)
        """
        rows, context = self._rows(x), self._context(context)
        rows = np.asarray(rows, np.float64)
        checks.trailing_shape("x", rows, self._row_shape, repr(self.family))
        if num_draws is None:
            num_draws = MAX_DRAWS
            if context is not None:
                num_draws = int(np.clip(MAX_NUMBERS // max(rows.size, 1), LEAST_DRAWS, MAX_DRAWS))
        num_draws = checks.positive_int("num_draws", num_draws)
        draws = self._draw(key, num_draws, context)[0]
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        return calibration(rows, np.asarray(draws, np.float64), seed)

    @property
    def _row_shape(self) -> tuple[int, ...]:
        """The shape of a row of the data."""
        return self.family.event_shape

    def _rows(self, x: ArrayLike | Frame) -> ArrayLike:
        return frames.read("x", x, self.columns)[0]

    def _context(self, context: ArrayLike | Frame | None) -> ArrayLike | None:
        return None if context is None else frames.read("context", context, self.context_columns)[0]

    def _draw(
        self, key: Array, sample_shape: int | tuple[int, ...], context: ArrayLike | None
    ) -> tuple[np.ndarray, np.ndarray]:
        draws, log_prob = self.family.sample_exactly(self.params, key, sample_shape, context)
        return draws.astype(self.dtype), log_prob

    def distribution(self, context: ArrayLike | None = None) -> distrax.Distribution:
        """The Distrax distribution, with the batch shape of the context."""
        return self.family.distribution(self.params, context)

    def log_prob(self, x: ArrayLike | Frame, context: ArrayLike | Frame | None = None) -> Array:
        """Log density in nats, of shape [...] for x of shape [..., *event_shape].

        Raises:
            ValueError: if `x` or `context` has the wrong shape, or a frame other columns.
        """
        return self.family.log_prob(self.params, self._rows(x), self._context(context))

    def sample(
        self,
        key: Array,
        sample_shape: int | tuple[int, ...] = (),
        context: ArrayLike | Frame | None = None,
    ) -> Any:
        """Draws [*sample_shape, *batch, *event_shape], a numpy array of the type of the data.

        A density of a frame gives a frame with the same columns where these are two axes.
        """
        return self.sample_and_log_prob(key, sample_shape, context)[0]

    def sample_and_log_prob(
        self,
        key: Array,
        sample_shape: int | tuple[int, ...] = (),
        context: ArrayLike | Frame | None = None,
    ) -> tuple[Any, np.ndarray]:
        """Draws as `sample` gives them, and their log densities, for the price of the draws."""
        draws, log_prob = self._draw(key, sample_shape, self._context(context))
        return (draws if self.columns is None else self.columns.frame(draws)), log_prob

    def probability(
        self,
        lower: Bound,
        upper: Bound,
        context: ArrayLike | Frame | None = None,
        *,
        key: Array,
        num_draws: int = 10_000,
    ) -> Estimate:
        """The probability that lower < x <= upper in all columns, by draws.

        Args:
            lower: a number for all columns, an array of the event's shape, or a dict by the names
                of some columns of a frame, while the others may be anywhere.
            upper: likewise.
            context: of shape [*context_shape], where the family takes one.
            key: a random key.
            num_draws: how many draws.

        Returns:
            The part of the draws inside, with its standard error: of (hits + 1) / (num_draws + 2),
            so that it is not zero where none or all are inside.

        Raises:
            ValueError: if a bound is NaN, has another shape or names an unknown column.

        Example:
            >>> import jax, numpy as np, flowvi as fv
            >>> x = np.random.default_rng(0).normal(size=(90, 1))
            >>> density = fv.fit_density(x, key=jax.random.key(0), progress=False)
            >>> found = density.probability(-np.inf, 0.0, key=jax.random.key(1))
            >>> 0.3 < found.value < 0.7
            True
        """
        low, high = self._bound("lower", lower, -np.inf), self._bound("upper", upper, np.inf)
        seen = self._context(context)
        batch = self.family.check_context(seen)
        rule = "`context` must be a single one, without axes of rows"
        checks.require(batch == (), rule, f"rows of shape {batch}", say=str)
        num_draws = checks.positive_int("num_draws", num_draws)
        draws = self._draw(key, num_draws, seen)[0]
        inside = ((draws > low) & (draws <= high)).reshape(num_draws, -1).all(1)
        part = (inside.sum() + 1) / (num_draws + 2)
        return Estimate(float(inside.mean()), float(np.sqrt(part * (1 - part) / num_draws)))

    def _bound(self, name: str, value: Bound, elsewhere: float) -> np.ndarray:
        if isinstance(value, Mapping):
            names = () if self.columns is None else self.columns.names
            if unknown := [each for each in value if each not in names]:
                got = f"{unknown[0]!r} for {list(names)}"
                raise ValueError(f"`{name}` must name columns of the density; got {got}.")
            value = np.array([value.get(each, elsewhere) for each in names])
        found = np.asarray(value, np.float64)
        shape = self._row_shape
        rule = f"`{name}` must be a number or of shape {shape}"
        checks.require(found.shape in ((), shape), rule, f"shape {found.shape}", say=str)
        checks.require(not np.isnan(found).any(), f"`{name}` must not be NaN", value)
        return found

    def anomaly_rank(
        self, x: ArrayLike | Frame, context: ArrayLike | Frame | None = None
    ) -> np.ndarray:
        """How strange rows are: the part of held-out rows that score as low, of the shape of rows.

            (1 + #{held-out scores <= log p(x)}) / (1 + #held-out scores)

        Of a row like the data it is uniform on (0, 1], so that at most so large a part of them is
        at or below any number; rows that the density was fitted to rank a little too high.

        Raises:
            ValueError: if no rows were held out and compared.
        """
        rule = "`anomaly_rank` needs scores of held-out rows, as `fit_density` of a flow has them"
        checks.require(self.held_out.size, rule, "none", say=str)
        below = np.searchsorted(self.held_out, np.asarray(self.log_prob(x, context)), "right")
        return (1 + below) / (1 + len(self.held_out))

    def plot(
        self,
        x: ArrayLike | Frame | None = None,
        *,
        context: ArrayLike | Frame | None = None,
        names: Sequence[str] | None = None,
        key: Array | None = None,
    ) -> "Figure":
        """A picture of the density, or at one context of p(x | context), over data where given.

        Args:
            x: data of shape [n, D], or None.
            context: of shape [*context_shape], where the family takes one.
            names: names of the columns.
            key: a random key for the draws.

        See `flowvi.plotting.density`.
        """
        if names is None and self.columns is not None:
            names = self.columns.names
        rows = None if x is None else self._rows(x)
        return plotting.density(_At(self, self._context(context)), rows, columns=names, key=key)


@dataclasses.dataclass(frozen=True)
class _At:
    """A density at one context."""

    density: Density
    context: ArrayLike | None

    def sample(self, key: Array, num_samples: int) -> Array:
        return jnp.asarray(self.density._draw(key, num_samples, self.context)[0])

    def log_prob(self, x: ArrayLike) -> Array:
        return self.density.log_prob(x, self.context)
