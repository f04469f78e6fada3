"""Levenberg-Marquardt within bounds, from several starts."""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxode._jax.closure import compiled
from jaxode.estimation.search.budget import Budget
from jaxode.estimation.search.objectives import Local, Objective

# The search ends when a step changes the parameters by less than this part, unless a bound cut it.
PARAMETER_TOLERANCE = {jnp.dtype("float64"): 1e-6, jnp.dtype("float32"): 1e-3}
# Gould et al. (2005, doi:10.1007/s10288-005-0065-y): take steps that reach this part of what the
# model expects, and lengthen those that reach almost all of it.
ACCEPT, LENGTHEN = 0.01, 0.99
LONGER, SHORTER = 3.5, 0.25
STARTS_AT_ONCE = 8  # the rows of one solve
STEPS_AT_ONCE = 10  # before the clock is read
BOUND_ROUNDS = 3  # how often a step is solved again, with parameters held that leave by a bound
UNITS_OF_BOX = 16.0  # between the bounds of a parameter, at least
SHORT_OF_BOUND = 0.995  # how far a step goes to the first bound


class Box(NamedTuple):
    """Bounds of the parameters. Those whose bounds are equal stay."""

    low: Float[Array | np.ndarray, "*starts n"]
    high: Float[Array | np.ndarray, "*starts n"]

    @property
    def free(self) -> Bool[np.ndarray, "*starts n"]:
        """Which parameters are estimated."""
        return np.asarray(self.low) < np.asarray(self.high)


class Fits(NamedTuple):
    """The end of the search from each start."""

    flats: Float[np.ndarray, "starts n"]
    costs: Float[np.ndarray, " starts"]
    converged: Bool[np.ndarray, " starts"]
    residuals: Float[np.ndarray, "starts m"]
    information: Float[np.ndarray, "starts k n"]
    """A root of the Fisher information."""
    gradients: Float[np.ndarray, "starts n"]
    """Of the cost."""


class _Point(NamedTuple):
    flat: Float[Array, " n"]
    quantities: Float[Array, " m"]
    jacobian: Float[Array, "m n"]
    cost: Float[Array, ""]


class _Row(NamedTuple):
    """How far the search from one start has come."""

    start: Float[Array, " n"]
    box: Box
    best: _Point
    trial: Float[Array, " n"]
    cut: Bool[Array, ""]
    """Whether a bound cut the step to it short."""
    expected: Float[Array, ""]
    """How the model expects the cost to change."""
    radius: Float[Array, ""]
    """The inverse of the damping."""
    hold: Float[Array, ""]
    """Weighs the distance from the start."""
    count: Int[Array, ""]
    done: Bool[Array, ""]
    converged: Bool[Array, ""]


def minimize(
    objective: Objective,
    flats: Float[np.ndarray, "starts n"],
    box: Box,
    steps: int,
    *,
    size: int = STARTS_AT_ONCE,
    hold: float = 0.0,
    budget: Budget | None = None,
    part: str = "",
) -> Fits:
    """Minimize an objective from each start, some at a time: one that ends is replaced by the next.

    Args:
        objective: what to minimize.
        flats: the starts, within the bounds.
        box: bounds of the parameters, `[n]` or `[starts, n]`.
        steps: the largest number of steps from each.
        size: how many starts at a time.
        hold: weighs the distance from the start, in units of its size or one and of the mean
            residual there, as further residuals, which the result does not count.
        budget: ends the search. What has not begun is only evaluated. Without one, Ctrl-C raises.
        part: the name of the search in lines of progress, of which an empty one has none.
    """
    guard = contextlib.nullcontext if budget is None else budget.until_stopped
    starts, bounds = np.asarray(flats), [np.broadcast_to(bound, flats.shape) for bound in box]
    rows, of_row, begun = _blank(objective, starts, Box(*bounds), size), np.full(size, -1), 0
    fits: Any = None
    found: Any = None
    while begun < len(starts) or (of_row >= 0).any():
        for i in np.flatnonzero(of_row < 0)[: len(starts) - begun]:
            of_row[i], begun = begun, begun + 1
            _begin(rows, i, starts[of_row[i]], [bound[of_row[i]] for bound in bounds])
        over = budget is not None and budget.over
        limit = 1 if over else steps + 1  # the first step only evaluates
        enough = 1 if begun < len(starts) else size
        with guard():
            after = _advanced(objective, jnp.asarray([limit, enough]), jnp.asarray(hold), rows)
            after = jax.tree.map(np.array, after)
            rows, fits = after[0], Fits(*after[1])
        if fits is None:
            continue
        if found is None:
            found = Fits(*(np.zeros((len(starts), *x.shape[1:]), x.dtype) for x in fits))
            found.costs[:] = np.inf
        ended = np.flatnonzero((of_row >= 0) & (rows.done | (rows.count >= limit)))
        for of_all, of_rows in zip(found, fits, strict=True):
            of_all[of_row[ended]] = of_rows[ended]
        of_row[ended] = -1
        best = min(found.costs.min(), fits.costs[of_row >= 0].min(initial=np.inf))
        if budget is not None and part:
            budget.show(part, begun - int((of_row >= 0).sum()), len(starts), float(best))
    return found


def _blank(objective: Objective, starts: np.ndarray, box: Box, size: int) -> Any:
    """Rows that are at their end."""
    n, m, dtype = starts.shape[1], objective.count, starts.dtype
    flat: Any = np.zeros((size, n), dtype)
    zero: Any = np.zeros(size, dtype)
    no: Any = np.zeros(size, bool)
    values: Any = np.zeros((size, m), dtype)
    slopes: Any = np.zeros((size, m, n), dtype)
    point = _Point(flat, values, slopes, zero)
    ends = Box(*(np.resize(bound, (size, n)) for bound in box))
    start: Any = np.resize(starts, (size, n))
    count: Any = np.zeros(size, int)
    found = _Row(start, ends, point, start, no, zero, zero + 1, zero, count, ~no, no)
    return jax.tree.map(np.array, found)


def _begin(rows: Any, i: int, start: np.ndarray, bounds: list[np.ndarray]) -> None:
    """Put a start in place of row `i`."""
    for into, of in zip((rows.start, rows.trial, *rows.box), (start, start, *bounds), strict=True):
        into[i] = of
    rows.radius[i], rows.count[i], rows.hold[i] = 1.0, 0, 0.0
    rows.done[i] = rows.converged[i] = False


@compiled
def _advanced(
    objective: Objective, limits: Int[Array, " 2"], hold: Float[Array, ""], rows: _Row
) -> tuple[_Row, tuple[Array, ...]]:
    """Step until so many more rows end, and no more than `STEPS_AT_ONCE`. The limits are those of
    steps in all and of rows."""

    def active(rows):
        return ~rows.done & (rows.count < limits[0])

    ended = jnp.sum(~active(rows))

    def more(state):
        taken, rows = state
        left = active(rows)
        few = jnp.sum(~left) - ended < limits[1]
        return jnp.any(left) & few & (taken < STEPS_AT_ONCE)

    def step(state):
        taken, rows = state
        moved, left = jax.vmap(lambda row: _moved(objective, hold, row))(rows), active(rows)

        def pick(new, old):
            return jnp.where(left.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return taken + 1, jax.tree.map(pick, moved, rows)

    _, rows = jax.lax.while_loop(more, step, (jnp.asarray(0), rows))
    return rows, jax.vmap(lambda row: _fit(objective, row))(rows)


def _moved(objective: Objective, hold: Float[Array, ""], row: _Row) -> _Row:
    """Evaluate the trial, and choose the next."""
    start, old, first = row.start, row.best, row.count == 0
    unit = jnp.maximum(jnp.abs(start), 1.0)  # of each parameter, since the damping has none
    wide = (row.box.high - row.box.low) / UNITS_OF_BOX
    unit = jnp.where(wide > 0, jnp.minimum(unit, wide), unit)

    def twice(flat):
        quantities = objective.quantities(flat, start)
        return quantities, quantities

    jacobian, quantities = jax.jacfwd(twice, has_aux=True)(row.trial)
    plain = objective.local(row.trial, start, quantities, jacobian)
    mean = 0.5 * jnp.sum(plain.residuals**2) / objective.count
    mean = jnp.maximum(mean, objective.least_mean)
    begun = hold * jnp.where(jnp.isfinite(mean), jnp.sqrt(mean), 0.0)
    weight = jnp.where(first, begun, row.hold)
    of_trial = _with_hold(plain, weight / unit, row.trial - start)
    better = of_trial.cost - old.cost <= ACCEPT * row.expected
    accept = first | (better & (row.expected <= 0))
    end, converged = _ends(row, of_trial.cost, accept)
    point = _Point(row.trial, quantities, jacobian, of_trial.cost)
    best = jax.tree.map(lambda new, old: jnp.where(accept, new, old), point, old)
    good = of_trial.cost - old.cost <= LENGTHEN * row.expected
    scale = jnp.where(first, 1.0, jnp.where(accept, jnp.where(good, LONGER, 1.0), SHORTER))
    radius = row.radius * scale
    plain = objective.local(best.flat, start, best.quantities, best.jacobian)
    near = _with_hold(plain, weight / unit, best.flat - start)
    trial, cut = _trial(near, best.flat, row.box, unit, radius)
    expected = _expected(near, trial - best.flat)
    done = ~first & end | ~jnp.isfinite(best.cost)
    return _Row(
        start, row.box, best, trial, cut, expected, radius, weight, row.count + 1, done,
        converged & ~first,
    )  # fmt: skip


def _with_hold(near: Local, weights: Float[Array, " n"], apart: Float[Array, " n"]) -> Local:
    """Count the distance from the start, too."""
    residuals = jnp.concatenate([near.residuals, weights * apart])
    jacobian = jnp.concatenate([near.jacobian, jnp.diag(weights)])
    return Local(near.cost + 0.5 * jnp.sum((weights * apart) ** 2), residuals, jacobian)


def _fit(objective: Objective, row: _Row) -> tuple[Array, ...]:
    """The fields of `Fits`."""
    flat, quantities, jacobian, _ = row.best
    found = objective.local(flat, row.start, quantities, jacobian)
    cost = jnp.where(jnp.isfinite(found.cost), found.cost, jnp.inf)
    information = objective.information(flat, row.start, quantities, jacobian)
    gradient = found.residuals @ found.jacobian
    return flat, cost, row.converged, found.residuals, information, gradient


def _ends(row: _Row, cost: Array, accept: Array) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the search ends, and whether it has converged. A step below the tolerance ends it,
    unless a bound cut it short; it has converged if nothing is left to gain, too."""
    tolerance = PARAMETER_TOLERANCE[row.trial.dtype]
    floor, old = math.sqrt(tolerance) * tolerance, row.best
    near = ~row.cut & (jnp.abs(row.trial - old.flat) <= tolerance * jnp.abs(row.trial) + floor)
    gain = jnp.where(accept, old.cost - cost, -row.expected)
    little = gain <= tolerance * jnp.abs(old.cost) + floor
    small = jnp.all(near)
    return small & (little | ~accept), small & little


def _trial(
    near: Local, flat: Float[Array, " n"], box: Box, unit: Float[Array, " n"], radius: Array
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """Take a damped step in variables that shrink near a bound, up to the first bound. Return the
    trial, and whether a bound cut the step short.

    Bounds on the way downhill count from afar, so that none is met early (Coleman and Li 1996,
    doi:10.1137/0806023). Parameters at a bound that the step would leave by it are held.
    """
    down, n = near.residuals @ near.jacobian, len(flat)
    room = jnp.where(down > 0, flat - box.low, box.high - flat)
    bounded = jnp.isfinite(room)
    scale = jnp.where(bounded, jnp.sqrt(unit * room), unit)
    push = jnp.sqrt(jnp.where(bounded, jnp.abs(down) * unit, 0.0))
    weights = jnp.concatenate(
        [jnp.diag(push), jnp.diag(jnp.ones(n, flat.dtype) / jnp.sqrt(radius))]
    )
    aim = jnp.concatenate([near.residuals, jnp.zeros(2 * n, flat.dtype)])

    def again(_, found):
        _, held = found
        free = jnp.where(held, 0.0, near.jacobian * scale[None])
        rows = jnp.concatenate([free, weights])
        upper = jnp.linalg.qr(jnp.concatenate([rows, aim[:, None]], axis=1), mode="r")
        step = scale * jax.scipy.linalg.solve_triangular(upper[:n, :n], -upper[:n, n])
        leaves = ((flat <= box.low) & (step < 0)) | ((flat >= box.high) & (step > 0))
        held = held | leaves
        return jnp.where(held, 0.0, step), held

    begin = jnp.zeros_like(flat), jnp.zeros(n, bool)
    step, _ = jax.lax.fori_loop(0, BOUND_ROUNDS, again, begin)
    # Of each parameter, the part of its step up to the bound.
    ahead = jnp.where(step < 0, flat - box.low, box.high - flat)
    part = jnp.min(jnp.where(step == 0, jnp.inf, ahead / jnp.abs(jnp.where(step == 0, 1.0, step))))
    step = jnp.where(part > 1, 1.0, SHORT_OF_BOUND * part) * step
    trial, close = flat + step, unit * PARAMETER_TOLERANCE[flat.dtype]
    trial = jnp.where((trial - box.low <= close) & (step < 0), box.low, trial)
    trial = jnp.where((box.high - trial <= close) & (step > 0), box.high, trial)
    return jnp.clip(trial, box.low, box.high), part <= 1


def _expected(near: Local, step: Float[Array, " n"]) -> Float[Array, ""]:
    along = near.jacobian @ step
    return near.residuals @ along + 0.5 * jnp.sum(along**2)
