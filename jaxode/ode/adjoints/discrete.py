"""The exact gradient of the computed solution, in bounded memory."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxode._checks.caller import public
from jaxode._checks.errors import Result
from jaxode._jax.closure import ClosedField
from jaxode._jax.sharding import while_loop
from jaxode.ode.adjoints.sweep import Step, Sweep
from jaxode.ode.adjoints.tape import (
    bars_where,
    check_checkpoints,
    filled,
    in_reverse,
    nan_unless,
    once_only,
    output_count,
    output_is_inside,
    split,
    unused_rows,
    without_unused,
)
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.mesh import Mesh
from jaxode.ode.loop.outputs import Curve, Steps, output_at, save_times_at
from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.stepper import Stepper

# If parameters outnumber the work of an evaluation by this factor, their gradient is gathered once
# per step. Measured at batch 8, with 1.2 million parameters and a tenth of the work: 0.8x the time.
PARAMETERS_PER_WORK = 4
# Up to this many numbers per evaluation, an accelerator spends more time starting kernels than
# running them. XLA's estimates for a TPU v5e with all stages gathered: 0.65x the cycles at 1.7
# million numbers, 1.13x at 30 million (benchmarks/NOTES.md).
WORK_OF_KERNELS = 7_000_000


@dataclass(frozen=True)
class DiscreteAdjoint:
    """Differentiate the solver's own steps: the gradient is exact for the computed solution.

    The forward solve keeps the times of its accepted steps and at most `checkpoints` states; the
    backward pass replays the steps between them and applies the chain rule to each Runge-Kutta
    step, last to first. With Euler steps of size one this is backpropagation through a residual
    network. Memory is `checkpoints` states and the stages of a few steps, independent of the number
    of steps, plus `max_steps` scalars (per row, with per-sample steps). To save time, the first
    states keep their stages, in at most 8 MiB.

    Differentiation treats the steps as constants: relative to `t0` and `t1` they stay where they
    are, and the error control is not differentiated.

    Args:
        checkpoints: number of states to keep, at least 2. Fewer save memory but replay more steps.

    Raises:
        ValueError: if `checkpoints` is less than 2.
    """

    checkpoints: int = 64

    @public("")
    def __post_init__(self) -> None:
        check_checkpoints(self.checkpoints)

    def integrate(self, problem: Problem, stepper: Stepper) -> Integration:
        """Solve the problem. Differentiable in all of its floating leaves."""
        return _integrate(in_reverse(problem, "DiscreteAdjoint"), stepper, self.checkpoints)


@eqx.filter_custom_vjp
def _integrate(problem: Problem, stepper: Stepper, checkpoints: int) -> Integration:
    del checkpoints
    return integrate(problem, stepper)[0]


@_integrate.def_fwd
def _forward(perturbed, problem: Problem, stepper: Stepper, checkpoints: int):
    del perturbed
    integration, tape = integrate(problem, stepper, checkpoints)
    return integration, (tape, integration.result)


@_integrate.def_bwd
def _backward(residuals, out: Integration, perturbed: Problem, problem: Problem, stepper, _):
    tape, result = residuals
    unused = unused_rows(result, out)
    problem = without_unused(problem, unused, result)
    y0, t0, t1, ts = problem.y0, problem.t0, problem.t1, problem.ts
    params, apply = split(problem, perturbed, unused)
    timed = bool(perturbed.t0 or perturbed.t1 or perturbed.ts)
    params_bar = jax.tree.map(jnp.zeros_like, params)
    inside, carry = None, None
    if ts is not None and out.ys is not None:
        inside = _saved_outputs(stepper.tableau, ts, out.ys, jnp.sign(t1 - t0), timed)
        carry = output_count(problem), jnp.zeros_like(ts)
    if out.steps is not None:
        inside = _kept_steps(out.steps, inside)
    per_step = per_step_gradient(params, problem.field)
    mesh = Mesh(t0, t1, stepper.breakpoints)
    sweep = Sweep(apply, params, stepper.tableau, tape, mesh, timed, unused, per_step, inside)
    swept = sweep.run(filled(out.y1, y0), params_bar, carry)
    ts_bar = None if ts is None else jnp.zeros_like(ts) if carry is None else swept.inside[1]
    t0_bar, t1_bar = _moved(mesh, tape.times, out.steps, swept.t0, swept.t1)
    t0_bar, t1_bar, ts_bar = (t0_bar, t1_bar, ts_bar) if timed else (None, None, None)
    # A failed solve has no gradient: NaN, not a plausible number.
    ok = (result == Result.SUCCESS) & (tape.num_steps > 0)
    valid = nan_unless(ok | unused, y0.dtype)
    y0_bar = swept.y if perturbed.y0 else None
    bars = bars_where(valid, unused, swept.params, y0=y0_bar, t0=t0_bar, t1=t1_bar, ts=ts_bar)
    return once_only("DiscreteAdjoint", bars)


def rows_are_cheap(field: ClosedField) -> bool:
    """Whether an accelerator takes longer to start kernels than to run them."""
    return jax.default_backend() != "cpu" and field.work_size <= WORK_OF_KERNELS


def per_step_gradient(params: PyTree, field: ClosedField) -> bool:
    """Whether to gather the parameter gradient once per step instead of at each stage."""
    if rows_are_cheap(field):
        return True
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return size > PARAMETERS_PER_WORK * field.work_size


def _moved(mesh: Mesh, times, steps_bar: Steps | None, t0_bar, t1_bar):
    """Add the cotangents of the step times, which move with both ends."""
    if steps_bar is None or steps_bar.times is None:
        return t0_bar, t1_bar

    def add(carry, step):
        t, bar = step
        by_t0, by_t1 = mesh.speeds(t, jnp.zeros_like(t), jnp.int32(1))
        return (carry[0] + bar * by_t0.t, carry[1] + bar * by_t1.t), None

    return jax.lax.scan(add, (t0_bar, t1_bar), (times, steps_bar.times))[0]


def _kept_steps(steps_bar: Steps, outputs):
    """Add the cotangents of the steps themselves to those of the `outputs` within."""

    def inside(step: Step, number, bar: Step, params_bar, carry):
        def add(bar, steps_bar):
            own = steps_bar[jnp.maximum(number - 1, 0)]
            return bar + jnp.where(number > 0, own, 0)

        if steps_bar.y is not None:
            bar = bar._replace(y=add(bar.y, steps_bar.y))
        if steps_bar.k is not None:
            bar = bar._replace(k=add(bar.k, steps_bar.k))
        return (
            (bar, params_bar, carry)
            if outputs is None
            else outputs(step, number, bar, params_bar, carry)
        )

    return inside


def _saved_outputs(tableau, ts, ys_bar, sign, timed):
    """Pull the cotangents of the outputs saved within a step back to its start and stages."""

    def inside(step: Step, number, bar: Step, params_bar, carry):
        rows = jnp.arange(step.t.shape[0], dtype=jnp.int32)
        whole, pull_curve = jax.vjp(lambda step: Curve.of(tableau, *step), step)
        # What is differentiated. Without the times: the state and the stages.
        curve = whole if timed else whole._replace(t=None, h=None, slope=None)

        def at(curve: Curve, time):
            return eqx.combine(curve, whole).at(time)

        def due(saved):
            return output_is_inside(ts, saved, step.t, number, sign)

        def pull(carry):
            curve_bar, saved, ts_bar = carry
            now, index = due(saved), jnp.clip(saved - 1, 0)
            y_bar = jnp.where(now[:, None], output_at(ys_bar, index), 0.0)
            time = jnp.where(now, save_times_at(ts, index), step.t)
            if timed:
                added, time_bar = jax.vjp(at, curve, time)[1](y_bar)
                ts_bar = ts_bar.at[index, rows].add(time_bar)
            else:
                (added,) = jax.vjp(lambda curve: at(curve, time), curve)[1](y_bar)
            curve_bar = jax.tree.map(jnp.add, curve_bar, added)
            return curve_bar, saved - now.astype(jnp.int32), ts_bar

        carry = jax.tree.map(jnp.zeros_like, curve), *carry
        curve_bar, *carry = while_loop(lambda carry: due(carry[1]).any(), pull, carry)
        (added,) = pull_curve(eqx.combine(curve_bar, jax.tree.map(jnp.zeros_like, whole)))
        return jax.tree.map(jnp.add, bar, added), params_bar, tuple(carry)

    return inside
