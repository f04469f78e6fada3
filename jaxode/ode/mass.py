"""Mass matrices: `M dy/dt = f(t, y, args)`, where a singular `M` makes some equations algebraic.

Hairer and Wanner (1996), section VI.1: the matrix of a step is `M / gamma - h J`, and the stages
that stand on its right-hand side are multiplied by `M`. Rodas5P is stiffly accurate, so it keeps
its order where the algebraic equations determine the algebraic unknowns (index 1).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from jaxode._checks.atol import for_each_number
from jaxode._checks.caller import arg
from jaxode._checks.rules import in_rows, is_eager, is_known
from jaxode.ode.field import call_field
from jaxode.ode.solvers.rosenbrock import Rodas5P

# A singular value up to this part of the largest counts as zero, in units of rows and columns.
ZERO_SINGULAR_VALUE = 1e-10
MOST_TOLERANCES_OFF = 100.0  # tolerances by which the start may miss the algebraic equations


def check_mass(mass: Any, options: Any, y0: PyTree, batch: Any, **others: Any) -> Any:
    """The mass matrix as nested tuples, checked."""
    if not isinstance(options.solver, Rodas5P):
        raise ValueError(
            f"{arg('mass')} needs solver=jaxode.Rodas5P(); got {type(options.solver).__name__}."
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{arg('mass')} does not go with {name}, after which the algebraic equations would "
                f"not hold; got {name}={value!r}. Solve in pieces, from consistent states."
            )
    if not is_known(mass):
        raise TypeError(f"{arg('mass')} must be known when the program is compiled; got a tracer.")
    matrix = np.asarray(mass, float)
    row = y0 if batch is None else jax.tree.map(lambda leaf: leaf[0], y0)
    n = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(row))
    if matrix.shape != (n, n) or not np.isfinite(matrix).all():
        raise ValueError(
            f"{arg('mass')} must be a finite matrix [{n}, {n}], for the state in the "
            f"order of jax.flatten_util.ravel_pytree; got shape {matrix.shape}."
        )
    return tuple(map(tuple, matrix.tolist()))


def check_consistent(f, y0: PyTree, t0: Any, args: Any, row_args: Any, options: Any, batch) -> None:
    """Raise if the algebraic equations are known not to hold at the start, or not to determine the
    algebraic unknowns."""
    left_null, right_null = _null_spaces(np.array(options.mass))
    if not left_null.size or not is_eager((y0, t0, args, row_args, options.rtol, options.atol)):
        return

    def at(t, y, row):
        flat, unravel = ravel_pytree(y)
        sums = jnp.asarray(left_null, flat.dtype)

        def residual(v):
            return sums @ ravel_pytree(call_field(f, t, unravel(v), args, row=row))[0]

        return residual(flat), jax.jacfwd(residual)(flat), flat

    times = jnp.asarray(t0, jnp.result_type(float))
    if batch is None:
        masses = tuple(leaf[None] for leaf in at(times, y0, row_args))
    else:
        axes = (0 if times.ndim else None, 0, None if row_args is None else 0)
        masses = jax.vmap(at, axes)(times, y0, row_args)
    if not is_known(masses):  # `f` closes over what is traced
        return
    g, jacobian, y = (np.asarray(leaf, float) for leaf in masses)
    block, rows, columns = _equilibrated(jacobian @ right_null)
    spread = np.linalg.svd(block, compute_uv=False)
    degenerate = ~(spread[:, -1] > ZERO_SINGULAR_VALUE * spread[:, 0])
    if degenerate.any():
        raise ValueError(
            f"{arg('mass')} the algebraic equations must determine the algebraic unknowns (index "
            f"1); they do not in {in_rows(degenerate)}. Differentiate the constraint by time, as "
            "for a pendulum, until it contains them."
        )
    # Newton's step says how far the state is off, in its own units.
    inverse = right_null @ (
        np.linalg.inv(block) / np.swapaxes(columns, 1, 2) / np.swapaxes(rows, 1, 2)
    )
    off = np.abs(_products(inverse, g))
    # The terms that the equations sum up, whose rounding moves the root.
    terms = _products(np.abs(inverse), _products(np.abs(jacobian), np.abs(y)))
    wrong = ~(off <= _limit(options, y0, batch, np.abs(y), terms, masses[2].dtype))
    if wrong.any():
        row, number = np.argwhere(wrong)[np.argmax(off[wrong])]
        raise ValueError(
            f"{arg('y0')} must fulfil the algebraic equations of the mass matrix; its number "
            f"{number} is off by {off[row, number]:.3g} in {in_rows(wrong.any(axis=1))}. Solve "
            "them first, for example by optimistix.root_find."
        )


def _products(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The product of each matrix `[rows, m, n]` and vector `[rows, n]`."""
    return (matrices @ vectors[..., None])[..., 0]


def _limit(options: Any, y0: PyTree, batch: Any, size: Any, terms: Any, dtype: Any) -> np.ndarray:
    """How far each number of the state may be from the algebraic equations."""
    row = y0 if batch is None else jax.tree.map(lambda leaf: leaf[0], y0)
    atol = np.ravel(np.asarray(for_each_number(options.atol, row, dtype), float))
    rounding = float(jnp.finfo(dtype).eps)
    return MOST_TOLERANCES_OFF * (atol + float(options.rtol) * size + rounding * (size + terms))


def _null_spaces(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of equations without derivatives, and the changes of the state in the null space.

    Equations and states may have any units: a small diagonal entry is no algebraic equation.
    """
    scaled, rows, columns = _equilibrated(matrix)
    u, values, vt = np.linalg.svd(scaled)
    null = values <= ZERO_SINGULAR_VALUE * max(values[0], 1e-300)
    return u[:, null].T / rows[:, 0], vt[null].T / columns[0][:, None]


def _equilibrated(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices with rows and columns of size one, and their sizes."""
    rows = _largest(matrix, -1)
    columns = _largest(matrix / rows, -2)
    return matrix / rows / columns, rows, columns


def _largest(matrices: np.ndarray, axis: int) -> np.ndarray:
    """The largest magnitudes along an axis, or one."""
    largest = np.abs(matrices).max(axis, keepdims=True)
    return np.where(largest > 0, largest, 1.0)
