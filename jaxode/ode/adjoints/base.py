"""Base classes for gradient methods."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.errors import Result
from jaxode._jax.closure import ClosedField
from jaxode.ode.adjoints.flat import solution, undifferentiated
from jaxode.ode.adjoints.vmap import Reverse, vmappable
from jaxode.ode.loop.initial_value_problem import InitialValueProblem, Slope
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.outputs import beyond
from jaxode.ode.loop.rows import of_group, one_row, reduce_rows, replace_rows
from jaxode.ode.loop.step_tangents import step_tangents
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.loop.trajectory import Trajectory


class Adjoint:
    """A gradient method: a frozen dataclass, compared by value.

    `integrate` runs inside the compiled program. Times and flags are per row, states per sample,
    with one row for each sample or one for all of them (`loop/rows.py`). It returns the same
    `Integration` as the loop (`loop/integrate.py`), which most methods run:

    - `ys[i]`, the states at `problem.ts[i]`, or None without `ts`. From `problem.outputs` on, they
      are padding, which the caller overwrites.
    - `result` per row. A row fails alone, and its `y1` and `ys` are NaN. A row for which `all_hold`
      is false takes no steps and has `INVALID_ARGUMENT`. A row with an empty span keeps `y0`, even
      if the field is not finite; its derivatives with respect to times are those of the ODE.
    - `stats` up to the end or the failure, where a step that is not finite counts as rejected.
    - `t_reached`, which is `t1`, or the end of the last accepted step of a row that failed.
    - `h`, zero without error control; `trajectory`, only if `stepper.dense`; `stopped`, only with
      `stepper.stop`: the rows that a crossing ended. Its time, `t_reached`, is held fixed by
      derivatives, and outputs beyond it repeat `y1`.

    Derivatives: with respect to all floating leaves of `problem`, none of `stepper`. Those of a
    failed row are NaN, and so are those of what it shares with other rows. If its cotangents are
    zero, it should add nothing to any gradient instead.

    Errors are raised at trace time: `"<Class>: <rule>; got <value>. <What to change>."`. At run
    time the caller raises by `result`; only a failed backward solve is raised here, if
    `stepper.throw`.

    What a method can do beyond that stands in attributes, which the rest of the library asks for.
    """

    supports_dense: ClassVar[bool] = False
    """Whether it returns and differentiates `Integration.trajectory`, for `dense=True`."""
    solves_backwards: ClassVar[bool] = False
    """Whether its gradient is a solve of its own, with tolerances and errors."""
    forward_only: ClassVar[bool] = False
    """Whether it has `jax.jvp` and `jax.jacfwd` only."""
    fused: ClassVar[bool] = False
    """Whether it can `record`, for the likelihood loss, which goes back over the steps itself."""

    def integrate(self, problem: InitialValueProblem, stepper: Stepper) -> Integration:
        """Solve the problem. Differentiable in all of its floating leaves."""
        raise NotImplementedError


class Solved(NamedTuple):
    """A recorded solve, for the backward pass.

    Rows that failed or took no step are masked if nothing depends on them. In `problem` and
    `integration`, the first successful row replaces each of them. The field is evaluated at its
    start, because the recorded steps of a masked row may not be finite.
    """

    problem: InitialValueProblem
    perturbed: InitialValueProblem
    """Which leaves are differentiated."""
    stepper: Stepper
    integration: Integration
    trajectory: Trajectory | None
    masked: Bool[Array, " rows"]
    params: PyTree
    """The differentiated leaves of `(field, args, *others)`."""
    constants: PyTree
    """Its other leaves."""

    @classmethod
    def make(
        cls,
        problem: InitialValueProblem,
        perturbed: InitialValueProblem,
        stepper: Stepper,
        recorded: tuple[Integration, Trajectory | None],
        masked: Bool[Array, " rows"],
        others: tuple[Any, ...] = (),
        perturbed_others: tuple[Any, ...] = (),
    ) -> "Solved":
        """Mask rows of a recorded solve. `others` are differentiated together with the field."""
        if isinstance(problem.field, ClosedField):
            problem.field.check_closed_over(perturbed.field, problem.y0)
        integration, trajectory = recorded
        ok = (integration.result == Result.SUCCESS) & ~masked
        shared, row_args = problem.args

        def replace(tree):
            return replace_rows(tree, masked, ok, row_args)

        ts, ys = jax.tree.map(jax.vmap(replace), (problem.ts, integration.ys))
        integration = integration._replace(y1=replace(integration.y1), ys=ys)
        rows = replace(problem._replace(field=None, args=row_args, ts=None))
        problem = rows._replace(field=problem.field, args=(shared, rows.args), ts=ts)
        field_and_args = (problem.field, problem.args, *others)
        flags = (perturbed.field, perturbed.args, *perturbed_others)
        params, constants = eqx.partition(field_and_args, flags)
        return cls(problem, perturbed, stepper, integration, trajectory, masked, params, constants)

    @property
    def ok(self) -> Bool[Array, " rows"]:
        """Rows that succeeded."""
        return self.integration.result == Result.SUCCESS

    @property
    def timed(self) -> bool:
        """Whether times are differentiated."""
        return bool(self.perturbed.t0 or self.perturbed.t1 or self.perturbed.ts)

    def step_tangents(self, t: Float[Array, " rows"], h: Float[Array, " rows"], number: Array):
        """Differentiate the times of a step by the two ends."""
        return step_tangents(self.problem, t, h, number, self.stepper.stop is not None)

    def field_and_args(self, params: PyTree) -> tuple[Any, ...]:
        """`(field, args, *others)` with these differentiated leaves."""
        return eqx.combine(params, self.constants)

    def slope(self, params: PyTree) -> Slope:
        """The vector field with these differentiated leaves."""
        field, args, *_ = self.field_and_args(params)
        return Slope(field, args, self.problem.piece, self.finite)

    def apply(self, params: PyTree, t: Float[Array, " rows"], y: Float[Array, "samples n"]):
        """The vector field as a function of the differentiated leaves."""
        return self.slope(params)(t, y)

    def finite(self, t: Float[Array, " rows"], y: Float[Array, "samples n"]):
        """Replace the time and the state by those of the start in masked rows."""
        if one_row(self.masked):
            return t, y
        problem, masked = self.problem, self.masked
        return jnp.where(masked, problem.t0, t), jnp.where(masked[:, None], problem.y0, y)

    def mask(self, bars: InitialValueProblem, valid: Float[Array, " rows"]) -> InitialValueProblem:
        """Multiply cotangents by `valid` of their row, or of all rows that share a leaf.

        Cotangents of masked rows are zero, and so are those of leaves that only masked rows share.
        """

        def per_row(x):
            factor = of_group(jnp.prod, valid, x).astype(x.dtype)
            return jnp.where(of_group(jnp.all, self.masked, x), 0, x * factor)

        shared, row_args = bars.args
        field, shared = jax.tree.map(lambda x: per_row(x[None])[0], (bars.field, shared))
        args = shared, jax.tree.map(per_row, row_args)
        y0, t0, t1 = jax.tree.map(per_row, (bars.y0, bars.t0, bars.t1))
        ts = jax.tree.map(jax.vmap(per_row), bars.ts)
        return eqx.filter(InitialValueProblem(field, args, y0, t0, t1, ts), self.perturbed)


def without_cotangent(bar: Integration, of_rows: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which rows have zero cotangents: nothing depends on them."""
    bars = [(bar.y1, 0), (bar.ys, 1)]
    if bar.trajectory is not None:
        times, _, y, k, *_ = bar.trajectory
        bars += [(times, 1), (y, 1), (k, 2)]
    none = jnp.ones(of_rows.shape, bool)
    for x, samples in bars:
        if x is not None:
            none &= reduce_rows(jnp.all, jnp.moveaxis(x == 0, samples, 0), of_rows)
    return none


def nan_unless(ok: Bool[Array, "*rows"], dtype) -> Float[Array, "*rows"]:
    """The factor of a gradient: one, or NaN with NaN tangents. A failed solve has no gradient."""
    return jnp.where(ok, 1.0, jnp.nan).astype(dtype)


class ReverseAdjoint(Adjoint):
    """A gradient method with a backward pass of its own, in every mode and order."""

    checkpoints: int
    """The number of states to replay from, for a method that inherits `record`."""

    def integrate(self, problem: InitialValueProblem, stepper: Stepper) -> Integration:
        def run(problem, stepper):
            return solution(self.reverse, problem, stepper)

        return vmappable(run, problem, undifferentiated(stepper))

    def record(
        self, problem: InitialValueProblem, stepper: Stepper
    ) -> tuple[Integration, Trajectory | None]:
        """Solve the problem, and record what the backward pass needs."""
        return integrate(problem, stepper, self.checkpoints)

    def pull_back(self, solved: Solved, bar: Integration) -> tuple[InitialValueProblem, Any]:
        """The cotangents of the problem, and a factor per row that is NaN where there are none.

        `bar` has the cotangents of `y1`, `ys` and `trajectory`, or None. The caller masks the
        result.
        """
        raise NotImplementedError

    def reverse(self, perturbed: InitialValueProblem) -> Reverse:
        """The record and the backward pass under `jax.vmap`, for `perturbed` leaves."""

        def pull(
            perturbed: InitialValueProblem,
            recorded,
            bar: Integration,
            problem: InitialValueProblem,
            stepper: Stepper,
        ):
            # A row that took no step may start where the field is not finite.
            out = recorded[0]
            useless = (out.result != Result.SUCCESS) | (out.stats.num_accepted == 0)
            masked = without_cotangent(bar, problem.t0) & useless
            solved = Solved.make(ended(problem, out), perturbed, stepper, recorded, masked)
            bars = solved.mask(*self.pull_back(solved, bar))
            stopped = out.stopped
            if stopped is None or bars.t1 is None:
                return bars
            return bars._replace(t1=jnp.where(stopped, 0, bars.t1))

        return Reverse(self.record, pull, perturbed)


def ended(problem: InitialValueProblem, out: Integration) -> InitialValueProblem:
    """The problem up to where a crossing ended a row, a time that is held fixed."""
    if out.stopped is None:
        return problem
    t1, ts = jnp.where(out.stopped, jax.lax.stop_gradient(out.t_reached), problem.t1), problem.ts
    if ts is not None:
        ts = jnp.where(out.stopped[None] & beyond(problem, t1), t1[None], ts)
    return problem._replace(t1=t1, ts=ts)
