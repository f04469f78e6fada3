"""The steps of a solve, and the solution inside them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode.ode.loop.checkpoints import Checkpoints
from jaxode.ode.loop.rows import one_row
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.solvers.base import Method


class Step(NamedTuple):
    """A step, or the cotangents of one: start, size, state at the start, and stages."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    y: Float[Array, "samples n"]
    k: Float[Array, "stages samples n"]


class Trajectory(NamedTuple):
    """The accepted steps, with room for all that the loop can take. Unused entries have no meaning.

    Dense output keeps every state with its stages; without it, a backward pass takes the steps
    again from `checkpoints`.
    """

    times: Float[Array, "steps+1 rows"]
    """Step `i` of a row goes from `times[i]` to `times[i + 1]`. They are equal if the row waits."""
    count: Int[Array, ""]
    y: Float[Array, "steps samples n"] | None
    k: Float[Array, "steps stages samples n"] | None
    checkpoints: Checkpoints | None = None
    slope: Float[Array, "samples n"] | None = None
    """The vector field at the end of the last step, if the solver knows it."""

    @classmethod
    def start(cls, length: int, stages: int, t0, y0, dense: bool, slots: int | None):
        """A trajectory without steps."""
        times = jnp.broadcast_to(t0, (length + 1, *t0.shape))
        y = k = checkpoints = None
        if dense:
            y = jnp.broadcast_to(y0, (length, *y0.shape))
            k = jax.lax.full_like(y0, 0, shape=(length, stages, *y0.shape))
        elif slots is not None:
            checkpoints = Checkpoints.start(slots, stages, y0)
        return cls(times, jnp.zeros((), jnp.int32), y, k, checkpoints)

    def append(self, step: Step, t, accept: Bool[Array, " rows"]) -> "Trajectory":
        """Append a step to the times `t`. If no row accepted it, it is overwritten later."""

        def put(into, x, at):
            return jax.lax.dynamic_update_index_in_dim(into, x, at, 0)

        # A waiting row has a step of size zero with all stages at its start, and not the stages of
        # the failed attempt, which may be NaN.
        k = step.k if one_row(t) else jnp.where(accept[None, :, None], step.k, step.k[:1])
        count, advanced, new = self.count, accept.any(), {}
        if self.y is not None:
            new = {"y": put(self.y, step.y, count), "k": put(self.k, k, count)}
        if self.checkpoints is not None:
            new["checkpoints"] = self.checkpoints.offer(count, step.y, k, advanced)
        times, count = put(self.times, t, count + 1), count + advanced.astype(jnp.int32)
        return self._replace(times=times, count=count, **new)


class Curve(NamedTuple):
    """The dense output of a step: a polynomial in `theta`, which runs from 0 to 1."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    y: Float[Array, "samples n"]
    powers: Float[Array, "degree samples n"]
    """The coefficients of `theta`, `theta^2` and so on."""
    slope: Float[Array, "samples n"]

    @classmethod
    def of_step(cls, method: Method, step: Step) -> "Curve":
        t, h, y, k = step
        powers = weighted_sum(jnp.asarray(method.dense, y.dtype), k)
        return cls(t, h, y, h.astype(y.dtype)[None, :, None] * powers, k[0])

    def at(self, time: Float[Array, " rows"]) -> Float[Array, "samples n"]:
        """The state at one time per row."""
        waited = self.h == 0
        past = (time - self.t).astype(self.y.dtype)
        h = jnp.where(waited, 1.0, self.h).astype(self.y.dtype)
        theta = jnp.where(waited, 0.0, past / h)[:, None]
        moved = self.powers[-1]
        for power in self.powers[-2::-1]:
            moved = power + theta * moved
        # A step of size zero has one output, its start. Its derivative with respect to time is the
        # slope.
        along = jnp.where(waited, past, 0.0)[:, None]
        return self.y + theta * moved + along * self.slope
