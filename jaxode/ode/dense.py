"""The solution between its ends, by the solver's own interpolant."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import check_real_times
from jaxode._checks.caller import arg, caller
from jaxode._checks.rules import is_known
from jaxode.ode.loop.rows import entry_of_each
from jaxode.ode.loop.trajectory import Curve, Step, Trajectory
from jaxode.ode.solvers.base import Method


class Interpolant(eqx.Module):
    """A solution as a function of time, between its ends."""

    trajectory: Trajectory
    """Pieces of the solve, stacked along the leading axes."""
    piece_ends: Float[Array, "pieces rows"]
    """The end time of each piece."""
    t0: Float[Array, " rows"]
    t1: Float[Array, " rows"]
    ok: Bool[Array, " rows"]
    y1: Float[Array, "samples n"]
    """The end state. NaN in a failed row, whose whole path is then NaN."""
    method: Method = eqx.field(static=True)
    ravel: Any = eqx.field(static=True)
    """Maps rows to states, by `back`."""
    batch: Any = eqx.field(static=True)
    """Step sizes of the samples: "joint", "per_sample", or None for a single state."""

    @property
    def per_sample(self) -> bool:
        """Whether each sample is asked at its own time."""
        return self.batch == "per_sample"

    def at(self, t: Any, derivative: bool = False) -> PyTree:
        """The state, or its derivative, at one or several times. NaN outside the span."""
        if self.t0.ndim != 1:
            raise ValueError(
                f"{caller()}: must be given a single solution; got one of jax.vmap. Use "
                f"jax.vmap(lambda solution: solution.{caller()}(t))."
            )
        t, several = self._on_rows(t)
        low, high = jnp.minimum(self.t0, self.t1), jnp.maximum(self.t0, self.t1)
        inside = (low[None] <= t) & (t <= high[None])
        is_concrete = is_known((t, self.t0, self.t1, self.ok)) and np.all(self.ok)
        if not self.per_sample and is_concrete and not np.all(inside):
            raise ValueError(
                f"{arg('t')} must lie between t0={float(self.t0[0])!r} and "
                f"t1={float(self.t1[0])!r}; got {np.asarray(t)[~np.asarray(inside)][0]}. Extend "
                "the solve."
            )
        # Times outside, whose powers may be infinite, are replaced by the start. The steps of a row
        # with a NaN start are at zero.
        start = jnp.where(jnp.isnan(self.t0), 0, self.t0)[None]
        path = self._path
        if derivative:  # each row depends only on its own time

            def path(t):
                return jax.jvp(self._path, (t,), (jnp.ones_like(t),))[1]

        values = jax.vmap(path)(jnp.where(inside, t, start))
        values = jnp.where(inside[..., None], values, jnp.nan)
        values = jnp.where(self.ok[None, :, None], values, self.y1[None])
        states = jax.vmap(self.ravel.back)(values)
        if self.batch is None:
            states = jax.tree.map(lambda x: x[:, 0], states)
        elif self.per_sample and several:
            states = jax.tree.map(lambda x: x.swapaxes(0, 1), states)
        return states if several else jax.tree.map(lambda x: x[0], states)

    def _on_rows(self, t: Any) -> tuple[Float[Array, "times rows"], bool]:
        """The times of each row, and whether `t` has an axis of times."""
        rows = len(self.t0)
        check_real_times("t", t)
        t = jnp.asarray(t, self.t0.dtype)
        if not self.per_sample and t.ndim <= 1:
            return jnp.reshape(t, (-1, 1)), t.ndim == 1
        if self.per_sample and t.shape in ((), (rows,)):
            return jnp.broadcast_to(t, (1, rows)), False
        if self.per_sample and t.ndim == 2 and t.shape[0] == rows:
            return t.T, True
        shapes, cure = "a scalar or a vector", ""
        if self.per_sample:
            shapes = f"a scalar, [batch] or [batch, times], with a batch of {rows}"
        if self.per_sample and t.ndim == 1:
            cure = f" To give all rows these times, pass jnp.tile(t, ({rows}, 1))."
        raise ValueError(f"{arg('t')} must be {shapes}; got shape {t.shape}.{cure}")

    def _path(self, t: Float[Array, " rows"]) -> Float[Array, "samples n"]:
        """The state at a time for each row. At the time of a change, it is the state before."""
        steps, y, k = self.trajectory, self.trajectory.y, self.trajectory.k
        assert y is not None
        pieces, length = y.shape[:2]
        number = jnp.arange(length, dtype=jnp.int32)[None, :, None]
        step_ends, piece_ends, time = jax.lax.stop_gradient(
            (steps.times[:, 1:], self.piece_ends, t)
        )
        # The index of the step: how many steps end before the time.
        sign = jax.lax.stop_gradient(jnp.sign(self.t1 - self.t0))[None]
        piece_ends = [sign * piece_ends[:-1], jnp.full_like(piece_ends[:1], jnp.inf)]
        piece_ends = jnp.concatenate(piece_ends)[:, None]
        taken = number < steps.count.reshape(pieces, 1, -1) - 1
        step_ends = jnp.where(taken, sign[None] * step_ends, piece_ends)
        step_ends = step_ends.reshape(pieces * length, -1)
        index = jax.vmap(jnp.searchsorted)(step_ends.T, sign[0] * time)
        *of_steps, k = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (steps.times[:, :-1], steps.times[:, 1:], y, k)
        )
        start, end, y = (entry_of_each(x, index) for x in of_steps)
        k = jax.vmap(entry_of_each, (1, None))(k, index)
        return Curve.of_step(self.method, Step(start, end - start, y, k)).at(t)
