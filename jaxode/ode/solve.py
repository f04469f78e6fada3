"""`solve` and `flow`: check the arguments, run the compiled program, report failures."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import diffrax
import jax
from jaxtyping import Array, Float, PyTree, Shaped

from jaxode._checks.arguments import (
    Time,
    check_args,
    check_batch,
    check_bool,
    check_state,
    one_of,
    state_dtype,
)
from jaxode._checks.caller import arg, public
from jaxode._checks.rules import FINITE, FINITE_STATE
from jaxode._checks.samples import check_rows
from jaxode._jax.closure import compiled
from jaxode.ode.adjoints import Adjoint, DiscreteAdjoint
from jaxode.ode.events import Event
from jaxode.ode.field import SystemField, VectorField, call_field, check_field
from jaxode.ode.interpolations import check_knots
from jaxode.ode.mass import check_consistent, check_mass
from jaxode.ode.options import SolveOptions
from jaxode.ode.pieces import Jumps, check_jumps
from jaxode.ode.run import run
from jaxode.ode.solution import Solution, report
from jaxode.ode.solvers.rosenbrock import Rodas5P, Rosenbrock23
from jaxode.ode.system import Batch, OnTheWay, argument_faults, make_system


@public("solve")
def solve(
    f: VectorField,
    y0: PyTree[Float[Array, "..."]],
    t0: Time | Float[Array, " batch"],
    t1: Time | Float[Array, " batch"],
    args: PyTree = None,
    *,
    batch: Literal["joint", "per_sample"] | None = None,
    row_args: PyTree[Shaped[Array, "batch ..."]] = None,
    ts: Float[Array, " times"] | Float[Array, "batch times"] | None = None,
    solver: diffrax.AbstractSolver | Rodas5P | Rosenbrock23 = diffrax.Tsit5(),
    rtol: float | Float[Array, ""] = 1e-5,
    atol: PyTree[float | Float[Array, "..."]] = 1e-5,
    steps: int | None = None,
    adjoint: Adjoint = DiscreteAdjoint(),
    first_step: float | Float[Array, ""] | None = None,
    max_step: float | Float[Array, ""] | None = None,
    breakpoints: Sequence[float] | Float[Array, "*rows points"] | None = None,
    max_steps: int = 4096,
    axis_name: str | tuple[str, ...] | None = None,
    precision: Literal["highest", "high", "default"] | None = None,
    dense: bool = False,
    event: Event | None = None,
    jumps: Jumps | None = None,
    mass: Float[Array, "n n"] | None = None,
    throw: bool = True,
) -> Solution:
    """Solve the initial value problem `dy/dt = f(t, y, args)`, `y(t0) = y0`, up to `t1`.

    Args:
        f: vector field `f(t, y, args) -> dy/dt`, with `t` a scalar and `dy/dt` shaped like `y`. It
            must be pure, as under `equinox.filter_jit`: arrays in `f` and `args` are inputs of the
            compiled program, and everything else is compared with earlier calls. A change inside an
            object that `f` closes over (a NumPy array, a list) goes unnoticed.
        y0: initial state, any pytree of floating arrays. State and time are in their common dtype,
            at least float32.
        t0: start time, a scalar. With "per_sample" steps also `[batch]`, one time per sample.
        t1: end time, with the shapes of `t0`. If it is smaller than `t0`, the solve runs backwards
            in time.
        args: any pytree, passed to `f`; shared by all samples.
        batch: solve a batch: the leaves of `y0` share a leading axis, and `f` is the vector field
            of one sample. "joint" takes the same steps for the whole batch; its error norm is the
            root mean square over the batch. "per_sample" gives each sample its own steps, so that
            no result depends on the other samples.
        row_args: what each sample of a batch has for itself, such as its parameters: a pytree of
            arrays `[batch, ...]`. The field is then called as `f(t, y, (args, row))`, with the row
            of its sample, and so are the condition and the change of an event, and that of `jumps`.
        ts: times at which to save the state, `[times]`, monotone from `t0` towards `t1`. Values
            between steps come from the solver's dense output. With "per_sample" steps also
            `[batch, times]`: pad a shorter row by repeating its last time, which costs no
            evaluations. Samples whose times are out of order fail.
        solver: an explicit Runge-Kutta solver of diffrax, or for stiff problems `jaxode.Rodas5P()`
            or `jaxode.Rosenbrock23()` with `DiscreteAdjoint` or `ForwardMode` (docs/stiff.md).
        rtol: relative error tolerance per step.
        atol: absolute error tolerance per step. A step is accepted if the root mean square of
            `error / (atol + rtol max(|y before|, |y after|))` is at most one. A number, an array
            that broadcasts to the state of one sample, or for other states a pytree like it, with a
            tolerance for each number.
        steps: take this many equal steps, without error control.
        adjoint: the gradient method: `DiscreteAdjoint`, `BacksolveAdjoint` or `ForwardMode`.
        first_step: size of the first step to try, positive. Chosen automatically by default. Not
            used with `steps`.
        max_step: maximum step size, positive; may be exceeded by 1%. Unlimited by default. Not used
            with `steps`.
        breakpoints: times at which `f` jumps or has a kink, in any order, `[points]` or with
            "per_sample" steps also `[batch, points]`. Steps end there, and `f` sees times before it
            and then after it. Times outside the span are ignored; pad shorter rows with infinity.
        max_steps: attempted steps allowed before the solve fails. Not used with `steps`. A gradient
            keeps the times of this many steps, with "per_sample" steps and under `jax.vmap` for
            each row: with thousands of rows, lower it. Like `steps`, it counts between two times of
            `breakpoints` and `jumps`.
        axis_name: inside `jax.shard_map` or `jax.vmap`, the name of the mapped axis, or a tuple of
            names, over which the state is split. The error norm then covers the whole state, and
            devices exchange one number per attempted step.
        precision: precision of the matrix products in `f` on an accelerator: "highest" is float32;
            "high" and "default" are faster and less accurate (docs/devices.md). The default is the
            setting of `jax.default_matmul_precision`, or "highest" if there is none.
        dense: keep all accepted steps, so that `Solution.evaluate` works at any time between the
            ends. This stores `max_steps` times (solver stages + 1) states, for each piece between
            breakpoints and jumps, so lower `max_steps`. At the time of a jump it is the state
            before. Needs `DiscreteAdjoint` or `ForwardMode`.
        event: a `jaxode.Event` that can end the solve before `t1`. `Solution.t1` is its time;
            outputs after it repeat the state at the event. The step that crosses it is taken again
            to end there. With a batch it needs "per_sample" steps, and each sample has its own
            event. Not with `steps`.
        jumps: `jaxode.Jumps`, changes of the state at known times, such as doses. After each one
            the first step is chosen anew.
        mass: the constant matrix `M [n, n]` of `M dy/dt = f`, for `Rodas5P`, with the numbers of
            the state of one sample in the order of `jax.flatten_util.ravel_pytree`. It may be
            singular if the algebraic equations determine the algebraic unknowns (index 1), and `y0`
            must fulfil them; outside `jit`, both are checked. Not with `event`, `jumps` and
            `breakpoints`.
        throw: raise `jaxode.SolveError` if the solve fails; under `jit` it is the message of a
            `jax.errors.JaxRuntimeError`, or of a `ValueError` in later calls on a CPU. With
            `throw=False`, `Solution.result` says how the solve ended, and the state and all
            gradients of a failed solve are NaN.

    Returns:
        A `Solution`. With "per_sample" steps its `stats` and `result` have one entry per sample.

    Raises:
        TypeError, ValueError: at trace time, if an argument breaks a rule above.
        SolveError: at run time, with `throw`, if the steps run out, the step size underflows or the
            vector field is not finite.

    Differentiation: with respect to `y0`, `args`, `row_args`, `t0`, `t1`, `ts`, `breakpoints`, the
    times of `jumps`, and values that `f`, `event` and `jumps` close over.
    By default in forward and reverse mode, to any order; with an event, by the implicit function
    theorem, up to the second.

    References: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I" (1993).
    """
    options = SolveOptions.make(
        solver=solver, rtol=rtol, atol=atol, steps=steps, adjoint=adjoint, first_step=first_step,
        max_step=max_step, breakpoints=breakpoints, max_steps=max_steps, axis_name=axis_name,
        precision=precision,
    )  # fmt: skip
    one_of("batch", batch, (None, "joint", "per_sample"))
    check_implicit(options, batch)
    y0 = (check_state if batch is None else check_batch)("y0", y0)
    check_dense(options, dense)
    check_event(options, event, batch)
    check_jumps(jumps)
    if mass is not None:
        check_field("f", f, "f(t, y, args)")
        others = {"event": event, "jumps": jumps, "breakpoints": breakpoints}
        options = dataclasses.replace(options, mass=check_mass(mass, options, y0, batch, **others))
        check_consistent(f, y0, t0, args, row_args, options, batch)
    on_the_way = OnTheWay(ts, dense, event, jumps)
    return solve_checked(
        f, y0, (t0, t1), args, options, on_the_way, row_args=row_args, batch=batch, throw=throw
    )


@public("flow")
def flow(
    f: VectorField,
    z: PyTree[Float[Array, "batch ..."]],
    s: Time | Float[Array, " batch"],
    t: Time | Float[Array, " batch"],
    args: PyTree = None,
    *,
    batch: Literal["joint", "per_sample"] = "joint",
    row_args: PyTree[Shaped[Array, "batch ..."]] = None,
    throw: bool = True,
    **solve_options: Any,
) -> PyTree[Float[Array, "batch ..."]]:
    """The flow operator `F^{s,t}` on a batch: where each sample of `z` at time `s` is at time `t`.

    `jaxode.solve(f, z, s, t, args, batch=...)` runs the same solve and returns more about it.

    Args:
        f: vector field of one sample, as for `solve`.
        z: batch of states, any pytree of floating arrays with a common leading axis.
        s: start time, a scalar; with "per_sample" steps also `[batch]`.
        t: end time, with the shapes of `s`. If `s > t`, the solve runs backwards in time.
        args: any pytree, passed to `f`; shared by all samples.
        batch: "joint" or "per_sample", as for `solve`.
        row_args: as for `solve`.
        throw: as for `solve`.
        **solve_options: `solver`, `rtol`, `atol`, `steps`, `adjoint`, `first_step`, `max_step`,
            `breakpoints`, `max_steps`, `axis_name` and `precision` of `solve`.

    Returns:
        `z` at time `t`.

    Raises:
        TypeError, ValueError, SolveError: as `solve`.

    Differentiation: with respect to `z`, `args`, `row_args`, `s`, `t` and values that `f` closes
    over.
    """
    one_of("batch", batch, ("joint", "per_sample"))
    options = SolveOptions.make(**solve_options)
    check_implicit(options, batch)
    z = check_batch("z", z)
    return solve_checked(
        f, z, (s, t), args, options, name="z", row_args=row_args, batch=batch, throw=throw
    ).y1


class UserField(SystemField):
    """The vector field of a user: `f(t, y, args)`, or `f(t, y, (args, row))` with `row_args`."""

    hint: ClassVar[str] = (
        " All samples share args: pass what each has for itself as row_args (docs/many.md)."
    )

    def __call__(self, t, y, shared, row):
        return call_field(self.f, t, y, shared, row=row)


def solve_checked(
    f: Callable[..., PyTree],
    y0: PyTree[Array],
    span: tuple[Time, Time],
    args: PyTree,
    options: SolveOptions,
    on_the_way: OnTheWay = OnTheWay(),
    *,
    kind: type[UserField] = UserField,
    name: str = "y0",
    row_args: PyTree = None,
    batch: Batch = None,
    throw: bool,
) -> Solution:
    """`solve` for a checked state, which is the argument `name`, and what was checked with it."""
    check_field(kind.name, f, f"{kind.name}{kind.call}")
    if options.jacobian is not None:
        check_field("jacobian", options.jacobian, "jacobian(t, y, args)")
    check_bool("throw", throw)
    args = check_args("args", args)
    row_args = check_row_args(row_args, y0, batch)
    if on_the_way.event is None:  # which ends a solve before
        check_knots("args", args, span)
        check_knots("row_args", row_args, span)
    field = kind(f, options.jacobian)
    system = make_system(
        field, y0, span, args, options, row_args=row_args, batch=batch, on_the_way=on_the_way
    )
    solution = _run(system.raising(throw))
    if not throw:
        return solution
    rule = FINITE_STATE if batch is None else FINITE
    faults = rule.fault(*jax.tree.leaves(system.y0), name=name)
    faults |= argument_faults(system)
    return report(solution, faults, options.remedies(state_dtype(y0)))


def check_row_args(row_args: PyTree, y0: PyTree[Array], batch: Batch) -> PyTree:
    """The arguments of each row, if there are any."""
    if row_args is None:
        return None
    if batch is None:
        raise ValueError(
            f"{arg('row_args')} needs a batch; got batch=None. Pass "
            "batch='per_sample' or 'joint', or everything as args."
        )
    return check_rows("row_args", row_args, len(jax.tree.leaves(y0)[0]), jax.dtypes.prng_key)


def check_implicit(options: SolveOptions, batch: Batch) -> None:
    """Raise if an option does not go with the equations that each step solves."""
    if not options.implicit:
        return
    name, adjoint = type(options.solver).__name__, options.adjoint
    if options.axis_name is not None and batch != "joint":
        raise ValueError(
            f"{arg('axis_name')} {name} needs the Jacobian of the whole state; got "
            f"batch={batch!r}. Do not split the state. If a batch is split, pass batch='joint', or "
            "'per_sample' without axis_name."
        )
    if adjoint.solves_backwards:
        raise ValueError(
            f"{arg('adjoint')} {type(adjoint).__name__} needs an explicit Runge-Kutta solver; "
            f"got {name}. Use jaxode.DiscreteAdjoint()."
        )


def check_dense(options: SolveOptions, dense: Any) -> None:
    """Raise if the gradient method does not know the solution between its steps."""
    check_bool("dense", dense)
    if dense and not options.adjoint.supports_dense:
        raise ValueError(
            "solve(dense=True): needs DiscreteAdjoint or ForwardMode, which differentiate the "
            f"steps themselves; got {type(options.adjoint).__name__}. Pass the times as ts, or use "
            "jaxode.DiscreteAdjoint()."
        )


def check_event(options: SolveOptions, event: Any, batch: Batch) -> None:
    """Raise for an invalid event, and for options that do not go with events."""
    if event is None:
        return
    if not isinstance(event, Event):
        raise TypeError(
            f"{arg('event')} must be a jaxode.Event; got {event!r}. Use jaxode.Event(condition)."
        )
    if batch == "joint":
        raise ValueError(
            f"{arg('event')} samples with joint steps end together; got batch='joint'. Use "
            "batch='per_sample'."
        )
    if options.axis_name is not None:
        raise ValueError(
            f"{arg('event')} needs the whole state; got axis_name={options.axis_name!r}, along "
            "which it is split. Leave axis_name out: rows with steps of their own need none."
        )
    if options.steps is not None:
        raise ValueError(
            f"{arg('event')} needs error control; got steps={options.steps}. Leave steps out."
        )


_run = compiled(run)
