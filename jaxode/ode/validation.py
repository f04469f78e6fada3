"""Checks at trace time: each error names the function, the argument, the rule and the remedy."""

import operator
from typing import Any

import diffrax
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from jaxode._jax.sharding import AxisName, axes_of
from jaxode.ode.loop.method import Method
from jaxode.ode.loop.tableau import tableau_of

Time = float | Real[Array, ""]


def state_dtype(y0: PyTree) -> jnp.dtype:
    """The dtype that a state is solved in: the common one of its leaves, at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        # By dtype: a weakly typed float64 would otherwise give way to float32.
        return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(y0)))


def check_state(where: str, name: str, y0: PyTree) -> PyTree[Array]:
    """The state as arrays, of a floating dtype."""
    leaves = jax.tree.leaves(y0)
    if not leaves:
        raise ValueError(f"{where}({name}=...): must hold at least one array; got {y0!r}.")
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex | bool):
            raise TypeError(
                f"{where}({name}=...): leaves must be floating arrays; got {type(leaf).__name__}. "
                "Pass things that are not part of the state in args."
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where}({name}=...): leaves must have a floating dtype; got {dtype}. "
                "Convert with .astype(jnp.float32)."
            )
    return jax.tree.map(jnp.asarray, y0)


def check_batch(where: str, name: str, z: PyTree) -> PyTree[Array]:
    """The states as arrays with a common leading axis."""
    z = check_state(where, name, z)
    shapes = [leaf.shape for leaf in jax.tree.leaves(z)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{where}({name}=...): leaves must share a leading batch axis; got shapes {shapes}. "
            "Use solve for a single system."
        )
    return z


def check_samples(
    where: str, name: str, x: Any, event: tuple[int, ...]
) -> Float[Array, "batch *event"]:
    """The samples of a density as an array."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{where}({name}=...): must be an array; got {type(x).__name__}.")
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{where}({name}=...): must have a floating dtype; got {dtype}. Integer-valued "
            "data has no density: dequantize it and convert with .astype(jnp.float32)."
        )
    if jnp.ndim(x) != len(event) + 1 or jnp.shape(x)[1:] != event:
        raise ValueError(
            f"{where}({name}=...): must have shape (batch, *event) with event {event}; "
            f"got {jnp.shape(x)}."
        )
    return jnp.asarray(x)


def check_context(where: str, context: PyTree, batch: int) -> PyTree:
    """The context, which has one row for each sample."""
    for leaf in jax.tree.leaves(context):
        if jnp.shape(leaf)[:1] != (batch,):
            raise ValueError(
                f"{where}(context=...): leaves must have a leading axis of {batch}, one row a "
                f"sample; got shape {jnp.shape(leaf)}."
            )
    return context


def check_same_times(where: str, times: PyTree, axis_name: AxisName | None) -> None:
    """Raise if devices that are to take the same steps have times of their own."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    differ = sorted(axes_of(times).intersection(names))
    if differ:
        raise ValueError(
            f"{where}(axis_name={axis_name!r}): the devices take the same steps, so the times must "
            f"be the same on all; got times that vary over {differ}. With steer=, pass a key that "
            "all devices share."
        )


def check_step_control(where: str, step_control: Any) -> None:
    """Raise unless it is one of the two."""
    if step_control not in ("joint", "per_sample"):
        raise ValueError(
            f"{where}(step_control=...): must be 'joint' or 'per_sample'; got {step_control!r}."
        )


def check_weights(
    where: str, weights: Any, x: Float[Array, "batch *event"], axis_name: AxisName | None
) -> Float[Array, " batch"]:
    """Weights of the samples in a mean; they sum to one, on average over devices along `axis_name`.

    They are equal by default.
    """
    batch = x.shape[0]
    if weights is None:
        return jnp.full(batch, 1 / max(batch, 1), state_dtype(x))
    if jnp.shape(weights) != (batch,):
        raise ValueError(
            f"{where}(weights=...): must have one weight a sample, shape {(batch,)}; "
            f"got {jnp.shape(weights)}."
        )
    weights = jnp.asarray(weights, state_dtype(x))
    total = jnp.sum(weights)
    return weights / (total if axis_name is None else jax.lax.pmean(total, axis_name))


def check_count(where: str, n: Any) -> int:
    """A number of samples."""
    try:
        count = operator.index(n)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"{where}(n=...): must be a number of samples; got {n!r}.")
    return count


def check_steer(steer: Any, t0: Time, t1: Time) -> float:
    """How far a random end time may be from `t0`, without reaching `t1`."""
    number = isinstance(steer, int | float | np.number) and not isinstance(steer, bool)
    if not number or not 0 <= steer < np.inf:
        raise ValueError(f"cnf(steer=...): must be finite and at least 0; got {steer!r}.")
    if is_known(t0) and is_known(t1) and steer > 0 and not steer < abs(float(t1) - float(t0)):
        raise ValueError(
            f"cnf(steer=...): must be less than the span |t1 - t0| = {abs(float(t1) - float(t0))}; "
            f"got {steer!r}. A tenth of the span is a start."
        )
    return float(steer)


def check_derivative(where: str, y: PyTree, dy: PyTree) -> None:
    """Raise unless the derivative is shaped like the state."""
    if jax.tree.structure(dy) != jax.tree.structure(y):
        raise ValueError(
            f"{where}(f=...): f(t, y, args) must return the structure of y, "
            f"{jax.tree.structure(y)}; got {jax.tree.structure(dy)}."
        )
    for expected, actual in zip(jax.tree.leaves(y), jax.tree.leaves(dy), strict=True):
        if not isinstance(actual, jax.Array | np.ndarray | np.generic | float | int | complex):
            raise TypeError(
                f"{where}(f=...): f(t, y, args) must return arrays; got {type(actual).__name__}."
            )
        if expected.shape != jnp.shape(actual):
            raise ValueError(
                f"{where}(f=...): f(t, y, args) must return the shapes of y; got "
                f"{jnp.shape(actual)} where y has {expected.shape}. f sees one sample of a batch."
            )
        dtype = jnp.result_type(actual)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where}(f=...): f(t, y, args) must return floating arrays; got {dtype}."
            )
        if jnp.finfo(dtype).bits > max(jnp.finfo(expected.dtype).bits, 32):
            raise TypeError(
                f"{where}(f=...): f(t, y, args) must not return more precision than y has; got "
                f"{dtype} where y is {expected.dtype}. Convert args, or y, to the other dtype."
            )


def check_time(where: str, name: str, value: Any) -> None:
    """Raise unless the value is a time, and finite as far as it is known at trace time."""
    kind = _numeric_dtype(value)
    if kind is None or not jnp.issubdtype(kind, jnp.number):
        raise TypeError(f"{where}({name}=...): must be a real time; got {value!r}.")
    if jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(f"{where}({name}=...): must be a real time; got a complex number.")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{where}({name}=...): must be a scalar time; got shape {jnp.shape(value)}."
        )
    if is_known(value) and not np.isfinite(float(value)):
        raise ValueError(f"{where}({name}=...): must be a finite time; got {value}.")


def check_times(where: str, t0: Time, t1: Time, ts: Any, dtype: jnp.dtype):
    """The start, the end and the output times as arrays of the dtype of the state."""
    check_time(where, "t0", t0)
    check_time(where, "t1", t1)
    if is_known(t0) and is_known(t1):
        _check_span(where, float(t0), float(t1), dtype)
    if ts is not None:
        kind = _numeric_dtype(ts)
        if kind is None or not (
            jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
        ):
            raise TypeError(f"{where}(ts=...): must be a vector of real times; got {ts!r}.")
        ts = jnp.asarray(ts, dtype)
        if ts.ndim != 1 or ts.shape[0] == 0:
            raise ValueError(
                f"{where}(ts=...): must be a vector of at least one time; got shape {ts.shape}."
            )
        if all(map(is_known, (t0, t1, ts))):
            _check_order(where, float(t0), float(t1), np.asarray(ts))
    return jnp.asarray(t0, dtype), jnp.asarray(t1, dtype), ts


def _numeric_dtype(value: Any) -> Any:
    if isinstance(value, str):
        return None  # JAX would take it for the name of a dtype
    try:
        return jnp.result_type(jnp.asarray(value))
    except (TypeError, ValueError):
        return None


def _check_span(where: str, t0: float, t1: float, dtype: jnp.dtype) -> None:
    """Times are rounded to the precision of the state, which must leave the span what it is."""
    rounded = float(np.asarray(t1, dtype)) - float(np.asarray(t0, dtype))
    # A thousandth: far above the rounding of a span that is worth solving over.
    if abs(rounded - (t1 - t0)) > 1e-3 * abs(t1 - t0):
        raise ValueError(
            f"{where}(t0=..., t1=...): the span from {t0!r} to {t1!r} is lost in the precision of "
            f"{dtype}, in which the state is solved. Shift the time, or use float64 for the state."
        )


def _check_order(where: str, t0: float, t1: float, ts: np.ndarray) -> None:
    sign = 1.0 if t1 >= t0 else -1.0
    if not np.all(np.diff(sign * ts) >= 0):
        direction = "increase" if sign > 0 else "decrease"
        raise ValueError(
            f"{where}(ts=...): times must {direction} from t0={t0:.6g} to t1={t1:.6g}; got {ts}. "
            "Sort them in the direction of the solve."
        )
    # t0 and t1 are compared in the precision of ts.
    low, high = sorted((ts.dtype.type(t0), ts.dtype.type(t1)))
    if not (low <= ts.min() and ts.max() <= high):
        raise ValueError(
            f"{where}(ts=...): times must lie between t0={t0:.6g} and t1={t1:.6g}; got {ts}. "
            "Extend the solve or drop the times outside it."
        )


def is_known(value: Any) -> bool:
    """Whether a value is known at trace time."""
    return not isinstance(value, jax.core.Tracer)


def positive_integer(where: str, name: str, value: Any) -> int:
    """The value as an `int`; NumPy's integers are such, too."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{where}({name}=...): must be a positive integer; got {value!r}.")
    return number


def _scalar(where: str, name: str, value: Any, rule: str, holds, dtype: jnp.dtype) -> Array:
    """A real scalar for which `holds`, as far as it is known at trace time."""
    kind = _numeric_dtype(value)
    if kind is None or not jnp.issubdtype(kind, jnp.number):
        raise TypeError(f"{where}({name}=...): must be a real number; got {value!r}.")
    if jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(f"{where}({name}=...): must be a real number; got a complex number.")
    if jnp.shape(value) != ():
        raise ValueError(f"{where}({name}=...): must be a scalar; got shape {jnp.shape(value)}.")
    if is_known(value) and not holds(float(value)):
        raise ValueError(f"{where}({name}=...): must be {rule}; got {value}.")
    return jax.lax.stop_gradient(jnp.asarray(value, dtype))


def make_method(where: str, f: Any, y0: PyTree, options: dict[str, Any], throw: bool) -> Method:
    """The solver and its settings, checked."""
    dtype = state_dtype(y0)
    if not callable(f):
        raise TypeError(f"{where}(f=...): must be a function f(t, y, args); got {f!r}.")
    solver, steps, first_step = options["solver"], options["steps"], options["first_step"]
    adjoint = options["adjoint"]
    if isinstance(adjoint, type) or not hasattr(adjoint, "integrate"):
        raise TypeError(
            f"{where}(adjoint=...): must be a gradient method such as jaxode.DiscreteAdjoint(); "
            f"got {adjoint!r}."
        )
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            f"{where}(solver=...): must be an ODE solver of diffrax, such as diffrax.Tsit5(); "
            f"got {solver!r}."
        )
    tableau = tableau_of(solver)
    if tableau is not None and tableau.b_error is None and steps is None:
        raise ValueError(
            f"{where}(solver=...): {tableau.name} has no error estimate; got steps=None. "
            "Pass steps=N for N equal steps, or an adaptive solver such as diffrax.Tsit5()."
        )
    positive = lambda value: 0 < value < np.inf
    tolerance = lambda value: 0 <= value < np.inf
    rule = "a finite tolerance of at least 0"
    rtol = _scalar(where, "rtol", options["rtol"], rule, tolerance, dtype)
    atol = _scalar(where, "atol", options["atol"], rule, tolerance, dtype)
    if is_known(rtol) and is_known(atol) and float(rtol) == float(atol) == 0:
        given = f"rtol={float(options['rtol']):g}, atol={float(options['atol']):g}"
        lost = "" if given == "rtol=0, atol=0" else f" in {dtype}, in which the state is solved"
        raise ValueError(f"{where}({given}): at least one tolerance must be positive{lost}.")
    max_step = options["max_step"]
    if max_step is not None:
        max_step = _scalar(where, "max_step", max_step, "positive", positive, dtype)
    if first_step is not None:
        first_step = _scalar(where, "first_step", first_step, "positive", positive, dtype)
    return Method(
        tableau=tableau,
        rtol=rtol,
        atol=atol,
        first_step=first_step,
        steps=None if steps is None else positive_integer(where, "steps", steps),
        max_steps=positive_integer(where, "max_steps", options["max_steps"]),
        axis_name=options["axis_name"],
        max_step=max_step,
        raises=where if throw else None,
    )
