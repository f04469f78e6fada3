"""What a solve returns, and the words used when one fails."""

import enum
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxode._jax.sharding import axes_of, vary


class Result(enum.IntEnum):
    """How a solve ended."""

    SUCCESS = 0
    MAX_STEPS_REACHED = 1
    STEP_SIZE_UNDERFLOW = 2
    NON_FINITE = 3
    INVALID_ARGUMENT = 4
    IMPLICIT_SOLVE_FAILED = 5


_EXPLANATIONS = {
    Result.MAX_STEPS_REACHED: (
        "the steps ran out",
        "Raise max_steps, loosen rtol and atol, or look for a stiff or exploding vector field.",
    ),
    Result.STEP_SIZE_UNDERFLOW: (
        "the step size fell below the resolution of the time",
        "Loosen rtol and atol, use float64, or look for a discontinuous or exploding vector field.",
    ),
    Result.NON_FINITE: (
        "the vector field or the state is not finite",
        "Check the vector field and its parameters for NaN, inf and overflow at this time.",
    ),
    Result.INVALID_ARGUMENT: (
        "a time is not finite, ts is not monotone from t0 to t1, or a tolerance is negative",
        "Check t0, t1, rtol and atol; sort ts in the direction of the solve, between t0 and t1.",
    ),
    Result.IMPLICIT_SOLVE_FAILED: (
        "the implicit equations of a step could not be solved",
        "Loosen rtol and atol, or check the vector field for NaN, inf and discontinuities.",
    ),
}


class SolveError(RuntimeError):
    """A solve did not reach its end time. The message names the cause and the time reached."""


class Stats(eqx.Module):
    """Work done by a forward solve. Scalars; with per-sample steps, one entry per row.

    `num_steps == num_accepted + num_rejected`. `num_evals` counts every evaluation of the vector
    field, those that choose the first step included.
    """

    num_steps: Int[Array, "*rows"]
    """Attempted steps."""
    num_accepted: Int[Array, "*rows"]
    """Steps that advanced the solution."""
    num_rejected: Int[Array, "*rows"]
    """Steps discarded because their error estimate was too large."""
    num_evals: Int[Array, "*rows"]
    """Evaluations of the vector field; -1 for an implicit solver, whose number is not known."""


class NLLStats(NamedTuple):
    """What `nll_and_stats` reports beside the loss."""

    log_prob: Float[Array, " batch"]
    """Log-density of each sample, in nats."""
    log_det: Float[Array, " batch"]
    """The part of it that is the change of volume: `log_prob - log p_base(z(t0))`."""
    stats: Stats
    """Work of the forward solve."""
    result: Int[Array, "*rows"]
    """`Result` code of the forward solve."""
    running: dict[str, Float[Array, " batch"]]
    """The integral of each regularizer's cost along each sample's trajectory, by name."""


class Solution(eqx.Module):
    """The result of `jaxode.solve`, or of `jaxode.flow(..., return_solution=True)`."""

    y1: Any
    """State at the end time: same structure and shapes as the initial state. NaN on failure."""
    ts: Float[Array, " times"] | None
    """The times asked for, or None."""
    ys: Any
    """States at `ts`: each leaf has a leading axis of length `len(ts)`. None without `ts`."""
    stats: Stats
    """Steps and evaluations of the forward solve."""
    result: Int[Array, "*rows"]
    """A `Result` code; with per-sample steps, one per row."""
    t_reached: Float[Array, "*rows"]
    """The time at which the solve stopped: the end time unless it failed. NaN if not known, which
    can only be where a solver of diffrax without error control went on with a NaN."""

    @property
    def ok(self) -> Bool[Array, "*rows"]:
        """Whether the solve reached its end time (per row with per-sample steps)."""
        return self.result == Result.SUCCESS


def failure_message(where: str, result: Any, t_reached: Any) -> str:
    """One sentence for the first failure among `result` (any shape), reached at `t_reached`.

    A time that is not finite, such as one that is not known, is left out.
    """
    codes, times = np.atleast_1d(result).ravel(), np.atleast_1d(t_reached).ravel()
    failed = np.flatnonzero(codes)
    first = int(failed[0])
    cause, remedy = _EXPLANATIONS[Result(int(codes[first]))]
    rows = f" in {failed.size} of {codes.size} rows, first in row {first}" if codes.size > 1 else ""
    time = float(times[first])
    at = f" at t={time:.6g}" if np.isfinite(time) else ""
    return f"{where}: {cause}{at}{rows}. {remedy}"


def nan_or_raise(result: Int[Array, "*rows"], t_reached: Float[Array, "*rows"], where: str):
    """NaN for each row, unless a solve failed: then it raises, at once or when it runs."""
    result, t_reached = jax.lax.stop_gradient((result, t_reached))
    if not isinstance(result, jax.core.Tracer):
        if np.any(np.asarray(result)):
            raise SolveError(failure_message(where, result, t_reached))
        return jnp.full_like(t_reached, jnp.nan)

    def raise_on_host(codes: np.ndarray, times: np.ndarray) -> np.ndarray:
        raise SolveError(failure_message(where, codes, times))

    def fail(codes, times):
        shape = jax.ShapeDtypeStruct(codes.shape, times.dtype)
        nan = jax.pure_callback(raise_on_host, shape, codes, times, vmap_method="expand_dims")
        return vary(nan, axes_of((codes, times)))

    def succeed(codes, times):
        del codes
        return jnp.full_like(times, jnp.nan)

    # Unbatched, or `vmap` would turn the `cond` into a `select` that always calls back.
    any_failed = eqx.internal.unvmap_any(result != Result.SUCCESS)
    return jax.lax.cond(any_failed, fail, succeed, result, t_reached)


def raise_on_failure(solution: Solution, where: str) -> Solution:
    """Raise `SolveError` if a solve failed: at once if it has run, else when it runs.

    Under `jit` the check is a host callback behind a `lax.cond`, so it costs nothing until it
    fires; it does keep the compiled program out of JAX's persistent compilation cache.
    """
    nan = nan_or_raise(solution.result, solution.t_reached, where)
    result = solution.result
    # The state depends on the callback's value, so it cannot be eliminated as dead code.
    ok = result == Result.SUCCESS

    def guard(leaf, axis):
        shape = (1,) * axis + ok.shape + (1,) * (leaf.ndim - axis - ok.ndim)
        return jnp.where(ok.reshape(shape), leaf, nan.reshape(shape).astype(leaf.dtype))

    y1 = jax.tree.map(lambda leaf: guard(leaf, 0), solution.y1)
    ys = jax.tree.map(lambda leaf: guard(leaf, 1), solution.ys)
    return eqx.tree_at(lambda s: (s.y1, s.ys), solution, (y1, ys), is_leaf=lambda x: x is None)
