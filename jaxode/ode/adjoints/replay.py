"""The recorded steps of a forward solve, replayed from checkpoints, last to first."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._jax.sharding import while_loop
from jaxode.ode.adjoints.base import Solved
from jaxode.ode.loop.checkpoints import Checkpoints
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.outputs import save_times_at
from jaxode.ode.loop.rows import entry_of_each
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.loop.trajectory import Step

T = TypeVar("T")


def walk_back(
    solved: Solved, visit: Callable[[Step, Int[Array, ""], T], T], carry: T, whole: bool = True
) -> T:
    """Visit the recorded steps, last to first: `carry = visit(step, number, carry)`.

    Numbers count from 1. A `whole` step has all of its stages, otherwise those that its end depends
    on. If the last stage is the first stage of the next step, it is taken from there, and a walk
    over whole steps ends with number 0: a step of size zero at the start, whose last stage is the
    slope there.
    """
    trajectory, method = solved.trajectory, solved.stepper.method
    assert trajectory is not None
    chained = whole and method.first_same_as_last
    count = method.stages - chained if whole else method.advancing_stages

    def back(state):
        stop, slope, checkpoints, carry = state
        index = jnp.maximum(stop - 1, 0)
        if checkpoints is None:
            y, k = _entry(trajectory.y, index), _entry(trajectory.k, index)[:count]
        else:
            y, k, checkpoints = _replay(solved, trajectory.times, count, checkpoints, stop)
        t, h = _interval(trajectory.times, index)
        if slope is not None:
            k, h = jnp.concatenate([k, slope[None]]), jnp.where(stop == 0, 0.0, h)
            slope = k[0]
        return stop - 1, slope, checkpoints, visit(Step(t, h, y, k), stop, carry)

    slope = trajectory.slope if chained else None
    start: Any = trajectory.count, slope, trajectory.checkpoints, carry
    first = 0 if chained else 1
    *_, carry = while_loop(lambda state: state[0] >= first, back, start)
    return carry


def _interval(times: Float[Array, "steps+1 rows"], index: Int[Array, ""]):
    """Start and size of a recorded step, per row. A row that waited has size zero."""
    t = _entry(times, index)
    return t, _entry(times, index + 1) - t


def _entry(x: Any, index: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _replay(solved: Solved, times, count: int, checkpoints: Checkpoints, stop: Int[Array, ""]):
    """The start and the stages of the last recorded step before number `stop`.

    Steps are retaken from the latest checkpoint, with their first `count` stages. Those on the way
    are kept as slots allow.
    """
    field, method = solved.slope(solved.params), solved.stepper.method
    start, y, k, has_stages = checkpoints.latest_before(stop)
    spacing = checkpoints.spacing(start, stop)
    # Without kept stages, begin one step earlier with stages of zero: that step ends at the same
    # state, at which the first iteration evaluates the stages.
    index = start - 1 + has_stages.astype(start.dtype)
    none = jnp.zeros((count, *y.shape), y.dtype)
    k = none if k is None else jnp.where(has_stages, k[:count], none)
    b = jnp.asarray(method.b[:count], y.dtype)

    def advance(carry):
        index, y, k, checkpoints = carry
        _, h = _interval(times, index)
        y = jnp.where(h[:, None] == 0, y, y + h[:, None] * weighted_sum(b, k))
        index = index + 1
        t, h = _interval(times, index)
        k = method.evaluate(field, t, h, y, None, count)
        keep = (index > start) & (jax.lax.rem(index - start, spacing) == 0)
        return index, y, k, checkpoints.keep_replayed(index, y, k, stop, keep)

    carry = (index, y, k, checkpoints)
    _, y, k, checkpoints = while_loop(lambda carry: carry[0] < stop - 1, advance, carry)
    return y, k, checkpoints


class OutputBars(NamedTuple):
    """The cotangents of the outputs, which a walk back passes last to first."""

    ts: Float[Array, "times rows"]
    ys: Float[Array, "times samples n"]
    sign: Float[Array, " rows"]
    """The direction of time."""
    count: Int[Array, " rows"]
    """The number of outputs of each row."""

    @classmethod
    def of_problem(cls, problem: InitialValueProblem, bar: Integration) -> "OutputBars | None":
        """None if nothing depends on outputs."""
        ts, sign, count = problem.ts, jnp.sign(problem.t1 - problem.t0), problem.outputs
        if ts is None or bar.ys is None:
            return None
        if count is None:
            count = jnp.full(problem.t0.shape, ts.shape[0], jnp.int32)
        return cls(ts, bar.ys, sign, count)

    def due(
        self, count: Int[Array, " rows"], step: Step, number: Int[Array, ""]
    ) -> Bool[Array, " rows"]:
        """Whether the last of the first `count` outputs lies in the step.

        The first step takes all of them.
        """
        time = save_times_at(self.ts, count - 1)
        return (count > 0) & ((self.sign * (time - step.t) > 0) | (number == 1))

    def last_output(self, count: Int[Array, " rows"], due: Bool[Array, " rows"], otherwise):
        """The index, time and cotangent of the last of `count` outputs.

        In rows where it is not `due`, the time is `otherwise` and the cotangent is zero.
        """
        index = jnp.clip(count - 1, 0)
        time = jnp.where(due, save_times_at(self.ts, index), otherwise)
        return index, time, jnp.where(due[:, None], entry_of_each(self.ys, index), 0.0)
