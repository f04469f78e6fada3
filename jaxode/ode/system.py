"""From a user's arguments to a problem on rows.

A `System` is made outside the compiled program and is its only input. `to_problem` traces the
vector field inside.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import (
    Time,
    check_axis,
    check_derivative,
    check_jacobian,
    check_same_times,
    check_scalar,
    state_dtype,
)
from jaxode._checks.rules import Faults, solve_faults
from jaxode._checks.times import check_breakpoint_times, check_jump_times, check_times
from jaxode._jax.closure import close_field, encoded
from jaxode._jax.sharding import vary_alike
from jaxode.ode.field import SystemField, call_field
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.options import SolveOptions

Batch = Literal["joint", "per_sample"] | None


class OnTheWay(NamedTuple):
    """What a solve returns and meets between its ends, as the user passed it."""

    ts: Any = None
    dense: bool = False
    event: Any = None
    jumps: Any = None


class System(NamedTuple):
    """A system of ODEs: one for each row of a batch, or a single one."""

    field: Callable[..., PyTree]
    """`f(t, y, shared, row)` of one row, a function or a `SystemField`."""
    y0: PyTree[Float[Array, "..."]]
    t0: Float[Array, "*rows"]
    """A start time for all rows, or one per row."""
    t1: Float[Array, "*rows"]
    ts: Float[Array, "*rows times"] | None
    ts_lost: Bool[Array, "*rows"]
    """Whether times in `ts` are lost in the dtype of the state."""
    shared: PyTree
    """Arguments that all rows share."""
    row_args: PyTree
    """Arguments per row: leaves `[batch, ...]`."""
    batch: Batch
    """None for a single system without a batch axis."""
    stepper: Stepper
    adjoint: Any
    """The gradient method, which runs the loop."""
    event: Any = None
    """The event that may end it before `t1`."""
    jumps: Any = None
    """The jumps of its state, with an array of times."""
    breakpoints: Float[Array, "*rows points"] | None = None
    """Times at which the field may jump."""

    @property
    def rows_have_outputs(self) -> bool:
        """Whether each row has its own output times."""
        return self.ts is not None and self.ts.ndim == 2

    def on_rows(self, rows: int) -> tuple[Array, Array, Array | None]:
        """The start, end `[rows]` and output times `[times, rows]` of each row."""
        t0, t1 = (jnp.broadcast_to(t, (rows,)) for t in (self.t0, self.t1))
        ts = self.ts
        if ts is not None:
            ts = jnp.where(self.ts_lost, jnp.nan, _times_on_rows(ts, rows))
        return t0, t1, ts

    def cuts_on_rows(self, rows: int) -> dict[str, Float[Array, "times rows"] | None]:
        """The `times` of the jumps of each row, and its `breakpoints`."""
        of_jumps = None if self.jumps is None else self.jumps.times
        cuts = {"times": of_jumps, "breakpoints": self.breakpoints}
        return {name: t if t is None else _times_on_rows(t, rows) for name, t in cuts.items()}

    def raising(self, throw: bool) -> "System":
        """The same system, where a failed backward solve raises if `throw`."""
        throw = throw and self.adjoint.solves_backwards
        return self._replace(stepper=dataclasses.replace(self.stepper, throw=throw))


def make_system(
    field: Callable[..., PyTree],
    y0: PyTree[Array],
    span: tuple[Time, Time],
    shared: PyTree,
    options: SolveOptions,
    *,
    row_args: PyTree = None,
    batch: Batch = None,
    on_the_way: OnTheWay = OnTheWay(),
) -> System:
    """Check the times, and turn everything that varies into arrays to avoid recompilation."""
    check_axis(options.axis_name)
    dtype = state_dtype(y0)
    count = jax.tree.leaves(y0)[0].shape[0] if batch == "per_sample" else None
    t0, t1, ts, ts_lost = check_times(*span, on_the_way.ts, dtype, count)
    jumps, of_jumps = on_the_way.jumps, None
    if jumps is not None:
        of_jumps = check_jump_times(*span, jumps.times, dtype, count)
        jumps = dataclasses.replace(jumps, times=of_jumps)
    breakpoints = check_breakpoint_times(options.breakpoints, dtype, count)
    steps = options.first_step, options.max_step
    check_same_times((t0, t1, ts, breakpoints, of_jumps, steps), options.axis_name)
    row = y0
    if batch is not None:
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), y0)
    stepper = dataclasses.replace(options.stepper(dtype, row), dense=on_the_way.dense)
    shared, row_args = encoded((shared, row_args), dtype)  # so that floats are inputs
    return System(
        field, y0, t0, t1, ts, ts_lost, shared, row_args, batch, stepper, options.adjoint,
        on_the_way.event, jumps, breakpoints,
    )  # fmt: skip


def _times_on_rows(ts: Float[Array, "*rows times"], rows: int) -> Float[Array, "times rows"]:
    return ts.T if ts.ndim == 2 else jnp.broadcast_to(ts[:, None], (ts.shape[0], rows))


def argument_faults(system: System) -> Faults:
    """The faults that arguments of a system may have, for the message of a failure."""
    of_jumps = None if system.jumps is None else system.jumps.times
    times = system.t0, system.t1, system.ts, of_jumps, system.breakpoints
    dims = zip(times, (1, 1, 2, 2, 2), strict=True)
    ragged = any(t is not None and t.ndim == dim for t, dim in dims)
    rows = jax.tree.leaves(system.y0)[0].shape[0] if ragged else 1
    t0, t1, ts = system.on_rows(rows)
    problem = InitialValueProblem(None, None, system.y0, t0, t1, ts)
    return solve_faults(problem, system.stepper.controller, **system.cuts_on_rows(rows))


@dataclasses.dataclass(frozen=True)
class Ravel:
    """The state as the numbers of each sample, `[samples, n]`, and back."""

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of_state(cls, y0: PyTree) -> "Ravel":
        leaves, structure = jax.tree.flatten(y0)
        return cls(structure, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))

    @property
    def sizes(self) -> list[int]:
        return [math.prod(leaf.shape[1:]) for leaf in self.leaves]

    @property
    def dtype(self) -> jnp.dtype:
        return state_dtype(self.leaves)

    def __call__(self, y: PyTree) -> Float[Array, "samples n"]:
        leaves = zip(jax.tree.leaves(y), self.sizes, strict=True)
        columns = [leaf.reshape(leaf.shape[0], size).astype(self.dtype) for leaf, size in leaves]
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)

    def back(self, y: Float[Array, "samples n"]) -> PyTree:
        columns = jnp.split(y, np.cumsum(self.sizes)[:-1], axis=1)
        like = zip(columns, self.leaves, strict=True)
        leaves = [p.reshape(p.shape[0], *leaf.shape[1:]).astype(leaf.dtype) for p, leaf in like]
        return jax.tree.unflatten(self.structure, leaves)


def condition_on_rows(system: System, ravel: Ravel):
    """The condition of the event on rows of the solver."""

    def checked(t, y, shared, row):
        value = call_field(
            system.event.condition, t, y, shared, "condition", "the condition of the event", row=row
        )  # fmt: skip
        rule = "the condition must return a floating scalar"
        return check_scalar("event", value, rule, "It sees one sample of a batch.")

    return _on_rows(system, ravel, checked)


def change_on_rows(system: System, ravel: Ravel, name: Literal["jumps", "event"]):
    """The change at a jump or an event, on rows of the solver."""
    function = getattr(system, name).change

    def checked(at, y, shared, row):
        t, number = at

        def change(t, y, args):
            return function(t, y, args, number)

        after = call_field(
            change, t, y, shared, "change", f"the change of {name}", "(t, y, args, i)", row
        )
        check_derivative(y, after, name=name, call="change(t, y, args, i)", casts=True)
        return jax.tree.map(jnp.asarray, after)

    on_rows = _on_rows(system, ravel, checked)
    return lambda t, number, y, args: ravel(on_rows((t, number), y, args))


def _rows_field(system: System, ravel: Ravel):
    field = SystemField.of_function(system.field)
    hint = "" if system.batch is None else field.hint

    def checked(t, y, shared, row):
        dy = field(t, y, shared, row)
        check_derivative(y, dy, hint, field.name, f"{field.name}{field.call}", casts=True)
        return jax.tree.map(jnp.asarray, dy)

    on_rows = _on_rows(system, ravel, checked)
    return lambda t, y, args: ravel(on_rows(t, y, args))


def _rows_jacobian(system: System, ravel: Ravel):
    """The Jacobian of the field of the solver, if the user gave one."""
    user_jacobian = SystemField.of_function(system.field).jacobian
    if user_jacobian is None:
        return None

    def checked(t, y, shared, row):
        jacobian = call_field(user_jacobian, t, y, shared, "jacobian", "the Jacobian", row=row)
        check_jacobian(sum(ravel.sizes), jacobian)
        return jnp.asarray(jacobian, ravel.dtype)

    return _on_rows(system, ravel, checked)


def _on_rows(system: System, ravel: Ravel, of_sample: Callable[..., PyTree]):
    """A function of one sample as one of `(t, y, args)` on rows of the solver.

    The rows are one system, one batch, or samples with a time for each.
    """

    def call(t, y, args):
        (shared, row_args), y = args, ravel.back(y)
        if system.batch == "per_sample":
            return jax.vmap(of_sample, in_axes=(0, 0, None, 0))(t, y, shared, row_args)
        t = jax.tree.map(lambda x: x[0], t)
        if system.batch == "joint":
            return jax.vmap(of_sample, in_axes=(None, 0, None, 0))(t, y, shared, row_args)
        alone = of_sample(t, jax.tree.map(lambda x: x[0], y), shared, row_args)
        return jax.tree.map(lambda x: x[None], alone)

    return call


def to_problem(system: System) -> tuple[InitialValueProblem, Stepper, Ravel]:
    """The problem on rows, its stepper, and the map to rows. Traces the field once.

    A batch with joint steps has one row, and so has a single system, which is one sample.
    """
    y0 = system.y0
    if system.batch is None:
        y0 = jax.tree.map(lambda x: x[None], y0)
    ravel = Ravel.of_state(y0)
    start = ravel(y0)
    rows = start.shape[0] if system.batch == "per_sample" else 1
    inputs = start, system.on_rows(rows), (system.shared, system.row_args), system.stepper
    start, (t0, t1, ts), args, stepper = vary_alike(inputs)
    field, jacobian = _rows_field(system, ravel), _rows_jacobian(system, ravel)
    closed, arrays = close_field(stepper.precision, field, t0, start, args, jacobian=jacobian)
    outputs = piece = None
    if ts is not None and system.rows_have_outputs:
        outputs = jnp.argmax(ts == ts[-1:], axis=0).astype(jnp.int32) + 1
    if system.breakpoints is not None:
        piece = jax.lax.stop_gradient(jnp.stack([t0, t1], axis=1))
    problem = InitialValueProblem(closed, arrays, start, t0, t1, ts, outputs, piece=piece)
    return problem, stepper, ravel
