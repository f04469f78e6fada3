"""Jumps: a solve whose state changes, at known times or at events, and goes on.

It is a scan over the pieces between two jumps. Each piece is a solve of its own, so that gradient
methods know nothing of jumps: the derivatives by the times of the jumps are those by the ends of
the pieces, and JAX differentiates the change itself.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxode._checks.arguments import check_real_times
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import Result
from jaxode._checks.rules import all_hold
from jaxode._jax.sharding import vary_alike
from jaxode._jax.tangents import undifferentiated_unless
from jaxode.ode.adjoints.base import integrate_between
from jaxode.ode.field import check_field
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.problem import Problem, Stepper
from jaxode.ode.loop.rows import entry_of_each, over_rows, replace_rows
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.step_size import is_lost

# (t [rows], number [rows], y [samples, n], (shared, row_args)) -> y [samples, n]
Change = Callable[..., Float[Array, "samples n"]]


class Jumps(eqx.Module):
    """Times at which the state of a solve changes at once, to `change(t, y, args, i)`.

    Steps end exactly at each time. `Solution.ys` is the state before the change: at the time of a
    jump, `change` of it is the state after. `Solution.y1` is the state after all changes, also
    after one at the end time.

    Args:
        times: `[jumps]`, or with "per_sample" steps also `[batch, jumps]`, monotone from `t0` to
            `t1`, both included. Pad a shorter row with infinity, or by repeating its last time: a
            time equal to the previous one is ignored.
        change: a function of the time, the state before (of one sample, with a batch), the `args`
            of the field (with `row_args`, `(args, row)`), and the number of the jump, an int32
            scalar that counts from 0. It returns the state after, like the state before. It must be
            pure, as the field.

    Raises:
        TypeError: if `change` is not a function, or `times` are not real numbers.

    Differentiation: with respect to `times` and values that `change` closes over, and all that the
    solve is differentiable in.
    """

    times: Float[Array, "*rows jumps"]
    change: Callable[[Float[Array, ""], PyTree, PyTree, Int[Array, ""]], PyTree]

    @public("")
    def __check_init__(self):
        check_real_times("times", self.times)
        check_field("change", self.change, "change(t, y, args, i)")


def check_jumps(jumps: Any, dense: bool, event: Any) -> None:
    """Raise for what is no `Jumps`, and for options that do not go with jumps."""
    if jumps is None:
        return
    if not isinstance(jumps, Jumps):
        raise TypeError(
            f"{arg('jumps')} must be a jaxode.Jumps; got {jumps!r}. Use jaxode.Jumps(times, "
            "change)."
        )
    for name, given, cure in (
        ("dense", dense, "Pass the times as ts"),
        ("event", event is not None, "Solve to the event, change its y1, and go on from its t1"),
    ):
        if given:
            raise ValueError(
                f"{arg(name)} needs a solve without jumps; got jumps=Jumps(...). {cure}, or solve "
                "from one jump to the next."
            )


def solve_across(
    change: Change,
    times: Float[Array, "jumps rows"],
    problem: Problem,
    stepper: Stepper,
    adjoint: Any,
) -> Integration:
    """Solve the problem across the jumps of each row."""
    problem, times = vary_alike((problem, times))
    valid = all_hold(problem, stepper, times)
    is_jump, number, times = _without_padding(times, problem.t0)
    none = jnp.zeros((1, *problem.t0.shape), bool)
    pieces = (
        jnp.concatenate([times, problem.t1[None]]),
        jnp.concatenate([number, number[-1:]]),
        jnp.concatenate([is_jump, none]),
        jnp.concatenate([is_jump, ~none]),
    )
    solve = lambda part: (part, integrate_between(adjoint, part, stepper))
    return _over_pieces(change, solve, problem, stepper, pieces, valid)[-1]


def solve_past_events(
    change: Change,
    most: int,
    to_event: Callable[..., Any],
    problem: Problem,
    stepper: Stepper,
) -> tuple[Problem, Integration]:
    """Solve the problem across at most so many events, and up to one more.

    The time of an event, and the state there, have derivatives. They are the start of the next
    piece, so those of what follows are right, too.
    """
    problem = vary_alike(problem)
    index, shape = jnp.arange(most + 1, dtype=jnp.int32)[:, None], (most + 1, *problem.t0.shape)
    pieces = tuple(jnp.broadcast_to(x, shape) for x in (problem.t1, index, index < most, True))
    every = jnp.ones(problem.t0.shape, bool)
    t1, came, out = _over_pieces(change, to_event, problem, stepper, pieces, every)
    ts = problem.ts
    if ts is not None:  # beyond the last event, the outputs are its state, whatever their times
        ts = jnp.where(came[None] & _beyond(problem, t1), jax.lax.stop_gradient(t1)[None], ts)
    return problem._replace(t1=t1, ts=ts), out._replace(stopped=came)


def _over_pieces(change: Change, solve, problem: Problem, stepper: Stepper, pieces, valid):
    """The time to which each row comes, whether an event stopped it there, and the solution.

    `solve(part)` returns a piece, with its end, and its solution. The `pieces` are their ends, the
    number of the change at each, the rows in which there is one, and those whose work counts.
    """

    def piece(carry, of_piece):
        t, y, ys, result, reached, stats, going = carry
        index, end, number, jumps, counted = of_piece
        lost = is_lost(stepper, y, t) & going & (result == Result.SUCCESS)
        cause = jnp.where(index == 0, Result.NON_FINITE, Result.NON_FINITE_CHANGE)
        result = jnp.where(lost, cause.astype(jnp.int32), result)
        # A row that has come to its end has an empty piece there. One that failed takes no steps,
        # and adds nothing to the gradients of others.
        start = jnp.where(result == Result.SUCCESS, t, jnp.nan)
        part, inside = problem._replace(y0=y, t0=start, t1=end), None
        if problem.ts is not None:
            inside = _after(problem, t, index) & ~_beyond(problem, end) & going[None]
            part = _with_outputs(part, inside)
        part, out = solve(part)
        if inside is not None:
            ys = _filled_in(ys, out.ys, inside)
        solved = going & (result == Result.SUCCESS)
        work = solved & counted
        stats = jax.tree.map(lambda all, more: jnp.where(work, all + more, all), stats, out.stats)
        result = jnp.where(solved, out.result, result)
        reached = jnp.where(solved, out.t_reached, reached)
        came = solved & (result == Result.SUCCESS)
        stopped = came if out.stopped is None else came & out.stopped
        after = _changed(change, stopped & jumps, part.t1, number, out.y1, problem.args)
        # What has come to its end rests. What failed goes on, for NaN gradients by later times.
        rests = ~going & (result == Result.SUCCESS)
        y, t = jnp.where(rests[:, None], y, after), jnp.where(rests, t, part.t1)
        going = came if out.stopped is None else stopped & jumps
        return (t, y, ys, result, reached, stats, going), (stopped, out.h)

    result = jnp.where(valid, Result.SUCCESS, Result.INVALID_ARGUMENT).astype(jnp.int32)
    ys, none = problem.ts, Stats(*[jnp.zeros_like(result)] * 4)
    if ys is not None:
        ys = jnp.broadcast_to(problem.y0, (len(ys), *problem.y0.shape))
    carry = problem.t0, problem.y0, ys, result, problem.t0, none, jnp.ones_like(valid)
    numbered = jnp.arange(len(pieces[0]), dtype=jnp.int32), *pieces
    # Solved again on the way back: the tapes of all pieces would be written and kept, which takes
    # as long, or longer, and ten times the memory.
    carry, (stopped, h) = jax.lax.scan(
        jax.checkpoint(piece, prevent_cse=False), *vary_alike((carry, numbered))
    )
    t1, y1, ys, result, reached, stats, _ = carry
    if ys is not None:  # failed rows have the NaN of the end, whose outputs have no derivatives
        ys = jnp.where((result == Result.SUCCESS)[None, :, None], ys, y1[None])
    reached = jax.lax.stop_gradient(reached)
    return t1, stopped[-1], Integration(y1, ys, stats, result, reached, h[-1])


def _changed(change: Change, where: Bool[Array, " rows"], t, number, y, args):
    """The state after the change, in some rows, or NaN where that is not finite.

    The change is differentiated in rows alone in which it is finite: zero times NaN is NaN.
    """
    shared, row_args = args

    def in_rows(chosen):
        *own, of_rows = replace_rows((t, number, y, row_args), ~chosen, chosen)
        return *own, (shared, of_rows)

    after = jax.lax.stop_gradient(change(*in_rows(where)))
    good = where & over_rows(jnp.all, jnp.isfinite(after), where)
    # If no row changes, it has no row to be finite at.
    change, given = undifferentiated_unless(good.any(), (change, in_rows(good)))
    changed = jnp.where(good[:, None], change(*given), y)
    # Added to the state, so that a failure on which nothing depends has no gradient.
    return changed + jnp.where((where & ~good)[:, None], jnp.nan, 0.0)


def _without_padding(times: Float[Array, "jumps rows"], start: Float[Array, " rows"]):
    """Which times are jumps, the number of the last jump up to each, and its time.

    Up to the first jump, the number is 0 and the time is that of the start.
    """
    repeats = jnp.concatenate([jnp.zeros_like(times[:1], bool), times[1:] == times[:-1]])
    is_jump = ~jnp.isposinf(times) & ~repeats
    last = jax.lax.cummax(jnp.where(is_jump, _numbers(times), -1), axis=0)
    number = jnp.maximum(last, 0)
    latest = jnp.take_along_axis(times, number, axis=0)
    return is_jump, number, jnp.where(last < 0, start[None], latest)


def _beyond(problem: Problem, t: Float[Array, " rows"]) -> Bool[Array, "times rows"]:
    """Which outputs lie beyond a time."""
    assert problem.ts is not None
    return jnp.sign(problem.t1 - problem.t0)[None] * (problem.ts - t[None]) > 0


def _after(problem: Problem, start, index) -> Bool[Array, "times rows"]:
    """Which outputs, of those that are no padding, lie beyond the start of a piece."""
    after = _beyond(problem, start) | (index == 0)
    return after if problem.outputs is None else after & (_numbers(after) < problem.outputs[None])


def _numbers(of_times: Shaped[Array, "times rows"]) -> Int[Array, "times 1"]:
    return jnp.arange(len(of_times), dtype=jnp.int32)[:, None]


def _with_outputs(part: Problem, inside: Bool[Array, "times rows"]) -> Problem:
    """The piece with these outputs, or one at its end where there are none; the rest is padding."""
    assert part.ts is not None
    count, first = inside.sum(axis=0, dtype=jnp.int32), jnp.argmax(inside, axis=0)
    index = first.astype(jnp.int32)[None] + jnp.clip(_numbers(part.ts), 0, count[None] - 1)
    ts = jnp.where(count[None] > 0, jnp.take_along_axis(part.ts, index, axis=0), part.t1[None])
    return part._replace(ts=ts, outputs=jnp.maximum(count, 1))


def _filled_in(ys, of_piece: Float[Array, "times samples n"], inside: Bool[Array, "times rows"]):
    """The outputs, with those of a piece in their places."""
    index = _numbers(inside) - jnp.argmax(inside, axis=0).astype(jnp.int32)[None]
    moved = jax.vmap(entry_of_each, (None, 0))(of_piece, jnp.maximum(index, 0))
    return jnp.where(inside[..., None], moved, ys)
