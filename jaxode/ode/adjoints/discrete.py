"""The exact gradient of the computed solution, in bounded memory."""

from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._checks.arguments import integer
from jaxode._checks.caller import public
from jaxode._jax.sharding import while_loop
from jaxode._jax.tangents import instantiate_zeros
from jaxode.ode.adjoints.base import ReverseAdjoint, Solved, nan_unless
from jaxode.ode.adjoints.replay import OutputBars
from jaxode.ode.adjoints.sweep import Sweep
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.rows import place_of_each
from jaxode.ode.loop.trajectory import Curve, Step, Trajectory
from jaxode.ode.solvers.base import Method


@dataclass(frozen=True)
class DiscreteAdjoint(ReverseAdjoint):
    """Differentiate the solver's own steps: the gradient is exact for the computed solution.

    The forward solve keeps the times of its accepted steps and at most `checkpoints` states; the
    backward pass replays the steps between them and applies the chain rule to each Runge-Kutta
    step, last to first. With Euler steps of size one this is backpropagation through a residual
    network. Memory is `checkpoints` states and the stages of a few steps, independent of the number
    of steps, plus `max_steps` scalars (per row, with per-sample steps). To save time, the first
    states keep their stages, in at most 8 MiB.

    Differentiation, in forward and reverse mode and to any order, treats the steps as constants:
    relative to `t0` and `t1` they stay where they are, and the error control is not differentiated.

    Args:
        checkpoints: number of states to keep, at least 2. Fewer save memory but replay more steps.

    Raises:
        ValueError: if `checkpoints` is less than 2.
    """

    supports_dense: ClassVar[bool] = True
    fused: ClassVar[bool] = True
    checkpoints: int = 64

    @public("")
    def __post_init__(self) -> None:
        integer("checkpoints", self.checkpoints, least=2, cure=" The default is 64.")

    def pull_back(
        self, solved: Solved, bar: Integration
    ) -> tuple[InitialValueProblem, Float[Array, " rows"]]:
        problem, trajectory = solved.problem, solved.trajectory
        assert trajectory is not None
        interior, carry, outputs = None, None, OutputBars.of_problem(problem, bar)
        if outputs is not None:
            interior = _of_outputs(solved.stepper.method, outputs, solved.timed)
            carry = outputs.count, jnp.zeros_like(outputs.ts)
        if bar.trajectory is not None:
            interior = _of_steps(bar.trajectory, interior)
        swept = Sweep(solved, interior).run(instantiate_zeros(bar.y1, problem.y0), carry)
        ts_bar = None
        if problem.ts is not None:
            ts_bar = jnp.zeros_like(problem.ts) if outputs is None else swept.interior[1]
        t0_bar, t1_bar = _moved(solved, trajectory.times, bar.trajectory, swept.t0, swept.t1)
        ok = solved.ok & (trajectory.count > 0) | solved.masked
        bars = InitialValueProblem(*swept.params, y0=swept.y, t0=t0_bar, t1=t1_bar, ts=ts_bar)
        return bars, nan_unless(ok, problem.y0.dtype)


def _moved(solved: Solved, times, steps_bar: Trajectory | None, t0_bar, t1_bar):
    """Add the cotangents of the step times, which move with both ends."""
    if steps_bar is None or steps_bar.times is None:
        return t0_bar, t1_bar
    tangents = jax.vmap(lambda t: solved.step_tangents(t, jnp.zeros_like(t), jnp.int32(1)))
    by_t0, by_t1 = tangents(times)

    def total(by_end):
        return jnp.sum(steps_bar.times * by_end.t, axis=0)

    return t0_bar + total(by_t0), t1_bar + total(by_t1)


def _of_steps(steps_bar: Trajectory, outputs: Any):
    """For `Sweep.interior`: adds the cotangents of the steps themselves, and those of `outputs`."""

    def interior(step: Step, number, bar: Step, params_bar, carry):
        def add(bar, steps_bar):
            if steps_bar is None:
                return bar
            return bar + jnp.where(number > 0, steps_bar[jnp.maximum(number - 1, 0)], 0)

        bar = bar._replace(y=add(bar.y, steps_bar.y), k=add(bar.k, steps_bar.k))
        if outputs is None:
            return bar, params_bar, carry
        return outputs(step, number, bar, params_bar, carry)

    return interior


def _of_outputs(method: Method, outputs: OutputBars, timed: bool):
    """For `Sweep.interior`: pulls the cotangents of the outputs in a step back to its start and
    stages. It carries the number of outputs up to the step, and the cotangents of their times."""

    def interior(step: Step, number, bar: Step, params_bar, carry):
        whole, pull_curve = jax.vjp(lambda step: Curve.of_step(method, step), step)
        # Differentiate the state and the stages alone, unless times have derivatives.
        curve = whole if timed else whole._replace(t=None, h=None, slope=None)

        def at(curve: Curve, time):
            return eqx.combine(curve, whole).at(time)

        def pull(carry):
            curve_bar, count, ts_bar = carry
            due = outputs.due(count, step, number)
            index, time, y_bar = outputs.last_output(count, due, step.t)
            if timed:
                by_curve, time_bar = jax.vjp(at, curve, time)[1](y_bar)
                ts_bar = ts_bar.at[place_of_each(index)].add(time_bar)
            else:
                (by_curve,) = jax.vjp(lambda curve: at(curve, time), curve)[1](y_bar)
            curve_bar = jax.tree.map(jnp.add, curve_bar, by_curve)
            return curve_bar, count - due.astype(jnp.int32), ts_bar

        carry = jax.tree.map(jnp.zeros_like, curve), *carry

        def proceed(carry):
            return outputs.due(carry[1], step, number).any()

        curve_bar, *carry = while_loop(proceed, pull, carry)
        (by_step,) = pull_curve(eqx.combine(curve_bar, jax.tree.map(jnp.zeros_like, whole)))
        return jax.tree.map(jnp.add, bar, by_step), params_bar, tuple(carry)

    return interior
