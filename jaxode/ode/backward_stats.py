"""The work of the backward solve behind a gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import Time, check_state
from jaxode._checks.caller import arg, public
from jaxode._jax.closure import compiled
from jaxode.ode.adjoints import BacksolveAdjoint, InterpolatingAdjoint
from jaxode.ode.adjoints.base import Solved
from jaxode.ode.field import VectorField
from jaxode.ode.loop.stats import Stats
from jaxode.ode.options import SolveOptions
from jaxode.ode.solution import Solution
from jaxode.ode.solve import UserField, solve_checked
from jaxode.ode.system import System, make_system, pose


@public("backward_stats")
def backward_stats(
    f: VectorField,
    y0: PyTree[Float[Array, "..."]],
    t0: Time,
    t1: Time,
    args: PyTree = None,
    *,
    adjoint: BacksolveAdjoint | InterpolatingAdjoint,
    loss: Callable[[Solution], Float[Array, ""]] | None = None,
    ts: Float[Array, " times"] | None = None,
    **solve_options: Any,
) -> Stats:
    """Count the work of the backward solve behind a gradient, to debug it or to choose tolerances.

    A gradient cannot return statistics, so this function runs the forward solve and the adjoint
    solve, and returns the statistics of the latter.

    Args:
        f, y0, t0, t1, args: as for `solve`.
        adjoint: a gradient method with a backward solve.
        loss: the scalar function of the `Solution` that is differentiated; by default the sum of
            the end state. The adjoint solve starts from its gradient, so the step sizes depend on
            it.
        ts, **solve_options: as for `solve`.

    Returns:
        `Stats` of the adjoint solve. `num_evals` counts evaluations of its right-hand side, each a
        `jax.vjp` of `f`, and leaves out evaluations that recompute the trajectory.

    Raises:
        TypeError: if the gradient method has no backward solve.
        ValueError: if the solver is implicit.
        TypeError, ValueError, SolveError: as `solve`.
    """
    if not getattr(adjoint, "solves_backwards", False):
        raise TypeError(
            f"{arg('adjoint')} must have a backward solve; got {adjoint!r}. Use "
            "jaxode.BacksolveAdjoint() or jaxode.InterpolatingAdjoint()."
        )
    options = SolveOptions.make(adjoint=adjoint, **solve_options)
    if options.implicit:
        raise ValueError(
            f"{arg('solver')} must be an explicit Runge-Kutta solver; got "
            f"{type(options.solver).__name__}. Use diffrax.Tsit5()."
        )
    y0 = check_state("y0", y0)
    solution = solve_checked(f, y0, (t0, t1), args, options, ts=ts, throw=True)

    def total(states):
        y1, ys = states
        if loss is None:
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(y1))
        return loss(dataclasses.replace(solution, y1=y1, ys=ys))

    bars = jax.grad(total)((solution.y1, solution.ys))
    system = make_system(UserField(f), y0, (t0, t1), args, options, ts=ts)
    return _backward_stats(system, *bars)


@compiled
def _backward_stats(system: System, y1_bar: PyTree, ys_bar: PyTree) -> Stats:
    problem, stepper, ravel = pose(system)
    row = lambda y: ravel(jax.tree.map(lambda x: jnp.asarray(x)[None], y))
    ys_bar = None if ys_bar is None else jax.vmap(row)(ys_bar)
    recorded = system.adjoint.record(problem, stepper)
    bar = recorded[0]._replace(y1=row(y1_bar), ys=ys_bar)
    perturbed = jax.tree.map(eqx.is_inexact_array, problem)
    none = jnp.zeros(problem.t0.shape, bool)
    solved = Solved.of(problem, perturbed, stepper, recorded, none)
    progress = system.adjoint.solve_back(solved, bar).progress
    return jax.tree.map(lambda x: x[0], progress.stats(stepper.tableau.stages))
