"""What a solve returns."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.core
from jaxtyping import Array, Bool, Float, Int

from jaxode.ode.dense import Interpolant
from jaxode.ode.loop.outcome import Result, Stats
from jaxode.ode.results import Faults, nan_or_raise, tied


class Solution(eqx.Module):
    """The result of `jaxode.solve`. With a batch, states have a leading axis `[batch, ...]`."""

    y1: Any
    """State at the end time: same structure and shapes as the initial state. NaN on failure."""
    ts: Float[Array, "*rows times"] | None
    """The times asked for, or None."""
    ys: Any
    """States at `ts`: the leading axes of each leaf are those of `ts`, `[times]` before that of a
    batch, or `[batch, times]`. None without `ts`."""
    stats: Stats
    """Steps and evaluations of the forward solve."""
    result: Int[Array, "*rows"]
    """A `Result` code; with per-sample steps, one per row."""
    t_reached: Float[Array, "*rows"]
    """The time at which the solve stopped: the end time unless it failed. NaN if not known, which
    can only be where a solver of diffrax without error control went on with a NaN."""
    t1: Float[Array, "*rows"]
    """The end time: as it was passed, or that of the event; per row with per-sample steps."""
    event_came: Bool[Array, "*rows"] | None = None
    """Whether there was an event; None if none was asked for."""
    interpolant: Interpolant | None = None
    """What `evaluate` needs; None without `dense`."""

    @property
    def ok(self) -> Bool[Array, "*rows"]:
        """Whether the solve reached its end time (per row with per-sample steps)."""
        return self.result == Result.SUCCESS

    def evaluate(self, t: Float[Array, "..."]) -> Any:
        """The state at `t` between the ends, by the solver's interpolant. Needs `dense=True`.

        Args:
            t: a time, or a vector of times `[times]`. With per-sample steps: a time for all, one
                for each sample `[batch]`, or several for each `[batch, times]`.

        Returns:
            The state; its leaves have the axes of `t` before those of the state or the sample. NaN
            outside of the span of a row.

        Raises:
            ValueError: without `dense=True`, for times of another shape, and for times that are
                known to be outside of the one span that there is without per-sample steps.

        Differentiation: with respect to `t`, and all that the solve is.
        """
        return self._interpolant("evaluate").at("evaluate", t)

    def derivative(self, t: Float[Array, "..."]) -> Any:
        """The derivative of `evaluate` by `t`: that of the interpolant, close to the field."""
        return self._interpolant("derivative").at("derivative", t, derivative=True)

    def _interpolant(self, where: str) -> Interpolant:
        if self.interpolant is None:
            raise ValueError(f"{where}: needs a solve with dense=True. Pass it to jaxode.solve.")
        return self.interpolant


def raise_on_failure(solution: Solution, where: str, faults: Faults | None = None) -> Solution:
    """Raise `SolveError` if a solve failed: at once if it has run, else when it runs.

    Under `jit` the check is a host callback behind a `lax.cond`, so it costs nothing until it
    fires; it does keep the compiled program out of JAX's persistent compilation cache.
    """
    nan = nan_or_raise(solution.result, solution.t_reached, where, faults)
    if not isinstance(solution.result, jax.core.Tracer):
        return solution
    ok = solution.ok

    def guard(leaf, axis):
        shape = (1,) * axis + ok.shape + (1,) * (leaf.ndim - axis - ok.ndim)
        return tied(leaf, ok.reshape(shape), nan.reshape(shape))

    y1 = jax.tree.map(lambda leaf: guard(leaf, 0), solution.y1)
    rows_axis = 0 if solution.ts is None or solution.ts.ndim == 2 else 1
    ys = jax.tree.map(lambda leaf: guard(leaf, rows_axis), solution.ys)
    t1, inter = solution.t1, solution.interpolant
    if solution.event_came is not None:
        t1 = guard(t1, 0)
    if inter is not None:
        end = tied(inter.y1, ok.reshape(-1, 1), nan.reshape(-1, 1))
        inter = dataclasses.replace(inter, y1=end)
    return dataclasses.replace(solution, y1=y1, ys=ys, t1=t1, interpolant=inter)
