"""The forward loop: steps on rows, with or without error control.

The state is `[samples, n]`. With per-sample steps each sample is a row, which has its own time,
step size and accept flag; otherwise there is one row (`rows.py`). A row that waits for the others
takes steps of size zero. Nothing here knows about differentiation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.errors import Result
from jaxode._checks.rules import all_hold
from jaxode._jax.sharding import while_loop
from jaxode.ode.loop.acceptance import accept_or_reject
from jaxode.ode.loop.crossing import CrossingSearch, watch
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.outputs import beyond, save
from jaxode.ode.loop.progress import Progress
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.step_end import next_step_end
from jaxode.ode.loop.step_tangents import with_end_tangents
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.loop.trajectory import Curve, Step, Trajectory


class Integration(NamedTuple):
    """The result of the loop. `y1` and `ys` are NaN in rows that failed."""

    y1: Float[Array, "samples n"]
    ys: Float[Array, "times samples n"] | None
    stats: Stats
    result: Int[Array, " rows"]
    t_reached: Float[Array, " rows"]
    h: Float[Array, " rows"]
    """The step size that the controller would try next."""
    trajectory: Trajectory | None = None
    """The accepted steps if the stepper is dense."""
    stopped: Bool[Array, " rows"] | None = None
    """Whether a crossing ended the row, if the stepper looks for one."""


class _State(NamedTuple):
    progress: Progress
    slope: Float[Array, "samples n"] | None
    """`f(t, y)` if the last stage of a step is the first of the next."""
    saved: Int[Array, " rows"]
    ys: Float[Array, "times samples n"] | None
    trajectory: Trajectory | None
    search: CrossingSearch | None


def integrate(
    problem: InitialValueProblem, stepper: Stepper, checkpoints: int | None = None
) -> tuple[Integration, Trajectory | None]:
    """Solve from `t0` to `t1`, in either direction, or to where a crossing stops a row.

    With `checkpoints` it also returns the steps for a backward pass, with at most that many states
    to take them again, unless dense output keeps all of them.
    """
    # A row with a NaN time takes no steps and adds nothing to the gradients of other rows.
    start, end = (jnp.where(jnp.isnan(t), 0, t) for t in (problem.t0, problem.t1))
    state, first_evals = _initial(problem, stepper, start, end, checkpoints)

    def advance(state: _State) -> _State:
        now = state.progress
        step, then = _attempt(problem, stepper, state, start, end)
        _, slope, saved, ys, trajectory, search = state
        if search is not None:
            then, search = watch(problem, stepper, search, now, step, then)
        accept = then.accepted > now.accepted
        if ys is not None:
            at_end = then.at_end if search is None else then.at_end & ~search.stopped
            curve = Curve.of_step(stepper.method, step)
            ys, saved = save(problem, curve, then, accept, at_end, ys, saved)
        if slope is not None:
            slope = jnp.where(accept[:, None], step.k[-1], slope)
        if trajectory is not None:
            trajectory = trajectory.append(step, then.t, accept)
        return _State(then, slope, saved, ys, trajectory, search)

    state = while_loop(lambda state: state.progress.active.any(), advance, state)
    out = _outcome(problem, stepper, state, start, end, first_evals)
    trajectory = state.trajectory if out.trajectory is None else out.trajectory
    return out, trajectory and trajectory._replace(slope=state.slope)


def _outcome(
    problem: InitialValueProblem, stepper: Stepper, state: _State, start, end, first_evals: Any
) -> Integration:
    """The result of the loop from its last state."""
    final = state.progress
    stats = final.stats(stepper.method.evaluations, first_evals)
    # The solution over an empty span does not depend on the field, which need not be finite.
    of_field = (final.result == Result.NON_FINITE) | (final.result == Result.NON_FINITE_JACOBIAN)
    harmless = (start == end) & of_field & ~stepper.controller.is_lost(final.y, start)
    result = jnp.where(harmless, Result.SUCCESS, final.result).astype(jnp.int32)
    ok = result == Result.SUCCESS
    # Multiplied by NaN, so that tangents of a failed solve are NaN, too, and not zero.
    valid = jnp.where(ok, 1.0, jnp.nan).astype(final.y.dtype)[:, None]
    y1, ys = final.y * valid, None if state.ys is None else state.ys * valid[None]
    at_end, stopped = final.at_end, None
    if state.search is not None:
        stopped = state.search.stopped & ok
        at_end = at_end & ~stopped
    t_reached = jnp.where(at_end, end, final.t)
    if ys is not None and stopped is not None:  # outputs beyond the event repeat it
        ys = jnp.where((stopped[None] & beyond(problem, t_reached))[..., None], y1[None], ys)
    trajectory = state.trajectory if stepper.dense else None
    if trajectory is not None:
        # Keep the steps finite: the cotangent of a failed row is zero, and zero times NaN is NaN.
        y, k = jax.tree.map(lambda x: jnp.where(ok[:, None], x, 0), (trajectory.y, trajectory.k))
        trajectory = trajectory._replace(y=y, k=k)
    return Integration(y1, ys, stats, result, t_reached, final.h, trajectory, stopped)


def _initial(
    problem: InitialValueProblem, stepper: Stepper, start, end, checkpoints: int | None
) -> tuple[_State, int]:
    """The initial state of the loop, and the evaluations spent on it."""
    y0, ts, trajectory = problem.y0, problem.ts, None
    slope, h, evals = _start(problem, stepper, start, end - start)
    if stepper.dense or checkpoints is not None:
        length, stages = stepper.most_steps, stepper.method.stages
        trajectory = Trajectory.start(length, stages, start, y0, stepper.dense, checkpoints)
    ys = None if ts is None else jnp.broadcast_to(y0, (ts.shape[0], *y0.shape))
    holds = all_hold(problem, stepper.controller)
    result = jnp.where(holds, Result.SUCCESS, Result.INVALID_ARGUMENT)
    progress = Progress.start(start, h, y0, result)
    search = None if stepper.stop is None else CrossingSearch.start(start)
    return _State(progress, slope, progress.accepted, ys, trajectory, search), evals


def _attempt(
    problem: InitialValueProblem, stepper: Stepper, state: _State, start, end
) -> tuple[Step, Progress]:
    """Attempt one step of each active row. Returns the step and the progress after it."""
    now, method = state.progress, stepper.method
    t, at_end = next_step_end(stepper, stepper.steps, now, now.accepted, start, end)
    if state.search is not None:
        landing = state.search.landing
        t, at_end = jnp.where(landing, state.search.target, t), at_end | landing
    t = jnp.where(at_end, t, with_end_tangents(t, start, end, stepper.stop is not None))
    t = jnp.where(now.active, t, now.t)
    h = t - now.t
    k = method.evaluate(problem.slope, now.t, h, now.y, state.slope, method.stages)
    y = now.y + h[:, None] * weighted_sum(jnp.asarray(method.b, now.y.dtype), k)
    return Step(now.t, h, now.y, k), accept_or_reject(stepper, now, t, at_end, y, k)


def _start(problem: InitialValueProblem, stepper: Stepper, start, span) -> tuple[Any, Array, int]:
    """The slope at the start (if the solver reuses it), the first step, evaluations spent."""
    field, method, controller, h0 = problem.slope, stepper.method, stepper.controller, problem.h0
    reused = method.first_same_as_last

    def first_step(h):
        """The step `h`, unless the problem has one from the piece before."""
        h = controller.limit(h)
        return h if h0 is None else jnp.where(jnp.isnan(h0), h, h0)

    if stepper.steps is not None:
        h = jnp.zeros_like(start)
    elif controller.first_step is None:
        evals: Any = 2
        count: Any = evals
        if h0 is not None:
            evals = jnp.where(jnp.isnan(h0), evals, int(reused))
            count = jnp.max(evals)
        h, slope = controller.guess_first_step(field, method, start, problem.y0, span, count)
        return slope if reused else None, first_step(h), evals
    else:
        h = jnp.minimum(controller.first_step.astype(start.dtype), jnp.abs(span))
        h = first_step(jnp.sign(span) * h)
    return (field(start, problem.y0), h, 1) if reused else (None, h, 0)
