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
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.loop.trajectory import Trajectory

Solver = Callable[[InitialValueProblem, Stepper], Integration]

# An evaluation of this many numbers keeps a CPU busy. Measured: benchmarks/NOTES.md.
BUSY_WORK = 20_000
# For the gradient of each problem, values that problems share are copied to each row, up to this
# many numbers.
MOST_COPIED = 64
# Fields of a problem with an entry for each row, and which of their axes counts the rows.
AXIS_OF_ROWS = {"t0": 0, "t1": 0, "ts": 1, "outputs": 0, "h0": 0, "piece": 0}


def vmappable(solve: Solver, problem: InitialValueProblem, stepper: Stepper) -> Integration:
    """`solve(problem, stepper)`, which `jax.vmap` runs as rows of one solve where it can."""

    def as_rows(many: Many, mapped: Any, problem: InitialValueProblem, stepper: Stepper):
        return many.split(solve(many.join(mapped[0], problem, stepper), stepper))

    return _with_rule(solve, _rule(solve, as_rows), problem, stepper)


def _rule(
    f: Callable[..., Any],
    as_rows: Callable[..., Any],
    perturbed: InitialValueProblem | None = None,
    otherwise: Callable[..., Any] | None = None,
) -> Rule:
    """The rule that runs `as_rows(many, mapped, *args)` if problems can be rows of one solve.

    If they cannot, it is `jax.vmap` of `otherwise`, which does the same as `f`, or of `f`.
    """

    def rule(size: int, mapped: Any, *args: Any):
        *_, problem, stepper = args
        if is_busy(problem.field):
            return one_by_one(f, mapped, *args)
        many = Many.of_problems(size, mapped[-2:], problem, stepper, perturbed)
        if many is None:
            return plain(otherwise or f, mapped, *args)
        return as_rows(many, mapped, *args)

    return rule


def _with_rule(f: Callable[..., Any], rule: Rule, *args: Any) -> Any:
    """`f(*args)` with the rule, unless devices split the state or a crossing may end it."""
    *_, stepper = args
    if stepper.axis_name is not None or stepper.stop is not None:
        return f(*args)
    return with_vmap_rule(f, rule, *args)


class Reverse(NamedTuple):
    """A gradient method under `jax.vmap(jax.grad(...))`, where each problem has its own gradient.

    Rows of one solve have no trajectory of each problem, so the way back solves again. In a `cond`
    with a mapped predicate it does not solve rows, because JAX also maps the tolerances there.
    """

    record: Callable[[InitialValueProblem, Stepper], tuple[Integration, Any]]
    """A solution and its trajectory."""
    pull: Callable[[Any, Any, Integration, InitialValueProblem, Stepper], InitialValueProblem]
    """`(wanted, recorded, bar, problem, stepper)` -> the cotangents of the problem."""
    perturbed: InitialValueProblem
    """Which leaves are differentiated."""

    def forward(self, problem: InitialValueProblem, stepper: Stepper) -> tuple[Integration, Any]:
        """`record(problem, stepper)`."""

        def as_rows(many: Many, mapped: Any, problem: InitialValueProblem, stepper: Stepper):
            one = jax.tree.map(lambda x, its: x[0] if its else x, (problem, stepper), mapped)
            trajectory = jax.eval_shape(self.record, *one)[1]
            if trajectory is not None:
                trajectory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trajectory)
                trajectory = trajectory._replace(count=trajectory.count - 1)
            joined = many.join(mapped[0], problem, stepper)
            return many.split(integrate(joined, stepper)[0]), trajectory

        rule = _rule(self.record, as_rows, self.perturbed)
        return _with_rule(self.record, rule, problem, stepper)

    def backward(
        self, recorded: Any, bar: Integration, problem: InitialValueProblem, stepper: Stepper
    ):
        """`pull(wanted, recorded, bar, problem, stepper)`."""

        def pull(*args):
            return self.pull(self.perturbed, *args)

        def pull_of_any(recorded, bar, problem, stepper):
            if recorded[1] is not None:
                # A `cond` or a loop may have selected between real tapes and empty ones.
                missing = unvmap_any(recorded[1].count < 0)

                def again():
                    return self._again(problem, stepper, _steps_of(recorded))

                recorded = jax.lax.cond(missing, again, lambda: recorded)
            return pull(recorded, bar, problem, stepper)

        of_each = _rule(pull, self._of_rows, self.perturbed, pull_of_any)

        def rule(size: int, mapped: Any, *args: Any):
            if not any(jax.tree.leaves((mapped[0], mapped[2:]))):
                return self._of_several(pull, rule, mapped, *args)
            return of_each(size, mapped, *args)

        return _with_rule(pull, rule, recorded, bar, problem, stepper)

    def _of_several(self, pull, rule: Rule, mapped: Any, *args: Any):
        """Several cotangents of one solution, as in `jax.jacrev`. Other axes may be mapped, too."""

        def several(*args):
            return plain(pull, mapped, *args)

        def outer(size: int, by_outer: Any, recorded, bars, problem, stepper):
            def axis(inner, outer):
                return int(outer) if inner else None

            axes = jax.tree.map(axis, mapped[1], by_outer[1])
            if not any(jax.tree.leaves((by_outer[0], by_outer[2:]))):  # another axis of cotangents
                return plain(several, by_outer, recorded, bars, problem, stepper)

            def one(bar):
                return rule(size, by_outer, recorded, bar, problem, stepper)

            return jax.vmap(one, (axes,), 1)(bars)

        return _with_rule(several, outer, *args)

    def _of_rows(self, many: "Many", mapped: Any, recorded: Any, bar, problem, stepper):
        of_recorded, of_bar, of_problem, _ = mapped

        def of_each(x, its, perturbed):
            return many.spread(x, its) if perturbed else x

        problem = jax.tree.map(of_each, problem, of_problem, self.perturbed)
        of_problem = jax.tree.map(operator.or_, of_problem, self.perturbed)
        values, constants = eqx.partition(problem, self.perturbed)
        perturbed = many.flags(of_problem, self.perturbed)

        def join(values):
            joined = many.join(of_problem, eqx.combine(values, constants), stepper)
            return eqx.filter(joined, perturbed), joined

        _, split_bars, joined = jax.vjp(join, values, has_aux=True)
        perturbed = perturbed._replace(field=joined.field)  # it has no constants
        ran = many.spread(_steps_of(recorded), _steps_of(of_recorded)).reshape(joined.t0.shape)
        recorded = self._again(joined, stepper, ran)
        solutions, join_bars = jax.vjp(many.split, eqx.filter(recorded[0], eqx.is_inexact_array))

        def instantiate_zeros(like, bar, its):
            return jnp.zeros_like(like) if bar is None else many.spread(bar, its)

        (bar,) = join_bars(jax.tree.map(instantiate_zeros, solutions, bar, of_bar))
        return split_bars(self.pull(perturbed, recorded, bar, joined, stepper))[0]

    def _again(self, problem: InitialValueProblem, stepper: Stepper, ran: Int[Array, " rows"]):
        """Solve again, with the numbers of steps that `ran`.

        A solve in a branch that was not taken must not seem to have run.
        """
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
    def of_problems(
        cls,
        size: int,
        mapped: tuple[InitialValueProblem, Stepper],
        problem: InitialValueProblem,
        stepper: Stepper,
        perturbed: Any = None,
    ) -> "Many | None":
        """The sizes of mapped problems, or None if they cannot be rows of one.

        With `perturbed` leaves, they are rows for the gradient of each problem.
        """
        (of_problem, of_stepper), rows = mapped, problem.t0.shape[-1]
        samples, n = problem.y0.shape[-2:]
        shared = of_problem.field, of_problem.args[0]
        if size * rows == 0 or any(jax.tree.leaves(of_stepper)):
            return None
        if rows == 1 < samples and (stepper.method.implicit or stepper.controller.atol.ndim):
            # Such a row would have one Jacobian for all of its samples, and tolerances for one.
            return None
        if perturbed is not None:
            copied = eqx.filter(problem, perturbed)
            copied = eqx.filter((copied.field, copied.args[0]), shared, inverse=True)
            if sum(x.size for x in jax.tree.leaves(copied)) > MOST_COPIED:
                return None
        return cls(size, rows, (samples, n))

    def join(
        self, mapped: InitialValueProblem, problem: InitialValueProblem, stepper: Stepper
    ) -> InitialValueProblem:
        """All problems as one. `mapped` leaves have a leading axis, others are shared."""
        of_rows = {
            name: self._join(self.spread(x, getattr(mapped, name)), axis)
            for name, axis in AXIS_OF_ROWS.items()
            if (x := getattr(problem, name)) is not None
        }
        t0 = of_rows["t0"]
        y0 = self.spread(problem.y0, mapped.y0).reshape(len(t0), -1)
        args, of_row = self._join_args(mapped, problem)
        field, jacobian = self._on_all(lambda field: field, of_row, 1), None
        if problem.field.jacobian is not None:
            jacobian = self._on_all(lambda field: field.jacobian, of_row, 2)
        closed, args = close_field(stepper.precision, field, t0, y0, args, jacobian=jacobian)
        return problem._replace(field=closed, args=args, y0=y0, **of_rows)

    def _join_args(
        self, mapped: InitialValueProblem, problem: InitialValueProblem
    ) -> tuple[tuple[PyTree, PyTree], PyTree]:
        """The values of `(field, args)` as `(shared, row_args)`, and flags of the latter.

        The flags mark values with a first axis of all rows. In the others it counts the problems.
        """
        of_row, in_row_args = self._of_row(mapped), self._in_row_args(mapped)

        def joined(x, its, of_row):
            return self._join(self.spread(x, its), 0) if of_row else x

        values, flags = (problem.field, problem.args), (mapped.field, mapped.args)
        row_args, shared = eqx.partition(jax.tree.map(joined, values, flags, of_row), in_row_args)
        return (shared, row_args), eqx.filter(of_row, in_row_args)

    def _on_all(self, part: Callable[[Any], Callable[..., Array]], of_row: PyTree, axes: int):
        """`part` of the field of each problem, on the rows of all: `(t, y, args) -> [rows, ...]`.

        Args:
            part: the field itself, or its Jacobian.
            of_row: which values a row has for itself.
            axes: 1 for the field, 2 for the Jacobian.
        """

        def call(t, y, args):
            shared, row_args = args

            def one(t, y, row_args):
                field, args = eqx.combine(row_args, shared)
                return part(field)(t, y, args)

            states = y.reshape(self.size, *self.sample)
            times = t.reshape(self.size, self.rows)
            row_args = jax.tree.map(
                lambda x, its: self._split(x, 0) if its else x, row_args, of_row
            )
            out = jax.vmap(one)(times, states, row_args)
            return out.reshape(len(y), *y.shape[1:] * axes)

        return call

    def flags(
        self, mapped: InitialValueProblem, perturbed: InitialValueProblem
    ) -> InitialValueProblem:
        """The flags of `perturbed` leaves for all problems as one."""
        row_args, shared = eqx.partition(
            (perturbed.field, perturbed.args), self._in_row_args(mapped)
        )
        return perturbed._replace(field=False, args=(shared, row_args))

    def _in_row_args(self, mapped: InitialValueProblem) -> PyTree:
        """Which values of `(field, args)` belong to a row, or to the rows of a problem."""
        return jax.tree.map(operator.or_, self._of_row(mapped), (mapped.field, mapped.args))

    def _of_row(self, problem: InitialValueProblem) -> PyTree:
        """Which values of `(field, args)` each row of a problem has for itself."""
        shared, row_args = problem.args
        field, shared = jax.tree.map(lambda _: False, (problem.field, shared))
        return field, (shared, jax.tree.map(lambda _: self.rows > 1, row_args))

    def spread(self, x: Array, mapped: Any = False) -> Array:
        """The value of each problem: the same, unless it is `mapped`."""
        return x if mapped else jnp.broadcast_to(x, (self.size, *x.shape))

    def split(self, joined: Integration) -> Integration:
        """The results of each problem, along a leading axis."""
        sample, trajectory = self.sample, joined.trajectory
        if isinstance(trajectory, Trajectory):
            times = self._split(trajectory.times, 1)
            count = jax.tree.map(self.spread, trajectory.count)
            y, k = self._split(trajectory.y, 1, sample), self._split(trajectory.k, 2, sample)
            trajectory = Trajectory(times, count, y, k)
        of_rows = joined._replace(y1=None, ys=None, trajectory=None)
        return jax.tree.map(lambda x: self._split(x, 0), of_rows)._replace(
            y1=self._split(joined.y1, 0, sample),
            ys=None if joined.ys is None else self._split(joined.ys, 1, sample),
            trajectory=trajectory,
        )

    def _join(self, x: Array, axis: int) -> Array:
        """`[size, ..., rows]`, with the rows at this `axis` of one problem, as rows of all."""
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], self.size * self.rows, *x.shape[axis + 2 :])

    def _split(self, x: Any, axis: int, sample: tuple[int, ...] | None = None) -> Array:
        """The inverse of `_join`. For states, `sample` is the shape of those of one problem."""
        shape = (self.rows, *x.shape[axis + 1 :]) if sample is None else sample
        return jnp.moveaxis(x.reshape(*x.shape[:axis], self.size, *shape), axis, 0)
