"""Looks behind a gradient, at the work that its backward solve does."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode.ode.adjoints import BacksolveAdjoint, InterpolatingAdjoint
from jaxode.ode.loop.tableau import is_explicit
from jaxode.ode.results import Solution, Stats
from jaxode.ode.solve import DEFAULTS, Problem, Unconditional, VectorField, pose, solve
from jaxode.ode.validation import Time


def backward_stats(
    f: VectorField,
    y0: PyTree[Float[Array, "..."]],
    t0: Time,
    t1: Time,
    args: PyTree = None,
    *,
    adjoint: BacksolveAdjoint | InterpolatingAdjoint,
    loss: Callable[[Solution], Float[Array, ""]] | None = None,
    **solve_options: Any,
) -> Stats:
    """The work of the backward solve behind a gradient, for debugging and for choosing tolerances.

    A gradient cannot return anything beside itself, so this runs the forward solve and the adjoint
    solve and returns what the second one did.

    Args:
        f, y0, t0, t1, args: as for `solve`.
        adjoint: a gradient method with a backward solve.
        loss: the function of the `Solution` whose gradient is meant; by default the sum of its end
            state. The adjoint solve starts from its gradient, which the step sizes depend on.
        **solve_options: as for `solve`.

    Returns:
        `Stats` of the adjoint solve. `num_evals` counts evaluations of its right-hand side, each a
        `jax.vjp` of `f`; those that recompute the trajectory are not among them.

    Raises:
        TypeError: if the gradient method has no backward solve.
        ValueError: if the solver is implicit.
        TypeError, ValueError, SolveError: as `solve`.
    """
    where = "backward_stats"
    if not isinstance(adjoint, BacksolveAdjoint | InterpolatingAdjoint):
        raise TypeError(
            f"{where}(adjoint=...): must have a backward solve; got {adjoint!r}. Use "
            "jaxode.BacksolveAdjoint() or jaxode.InterpolatingAdjoint()."
        )
    options = {**DEFAULTS, "adjoint": adjoint, **solve_options}
    solver = options["solver"]
    if isinstance(solver, diffrax.AbstractSolver) and not is_explicit(solver):
        raise ValueError(
            f"{where}(solver=...): must be an explicit Runge-Kutta solver; got "
            f"{type(solver).__name__}, whose backward solve runs in diffrax. Use diffrax.Tsit5()."
        )
    solution = solve(f, y0, t0, t1, args, **options)
    states = solution.y1, solution.ys

    def total(states):
        y1, ys = states
        if loss is None:
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(y1))
        replaced = dataclasses.replace(solution, y1=y1, ys=ys)
        return loss(replaced)

    y1_bar, ys_bar = jax.grad(total)(states)
    one_row = lambda y: jax.tree.map(lambda x: jnp.asarray(x)[None], y)
    problem, ravel = pose(
        where, Unconditional(f), one_row(y0), t0, t1, args, None, None, options, False
    )
    ys_bar = None if ys_bar is None else jax.vmap(lambda y: ravel(one_row(y)))(ys_bar)
    stats = _backward_stats(adjoint, problem, ravel(one_row(y1_bar)), ys_bar)
    return jax.tree.map(lambda x: x[0], stats)


@eqx.filter_jit
def _backward_stats(adjoint, problem: Problem, y1_bar, ys_bar) -> Stats:
    return adjoint.backward_stats(*problem, y1_bar, ys_bar)
