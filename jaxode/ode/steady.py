"""Steady states of autonomous ODEs, with derivatives by the implicit function theorem."""

import functools
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.arguments import (
    check_args,
    check_batch,
    check_bool,
    check_derivative,
    check_number,
    check_state,
    non_negative,
    one_of,
    state_dtype,
)
from jaxode._checks.caller import public
from jaxode._checks.errors import Result, guarded, nan_or_raise
from jaxode._checks.rules import POSITIVE
from jaxode._jax.closure import compiled
from jaxode.ode.field import VectorField, check_field
from jaxode.ode.roots import NOISE, find_root, implicit, is_stable, natural_sizes
from jaxode.ode.solve import UserField, check_row_args, solve
from jaxode.ode.solvers.rosenbrock import Rodas5P

REMEDIES = {
    Result.SINGULAR_MATRIX: (
        "The Jacobian of f is singular there: eliminate a conserved quantity, or look for a "
        "bifurcation or a drift."
    ),
}
SETTLING_RTOL = 1e-3  # of the solve to a settled state, which Newton's method improves


class SteadyState(NamedTuple):
    """Steady states of an ODE."""

    y: PyTree[Float[Array, "..."]]
    """The state with `f(t, y, args) = 0`, shaped like `y0`; NaN where it was not found."""
    result: Int[Array, "*rows"]
    """A `jaxode.Result` for each row: 0 for success."""
    jacobian: Float[Array, "*rows n n"]
    """The Jacobian of `f` there, in the order of `jax.flatten_util.ravel_pytree`; NaN where it was
    not found. It has no derivatives."""

    @property
    def ok(self) -> Bool[Array, "*rows"]:
        """Whether it was found."""
        return self.result == Result.SUCCESS

    @property
    def stable(self) -> Bool[Array, "*rows"]:
        """Whether it attracts all states near it: all eigenvalues of `jacobian` have negative real
        parts. False where these are zero up to rounding, as of a center; and where no state was
        found, as along a conserved total, whose eigenvalue is zero."""
        return _stable(self.jacobian)


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

    Solves by `Rodas5P` up to `t1` at a loose tolerance, then by Newton's method. States may be of
    any size, and their numbers in units far apart: both compare each number with its own size.
    Derivatives by `args`, `row_args` and what `f` closes over are those of the implicit function
    theorem: one linear system, whatever the solve took. The state does not depend on `y0`, but for
    which of several steady states it is. From a state at rest, it may be unstable: see
    `SteadyState.stable`.

    Args:
        f: vector field `f(t, y, args)`, as for `jaxode.solve`, which does not depend on `t`.
        y0: where to start, any pytree of floating arrays.
        args: any pytree, passed to `f`.
        row_args: arguments of each row, `[batch, ...]`: `f` receives `(args, row)`.
        batch: "per_sample" for rows `[batch, ...]`, each with its steps and its steady state.
        t1: a time at which the state has settled, in units of `t`; a much longer one costs a few
            steps.
        rtol: of Newton's method: the state is found where one more step would change each number by
            at most `atol + rtol |y|`, or by rounding. `1e-10`, or `1e-5` in single precision.
        atol: the same, absolute: far below the size of the state, whose units it has. By default
            zero.
        max_steps: of the solve.
        throw: raise `jaxode.SolveError` if a row fails. If false, its state and derivatives are
            NaN.

    Returns:
        A `SteadyState`: `y`, shaped like `y0`, the `result` of each row, and whether it is
        `stable`.

    Raises:
        TypeError, ValueError: for an invalid argument.
        SolveError: where the state does not settle (`NOT_STEADY`: it oscillates, drifts, or needs a
            larger `t1`), or where the Jacobian is singular (`SINGULAR_MATRIX`: eliminate a
            conserved quantity, or it is a bifurcation).
    """
    check_field("f", f, "f(t, y, args)")
    y0 = (check_state if batch is None else check_batch)("y0", y0)
    args, row_args = check_args("args", args), check_row_args(row_args, y0, batch)
    one_of("batch", batch, (None, "per_sample"))
    check_number("t1", t1, POSITIVE, kind="time")
    check_bool("throw", throw)
    rows = y0 if batch is not None else jax.tree.map(lambda leaf: leaf[None], y0)
    field = _Row(UserField(f), jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), rows))
    flats = jax.vmap(field.flat)(_fixed(rows))
    least = 1e-10 if flats.dtype == jnp.float64 else 1e-5
    rtol = least if rtol is None else non_negative("rtol", rtol)
    atol = 0.0 if atol is None else non_negative("atol", atol)
    fixed = _fixed((args, row_args))
    sizes = _fixed(_sizes(field, t1, flats, *fixed))  # `f` may close over what is differentiated
    settled = solve(
        field.scaled, flats / sizes, 0.0, t1, fixed[0], row_args=(fixed[1], sizes),
        batch="per_sample", solver=Rodas5P(), rtol=SETTLING_RTOL, atol=NOISE[flats.dtype],
        max_steps=max_steps, throw=False,
    )  # fmt: skip
    settled_states = _fixed((settled.y1 * sizes, settled.result))
    y, result, jacobian = _improved(
        field, (t1, rtol, atol), flats, settled_states, sizes, args, row_args
    )
    t_reached = settled.t_reached
    if batch is None:
        y, result, jacobian, t_reached = jax.tree.map(
            lambda leaf: leaf[0], (y, result, jacobian, t_reached)
        )
    if throw:
        nan = nan_or_raise(result, t_reached, remedies=REMEDIES)
        y = jax.tree.map(lambda leaf: guarded(leaf, *_like(result == 0, nan, leaf)), y)
    return SteadyState(y, result, jacobian)


class _Row(eqx.Module):
    """The vector field of one row, of its state as a vector."""

    field: UserField
    template: PyTree[Array]

    def flat(self, y: PyTree[Array]) -> Float[Array, " n"]:
        dtype = state_dtype(self.template)
        leaves = (jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(y))
        return jnp.concatenate(list(leaves))

    def unravel(self, flat: Float[Array, " n"]) -> PyTree[Array]:
        wide = jax.tree.map(lambda leaf: leaf.astype(flat.dtype), self.template)
        y = ravel_pytree(wide)[1](flat)
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), y, self.template)

    def __call__(self, t, flat: Float[Array, " n"], args: PyTree, row: PyTree):
        y = self.unravel(flat)
        dy = self.field(t, y, args, row)
        check_derivative(y, dy, casts=True)
        return self.flat(dy)

    def scaled(self, t, y: Float[Array, " n"], inputs):
        """The field for `jaxode.solve`, of a state in units of its size."""
        args, (row, size) = inputs
        return self(t, y * size, args, row) / size


def _fixed(tree: PyTree) -> PyTree:
    """The tree without derivatives. It may hold functions, as networks do."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, tree
    )


def _like(ok: Array, nan: Any, leaf: Array) -> tuple[Array, Array]:
    shape = ok.shape + (1,) * (leaf.ndim - ok.ndim)
    return ok.reshape(shape), nan.reshape(shape)


@compiled
def _stable(jacobian: Float[Array, "*rows n n"]) -> Bool[Array, "*rows"]:
    matrices = jacobian.reshape(-1, *jacobian.shape[-2:])
    return jax.vmap(is_stable)(matrices).reshape(jacobian.shape[:-2])


@compiled
def _sizes(field: _Row, t1, flats: Float[Array, "rows n"], args, row_args):
    """The natural sizes of the numbers of each row."""
    t1 = jnp.asarray(t1, flats.dtype)

    def of_row(flat, row):
        return natural_sizes(lambda y: field(t1, y, args, row), flat, t1)

    return jax.vmap(of_row)(flats, row_args)


@compiled
def _improved(field: _Row, limits, flats, settled_states, sizes, args, row_args):
    """Improve the settled states by Newton's method. Returns states, results and Jacobians."""
    of_row = functools.partial(_improved_row, field, limits, args)
    return jax.vmap(of_row)(flats, settled_states, sizes, row_args)


def _improved_row(field: _Row, limits, args, start, settled_state, size, row):
    (t1, rtol, atol), (y_settled, result) = limits, settled_state
    time = jnp.asarray(t1, y_settled.dtype)
    y_settled, start = (jnp.where(jnp.isfinite(y), y, 0.0) for y in (y_settled, start))

    def rates(y, inputs):
        f, *f_args = inputs
        return f(y, *f_args)

    # Only arrays are inputs: JAX compares the rest, and NaN differs from itself.
    arrays, others = eqx.partition(args, eqx.is_array)

    def rates_of(y, arrays, row):
        return field(time, y, eqx.combine(arrays, others), row)

    inputs = eqx.filter_closure_convert(rates_of, y_settled, arrays, row), arrays, row
    fixed = _fixed(inputs)
    root = find_root(lambda y: rates(y, fixed), y_settled, size, rtol, atol)
    # From a state that had not settled, Newton's method may run to any root.
    limit = atol + SETTLING_RTOL * jnp.abs(y_settled) + NOISE[y_settled.dtype] * size
    lost = ~root.close | jnp.any(jnp.abs(root.y - y_settled) > 10 * limit)
    lost = lost | (result == Result.MAX_STEPS_REACHED)
    code = jnp.where(lost, Result.NOT_STEADY.value, Result.SUCCESS.value)
    code = jnp.where(root.singular, Result.SINGULAR_MATRIX.value, code)
    solve_failed = (result != Result.SUCCESS) & (result != Result.MAX_STEPS_REACHED)
    code = jnp.where(solve_failed, result, code).astype(result.dtype)
    ok = code == Result.SUCCESS
    # A failed row takes the start, where the derivatives of `f` should be finite.
    y = implicit(rates, jnp.where(ok, root.y, start), ok, inputs)
    return field.unravel(y), code, jnp.where(ok, root.jacobian, jnp.nan)
