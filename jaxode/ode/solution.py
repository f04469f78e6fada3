"""The result of a solve."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.caller import caller, public
from jaxode._checks.errors import Remedies, Result, guarded, nan_or_raise
from jaxode._checks.rules import Faults, is_known
from jaxode.ode.dense import Interpolant
from jaxode.ode.loop.stats import Stats


class Solution(eqx.Module):
    """The result of `jaxode.solve`. With a batch, states have a leading axis `[batch, ...]`."""

    y1: Any
    """State at the end time: same structure and shapes as the initial state. NaN on failure."""
    ts: Float[Array, "*rows times"] | None
    """The times asked for, or None."""
    ys: Any
    """States at `ts`. Leaves are `[times, ...]`; with a batch `[times, batch, ...]`, or
    `[batch, times, ...]` if each row has its own `ts`. None without `ts`."""
    stats: Stats
    """Steps and evaluations of the forward solve."""
    result: Int[Array, "*rows"]
    """A `Result` code; with per-sample steps, one per row."""
    t_reached: Float[Array, "*rows"]
    """The time at which the solve stopped: the end time unless it failed."""
    t1: Float[Array, "*rows"]
    """The end time as passed, or the time of the event that ended the solve; NaN if a solve with an
    event failed. Per row with per-sample steps."""
    event_occurred: Bool[Array, "*rows"] | None = None
    """Whether an event ended the solve. Those at which the state changed do not count. None without
    `event`."""
    interpolant: Interpolant | None = None
    """Dense output for `evaluate`. None without `dense`."""

    @property
    def ok(self) -> Bool[Array, "*rows"]:
        """Whether the solve reached its end time (per row with per-sample steps)."""
        return self.result == Result.SUCCESS

    @public("evaluate")
    def evaluate(self, t: Float[Array, "..."]) -> Any:
        """The state at `t` between the ends, by the solver's interpolant. Needs `dense=True`.

        Args:
            t: a time, or times `[times]`. With per-sample steps: one time for all samples, one per
                sample `[batch]`, or several per sample `[batch, times]`.

        Returns:
            The state. The axes of `t` come before the axes of the state or sample. NaN outside the
            span of a row.

        Raises:
            ValueError: without `dense=True`, for times of another shape, and, without per-sample
                steps, for times known to lie outside the span.

        Differentiation: with respect to `t`, and everything that the solve is differentiable in.
        """
        return self._interpolant().at(t)

    @public("derivative")
    def derivative(self, t: Float[Array, "..."]) -> Any:
        """The time derivative of `evaluate`: the interpolant's, close to the field."""
        return self._interpolant().at(t, derivative=True)

    def _interpolant(self) -> Interpolant:
        if self.interpolant is None:
            raise ValueError(f"{caller()}: needs a solve with dense=True. Pass it to jaxode.solve.")
        return self.interpolant


def report(solution: Solution, faults: Faults, remedies: Remedies) -> Solution:
    """Raise `SolveError` if a solve failed: now, or when the compiled program runs."""
    nan = nan_or_raise(solution.result, solution.t_reached, faults, remedies=remedies)
    if is_known(solution.result):
        return solution
    ok = solution.ok

    def guard(leaf, axis=0):
        shape = (1,) * axis + ok.shape + (1,) * (leaf.ndim - axis - ok.ndim)
        return guarded(leaf, ok.reshape(shape), nan.reshape(shape))

    y1 = jax.tree.map(guard, solution.y1)
    rows_axis = 0 if solution.ts is None or solution.ts.ndim == 2 else 1
    ys = jax.tree.map(lambda leaf: guard(leaf, rows_axis), solution.ys)
    t1, inter = solution.t1, solution.interpolant
    if solution.event_occurred is not None:
        t1 = guard(t1)
    if inter is not None:
        inter = dataclasses.replace(inter, y1=guard(inter.y1))
    return dataclasses.replace(solution, y1=y1, ys=ys, t1=t1, interpolant=inter)
