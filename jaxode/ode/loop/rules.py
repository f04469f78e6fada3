"""The rules for arguments that may be known only at run time."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.stepper import Stepper


def _in_order(problem: Problem) -> Bool[Array, " rows"]:
    """Whether output times run from `t0` to `t1`. Over an empty span, all must be equal."""
    t0, t1, ts = problem.t0, problem.t1, problem.ts
    if ts is None:
        return jnp.ones_like(t0, bool)
    path = jnp.concatenate([t0[None], ts, t1[None]])
    sorted_ = (jnp.sign(t1 - t0)[None] * jnp.diff(path, axis=0) >= 0).all(axis=0)
    return sorted_ & ((t0 != t1) | (ts == t0[None]).all(axis=0))


def _tolerance(value) -> Bool[Array, ""]:
    return (value >= 0) & (value < jnp.inf)


def _size(value) -> Bool[Array, ""]:
    return (value > 0) & (value < jnp.inf)


def _breakpoints_kept(points, problem: Problem) -> Bool[Array, " rows"]:
    """Whether the span is long enough: a step of a few roundings crosses each breakpoint."""
    low, high = jnp.minimum(problem.t0, problem.t1), jnp.maximum(problem.t0, problem.t1)
    between = jax.vmap(lambda point: (low < point) & (point < high))(points).any(axis=0)
    rounding = jnp.finfo(low.dtype).eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    return ~jnp.isnan(points).any() & ~(between & (4000 * rounding > high - low))


def _if_given(rule: Callable[[Array], Array], value: Array | None) -> Bool[Array, ""]:
    return jnp.ones((), bool) if value is None else rule(value)


# Each rule in words, and whether it holds per row of a problem (or anything with its times) and a
# stepper. Times that the dtype of the state cannot tell apart are NaN here.
RULES: dict[str, Callable[[Any, Stepper], Bool[Array, "*rows"]]] = {
    "(t0=..., t1=...): must be finite times, whose span is not lost in the precision in which the "
    "state is solved. Shift the time, or use float64 for the state.": (
        lambda problem, _: jnp.isfinite(problem.t0) & jnp.isfinite(problem.t1)
    ),
    "(ts=...): times must be in order from t0 to t1, and not be lost in the precision in which the "
    "state is solved. Sort them, or use float64 for the state. Pad a row with its last time.": (
        lambda problem, _: _in_order(problem)
    ),
    "(rtol=...): must be a finite tolerance of at least 0.": (
        lambda _, stepper: _tolerance(stepper.rtol)
    ),
    "(atol=...): must be a finite tolerance of at least 0.": (
        lambda _, stepper: _tolerance(stepper.atol)
    ),
    "(rtol=..., atol=...): at least one tolerance must be positive in the dtype of each leaf of "
    "the state.": (lambda _, stepper: (stepper.rtol != 0) | (stepper.atol != 0)),
    "(first_step=...): must be positive and finite.": (
        lambda _, stepper: _if_given(_size, stepper.first_step)
    ),
    "(max_step=...): must be positive and finite.": (
        lambda _, stepper: _if_given(_size, stepper.max_step)
    ),
    "(breakpoints=...): must not be NaN, and the span must be longer than 4,000 roundings of the "
    "time. Shift the time, or use float64 for the state.": (
        lambda problem, stepper: _if_given(
            lambda points: _breakpoints_kept(points, problem), stepper.breakpoints
        )
    ),
}


def all_hold(problem: Problem, stepper: Stepper) -> Bool[Array, " rows"]:
    """Whether every rule holds, in each row."""
    return functools.reduce(operator.and_, (holds(problem, stepper) for holds in RULES.values()))
