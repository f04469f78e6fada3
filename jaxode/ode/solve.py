"""`solve` and `flow`: check the arguments, pose the problem on rows, integrate, report failures."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._jax.closure import ClosedField, close_field
from jaxode._jax.sharding import vary_alike
from jaxode.ode.adjoints import Adjoint, BacksolveAdjoint, DiscreteAdjoint, ForwardMode
from jaxode.ode.implicit import DiffraxSolve
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.method import Method
from jaxode.ode.results import Solution, raise_on_failure
from jaxode.ode.validation import (
    Time,
    check_batch,
    check_derivative,
    check_same_times,
    check_state,
    check_step_control,
    check_times,
    make_method,
    state_dtype,
)

VectorField = Callable[[Float[Array, ""], PyTree, Any], PyTree]


def solve(
    f: VectorField,
    y0: PyTree[Float[Array, "..."]],
    t0: Time,
    t1: Time,
    args: PyTree = None,
    *,
    ts: Float[Array, " times"] | None = None,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    rtol: float | Float[Array, ""] = 1e-5,
    atol: float | Float[Array, ""] = 1e-5,
    steps: int | None = None,
    adjoint: Adjoint = DiscreteAdjoint(),
    first_step: float | Float[Array, ""] | None = None,
    max_step: float | Float[Array, ""] | None = None,
    max_steps: int = 4096,
    axis_name: str | tuple[str, ...] | None = None,
    throw: bool = True,
) -> Solution:
    """Solve the initial value problem `dy/dt = f(t, y, args)`, `y(t0) = y0`, up to `t1`.

    Args:
        f: vector field `f(t, y, args) -> dy/dt`, with `t` a scalar and `dy/dt` shaped like `y`.
        y0: initial state, any pytree of floating arrays. The solve runs in their common dtype,
            at least float32, and so does the time.
        t0: start time, a scalar.
        t1: end time, a scalar; smaller than `t0` to solve backwards in time.
        args: any pytree, passed to `f`.
        ts: times at which to save the state, `[times]`, monotone from `t0` towards `t1`. Values
            between steps come from the solver's own dense output.
        solver: an ODE solver of diffrax. Explicit Runge-Kutta solvers run in jaxode's own loop;
            others, such as the implicit `diffrax.Kvaerno5()` for stiff problems, run in diffrax,
            with `DiscreteAdjoint`, `BacksolveAdjoint` or `ForwardMode`.
        rtol: relative tolerance of the error of a step.
        atol: absolute tolerance of the error of a step. A step is accepted if the root mean square
            of `error / (atol + rtol max(|y before|, |y after|))` is at most one.
        steps: take this many equal steps, without error control.
        adjoint: the gradient method: `DiscreteAdjoint`, `BacksolveAdjoint`,
            `InterpolatingAdjoint` or `ForwardMode`.
        first_step: size of the first step to try, positive; chosen automatically by default. Not
            used with `steps`.
        max_step: largest size of a step, to a hundredth, positive; unlimited by default. Not used
            with `steps`.
        max_steps: attempted steps allowed before the solve fails. Not used with `steps`.
        axis_name: inside `jax.shard_map` or `jax.vmap`, the name of a mapped axis over which the
            state is split, or a tuple of such names: the error norm is then taken over all of it,
            at the price of one number that crosses between devices in each attempted step.
        throw: raise `jaxode.SolveError` if the solve fails (under `jit` as the message of a
            `jax.errors.JaxRuntimeError`). Otherwise `Solution.result` says how it ended, and the
            state and all gradients are NaN.

    Returns:
        A `Solution`.

    Raises:
        TypeError, ValueError: at trace time, if an argument breaks a rule above.
        SolveError: at run time, with `throw`, if the steps run out, the step size underflows or the
            vector field is not finite.

    Differentiation: with respect to `y0`, `args`, `t0`, `t1`, `ts` and values that `f` closes over.

    References: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I" (1993).
    """
    options = {
        "ts": ts, "solver": solver, "rtol": rtol, "atol": atol, "steps": steps, "adjoint": adjoint,
        "first_step": first_step, "max_step": max_step, "max_steps": max_steps,
        "axis_name": axis_name,
    }  # fmt: skip
    return solve_system("solve", f, y0, t0, t1, args, options, throw)


@overload
def flow(
    f: VectorField,
    z: PyTree[Float[Array, "batch ..."]],
    s: Time,
    t: Time,
    args: PyTree = None,
    *,
    step_control: Literal["joint", "per_sample"] = "joint",
    return_solution: Literal[False] = False,
    throw: bool = True,
    **solve_options: Any,
) -> PyTree[Float[Array, "batch ..."]]: ...


@overload
def flow(
    f: VectorField,
    z: PyTree[Float[Array, "batch ..."]],
    s: Time,
    t: Time,
    args: PyTree = None,
    *,
    step_control: Literal["joint", "per_sample"] = "joint",
    return_solution: Literal[True],
    throw: bool = True,
    **solve_options: Any,
) -> Solution: ...


@overload
def flow(
    f: VectorField,
    z: PyTree[Float[Array, "batch ..."]],
    s: Time,
    t: Time,
    args: PyTree = None,
    *,
    step_control: Literal["joint", "per_sample"] = "joint",
    return_solution: bool,
    throw: bool = True,
    **solve_options: Any,
) -> PyTree[Float[Array, "batch ..."]] | Solution: ...


def flow(
    f: VectorField,
    z: PyTree[Float[Array, "batch ..."]],
    s: Time,
    t: Time,
    args: PyTree = None,
    *,
    step_control: Literal["joint", "per_sample"] = "joint",
    return_solution: bool = False,
    throw: bool = True,
    **solve_options: Any,
) -> PyTree[Float[Array, "batch ..."]] | Solution:
    """The flow operator `F^{s,t}` on a batch: where each sample of `z` at time `s` is at time `t`.

    Args:
        f: vector field of one sample, as for `solve`.
        z: batch of states, any pytree of floating arrays with a common leading axis.
        s: start time, a scalar.
        t: end time, a scalar; `s > t` runs backwards.
        args: any pytree, passed to `f`, the same for all samples.
        step_control: "joint" takes one sequence of steps for the batch, its error norm the root
            mean square over all of it; "per_sample" gives each sample steps of its own, so that
            its result does not depend on the batch around it.
        return_solution: return a `Solution`; with "per_sample" its `stats` and `result` have one
            entry per sample.
        throw: as for `solve`.
        **solve_options: `ts`, `solver`, `rtol`, `atol`, `steps`, `adjoint`, `first_step`,
            `max_step`, `max_steps` and `axis_name` of `solve`.

    Returns:
        `z` at time `t`, or a `Solution` in which `ys` has axes `[times, batch, ...]`.

    Raises:
        TypeError, ValueError, SolveError: as `solve`.

    Differentiation: with respect to `z`, `args`, `s`, `t`, `ts` and values that `f` closes over.
    """
    z = check_batch("flow", "z", z)
    solution = solve_batch(
        "flow", Unconditional(f), z, s, t, args, None, solve_options, step_control, throw
    )
    return solution if return_solution else solution.y1


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(solve).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "throw"
}


def check_options(where: str, options: dict[str, Any], *, without: tuple[str, ...] = ()) -> None:
    """Raise for a name that is not an option of `solve`."""
    known = sorted(set(DEFAULTS) - set(without))
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{where}: unknown options {unknown}. The solve options are {known}.")


def solve_system(
    where: str,
    f: VectorField,
    y0: PyTree,
    t0: Time,
    t1: Time,
    args: PyTree,
    options: dict[str, Any],
    throw: bool,
) -> Solution:
    """`solve`, for a function of the name `where`, with the other `options` at their defaults."""
    one_row = jax.tree.map(lambda x: x[None], check_state(where, "y0", y0))
    options = {**DEFAULTS, **options}
    solution = _solve_rows(
        where, Unconditional(f), one_row, t0, t1, args, None, None, options, throw
    )
    return raise_on_failure(solution, where) if throw else solution


def solve_batch(
    where: str,
    f: Callable[[Float[Array, ""], PyTree, PyTree, PyTree], PyTree],
    y0: PyTree[Float[Array, "batch ..."]],
    t0: Time,
    t1: Time,
    shared: PyTree,
    rows: PyTree,
    options: dict[str, Any],
    step_control: Literal["joint", "per_sample"],
    throw: bool,
) -> Solution:
    """Solve a batch of systems `f(t, y, shared, row)`, one row of `rows` each."""
    check_options(where, options)
    check_step_control(where, step_control)
    if step_control == "joint":
        y0 = jax.tree.map(lambda x: x[None], y0)
    options = {**DEFAULTS, **options}
    solution = _solve_rows(where, f, y0, t0, t1, shared, rows, step_control, options, throw)
    return raise_on_failure(solution, where) if throw else solution


class Unconditional(eqx.Module):
    """A vector field without rows of its own, comparable so that `jit` recognizes it."""

    f: VectorField

    def __call__(self, t, y, shared, row):
        del row
        return self.f(t, y, shared)


def _rows_field(f, where: str, step_control: str | None):
    """The field on rows of the solver: one system, one batch, or one row for each sample."""

    def checked(t, y, shared, row):
        dy = f(t, y, shared, row)
        check_derivative(where, y, dy)
        return jax.tree.map(jnp.asarray, dy)

    if step_control == "per_sample":
        return jax.vmap(checked, in_axes=(0, 0, None, 0))
    batched = checked
    if step_control == "joint":
        batched = jax.vmap(checked, in_axes=(None, 0, None, 0))

    def one_row(t, y, shared, rows):
        dy = batched(t[0], jax.tree.map(lambda x: x[0], y), shared, rows)
        return jax.tree.map(lambda x: x[None], dy)

    return one_row


class _Ravel:
    """The state as rows of numbers, `[rows, n]`, and back."""

    def __init__(self, y0: PyTree):
        self.leaves, self.structure = jax.tree.flatten(y0)
        self.sizes = [math.prod(leaf.shape[1:]) for leaf in self.leaves]
        self.dtype = state_dtype(y0)

    def __call__(self, y: PyTree) -> Float[Array, "rows n"]:
        each = zip(jax.tree.leaves(y), self.sizes, strict=True)
        parts = [leaf.reshape(leaf.shape[0], size).astype(self.dtype) for leaf, size in each]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def back(self, y: Float[Array, "rows n"]) -> PyTree:
        parts = jnp.split(y, np.cumsum(self.sizes)[:-1], axis=1)
        like = zip(parts, self.leaves, strict=True)
        parts = [p.reshape(p.shape[0], *leaf.shape[1:]).astype(leaf.dtype) for p, leaf in like]
        return jax.tree.unflatten(self.structure, parts)


class Problem(NamedTuple):
    """What `Adjoint.integrate` needs, checked and on rows."""

    field: ClosedField
    args: PyTree
    y0: Float[Array, "rows n"]
    t0: Float[Array, ""]
    t1: Float[Array, ""]
    ts: Float[Array, " times"] | None
    method: Method


def pose(
    where: str, f, y0: PyTree, t0: Time, t1: Time, shared, rows, step_control, options, throw
) -> tuple[Problem, _Ravel]:
    """Check the arguments, ravel the state once, and trace the vector field."""
    ravel = _Ravel(y0)
    t0, t1, ts = check_times(where, t0, t1, options["ts"], ravel.dtype)
    method = make_method(where, f.f if isinstance(f, Unconditional) else f, y0, options, throw)
    field = _rows_field(f, where, step_control)
    raveled = lambda t, y, args: ravel(field(t, ravel.back(y), *args))
    start = ravel(y0)
    check_same_times(where, (t0, t1, ts), method.axis_name)
    start, t0, t1, ts, shared, rows, method = vary_alike((start, t0, t1, ts, shared, rows, method))
    t = jnp.broadcast_to(t0, start.shape[:1])
    closed, arrays = close_field(raveled, (f, where, step_control), t, start, (shared, rows))
    return Problem(closed, arrays, start, t0, t1, ts, method), ravel


def _solve_rows(
    where: str, f, y0: PyTree, t0: Time, t1: Time, shared, rows, step_control, options, throw
) -> Solution:
    """Pose the problem and integrate."""
    problem, ravel = pose(where, f, y0, t0, t1, shared, rows, step_control, options, throw)
    adjoint = options["adjoint"]
    if problem.method.tableau is None:
        adjoint = _by_diffrax(where, options["solver"], adjoint, step_control)
    try:
        out = _integrate(adjoint, problem)
    except TypeError as error:
        if "custom_vjp" not in str(error) or isinstance(adjoint, ForwardMode):
            raise
        raise TypeError(
            f"{where}(adjoint=...): {type(options['adjoint']).__name__} has reverse-mode "
            "derivatives (jax.grad, jax.vjp), but no forward mode (jax.jvp, jax.jacfwd) of the "
            "solve itself. Use adjoint=jaxode.ForwardMode()."
        ) from error
    y1 = ravel.back(out.y1)
    ys = None if out.ys is None else jax.vmap(ravel.back)(out.ys)
    stats, result, t_reached = out.stats, out.result, out.t_reached
    if step_control != "per_sample":
        y1, stats, result, t_reached = jax.tree.map(lambda x: x[0], (y1, stats, result, t_reached))
        ys = jax.tree.map(lambda x: x[:, 0], ys)
    return Solution(y1, problem.ts, ys, stats, result, t_reached)


def _by_diffrax(where: str, solver, adjoint, step_control) -> DiffraxSolve:
    name = type(solver).__name__
    if step_control == "per_sample":
        raise ValueError(
            f"{where}(step_control='per_sample'): needs an explicit Runge-Kutta solver; got "
            f"{name}. Use step_control='joint', or jax.vmap over jaxode.solve."
        )
    if not isinstance(adjoint, DiscreteAdjoint | BacksolveAdjoint | ForwardMode):
        raise ValueError(
            f"{where}(adjoint=...): {type(adjoint).__name__} needs an explicit Runge-Kutta solver; "
            f"got {name}. Use jaxode.DiscreteAdjoint()."
        )
    return DiffraxSolve(solver, adjoint)


@eqx.filter_jit
def _integrate(adjoint: Adjoint, problem: Problem) -> Integration:
    return adjoint.integrate(*problem)
