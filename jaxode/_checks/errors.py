"""Results of a solve, their messages, and the one function that raises."""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.caller import caller
from jaxode._checks.rules import Faults, in_rows, is_known
from jaxode._jax.primitives import unvmap_any
from jaxode._jax.sharding import axes_of, vary


class Result(enum.IntEnum):
    """Success, or the reason of the failure."""

    SUCCESS = 0
    MAX_STEPS_REACHED = 1
    STEP_SIZE_UNDERFLOW = 2
    NON_FINITE = 3
    INVALID_ARGUMENT = 4
    # 5 was IMPLICIT_SOLVE_FAILED.
    EVENT_NOT_FOUND = 6
    NON_FINITE_JACOBIAN = 7
    NON_FINITE_CHANGE = 8
    SINGULAR_MATRIX = 9
    NOT_STEADY = 10

    def __jax_array__(self) -> Array:
        """The code as int32, which a member is not without `jit`."""
        return jnp.asarray(self.value, jnp.int32)


_UNDERFLOW = (
    "Loosen rtol and atol, use float64, or look for a discontinuous or exploding vector field."
)
_STIFF = "If the problem is stiff, use solver=jaxode.Rodas5P()."
EXPLANATIONS = {
    Result.MAX_STEPS_REACHED: (
        "the steps ran out",
        "Raise max_steps, loosen rtol and atol, or look for an exploding vector field. " + _STIFF,
    ),
    Result.STEP_SIZE_UNDERFLOW: (
        "the step size fell below the resolution of the time",
        f"{_UNDERFLOW} {_STIFF}",
    ),
    Result.NON_FINITE: (
        "the vector field or the state is not finite",
        "Check the vector field and its parameters for NaN, inf and overflow at this time.",
    ),
    Result.INVALID_ARGUMENT: (
        "an argument known only at run time breaks its rule",
        "Check t0, t1, ts, jumps, breakpoints, rtol, atol, first_step, max_step and weights.",
    ),
    Result.EVENT_NOT_FOUND: (
        "the condition of the event jumps across zero, or the steps do not settle on its time",
        "Use a condition that is smooth where it crosses zero, or tighten rtol and atol.",
    ),
    Result.NON_FINITE_JACOBIAN: (
        "the Jacobian is not finite",
        "Look for an infinite derivative of the vector field by the state or the time, such as "
        "that of a square root at zero, or use an explicit solver.",
    ),
    Result.NON_FINITE_CHANGE: (
        "the state after a change is not finite",
        "Check the change of jumps or event for NaN, inf and overflow at this time.",
    ),
    Result.SINGULAR_MATRIX: (
        "the linear system of a step is singular",
        "Take another number of steps, or leave steps out: error control then shortens the step.",
    ),
    Result.NOT_STEADY: (
        "the state does not settle",
        "Look at its trajectory: it oscillates or drifts, f depends on t, or it needs a larger t1 "
        "or max_steps.",
    ),
}

# Results that an argument can cause. All others concern only the steps.
OF_ARGUMENTS = Result.NON_FINITE, Result.INVALID_ARGUMENT, Result.NON_FINITE_JACOBIAN


class SolveError(RuntimeError):
    """A solve did not reach its end time, or a loss is not finite. The message names the cause."""


# Advice that replaces that of `EXPLANATIONS` for some solvers.
Remedies = dict[Result, str]
IMPLICIT = {
    Result.MAX_STEPS_REACHED: (
        "Raise max_steps, loosen rtol and atol, pass discontinuities of the vector field as "
        "breakpoints, or look for an exploding one."
    ),
    Result.STEP_SIZE_UNDERFLOW: _UNDERFLOW,
}
JACOBIAN_GIVEN = IMPLICIT | {
    Result.MAX_STEPS_REACHED: (
        "Compare the jacobian of the solver with jax.jacfwd: a wrong one takes many steps. If it "
        f"is right: {IMPLICIT[Result.MAX_STEPS_REACHED]}"
    ),
    Result.NON_FINITE_JACOBIAN: (
        "Check what the jacobian of the solver returns, and the derivative of the vector field by "
        "the time, for NaN and inf."
    ),
    Result.SINGULAR_MATRIX: (
        "Compare the jacobian of the solver with jax.jacfwd. If it is right: "
        f"{EXPLANATIONS[Result.SINGULAR_MATRIX][1]}"
    ),
}


def first_row(
    bad: Bool[np.ndarray, " rows"], rule: Callable[[int], str], error: type[Exception] = ValueError
) -> None:
    """Raise for the first bad row, if there is one. `rule(row)` is the message."""
    if bad.any():
        raise error(rule(int(np.argmax(bad))))


def _message(
    where: str, result: Any, t_reached: Any, fault_rows: dict[str, Any], remedies: Remedies
) -> str:
    """Describe the first failure among `result` (any shape), reached at `t_reached`.

    A time that is not finite is left out. If an argument is at fault, the message is the sentence
    in `fault_rows`, with its rows. `remedies` are what to try where more is known.
    """
    codes, times = np.atleast_1d(result).ravel(), np.atleast_1d(t_reached).ravel()
    if np.isin(codes, OF_ARGUMENTS).any():
        for sentence, rows in fault_rows.items():
            if np.any(rows):
                told = sentence.format(rows=in_rows(rows))
                several = "{rows}" not in sentence and np.size(rows) > 1
                return f"{told} This fails in {in_rows(rows)}." if several else told
    first = int(np.flatnonzero(codes)[0])
    cause, remedy = EXPLANATIONS[Result(int(codes[first]))]
    remedy = remedies.get(Result(int(codes[first])), remedy)
    rows = f" in {in_rows(codes)}" if codes.size > 1 else ""
    time = float(times[first])
    at = f" at t={time:.6g}" if np.isfinite(time) else ""
    return f"{where}: {cause}{at}{rows}. {remedy}"


def nan_or_raise(
    result: Int[Array, "*rows"],
    t_reached: Float[Array, "*rows"],
    faults: Faults | None = None,
    where: str = "",
    remedies: Remedies | None = None,
):
    """Zero for each row. Raises if a solve failed: now, or when the compiled program runs.

    Without `remedies`, the message says what `EXPLANATIONS` do.

    A failed row gets NaN; a successful solve makes none, so that it passes under `jax.debug_nans`.
    Under `jit`, the check is a host callback behind a `lax.cond`. It costs nothing until it fires,
    but keeps the program out of JAX's persistent compilation cache.
    """
    where, faults = where or caller(), faults or {}
    # While a solve is differentiated, its time can be traced although its result is not.
    result, t_reached = jax.lax.stop_gradient((result, t_reached))

    def find():
        return {sentence: rows() for sentence, rows in faults.items()}

    # The callback holds sentences, and not the faults: their arrays would be kept with it.
    remedies, sentences = remedies or {}, tuple(faults)
    if is_known(result):
        codes = np.asarray(result)
        if codes.any():
            raise SolveError(_message(where, codes, t_reached, find(), remedies))
        return np.zeros(np.shape(t_reached), t_reached.dtype)

    def raise_on_host(codes: np.ndarray, times: np.ndarray, rows: list[Any]) -> np.ndarray:
        fault_rows = dict(zip(sentences, rows, strict=True))  # JAX would sort a dictionary
        raise SolveError(_message(where, codes, times, fault_rows, remedies))

    def fail(codes, times):
        shape = jax.ShapeDtypeStruct(codes.shape, times.dtype)
        arguments = (codes, times, list(find().values()))
        nan = jax.pure_callback(raise_on_host, shape, *arguments, vmap_method="expand_dims")
        return vary(nan, axes_of((codes, times)))

    def succeed(codes, times):
        return jnp.where(codes == Result.SUCCESS, 0.0, jnp.nan).astype(times.dtype)

    # Unbatched: `vmap` would turn the `cond` into a `select` that always calls back.
    any_failed = unvmap_any(result != Result.SUCCESS)
    if is_known(any_failed) and not any_failed:
        # Under `vmap` outside of `jit`, each call would compile the `cond`.
        return jnp.zeros_like(t_reached)
    return jax.lax.cond(any_failed, fail, succeed, result, t_reached)


def guarded(leaf: Float[Array, "..."], ok: Bool[Array, "..."], nan: Any) -> Float[Array, "..."]:
    """The leaf where `ok`, otherwise `nan` from `nan_or_raise`.

    It enters as a factor, so derivatives depend on it too, and a program that uses only them
    raises.
    """
    return leaf * jnp.where(ok, 1.0, nan).astype(leaf.dtype)


def report_loss(
    loss: Float[Array, ""],
    result: Int[Array, "*rows"],
    t_reached: Float[Array, "*rows"],
    throw: bool | None,
    faults: Faults,
    remedies: Remedies | None = None,
) -> Float[Array, ""]:
    """The loss. If it failed, raises with `throw`, or by default outside transformations."""
    is_concrete = is_known(result)
    if not (is_concrete if throw is None else throw):
        return loss
    nan = nan_or_raise(result, t_reached, faults, remedies=remedies)
    return loss if is_concrete else guarded(loss, jnp.all(result == 0), jnp.sum(nan))
