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

from jaxode._checks.caller import arg
from jaxode._checks.rules import in_rows, is_eager, is_known
from jaxode.ode.field import call_field
from jaxode.ode.solvers.rosenbrock import Rodas5P

SINGULAR = 1e-10  # the least singular value, as a part of the largest
FAR = 100.0  # how many tolerances the algebraic equations may be off at the start


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
    matrix = np.array(options.mass)
    left, values, right = np.linalg.svd(matrix)
    null = values <= SINGULAR * max(values[0], 1e-300)
    given = y0, t0, args, row_args, options.rtol, options.atol
    if not null.any() or not is_eager(given):
        return
    left, right = left[:, null].T, right[null].T

    def at(t, y, row):
        flat, unravel = ravel_pytree(y)
        residual = lambda v: left @ ravel_pytree(call_field(f, t, unravel(v), args, row=row))[0]
        return residual(flat), jax.jacfwd(residual)(flat) @ right

    times = jnp.asarray(t0, jnp.result_type(float))
    if batch is None:
        g, block = (leaf[None] for leaf in at(times, y0, row_args))
    else:
        axes = (0 if times.ndim else None, 0, None if row_args is None else 0)
        g, block = jax.vmap(at, axes)(times, y0, row_args)
    if not is_known((g, block)):  # `f` closes over what is traced
        return
    g, block = np.asarray(g, float), np.asarray(block, float)
    size = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(y0))
    spread = np.linalg.svd(block, compute_uv=False)
    degenerate = ~(spread[:, -1] > SINGULAR * spread[:, 0])
    if degenerate.any():
        raise ValueError(
            f"{arg('mass')} the algebraic equations must determine the algebraic unknowns (index "
            f"1); they do not in {in_rows(degenerate)}. Differentiate the constraint by time, as "
            "for a pendulum, until it contains them."
        )
    atol = max(float(np.max(np.asarray(a))) for a in jax.tree.leaves(options.atol))
    limit = FAR * (atol + float(options.rtol) * max(size, 1.0))
    wrong = np.abs(g).max(axis=1) > limit
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{arg('y0')} must fulfil the algebraic equations of the mass matrix; they are off by "
            f"{np.abs(g[row]).max():.3g} in {in_rows(wrong)}. Solve them first, for example by "
            "optimistix.root_find."
        )
