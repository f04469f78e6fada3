"""Where the next step of each row ends."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode.ode.loop.progress import Progress
from jaxode.ode.loop.stepper import Stepper

# If at most this many steps are left, they are made equal. Measured: benchmarks/NOTES.md.
LAST_STEPS = 3


def next_step_end(
    stepper: Stepper, steps: Any, state: Progress, taken: Int[Array, " rows"], start, end
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Choose the end of each row's next step, and say whether it is the end time.

    `steps` is None with error control. Otherwise it is the number of equal steps from `start` to
    `end`, of which `taken` are done.
    """
    if steps is not None:
        count = taken + 1
        at_end = count == steps
        fraction = count.astype(end.dtype) / jnp.asarray(steps, end.dtype)
        return jnp.where(at_end, end, start + fraction * (end - start)), at_end
    # The last steps are equally long: a short one at the end would cost as much as any other, and
    # leave the error to the rest. `SAFETY` of `step_size.py` leaves room for a tenth more.
    reach, span, max_step = 1.1 * jnp.abs(state.h), end - state.t, stepper.controller.max_step
    if max_step is not None:
        reach = jnp.minimum(reach, 1.01 * max_step)
    info = jnp.finfo(reach.dtype)
    count = jnp.maximum(jnp.ceil(jnp.abs(span) / jnp.maximum(reach, info.tiny)), 1.0)
    # If the times are so close that rounding lengthens a step, a rejected step would be divided
    # into itself again.
    resolved = jnp.abs(span) > 200 * info.eps * jnp.maximum(jnp.abs(state.t), jnp.abs(end))
    step = jnp.where((count <= LAST_STEPS) & resolved, span / count, state.h)
    at_end = (count == 1) | (state.t + step == end)
    return jnp.where(at_end, end, state.t + step), at_end
