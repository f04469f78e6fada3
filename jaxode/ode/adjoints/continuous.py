"""The adjoint ODE: its right-hand side, and a solver that keeps the parameters out of the state.

With `a(t)` the cotangent of `y(t)`, the adjoint theorem reads

    da/dt = -a df/dy,    db/dt = -a df/dparams,    b = 0 at the end,

and the gradients are `a` and `b` at the start (Pontryagin 1962; Chen et al. 2018,
arXiv:1806.07366). `b` does not feed back, so it is a quadrature: an accumulator as large as the
parameters, which is part of neither the state nor the error norm.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import non_negative
from jaxode._checks.caller import public
from jaxode._checks.errors import Result, nan_or_raise
from jaxode._jax.pullback import vjp
from jaxode._jax.sharding import fori_loop, while_loop
from jaxode._jax.tangents import filled
from jaxode.ode.adjoints.base import ReverseAdjoint, Solved, nan_unless
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.outputs import padded
from jaxode.ode.loop.problem import Problem, Stepper, weighted_sum
from jaxode.ode.loop.progress import Progress, aim, judge
from jaxode.ode.loop.rows import one_row, over_rows

# (t [rows], state [samples, n], weight [rows]) -> (derivative [samples, n], weighted integrand)
AdjointField = Callable[..., tuple[Float[Array, "samples n"], PyTree]]


def adjoint_product(
    apply: Callable[..., Float[Array, "samples n"]],
    params: PyTree,
    t: Float[Array, " rows"],
    y: Float[Array, "samples n"],
    a: Float[Array, "samples n"],
    weight: Float[Array, " rows"],
):
    """`f`, `-a df/dy` and `-sum over rows of weight a df/dparams`, from one `vjp`.

    Rows are independent, so scaling a row's cotangent by its weight scales its part of both
    products. The first product is then scaled back.
    """
    f, pull = vjp(lambda params, y: apply(params, t, y), params, y)
    params_bar, y_bar = pull(-weight[:, None] * a)
    moving = (weight != 0)[:, None]
    return f, jnp.where(moving, y_bar / jnp.where(moving, weight[:, None], 1.0), 0.0), params_bar


class Segment(NamedTuple):
    """How far an adjoint solve has come."""

    progress: Progress
    quadrature: PyTree

    @property
    def y(self) -> Float[Array, "samples n"]:
        return self.progress.y

    @classmethod
    def start(cls, t, h, y, quadrature, failed) -> "Segment":
        """Start at the end of a forward solve. Rows that failed stay there."""
        result = jnp.where(failed, Result.NON_FINITE, Result.SUCCESS)
        return cls(Progress.start(t, h, y, result), quadrature)

    def moved(self, **fields: Array) -> "Segment":
        """With other values in its progress."""
        return self._replace(progress=self.progress._replace(**fields))


def solve_segment(
    field: AdjointField,
    stepper: Stepper,
    segment: Segment,
    end: Float[Array, " rows"],
    span: Float[Array, " rows"],
) -> Segment:
    """Continue an adjoint solve to the time `end`. A failed row stays where it is.

    With equal steps, the segment takes its share of the steps of the whole `span`.
    """
    start, before = segment.progress.t, segment.progress.accepted
    steps = None
    if stepper.steps is not None:
        share = jnp.abs(end - start) / jnp.where(span == 0, 1.0, jnp.abs(span))
        # 1e-4 allows for rounding in the share.
        steps = jnp.maximum(jnp.ceil(share * stepper.steps - 1e-4), 1).astype(jnp.int32)

    def step(segment: Segment) -> Segment:
        now = segment.progress
        ahead = aim(stepper, steps, now, now.accepted - before, start, end)
        ahead = ahead._replace(t=jnp.where(now.active, ahead.t, now.t))
        y, k, quadrature_where = _stages(field, stepper, segment, ahead.t - now.t)
        accept, then = judge(stepper, now, ahead, y, k)
        # A step cut short to reach the end says little about the next one.
        longer = jnp.abs(then.h) > jnp.abs(now.h)
        h = jnp.where(accept & ahead.last & ~longer, now.h, then.h)
        then = then._replace(h=jax.lax.stop_gradient(h))
        return Segment(then, quadrature_where(accept))

    segment = segment.moved(done=start == end)
    return while_loop(lambda segment: segment.progress.active.any(), step, segment)


def _stages(field: AdjointField, stepper: Stepper, segment: Segment, h: Float[Array, " rows"]):
    """The end of a step, its stages, and the quadrature as a function of which rows accept it."""
    tableau, state, alone = stepper.tableau, segment.progress, one_row(h)
    A, c = jnp.asarray(tableau.A, state.y.dtype), jnp.asarray(tableau.c, state.t.dtype)
    b = jnp.asarray(tableau.b, state.y.dtype)

    def evaluate(i, k, h, weight):
        z = state.y + h[:, None] * weighted_sum(A[i], k)
        return field(state.t + c[i] * h, z, weight)

    def add_used(i, quadrature, integrand):
        # A stage of weight zero got another weight, because its derivative is needed.
        used = b[i] != 0
        return jax.tree.map(lambda q, dq: q + used.astype(q.dtype) * dq, quadrature, integrand)

    def stage(i, carry):
        k, quadrature = carry
        k_i, integrand = evaluate(i, k, h, jnp.where(b[i] != 0, h * b[i], h))
        if alone:
            quadrature = add_used(i, quadrature, integrand)
        return k.at[i].set(k_i), quadrature

    k = jax.lax.full_like(state.y, 0, shape=(tableau.stages, *state.y.shape))
    k, quadrature = fori_loop(0, tableau.stages, stage, (k, segment.quadrature))

    def quadrature_where(accept):
        if alone:
            keep = lambda new, old: jnp.where(accept[0], new, old)
            return jax.tree.map(keep, quadrature, segment.quadrature)
        # The quadrature sums over rows, so rejected rows must be known beforehand: zero times their
        # integrand is no way out, as it may not be finite.
        taken, kept = jnp.where(accept, h, 0.0), jnp.where(accept[:, None], k, 0.0)
        again = lambda i, q: add_used(i, q, evaluate(i, kept, taken, taken * b[i])[1])
        return fori_loop(0, tableau.stages, again, segment.quadrature)

    return state.y + h[:, None] * weighted_sum(b, k), k, quadrature_where


@dataclass(frozen=True)
class ContinuousAdjoint(ReverseAdjoint):
    """Solve the adjoint ODE backwards, with its own tolerances."""

    solves_backwards: ClassVar[bool] = True
    rtol: float | None = None
    atol: float | None = None

    @public("")
    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None:
                non_negative(name, value, "None or a finite tolerance of at least 0")

    def backward_stepper(self, stepper: Stepper) -> Stepper:
        given = {"rtol": stepper.rtol, "atol": jnp.min(stepper.atol, initial=jnp.inf)}
        for name, own in (("rtol", self.rtol), ("atol", self.atol)):
            if own is not None:
                given[name] = jnp.asarray(own, stepper.rtol.dtype)
        return dataclasses.replace(stepper, **given)

    def solve_back(self, solved: Solved, bar: Integration) -> Segment:
        """The adjoint solve. The last `n` entries of its state are the cotangent of `y0`."""
        raise NotImplementedError

    def pull_back(self, solved: Solved, bar: Integration) -> tuple[Problem, Float[Array, " rows"]]:
        """The cotangents of the problem, NaN where the forward or the backward solve failed.

        Moving the time of an output moves the output along its trajectory. Moving the start time
        moves the trajectory the other way.
        """
        segment = self.solve_back(solved, bar)
        integration, wanted, stepper = solved.integration, solved.perturbed, solved.stepper
        problem = solved.problem
        y0, ts = problem.y0, problem.ts
        y0_bar = segment.y[:, segment.y.shape[1] - y0.shape[1] :]
        valid = nan_unless(
            solved.ok & (segment.progress.result == Result.SUCCESS) | solved.replaced, y0.dtype
        )
        if stepper.raises:
            # A failed forward solve has already raised. A solve without steps did not run: `vmap`
            # differentiates both branches of a `cond`, with zeros in place of the solve in the
            # branch that is not taken (or values of the other branch with the same shape, which
            # cannot be told apart).
            ran = solved.ok & ~solved.replaced & (integration.stats.num_steps > 0)
            result = jnp.where(ran, segment.progress.result, Result.SUCCESS)
            nan = nan_or_raise(result, segment.progress.t, where="backward solve")
            # The check is part of the value, so it cannot be eliminated as dead code.
            valid = valid + nan.astype(y0.dtype)

        def by_time(point):
            """`bar . f(t, y)`."""
            t, y, bar = point
            return over_rows(jnp.sum, bar * solved.apply(solved.params, t, y), t)

        end = problem.t1, integration.y1, filled(bar.y1, y0)
        t0_bar: Any = by_time((problem.t0, y0, -y0_bar)) if wanted.t0 else None
        t1_bar: Any = by_time(end) if wanted.t1 else None
        ts_bar = None
        if ts is not None and wanted.ts:
            ts_bar = jnp.zeros_like(ts)
            if integration.ys is not None and bar.ys is not None:
                points = ts, padded(problem, integration.ys), bar.ys
                ts_bar = jax.lax.map(by_time, points)
        return Problem(*segment.quadrature, y0=y0_bar, t0=t0_bar, t1=t1_bar, ts=ts_bar), valid
