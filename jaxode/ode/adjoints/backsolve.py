"""The adjoint ODE with the state recomputed backwards, in the memory of one state."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from jaxode._checks.errors import Result
from jaxode._jax.pullback import vjp
from jaxode._jax.sharding import axes_of, fori_loop, vary
from jaxode._jax.tangents import filled
from jaxode.ode.adjoints.base import Solved, in_reverse, solve, without_cotangent
from jaxode.ode.adjoints.continuous import (
    ContinuousAdjoint,
    Segment,
    adjoint_product,
    solve_segment,
)
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.outputs import padded
from jaxode.ode.loop.problem import Problem, Slope, Stepper


@dataclass(frozen=True)
class BacksolveAdjoint(ContinuousAdjoint):
    """Solve the adjoint ODE backwards, together with the state.

    Memory is one state, independent of the number of steps: the forward solve keeps only its end
    and the states at `ts`, from which the recomputed state restarts. The gradient belongs to the
    continuous problem, exact up to the tolerances, and not to the computed solution.

    If the ODE contracts by more than the tolerance over the span, as in stiff decay, the recomputed
    state leaves the trajectory. With a linear field it then overflows, and the backward solve
    fails. With a nonlinear field it can settle on another trajectory: the gradient is finite and
    wrong by any factor, without a warning. More times in `ts` restart the state more often and
    help. `DiscreteAdjoint` and `InterpolatingAdjoint` do not have this weakness.

    Args:
        rtol: relative tolerance of the backward solve. By default as for the forward solve.
        atol: absolute tolerance of the backward solve, a number. By default as for the forward
            solve, or the smallest of its tolerances if each number has its own.

    References: Chen et al. (2018), arXiv:1806.07366; Kidger et al. (2021), arXiv:2009.09457, for
    keeping the parameters out of the error norm.
    """

    any_order: ClassVar[bool] = True

    def record(self, problem: Problem, stepper: Stepper) -> tuple[Integration, None]:
        """Solve the problem, so that the solution itself has derivatives of any order."""
        return solve(problem, stepper, self), None

    def solve_back(self, solved: Solved, bar: Integration) -> Segment:
        """The adjoint solve, with the state beside its cotangent."""
        problem, integration = solved.problem, solved.integration
        idle, name = without_cotangent(bar, problem.t0), solved.stepper.axis_name
        if name is not None:  # devices that take the same steps rest together
            idle = vary(jax.lax.pmin(idle.astype(jnp.int32), name), axes_of(idle)) == 1
        ys = None if integration.ys is None else padded(problem, integration.ys)
        # A row on which nothing depends stays at the end, where its cotangent is zero.
        resting = ~solved.ok | idle
        y1_bar = filled(bar.y1, problem.y0)
        ys_bar = None if ys is None else filled(bar.ys, ys)  # the state restarts there in any case
        ends = _Ends(integration.y1, ys, integration.h, resting, y1_bar, ys_bar)
        inputs = (solved.params, solved.rest, problem._replace(field=None, args=None), ends)
        inputs = in_reverse(inputs, "BacksolveAdjoint")
        segment = _solve_back(inputs, self.backward_stepper(solved.stepper))
        result = jnp.where(idle, Result.SUCCESS, segment.progress.result)
        return segment.moved(result=result.astype(jnp.int32))


class _Ends(NamedTuple):
    """Where the backward solve starts, restarts, and rests."""

    y1: Float[Array, "samples n"]
    ys: Float[Array, "times samples n"] | None
    h: Float[Array, " rows"]
    resting: Bool[Array, " rows"]
    y1_bar: Float[Array, "samples n"]
    ys_bar: Float[Array, "times samples n"] | None


@eqx.filter_custom_vjp
def _solve_back(inputs, stepper):
    """From the end to the start: the state and its cotangent side by side, `[rows, 2 n]`."""
    params, rest, problem, ends = inputs
    n = problem.y0.shape[1]

    def adjoint_field(t, state, weight):
        y, a = state[:, :n], state[:, n:]
        apply = lambda params, t, y: Slope(*eqx.combine(params, rest))(t, y)
        f, da, integrand = adjoint_product(apply, params, t, y, a, weight)
        return jnp.concatenate([f, da], axis=1), integrand

    def continued(segment, to):
        return solve_segment(adjoint_field, stepper, segment, to, problem.t1 - problem.t0)

    state = jnp.concatenate([ends.y1, ends.y1_bar], axis=1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    segment = Segment.start(problem.t1, -ends.h, state, zeros, ends.resting)
    ts, ys, ys_bar = problem.ts, ends.ys, ends.ys_bar
    if ts is None or ys is None or ys_bar is None:
        return continued(segment, problem.t0)

    # One loop for all segments, so that the program holds a single copy of the solve. Each segment
    # ends at a saved time, where the state restarts and the cotangent jumps; the last ends at the
    # start.
    def body(i, segment):
        j = ts.shape[0] - 1 - i
        at_output, j = j >= 0, jnp.maximum(j, 0)
        segment = continued(segment, jnp.where(at_output, ts[j], problem.t0))
        y = jnp.where(at_output & ~ends.resting[:, None], ys[j], segment.y[:, :n])
        a = segment.y[:, n:] + jnp.where(at_output, ys_bar[j], 0.0)
        return segment.moved(y=jnp.concatenate([y, a], axis=1))

    return fori_loop(0, ts.shape[0] + 1, body, segment)


@_solve_back.def_fwd
def _solve_back_forward(perturbed, inputs, stepper):
    del perturbed
    return _solve_back(inputs, stepper), None


@_solve_back.def_bwd
def _solve_back_backward(residuals, bar, perturbed, inputs, stepper):
    """Reverse over reverse: the adjoint of the adjoint ODE, `b` now part of its state."""
    del residuals
    params, _, problem, *_ = inputs
    diff, fixed = eqx.partition(inputs, perturbed)
    if not len(problem.y0):
        return jax.tree.map(jnp.zeros_like, diff)
    as_real = lambda x: x if jnp.isrealobj(x) else jnp.stack([x.real, x.imag])
    of_state = lambda x: as_real(x).astype(problem.y0.dtype)
    as_given = lambda b, x: (b if jnp.isrealobj(x) else jax.lax.complex(*b)).astype(x.dtype)
    _, unravel = ravel_pytree(jax.tree.map(of_state, (problem.y0, problem.y0, params)))
    pack = lambda *parts: ravel_pytree(jax.tree.map(of_state, parts))[0][None]
    unpack = lambda state: unravel(state[0])

    def adjoint_ode(s, state, args):
        (params, rest, start, span), _ = args
        y, a, _ = unpack(state)
        t = start + s * span
        f, pull = vjp(lambda params, y: Slope(*eqx.combine(params, rest))(t, y), params, y)
        params_bar, y_bar = pull(-a * span[:, None])
        return pack(f * span[:, None], y_bar, params_bar)

    def reference(diff):
        params, rest, problem, ends = eqx.combine(diff, fixed)

        def end_of(state, start, to):
            # All rows are solved as one here, so the time `s` runs from 0 to 1 in each.
            span, unit = to - start, jnp.ones_like(to[:1])
            args = (params, rest, start, span), ()
            back = Problem(adjoint_ode, args, state, 0 * unit, unit, None)
            return solve(back, _over_unit(stepper, start, span), BacksolveAdjoint()).y1

        def segment(carry, output):
            state, start = carry
            time, y, y_bar = output
            _, a, b = unpack(end_of(state, start, time))
            return (pack(y, a + y_bar, b), time), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        carry = pack(ends.y1, ends.y1_bar, zeros), problem.t1
        if problem.ts is not None and ends.ys is not None and ends.ys_bar is not None:
            outputs = (problem.ts, ends.ys, ends.ys_bar)
            carry, _ = jax.lax.scan(segment, carry, outputs, reverse=True)
        y, a, b = unpack(end_of(*carry, problem.t0))
        return jnp.concatenate([y, a], axis=1), jax.tree.map(as_given, b, params)

    values, pull = jax.vjp(reference, diff)
    bars = jax.tree.map(lambda value, bar: filled(bar, value), values, (bar.y, bar.quadrature))
    return pull(bars)[0]


def _over_unit(
    stepper: Stepper, start: Float[Array, " rows"], span: Float[Array, " rows"]
) -> Stepper:
    """The stepper for solving the `span` of every row at once, rescaled to the unit interval.

    The first step is chosen anew.
    """
    start, span = jax.lax.stop_gradient((start, span))
    longest, safe = jnp.max(jnp.abs(span)), jnp.where(span == 0, 1.0, span)
    max_step, breakpoints = stepper.max_step, stepper.breakpoints
    if max_step is not None:
        max_step = max_step / jnp.where(longest == 0, 1.0, longest)
    if breakpoints is not None:
        points = (breakpoints[:, None] - start[None]) / safe[None]
        breakpoints = jnp.where(span[None] == 0, 2.0, points).reshape(-1)
    return dataclasses.replace(stepper, first_step=None, max_step=max_step, breakpoints=breakpoints)
