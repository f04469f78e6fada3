"""Explicit Runge-Kutta methods, whose coefficients diffrax has.

With `y_bar` the cotangent of a step's end and `z_bar_i` that of stage `i`'s state,

    k_bar_i = h (b_i y_bar + sum_{j > i} A_ji z_bar_j),

and `z_bar_i` is the vjp of the vector field at stage `i` applied to `k_bar_i`. The cotangent of the
step's start is `y_bar + sum_i z_bar_i`.
"""

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
from jaxode._jax.pullback import pulled_back, vjp
from jaxode._jax.sharding import fori_loop
from jaxode.ode.loop.rows import reduce_rows
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.solvers.base import Field, Method

MOST_DEGREE = 9  # of a dense output


@dataclass(frozen=True, eq=False)
class RungeKutta(Method):
    """A method by its Butcher tableau: stage `i` is `k_i = f(t + c_i h, y + h sum_j A_ij k_j)`."""

    first_pulled: ClassVar[int] = 0
    """The first of the stages that are pulled back one by one."""

    A: np.ndarray
    c: np.ndarray
    interpolation: Any
    """Makes the dense output from `t0, t1, y0, y1` and, unless it is linear, `k`. None if `dense`
    is known."""

    @property
    def error_constant(self) -> float:
        assert self.b_error is not None
        slopes = np.linalg.matrix_power(self.A, self.order - 1) @ np.ones(self.stages)
        return abs(float(self.b_error @ slopes))

    @functools.cached_property
    def dense(self) -> np.ndarray:
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

    def evaluate(self, field: Field, t, h, y, slope, count: int):
        """Evaluate the stages in a loop, which holds one copy of `field`."""
        A, c = jnp.asarray(self.A[:count, :count], y.dtype), jnp.asarray(self.c, t.dtype)
        k = jax.lax.full_like(y, 0, shape=(count, *y.shape))
        if slope is not None:
            k = k.at[0].set(slope)

        def stage(i, k):
            z = y + h[:, None] * weighted_sum(A[i], k)
            return k.at[i].set(field(t + c[i] * h, z))

        return fori_loop(0 if slope is None else 1, count, stage, k)

    def pull_back(self, sweep: Any, step: Any, bar: Any, y_bar, params_bar: Any, lowest: Any):
        """Pull back stage by stage, last to first, with the recorded stages of the step."""
        solved, count = sweep.solved, len(step.k)
        timed, (t, h, y, k) = solved.timed, step
        pulled = count - sweep.interior_pulls_last  # so many stages are pulled back here
        A, b = (jnp.asarray(x[:count, ...], y.dtype) for x in (self.A[:, :count], self.b))
        c, per_step = jnp.asarray(self.c, t.dtype), sweep.per_step
        varied, at_start = None if per_step else solved.params, self.start(sweep, step)

        def k_bar_of(i, z_bars, k_bar):
            bar = k_bar[i] + h[:, None] * (b[i] * y_bar + weighted_sum(A[:, i], z_bars))
            return self.stage_cotangent(at_start, i, bar, k_bar)

        def stage(j, carry):
            z_bars, k_bar, params_bar, t_bar, h_bar = carry
            i = pulled - 1 - j
            increment, stage_bar = weighted_sum(A[i], k), k_bar_of(i, z_bars, k_bar)
            z, time = y + h[:, None] * increment, t + c[i] * h

            def apply(params, t, z):
                return solved.apply(solved.params if per_step else params, t, z)

            _, dparams, dtime, z_bar = pulled_back(apply, varied, time, z, stage_bar, timed)
            if dtime is not None:
                t_bar = t_bar + dtime
                h_bar = h_bar + c[i] * dtime + reduce_rows(jnp.sum, z_bar * increment, h)
            if not per_step:
                params_bar = jax.tree.map(jnp.add, params_bar, dparams)
            return z_bars.at[i].set(z_bar), k_bar.at[i].set(stage_bar), params_bar, t_bar, h_bar

        carry = (jnp.zeros_like(k), bar.k, params_bar, bar.t, bar.h)
        first = self.first_pulled or lowest
        z_bars, k_bar, params_bar, t_bar, h_bar = fori_loop(0, pulled - first, stage, carry)
        if sweep.waits:
            k_bar = k_bar.at[0].set(k_bar_of(0, z_bars, k_bar))
        if at_start is not None:
            k_bar = k_bar.at[1].set(k_bar_of(1, z_bars, k_bar))
            by_start, by_params = self.pull_start(sweep, step, k_bar)
            z_bars = z_bars.at[0].set(by_start.y)
            t_bar, h_bar = t_bar + by_start.t, h_bar + by_start.h
            params_bar = jax.tree.map(jnp.add, params_bar, by_params)
        if per_step:  # except for a stage that waits
            stages = slice(self.first_pulled or int(sweep.waits), pulled)
            by_stages = self._pull_params(solved, step, stages, k_bar)
            params_bar = jax.tree.map(jnp.add, params_bar, by_stages)
        if timed:
            h_bar = h_bar + reduce_rows(jnp.sum, y_bar * weighted_sum(b, k), h)
        # XLA's sum over the first axis is slow on a CPU.
        y_bar = y_bar + bar.y + weighted_sum(jnp.ones_like(b), z_bars)
        return type(step)(t_bar, h_bar, y_bar, k_bar), params_bar

    def _pull_params(self, solved: Any, step: Any, stages: slice, k_bar) -> Any:
        """The cotangents of the parameters by some `stages`, which are one batch."""
        t, h, y, k = step
        count = len(k)
        A, c = jnp.asarray(self.A[:count, :count], y.dtype), jnp.asarray(self.c[:count], t.dtype)
        z = y[None] + h[None, :, None] * weighted_sum(A, k)
        times = t[None] + c[:, None] * h[None]
        apply = jax.vmap(solved.apply, (None, 0, 0))
        _, pull = vjp(lambda params: apply(params, times[stages], z[stages]), solved.params)
        (params_bar,) = pull(k_bar[stages])
        return params_bar

    def start(self, sweep: Any, step: Any) -> Any:
        """Data shared by all stages of a step, or None."""
        del sweep, step

    def stage_cotangent(self, at_start: Any, i: Any, bar: Float[Array, "samples n"], k_bar):
        """The cotangent of the vector field at a stage, given that of the stage."""
        del at_start, i, k_bar
        return bar

    def pull_start(self, sweep: Any, step: Any, k_bar) -> tuple[Any, Any]:
        """The cotangents of what `start` returns."""
        raise NotImplementedError


@dataclass(frozen=True)
class Solver:
    """A solver of jaxode's own, with a method that needs the Jacobian of the vector field."""

    method: ClassVar[Method]
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
        return self.method.order


def method_of(solver: diffrax.AbstractSolver | Solver) -> Method:
    """The method of a solver, the same one each time.

    Raises:
        ValueError: for a solver that a tableau does not describe.
    """
    if isinstance(solver, Solver):
        return solver.method
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
    order = solver.order(diffrax.ODETerm(lambda t, y, args: y))
    if order is None:
        raise ValueError(
            f"{arg('solver')} must know its order, by which steps are chosen; got "
            f"{cls.__name__}, whose order(terms) is None. Give it a method order."
        )
    rows = (*table.a_lower, table.b_sol, table.b_error, table.c)
    numbers = tuple(tuple(map(float, row)) for row in rows)
    return _method(cls.__name__, int(order), numbers, table.fsal, solver.interpolation_cls)


_EULER = RungeKutta(
    "Euler", 1, 1, np.ones(1), None, False, np.zeros((1, 1)), np.zeros(1),
    diffrax.LocalLinearInterpolation,
)  # fmt: skip


@functools.cache
def _method(
    name: str, order: int, numbers: tuple[tuple[float, ...], ...], fsal: bool, interpolation: Any
) -> RungeKutta:
    """The method of a tableau, the same one for equal arguments.

    The numbers are the rows of `A` but the first, `b`, the error estimate, and `c` but the first.
    """
    *rows, b, b_error, c = numbers
    A = np.zeros((len(b), len(b)))
    for i, row in enumerate(rows, start=1):
        A[i, :i] = row
    return RungeKutta(
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
