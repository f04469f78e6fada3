"""The adjoint ODE on the stored trajectory of the forward solve."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._checks.caller import public
from jaxode._checks.errors import Result
from jaxode._jax.sharding import while_loop
from jaxode.ode.adjoints.continuous import (
    Segment,
    adjoint_product,
    check_tolerances,
    cotangents,
    solve_segment,
    with_tolerances,
)
from jaxode.ode.adjoints.tape import (
    check_checkpoints,
    filled,
    in_reverse,
    interval,
    once_only,
    output_count,
    output_is_inside,
    replay,
    split,
    unused_rows,
    without_unused,
)
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.outputs import Curve, output_at, save_times_at
from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.stepper import Stepper


@dataclass(frozen=True)
class InterpolatingAdjoint:
    """Solve the adjoint ODE backwards, on the dense output of the forward solve.

    The error control covers only the cotangent. Unlike `BacksolveAdjoint`, it does not recompute
    the state backwards, so it is as stable as the forward solve. It keeps the trajectory as
    `checkpoints` states and replays the steps in between. The gradient belongs to the continuous
    problem, exact up to the tolerances and the interpolation, and not to the computed solution.

    Args:
        rtol: relative tolerance of the backward solve. By default as for the forward solve.
        atol: absolute tolerance of the backward solve. By default as for the forward solve.
        checkpoints: number of states to keep, at least 2.

    References: Chen et al. (2018), arXiv:1806.07366.
    """

    rtol: float | None = None
    atol: float | None = None
    checkpoints: int = 64

    @public("")
    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        check_checkpoints(self.checkpoints)

    def integrate(self, problem: Problem, stepper: Stepper) -> Integration:
        """Solve the problem. Differentiable in all of its floating leaves."""
        return _integrate(in_reverse(problem, "InterpolatingAdjoint"), stepper, self)

    def backward_stats(
        self,
        problem: Problem,
        stepper: Stepper,
        y1_bar: Float[Array, "samples n"],
        ys_bar: Float[Array, "times samples n"] | None,
    ) -> Stats:
        """The work of the backward solve, given the cotangents of the end state and the outputs."""
        inexact = jax.tree.map(eqx.is_inexact_array, problem)
        integration, tape = integrate(problem, stepper, self.checkpoints)
        out = integration._replace(y1=y1_bar, ys=ys_bar)
        segment = _solve_back(integration, tape, out, inexact, problem, stepper, self)
        return segment.stats(stepper.tableau)


@eqx.filter_custom_vjp
def _integrate(problem: Problem, stepper: Stepper, adjoint: InterpolatingAdjoint) -> Integration:
    del adjoint
    return integrate(problem, stepper)[0]


@_integrate.def_fwd
def _forward(perturbed, problem, stepper, adjoint):
    del perturbed
    integration, tape = integrate(problem, stepper, adjoint.checkpoints)
    return integration, (integration, tape)


@_integrate.def_bwd
def _backward(residuals, out, perturbed, problem, stepper, adjoint):
    integration, tape = residuals
    segment = _solve_back(integration, tape, out, perturbed, problem, stepper, adjoint)
    bars = cotangents(problem, perturbed, stepper, integration, out, segment.y, segment)
    return once_only("InterpolatingAdjoint", bars)


def _solve_back(integration, tape, out, perturbed, problem, stepper, adjoint) -> Segment:
    """The adjoint solve from the cotangents `out`."""
    unused = unused_rows(integration.result, out)
    problem = without_unused(problem, unused, integration.result)
    y0, t0, t1, ts = problem.y0, problem.t0, problem.t1, problem.ts
    params, apply = split(problem, perturbed, unused)
    tableau, sign = stepper.tableau, jnp.sign(t1 - t0)
    stepper = with_tolerances(stepper, adjoint.rtol, adjoint.atol)

    def step(carry):
        """Carry the cotangent back over one recorded step of the forward solve."""
        stop, saved, segment, checkpoints = carry
        forward = lambda t, y: apply(params, t, y)
        y, k, checkpoints = replay(forward, tableau, tableau.stages, tape.times, checkpoints, stop)
        t, h = interval(tape.times, stop - 1)

        curve = Curve.of(tableau, t, h, y, k)

        def adjoint_field(time, a, weight):
            _, da, integrand = adjoint_product(apply, params, time, curve.at(time), a, weight)
            return da, integrand

        def outputs_left(saved):
            """Rows that have not yet passed every output of this step."""
            if ts is None or out.ys is None:
                return jnp.zeros_like(t, bool)
            return output_is_inside(ts, saved, t, stop, sign)

        def pieces(carry):
            saved, segment, _ = carry
            left = outputs_left(saved)
            if ts is None or out.ys is None:
                segment = solve_segment(adjoint_field, stepper, segment, t, t1 - t0)
                return saved, segment, left
            end = jnp.where(left, save_times_at(ts, saved - 1), t)
            segment = solve_segment(adjoint_field, stepper, segment, end, t1 - t0)
            jump = output_at(out.ys, jnp.clip(saved - 1, 0))
            segment = segment._replace(y=segment.y + jnp.where(left[:, None], jump, 0.0))
            return saved - left.astype(jnp.int32), segment, left

        carry = (saved, segment, jnp.ones(t0.shape, bool))
        saved, segment, _ = while_loop(lambda c: c[2].any(), pieces, carry)
        return stop - 1, saved, segment, checkpoints

    zeros = jax.tree.map(jnp.zeros_like, params)
    failed = (integration.result != Result.SUCCESS) | (tape.num_steps == 0)
    segment = Segment.start(t1, -integration.h, filled(out.y1, y0), zeros, failed)
    saved = jnp.zeros(t0.shape, jnp.int32) if out.ys is None else output_count(problem)
    carry = (tape.num_steps, saved, segment, tape.checkpoints)
    _, _, segment, _ = while_loop(lambda carry: carry[0] > 0, step, carry)
    return segment
