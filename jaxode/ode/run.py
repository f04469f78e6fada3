"""From a system to its solution, inside the compiled program."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxode._checks.errors import Result
from jaxode._checks.rules import all_hold
from jaxode._jax.closure import close_field
from jaxode._jax.sharding import axes_of, vary
from jaxode.ode.dense import Interpolant
from jaxode.ode.events import solve_to_event
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.outputs import beyond, padded
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.pieces import Cuts, Pieces
from jaxode.ode.solution import Solution
from jaxode.ode.system import Ravel, System, change_on_rows, condition_on_rows, to_problem


def run(system: System) -> Solution:
    """Pose the problem and integrate it."""
    problem, stepper, ravel = to_problem(system)
    problem_to_end, out, piece_ends = _integrate(system, problem, stepper, ravel)
    interpolant = None
    if out.trajectory is not None:
        interpolant = Interpolant(
            trajectory=out.trajectory,
            piece_ends=piece_ends,
            method=stepper.method,
            t0=problem_to_end.t0,
            t1=problem_to_end.t1,
            ok=out.result == Result.SUCCESS,
            y1=out.y1,
            ravel=ravel,
            batch=system.batch,
        )
    ys = None
    if out.ys is not None:
        ys = padded(problem_to_end, out.ys)
        if out.stopped is not None:  # outputs beyond the event have its state
            after = out.stopped[None] & beyond(problem, problem_to_end.t1)
            ys = jnp.where(after[..., None], out.y1[None], ys)
        ys = jax.vmap(ravel.back)(ys)
    y1 = ravel.back(out.y1)
    if system.batch is None:
        y1, ys = jax.tree.map(lambda x: x[0], y1), jax.tree.map(lambda x: x[:, 0], ys)
    elif system.rows_have_outputs:
        ys = jax.tree.map(lambda x: x.swapaxes(0, 1), ys)
    of_rows = (out.stats, out.result, out.t_reached, problem_to_end.t1, out.stopped)
    if system.batch != "per_sample":
        of_rows = jax.tree.map(lambda x: x[0], of_rows)
    stats, result, t_reached, t1, came = of_rows
    return Solution(y1, system.ts, ys, stats, result, t_reached, t1, came, interpolant)


def _integrate(system: System, problem: InitialValueProblem, stepper: Stepper, ravel: Ravel):
    """The problem up to its end or event, its integration, and where each piece ends."""
    args = eqx.combine(problem.args, (system.shared, system.row_args))
    event, jumps = system.event, system.jumps

    def closed_change(name):
        number = jnp.zeros(problem.t0.shape, jnp.int32)
        arguments = problem.t0, number, problem.y0, args, None if jumps is None else jumps.times
        *arguments, _ = vary(arguments, axes_of(arguments))
        return close_field(stepper.precision, change_on_rows(system, ravel, name), *arguments)[0]

    def solve_piece(problem: InitialValueProblem) -> tuple[InitialValueProblem, Integration]:
        return problem, system.adjoint.integrate(problem, stepper)

    most = 0
    if event is not None:
        on_rows = condition_on_rows(system, ravel)
        condition, _ = close_field(stepper.precision, on_rows, problem.t0, problem.y0, args)
        solve_piece = partial(
            solve_to_event, event, condition, stepper=stepper, adjoint=system.adjoint
        )
        most = event.most or 0
    cuts = system.cuts_on_rows(problem.t0.shape[0])
    if not most and all(times is None for times in cuts.values()):
        problem, out = solve_piece(problem)
        trajectory = jax.tree.map(lambda x: x[None], out.trajectory)
        return problem, out._replace(trajectory=trajectory), problem.t1[None]
    at_jump = None if jumps is None else closed_change("jumps")
    at_event = closed_change("event") if most else None
    cuts_of_rows = Cuts.of_problem(problem, **cuts)
    pieces = Pieces(solve_piece, problem, stepper, cuts_of_rows, at_jump, at_event, most)
    return pieces.run(all_hold(problem, stepper.controller, **cuts))
