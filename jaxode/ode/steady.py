"""Steady states of autonomous ODEs, with derivatives by the implicit function theorem."""

import functools
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from jaxode._checks.arguments import check_args, check_bool, check_state, non_negative, one_of
from jaxode._checks.caller import public
from jaxode._checks.errors import Result, guarded, nan_or_raise
from jaxode._checks.samples import check_rows
from jaxode._jax.closure import compiled
from jaxode.ode.field import VectorField
from jaxode.ode.solve import UserField, solve
from jaxode.ode.solvers.rosenbrock import Rodas5P

NEWTON_STEPS = 30
REMEDIES = {
    Result.SINGULAR_MATRIX: (
        "The Jacobian of f is singular there: eliminate a conserved quantity, or look for a "
        "bifurcation or a drift."
    ),
}
LOOSE = 1e-3  # tolerance of the solve, whose end Newton's method improves


class SteadyState(NamedTuple):
    """Steady states of an ODE."""

    y: PyTree[Float[Array, "..."]]
    """The state with `f(t, y, args) = 0`, shaped like `y0`; NaN where it was not found."""
    result: Int[Array, "*rows"]
    """A `jaxode.Result` for each row: 0 for success."""

    @property
    def ok(self) -> Array:
        """Whether it was found."""
        return self.result == Result.SUCCESS


@public("steady_state")
def steady_state(
    f: VectorField,
    y0: PyTree[Float[Array, "..."]],
    args: PyTree = None,
    *,
    row_args: PyTree = None,
    batch: Literal["per_sample"] | None = None,
    t1: float = 1e6,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 1024,
    throw: bool = True,
) -> SteadyState:
    """Find the state at which `dy/dt = f(t, y, args)` comes to rest, from `y0` on.

    Solves by `Rodas5P` up to `t1` at a loose tolerance, then by Newton's method (Optimistix).
    Derivatives by `args`, `row_args` and what `f` closes over are those of the implicit function
    theorem: one linear system, whatever the solve took. The state does not depend on `y0`, but for
    which of several steady states it is.

    Args:
        f: vector field `f(t, y, args)`, as for `jaxode.solve`, which does not depend on `t`.
        y0: where to start, any pytree of floating arrays.
        args: any pytree, passed to `f`.
        row_args: arguments of each row, `[batch, ...]`: `f` receives `(args, row)`.
        batch: "per_sample" for rows `[batch, ...]`, each with its steps and its steady state.
        t1: a time at which the state has settled, in units of `t`; a much longer one costs a few
            steps.
        rtol: of Newton's method: the state is found where one more step would change it by at most
            `atol + rtol |y|`. `1e-10`, or `1e-5` in single precision.
        atol: the same, absolute: far below the size of the state, whose units it has.
        max_steps: of the solve.
        throw: raise `jaxode.SolveError` if a row fails. If false, its state is NaN.

    Returns:
        A `SteadyState`: `y`, shaped like `y0`, and the `result` of each row.

    Raises:
        TypeError, ValueError: for an invalid argument.
        SolveError: where the state does not settle (`NOT_STEADY`: it oscillates, drifts, or needs a
            larger `t1`), or where the Jacobian is singular (`SINGULAR_MATRIX`: eliminate a
            conserved quantity, or it is a bifurcation).
    """
    y0, args = check_state("y0", y0), check_args("args", args)
    one_of("batch", batch, (None, "per_sample"))
    check_bool("throw", throw)
    dtype = jnp.result_type(*jax.tree.leaves(y0))
    least = 1e-10 if dtype == jnp.float64 else 1e-5
    rtol = least if rtol is None else non_negative("rtol", rtol)
    atol = least if atol is None else non_negative("atol", atol)
    loose = {"rtol": LOOSE, "atol": min(LOOSE, 10 * atol**0.5), "max_steps": max_steps}
    settled = solve(
        f, _fixed(y0), 0.0, t1, _fixed(args), solver=Rodas5P(), batch=batch,
        row_args=_fixed(row_args), throw=False, **loose,
    )  # fmt: skip
    if batch is not None and row_args is not None:
        row_args = check_rows("row_args", row_args, len(jax.tree.leaves(y0)[0]))
    limits = t1, rtol, atol, loose["atol"]
    y, result = _improved(UserField(f), limits, settled.y1, settled.result, args, row_args, batch)
    if throw:
        nan = nan_or_raise(result, settled.t_reached, remedies=REMEDIES)
        y = jax.tree.map(lambda leaf: guarded(leaf, *_like(result == 0, nan, leaf)), y)
    return SteadyState(y, result)


def _fixed(tree: PyTree) -> PyTree:
    """The tree without derivatives. It may hold functions, as networks do."""
    stop = lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf
    return jax.tree.map(stop, tree)


def _like(ok: Array, nan: Any, leaf: Array) -> tuple[Array, Array]:
    shape = ok.shape + (1,) * (leaf.ndim - ok.ndim)
    return ok.reshape(shape), nan.reshape(shape)


@compiled
def _improved(field: UserField, limits, y: PyTree, result: Array, args, row_args, batch):
    """The roots near `y` of all rows, and whether they are."""
    improve = functools.partial(_newton, field, limits)
    if batch is None:
        return improve(y, result, args, None)
    axes = (0, 0, None, None if row_args is None else 0)
    return jax.vmap(improve, axes)(y, result, args, row_args)


def _largest(matrix: Float[Array, "n n"], axis: int) -> Array:
    """The largest magnitudes along an axis, or one."""
    largest = jnp.max(jnp.abs(matrix), axis=axis, keepdims=True)
    return jnp.where(largest > 0, largest, 1.0)


def _newton(field: UserField, limits, y: PyTree, result: Array, args, row):
    """The root near `y`, and whether it is one."""
    import optimistix as optx

    t1, rtol, atol, loose_atol = limits
    flat, unravel = ravel_pytree(y)
    flat = _fixed(flat)
    time = jnp.asarray(t1, flat.dtype)
    near = jnp.where(jnp.isfinite(flat), flat, 0.0)

    def residual(flat, inputs):
        args, row = inputs
        return ravel_pytree(field(time, unravel(flat), args, row))[0]

    closed = eqx.filter_closure_convert(residual, near, (args, row))
    solver = optx.Newton(rtol, atol)
    found = optx.root_find(closed, solver, near, (args, row), max_steps=NEWTON_STEPS, throw=False)
    root = found.value
    fixed, rates = _fixed(root), lambda v: residual(v, _fixed((args, row)))
    jacobian = jax.jacfwd(rates)(fixed)
    jacobian = jnp.where(jnp.isfinite(jacobian), jacobian, 0.0)
    rows = _largest(jacobian, 1)  # rates and states may be of any size
    columns = _largest(jacobian / rows, 0)
    scaled = jacobian / rows / columns
    values = jnp.linalg.svd(scaled, compute_uv=False)
    singular = values[-1] <= values[0] * len(values) * 10 * jnp.finfo(flat.dtype).eps
    # Newton's own end asks for rates below `atol`, which have another unit.
    invertible = jnp.where(singular, jnp.eye(len(flat), dtype=flat.dtype), scaled)
    step = jnp.linalg.solve(invertible, rates(fixed) / rows[:, 0]) / columns[0]
    close = jnp.all(jnp.abs(step) <= atol + rtol * jnp.abs(fixed))
    # From a state that had not settled, Newton's method may run to any root.
    moved = jnp.any(jnp.abs(fixed - near) > 10 * (loose_atol + LOOSE * jnp.abs(near)))
    lost = ~close | ~jnp.isfinite(fixed).all() | moved
    lost = lost | (result == Result.MAX_STEPS_REACHED)
    code = jnp.where(lost, Result.NOT_STEADY.value, Result.SUCCESS.value)
    code = jnp.where(singular, Result.SINGULAR_MATRIX.value, code)
    own = (result != Result.SUCCESS) & (result != Result.MAX_STEPS_REACHED)
    code = jnp.where(own, result, code).astype(result.dtype)
    ok = code == Result.SUCCESS
    return unravel(jnp.where(ok, root, jnp.nan)), code
