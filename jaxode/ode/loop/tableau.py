"""A diffrax explicit Runge-Kutta solver as NumPy arrays."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._jax.precision import concrete_double_precision

MOST_DEGREE = 9  # of a dense output


@dataclass(frozen=True, eq=False)
class Tableau:
    """The Butcher tableau of an explicit Runge-Kutta method with `stages` stages.

    Stage `i` is `k_i = f(t + c_i h, y + h sum_j A_ij k_j)`, the step ends at `y + h sum_i b_i k_i`,
    and `h sum_i b_error_i k_i` estimates its error. Instances are compared by identity.
    `tableau_of` returns the same one each time, so they can be static arguments of `jit`.
    """

    name: str
    order: int
    A: np.ndarray
    b: np.ndarray
    c: np.ndarray
    b_error: np.ndarray | None
    """None for a method without an error estimate, which needs equal steps."""
    first_same_as_last: bool
    """Whether the last stage of a step is the first stage of the next."""
    interpolation: Callable[..., Any]
    """Makes the dense output from `t0, t1, y0, y1` and, unless it is linear, `k`."""

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def advancing_stages(self) -> int:
        """Stages that the end state depends on: all but trailing ones of weight zero."""
        return int(np.flatnonzero(self.b)[-1]) + 1

    @property
    def error_constant(self) -> float:
        """`C` of the error estimate `C h^order` for the linear equation `y' = y`, `y(t) = 1`."""
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
                return fitted
        raise NotImplementedError(f"{self.name} has a dense output that is not a polynomial.")

    def _interpolated(self, theta: Float[Array, ""]) -> Float[Array, " stages"]:
        """The weights at one `theta`.

        diffrax's interpolants are linear in `(y0, y1, k)`, so an interpolant of the identity, in
        place of the stages, returns the weights.
        """
        y0, y1, k = jnp.zeros(self.stages), jnp.asarray(self.b), jnp.eye(self.stages)
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


@functools.cache
def _tableau_of_class(cls: type[diffrax.AbstractSolver]) -> Tableau | None:
    if cls is diffrax.Euler:
        one, zero = np.ones(1), np.zeros(1)
        linear = diffrax.LocalLinearInterpolation
        return Tableau(cls.__name__, 1, np.zeros((1, 1)), one, zero, None, False, linear)
    table = getattr(cls, "tableau", None)
    if not issubclass(cls, diffrax.AbstractERK) or not isinstance(table, diffrax.ButcherTableau):
        return None
    A = np.zeros((table.num_stages, table.num_stages))
    for i, row in enumerate(table.a_lower, start=1):
        A[i, :i] = row
    return Tableau(
        name=cls.__name__,
        order=int(cls().order(diffrax.ODETerm(lambda t, y, args: y)) or 1),
        A=A,
        b=np.asarray(table.b_sol),
        c=np.concatenate([[0.0], table.c]),
        b_error=np.asarray(table.b_error),
        first_same_as_last=table.fsal,
        interpolation=cls.interpolation_cls,
    )


def tableau_of(solver: diffrax.AbstractSolver) -> Tableau | None:
    """The tableau of an explicit Runge-Kutta solver, or None for any other kind of solver."""
    return _tableau_of_class(type(solver))
