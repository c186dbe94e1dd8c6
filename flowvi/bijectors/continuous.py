"""The flow of an ordinary differential equation. The only file that imports diffrax, when used."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi.bijectors.residual import jacobian
from flowvi.params import Array, PyTree

if TYPE_CHECKING:
    import diffrax

#: dx/dt of shape [..., D] at a time, a scalar, and at x of shape [..., D].
Velocity = Callable[[Array, Array], Array]
#: x and a log-determinant.
State = tuple[Array, Array]
Field = Callable[[Array, State, list[Array]], State]

#: Error of a step that is allowed, relative and absolute.
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}

#: Steps that a solution may take.
MAX_STEPS = 256

#: Steps that a derivative skips together: each that it skips alone costs some 0.3 milliseconds.
GROUP = 8


class Continuous(distrax.Bijector):
    r"""y = x(1) for dx/dt = v(t, x), x(0) = x, with log |det| = int_0^1 tr(dv/dx) dt.

    The inverse solves the same equation from t = 1 to 0. Steps adapt to the largest error of all
    rows, by a method of order 5 in single and of order 8 in double precision, so that results are
    right up to some multiple of `TOLERANCES`; where they cannot be had in 256 steps they are NaN.
    Derivatives are those of the steps, of every order.

    The trace is exact, by D derivatives of v. With a key it is Hutchinson's unbiased estimate, by
    one: u^T (dv/dx) u, for u of random signs, which stays the same along the way.

    Args:
        velocity: v, row by row.
        batch_shape: leading axes that results have at least, as those of a context of v.
        key: of the estimate of the trace, as in training; None for the exact one.
        tolerance: in the place of those by precision.

    Raises:
        ModuleNotFoundError: where diffrax is missing: `pip install "flowvi[continuous]"`.

    Source: Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations", 2018;
    the estimate, Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD", 2019.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = Continuous(lambda t, x: -x)
        >>> [f"{number:.4f}" for number in layer.forward(jnp.array([1.0, 2.0]))]
        ['0.3679', '0.7358']
    """

    def __init__(
        self,
        velocity: Velocity,
        *,
        batch_shape: tuple[int, ...] = (),
        key: Array | None = None,
        tolerance: float | None = None,
    ):
        self._velocity, self._key, self._tolerance = velocity, key, tolerance
        self._batch_shape = batch_shape
        super().__init__(event_ndims_in=1)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        return self._solve(x, 0.0, 1.0)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        return self._solve(y, 1.0, 0.0)

    def _solve(self, x: Array, start: float, end: float) -> tuple[Array, Array]:
        x = jnp.asarray(x)
        batch = jnp.broadcast_shapes(x.shape[:-1], self._batch_shape)
        x = jnp.broadcast_to(x, (*batch, x.shape[-1]))
        if not x.size:  # There is no largest error of no rows.
            return x, jnp.zeros(batch, x.dtype)
        # Steps are those of all rows: one that is not finite must not stop the others.
        broken = ~jnp.isfinite(x).all(-1)
        safe = jnp.where(broken[..., None], 0, x)
        probe = None
        if self._key is not None:
            probe = jax.random.rademacher(self._key, x.shape, x.dtype)
        start_time = jnp.zeros((), x.dtype)
        own_velocity = lambda t, x: self._velocity(t, x)  # noqa: E731 (which need not be hashable)
        velocity, constants = jax.closure_convert(own_velocity, start_time, safe)

        def field(t: Array, state: State, constants: list[Array]) -> State:
            own = lambda x: velocity(t.astype(x.dtype), x, *constants)  # noqa: E731
            if probe is None:
                trace = jnp.trace(jacobian(own, state[0]), axis1=-2, axis2=-1)
                return own(state[0]), trace
            v, moved = jax.jvp(own, (state[0],), (probe,))
            return v, (moved * probe).sum(-1)

        tolerance = TOLERANCES[x.dtype.name] if self._tolerance is None else self._tolerance
        ends = np.asarray(start, x.dtype), np.asarray(end, x.dtype)
        y, log_det = integral(field, ends, tolerance, (safe, jnp.zeros(batch, x.dtype)), constants)
        return jnp.where(broken[..., None], jnp.nan, y), jnp.where(broken, jnp.nan, log_det)


def integral(
    field: Field,
    ends: tuple[np.ndarray, np.ndarray],
    tolerance: float,
    state: State,
    args: list[Array],
) -> State:
    """The state at the end of dstate/dt = field(t, state, args), or NaN.

    Its derivatives are those of the same steps with their lengths held, by a loop that JAX can
    differentiate in both modes. It has a fixed number of steps, of which those that were not needed
    are skipped.
    """
    import diffrax

    term = diffrax.ODETerm(field)  # type: ignore[arg-type]
    is_double = state[0].dtype == jnp.float64
    solver: diffrax.AbstractERK = (diffrax.Dopri8 if is_double else diffrax.Tsit5)()
    times_alone = diffrax.SubSaveAt(steps=True, fn=lambda t, state, args: t)

    @jax.custom_jvp
    def solve(state: State, args: list[Array]) -> tuple[State, Array]:
        solution = diffrax.diffeqsolve(
            term,
            solver,
            *ends,
            None,
            state,
            args,
            saveat=diffrax.SaveAt(subs=[diffrax.SubSaveAt(t1=True), times_alone]),
            stepsize_controller=diffrax.PIDController(tolerance, tolerance, norm=_largest),
            max_steps=MAX_STEPS,
            throw=False,
        )
        ok = solution.result == diffrax.RESULTS.successful
        last = jax.tree.map(lambda leaf: jnp.where(ok, leaf[0], jnp.nan), solution.ys[0])
        return last, solution.ts[1]

    def follow(times: Array, state: State, args: list[Array]) -> State:
        starts = jnp.concatenate([ends[0][None], times[:-1]])

        def move(state: State, start: Array, end: Array, args: list[Array]) -> State:
            return _step(solver, field, start, end - start, state, args)

        def skip(state: State, *_: object) -> State:
            return state

        def step(state: State, here: tuple[Array, Array]) -> tuple[State, None]:
            return jax.lax.cond(jnp.isfinite(here[1]), move, skip, state, *here, args), None

        def several(state: State, starts: Array, times: Array) -> State:
            kept = jax.checkpoint(step, prevent_cse=False)
            return jax.lax.scan(kept, state, (starts, times))[0]

        def group(state: State, here: tuple[Array, Array]) -> tuple[State, None]:
            return jax.lax.cond(jnp.isfinite(here[1][0]), several, skip, state, *here), None

        pairs = starts.reshape(-1, GROUP), times.reshape(-1, GROUP)
        return jax.lax.scan(group, state, pairs)[0]

    @solve.defjvp
    def solve_jvp(primals: PyTree, tangents: PyTree) -> PyTree:
        last, times = solve(*primals)
        _, moved = jax.jvp(functools.partial(follow, times), primals, tangents)
        return (last, times), (moved, jnp.zeros_like(times))

    return solve(state, args)[0]


def _step(
    solver: "diffrax.AbstractERK",
    field: Field,
    t: Array,
    length: Array,
    state: State,
    args: list[Array],
) -> State:
    """One step of an explicit method of Runge and Kutta, as a loop over its stages."""
    tableau: diffrax.ButcherTableau = solver.tableau  # type: ignore[assignment]
    stages = len(tableau.b_sol)
    below = np.zeros((stages, stages))
    for index, row in enumerate(tableau.a_lower):
        below[index + 1, : index + 1] = row
    ahead = np.concatenate([[0.0], tableau.c])

    def moved(weights: ArrayLike, slopes: State) -> State:
        add = lambda y, k: y + length * jnp.tensordot(weights, k, 1)  # noqa: E731
        return jax.tree.map(add, state, slopes)

    def stage(slopes: State, here: PyTree) -> tuple[State, None]:
        index, weights, c = here
        own = field(t + c * length, moved(weights, slopes), args)
        return jax.tree.map(lambda k, new: k.at[index].set(new), slopes, own), None

    dtype = state[0].dtype
    start = jax.tree.map(lambda leaf: jnp.zeros((stages, *leaf.shape), dtype), state)
    # Of numpy: arrays of JAX that are made in a rule are constants, which JAX 0.10 forgets when it
    # runs the program of a function that was inlined for the second time.
    rows = np.arange(stages), below.astype(dtype), ahead.astype(dtype)
    return moved(np.asarray(tableau.b_sol, dtype), jax.lax.scan(stage, start, rows)[0])


def _largest(state: State) -> Array:
    """The largest number in x and its log-determinant."""
    return jnp.stack([jnp.abs(part).max() for part in jax.tree.leaves(state)]).max()
