"""Rosenbrock methods, for stiff problems: linear solves in place of Newton's iteration.

With `J` the Jacobian and `f_t` the time derivative of the vector field at the start of a step, the
stages solve

    (I / gamma - h J) k_i = f(t + c_i h, y + h sum_j A_ij k_j) + sum_j C_ij k_j + h d_i f_t,

which is the transformed form of Hairer and Wanner, with `k_i` in place of their `u_i / h`. All
stages share one factorization. Samples are independent, so each has a matrix of its own, also where
they share their steps.

With a mass matrix `M`, it replaces `I`, and multiplies the sum of `C_ij k_j`.

Backwards, with `M = I / gamma - h J`, `k_bar_i` of `explicit.py` also gets `sum_{j > i} C_ji r_j`,
and the vector field is pulled back from `r_i = M^-T k_bar_i`. The rest depends on the start of the
step alone: `h sum_i r_i . (J k_i + d_i f_t)` is pulled back as a sum of tangents of the vector
field, with no derivative of the matrix.

References: Hairer and Wanner, "Solving Ordinary Differential Equations II" (1996), section IV.7.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.errors import Result
from jaxode._jax.pullback import pulled_back
from jaxode._jax.sharding import axes_of, fori_loop, vary
from jaxode._jax.tangents import along
from jaxode.ode.loop.rows import reduce_rows
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.solvers.base import Field
from jaxode.ode.solvers.explicit import RungeKutta, Solver
from jaxode.ode.solvers.linear import Factors, factorize, solve_factorized


class Linearized(NamedTuple):
    """The vector field at the start of a step, and the factors of `I / gamma - h J`."""

    slope: Float[Array, "samples n"]
    by_time: Float[Array, "samples n"]
    factors: Factors

    @classmethod
    def at(
        cls, method: "RosenbrockMethod", field: Field, t, h, y: Float[Array, "samples n"]
    ) -> "Linearized":
        """Linearize the field at the start of a step.

        Unless the user gave the Jacobian, a product with a unit vector gives a column for all
        samples.
        """
        unit = vary(jnp.eye(y.shape[1], dtype=y.dtype), axes_of(y))
        user_jacobian = getattr(field, "jacobian", None)
        try:
            if user_jacobian is not None:
                slope, by_time = along(lambda t: field(t, y), t)
                jacobian = user_jacobian(t, y).transpose(1, 2, 0)
            else:
                slope, push = jax.linearize(lambda y: field(t, y), y)
                columns = jax.vmap(lambda e: push(jnp.broadcast_to(e, y.shape)))(unit)
                _, by_time = jax.jvp(lambda t: field(t, y), (t,), (jnp.ones_like(t),))
                jacobian = columns.transpose(2, 0, 1)
        except (TypeError, ValueError, NotImplementedError) as error:
            by, cure = "", f"Pass its Jacobian, as jaxode.{method.name}(jacobian=...), or use"
            if user_jacobian is not None:
                by, cure = " by the time", "Use"
            raise TypeError(
                f"{method.name}: f needs a forward mode{by}; got {type(error).__name__}: "
                f"{str(error).rstrip('.')}. {cure} jax.custom_jvp in place of jax.custom_vjp."
            ) from error
        # At a step of size zero, the Jacobian may not be finite.
        size = h.astype(y.dtype)[None, None]
        mass = unit[:, :, None]
        if method.mass is not None:  # which may be singular
            mass = jnp.where(size == 0, mass, jnp.asarray(method.mass, y.dtype)[:, :, None])
        matrix = mass / method.gamma - jnp.where(size == 0, 0, size * jacobian)
        return cls(slope, by_time, factorize(matrix))

    def solve(self, b: Float[Array, "samples n"], transposed: bool = False):
        return solve_factorized(self.factors, b, transposed)

    def first(self, b: Float[Array, "samples n"]) -> Float[Array, "samples n"]:
        """Solve. Infinite where the matrix is singular, NaN where it or `b` is not finite."""
        x = self.solve(b)
        # The scale of a row that is not finite is zero or NaN.
        finite = jnp.all((self.factors.scale > 0) & jnp.isfinite(b), axis=1, keepdims=True)
        return jnp.where(jnp.isfinite(x), x, jnp.where(finite, jnp.inf, jnp.nan))


@dataclass(frozen=True, eq=False)
class RosenbrockMethod(RungeKutta):
    """The coefficients of a Rosenbrock method.

    Stage 0 is the vector field at the start. It has no weight anywhere, and is what the solution
    follows if a step has size zero. The stages of the method follow.
    """

    C: np.ndarray
    d: np.ndarray
    gamma: float
    dense_output: np.ndarray
    mass: np.ndarray | None = None
    """`M`, or the identity."""

    implicit: ClassVar[bool] = True
    first_pulled: ClassVar[int] = 2  # Both first stages are the vector field at the start.

    @property
    def error_constant(self) -> float:
        assert self.b_error is not None
        # The Taylor series of the stages in `h`, whose first term is that of the constant `y' = 1`.
        implicit = np.eye(self.stages) / self.gamma - self.C
        terms = np.linalg.solve(implicit, np.ones(self.stages))
        for _ in range(self.error_order - 1):
            terms = np.linalg.solve(implicit, terms + self.A @ terms)
        return abs(float(self.b_error @ terms))

    @property
    def dense(self) -> np.ndarray:
        return self.dense_output

    def evaluate(self, field: Field, t, h, y, slope, count: int):
        """The first `count` stages of one step, with one Jacobian and one factorization."""
        del slope
        coefficients = self.A[:, :count], self.C[:, :count], self.d, self.c
        A, C, d, c = (jnp.asarray(x[:count], y.dtype) for x in coefficients)
        at = Linearized.at(self, field, t, h, y)
        k = jax.lax.full_like(y, 0, shape=(count, *y.shape))
        first = at.first(at.slope + d[1] * h[:, None] * at.by_time)
        k = k.at[0].set(at.slope).at[1].set(first)

        def stage(i, k):
            z = y + h[:, None] * weighted_sum(A[i], k)
            right = field(t + c[i] * h, z) + self.times_mass(weighted_sum(C[i], k))
            return k.at[i].set(at.solve(right + d[i] * h[:, None] * at.by_time))

        return fori_loop(2, count, stage, k)

    @property
    def evaluations(self) -> int:
        return self.stages - 1  # stages 0 and 1 share one

    def failure(self, k, every):
        """Stage 0 is the vector field at the start, and stage 1 is solved for by it, see
        `Linearized.first`."""
        of_matrix = jnp.where(
            every(~jnp.isnan(k[1])), Result.SINGULAR_MATRIX, Result.NON_FINITE_JACOBIAN
        )
        only_first = every(jnp.isfinite(k[0])) & ~every(jnp.isfinite(k[1]))
        return jnp.where(only_first, of_matrix, Result.NON_FINITE)

    def start(self, sweep: Any, step: Any):
        t, h, y, k = step
        at = Linearized.at(self, sweep.solved.slope(sweep.solved.params), t, h, y)
        return at, jnp.asarray(self.C[: len(k), : len(k)], y.dtype)

    def stage_cotangent(self, at_start, i, bar, k_bar):
        linearized, C = at_start
        bar = bar + self.times_mass(weighted_sum(C[:, i], k_bar), transposed=True)
        return linearized.solve(bar, transposed=True)

    def times_mass(self, k: Float[Array, "samples n"], transposed: bool = False):
        """`M k` of each sample."""
        if self.mass is None:
            return k
        mass = jnp.asarray(self.mass if transposed else self.mass.T, k.dtype)
        return jnp.matmul(k, mass, precision=jax.lax.Precision.HIGHEST)

    def pull_start(self, sweep: Any, step: Any, k_bar) -> tuple[Any, Any]:
        """Pull `r_i` back to the start. That of stage 0 is its cotangent from outside the step."""
        (t, h, y, k), solved, r, step_type = step, sweep.solved, k_bar, type(step)
        d = jnp.asarray(self.d[1 : len(k)], y.dtype)
        times = jnp.broadcast_to(d[:, None].astype(t.dtype), (len(d), *t.shape))

        def tangents(params, t, y):
            """The vector field, and `J k_i + d_i f_t` for each stage."""
            field = solved.slope(params)
            if field.jacobian is None:

                def push(dt, dy):
                    return jax.jvp(lambda t, y: field(t, y), (t, y), (dt, dy))

                slopes, moved = jax.vmap(push)(times, k[1:])
                return slopes[0], moved
            moved = jnp.einsum("sij,ksj->ksi", field.jacobian(t, y), k[1:], precision="highest")
            slope, by_time = along(lambda t: field(t, y), t)
            return slope, moved + d[:, None, None] * by_time[None]

        bars = r[0] + r[1], h[None, :, None] * r[1:]
        pulled = pulled_back(tangents, solved.params, t, y, bars, solved.timed)
        (_, moved), by_params, t_bar, y_bar = pulled
        if t_bar is None:
            return step_type(jnp.zeros_like(t), jnp.zeros_like(h), y_bar, k), by_params
        products = reduce_rows(jnp.sum, jnp.sum(r[1:] * moved, axis=0), h)
        return step_type(t_bar, products, y_bar, k), by_params


@functools.cache
def with_mass(method: RosenbrockMethod, mass: tuple[tuple[float, ...], ...]) -> RosenbrockMethod:
    """The method for `M dy/dt = f`, the same one each time."""
    return dataclasses.replace(method, mass=np.array(mass))


def _rosenbrock(name: str, order: int, error_order: int, **tableau: Any) -> RosenbrockMethod:
    """The tableau of a method, with stage 0 put before the given stages."""
    tableau = {name: np.asarray(value) for name, value in tableau.items()}

    def with_first(x):
        return np.concatenate([np.zeros((*x.shape[:-1], 1)), x], axis=-1)

    gamma = float(tableau["gamma"])
    square = {name: with_first(with_first(tableau[name]).T).T for name in ("A", "C")}
    row = {name: with_first(tableau[name]) for name in ("b", "c", "d", "b_error")}
    return RosenbrockMethod(
        name=name,
        order=order,
        error_order=error_order,
        first_same_as_last=False,
        interpolation=None,
        gamma=gamma,
        dense_output=with_first(tableau["dense"]),
        **square,
        **row,
    )


def _rodas5p() -> RosenbrockMethod:
    last_row = [-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256]
    last_row = [*last_row, 0.030198172008377946]
    A = np.zeros((8, 8))
    A[1, :1] = 3.0
    A[2, :2] = 2.849394379747939, 0.45842242204463923
    A[3, :3] = -6.954028509809101, 2.489845061869568, -10.358996098473584
    A[4, :4] = 2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641
    A[5:, :5] = last_row
    A[6:, 5], A[7, 6] = 1.0, 1.0
    C = np.zeros((8, 8))
    C[1, :1] = -14.155112264123755
    C[2, :2] = -17.97296035885952, -2.859693295451294
    C[3, :3] = 147.12150275711716, -1.41221402718213, 71.68940251302358
    C[4, :4] = 165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306
    C[5, :3] = 24.854864614690072, -3.0009227002832186, 47.4931110020768
    C[5, 3:5] = 5.5814197821558125, -0.6610691825249471
    C[6, :3] = 30.91273214028599, -3.1208243349937974, 77.79954646070892
    C[6, 3:6] = 34.28646028294783, -19.097331116725623, -28.087943162872662
    C[7, :3] = 37.80277123390563, -3.2571969029072276, 112.26918849496327
    C[7, 3:] = 66.9347231244047, -40.06618937091002, -54.66780262877968, -9.48861652309627, 0
    c = [0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1, 1, 1]
    d = [0.21193756319429014, -0.42387512638858027, -0.3384627126235924, 1.8046452872882734]
    d = [*d, 2.325825639765069, 0, 0, 0]
    H = np.zeros((3, 8))
    H[0, :4] = 25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204
    H[0, 4:] = 0.524948541321073, 1.1241088310450404, 0.4272876194431874, -0.17202221070155493
    H[1, :4] = -9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796
    H[1, 4:] = 20.176138334709044, 15.98066361424651, -6.789040303419874, -6.710236069923372
    H[2, :4] = 11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643
    H[2, 4:] = -52.072871366152654, -59.78993625266729, -0.15582684282751913, 4.883087185713722
    b = np.array([*last_row, 1.0, 1.0, 1.0])
    # y + theta (h b k + (1 - theta) h (H_0 + theta H_1 + theta^2 H_2) k)
    dense = np.stack([b + H[0], H[1] - H[0], H[2] - H[1], -H[2]])
    error, gamma = np.eye(8)[7], 0.21193756319429014
    return _rosenbrock(
        "Rodas5P", 5, 5, A=A, C=C, b=b, c=c, d=d, b_error=error, dense=dense, gamma=gamma
    )


def _rosenbrock23() -> RosenbrockMethod:
    """With `k_1 = K_1 / gamma`, `k_2 = (K_1 + K_2) / gamma` and so on for Shampine's `k`, where
    `K` are the stages here."""
    gamma, e32 = 1 / (2 + 2**0.5), 6 + 2**0.5

    def by_gamma(rows):
        return np.array(rows) / gamma

    return _rosenbrock(
        "Rosenbrock23",
        2,
        3,
        A=by_gamma([[0, 0, 0], [0.5, 0, 0], [1, 1, 0]]),
        C=by_gamma([[0, 0, 0], [-1, 0, 0], [-2, -e32, 0]]),
        b=by_gamma([1, 1, 0]),
        c=[0, 0.5, 1],
        d=[gamma, 0, -gamma],
        b_error=by_gamma([1, e32 - 2, 1]) / 6,
        dense=by_gamma([[1, -2 * gamma / (1 - 2 * gamma), 0], [0, 1 / (1 - 2 * gamma), 0]]),
        gamma=gamma,
    )


@dataclass(frozen=True)
class Rodas5P(Solver):
    """The stiff solver to start with: a Rosenbrock method of order 5(4), for any tolerance.

    L-stable and stiffly accurate. A step evaluates the vector field eight times and its Jacobian
    once, and factorizes one matrix per sample; there is no iteration that could fail to converge.
    On stiff problems that are driven the order falls, to three on that of Prothero and Robinson at
    a rate of 1e6, where errors are small already.

    Args:
        jacobian: a function `jacobian(t, y, args) -> [n, n]` of the state of one sample, by default
            forward mode of the vector field. With `row_args` it sees `(args, row)`, as the field.
            Entry `[i, j]` is the derivative of number `i` of `f(t, y, args)` by number `j` of `y`,
            in the order of `jax.flatten_util.ravel_pytree`. With one that is not exact, the order
            falls to two: error control then takes more steps, for which gradients are exact. For
            `solve` and `flow`.

    Raises:
        TypeError: if `jacobian` is not a function.

    References: Steinebach (2023), doi:10.1007/s10543-023-00967-x.
    """

    method: ClassVar[RosenbrockMethod] = _rodas5p()


@dataclass(frozen=True)
class Rosenbrock23(Solver):
    """A stiff solver for loose tolerances and fields that are not smooth: order 2, as `ode23s`.

    L-stable. A step evaluates the vector field three times and its Jacobian once.

    Args:
        jacobian: as for `Rodas5P`.

    References: Shampine and Reichelt, "The MATLAB ODE suite" (1997).
    """

    method: ClassVar[RosenbrockMethod] = _rosenbrock23()
