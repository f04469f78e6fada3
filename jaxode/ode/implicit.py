"""Solves by diffrax, for solvers that are not explicit Runge-Kutta methods."""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.errors import Result
from jaxode._checks.rules import all_hold
from jaxode._jax.primitives import first_derivatives_only, nondifferentiable_backward
from jaxode._jax.tangents import filled, moving, with_tangent
from jaxode.ode.adjoints.base import Adjoint, in_reverse
from jaxode.ode.adjoints.forward import FORWARD_ONLY
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.problem import Problem, Stepper
from jaxode.ode.loop.stats import Stats

FIRST_ONLY = (
    "DiscreteAdjoint: with an implicit solver, the gradient of a solve cannot be differentiated. "
    "Use adjoint=jaxode.ForwardMode() for forward over forward, or an explicit solver."
)


class DiffraxSolve(eqx.Module, Adjoint):
    """Runs a diffrax solver with the diffrax adjoint that matches the jaxode one.

    Differentiation: with respect to everything except `stepper`. Only first derivatives, except
    `ForwardMode` over itself. Derivatives with respect to times belong to the computed solution;
    over an empty span, where diffrax has none, to the ODE.
    """

    solver: diffrax.AbstractSolver
    adjoint: Adjoint = eqx.field(static=True)

    def integrate(self, problem: Problem, stepper: Stepper) -> Integration:
        """Solve a problem that has one row."""
        if not self.adjoint.forward_only:
            problem = in_reverse(problem, type(self.adjoint).__name__)
        y0, t0, t1 = problem.y0, problem.t0[0], problem.t1[0]
        ts = None if problem.ts is None else problem.ts[:, 0]
        valid = all_hold(problem, stepper)[0]
        # An empty span replaces times for which diffrax would raise.
        t0, t1, ts = jax.tree.map(lambda t: jnp.where(valid, t, 0.0), (t0, t1, ts))
        times = t1[None] if ts is None else jnp.concatenate([ts, t1[None]])
        ode = _Field(problem.field, problem.args)
        moves = t0 == t1
        y = _along(y0, t0, ode, jnp.where(moves, -1.0, 0.0))
        solution = self._by_diffrax(ode, y, t0, t1, ts, stepper)
        states = solution.ys
        assert states is not None
        assert solution.ts is not None
        states = _along(states, times, ode, jnp.where(moves, 1.0, 0.0))
        result, reached = _result(ode, solution, states, t0, t1, stepper)
        result = jnp.where(valid, result, Result.INVALID_ARGUMENT).astype(jnp.int32)
        reached = jnp.where(valid, reached, problem.t0[0])
        failed = result != Result.SUCCESS
        # Not as a product: a NaN cotangent would raise in the linear solves of the backward pass.
        states = jnp.where(failed, jnp.nan, states)
        states = _nan_tangents(states, failed, problem)
        names = "num_steps", "num_accepted_steps", "num_rejected_steps"
        stats = Stats(*(solution.stats[name][None] for name in names), num_evals=jnp.full(1, -1))
        ys = None if ts is None else states[:-1]
        reached = jax.lax.stop_gradient(jnp.where(failed, reached, t1))[None]
        steps: Any = solution.interpolation
        out = Integration(
            states[-1], ys, stats, result[None], reached, jnp.zeros_like(reached), steps
        )
        if not self.adjoint.forward_only:
            return out
        return nondifferentiable_backward(out, msg=FORWARD_ONLY)

    def _by_diffrax(self, ode: "_Field", y0, t0, t1, ts, stepper: Stepper) -> diffrax.Solution:
        """Solve by diffrax. The last saved state is the end."""
        adjoint = self.adjoint.of_diffrax()
        assert adjoint is not None
        if not self.adjoint.forward_only:
            ode, y0, t0, t1, ts = first_derivatives_only((ode, y0, t0, t1, ts), FIRST_ONLY)
        first_step = stepper.first_step
        if first_step is not None:
            first_step = first_step * jnp.sign(t1 - t0)
        if stepper.steps is not None:
            first_step = (t1 - t0) / stepper.steps
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, ode: ode(t, y)),
            _with_root_finder_tolerances(self.solver, stepper),
            t0,
            t1,
            first_step,
            y0,
            args=ode,
            saveat=diffrax.SaveAt(
                ts=ts, t1=True, dense=stepper.dense, controller_state=stepper.steps is None
            ),
            stepsize_controller=_controller(stepper),
            adjoint=adjoint,
            max_steps=stepper.tape_length + (stepper.steps is not None),
            throw=False,
        )


class _Field(eqx.Module):
    """The vector field at one time, and its arguments."""

    field: Any
    args: PyTree

    def __call__(self, t: Float[Array, ""], y: Float[Array, "samples n"]):
        return self.field(t[None], y, self.args)


def _controller(stepper: Stepper) -> diffrax.AbstractStepSizeController:
    if stepper.steps is not None:
        return diffrax.ConstantStepSize()
    # The minimum step ends a solve whose steps no longer move the time.
    dtmin = float(jnp.finfo(stepper.rtol.dtype).tiny)
    tolerances = diffrax.PIDController(
        rtol=stepper.rtol, atol=stepper.atol, dtmin=dtmin, dtmax=stepper.max_step,
        force_dtmin=False,
    )  # fmt: skip
    control = tolerances
    if stepper.breakpoints is not None:
        control = diffrax.ClipStepSizeController(control, jump_ts=stepper.breakpoints)
    return _Remembering(stepper.rtol, stepper.atol, tolerances.norm, control)


class _Remembering(diffrax.AbstractAdaptiveStepSizeController):
    """A controller whose state starts with the end of the last rejected attempt."""

    rtol: Any
    atol: Any
    norm: Any
    control: diffrax.AbstractStepSizeController

    def wrap(self, direction):
        return dataclasses.replace(self, control=self.control.wrap(direction))

    def init(self, terms, t0, *rest):
        t1, state = self.control.init(terms, t0, *rest)
        # The first step must not vanish relative to the time. Error control makes it smaller.
        end, *_ = rest
        least = 100 * jnp.finfo(t0.dtype).eps * jnp.maximum(jnp.abs(t0), jnp.abs(end))
        t1 = jnp.minimum(jnp.maximum(t1, t0 + jax.lax.stop_gradient(least)), end)
        return t1, (t0, state)

    def adapt_step_size(self, t0, t1, y0, y1, args, error, order, controller_state):
        rejected, state = controller_state
        keep, *times, state, result = self.control.adapt_step_size(
            t0, t1, y0, y1, args, error, order, state
        )
        rejected = jax.lax.stop_gradient(jnp.where(keep, rejected, t1))
        return keep, *times, (rejected, state), result


def _with_root_finder_tolerances(solver: Any, stepper: Stepper) -> Any:
    """The solver, with the call's tolerances for its implicit equations unless it has its own.

    diffrax does this only with error control.
    """
    if stepper.steps is None or not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    unset: Any = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)()
    finder: Any = solver.root_finder
    names = [n for n in ("rtol", "atol", "norm") if getattr(finder, n) is getattr(unset, n)]
    given = diffrax.PIDController(rtol=stepper.rtol, atol=stepper.atol)
    fields = lambda of: [getattr(of, name) for name in names]
    return eqx.tree_at(lambda s: fields(s.root_finder), solver, fields(given))


def _along(y: Float[Array, "*times samples n"], t: Float[Array, "*times"], ode: _Field, speed):
    """The state `y` at time `t`, with `speed` times the field as its time derivative."""

    def slope(y, t, ode, speed):
        slope = jax.lax.map(lambda point: ode(*point), (t, y)) if t.ndim else ode(t, y)
        return jnp.where(speed == 0, 0.0, speed.astype(y.dtype) * slope)

    return moving(y, t, slope, ode, speed)


def _nan_tangents(states: Float[Array, "times samples n"], failed: Bool[Array, ""], inputs: PyTree):
    """The states. Their derivatives by all inputs are NaN if the solve failed."""

    def tangent(primals, dots):
        (states, failed, inputs), (states_dot, _, dots) = primals, dots
        total = sum(
            (jnp.sum(dot.real).astype(states.dtype) for dot in jax.tree.leaves(dots)),
            jnp.zeros((), states.dtype),
        )
        # Not a product with NaN or zero, which would be NaN for an infinite tangent.
        nan = jnp.where(failed, total, 0.0) * jnp.where(failed, jnp.nan, 1.0).astype(states.dtype)
        return _nan_tangents(filled(states_dot, states) + nan, failed, inputs)

    return with_tangent(states, tangent, failed, inputs)


def _code(result: diffrax.RESULTS) -> Int[Array, ""]:
    codes = [
        (diffrax.RESULTS.successful, Result.SUCCESS),
        (diffrax.RESULTS.max_steps_reached, Result.MAX_STEPS_REACHED),
        (diffrax.RESULTS.dt_min_reached, Result.STEP_SIZE_UNDERFLOW),
    ]
    code: Any = Result.IMPLICIT_SOLVE_FAILED
    for theirs, ours in codes:
        code = jnp.where(result == theirs, ours, code)
    return jnp.asarray(code, jnp.int32)


def _result(
    ode: _Field,
    solution: diffrax.Solution,
    states: Float[Array, "times samples n"],
    t0,
    t1,
    stepper: Stepper,
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """How a solve ended, and the time it reached. NaN if the time is unknown.

    diffrax treats a NaN step as one with a large error. So this evaluates the field where a failed
    solve stopped: if it is not finite just beyond, or at the end of a rejected attempt that the
    solve never passed, that is the cause.
    """
    ode, states, t0, t1 = jax.lax.stop_gradient((ode, states, t0, t1))
    code = _code(solution.result)
    # Unsaved entries have an infinite time. The last saved one is where diffrax stopped.
    saved: Any = jax.lax.stop_gradient(solution.ts)
    last = jnp.sum(jnp.isfinite(saved)) - 1
    t, y = saved[last], states[last]
    limits = jnp.finfo(t.dtype)
    # 8 roundings: the last steps that moved the time leave less than this.
    sign = jnp.sign(t1 - t0)
    h = sign * jnp.maximum(8 * limits.eps * jnp.abs(t), 8 * limits.tiny)
    attempt = t
    if stepper.steps is None:
        # diffrax solves forwards, in time multiplied by the sign.
        state: Any = solution.controller_state
        rejected = sign * jax.lax.stop_gradient(state[0])
        attempt = jnp.where(sign * (rejected - t) > 0, rejected, t)

    def finite_beyond():
        points = jnp.stack([t + h, attempt]), jnp.stack([y + h.astype(y.dtype) * ode(t, y), y])
        return jnp.isfinite(jax.lax.map(lambda point: ode(*point), points)).all()

    failed = code != Result.SUCCESS
    finite = jax.lax.cond(failed, finite_beyond, lambda: jnp.isfinite(states).all())
    code = jnp.where(finite, code, Result.NON_FINITE)
    if stepper.steps is not None:
        # Without error control, a failed step is taken anyway.
        taken = solution.stats["num_steps"].astype(t.dtype) - 1
        t = t0 + taken / stepper.steps * (t1 - t0)
    # A state that became infinite or NaN unnoticed did so before the end.
    return code, jnp.where(failed, t, jnp.nan)
