"""A solve that is cut into pieces: by jumps, by breakpoints, and by events that change the state.

It is a scan over the pieces of each row. Each piece is a solve of its own, so that gradient methods
know nothing of cuts: the derivatives by their times are those by the ends of the pieces, and JAX
differentiates the change of the state itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxode._checks.arguments import check_real_times
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import Result
from jaxode._jax.sharding import vary_alike
from jaxode._jax.tangents import undifferentiated_unless
from jaxode.ode.field import check_field
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.outputs import beyond
from jaxode.ode.loop.rows import entry_of_each, reduce_rows, replace_rows
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.stepper import Stepper

# (t [rows], number [rows], y [samples, n], (shared, row_args)) -> y [samples, n]
Change = Callable[..., Float[Array, "samples n"]]


class Jumps(eqx.Module):
    """Times at which the state of a solve changes at once, to `change(t, y, args, i)`.

    Steps end exactly at each time. `Solution.ys` is the state before the change: at the time of a
    jump, `change` of it is the state after. `Solution.y1` is the state after all changes, also
    after one at the end time.

    Args:
        times: `[jumps]`, or with "per_sample" steps also `[batch, jumps]`, monotone from `t0` to
            `t1`, both included. Pad a shorter row with infinity or NaN. Jumps at one time happen in
            their order.
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


def check_jumps(jumps: Any) -> None:
    """Raise for what is no `Jumps`."""
    if jumps is not None and not isinstance(jumps, Jumps):
        raise TypeError(
            f"{arg('jumps')} must be a jaxode.Jumps; got {jumps!r}. Use jaxode.Jumps(times, "
            "change)."
        )


class Cuts(NamedTuple):
    """Times at which a solve is cut into pieces, in the order of each row; or one for each row."""

    times: Float[Array, "cuts rows"]
    """Padding repeats an earlier time."""
    number: Int[Array, "cuts rows"]
    """The number of the jump."""
    jumps: Bool[Array, "cuts rows"]
    """Whether the state changes there."""
    counted: Bool[Array, "cuts rows"]
    """False for padding."""

    @classmethod
    def of_problem(cls, problem: InitialValueProblem, times=None, breakpoints=None) -> "Cuts":
        """Cut at the `times` of jumps, and at the breakpoints between the ends of each row."""
        start, end = problem.t0[None], problem.t1[None]
        times = start[:0] if times is None else times
        is_jump, number, times = _without_padding(times, problem.t0)
        jumps = cls(times, number, is_jump, is_jump)
        if breakpoints is None:
            return jumps
        sign, fixed = jnp.sign(end - start), jax.lax.stop_gradient(breakpoints)
        inside = (sign * (fixed - start) > 0) & (sign * (end - fixed) > 0)
        none = jnp.zeros(inside.shape, jnp.int32)
        points = cls(jnp.where(inside, breakpoints, start), none, none > 0, inside)
        cuts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), jumps, points)
        # Times that a program holds as constants would be sorted by XLA's evaluator, for seconds.
        order = jax.lax.optimization_barrier(sign * jax.lax.stop_gradient(cuts.times))
        order = jnp.argsort(order, axis=0)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=0), cuts)

    def then(self, end: Float[Array, " rows"]) -> "Cuts":
        """Append the end of the solve as the last cut."""
        none = jnp.zeros((1, *end.shape), bool)
        end_cut = Cuts(end[None], none.astype(jnp.int32), none, ~none)
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), self, end_cut)


class Pieces(NamedTuple):
    """Options for solving a problem piece by piece."""

    solve: Callable[[InitialValueProblem], tuple[InitialValueProblem, Integration]]
    """Solves a piece, and returns it with its end."""
    problem: InitialValueProblem
    stepper: Stepper
    cuts: Cuts
    at_jump: Change | None
    at_event: Change | None
    most: int
    """The number of events that change the state by `at_event`; the next one ends the solve."""

    def run(
        self, valid: Bool[Array, " rows"]
    ) -> tuple[InitialValueProblem, Integration, Float[Array, "pieces rows"]]:
        """Scan over the pieces of each row, which end at the next cut, or at an event.

        The times of both have derivatives. They are the start of the next piece, so those of what
        follows are right, too.
        """
        problem, cuts = self.problem, self.cuts.then(self.problem.t1)
        problem, cuts, valid = vary_alike((problem, cuts, valid))
        numbers = jnp.arange(len(cuts.times) + self.most, dtype=jnp.int32)
        # Pieces are solved again on the way back. To keep the tapes of all of them would take as
        # long, or longer, and ten times the memory.
        piece = jax.checkpoint(self._replace(problem=problem, cuts=cuts)._piece, prevent_cse=False)
        start = vary_alike((_Carry.start(problem, valid), numbers))
        end, (trajectory, piece_ends, ended) = jax.lax.scan(piece, *start)
        ys = end.ys
        if ys is not None:  # failed rows have the NaN of the end, whose outputs have no derivatives
            ys = jnp.where((end.result == Result.SUCCESS)[None, :, None], ys, end.y[None])
        if ended is not None:
            ended, problem = ended.any(axis=0), problem._replace(t1=end.t)
        reached = jax.lax.stop_gradient(end.reached)
        out = Integration(end.y, ys, end.stats, end.result, reached, end.h, trajectory, ended)
        return problem, out, piece_ends

    def _piece(self, carry: "_Carry", index: Int[Array, ""]):
        last_cut, args = len(self.cuts.times) - 1, self.problem.args
        place = jnp.minimum(index - carry.events, last_cut)
        cut = jax.tree.map(lambda x: entry_of_each(x, place), self.cuts)
        part, inside, result = self._next(carry, cut, index)
        part, out = self.solve(part)
        solved, ys = carry.going & (result == Result.SUCCESS), carry.ys
        if inside is not None and out.ys is not None:
            ys = _with_piece(ys, out.ys, inside)
        result = jnp.where(solved, out.result, result)
        came = solved & (result == Result.SUCCESS)
        stopped = jnp.zeros_like(came) if out.stopped is None else came & out.stopped
        again, at_cut, y = stopped & (carry.events < self.most), came & ~stopped, out.y1
        if self.at_jump is not None:
            y = _changed(self.at_jump, at_cut & cut.jumps, part.t1, cut.number, y, args)
        if self.at_event is not None:
            y = _changed(self.at_event, again, part.t1, carry.events, y, args)
        # Rows that reached their end stop. Failed rows go on, so that gradients by later times are
        # NaN.
        rests = ~carry.going & (result == Result.SUCCESS)
        # A step size from before a change, or from an empty piece, says nothing about the next one.
        h = jax.lax.stop_gradient(out.h)
        h = jnp.where(cut.counted & (h != 0), h, carry.h)

        def add(total, increment):
            return jnp.where(solved & cut.counted, total + increment, total)

        new_carry = _Carry(
            t=jnp.where(rests, carry.t, part.t1),
            y=jnp.where(rests[:, None], carry.y, y),
            ys=ys,
            result=result,
            reached=jnp.where(solved, out.t_reached, carry.reached),
            stats=jax.tree.map(add, carry.stats, out.stats),
            going=again | (at_cut & (place < last_cut)),
            events=carry.events + again.astype(jnp.int32),
            h=jnp.where(at_cut & ~cut.jumps, h, jnp.nan),
        )
        ended = None if out.stopped is None else stopped & ~again
        return new_carry, (out.trajectory, part.t1, ended)

    def _next(self, carry: "_Carry", cut: Cuts, index: Int[Array, ""]):
        """The piece up to a cut, which outputs lie inside, and the result so far."""
        problem, going = self.problem, carry.going
        lost = self.stepper.controller.is_lost(carry.y, carry.t)
        lost &= going & (carry.result == Result.SUCCESS)
        cause = jnp.where(index == 0, Result.NON_FINITE, Result.NON_FINITE_CHANGE)
        result = jnp.where(lost, cause.astype(jnp.int32), carry.result)
        # A row that reached its end gets an empty piece there. A failed row takes no steps, and
        # adds nothing to the gradients of others.
        end = jnp.where(going | (result != Result.SUCCESS), cut.times, carry.t)
        start = jnp.where(result == Result.SUCCESS, carry.t, jnp.nan)
        part, inside = problem._replace(y0=carry.y, t0=start, t1=end), None
        if problem.piece is not None:  # with breakpoints, whose pieces go on with the same step
            # Between a jump and a breakpoint at the same time, an empty piece lies before them.
            before = jnp.sign(problem.t1 - problem.t0) * 8 * jnp.finfo(end.dtype).eps * jnp.abs(end)
            first = (carry.t == end) & cut.counted & ~cut.jumps
            first = jnp.where(first, end - before, carry.t)
            piece = jax.lax.stop_gradient(jnp.stack([first, end], axis=1))
            part = part._replace(piece=piece, h0=carry.h)
        if problem.ts is not None:
            inside = _after(problem, carry.t, index) & ~beyond(problem, end) & going[None]
            part = _with_outputs(part, inside)
        return part, inside, result


class _Carry(NamedTuple):
    """The progress of each row through its pieces."""

    t: Float[Array, " rows"]
    y: Float[Array, "samples n"]
    ys: Float[Array, "times samples n"] | None
    result: Int[Array, " rows"]
    reached: Float[Array, " rows"]
    stats: Stats
    going: Bool[Array, " rows"]
    events: Int[Array, " rows"]
    """The number of events that have changed the state."""
    h: Float[Array, " rows"]
    """The step to try first, or NaN."""

    @classmethod
    def start(cls, problem: InitialValueProblem, valid: Bool[Array, " rows"]) -> "_Carry":
        t, y, ys, none = problem.t0, problem.y0, problem.ts, jnp.zeros(valid.shape, jnp.int32)
        ys = None if ys is None else jnp.broadcast_to(y, (len(ys), *y.shape))
        result = jnp.where(valid, Result.SUCCESS, Result.INVALID_ARGUMENT).astype(jnp.int32)
        going, h = jnp.ones_like(valid), jnp.full_like(t, jnp.nan)
        return cls(t, y, ys, result, t, Stats(*[none] * 4), going, none, h)


def _changed(change: Change, where: Bool[Array, " rows"], t, number, y, args):
    """The state after the change, in some rows, or NaN where that is not finite.

    Differentiate the change only in rows where it is finite: zero times NaN is NaN.
    """
    shared, row_args = args

    def in_rows(chosen):
        *point, of_rows = replace_rows((t, number, y, row_args), ~chosen, chosen)
        return *point, (shared, of_rows)

    after = jax.lax.stop_gradient(change(*in_rows(where)))
    good = where & reduce_rows(jnp.all, jnp.isfinite(after), where)
    # If no row changes, there is none at which the change is finite.
    change, arguments = undifferentiated_unless(good.any(), (change, in_rows(good)))
    changed = jnp.where(good[:, None], change(*arguments), y)
    # Added to the state, so that a failure on which nothing depends has no gradient.
    return changed + jnp.where((where & ~good)[:, None], jnp.nan, 0.0)


def _without_padding(times: Float[Array, "jumps rows"], start: Float[Array, " rows"]):
    """Which times are jumps, the number of the last jump up to each, and its time.

    Without a jump, the number is 0 and the time is that of the start.
    """
    is_jump = ~jnp.isposinf(times)
    jump_index = jax.lax.cummax(jnp.where(is_jump, _indices(times), -1), axis=0)
    number = jnp.maximum(jump_index, 0)
    latest = jnp.take_along_axis(times, number, axis=0)
    return is_jump, number, jnp.where(jump_index < 0, start[None], latest)


def _after(problem: InitialValueProblem, start, index) -> Bool[Array, "times rows"]:
    """Which outputs, of those that are no padding, lie beyond the start of a piece."""
    after = beyond(problem, start) | (index == 0)
    return after if problem.outputs is None else after & (_indices(after) < problem.outputs[None])


def _indices(of_times: Shaped[Array, "times rows"]) -> Int[Array, "times 1"]:
    """0, 1, 2 and so on, to broadcast with `of_times`."""
    return jnp.arange(len(of_times), dtype=jnp.int32)[:, None]


def _with_outputs(
    part: InitialValueProblem, inside: Bool[Array, "times rows"]
) -> InitialValueProblem:
    """The piece with these outputs, or one at its end where there are none; the rest is padding."""
    assert part.ts is not None
    count, first = inside.sum(axis=0, dtype=jnp.int32), jnp.argmax(inside, axis=0)
    index = first.astype(jnp.int32)[None] + jnp.clip(_indices(part.ts), 0, count[None] - 1)
    ts = jnp.where(count[None] > 0, jnp.take_along_axis(part.ts, index, axis=0), part.t1[None])
    return part._replace(ts=ts, outputs=jnp.maximum(count, 1))


def _with_piece(ys, of_piece: Float[Array, "times samples n"], inside: Bool[Array, "times rows"]):
    """The outputs, with those of a piece in their places."""
    index = _indices(inside) - jnp.argmax(inside, axis=0).astype(jnp.int32)[None]
    moved = jax.vmap(entry_of_each, (None, 0))(of_piece, jnp.maximum(index, 0))
    return jnp.where(inside[..., None], moved, ys)
