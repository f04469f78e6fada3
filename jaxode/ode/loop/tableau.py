"""A solver as NumPy arrays, and its stages: explicit Runge-Kutta solvers, which diffrax has."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.caller import arg, public
from jaxode._jax.precision import concrete_double_precision
from jaxode._jax.sharding import fori_loop
from jaxode.ode.loop.problem import weighted_sum

MOST_DEGREE = 9  # of a dense output

# The vector field on rows: (t [rows], y [samples, n]) -> dy/dt [samples, n].
Field = Callable[[Float[Array, " rows"], Float[Array, "samples n"]], Float[Array, "samples n"]]


@dataclass(frozen=True, eq=False)
class Tableau:
    """The Butcher tableau of an explicit Runge-Kutta method with `stages` stages.

    Stage `i` is `k_i = f(t + c_i h, y + h sum_j A_ij k_j)`, the step ends at `y + h sum_i b_i k_i`,
    and `h sum_i b_error_i k_i` estimates its error. Instances are compared by identity.
    `tableau_of` returns the same one each time, so they can be static arguments of `jit`.
    """

    needs_jacobian: ClassVar[bool] = False
    """Whether a step evaluates the Jacobian of the vector field at its start."""

    name: str
    order: int
    error_order: int
    """The order of the error estimate in the step size."""
    A: np.ndarray
    b: np.ndarray
    c: np.ndarray
    b_error: np.ndarray | None
    """None for a method without an error estimate, which needs equal steps."""
    first_same_as_last: bool
    """Whether the last stage of a step is the first stage of the next."""
    interpolation: Any
    """Makes the dense output from `t0, t1, y0, y1` and, unless it is linear, `k`. None if `dense`
    is known."""

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def advancing_stages(self) -> int:
        """Stages that the end state depends on: all but trailing ones of weight zero."""
        return int(np.flatnonzero(self.b)[-1]) + 1

    @property
    def evaluations(self) -> int:
        """Evaluations of the vector field per step, after the first one.

        With a Jacobian, stages 0 and 1 share one.
        """
        return self.stages - (self.first_same_as_last or self.needs_jacobian)

    @property
    def error_constant(self) -> float:
        """`C` of the estimate `C h^error_order` for the linear equation `y' = y`, `y(t) = 1`."""
        assert self.b_error is not None
        slopes = np.linalg.matrix_power(self.A, self.order - 1) @ np.ones(self.stages)
        return abs(float(self.b_error @ slopes))

    @functools.cached_property
    def dense(self) -> np.ndarray:
        """Coefficients of the dense output, a polynomial in `theta` without a constant term:

        `y(t + theta h) = y + h sum_i w_i k_i` with `w_i = sum_p dense[p, i] theta^(p + 1)`.
        """
        nodes = (1 - np.cos(np.linspace(0, np.pi, MOST_DEGREE + 2))) / 2
        with concrete_double_precision():
            weights = np.asarray(jax.jit(jax.vmap(self._interpolated))(jnp.asarray(nodes)))
        for degree in range(1, MOST_DEGREE + 1):
            powers = nodes[:, None] ** np.arange(1, degree + 1)
            fitted, *_ = np.linalg.lstsq(powers, weights)
            if np.abs(powers @ fitted - weights).max() < 1e-13 * max(np.abs(weights).max(), 1):
                # Coefficients of diffrax, and the fit, lose up to 1e-12 of the weights.
                fitted[-1] += self.b - fitted.sum(axis=0)
                return fitted
        raise NotImplementedError(f"{self.name} has a dense output that is not a polynomial.")

    def _interpolated(self, theta: Float[Array, ""]) -> Float[Array, " stages"]:
        """The weights at one `theta`.

        diffrax's interpolants are linear in `(y0, y1, k)`, so an interpolant of the identity, in
        place of the stages, returns the weights.
        """
        # From NumPy: operations of JAX would be programs to compile.
        y0, y1, k = map(jnp.asarray, (np.zeros(self.stages), self.b, np.eye(self.stages)))
        if self.interpolation is diffrax.LocalLinearInterpolation:
            return self.interpolation(t0=0.0, t1=1.0, y0=y0, y1=y1).evaluate(theta)
        return self.interpolation(t0=0.0, t1=1.0, y0=y0, y1=y1, k=k).evaluate(theta)

    def dense_weights(self, theta: Float[Array, ""]) -> Float[Array, " stages"]:
        """The weights `w` of the dense output at `theta`."""
        dense = jnp.asarray(self.dense, theta.dtype)
        weights = dense[-1]
        for row in dense[-2::-1]:
            weights = row + theta * weights
        return theta * weights

    def evaluate(
        self,
        field: Field,
        t: Float[Array, " rows"],
        h: Float[Array, " rows"],
        y: Float[Array, "samples n"],
        slope: Float[Array, "samples n"] | None,
        count: int,
    ) -> Float[Array, "stages samples n"]:
        """The first `count` stages of one step, in a loop with one copy of `field`.

        If `slope` is given, it is the first of them and is not evaluated again.
        """
        A, c = jnp.asarray(self.A[:count, :count], y.dtype), jnp.asarray(self.c, t.dtype)
        k = jax.lax.full_like(y, 0, shape=(count, *y.shape))
        if slope is not None:
            k = k.at[0].set(slope)

        def stage(i, k):
            z = y + h[:, None] * weighted_sum(A[i], k)
            return k.at[i].set(field(t + c[i] * h, z))

        return fori_loop(0 if slope is None else 1, count, stage, k)


@dataclass(frozen=True)
class Solver:
    """A solver of jaxode's own, with a tableau that needs the Jacobian of the vector field."""

    tableau: ClassVar[Tableau]
    jacobian: Callable[..., Float[Array, "n n"]] | None = None

    @public("")
    def __post_init__(self) -> None:
        if self.jacobian is not None and not callable(self.jacobian):
            raise TypeError(
                f"{arg('jacobian')} must be a function jacobian(t, y, args); got "
                f"{self.jacobian!r}. The default is forward mode."
            )

    def order(self, terms: Any = None) -> int:
        """The order of convergence, as diffrax's solvers have it."""
        del terms
        return self.tableau.order


def tableau_of(solver: diffrax.AbstractSolver | Solver) -> Tableau:
    """The tableau of a solver.

    Raises:
        ValueError: for a solver that its tableau does not describe.
    """
    if isinstance(solver, Solver):
        return solver.tableau
    cls, table = type(solver), getattr(solver, "tableau", None)
    if cls is diffrax.Euler:
        return _EULER
    if (
        not isinstance(solver, diffrax.AbstractERK)
        or not isinstance(table, diffrax.ButcherTableau)
        or cls.step is not diffrax.AbstractERK.step  # it does more than its tableau says
    ):
        raise ValueError(
            f"{arg('solver')} must be an explicit Runge-Kutta solver of diffrax, without a step of "
            f"its own, or a stiff solver of jaxode; got {cls.__name__}. Use solver=jaxode.Rodas5P()"
            " for a stiff problem, or call diffrax.diffeqsolve."
        )
    order = int(solver.order(diffrax.ODETerm(lambda t, y, args: y)) or 1)
    rows = (*table.a_lower, table.b_sol, table.b_error, table.c)
    numbers = tuple(tuple(map(float, row)) for row in rows)
    return _tableau(cls.__name__, order, numbers, table.fsal, solver.interpolation_cls)


_EULER = Tableau(
    "Euler", 1, 1, np.zeros((1, 1)), np.ones(1), np.zeros(1), None, False,
    diffrax.LocalLinearInterpolation,
)  # fmt: skip


@functools.cache
def _tableau(
    name: str, order: int, numbers: tuple[tuple[float, ...], ...], fsal: bool, interpolation: Any
) -> Tableau:
    """The same for equal arguments. The numbers are the rows of `A` but the first, `b`, the error
    estimate, and `c` but the first."""
    *rows, b, b_error, c = numbers
    A = np.zeros((len(b), len(b)))
    for i, row in enumerate(rows, start=1):
        A[i, :i] = row
    return Tableau(
        name=name,
        order=order,
        error_order=order,
        A=A,
        b=np.asarray(b),
        c=np.asarray([0.0, *c]),
        b_error=np.asarray(b_error) if np.any(b_error) else None,
        first_same_as_last=fsal,
        interpolation=interpolation,
    )
