"""Whether a step is accepted, and what a rejection means for the solve."""

import jax
import jax.numpy as jnp

from jaxode._checks.errors import Result
from jaxode.ode.loop.progress import Progress
from jaxode.ode.loop.rows import reduce_rows
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.loop.step_size import step_factor
from jaxode.ode.loop.stepper import Stepper


def accept_or_reject(stepper: Stepper, state: Progress, t_next, at_end, y_next, k) -> Progress:
    """Update the progress of each row after its step to `t_next`, the end time where `at_end`."""
    running = state.active
    accept, h, result, nonfinite_ahead = _verdict(stepper, state, t_next, at_end, y_next, k)
    return Progress(
        t=jnp.where(accept, t_next, state.t),
        h=jax.lax.stop_gradient(h),
        y=jnp.where(accept[:, None], y_next, state.y),
        at_end=state.at_end | (accept & at_end),
        result=result.astype(jnp.int32),
        accepted=state.accepted + accept.astype(jnp.int32),
        rejected=state.rejected + (running & ~accept).astype(jnp.int32),
        nonfinite_ahead=nonfinite_ahead,
    )


def _verdict(stepper: Stepper, state: Progress, t_next, at_end, y_next, k):
    """Decide which rows accept the step, their next step sizes, results and `nonfinite_ahead`."""
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
    is_guess = state.accepted == 0
    ratio = ratio.astype(h.dtype)
    accept = ratio <= 1.0
    factor = step_factor(ratio, method.error_order, is_guess & ~accept)
    h_next = controller.limit(h * factor)
    # A step cut short to reach the end says little about the next one.
    shorter = jnp.abs(h_next) < jnp.abs(state.h)
    h_next = jnp.where(running & ~(accept & at_end & shorter), h_next, state.h)
    # Underflow: the step does not move the time, or a shorter one would end there again.
    retry = state.t + h_next
    stuck = (~at_end & (t_next == state.t)) | (~accept & ((retry == state.t) | (retry == t_next)))
    accept &= running
    size = jax.lax.stop_gradient(jnp.abs(h))
    rejected = jnp.where(running, jnp.where(finite, 0.0, size), state.nonfinite_ahead)
    nonfinite_ahead = jnp.where(accept, state.nonfinite_ahead - size, rejected)
    finite &= nonfinite_ahead <= 0
    cause = jnp.where(finite, Result.STEP_SIZE_UNDERFLOW, not_finite())
    attempts = state.accepted + state.rejected + 1
    exhausted = running & (attempts >= controller.max_steps) & ~(accept & at_end)
    result = jnp.where(exhausted & finite, Result.MAX_STEPS_REACHED, state.result)
    failed = running & (stuck | (exhausted & ~finite))
    return accept, h_next, jnp.where(failed, cause, result), nonfinite_ahead
