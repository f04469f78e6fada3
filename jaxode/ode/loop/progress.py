"""How far a solve has come: where its next step ends, and what becomes of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.errors import Result
from jaxode.ode.loop.problem import Stepper, limit_step, weighted_sum
from jaxode.ode.loop.rows import over_rows
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.step_size import error_ratio, is_lost, propose

# If at most this many steps are left, they are made equal. Measured: benchmarks/NOTES.md.
LAST_STEPS = 3


class Progress(NamedTuple):
    """How far each row has come."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    """The step size to try next."""
    y: Float[Array, "samples n"]
    done: Bool[Array, " rows"]
    """Whether the end time is reached. The time cannot tell: compilers may round it twice."""
    result: Int[Array, " rows"]
    accepted: Int[Array, " rows"]
    rejected: Int[Array, " rows"]
    overreach: Float[Array, " rows"]
    """How far the last rejected attempt reaches beyond `t` if it was not finite; otherwise not
    positive. A solve that ends before passing that time failed because of it."""

    @classmethod
    def start(cls, t, h, y, result) -> "Progress":
        """At the start of a solve. An empty span takes one step of size zero, which carries the
        derivatives with respect to times."""
        zero = jnp.zeros(t.shape, jnp.int32)
        result = result.astype(jnp.int32)
        return cls(t, h, y, jnp.zeros(t.shape, bool), result, zero, zero, jnp.zeros_like(t))

    @property
    def active(self) -> Bool[Array, " rows"]:
        """Rows that have neither ended nor failed."""
        return ~self.done & (self.result == Result.SUCCESS)

    def stats(self, evals_per_step: int, first_evals: int) -> Stats:
        steps = self.accepted + self.rejected
        return Stats(steps, self.accepted, self.rejected, first_evals + evals_per_step * steps)


class Aim(NamedTuple):
    """Where the next step of each row ends."""

    t: Float[Array, " rows"]
    last: Bool[Array, " rows"]
    """Whether it is the end time."""


def aim(stepper: Stepper, steps: Any, state: Any, taken: Int[Array, " rows"], start, end) -> Aim:
    """The next step from `state`.

    `steps` is None with error control. Otherwise it is the number of equal steps from `start` to
    `end`, of which `taken` are done.
    """
    if steps is None:
        # The last steps are equally long: a short one at the end would cost as much as any other,
        # and leave the error to the rest. SAFETY leaves room for a tenth more.
        reach, left = 1.1 * jnp.abs(state.h), end - state.t
        if stepper.max_step is not None:
            reach = jnp.minimum(reach, 1.01 * stepper.max_step)
        info = jnp.finfo(reach.dtype)
        count = jnp.maximum(jnp.ceil(jnp.abs(left) / jnp.maximum(reach, info.tiny)), 1.0)
        # If the times are so close that rounding lengthens a step, a rejected step would be divided
        # into itself again.
        resolved = jnp.abs(left) > 200 * info.eps * jnp.maximum(jnp.abs(state.t), jnp.abs(end))
        step = jnp.where((count <= LAST_STEPS) & resolved, left / count, state.h)
        last = (count == 1) | (state.t + step == end)
        return Aim(jnp.where(last, end, state.t + step), last)
    count = taken + 1
    last = count == steps
    fraction = count.astype(end.dtype) / jnp.asarray(steps, end.dtype)
    return Aim(jnp.where(last, end, start + fraction * (end - start)), last)


def judge(
    stepper: Stepper, state: Progress, aim: Aim, y_next, k
) -> tuple[Bool[Array, " rows"], Progress]:
    """Which rows accept their step, and how far they have come then."""
    running = state.active
    accept, h, result, overreach = _verdict(stepper, state, running, aim, y_next, k)
    return accept, Progress(
        t=jnp.where(accept, aim.t, state.t),
        h=h,
        y=jnp.where(accept[:, None], y_next, state.y),
        done=state.done | (accept & aim.last),
        result=result.astype(jnp.int32),
        accepted=state.accepted + accept.astype(jnp.int32),
        rejected=state.rejected + (running & ~accept).astype(jnp.int32),
        overreach=overreach,
    )


def _verdict(stepper: Stepper, state: Progress, running, aim: Aim, y_next, k):
    """Which rows accept, their next step sizes, results and overreach."""
    if stepper.steps is not None:
        finite = ~is_lost(stepper, y_next, running)
        result = jnp.where(running & ~finite, _not_finite(stepper, k, running), state.result)
        return running & finite, state.h, result, state.overreach
    t_next, last = aim.t, aim.last
    h = t_next - state.t
    error = h[:, None] * weighted_sum(jnp.asarray(stepper.method.b_error, y_next.dtype), k)
    ratio = error_ratio(stepper, error, state.y, y_next, h)
    finite = jnp.isfinite(ratio)
    guessed = state.accepted == 0
    accept, factor = propose(ratio.astype(h.dtype), stepper.method.error_order, guessed)
    h_next = limit_step(stepper, h * factor)
    # A step cut short to reach the end says little about the next one.
    shorter = jnp.abs(h_next) < jnp.abs(state.h)
    h_next = jnp.where(running & ~(accept & last & shorter), h_next, state.h)
    # Underflow: the step does not move the time, or a shorter one would end there again.
    retry = state.t + h_next
    stuck = (~last & (t_next == state.t)) | (~accept & ((retry == state.t) | (retry == t_next)))
    accept &= running
    size = jax.lax.stop_gradient(jnp.abs(h))
    rejected = jnp.where(running, jnp.where(finite, 0.0, size), state.overreach)
    overreach = jnp.where(accept, state.overreach - size, rejected)
    finite &= overreach <= 0
    cause = jnp.where(finite, Result.STEP_SIZE_UNDERFLOW, _not_finite(stepper, k, running))
    attempts = state.accepted + state.rejected + 1
    exhausted = running & (attempts >= stepper.max_steps) & ~(accept & last)
    result = jnp.where(exhausted & finite, Result.MAX_STEPS_REACHED, state.result)
    failed = running & (stuck | (exhausted & ~finite))
    return accept, h_next, jnp.where(failed, cause, result), overreach


def _not_finite(stepper: Stepper, k: Float[Array, "stages samples n"], of_rows) -> Any:
    """The result of a step that is not finite."""
    return stepper.method.failure(k, lambda flags: over_rows(jnp.all, flags, of_rows))
