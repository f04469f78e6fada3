"""Checks at trace time: each error names the function, the argument, the rule and the remedy."""

from typing import Any

import diffrax
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Real

from jaxode.integrate import Method
from jaxode.tableau import tableau_of

Time = float | Real[Array, ""]


def state_dtype(y0: PyTree) -> jnp.dtype:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *jax.tree.leaves(y0))


def check_state(where: str, name: str, y0: PyTree) -> PyTree[Array]:
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
    z = check_state(where, name, z)
    shapes = [leaf.shape for leaf in jax.tree.leaves(z)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{where}({name}=...): leaves must share a leading batch axis; got shapes {shapes}. "
            "Use solve for a single system."
        )
    return z


def check_derivative(where: str, y: PyTree, dy: PyTree) -> None:
    if jax.tree.structure(dy) != jax.tree.structure(y):
        raise ValueError(
            f"{where}(f=...): f(t, y, args) must return the structure of y, "
            f"{jax.tree.structure(y)}; got {jax.tree.structure(dy)}."
        )
    for expected, actual in zip(jax.tree.leaves(y), jax.tree.leaves(dy), strict=True):
        if expected.shape != jnp.shape(actual):
            raise ValueError(
                f"{where}(f=...): f(t, y, args) must return the shapes of y; got "
                f"{jnp.shape(actual)} where y has {expected.shape}. f sees one sample of a batch."
            )
        if not jnp.issubdtype(jnp.result_type(actual), jnp.floating):
            raise TypeError(
                f"{where}(f=...): f(t, y, args) must return floating arrays; "
                f"got {jnp.result_type(actual)}."
            )


def check_times(where: str, t0: Time, t1: Time, ts: Any, dtype: jnp.dtype):
    for name, value in (("t0", t0), ("t1", t1)):
        if jnp.shape(value) != ():
            raise ValueError(
                f"{where}({name}=...): must be a scalar time; got shape {jnp.shape(value)}."
            )
        if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
            raise TypeError(f"{where}({name}=...): must be a real time; got a complex number.")
        if _known(value) and not np.isfinite(float(value)):
            raise ValueError(f"{where}({name}=...): must be a finite time; got {value}.")
    if ts is not None:
        ts = jnp.asarray(ts, dtype)
        if ts.ndim != 1 or ts.shape[0] == 0:
            raise ValueError(
                f"{where}(ts=...): must be a vector of at least one time; got shape {ts.shape}."
            )
        if all(map(_known, (t0, t1, ts))):
            _check_order(where, float(t0), float(t1), np.asarray(ts))
    return jnp.asarray(t0, dtype), jnp.asarray(t1, dtype), ts


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


def _known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)


def check_adjoint(where: str, adjoint: Any) -> None:
    if not hasattr(adjoint, "integrate"):
        raise TypeError(
            f"{where}(adjoint=...): must be a gradient method such as jaxode.DiscreteAdjoint(); "
            f"got {adjoint!r}."
        )


def make_method(
    where: str, solver, rtol, atol, steps, first_step, max_steps, axis_name, y0: PyTree
) -> Method:
    dtype = state_dtype(y0)
    tableau = tableau_of(solver) if isinstance(solver, diffrax.AbstractSolver) else None
    if tableau is None:
        raise TypeError(
            f"{where}(solver=...): must be an explicit Runge-Kutta solver of diffrax, such as "
            f"diffrax.Tsit5(); got {solver!r}."
        )
    for name, value in (("steps", steps), ("max_steps", max_steps)):
        optional = name == "steps" and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{where}({name}=...): must be a positive integer; got {value!r}.")
    if tableau.b_error is None and steps is None:
        raise ValueError(
            f"{where}(solver=...): {tableau.name} has no error estimate; got steps=None. "
            "Pass steps=N for N equal steps, or an adaptive solver such as diffrax.Tsit5()."
        )
    if first_step is not None and _known(first_step) and not float(first_step) > 0:
        raise ValueError(f"{where}(first_step=...): must be positive; got {first_step}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if _known(value) and not (np.isfinite(float(value)) and float(value) >= 0):
            raise ValueError(
                f"{where}({name}=...): must be a finite tolerance of at least 0; got {value}."
            )
    if _known(rtol) and _known(atol) and float(rtol) == float(atol) == 0:
        raise ValueError(f"{where}(rtol=0, atol=0): at least one tolerance must be positive.")
    return Method(
        tableau=tableau,
        rtol=jax.lax.stop_gradient(jnp.asarray(rtol, dtype)),
        atol=jax.lax.stop_gradient(jnp.asarray(atol, dtype)),
        first_step=None
        if first_step is None
        else jax.lax.stop_gradient(jnp.asarray(first_step, dtype)),
        steps=steps,
        max_steps=max_steps,
        axis_name=axis_name,
    )
