"""Levenberg-Marquardt within bounds, from several starts."""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxode._jax.closure import compiled
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.observed.tolerances import PARAMETER_TOLERANCE
from jaxode.estimation.search.objectives import LocalModel, Objective
from jaxode.training.budget import Budget

# Accept a step that brings at least this part of the decrease that the model expects, and lengthen
# one that brings almost all of it (Gould et al. 2005, doi:10.1007/s10288-005-0065-y).
ACCEPTED_PART = 0.01
LENGTHENED_PART = 0.99
# Multiply the radius by this after a step that brought almost all of the expected decrease.
RADIUS_GROWTH = 3.5
# Multiply the radius by this after a step that was rejected.
RADIUS_CUT = 0.25
# The default of `steps`, the largest number of steps on all observations.
MOST_STEPS = 200
# How many starts are rows of one solve.
STARTS_AT_ONCE = 8
# How many steps to take before the clock is read again.
STEPS_AT_ONCE = 10
# How often a step is solved again, with the parameters held that would leave by a bound.
BOUND_ROUNDS = 3
# A parameter between two bounds has a unit of at most their distance by this.
UNITS_BETWEEN_BOUNDS = 16.0
# Go this part of the way to the first bound that a step would cross.
SHORT_OF_BOUND = 0.995


def search_budget(steps: Any, seconds: Any, progress: Any, least_steps: int = 1) -> Budget:
    """The budget of a search, which counts from now on."""
    budget = Budget.from_arguments(
        steps, seconds, progress, default_steps=MOST_STEPS, least_steps=least_steps
    )
    budget.stopwatch.start()
    return budget


class Fits(NamedTuple):
    """The end of the search from each start."""

    flats: Float[np.ndarray, "starts n"]
    costs: Float[np.ndarray, " starts"]
    converged: Bool[np.ndarray, " starts"]
    residuals: Float[np.ndarray, "starts m"]
    information: Float[np.ndarray, "starts k n"]
    """A root of the Fisher information."""
    gradients: Float[np.ndarray, "starts n"]
    """The gradient of the cost."""


class _Point(NamedTuple):
    flat: Float[Array, " n"]
    quantities: Float[Array, " m"]
    jacobian: Float[Array, "m n"]
    cost: Float[Array, ""]


class _Search(NamedTuple):
    """How far the search from one start has come."""

    start: Float[Array, " n"]
    bounds: Bounds
    best: _Point
    trial: Float[Array, " n"]
    cut: Bool[Array, ""]
    """Whether a bound cut the step to the trial short."""
    expected: Float[Array, ""]
    """How the model expects the cost to change."""
    radius: Float[Array, ""]
    """The inverse of the damping."""
    hold: Float[Array, ""]
    """The weight of the distance from the start."""
    count: Int[Array, ""]
    """Evaluations so far."""
    done: Bool[Array, ""]
    converged: Bool[Array, ""]


def minimize(
    objective: Objective,
    flats: Float[np.ndarray, "starts n"],
    bounds: Bounds,
    steps: int,
    *,
    size: int = STARTS_AT_ONCE,
    hold: float = 0.0,
    budget: Budget | None = None,
    label: str = "",
) -> Fits:
    """Minimize an objective from each start, some at a time: one that ends is replaced by the next.

    Args:
        objective: what to minimize.
        flats: the starts, within the bounds.
        bounds: of the parameters, `[n]` or `[starts, n]`.
        steps: the largest number of steps from each start.
        size: how many starts at a time.
        hold: weighs the distance from the start, in units of its size or one and of the mean
            residual there, as further residuals, which the result does not count.
        budget: ends the search. Starts that have not begun then are only evaluated. Without a
            budget, Ctrl-C raises.
        label: of progress lines; empty for none.
    """
    guard = contextlib.nullcontext if budget is None else budget.until_interrupted
    rows = _Rows(objective, np.asarray(flats), bounds, size)
    fits: Any = [None] * len(flats)
    least_cost = np.inf
    while not rows.finished:
        rows.begin_next()
        over = budget is not None and budget.over
        limit = 1 if over else steps + 1  # the first step only evaluates
        points = None
        with guard():
            points = rows.advance(limit, hold)
        if points is None:  # Ctrl-C ended the budget: what has begun is evaluated as it is.
            continue
        for row, start in rows.release_ended(limit):
            fits[start] = Fits(*(values[row] for values in points))
            least_cost = min(least_cost, fits[start].costs)
        if budget is not None and label:
            cost = min(least_cost, points.costs[rows.busy].min(initial=np.inf))
            done = rows.begun - int(rows.busy.sum())
            budget.show(f"{label}: {done} of {len(fits)} starts, best cost {cost:.6g}")
    return Fits(*map(np.stack, zip(*fits, strict=True)))


class _Rows:
    """The rows of one solve. A row whose search ends takes the next start."""

    def __init__(self, objective: Objective, starts: np.ndarray, bounds: Bounds, size: int):
        self.objective, self.starts = objective, starts
        self.bounds = Bounds(*(np.broadcast_to(bound, starts.shape) for bound in bounds))
        self.searches = _ended_searches(objective, starts, self.bounds, size)
        self.start_of_row = np.full(size, -1)  # -1 for a row without a search
        self.begun = 0  # starts

    @property
    def busy(self) -> Bool[np.ndarray, " rows"]:
        """Which rows search."""
        return self.start_of_row >= 0

    @property
    def finished(self) -> bool:
        return self.begun == len(self.starts) and not self.busy.any()

    def begin_next(self) -> None:
        """Begin the next starts in the rows without a search."""
        searches = self.searches
        for row in np.flatnonzero(~self.busy)[: len(self.starts) - self.begun]:
            start = self.start_of_row[row] = self.begun
            self.begun += 1
            searches.start[row] = searches.trial[row] = self.starts[start]
            searches.bounds.lower[row] = self.bounds.lower[start]
            searches.bounds.upper[row] = self.bounds.upper[start]
            searches.radius[row], searches.count[row], searches.hold[row] = 1.0, 0, 0.0
            searches.done[row] = searches.converged[row] = False

    def advance(self, limit: int, hold: float) -> Fits:
        """Step until a row can take the next start, or all rows end, and return where they are."""
        enough = 1 if self.begun < len(self.starts) else len(self.start_of_row)
        limits = jnp.asarray([limit, enough])
        advanced = _advanced(self.objective, limits, jnp.asarray(hold), self.searches)
        self.searches, points = jax.tree.map(np.array, advanced)
        return Fits(*points)

    def release_ended(self, limit: int) -> list[tuple[int, int]]:
        """Free the rows whose search has ended. Returns each of them with its start."""
        ended = self.busy & (self.searches.done | (self.searches.count >= limit))
        pairs = [(int(row), int(self.start_of_row[row])) for row in np.flatnonzero(ended)]
        self.start_of_row[ended] = -1
        return pairs


def _ended_searches(objective: Objective, starts: np.ndarray, bounds: Bounds, size: int) -> Any:
    """Searches that are done, as NumPy arrays `[size, ...]` that starts are written to."""
    n, m, dtype = starts.shape[1], objective.count, starts.dtype
    flat: Any = np.zeros((size, n), dtype)
    zero: Any = np.zeros(size, dtype)
    no: Any = np.zeros(size, bool)
    values: Any = np.zeros((size, m), dtype)
    slopes: Any = np.zeros((size, m, n), dtype)
    point = _Point(flat, values, slopes, zero)
    bounds = Bounds(*(np.resize(bound, (size, n)) for bound in bounds))
    start: Any = np.resize(starts, (size, n))
    count: Any = np.zeros(size, int)
    searches = _Search(start, bounds, point, start, no, zero, zero + 1, zero, count, ~no, no)
    return jax.tree.map(np.array, searches)


@compiled
def _advanced(
    objective: Objective, limits: Int[Array, " 2"], hold: Float[Array, ""], searches: _Search
) -> tuple[_Search, tuple[Array, ...]]:
    """Step until `limits[1]` more rows end, at most `STEPS_AT_ONCE` steps. A row ends after
    `limits[0]` evaluations."""

    def active(searches):
        return ~searches.done & (searches.count < limits[0])

    ended = jnp.sum(~active(searches))

    def more(state):
        taken, searches = state
        left = active(searches)
        few = jnp.sum(~left) - ended < limits[1]
        return jnp.any(left) & few & (taken < STEPS_AT_ONCE)

    def step(state):
        taken, searches = state
        stepped = jax.vmap(lambda search: _stepped(objective, hold, search))(searches)
        left = active(searches)

        def pick(after, before):
            return jnp.where(left.reshape(-1, *[1] * (after.ndim - 1)), after, before)

        return taken + 1, jax.tree.map(pick, stepped, searches)

    _, searches = jax.lax.while_loop(more, step, (jnp.asarray(0), searches))
    return searches, jax.vmap(lambda search: _fit(objective, search))(searches)


def _stepped(objective: Objective, hold: Float[Array, ""], search: _Search) -> _Search:
    """Evaluate the trial, accept or reject it, and choose the next one."""
    start, best, first = search.start, search.best, search.count == 0
    unit = jnp.maximum(jnp.abs(start), 1.0)  # of each parameter, since the damping has none
    width = (search.bounds.upper - search.bounds.lower) / UNITS_BETWEEN_BOUNDS
    unit = jnp.where(width > 0, jnp.minimum(unit, width), unit)

    def twice(flat):
        quantities = objective.quantities(flat, start)
        return quantities, quantities

    jacobian, quantities = jax.jacfwd(twice, has_aux=True)(search.trial)
    plain = objective.local(search.trial, start, quantities, jacobian)
    mean = 0.5 * jnp.sum(plain.residuals**2) / objective.count
    mean = jnp.maximum(mean, objective.mean_floor)
    begun = hold * jnp.where(jnp.isfinite(mean), jnp.sqrt(mean), 0.0)
    weight = jnp.where(first, begun, search.hold)
    cost = _with_hold(plain, weight / unit, search.trial - start).cost
    better = cost - best.cost <= ACCEPTED_PART * search.expected
    accept = first | (better & (search.expected <= 0))
    end, converged = _has_ended(search, cost, accept)
    good = cost - best.cost <= LENGTHENED_PART * search.expected
    trial = _Point(search.trial, quantities, jacobian, cost)
    best = jax.tree.map(lambda after, before: jnp.where(accept, after, before), trial, best)
    factor = jnp.where(accept, jnp.where(good, RADIUS_GROWTH, 1.0), RADIUS_CUT)
    radius = search.radius * jnp.where(first, 1.0, factor)
    plain = objective.local(best.flat, start, best.quantities, best.jacobian)
    model = _with_hold(plain, weight / unit, best.flat - start)
    flat, cut = _next_trial(model, best.flat, search.bounds, unit, radius)
    expected = _expected(model, flat - best.flat)
    done = ~first & end | ~jnp.isfinite(best.cost)
    return _Search(
        start, search.bounds, best, flat, cut, expected, radius, weight, search.count + 1, done,
        converged & ~first,
    )  # fmt: skip


def _with_hold(
    model: LocalModel, weights: Float[Array, " n"], distance: Float[Array, " n"]
) -> LocalModel:
    """Add the distance from the start as further residuals."""
    residuals = jnp.concatenate([model.residuals, weights * distance])
    jacobian = jnp.concatenate([model.jacobian, jnp.diag(weights)])
    cost = model.cost + 0.5 * jnp.sum((weights * distance) ** 2)
    return LocalModel(cost, residuals, jacobian)


def _fit(objective: Objective, search: _Search) -> tuple[Array, ...]:
    """The fields of `Fits`."""
    flat, quantities, jacobian, _ = search.best
    model = objective.local(flat, search.start, quantities, jacobian)
    cost = jnp.where(jnp.isfinite(model.cost), model.cost, jnp.inf)
    information = objective.information(flat, search.start, quantities, jacobian)
    gradient = model.residuals @ model.jacobian
    return flat, cost, search.converged, model.residuals, information, gradient


def _has_ended(
    search: _Search, cost: Array, accept: Array
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the search ends, and whether it has converged.

    A step below the tolerance that no bound cut short ends the search. It has converged if there
    is little left to gain, too.
    """
    tolerance = PARAMETER_TOLERANCE[search.trial.dtype]
    floor, best = math.sqrt(tolerance) * tolerance, search.best
    step = jnp.abs(search.trial - best.flat)
    small = jnp.all(~search.cut & (step <= tolerance * jnp.abs(search.trial) + floor))
    gain = jnp.where(accept, best.cost - cost, -search.expected)
    little = gain <= tolerance * jnp.abs(best.cost) + floor
    return small & (little | ~accept), small & little


def _next_trial(
    model: LocalModel,
    flat: Float[Array, " n"],
    bounds: Bounds,
    unit: Float[Array, " n"],
    radius: Array,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """Take a damped step in variables that shrink near a bound, up to the first bound. Return the
    trial, and whether a bound cut the step short.

    A bound that lies downhill scales its variable from afar, so that steps do not meet it early
    (Coleman and Li 1996, doi:10.1137/0806023). Parameters at a bound that the step would leave by
    it are held.
    """
    lower, upper = bounds
    down, n = model.residuals @ model.jacobian, len(flat)
    room = jnp.where(down > 0, flat - lower, upper - flat)
    bounded = jnp.isfinite(room)
    scale = jnp.where(bounded, jnp.sqrt(unit * room), unit)
    push = jnp.sqrt(jnp.where(bounded, jnp.abs(down) * unit, 0.0))
    weights = jnp.concatenate(
        [jnp.diag(push), jnp.diag(jnp.ones(n, flat.dtype) / jnp.sqrt(radius))]
    )
    aim = jnp.concatenate([model.residuals, jnp.zeros(2 * n, flat.dtype)])

    def again(_, state):
        _, held = state
        movable = jnp.where(held, 0.0, model.jacobian * scale[None])
        matrix = jnp.concatenate([movable, weights])
        factor = jnp.linalg.qr(jnp.concatenate([matrix, aim[:, None]], axis=1), mode="r")
        step = scale * jax.scipy.linalg.solve_triangular(factor[:n, :n], -factor[:n, n])
        leaves = ((flat <= lower) & (step < 0)) | ((flat >= upper) & (step > 0))
        held = held | leaves
        return jnp.where(held, 0.0, step), held

    begin = jnp.zeros_like(flat), jnp.zeros(n, bool)
    step, _ = jax.lax.fori_loop(0, BOUND_ROUNDS, again, begin)
    # The part of the step up to the first bound.
    ahead = jnp.where(step < 0, flat - lower, upper - flat)
    part = jnp.min(jnp.where(step == 0, jnp.inf, ahead / jnp.abs(jnp.where(step == 0, 1.0, step))))
    step = jnp.where(part > 1, 1.0, SHORT_OF_BOUND * part) * step
    trial, close = flat + step, unit * PARAMETER_TOLERANCE[flat.dtype]
    trial = jnp.where((trial - lower <= close) & (step < 0), lower, trial)
    trial = jnp.where((upper - trial <= close) & (step > 0), upper, trial)
    return jnp.clip(trial, lower, upper), part <= 1


def _expected(model: LocalModel, step: Float[Array, " n"]) -> Float[Array, ""]:
    """How the model expects the cost to change by a step."""
    along = model.jacobian @ step
    return model.residuals @ along + 0.5 * jnp.sum(along**2)
