"""Progress of a solve: choose the end of the next step, and accept or reject it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.errors import Result
from jaxode.ode.loop.initial_value_problem import Stepper, weighted_sum
from jaxode.ode.loop.rows import reduce_rows
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.step_size import propose

# If at most this many steps are left, they are made equal. Measured: benchmarks/NOTES.md.
LAST_STEPS = 3


class Progress(NamedTuple):
    """The progress of each row."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    """The step size to try next."""
    y: Float[Array, "samples n"]
    done: Bool[Array, " rows"]
    """Whether the end time is reached. The time cannot tell: compilers may round it twice."""
    result: Int[Array, " rows"]
    accepted: Int[Array, " rows"]
    rejected: Int[Array, " rows"]
    nonfinite_ahead: Float[Array, " rows"]
    """The reach beyond `t` of the last rejected attempt if it was not finite; otherwise not
    positive. A solve that ends before passing that time failed because of it."""

    @classmethod
    def start(cls, t, h, y, result) -> "Progress":
        """Begin a solve. An empty span takes one step of size zero, which carries the
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


def next_step_end(
    stepper: Stepper, steps: Any, state: Progress, taken: Int[Array, " rows"], start, end
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Choose the end of each row's next step, and say whether it is the end time.

    `steps` is None with error control. Otherwise it is the number of equal steps from `start` to
    `end`, of which `taken` are done.
    """
    if steps is not None:
        count = taken + 1
        last = count == steps
        fraction = count.astype(end.dtype) / jnp.asarray(steps, end.dtype)
        return jnp.where(last, end, start + fraction * (end - start)), last
    # The last steps are equally long: a short one at the end would cost as much as any other, and
    # leave the error to the rest. SAFETY leaves room for a tenth more.
    reach, left, max_step = 1.1 * jnp.abs(state.h), end - state.t, stepper.controller.max_step
    if max_step is not None:
        reach = jnp.minimum(reach, 1.01 * max_step)
    info = jnp.finfo(reach.dtype)
    count = jnp.maximum(jnp.ceil(jnp.abs(left) / jnp.maximum(reach, info.tiny)), 1.0)
    # If the times are so close that rounding lengthens a step, a rejected step would be divided
    # into itself again.
    resolved = jnp.abs(left) > 200 * info.eps * jnp.maximum(jnp.abs(state.t), jnp.abs(end))
    step = jnp.where((count <= LAST_STEPS) & resolved, left / count, state.h)
    last = (count == 1) | (state.t + step == end)
    return jnp.where(last, end, state.t + step), last


def accept_or_reject(stepper: Stepper, state: Progress, t_next, last, y_next, k) -> Progress:
    """Update the progress of each row after its step to `t_next`, which may be the `last`."""
    running = state.active
    accept, h, result, nonfinite_ahead = _verdict(stepper, state, t_next, last, y_next, k)
    return Progress(
        t=jnp.where(accept, t_next, state.t),
        h=jax.lax.stop_gradient(h),
        y=jnp.where(accept[:, None], y_next, state.y),
        done=state.done | (accept & last),
        result=result.astype(jnp.int32),
        accepted=state.accepted + accept.astype(jnp.int32),
        rejected=state.rejected + (running & ~accept).astype(jnp.int32),
        nonfinite_ahead=nonfinite_ahead,
    )


def _verdict(stepper: Stepper, state: Progress, t_next, last, y_next, k):
    """Which rows accept, their next step sizes, results and `nonfinite_ahead`."""
    controller, method, running = stepper.controller, stepper.method, state.active

    def not_finite():
        return method.failure(k, lambda flags: reduce_rows(jnp.all, flags, running))

    if stepper.steps is not None:
        lost = running & controller.is_lost(y_next, running)
        result = jnp.where(lost, not_finite(), state.result)
        return running & ~lost, state.h, result, state.nonfinite_ahead
    h = t_next - state.t
    error = h[:, None] * weighted_sum(jnp.asarray(method.b_error, y_next.dtype), k)
    ratio = controller.error_ratio(error, state.y, y_next, h)
    finite = jnp.isfinite(ratio)
    guessed = state.accepted == 0
    accept, factor = propose(ratio.astype(h.dtype), method.error_order, guessed)
    h_next = controller.limit(h * factor)
    # A step cut short to reach the end says little about the next one.
    shorter = jnp.abs(h_next) < jnp.abs(state.h)
    h_next = jnp.where(running & ~(accept & last & shorter), h_next, state.h)
    # Underflow: the step does not move the time, or a shorter one would end there again.
    retry = state.t + h_next
    stuck = (~last & (t_next == state.t)) | (~accept & ((retry == state.t) | (retry == t_next)))
    accept &= running
    size = jax.lax.stop_gradient(jnp.abs(h))
    rejected = jnp.where(running, jnp.where(finite, 0.0, size), state.nonfinite_ahead)
    nonfinite_ahead = jnp.where(accept, state.nonfinite_ahead - size, rejected)
    finite &= nonfinite_ahead <= 0
    cause = jnp.where(finite, Result.STEP_SIZE_UNDERFLOW, not_finite())
    attempts = state.accepted + state.rejected + 1
    exhausted = running & (attempts >= controller.max_steps) & ~(accept & last)
    result = jnp.where(exhausted & finite, Result.MAX_STEPS_REACHED, state.result)
    failed = running & (stuck | (exhausted & ~finite))
    return accept, h_next, jnp.where(failed, cause, result), nonfinite_ahead
