"""Levenberg-Marquardt within bounds, from several starts."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._jax.closure import compiled
from jaxode.estimation.objectives import Local, Objective

# The search ends when a step changes the parameters by less than this part.
PARAMETER_TOLERANCE = {jnp.dtype("float64"): 1e-6, jnp.dtype("float32"): 1e-3}
# Gould et al. (2005, doi:10.1007/s10288-005-0065-y): take steps that reach this part of what the
# model expects, and lengthen those that reach almost all of it.
ACCEPT, LENGTHEN = 0.01, 0.99
LONGER, SHORTER = 3.5, 0.25
BOUND_ROUNDS = 3  # how often a step is solved again, with parameters held at the bounds it met


class Box(NamedTuple):
    """Bounds of the parameters. Those whose bounds are equal stay."""

    low: Float[Array, "*starts n"]
    high: Float[Array, "*starts n"]


class Fits(NamedTuple):
    """The end of the search from each start."""

    flats: Float[Array, "starts n"]
    costs: Float[Array, " starts"]
    converged: Bool[Array, " starts"]
    residuals: Float[Array, "starts m"]
    information: Float[Array, "starts k n"]
    """A root of the Fisher information."""


class _Point(NamedTuple):
    flat: Float[Array, " n"]
    quantities: Float[Array, " m"]
    jacobian: Float[Array, "m n"]
    cost: Float[Array, ""]


class _State(NamedTuple):
    best: _Point
    trial: Float[Array, " n"]
    expected: Float[Array, ""]
    """How the model expects the cost to change."""
    radius: Float[Array, ""]
    """The inverse of the damping."""
    count: Int[Array, ""]
    done: Bool[Array, ""]
    converged: Bool[Array, ""]


@compiled
def costs_at(objective: Objective, flats: Float[Array, "starts n"]) -> tuple[Array, Array]:
    """The cost at each start, infinite where it cannot be solved; and half the squares of the
    residuals."""

    def one(flat):
        quantities = objective.quantities(flat, flat)
        nothing = jnp.zeros((len(quantities), len(flat)), flat.dtype)
        local = objective.local(flat, flat, quantities, nothing)
        return local.cost, 0.5 * jnp.sum(local.residuals**2)

    costs, squares = jax.vmap(one)(flats)
    return jnp.where(jnp.isfinite(costs), costs, jnp.inf), squares


def minimize(
    objective: Objective,
    flats: Float[Array, "starts n"],
    box: Box,
    steps: int,
    hold: Float[Array, " starts"],
) -> Fits:
    """Minimize an objective from each start.

    Args:
        objective: what to minimize.
        flats: the starts, within the bounds.
        box: bounds of the parameters, `[n]` or `[starts, n]`.
        steps: the largest number of steps. The first only evaluates the start.
        hold: weighs the distance from the start, in units of its size or one, as further residuals,
            which the result does not count.
    """
    box = Box(*(jnp.broadcast_to(bound, flats.shape) for bound in box))
    # One program, whatever the number of steps.
    return _minimize(objective, jnp.asarray(steps), flats, box, hold)


@compiled
def _minimize(objective: Objective, steps: Int[Array, ""], *of_starts: Any) -> Fits:
    return jax.vmap(lambda *of_start: _improved(objective, steps, *of_start))(*of_starts)


def _improved(
    objective: Objective,
    steps: Int[Array, ""],
    start: Float[Array, " n"],
    box: Box,
    hold: Float[Array, ""],
) -> Fits:
    unit = jnp.maximum(jnp.abs(start), 1.0)  # of each parameter, since the damping has none
    held = jnp.diag(hold / unit)

    def evaluated(flat):
        twice = lambda flat: (objective.quantities(flat, start),) * 2
        jacobian, quantities = jax.jacfwd(twice, has_aux=True)(flat)
        return _Point(flat, quantities, jacobian, local(flat, quantities, jacobian).cost)

    def local(flat, quantities, jacobian):
        found = objective.local(flat, start, quantities, jacobian)
        residuals = jnp.concatenate([found.residuals, held @ (flat - start)])
        cost = found.cost + 0.5 * jnp.sum((held @ (flat - start)) ** 2)
        return Local(cost, residuals, jnp.concatenate([found.jacobian, held]))

    def step(state: _State) -> _State:
        point, first = evaluated(state.trial), state.count == 0
        better = point.cost - state.best.cost <= ACCEPT * state.expected
        accept = first | (better & (state.expected <= 0))
        end, converged = _ends(state, point.cost, accept)
        best = jax.tree.map(lambda new, old: jnp.where(accept, new, old), point, state.best)
        good = point.cost - state.best.cost <= LENGTHEN * state.expected
        scale = jnp.where(first, 1.0, jnp.where(accept, jnp.where(good, LONGER, 1.0), SHORTER))
        radius = state.radius * scale
        near = local(*best[:3])
        trial = _trial(near, best.flat, box, unit * jnp.sqrt(radius))
        expected = _expected(near, trial - best.flat)
        done = ~first & end | ~jnp.isfinite(best.cost)
        return _State(best, trial, expected, radius, state.count + 1, done, converged & ~first)

    shapes = jax.eval_shape(evaluated, start)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    zero, no = jnp.zeros((), start.dtype), jnp.asarray(False)
    begin = _State(nothing, start, zero, zero + 1, jnp.asarray(0), no, no)
    more = lambda state: ~state.done & (state.count < steps)
    end = jax.lax.while_loop(more, step, begin)
    of_end = objective.local(end.best.flat, start, *end.best[1:3])
    cost = jnp.where(jnp.isfinite(of_end.cost), of_end.cost, jnp.inf)
    information = objective.information(end.best.flat, start, *end.best[1:3])
    return Fits(end.best.flat, cost, end.converged, of_end.residuals, information)


def _ends(state: _State, cost: Array, accept: Array) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the steps are below the tolerance, and whether they are so since nothing is left to
    gain."""
    tolerance = PARAMETER_TOLERANCE[state.trial.dtype]
    floor, old = math.sqrt(tolerance) * tolerance, state.best
    near = jnp.abs(state.trial - old.flat) <= tolerance * jnp.abs(state.trial) + floor
    gain = jnp.where(accept, old.cost - cost, -state.expected)
    little = gain <= tolerance * jnp.abs(old.cost) + floor
    small = jnp.all(near)
    return small & (little | ~accept), small & little


def _trial(
    near: Local, flat: Float[Array, " n"], box: Box, lengths: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Take a damped step within the bounds. What they stop is held there, and what is left is
    solved again."""
    down, n = near.residuals @ near.jacobian, len(flat)
    stopped = ((flat <= box.low) & (down >= 0)) | ((flat >= box.high) & (down <= 0))
    damping = jnp.diag(1 / lengths)

    def again(_, found):
        step, stopped = found
        free = jnp.where(stopped, 0.0, near.jacobian)
        target = near.residuals + near.jacobian @ jnp.where(stopped, step, 0.0)
        rows = jnp.concatenate([free, damping])
        aim = jnp.concatenate([target, jnp.zeros(n, flat.dtype)])
        upper = jnp.linalg.qr(jnp.concatenate([rows, aim[:, None]], axis=1), mode="r")
        solved = jax.scipy.linalg.solve_triangular(upper[:n, :n], -upper[:n, n])
        step = jnp.where(stopped, step, solved)
        inside = jnp.clip(flat + step, box.low, box.high)
        return inside - flat, stopped | (inside != flat + step)

    step, _ = jax.lax.fori_loop(0, BOUND_ROUNDS, again, (jnp.zeros_like(flat), stopped))
    return jnp.clip(flat + step, box.low, box.high)


def _expected(near: Local, step: Float[Array, " n"]) -> Float[Array, ""]:
    along = near.jacobian @ step
    return near.residuals @ along + 0.5 * jnp.sum(along**2)
