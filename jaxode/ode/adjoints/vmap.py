"""A solve under `jax.vmap`: rows of one solve, wherever that is possible.

`jax.vmap` of a loop goes on in all rows until the last one is done, and writes the entries of a row
at a step number of its own. Rows of a solve with per-sample steps need neither.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxode._jax.closure import ClosedField, close_field
from jaxode._jax.platform import is_for_cpu
from jaxode._jax.primitives import unvmap_any
from jaxode._jax.vmap_rule import Rule, one_by_one, plain, with_vmap_rule
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.problem import Problem, Stepper
from jaxode.ode.loop.trajectory import Trajectory

Solver = Callable[[Problem, Stepper], Integration]

# An evaluation of this many numbers keeps a CPU busy. Measured: benchmarks/NOTES.md.
BUSY_WORK = 20_000
# Values that problems share have a gradient in each of them, up to this size as a row's own.
FEW = 64


def vmappable(solve: Solver, problem: Problem, stepper: Stepper) -> Integration:
    """`solve(problem, stepper)`, which `jax.vmap` runs as rows of one solve where it can."""

    def as_rows(many: Many, mapped: Any, problem: Problem, stepper: Stepper):
        return many.split(solve(many.join(mapped[0], problem, stepper), stepper))

    return _with_rule(solve, _rule(solve, as_rows), problem, stepper)


def _rule(
    f: Callable[..., Any],
    as_rows: Callable[..., Any],
    wanted: Problem | None = None,
    otherwise: Callable[..., Any] | None = None,
) -> Rule:
    """`as_rows(many, mapped, *args)` if problems can be rows of one solve. If not, `jax.vmap` of
    `f`, or of what does the same `otherwise`."""

    def rule(size: int, mapped: Any, *args: Any):
        *_, problem, stepper = args
        if is_busy(problem.field):
            return one_by_one(f, mapped, *args)
        many = Many.of(size, mapped[-2:], problem, stepper, wanted)
        if many is None:
            return plain(otherwise or f, mapped, *args)
        return as_rows(many, mapped, *args)

    return rule


def _with_rule(f: Callable[..., Any], rule: Rule, *args: Any) -> Any:
    """Not where the state is split over what is mapped, nor where a crossing may end it."""
    *_, stepper = args
    if stepper.axis_name is not None or stepper.stop is not None:
        return f(*args)
    return with_vmap_rule(f, rule, *args)


class Reverse(NamedTuple):
    """A gradient method under `jax.vmap(jax.grad(...))`, where each problem has its own gradient.

    As rows of one solve there is no trajectory of each problem, so the way back solves again. In a
    `cond` with a mapped predicate that is not as rows: JAX maps the tolerances there, too.
    """

    record: Callable[[Problem, Stepper], tuple[Integration, Any]]
    """A solution and its trajectory."""
    pull: Callable[[Any, Any, Integration, Problem, Stepper], Problem]
    """`(wanted, recorded, bar, problem, stepper)` -> the cotangents of the problem."""
    wanted: Problem
    """Which leaves are differentiated."""

    def forward(self, problem: Problem, stepper: Stepper) -> tuple[Integration, Any]:
        """`record(problem, stepper)`."""

        def as_rows(many: Many, mapped: Any, problem: Problem, stepper: Stepper):
            one = jax.tree.map(lambda x, its: x[0] if its else x, (problem, stepper), mapped)
            trajectory = jax.eval_shape(self.record, *one)[1]
            if trajectory is not None:
                trajectory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trajectory)
                trajectory = trajectory._replace(count=trajectory.count - 1)
            joined = many.join(mapped[0], problem, stepper)
            return many.split(integrate(joined, stepper)[0]), trajectory

        rule = _rule(self.record, as_rows, self.wanted)
        return _with_rule(self.record, rule, problem, stepper)

    def backward(self, recorded: Any, bar: Integration, problem: Problem, stepper: Stepper):
        """`pull(wanted, recorded, bar, problem, stepper)`."""
        pull = lambda *args: self.pull(self.wanted, *args)

        def pull_of_any(recorded, bar, problem, stepper):
            if recorded[1] is not None:
                # A `cond` may have mixed real tapes and none, and so may any loop.
                missing = unvmap_any(recorded[1].count < 0)
                again = lambda: self._again(problem, stepper, _steps_of(recorded))
                recorded = jax.lax.cond(missing, again, lambda: recorded)
            return pull(recorded, bar, problem, stepper)

        of_each = _rule(pull, self._of_rows, self.wanted, pull_of_any)

        def rule(size: int, mapped: Any, *args: Any):
            if not any(jax.tree.leaves((mapped[0], mapped[2:]))):
                return self._of_several(pull, rule, mapped, *args)
            return of_each(size, mapped, *args)

        return _with_rule(pull, rule, recorded, bar, problem, stepper)

    def _of_several(self, pull, rule: Rule, mapped: Any, *args: Any):
        """Several cotangents of one solution, as in `jax.jacrev`. Other axes may be mapped, too."""
        several = lambda *args: plain(pull, mapped, *args)

        def outer(size: int, by_outer: Any, recorded, bars, problem, stepper):
            axis = lambda inner, outer: int(outer) if inner else None
            axes = jax.tree.map(axis, mapped[1], by_outer[1])
            one = lambda bar: rule(size, by_outer, recorded, bar, problem, stepper)
            return jax.vmap(one, (axes,), 1)(bars)

        return _with_rule(several, outer, *args)

    def _of_rows(self, many: "Many", mapped: Any, recorded: Any, bar, problem, stepper):
        of_recorded, of_bar, own, _ = mapped
        spread = lambda x, its: x if its else many.spread(x)
        copied = lambda x, its, wanted: spread(x, its) if wanted else x
        problem = jax.tree.map(copied, problem, own, self.wanted)
        own = jax.tree.map(operator.or_, own, self.wanted)
        values, rest = eqx.partition(problem, self.wanted)
        wanted = many.flags(own, self.wanted)

        def join(values):
            joined = many.join(own, eqx.combine(values, rest), stepper)
            return eqx.filter(joined, wanted), joined

        _, split_bars, joined = jax.vjp(join, values, has_aux=True)
        wanted = wanted._replace(field=joined.field)  # which has no constants of its own
        ran = spread(_steps_of(recorded), _steps_of(of_recorded)).reshape(joined.t0.shape)
        recorded = self._again(joined, stepper, ran)
        solutions, join_bars = jax.vjp(many.split, eqx.filter(recorded[0], eqx.is_inexact_array))

        def instantiate_zeros(like, bar, its):
            return jnp.zeros_like(like) if bar is None else spread(bar, its)

        (bar,) = join_bars(jax.tree.map(instantiate_zeros, solutions, bar, of_bar))
        return split_bars(self.pull(wanted, recorded, bar, joined, stepper))[0]

    def _again(self, problem: Problem, stepper: Stepper, ran: Int[Array, " rows"]):
        """Solve again. A solve that did not run, in a branch that is not taken, must not seem to
        have run."""
        return eqx.tree_at(_steps_of, self.record(problem, stepper), ran)


def _steps_of(recorded: tuple[Integration, Any]) -> Any:
    return recorded[0].stats.num_steps


def is_busy(field: ClosedField) -> bool:
    """Whether evaluations one after the other are as fast as those of many rows at once."""
    return is_for_cpu() and field.work_size >= BUSY_WORK


class Many(NamedTuple):
    """`size` problems of `rows` rows each, and the same as rows of one problem.

    A problem with one row becomes a row whose sample has all of its numbers.
    """

    size: int
    rows: int
    sample: tuple[int, ...]
    """The shape `[samples, n]` of the states of one problem."""

    @classmethod
    def of(
        cls,
        size: int,
        mapped: tuple[Problem, Stepper],
        problem: Problem,
        stepper: Stepper,
        wanted: Any = None,
    ) -> "Many | None":
        """None if mapped problems can't be rows. With the leaves that are `wanted`, for a gradient
        of each problem."""
        (of_problem, of_stepper), rows = mapped, problem.t0.shape[-1]
        samples, n = problem.y0.shape[-2:]
        shared = of_problem.field, of_problem.args[0]
        if size * rows == 0 or any(jax.tree.leaves(of_stepper)):
            return None
        if rows == 1 < samples and (stepper.method.implicit or stepper.controller.atol.ndim):
            # All samples of a problem would have one Jacobian, and tolerances are those of one.
            return None
        if wanted is not None:
            copied = eqx.filter(problem, wanted)
            copied = eqx.filter((copied.field, copied.args[0]), shared, inverse=True)
            if sum(x.size for x in jax.tree.leaves(copied)) > FEW:
                return None
        return cls(size, rows, (samples, n))

    def join(self, mapped: Problem, problem: Problem, stepper: Stepper) -> Problem:
        """Solve one problem. `mapped` leaves have a leading axis, others are shared."""
        spread = lambda x, its: x if its else self.spread(x)

        def of_rows(name: str, axis: int) -> Any:
            x = getattr(problem, name)
            return None if x is None else self._join(spread(x, getattr(mapped, name)), axis)

        names, axes = ("t0", "t1", "ts", "outputs", "h0", "piece"), (0, 0, 1, 0, 0, 0)
        t0, t1, *rest = map(of_rows, names, axes)
        y0 = spread(problem.y0, mapped.y0).reshape(len(t0), -1)
        is_own, of_row = self._own(mapped), self._of_row(mapped)
        merge = lambda x: x.reshape(self.size * x.shape[1], *x.shape[2:])
        separate = lambda x: x.reshape(self.size, -1, *x.shape[1:])
        merged = lambda x, its, of_row: merge(spread(x, its)) if of_row else x
        parts = (problem.field, problem.args), (mapped.field, mapped.args), of_row
        own, shared = eqx.partition(jax.tree.map(merged, *parts), is_own)
        own_of_row = eqx.filter(of_row, is_own)

        def of_all(call, axes: int):
            def joined(t, y, args):
                shared, own = args

                def one(t, y, own):
                    field, args = eqx.combine(own, shared)
                    return call(field)(t, y, args)

                states = y.reshape(self.size, *self.sample)
                times = t.reshape(self.size, self.rows)
                own = jax.tree.map(lambda x, its: separate(x) if its else x, own, own_of_row)
                out = jax.vmap(one)(times, states, own)
                return out.reshape(len(y), *y.shape[1:] * axes)

            return joined

        field, jacobian = of_all(lambda field: field, 1), None
        if problem.field.jacobian is not None:
            jacobian = of_all(lambda field: field.jacobian, 2)
        given = t0, y0, (shared, own)
        closed, args = close_field(stepper.precision, field, *given, jacobian=jacobian)
        return Problem(closed, args, y0, t0, t1, *rest)

    def flags(self, mapped: Problem, wanted: Problem) -> Problem:
        """Which leaves of one problem are `wanted`, where all of them are `mapped`."""
        own, shared = eqx.partition((wanted.field, wanted.args), self._own(mapped))
        return wanted._replace(field=False, args=(shared, own))

    def _own(self, mapped: Problem) -> PyTree:
        """Which values of `(field, args)` belong to a row, or to the rows of a problem."""
        return jax.tree.map(operator.or_, self._of_row(mapped), (mapped.field, mapped.args))

    def _of_row(self, problem: Problem) -> PyTree:
        """Which values of `(field, args)` each row of a problem has for itself."""
        shared, of_rows = problem.args
        flags = lambda flag, tree: jax.tree.map(lambda _: flag, tree)
        return flags(False, problem.field), (flags(False, shared), flags(self.rows > 1, of_rows))

    def spread(self, x: Array) -> Array:
        """The same for each problem."""
        return jnp.broadcast_to(x, (self.size, *x.shape))

    def split(self, joined: Integration) -> Integration:
        """Solve each problem; the results have a leading axis."""
        states = lambda x, axis: self._split(x, axis, self.sample)
        trajectory = joined.trajectory
        if isinstance(trajectory, Trajectory):
            times, count = (
                self._split(trajectory.times, 1),
                jax.tree.map(self.spread, trajectory.count),
            )
            y, k = states(trajectory.y, 1), states(trajectory.k, 2)
            trajectory = Trajectory(times, count, y, k)
        ys = None if joined.ys is None else states(joined.ys, 1)
        parts = joined._replace(y1=None, ys=None, trajectory=None)
        return jax.tree.map(lambda x: self._split(x, 0), parts)._replace(
            y1=states(joined.y1, 0), ys=ys, trajectory=trajectory
        )

    def _join(self, x: Array, axis: int) -> Array:
        """`[size, ..., rows]`, with the rows at this `axis` of one problem, as rows of all."""
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], self.size * self.rows, *x.shape[axis + 2 :])

    def _split(self, x: Array, axis: int, sample: tuple[int, ...] | None = None) -> Array:
        """The inverse of `_join`. States are given by the shape of a `sample`."""
        shape = (self.rows, *x.shape[axis + 1 :]) if sample is None else sample
        return jnp.moveaxis(x.reshape(*x.shape[:axis], self.size, *shape), axis, 0)
