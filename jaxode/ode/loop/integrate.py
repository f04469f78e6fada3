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
from jaxode.ode.loop.checkpoints import Checkpoints
from jaxode.ode.loop.crossing import Search, watch
from jaxode.ode.loop.mesh import on_mesh
from jaxode.ode.loop.outputs import Steps, beyond, save
from jaxode.ode.loop.problem import Problem, Stepper, limit_step, weighted_sum
from jaxode.ode.loop.progress import Progress, aim, judge
from jaxode.ode.loop.rows import one_row
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.step_size import first_step, is_lost


class Tape(NamedTuple):
    """What a backward pass needs to replay the accepted steps."""

    times: Float[Array, "steps+1 rows"]
    """Step `i` of a row went from `times[i]` to `times[i + 1]`."""
    num_steps: Int[Array, ""]
    checkpoints: Checkpoints
    slope: Float[Array, "samples n"] | None
    """The slope at the end of the last step, if the solver knows it."""


class Integration(NamedTuple):
    """What the loop returns. `y1` and `ys` are NaN in the rows whose `result` is a failure."""

    y1: Float[Array, "samples n"]
    ys: Float[Array, "times samples n"] | None
    stats: Stats
    result: Int[Array, " rows"]
    t_reached: Float[Array, " rows"]
    h: Float[Array, " rows"]
    """The step size that the controller would try next."""
    steps: Steps | None = None
    """The accepted steps if the stepper is dense."""
    stopped: Bool[Array, " rows"] | None = None
    """Whether a crossing ended the row, if the stepper looks for one."""


class _State(NamedTuple):
    progress: Progress
    slope: Float[Array, "samples n"] | None
    """`f(t, y)` if the last stage of a step is the first of the next."""
    saved: Int[Array, " rows"]
    ys: Float[Array, "times samples n"] | None
    tape: Tape | None
    steps: Steps | None
    search: Search | None


class Attempt(NamedTuple):
    """An attempted step."""

    t: Float[Array, " rows"]
    """Its end."""
    y: Float[Array, "samples n"]
    k: Float[Array, "stages samples n"]
    last: Bool[Array, " rows"]
    accept: Bool[Array, " rows"]


def integrate(
    problem: Problem, stepper: Stepper, checkpoints: int | None = None
) -> tuple[Integration, Any]:
    """Solve from `t0` to `t1`, in either direction, or to where a crossing stops a row.

    With `checkpoints` it also returns a `Tape`: the time of every accepted step, and at most that
    many states to replay the steps in between.
    """
    # A row with a NaN time takes no steps and adds nothing to the gradients of other rows.
    start, end = (jnp.where(jnp.isnan(t), 0, t) for t in (problem.t0, problem.t1))
    state, first_evals = _initial(problem, stepper, start, end, checkpoints)

    def advance(state: _State) -> _State:
        step, progress = _attempt(problem, stepper, state, start, end)
        ys, saved, search = state.ys, state.saved, state.search
        if search is not None:
            step, progress, search = watch(problem, stepper, search, state.progress, step, progress)
        if ys is not None:
            ys, saved = save(problem, stepper.method, step, state.progress, ys, saved)
        return _recorded(state._replace(ys=ys, saved=saved, search=search), step, progress)

    state = while_loop(lambda state: state.progress.active.any(), advance, state)
    final, method = state.progress, stepper.method
    stats = final.stats(method.evaluations, first_evals)
    # Over an empty span, a vector field that is not finite changes nothing that is finite.
    of_field = (final.result == Result.NON_FINITE) | (final.result == Result.NON_FINITE_JACOBIAN)
    harmless = (start == end) & of_field & ~is_lost(stepper, final.y, start)
    result = jnp.where(harmless, Result.SUCCESS, final.result).astype(jnp.int32)
    ok = result == Result.SUCCESS
    # Multiplied by NaN, so that tangents of a failed solve are NaN, too, and not zero.
    valid = jnp.where(ok, 1.0, jnp.nan).astype(final.y.dtype)[:, None]
    y1, ys = final.y * valid, None if state.ys is None else state.ys * valid[None]
    at_end, stopped = final.done, None
    if state.search is not None:
        stopped = state.search.stopped & ok
        at_end = at_end & ~stopped
    t_reached = jnp.where(at_end, end, final.t)
    if ys is not None and stopped is not None:  # they repeat the end
        ys = jnp.where((stopped[None] & beyond(problem, t_reached))[..., None], y1[None], ys)
    steps = state.steps
    if steps is not None:
        # Finite, for a cotangent of zero.
        keep = lambda x: jnp.where(ok[:, None], x, 0)
        steps = steps._replace(y=keep(steps.y), k=keep(steps.k))
    out = Integration(y1, ys, stats, result, t_reached, final.h, steps, stopped)
    return out, state.tape


def _initial(
    problem: Problem, stepper: Stepper, start, end, checkpoints: int | None
) -> tuple[_State, int]:
    """The initial state of the loop, and the evaluations spent on it."""
    y0, ts, rows = problem.y0, problem.ts, start.shape[0]
    slope, h, evals = _start(problem, stepper, start, end - start)
    tape = None
    if checkpoints is not None:
        times = jnp.broadcast_to(start, (stepper.tape_length + 1, rows))
        kept = Checkpoints.start(checkpoints, stepper.method.stages, y0)
        tape = Tape(times, jnp.zeros((), jnp.int32), kept, slope)
    steps = None
    if stepper.dense:
        steps = Steps.none_yet(stepper.tape_length, stepper.method.stages, start, y0)
    ys = None if ts is None else jnp.broadcast_to(y0, (ts.shape[0], *y0.shape))
    result = jnp.where(all_hold(problem, stepper), Result.SUCCESS, Result.INVALID_ARGUMENT)
    progress = Progress.start(start, h, y0, result)
    search = None if stepper.stop is None else Search.start(start)
    return _State(progress, slope, progress.accepted, ys, tape, steps, search), evals


def _attempt(
    problem: Problem, stepper: Stepper, state: _State, start, end
) -> tuple[Attempt, Progress]:
    """Attempt one step of each active row, and how far they come by it."""
    now, method = state.progress, stepper.method
    ahead, landing = aim(stepper, stepper.steps, now, now.accepted, start, end), None
    if state.search is not None:
        landing = state.search.landing
        t = jnp.where(landing, state.search.target, ahead.t)
        ahead = ahead._replace(t=t, last=ahead.last | landing)
    t = jnp.where(ahead.last, ahead.t, on_mesh(ahead.t, start, end, stepper.stop is not None))
    t = jnp.where(now.active, t, now.t)
    h = t - now.t
    k = method.evaluate(problem.slope, now.t, h, now.y, state.slope, method.stages)
    y = now.y + h[:, None] * weighted_sum(jnp.asarray(method.b, now.y.dtype), k)
    accept, then = judge(stepper, now, ahead._replace(t=t), y, k)
    then = then._replace(h=jax.lax.stop_gradient(then.h))
    last = ahead.last if landing is None else ahead.last & ~landing
    return Attempt(t, y, k, last, accept), then


def _recorded(state: _State, step: Attempt, progress: Progress) -> _State:
    """The state of the loop after a step, with the step on the tape."""
    accept, k, y, t = step.accept, step.k, state.progress.y, progress.t
    slope, tape, steps = state.slope, state.tape, state.steps
    if slope is not None:
        slope = jnp.where(accept[:, None], k[-1], slope)
    # A waiting row has a step of size zero with all stages at its start, and not the stages of the
    # failed attempt, which may be NaN.
    kept = k if one_row(t) else jnp.where(accept[None, :, None], k, k[:1])
    advanced = accept.any()  # what no row accepted is overwritten later
    if tape is not None:
        times = jax.lax.dynamic_update_index_in_dim(tape.times, t, tape.num_steps + 1, 0)
        checkpoints = tape.checkpoints.offer(tape.num_steps, y, kept, advanced)
        tape = Tape(times, tape.num_steps + advanced.astype(jnp.int32), checkpoints, slope)
    if steps is not None:
        steps = steps.append(t, y, kept, advanced)
    return state._replace(progress=progress, slope=slope, tape=tape, steps=steps)


def _start(problem: Problem, stepper: Stepper, start, span) -> tuple[Any, Array, int]:
    """The slope at the start (if the solver reuses it), the first step, evaluations spent."""
    field, reused = problem.slope, stepper.method.first_same_as_last
    if stepper.steps is not None:
        h = jnp.zeros_like(start)
    elif stepper.first_step is None:
        evals: Any = 2
        count: Any = evals
        if problem.h0 is not None:
            evals = jnp.where(jnp.isnan(problem.h0), evals, int(reused))
            count = jnp.max(evals)
        h, slope = first_step(field, stepper, start, problem.y0, span, count)
        return slope if reused else None, _known(problem, limit_step(stepper, h)), evals
    else:
        h = jnp.minimum(stepper.first_step.astype(start.dtype), jnp.abs(span))
        h = _known(problem, limit_step(stepper, jnp.sign(span) * h))
    return (field(start, problem.y0), h, 1) if reused else (None, h, 0)


def _known(problem: Problem, h: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """The first step, or that of the piece before where the problem has it."""
    return h if problem.h0 is None else jnp.where(jnp.isnan(problem.h0), h, problem.h0)
