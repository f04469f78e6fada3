"""Small linear systems, one for each sample: factorized once, solved for several right-hand sides.

LAPACK's time for a small matrix is that of the call. So up to `MOST_UNROLLED` unknowns, elimination
is unrolled over the unknowns and vectorized over the samples, which are the fast axis.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Measured on a CPU with 1,000 samples, with eight solves: 0.07x the time of LAPACK for 3 unknowns,
# 0.4x for 8, 1.0x for 12 and 4x for 20 (benchmarks/NOTES.md).
MOST_UNROLLED = 8


class Factors(NamedTuple):
    """`P D M = L U` for each sample, where `D` scales rows to a largest entry of one.

    The scale chooses pivots as they would be if all equations had like units.
    """

    lu: Float[Array, "n n samples"] | Float[Array, "samples n n"]
    """Both factors. Samples come last if the elimination was unrolled."""
    order: Int[Array, "n samples"] | Int[Array, "samples n"]
    """Row `i` of the product is row `order[i]` of the matrix."""
    scale: Float[Array, "samples n"]


def factorize(matrix: Float[Array, "n n samples"]) -> Factors:
    """The factors. They are not finite if a matrix is singular or not finite."""
    # Solutions do not depend on the scale. The derivative of a maximum divides by how many entries
    # equal it, which are none where XLA rounds two computations of an entry differently.
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(matrix)), axis=1, initial=0)
    scale = 1 / jnp.where(largest == 0, 1.0, largest)
    scaled = scale[:, None] * matrix
    if len(matrix) > MOST_UNROLLED:
        lu, _, order = jax.lax.linalg.lu(jnp.moveaxis(scaled, -1, 0))
        return Factors(lu, order, scale.T)
    return Factors(*_eliminate(scaled), scale.T)


def solve_factorized(factors: Factors, b: Float[Array, "samples n"], transposed: bool = False):
    """The solutions of `M x = b`, or of `M^T x = b`."""
    lu, order, scale = factors
    b = b if transposed else scale * b
    if b.shape[1] > MOST_UNROLLED:
        x = _substitute_each(lu, order, b, transposed)
    else:
        x = _substitute(lu, order, b.T, transposed).T
    return scale * x if transposed else x


def _eliminate(a: Float[Array, "n n samples"]):
    """Gaussian elimination with partial pivoting: `L` below the diagonal, `U`, and the order."""
    n, samples = a.shape[1:]
    number = jnp.arange(n, dtype=jnp.int32)
    order = jnp.zeros((n, samples), jnp.int32) + number[:, None]
    for j in range(n - 1):
        pivot = jax.lax.argmax(jnp.abs(a[j:, j]), 0, jnp.int32)
        at_pivot = number[: n - j, None] == pivot[None]
        row = jnp.sum(jnp.where(at_pivot[:, None], a[j:], 0), axis=0)
        below = jnp.where(at_pivot[1:, None], a[j][None], a[j + 1 :])
        first = jnp.sum(jnp.where(at_pivot, order[j:], 0), axis=0, dtype=jnp.int32)
        others = jnp.where(at_pivot[1:], order[j][None], order[j + 1 :])
        factor = below[:, j] / row[j][None]
        remaining = below[:, j + 1 :] - factor[:, None] * row[None, j + 1 :]
        below = jnp.concatenate([below[:, :j], factor[:, None], remaining], axis=1)
        a = jnp.concatenate([a[:j], row[None], below])
        order = jnp.concatenate([order[:j], first[None], others])
    return a, order


def _substitute(lu, order, b: Float[Array, "n samples"], transposed: bool):
    """Unknown by unknown: XLA fuses these into fewer loops over the samples than whole columns."""
    n = len(b)
    # A product with this mask is faster than a gather.
    permutation = order[:, None] == jnp.arange(n, dtype=order.dtype)[None, :, None]

    def permuted(b, axis):
        return jnp.sum(jnp.where(permutation, b, 0), axis=axis)

    x = list(b if transposed else permuted(b[None], 1))
    for backwards in (False, True):
        has_ones = backwards == transposed  # on the diagonal of the factor, which is `L` or `L^T`
        for j in reversed(range(n)) if backwards else range(n):
            if not has_ones:
                x[j] = x[j] / lu[j, j]
            for i in range(j) if backwards else range(j + 1, n):
                x[i] = x[i] - (lu[j, i] if transposed else lu[i, j]) * x[j]
    solution = jnp.array(x, b.dtype).reshape(b.shape)
    return permuted(solution[:, None], 0) if transposed else solution


def _substitute_each(lu, order, b: Float[Array, "samples n"], transposed: bool):
    """Solve by substitution. `jax.scipy.linalg.lu_solve` would find the order from the pivots of
    LAPACK at each call: on a TPU, by a loop longer than all the rest (benchmarks/NOTES.md)."""
    triangular = partial(
        jax.lax.linalg.triangular_solve, lu, left_side=True, transpose_a=transposed
    )

    def lower(x):
        return triangular(x, lower=True, unit_diagonal=True)

    def upper(x):
        return triangular(x, lower=False)

    # With the samples last, or XLA for a TPU pads the states of all recorded steps.
    if transposed:
        x = lower(upper(b[..., None]))[..., 0].T

        def place(x, order):
            return jnp.zeros_like(x).at[order].set(x, unique_indices=True)

        return jax.vmap(place, 1, 1)(x, order.T).T
    b = jnp.take_along_axis(b.T, order.T, axis=0).T
    return upper(lower(b[..., None]))[..., 0]
