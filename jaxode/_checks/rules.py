"""The table of rules for values that may be known only when the program runs.

A rule that concerns values known at trace time is checked at once. Otherwise it goes along: the
program fails in the rows that break it, and the one place that raises (`errors.py`) then finds the
rule, by its `Faults`. A new rule is one row.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.caller import caller
from jaxode._jax.sharding import AxisName

# Sentences, with a placeholder for the rows, each with a function that finds the rows that break
# its rule. It is called only after a failure, so a successful solve does not pay for it.
Faults = dict[str, Callable[[], Bool[Array, " rows"]]]


class Rule(NamedTuple):
    """A rule that arguments must satisfy."""

    argument: str
    """The argument in messages; `{name}` stands for the name of any."""
    holds: Callable[..., Any]
    """Whether it holds, per row of the values."""
    words: str
    """The rule in words; with `{rows}`, also what was found instead."""
    remedy: str = ""

    def sentence(self, got: str = "", where: str = "", **name: str) -> str:
        """The message."""
        argument = self.argument.format(**name)
        return f"{where or caller()}({argument}): {self.words}{got}. {self.remedy}".rstrip()

    def fault(self, *values: Any, where: str = "", **name: str) -> Faults:
        """The faults that may explain a failure."""

        def find():
            return ~self.holds(*jax.lax.stop_gradient(values))

        return {self.sentence(where=where, **name): find}

    def check(self, *values: Any, **name: str) -> Faults:
        """Raise if the values are known to break the rule. Otherwise, return the possible fault."""
        if not is_known(values):
            return self.fault(*values, **name)
        if len(values) == 1 and isinstance(values[0], float):  # most are, and need no array
            wrong = np.array(not self.holds(*values))
        else:
            with jax.ensure_compile_time_eval():
                wrong = ~np.asarray(self.holds(*values))
        if wrong.any():
            got = "" if "{rows}" in self.words else f"; got {self._described(values)}"
            raise ValueError(self.sentence(got, **name).replace("{rows}", in_rows(wrong)))
        return {}

    def _described(self, values: tuple[Any, ...]) -> str:
        names = self.argument.replace("=...", "").split(", ")
        if len(names) == 1:
            return str(values[0])
        return " and ".join(f"{name}={float(x)!r}" for name, x in zip(names, values, strict=True))


def is_known(value: Any) -> bool:
    """Whether a value, or every value of a pytree, is known at trace time."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def is_eager(value: Any) -> bool:
    """Whether a value is known, and nothing that is computed with it goes into a program."""
    return is_known((value, jnp.zeros(())))


def in_rows(flags: Any) -> str:
    """Count the true rows, and find the first."""
    flags = np.ravel(flags)
    return f"{np.count_nonzero(flags)} of {flags.size} rows, first in row {np.argmax(flags != 0)}"


def finite_rows(*leaves: Array) -> Bool[Array, " rows"]:
    """Mark rows whose numbers are finite in all leaves `[rows, ...]`."""
    finite = (jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim))) for leaf in leaves)
    return functools.reduce(operator.and_, finite)


def _finite_in_numpy(rows: Any) -> Any:
    return np.isfinite(np.asarray(rows)).all(tuple(range(1, np.ndim(rows))))


def _is_finite(x: Any) -> Any:
    return abs(x) < np.inf


def _is_positive(x: Any) -> Any:
    return (x > 0) & (x < np.inf)


def forwards(t0: Any, t1: Any, ts: Any) -> Any:
    """Whether each step on the way from `t0` over `ts` to `t1` goes towards `t1`, or stays.

    Times are `[*rows]` and `[times, *rows]`, all in NumPy or all in JAX.
    """
    xp = np if isinstance(ts, np.ndarray) else jnp
    path = xp.concatenate([t0[None], ts, t1[None]])
    return xp.where(t1 >= t0, 1, -1)[None] * xp.diff(path, axis=0) >= 0


def _are_weights(weights: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    return (weights >= 0) & _is_finite(weights)


def _are_weights_of_some(weights: Float[Array, " rows"]) -> Bool[Array, " rows"]:
    """Which weights are valid: none of them, if all are zero."""
    valid = _are_weights(weights)
    return valid & ~(valid.all() & (weights == 0).all())


def _is_permutation(rows: Int[Array, " batch"]) -> Bool[Array, " batch"]:
    """Which row numbers are in range and occur once."""
    in_order = jnp.sort(rows)
    first, end = (jnp.searchsorted(in_order, rows, side=side) for side in ("left", "right"))
    return (rows >= 0) & (rows < len(rows)) & (end - first == 1)


def _all(holds: Any) -> Any:
    """Whether it holds for each number of a state."""
    return holds.all() if np.ndim(holds) else holds


NUMBER = "{name}=..."  # the argument that a caller names
NOT_FINITE = "got NaN or inf in {rows}"  # the rows of a batch that break a rule
TIME = Rule(NUMBER, _is_finite, "must be a finite time")
TOLERANCE = Rule(
    NUMBER, lambda x: _all((x >= 0) & _is_finite(x)), "must be a finite tolerance of at least 0"
)
POSITIVE = Rule(NUMBER, _is_positive, "must be positive and finite")
NOT_NAN = Rule(NUMBER, lambda x: ~jnp.isnan(jnp.asarray(x)).any(axis=0), "must not be NaN")

FINITE_STATE = Rule(
    NUMBER, lambda *leaves: finite_rows(*(leaf[None] for leaf in leaves))[0],
    "must be finite; got NaN or inf", "Fix its source.",
)  # fmt: skip
FINITE = Rule(
    NUMBER, finite_rows, f"must be finite; {NOT_FINITE}",
    "Leave those rows out, or fix their source.",
)  # fmt: skip
FINITE_WEIGHTED = FINITE._replace(
    holds=lambda weights, *leaves: (weights == 0) | finite_rows(*leaves)
)
FINITE_UNWEIGHTED = Rule(
    NUMBER, lambda weights, *leaves: (weights != 0) | finite_rows(*leaves),
    f"must be finite, with joint steps also in rows of weight 0; {NOT_FINITE}",
    "Leave those rows out, or pass batch='per_sample' to cnf.",
)  # fmt: skip
FINITE_BASE = Rule(
    "base=...", finite_rows, f"must draw finite samples; {NOT_FINITE}",
    "Fix its parameters or its method `sample`.",
)  # fmt: skip
# The target of the reverse divergence, at samples of the flow.
_TARGET = Rule(
    "log_density=...", lambda finite: finite, "",
    "Bound the energy where samples may come, or start with a flow that stays away from there.",
)  # fmt: skip
FINITE_TARGET = _TARGET._replace(words=f"must be finite at the samples of the flow; {NOT_FINITE}")
FINITE_SLOPE = _TARGET._replace(
    words=f"must have a finite gradient at the samples of the flow; {NOT_FINITE}"
)
# The maps around a density.
INSIDE = Rule(
    "support=...", lambda inside, rows: np.asarray(inside) | ~_finite_in_numpy(rows),
    "the data must lie strictly inside; got values on or outside it in {rows}",
    "Widen the support, or leave those rows out.",
)  # fmt: skip
IN_REACH = Rule(
    "x=...", np.asarray,
    "must not be so far from the data of standardize= that the map overflows; got {rows}",
    "Leave those rows out, or rescale the data.",
)  # fmt: skip

_WEIGHTS = "must be finite, at least 0, and not all zero; got other values in {rows}"
_LEFT_OUT = "To leave a row out, give it the weight 0."
WEIGHTS = Rule("weights=...", _are_weights_of_some, _WEIGHTS, _LEFT_OUT)
# The rows of one of several devices may all have weight 0.
WEIGHTS_OF_DEVICE = Rule("weights=...", _are_weights, _WEIGHTS, _LEFT_OUT)
PERMUTATION = Rule(
    "coupling=...", _is_permutation,
    "must return a permutation of the rows; got numbers that are out of range or repeated in "
    "{rows}", "Return each row number once.",
)  # fmt: skip

# Differences of a field one period on, in units of the tolerance. NaN fails elsewhere.
PERIODIC = Rule(
    NUMBER, lambda off: ~(off > 1),
    "the field must have the periods of its base, a torus; got another value one period on",
    "Pass jaxode.nn.Residual(..., period=...), or show your field sine and cosine of angles.",
)  # fmt: skip
DIFFER = Rule(
    "t0=..., t1=...", lambda t0, t1: jnp.isfinite(t1 - t0) & (t0 != t1),
    "must be finite times that differ in the precision of the samples",
    "Pass the time of the base as t0 of cnf, and the time of the data as t1.",
)  # fmt: skip
NO_OVERFLOW = Rule(
    "x=...", lambda squares, field_is_finite: jnp.isfinite(squares) | ~field_is_finite,
    "squared differences to the vector field must be finite; got an overflow in {rows}, where the "
    "field is finite", "Scale the data, or look for a field that explodes.",
)  # fmt: skip
FROM_NOISE = Rule(
    "t0=..., t1=...", lambda t0, t1: (t1 >= 0) & (t1 <= t0) & (t0 <= 1),
    "a probability flow runs from its noise, the base, at 1 to its data at 0",
    "Pass t0=1.0, and a t1 at or near 0.",
)  # fmt: skip
_LOST = "lost in the precision in which the state is solved"
SPAN = Rule(
    "t0=..., t1=...", lambda t0, t1: jnp.isfinite(t0) & jnp.isfinite(t1),
    f"must be finite times, whose span is not {_LOST}",
    "Shift the time, or use float64 for the state.",
)  # fmt: skip
IN_ORDER = Rule(
    "ts=...", lambda t0, t1, ts: forwards(t0, t1, ts).all(axis=0),
    f"times must be in order from t0 to t1, and not be {_LOST}",
    "Sort them, or use float64 for the state. Pad a row with its last time.",
)  # fmt: skip
# The rules of a solve, which its program checks: each with the names of the values that it reads,
# per row. Times that the dtype of the state cannot tell apart are NaN there.
SOLVE: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (SPAN, ("t0", "t1")),
    (IN_ORDER, ("t0", "t1", "ts")),
    (
        Rule(
            "jumps=...", lambda times: ~jnp.isnan(times).any(axis=0),
            f"times must not be {_LOST}", "Shift the time, or use float64 for the state.",
        ), ("times",),
    ),
    (
        Rule(
            "jumps=...", lambda t0, t1, times: (
                (jnp.minimum(t0, t1)[None] <= times)
                & ((times <= jnp.maximum(t0, t1)[None]) | jnp.isposinf(times))
            ).all(axis=0),
            "times must lie between t0 and t1",
            "Extend the solve. Pad a row with infinity.",
        ), ("t0", "t1", "times"),
    ),
    (
        Rule(
            "jumps=...", lambda t0, t1, times: forwards(
                t0, t1, jnp.where(jnp.isposinf(times), t1[None], times)
            ).all(axis=0),
            "times must be in order from t0 to t1",
            "Sort them. Pad a row with infinity.",
        ), ("t0", "t1", "times"),
    ),
    (TOLERANCE, ("rtol",)),
    (TOLERANCE, ("atol",)),
    (
        Rule(
            "rtol=..., atol=...", lambda rtol, atol: _all((rtol != 0) | (atol != 0)),
            "at least one tolerance must be positive in the dtype of each leaf of the state",
        ), ("rtol", "atol"),
    ),
    (POSITIVE, ("first_step",)),
    (POSITIVE, ("max_step",)),
    (NOT_NAN, ("breakpoints",)),
)  # fmt: skip


def _of_solve(problem: Any, stepper: Any, **cuts: Float[Array, "times rows"] | None):
    """Each rule of a solve with its values. None of them is None."""
    arguments = {"times": None, "breakpoints": None} | vars(stepper) | problem._asdict() | cuts
    for rule, names in SOLVE:
        values = tuple(arguments[name] for name in names)
        if all(value is not None for value in values):
            yield rule, values, names[0]


def rules_of(name: str) -> Iterator[Rule]:
    """The rules of a solve for one argument alone."""
    return (rule for rule, names in SOLVE if names == (name,))


def all_hold(problem: Any, stepper: Any, **cuts: Any) -> Bool[Array, " rows"]:
    """Whether every rule of a solve holds, in each row.

    `cuts` are the `times` of jumps, `[jumps, rows]`, in order, and `breakpoints`; infinity is
    padding.
    """
    rules = _of_solve(problem, stepper, **cuts)
    return functools.reduce(operator.and_, (rule.holds(*values) for rule, values, _ in rules))


def solve_faults(problem: Any, stepper: Any, **cuts: Any) -> Faults:
    """The rules of a solve that its arguments may break, as for `all_hold`."""
    faults: Faults = {}
    for rule, values, name in _of_solve(problem, stepper, **cuts):
        faults |= rule.fault(*values, name=name)
    return faults


def inexact_leaves(data: dict[str, PyTree]) -> Iterator[tuple[str, list[Any]]]:
    """The floating arrays of each argument that has any."""
    for name, rows in data.items():
        leaves = list(filter(eqx.is_inexact_array, jax.tree.leaves(rows)))
        if leaves:
            yield name, leaves


def data_faults(
    data: dict[str, PyTree], weights: Float[Array, " rows"] | None = None, *, joint: bool = False
) -> Faults:
    """The faults of data with rows along the leading axes, by the name of the argument.

    A row of weight 0 may hold anything, unless it shares its steps with other rows.
    """
    faults: Faults = {}
    for name, leaves in inexact_leaves(data):
        if weights is None:
            faults |= FINITE.fault(*leaves, name=name)
            continue
        faults |= FINITE_WEIGHTED.fault(weights, *leaves, name=name)
        if joint:
            faults |= FINITE_UNWEIGHTED.fault(weights, *leaves, name=name)
    return faults


def weights_faults(weights: Float[Array, " rows"] | None, axis_name: AxisName | None) -> Faults:
    """The fault of weights. With an `axis_name`, those of one device may all be 0."""
    if weights is None:
        return {}
    return (WEIGHTS if axis_name is None else WEIGHTS_OF_DEVICE).fault(weights)
