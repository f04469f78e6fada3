"""The adjoint ODE, solved backwards beside the recomputed state, in the memory of one state.

With `a(t)` the cotangent of `y(t)`, the adjoint theorem reads

    da/dt = -a df/dy,    db/dt = -a df/dparams,    b = 0 at the end,

and the gradients are `a` and `b` at the start (Pontryagin 1962; Chen et al. 2018,
arXiv:1806.07366). `b` does not feed back, so it is a quadrature: an accumulator as large as the
parameters, which is part of neither the state nor the error norm.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import non_negative
from jaxode._checks.caller import public
from jaxode._checks.errors import Result, nan_or_raise
from jaxode._jax.primitives import reverse_only
from jaxode._jax.pullback import vjp
from jaxode._jax.sharding import axes_of, fori_loop, vary, while_loop
from jaxode._jax.tangents import instantiate_zeros, with_tangent
from jaxode.ode.adjoints.base import (
    ReverseAdjoint,
    Solved,
    nan_unless,
    without_cotangent,
)
from jaxode.ode.adjoints.flat import pulled_back, solution, undifferentiated
from jaxode.ode.adjoints.vmap import vmappable
from jaxode.ode.loop.acceptance import accept_or_reject
from jaxode.ode.loop.initial_value_problem import InitialValueProblem, Slope
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.outputs import padded
from jaxode.ode.loop.progress import Progress
from jaxode.ode.loop.rows import one_row, reduce_rows
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.loop.step_end import next_step_end
from jaxode.ode.loop.stepper import Stepper

# (t [rows], state [samples, m], weight [rows]) -> (derivative [samples, m], weighted integrand)
AdjointField = Callable[..., tuple[Float[Array, "samples m"], PyTree]]


@dataclass(frozen=True)
class BacksolveAdjoint(ReverseAdjoint):
    """Solve the adjoint ODE backwards, together with the state.

    Memory is one state, independent of the number of steps: the forward solve keeps only its end
    and the states at `ts`, from which the recomputed state restarts. The gradient belongs to the
    continuous problem, exact up to the tolerances, and not to the computed solution.

    If the ODE contracts by more than the tolerance over the span, as in stiff decay, the recomputed
    state leaves the trajectory. With a linear field it then overflows, and the backward solve
    fails. With a nonlinear field it can settle on another trajectory: the gradient is finite and
    wrong by any factor, without a warning. More times in `ts` restart the state more often and
    help. `DiscreteAdjoint` does not have this weakness.

    Differentiation: in reverse mode, any number of times. The derivative of a gradient goes through
    the backward solve with its steps held fixed, and takes the Hessian to be symmetric, which holds
    to the tolerances. Forward mode raises; take `DiscreteAdjoint`.

    Args:
        rtol: relative tolerance of the backward solve. By default as for the forward solve.
        atol: absolute tolerance of the backward solve, a number. By default as for the forward
            solve, or the smallest of its tolerances if each number has its own.

    References: Chen et al. (2018), arXiv:1806.07366; Kidger et al. (2021), arXiv:2009.09457, for
    keeping the parameters out of the error norm.
    """

    solves_backwards: ClassVar[bool] = True
    rtol: float | None = None
    atol: float | None = None

    @public("")
    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None:
                non_negative(name, value, "None or a finite tolerance of at least 0")

    def integrate(self, problem: InitialValueProblem, stepper: Stepper) -> Integration:
        def run(problem, stepper):
            return _solve(problem, stepper, self)

        return vmappable(run, reverse_only(problem, NO_FORWARD), undifferentiated(stepper))

    def _stepper(self, stepper: Stepper) -> Stepper:
        """The settings of the backward solve."""
        controller = stepper.controller
        tolerances = {"rtol": controller.rtol, "atol": jnp.min(controller.atol, initial=jnp.inf)}
        for name, tolerance in (("rtol", self.rtol), ("atol", self.atol)):
            if tolerance is not None:
                tolerances[name] = jnp.asarray(tolerance, controller.rtol.dtype)
        return stepper.controlled(**tolerances)

    def record(self, problem: InitialValueProblem, stepper: Stepper) -> tuple[Integration, None]:
        """Solve the problem without a record of its steps."""
        return integrate(problem, stepper)[0], None

    def _solved_back(self, solved: Solved, bar: Integration) -> tuple[Progress, PyTree]:
        """The adjoint solve. The first half of its state is that of the problem."""
        problem, integration = solved.problem, solved.integration
        ended, name = without_cotangent(bar, problem.t0), solved.stepper.axis_name
        if name is not None:  # a row rests if its cotangent is zero on all devices
            ended = vary(jax.lax.pmin(ended.astype(jnp.int32), name), axes_of(ended)) == 1
        ys = None if integration.ys is None else padded(problem, integration.ys)
        # A row on which nothing depends stays at the end, where its cotangent is zero.
        masked = ~solved.ok | ended
        y1_bar = instantiate_zeros(bar.y1, problem.y0)
        # The state restarts at outputs even if nothing depends on them.
        ys_bar = None if ys is None else instantiate_zeros(bar.ys, ys)
        restarts = _Restarts(integration.y1, ys, integration.h, masked, y1_bar, ys_bar)
        without_field = problem._replace(field=None, args=None)
        inputs = solved.params, solved.constants, without_field, restarts
        progress, quadrature = _solve_back(inputs, self._stepper(solved.stepper))
        result = jnp.where(ended, Result.SUCCESS, progress.result).astype(jnp.int32)
        return progress._replace(result=result), quadrature

    def pull_back(
        self, solved: Solved, bar: Integration
    ) -> tuple[InitialValueProblem, Float[Array, " rows"]]:
        """The cotangents of the problem, NaN where the forward or the backward solve failed.

        Moving the time of an output moves the output along its trajectory. Moving the start time
        moves the trajectory the other way.
        """
        back, quadrature = self._solved_back(solved, bar)
        problem, integration, perturbed = solved.problem, solved.integration, solved.perturbed
        y0, ts = problem.y0, problem.ts
        y0_bar = back.y[:, y0.shape[1] :]
        ok = solved.ok & (back.result == Result.SUCCESS)
        valid = nan_unless(ok | solved.masked, y0.dtype)
        if solved.stepper.throw:
            # A failed forward solve has already raised. A solve without steps did not run: `vmap`
            # differentiates both branches of a `cond`, with zeros in place of the solve in the
            # branch that is not taken (or values of the other branch with the same shape, which
            # cannot be told apart).
            ran = solved.ok & ~solved.masked & (integration.stats.num_steps > 0)
            result = jnp.where(ran, back.result, Result.SUCCESS)
            nan = nan_or_raise(result, back.t, where="backward solve")
            # The check is part of the value, so it cannot be eliminated as dead code.
            valid = valid + nan.astype(y0.dtype)

        def by_time(point):
            """`bar . f(t, y)`."""
            t, y, bar = point
            return reduce_rows(jnp.sum, bar * solved.apply(solved.params, t, y), t)

        end = problem.t1, integration.y1, instantiate_zeros(bar.y1, y0)
        t0_bar: Any = by_time((problem.t0, y0, -y0_bar)) if perturbed.t0 else None
        t1_bar: Any = by_time(end) if perturbed.t1 else None
        ts_bar = None
        if ts is not None and perturbed.ts:
            ts_bar = jnp.zeros_like(ts)
            if integration.ys is not None and bar.ys is not None:
                points = ts, padded(problem, integration.ys), bar.ys
                ts_bar = jax.lax.map(by_time, points)
        return InitialValueProblem(*quadrature, y0=y0_bar, t0=t0_bar, t1=t1_bar, ts=ts_bar), valid


NO_FORWARD = (
    "BacksolveAdjoint: can't apply forward-mode differentiation (jax.jvp, jax.jacfwd) to the "
    "adjoint ODE, which has reverse mode (jax.grad, jax.vjp). Use the default, "
    "adjoint=jaxode.DiscreteAdjoint(), which has both."
)


def _differentiable(
    adjoint: BacksolveAdjoint, problem: InitialValueProblem, stepper: Stepper
) -> Integration:
    def run(problem, stepper):
        return solution(adjoint.reverse, problem, stepper)

    return vmappable(run, problem, stepper)


@eqx.filter_custom_vjp
def _solve(
    problem: InitialValueProblem, stepper: Stepper, adjoint: BacksolveAdjoint
) -> Integration:
    """The solution, whose gradient is the adjoint ODE."""
    return _differentiable(adjoint, problem, stepper)


@_solve.def_fwd
def _forward(perturbed, problem: InitialValueProblem, stepper: Stepper, adjoint: BacksolveAdjoint):
    del perturbed
    out = _differentiable(adjoint, problem, stepper)
    return out, out


@_solve.def_bwd
def _backward(out: Integration, bar: Integration, perturbed, problem, stepper, adjoint):
    return pulled_back(adjoint.reverse, problem, stepper, perturbed, (out, None), bar)


class _Restarts(NamedTuple):
    """Where the backward solve starts and restarts, and the rows that it leaves out."""

    y1: Float[Array, "samples n"]
    ys: Float[Array, "times samples n"] | None
    h: Float[Array, " rows"]
    masked: Bool[Array, " rows"]
    y1_bar: Float[Array, "samples n"]
    ys_bar: Float[Array, "times samples n"] | None


def _adjoint_field(of_field: tuple[PyTree, PyTree, Any], t, state, weight):
    """The right-hand side, and the integrand of `b`, weighted and summed over rows.

    Rows are independent, so the weight of a row scales its part of both products, and that by the
    state is scaled back.
    """
    params, constants, piece = of_field
    y, a = jnp.split(state, 2, axis=1)

    def slope(params, y):
        field, args = eqx.combine(params, constants)
        return Slope(field, args, piece)(t, y)

    f, pull = vjp(slope, params, y)
    params_bar, y_bar = pull(-weight[:, None] * a)
    weighted = (weight != 0)[:, None]
    da = jnp.where(weighted, y_bar / jnp.where(weighted, weight[:, None], 1.0), 0.0)
    return jnp.concatenate([f, da], axis=1), params_bar


def _moved_by_ends(x, start, end, of_field):
    """Let the state and the quadrature move with the ends of an empty segment.

    Such a segment, as between `t1` and an output at `t1`, takes no step that would move them.
    """

    def tangent(primals, dots):
        ((state, _), start, end, of_field), (moved, start_dot, end_dot, _) = primals, dots
        if start_dot is None and end_dot is None:
            return moved
        span = instantiate_zeros(end_dot, end) - instantiate_zeros(start_dot, start)
        weight = jnp.where(start == end, span, 0).astype(state.dtype)
        slope, integrand = _adjoint_field(of_field, start, state, weight)
        leaves, structure = jax.tree.flatten((weight[:, None] * slope, integrand))
        before = structure.flatten_up_to(moved)
        return structure.unflatten(
            [new if old is None else old + new for old, new in zip(before, leaves, strict=True)]
        )

    return with_tangent(x, tangent, start, end, of_field)


def _solve_back(inputs, stepper):
    """From the end to the start: the state and its cotangent side by side, `[rows, 2 n]`."""
    params, constants, problem, restarts = inputs
    n, of_field = problem.y0.shape[1], (params, constants, problem.piece)
    adjoint_field = functools.partial(_adjoint_field, of_field)

    def continued(solved, to):
        start = solved[0].t
        after, quadrature = _continued(adjoint_field, stepper, solved, to, problem.t1 - problem.t0)
        y, quadrature = _moved_by_ends((after.y, quadrature), start, to, of_field)
        return after._replace(y=y, t=jnp.where(start == to, to, after.t)), quadrature

    state = jnp.concatenate([restarts.y1, restarts.y1_bar], axis=1)
    result = jnp.where(restarts.masked, Result.NON_FINITE, Result.SUCCESS)
    progress = Progress.start(problem.t1, -restarts.h, state, result)
    quadrature = jax.tree.map(jnp.zeros_like, params)
    ts, ys, ys_bar = problem.ts, restarts.ys, restarts.ys_bar
    if ts is None or ys is None or ys_bar is None:
        return continued((progress, quadrature), problem.t0)

    # One loop for all segments, so that the program holds a single copy of the solve. Each segment
    # ends at a saved time, where the state restarts and the cotangent jumps; the last ends at the
    # start.
    def body(i, solved):
        j = ts.shape[0] - 1 - i
        at_output, j = j >= 0, jnp.maximum(j, 0)
        progress, quadrature = continued(solved, jnp.where(at_output, ts[j], problem.t0))
        y = jnp.where(at_output & ~restarts.masked[:, None], ys[j], progress.y[:, :n])
        a = progress.y[:, n:] + jnp.where(at_output, ys_bar[j], 0.0)
        return progress._replace(y=jnp.concatenate([y, a], axis=1)), quadrature

    return fori_loop(0, ts.shape[0] + 1, body, (progress, quadrature))


def _continued(field: AdjointField, stepper: Stepper, solved, end, span):
    """Continue an adjoint solve, its progress and quadrature, to the times `end`. A failed row
    stays where it is.

    With equal steps, the segment takes its share of the steps of the whole `span`.
    """
    progress, quadrature = solved
    start, before, steps = progress.t, progress.accepted, None
    if stepper.steps is not None:
        share = jnp.abs(end - start) / jnp.where(span == 0, 1.0, jnp.abs(span))
        # 1e-4 allows for rounding in the share.
        steps = jnp.maximum(jnp.ceil(share * stepper.steps - 1e-4), 1).astype(jnp.int32)

    def step(solved):
        now, quadrature = solved
        t, at_end = next_step_end(stepper, steps, now, now.accepted - before, start, end)
        t = jnp.where(now.active, t, now.t)
        y, k, quadrature_where = _stages(field, stepper, now, quadrature, t - now.t)
        then = accept_or_reject(stepper, now, t, at_end, y, k)
        return then, quadrature_where(then.accepted > now.accepted)

    solved = progress._replace(at_end=start == end), quadrature
    return while_loop(lambda solved: solved[0].active.any(), step, solved)


def _stages(field: AdjointField, stepper: Stepper, state: Progress, before, h):
    """The end of a step, its stages, and the quadrature as a function of which rows accept it."""
    method, alone = stepper.method, one_row(h)
    A, c = jnp.asarray(method.A, state.y.dtype), jnp.asarray(method.c, state.t.dtype)
    b = jnp.asarray(method.b, state.y.dtype)

    def evaluate(i, k, h, weight):
        z = state.y + h[:, None] * weighted_sum(A[i], k)
        return field(state.t + c[i] * h, z, weight)

    def add_used(i, quadrature, integrand):
        # A stage of weight zero was evaluated with another weight for the sake of its derivative.
        used = b[i] != 0
        return jax.tree.map(lambda q, dq: q + used.astype(q.dtype) * dq, quadrature, integrand)

    def stage(i, carry):
        k, quadrature = carry
        k_i, integrand = evaluate(i, k, h, jnp.where(b[i] != 0, h * b[i], h))
        if alone:
            quadrature = add_used(i, quadrature, integrand)
        return k.at[i].set(k_i), quadrature

    k = jax.lax.full_like(state.y, 0, shape=(method.stages, *state.y.shape))
    k, quadrature = fori_loop(0, method.stages, stage, (k, before))

    def quadrature_where(accept):
        if alone:

            def keep(new, old):
                return jnp.where(accept[0], new, old)

            return jax.tree.map(keep, quadrature, before)
        # The quadrature sums over rows, so it leaves out rejected rows from the beginning. Zero
        # times their integrand would not do: it may not be finite.
        accepted_h, accepted_k = jnp.where(accept, h, 0.0), jnp.where(accept[:, None], k, 0.0)

        def again(i, q):
            return add_used(i, q, evaluate(i, accepted_k, accepted_h, accepted_h * b[i])[1])

        return fori_loop(0, method.stages, again, before)

    return state.y + h[:, None] * weighted_sum(b, k), k, quadrature_where
