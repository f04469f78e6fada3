"""The settings of a solve, and what they decide about a step: its end, its fate, the next one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxode._jax.sharding import AxisName
from jaxode.ode.loop.outcome import Result
from jaxode.ode.loop.step_size import error_ratio, propose

# A rest of at most so many steps is divided into equal ones. Measured: benchmarks/NOTES.md.
LAST_STEPS = 3


class Method(eqx.Module):
    """How to step: a tableau, and either tolerances or a number of equal steps."""

    tableau: Any = eqx.field(static=True)
    """A `Tableau`; None for a solver that is not an explicit Runge-Kutta method."""
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    first_step: Float[Array, ""] | None
    steps: int | None = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    axis_name: AxisName | None = eqx.field(static=True)
    max_step: Float[Array, ""] | None = None
    raises: bool = eqx.field(static=True, default=False)
    """Whether a backward solve that fails raises."""

    @property
    def tape_length(self) -> int:
        return self.max_steps if self.steps is None else self.steps


def weighted_sum(weights: Float[Array, " stages"], k: Float[Array, "stages rows n"]):
    """`sum_i weights_i k_i`."""
    return jnp.tensordot(weights, k, axes=1, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def on_mesh(t, start, end):
    """The time `t`, which for differentiation stays where it is relative to `start` and `end`.

    The error control is not differentiated: the mesh is a constant but for its two ends.
    """
    del start, end
    return t


@on_mesh.defjvp
def on_mesh_jvp(primals, tangents):
    """Linear between the tangents of the two ends."""
    t, (_, start, end) = on_mesh(*primals), primals
    _, start_dot, end_dot = tangents
    span = end - start
    s = jnp.where(span == 0, 0.0, (t - start) / jnp.where(span == 0, 1.0, span))
    return t, (1 - s) * start_dot + s * end_dot


def next_time(steps: Any, max_step: Any, state: Any, taken: Int[Array, " rows"], start, end):
    """Where the next step of each row ends, and whether that is the end time.

    `steps` is None with error control, else the number of equal steps from `start` to `end`, of
    which `taken` are done.
    """
    if steps is None:
        # The last steps are equally long: a short one at the end would cost as much as any, and
        # leave the error to the others. SAFETY leaves room for a tenth more.
        reach, left = 1.1 * jnp.abs(state.h), end - state.t
        if max_step is not None:
            reach = jnp.minimum(reach, 1.01 * max_step)
        info = jnp.finfo(reach.dtype)
        count = jnp.maximum(jnp.ceil(jnp.abs(left) / jnp.maximum(reach, info.tiny)), 1.0)
        # Where the times are so close that rounding makes a step longer, a rejected step would be
        # divided into itself again.
        resolved = jnp.abs(left) > 200 * info.eps * jnp.maximum(jnp.abs(state.t), jnp.abs(end))
        step = jnp.where((count <= LAST_STEPS) & resolved, left / count, state.h)
        last = (count == 1) | (state.t + step == end)
        return jnp.where(last, end, state.t + step), last
    count = taken + 1
    last = count == steps
    fraction = count.astype(end.dtype) / jnp.asarray(steps, end.dtype)
    return jnp.where(last, end, start + fraction * (end - start)), last


def judge(method: Method, state: Any, running, t_next, last, y_next, k):
    """Whether each row accepts its step, its next step size, its result code, and what is `unfit`.

    That is how far the last attempt that was rejected goes beyond the time that is reached, if it
    was not finite. A solve that ends before it has passed there fails because of that.
    """
    if method.steps is not None:
        finite = jnp.isfinite(jnp.max(jnp.abs(y_next), axis=1, initial=0.0))
        result = jnp.where(running & ~finite, Result.NON_FINITE, state.result)
        return running & finite, state.h, result.astype(jnp.int32), state.unfit
    h = t_next - state.t
    error = h[:, None] * weighted_sum(jnp.asarray(method.tableau.b_error, y_next.dtype), k)
    ratio = error_ratio(error, state.y, y_next, method.rtol, method.atol, method.axis_name)
    finite = jnp.isfinite(ratio)
    guessed = state.accepted == 0
    accept, factor = propose(ratio.astype(h.dtype), method.tableau.order, guessed)
    h_next = jnp.where(running, limit_step(method, h * factor), state.h)
    # Underflow: a step that does not move the time, or a shorter one that would end there again.
    retry = state.t + h_next
    stuck = (~last & (t_next == state.t)) | (~accept & ((retry == state.t) | (retry == t_next)))
    accept &= running
    size = jax.lax.stop_gradient(jnp.abs(h))
    rejected = jnp.where(running, jnp.where(finite, 0.0, size), state.unfit)
    unfit = jnp.where(accept, state.unfit - size, rejected)
    finite &= unfit <= 0
    cause = jnp.where(finite, Result.STEP_SIZE_UNDERFLOW, Result.NON_FINITE)
    attempts = state.accepted + state.rejected + 1
    exhausted = running & (attempts >= method.max_steps) & ~(accept & last)
    result = jnp.where(exhausted & finite, Result.MAX_STEPS_REACHED, state.result)
    failed = running & (stuck | (exhausted & ~finite))
    return accept, h_next, jnp.where(failed, cause, result).astype(jnp.int32), unfit


def limit_step(method: Method, h: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """The step size, cut to the largest one allowed."""
    return h if method.max_step is None else jnp.clip(h, -method.max_step, method.max_step)
