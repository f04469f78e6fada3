"""The outputs of a solve, by the solver's own interpolant."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._jax.sharding import while_loop
from jaxode._jax.tangents import with_tangent, with_time_tangent
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.progress import Progress
from jaxode.ode.loop.rows import entry_of_each, place_of_each
from jaxode.ode.loop.trajectory import Curve


def save_times_at(
    ts: Float[Array, "times rows"], index: Int[Array, " rows"]
) -> Float[Array, " rows"]:
    """The output time with this index, per row. Any of them if the index is out of range."""
    return entry_of_each(ts, jnp.clip(index, 0, ts.shape[0] - 1))


def save(problem: InitialValueProblem, curve: Curve, then: Progress, accept, at_end, ys, saved):
    """Write the dense output at every output time that an accepted step has reached.

    The step leads to `then`, which is the end time where `at_end`. `saved` counts the outputs
    written per row. The output at the end of a step is the state itself, with the derivatives of
    the dense output.
    """
    ts, sign = problem.ts, jnp.sign(problem.t1 - problem.t0)
    assert ts is not None
    count = len(ts) if problem.outputs is None else problem.outputs

    def pending(saved):
        reached = at_end | (sign * (save_times_at(ts, saved) - then.t) <= 0)
        return accept & (saved < count) & reached

    def write(carry):
        ys, saved = carry
        due = pending(saved)
        time = save_times_at(ts, saved)
        inside = curve.at(time)
        value = jnp.where((time == then.t)[:, None], then.y, inside)
        value = with_tangent(value, lambda _, dots: dots[1], inside)
        place = place_of_each(jnp.where(due, saved, ts.shape[0]))
        ys = ys.at[place].set(value, mode="drop")
        return ys, saved + due.astype(jnp.int32)

    return while_loop(lambda carry: pending(carry[1]).any(), write, (ys, saved))


def beyond(problem: InitialValueProblem, t: Float[Array, " rows"]) -> Bool[Array, "times rows"]:
    """Which outputs lie beyond a time."""
    assert problem.ts is not None
    return jnp.sign(problem.t1 - problem.t0)[None] * (problem.ts - t[None]) > 0


def padded(
    problem: InitialValueProblem, ys: Float[Array, "times samples n"]
) -> Float[Array, "times samples n"]:
    """The outputs of each row, with its last one in place of padding.

    Padding moves along the field if its times move past the last one.
    """
    ts, count = problem.ts, problem.outputs
    if ts is None or count is None:
        return ys
    number = jnp.arange(ts.shape[0], dtype=jnp.int32)
    index = jax.vmap(lambda number: jnp.minimum(number, count - 1))(number)
    times, ys = (jax.vmap(entry_of_each, (None, 0))(x, index) for x in (ts, ys))

    def slope(ys, past, problem):
        slope = problem.slope(problem.ts[-1], ys[-1])
        # A failed row has NaN outputs at any time.
        return jnp.where(jnp.isfinite(slope), slope, 0)[None]

    return with_time_tangent(ys, ts - times, slope, problem)
