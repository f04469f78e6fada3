"""Roots of vector fields by Newton's method, with derivatives by the implicit function theorem.

Numbers of a state may be in any units, so every tolerance is relative: to the number itself, to its
natural size, or to what rounding does to it (Higham 2002, section 7.2).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._jax.tangents import nan_everywhere_unless, undifferentiated_unless
from jaxode.ode.solvers.linear import factorize, solve_factorized

NEWTON_STEPS = 30
# A number below this part of its natural size is noise: far above rounding, far below tolerances.
NOISE = {jnp.dtype("float64"): 1e-10, jnp.dtype("float32"): 1e-5}
# The natural size of a number that decays is at least this part of the largest it had.
LEAST_NATURAL_SIZE = 1e-6
CRUDE_STEPS = 16
CREEP = 10**1.5  # the factor of the step size from one crude step to the next
CREEPS = 0.4, 0.9  # factors of moves to a multiple root: 1/2 to a double one
RATE_ROUNDING = 100.0  # errors of a rate, in rounding errors of `|J| |y|`
MOST_ROUNDING = 1e-3  # put no more down to rounding than this part of a natural size

# Iterations of the sign function. Each doubles the angle of an eigenvalue against the imaginary
# axis, so that those which rounding has put beside it stay undecided.
SIGN_STEPS = {jnp.dtype("float64"): 40, jnp.dtype("float32"): 16}

product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
Rates = Callable[[Float[Array, " n"]], Float[Array, " n"]]


class Root(NamedTuple):
    """The end of Newton's method."""

    y: Float[Array, " n"]
    jacobian: Float[Array, "n n"]
    close: Bool[Array, ""]
    """Whether one more step would change nothing."""
    singular: Bool[Array, ""]


class Equilibrated(NamedTuple):
    """A matrix that is scaled to rows and columns of size one, and their sizes.

    Rates and states may have any units.
    """

    matrix: Float[Array, "n n"]
    rows: Float[Array, "n 1"]
    columns: Float[Array, "1 n"]

    @classmethod
    def of_matrix(cls, matrix: Float[Array, "n n"]) -> "Equilibrated":
        rows = _largest(matrix, 1)
        columns = _largest(matrix / rows, 0)
        return cls(matrix / rows / columns, rows, columns)

    @property
    def singular(self) -> Bool[Array, ""]:
        """Whether the matrix is singular, up to rounding."""
        matrix = jnp.where(jnp.isfinite(self.matrix), self.matrix, 0.0)
        values = jnp.linalg.svd(matrix, compute_uv=False)
        return values[-1] <= values[0] * len(values) * 10 * jnp.finfo(values.dtype).eps

    def solve(self, b: Float[Array, " n"]) -> Float[Array, " n"]:
        factors = factorize(self.matrix[..., None])
        return solve_factorized(factors, (b / self.rows[:, 0])[None])[0] / self.columns[0]

    def inverse(self) -> Float[Array, "n n"]:
        factors, unit = factorize(self.matrix[..., None]), jnp.eye(len(self.rows))

        def column(b):
            return solve_factorized(factors, b[None])[0]

        columns = jax.vmap(column)(unit.astype(self.matrix.dtype))
        return columns.T / self.columns.T / self.rows.T


def _largest(matrix: Float[Array, "n n"], axis: int) -> Array:
    """The largest magnitudes along an axis, or one."""
    largest = jnp.max(jnp.abs(matrix), axis=axis, keepdims=True)
    return jnp.where(largest > 0, largest, 1.0)


def natural_sizes(rates: Rates, y: Float[Array, " n"], t1: Float[Array, ""]) -> Float[Array, " n"]:
    """How large each number of the state becomes on a crude path to `t1`, as powers of two.

    A number that ends near zero, such as a velocity, is as large as what the others that move it
    would bring in its own time.
    """

    def step(carry, h):
        y, peak = carry
        moved = Equilibrated.of_matrix(jnp.eye(len(y), dtype=y.dtype) / h - jax.jacfwd(rates)(y))
        # A nearly singular matrix would move a number too far. One that is next to nothing so far,
        # such as the end of a long chain that was empty, may go anywhere.
        some = peak > jnp.finfo(y.dtype).eps ** 2 * jnp.max(peak, initial=0.0)
        far = jnp.where(some, CREEP**3 * peak, jnp.inf)
        to = y + jnp.clip(moved.solve(rates(y)), -far, far)
        to = jnp.where(jnp.isfinite(to).all(), to, y)
        return (to, jnp.maximum(peak, jnp.abs(to))), None

    y = jnp.where(jnp.isfinite(y), y, 0.0)
    hs = t1 * CREEP ** -jnp.arange(CRUDE_STEPS - 1, -1, -1, dtype=y.dtype)
    (end, peak), _ = jax.lax.scan(step, (y, jnp.abs(y)), hs)
    jacobian = jnp.nan_to_num(jnp.abs(jax.jacfwd(rates)(end)), posinf=0.0)
    speed = jnp.sqrt(jnp.max(jacobian * jacobian.T, axis=1))  # one over a time
    brought = jnp.where(
        speed > 0, product(jacobian, jnp.abs(end)) / jnp.where(speed > 0, speed, 1.0), 0.0
    )
    size = jnp.maximum(jnp.maximum(jnp.abs(end), brought), LEAST_NATURAL_SIZE * peak)
    largest = jnp.max(size, initial=0.0)
    size = jnp.where(size > 0, size, jnp.where(largest > 0, largest, 1.0))
    return jnp.ldexp(jnp.ones_like(size), jnp.frexp(size)[1])


def find_root(
    rates: Rates, y_start: Float[Array, " n"], size: Float[Array, " n"], rtol: Any, atol: Any
) -> Root:
    """Find a root by Newton's method, without derivatives."""
    info = jnp.finfo(y_start.dtype)

    def step(carry):
        y, _, before, count, _, _ = carry
        jacobian = jax.jacfwd(rates)(y)
        inverse = Equilibrated.of_matrix(jacobian).inverse()
        move = product(inverse, rates(y))
        finite = jnp.isfinite(move).all()
        y = jnp.where(finite, y - move, y)
        gross = product(jnp.abs(inverse), product(jnp.abs(jacobian), jnp.abs(y)))
        rounding = jnp.minimum(RATE_ROUNDING * info.eps * gross, MOST_ROUNDING * size)
        # At a multiple root, moves shrink by the same factor for ever, down to any noise.
        creeps = (CREEPS[0] * before < jnp.abs(move)) & (jnp.abs(move) < CREEPS[1] * before)
        least = jnp.where(creeps, 0.0, rtol * NOISE[y_start.dtype] * size)
        close = jnp.all(jnp.abs(move) <= atol + rtol * jnp.abs(y) + least + rounding)
        return y, jacobian, jnp.abs(move), count + 1, close, ~finite

    def goes_on(carry):
        _, _, _, count, close, lost = carry
        return ~close & ~lost & (count < NEWTON_STEPS)

    no = jnp.zeros((), bool)
    n, dtype = len(y_start), y_start.dtype
    start = y_start, jnp.zeros((n, n), dtype), 0 * y_start, jnp.int32(0), no, no
    y, jacobian, _, _, close, _ = jax.lax.while_loop(goes_on, step, start)
    return Root(y, jacobian, close, Equilibrated.of_matrix(jacobian).singular)


def implicit(
    rates: Callable[..., Array], at: Float[Array, " n"], ok: Bool[Array, ""], inputs: PyTree
) -> Float[Array, " n"]:
    """`at`, a root of `rates(y, inputs)`, with derivatives by the inputs. NaN unless it is `ok`.

    As for a failed solve, all derivatives are NaN unless it is `ok`, or zero where nothing depends
    on it.
    """

    def solve(linear, b):
        jacobian = jax.jacfwd(linear)(jnp.zeros_like(b))
        unit = jnp.eye(len(b), dtype=b.dtype)
        return Equilibrated.of_matrix(jnp.where(ok, jacobian, unit)).solve(b)

    used = undifferentiated_unless(ok, inputs)
    root = jax.lax.custom_root(lambda y: rates(y, used), at, lambda _, at: at, solve)
    # A zero that has a derivative by each of the inputs.
    moved = (x - jax.lax.stop_gradient(x) for x in jax.tree.leaves(inputs) if _has_tangent(x))
    touched = sum((jnp.sum(x).astype(at.dtype) for x in moved), jnp.zeros((), at.dtype))
    return nan_everywhere_unless(ok, root + jnp.where(ok, 0.0, touched))


def _has_tangent(x: Any) -> bool:
    return eqx.is_inexact_array(x) and not jnp.iscomplexobj(x)


def is_stable(jacobian: Float[Array, "n n"]) -> Bool[Array, ""]:
    """Whether all eigenvalues have negative real parts: the matrix sign function is then `-I`.

    JAX has eigenvalues of nonsymmetric matrices on CPUs alone. Newton's iteration with scaling by
    norms (Higham 2008, "Functions of Matrices", section 5.5) compiles everywhere. The scaling needs
    a few steps for rates that are many powers of ten apart, where the determinant would need all.
    """
    n, unit = len(jacobian), jnp.eye(len(jacobian), dtype=jacobian.dtype)

    def norms(x):
        return jnp.sum(jnp.abs(x), axis=0).max() * jnp.sum(jnp.abs(x), axis=1).max()

    def step(_, x):
        inverse = Equilibrated.of_matrix(x).inverse()
        scale = norms(inverse) ** 0.25 / norms(x) ** 0.25
        return (scale * x + inverse / scale) / 2

    finite = jnp.isfinite(jacobian).all()
    sign = jax.lax.fori_loop(0, SIGN_STEPS[jacobian.dtype], step, jnp.where(finite, jacobian, unit))
    return jnp.abs(jnp.trace(sign) + n) < 0.5
