"""The adjoint ODE with the state recomputed backwards, in the memory of one state."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxode._checks.caller import public
from jaxode._checks.errors import Result
from jaxode._jax.pullback import vjp
from jaxode._jax.sharding import fori_loop
from jaxode.ode.adjoints.continuous import (
    Segment,
    adjoint_product,
    check_tolerances,
    cotangents,
    solve_segment,
    with_tolerances,
)
from jaxode.ode.adjoints.tape import (
    filled,
    in_reverse,
    stand_in,
    unused_rows,
    without_cotangent,
    without_unused,
)
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.stepper import Stepper


@dataclass(frozen=True)
class BacksolveAdjoint:
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
        atol: absolute tolerance of the backward solve. By default as for the forward solve.

    References: Chen et al. (2018), arXiv:1806.07366; Kidger et al. (2021), arXiv:2009.09457, for
    keeping the parameters out of the error norm.
    """

    rtol: float | None = None
    atol: float | None = None

    @public("")
    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)

    def integrate(self, problem: Problem, stepper: Stepper) -> Integration:
        """Solve the problem. Differentiable in all of its floating leaves."""
        problem = in_reverse(problem, "BacksolveAdjoint")
        return _integrate(problem, stepper, self.rtol, self.atol)

    def backward_stats(
        self,
        problem: Problem,
        stepper: Stepper,
        y1_bar: Float[Array, "samples n"],
        ys_bar: Float[Array, "times samples n"] | None,
    ) -> Stats:
        """The work of the backward solve, given the cotangents of the end state and the outputs."""
        inexact = jax.tree.map(eqx.is_inexact_array, problem)
        integration, _ = integrate(problem, stepper)
        out = integration._replace(y1=y1_bar, ys=ys_bar)
        segment = _run_back(integration, out, inexact, problem, stepper, self.rtol, self.atol)
        return segment.stats(stepper.tableau)


@eqx.filter_custom_vjp
def _integrate(problem: Problem, stepper: Stepper, rtol, atol) -> Integration:
    del rtol, atol
    return integrate(problem, stepper)[0]


@_integrate.def_fwd
def _forward(perturbed, problem, stepper, rtol, atol):
    del perturbed
    # Through the differentiable function, so that second derivatives work.
    integration = _integrate(problem, stepper, rtol, atol)
    return integration, integration


@_integrate.def_bwd
def _backward(integration, out, perturbed, problem, stepper, rtol, atol):
    segment = _run_back(integration, out, perturbed, problem, stepper, rtol, atol)
    y0_bar = segment.y[:, problem.y0.shape[1] :]
    return cotangents(problem, perturbed, stepper, integration, out, y0_bar, segment)


def _run_back(integration, out, perturbed, problem, stepper, rtol, atol) -> Segment:
    """The backward solve from the cotangents `out`."""
    result = integration.result
    unused = unused_rows(result, out)
    idle = without_cotangent(jnp.ones_like(unused), out)
    problem = without_unused(problem, unused, result)
    fill = lambda y: stand_in(y, unused, result)
    y1, ys = fill(integration.y1), jax.tree.map(jax.vmap(fill), integration.ys)
    integration = integration._replace(y1=y1, ys=ys)
    parts = (problem.field, problem.args)
    params, rest = eqx.partition(parts, (perturbed.field, perturbed.args))
    out = _Ends(filled(out.y1, problem.y0), None if problem.ts is None else out.ys)
    # A row on which nothing depends stays at the end, where its cotangent is zero.
    resting = (result != Result.SUCCESS) | idle
    # Integers have no cotangent.
    integration = integration._replace(stats=None, result=None, t_reached=None)
    ends = problem._replace(field=None, args=None), integration, resting, out
    inputs = in_reverse((params, rest, *ends), "BacksolveAdjoint")
    segment = _solve_back(inputs, with_tolerances(stepper, rtol, atol))
    result = jnp.where(idle, Result.SUCCESS, segment.result).astype(jnp.int32)
    return segment._replace(result=result)


class _Ends(NamedTuple):
    """The cotangents of the end state and of the outputs."""

    y1: Float[Array, "samples n"]
    ys: Float[Array, "times samples n"] | None


def _apply(params, rest, t, y):
    field, args = eqx.combine(params, rest)
    return field(t, y, args)


@eqx.filter_custom_vjp
def _solve_back(inputs, stepper):
    """From the end to the start: the state and its cotangent side by side, `[rows, 2 n]`."""
    params, rest, problem, integration, resting, out = inputs
    n = problem.y0.shape[1]

    def adjoint_field(t, state, weight):
        y, a = state[:, :n], state[:, n:]
        apply = lambda params, t, y: _apply(params, rest, t, y)
        f, da, integrand = adjoint_product(apply, params, t, y, a, weight)
        return jnp.concatenate([f, da], axis=1), integrand

    def solve(segment, to):
        return solve_segment(adjoint_field, stepper, segment, to, problem.t1 - problem.t0)

    state = jnp.concatenate([integration.y1, out.y1], axis=1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    segment = Segment.start(problem.t1, -integration.h, state, zeros, resting)
    ts, ys, ys_bar = problem.ts, integration.ys, out.ys
    if ts is None or ys is None or ys_bar is None:
        return solve(segment, problem.t0)

    # One loop for all segments, so that the program holds a single copy of the solve. Each segment
    # ends at a saved time, where the state restarts and the cotangent jumps; the last ends at the
    # start.
    def body(i, segment):
        j = ts.shape[0] - 1 - i
        at_output, j = j >= 0, jnp.maximum(j, 0)
        segment = solve(segment, jnp.where(at_output, ts[j], problem.t0))
        y = jnp.where(at_output & ~resting[:, None], ys[j], segment.y[:, :n])
        a = segment.y[:, n:] + jnp.where(at_output, ys_bar[j], 0.0)
        return segment._replace(y=jnp.concatenate([y, a], axis=1))

    return fori_loop(0, ts.shape[0] + 1, body, segment)


@_solve_back.def_fwd
def _solve_back_forward(perturbed, inputs, stepper):
    del perturbed
    return _solve_back(inputs, stepper), None


@_solve_back.def_bwd
def _solve_back_backward(residuals, out, perturbed, inputs, stepper):
    """Reverse over reverse: the adjoint of the adjoint ODE, `b` now part of its state."""
    del residuals
    params, _, problem, *_ = inputs
    diff, fixed = eqx.partition(inputs, perturbed)
    stepper = eqx.tree_at(lambda m: m.first_step, stepper, None, is_leaf=lambda x: x is None)
    shape, size = problem.y0.shape, problem.y0.size
    _, unravel = ravel_pytree(params)

    def pack(y, a, b):
        return jnp.concatenate([y.reshape(-1), a.reshape(-1), b])[None]

    def unpack(state):
        y, a, b = jnp.split(state[0], [size, 2 * size])
        return y.reshape(shape), a.reshape(shape), b

    def adjoint_ode(s, state, args):
        (params, rest, start, span), _ = args
        y, a, _ = unpack(state)
        t = start + s * span
        f, pull = vjp(lambda params, y: _apply(params, rest, t, y), params, y)
        params_bar, y_bar = pull(-a * span[:, None])
        return pack(f * span[:, None], y_bar, ravel_pytree(params_bar)[0])

    def reference(diff):
        params, rest, problem, integration, _, out = eqx.combine(diff, fixed)

        def solve(state, start, to):
            # All rows are solved as one here, so the time `s` runs from 0 to 1 in each.
            span, unit = to - start, jnp.ones_like(to[:1])
            args = (params, rest, start, span), ()
            back = Problem(adjoint_ode, args, state, 0 * unit, unit, None)
            return _integrate(back, _over_unit(stepper, start, span), None, None).y1

        def segment(carry, output):
            state, start = carry
            time, y, y_bar = output
            _, a, b = unpack(solve(state, start, time))
            return (pack(y, a + y_bar, b), time), None

        b = jnp.zeros_like(ravel_pytree(params)[0])
        carry = pack(integration.y1, out.y1, b), problem.t1
        if problem.ts is not None and integration.ys is not None and out.ys is not None:
            outputs = (problem.ts, integration.ys, out.ys)
            carry, _ = jax.lax.scan(segment, carry, outputs, reverse=True)
        y, a, b = unpack(solve(*carry, problem.t0))
        return jnp.concatenate([y, a], axis=1), unravel(b)

    values, pull = jax.vjp(reference, diff)
    bars = jax.tree.map(lambda value, bar: filled(bar, value), values, (out.y, out.quadrature))
    return pull(bars)[0]


def _over_unit(
    stepper: Stepper, start: Float[Array, " rows"], span: Float[Array, " rows"]
) -> Stepper:
    """The stepper for solving the `span` of every row at once, rescaled to the unit interval."""
    start, span = jax.lax.stop_gradient((start, span))
    longest, safe = jnp.max(jnp.abs(span)), jnp.where(span == 0, 1.0, span)
    max_step, breakpoints = stepper.max_step, stepper.breakpoints
    if max_step is not None:
        max_step = max_step / jnp.where(longest == 0, 1.0, longest)
    if breakpoints is not None:
        points = (breakpoints[:, None] - start[None]) / safe[None]
        breakpoints = jnp.where(span[None] == 0, 2.0, points).reshape(-1)
    return dataclasses.replace(stepper, max_step=max_step, breakpoints=breakpoints)
