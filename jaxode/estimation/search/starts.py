"""The search from many starts, on more and more of the observations."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.caller import arg
from jaxode._checks.errors import SolveError
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.search.budget import Budget
from jaxode.estimation.search.levenberg_marquardt import STARTS_AT_ONCE, Box, Fits, minimize
from jaxode.estimation.search.objectives import of_observations

# Drop the worse run of a start above this many times the least cost, except the best eight; or
# above it by so many nats an observation where the cost is a density, which has no least value.
GIVE_UP_FACTOR, GIVE_UP_NATS = 10.0, 10.0
# Fit the observations up to these parts of their times, one part after the other.
PARTS_OF_TIMES = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0
# Until all observations are fitted, weigh the distance from a start by this much of its residuals.
HOLD_WEIGHT = 0.1
STEPS_OF_PART = 50
SAME_END = 1e-3  # merge ends whose parameters and costs differ by less than this part


class Runs(NamedTuple):
    """Parameters that are improved side by side."""

    flats: Float[np.ndarray, "runs n"]
    of_start: Int[np.ndarray, "starts ways"]
    """The runs of each start, or -1."""

    def with_ways(
        self, flats: Float[np.ndarray, "starts n"], some: Bool[np.ndarray, " starts"]
    ) -> "Runs":
        """With a further run of some starts."""
        more = np.where(some, len(self.flats) + np.cumsum(some) - 1, -1)
        of_start = np.concatenate([self.of_start, more[:, None]], axis=1)
        return Runs(np.concatenate([self.flats, flats[some]]), of_start)

    def best(self, costs: Float[np.ndarray, " runs"]) -> Float[np.ndarray, " starts"]:
        """The least cost of the runs of each start."""
        return np.min(np.append(costs, np.inf)[self.of_start], axis=1)


class Ends(NamedTuple):
    """The state of the runs."""

    runs: Runs
    costs: Float[np.ndarray, " runs"]
    converged: Bool[np.ndarray, " runs"]
    residuals: Float[np.ndarray, "runs m"]
    information: Float[np.ndarray, "runs k n"]
    """A root of the Fisher information."""
    gradients: Float[np.ndarray, "runs n"]
    """Of the cost."""


def with_matched(
    problem: ObservedODE,
    starts: np.ndarray,
    box: Box,
    size: int,
    budget: Budget,
    ends: np.ndarray,
    costs: np.ndarray,
) -> Runs:
    """Collect the ends of gradient matching, and the starts that cost little at first."""
    count = len(starts)
    matched = _distinct(Runs(ends, np.arange(count)[:, None]), costs, 0.0)
    matches = len(matched.flats)  # at least one
    together = np.concatenate([matched.flats, starts])
    of_all = _costs_at(problem, _end(problem, 0), together, box, size, budget)
    near = np.flatnonzero(of_all[matches:] <= _limit(of_all.min(), _slack(problem)))
    place = np.full(count, -1)
    place[near] = matches + np.arange(len(near))
    flats = np.concatenate([matched.flats, starts[near]])
    return Runs(flats, np.concatenate([matched.of_start, place[:, None]], axis=1))


def _costs_at(
    problem: ObservedODE,
    end: Array,
    flats: Float[np.ndarray, "runs n"],
    box: Box,
    size: int,
    budget: Budget,
) -> Float[np.ndarray, " runs"]:
    """The costs of the observations up to a time, by the program of the search."""
    return minimize(of_observations(problem, end), flats, box, 0, size=size, budget=budget).costs


def _end(problem: ObservedODE, number: int) -> Array:
    """The last time of a part of the observations, which are more than the parameters."""
    ts, ys = (np.asarray(part) for part in (problem.ts, problem.ys))
    times, at = np.unique(ts, return_inverse=True)
    seen = (~np.isnan(ys)).reshape(ts.size, -1).sum(axis=1)
    so_far = np.cumsum(np.bincount(at.ravel(), seen))
    first = np.searchsorted(so_far, len(ravel_pytree(problem.template)[0]), side="right")
    last = math.ceil(PARTS_OF_TIMES[min(number, len(PARTS_OF_TIMES) - 1)] * len(times)) - 1
    return jnp.asarray(times[min(max(last, first), len(times) - 1)], ts.dtype)


def improved(
    problem: ObservedODE,
    runs: Runs,
    box: Box,
    size: int,
    budget: Budget,
    starts: Float[np.ndarray, "starts n"],
    matched: bool,
) -> Ends:
    """Improve runs, `size` at a time, on more and more observations.

    On all of them, each start gets a further run from where it began; if slopes were `matched` and
    the budget lasts, only those that went astray, or ended above their start. If no run can be
    solved for a part, since the part before misled them, all begin there again.
    """

    def fitted(flats, end, whole):
        return minimize(
            of_observations(problem, end), flats, box,
            budget.steps if whole else min(budget.steps, STEPS_OF_PART), size=size,
            hold=HOLD_WEIGHT if end < jnp.max(problem.ts) else 0.0, budget=budget,
            part=f"estimate: observations up to {float(end):.4g}",
        )  # fmt: skip

    with_starts = False
    for number in range(len(PARTS_OF_TIMES)):
        end, whole = _end(problem, number), number == len(PARTS_OF_TIMES) - 1
        if budget.over and not whole:
            continue
        if whole and not with_starts:
            moved = np.any(runs.flats[runs.of_start[:, 0]] != starts, axis=1)
            runs = runs.with_ways(starts, moved)
        fits = fitted(runs.flats, end, whole)
        costs = runs.best(fits.costs)
        again = np.full(len(costs), np.isinf(costs).all())
        if with_starts and whole and (alone := runs.of_start[:, -1] < 0).any():
            of_starts = _costs_at(problem, end, starts[alone], box, size, budget)
            again[alone] = of_starts < costs[alone]
        if again.any():
            runs = runs.with_ways(starts, again)
            more = fitted(starts[again], end, whole)
            fits = Fits(*(np.concatenate(pair) for pair in zip(fits, more, strict=True)))
        if not np.isfinite(fits.costs).any():
            raise SolveError(
                f"{arg('starts')} none could be solved up to t = {float(end):g}. From one of "
                f"them, {_cause(problem, end, starts[0])}"
            )
        runs = runs._replace(flats=fits.flats)
        if whole:
            break
        kept = _distinct(runs, fits.costs, _slack(problem))
        if number == len(PARTS_OF_TIMES) - 2:
            some, with_starts = np.full(len(starts), True), True
            if matched:
                of_starts = _costs_at(problem, end, starts, box, size, budget)
                some = _astray(problem, runs.best(fits.costs), of_starts)
            kept = kept.with_ways(starts, some)
        runs = kept
    budget.finish()
    return Ends(runs, *fits[1:])


def _astray(
    problem: ObservedODE, costs: Float[np.ndarray, " starts"], of_starts: np.ndarray
) -> Bool[np.ndarray, " starts"]:
    """Whether the best run of each start costs far more than that of another, or than the start."""
    return costs > _limit(np.minimum(costs.min(), of_starts), _slack(problem))


def ends_of_starts(ends: Ends) -> tuple[np.ndarray, np.ndarray]:
    """Where each start ended on the better of its ways, and the costs there."""
    flats, of_start = ends.runs
    run = of_start[np.arange(len(of_start)), _ways(ends.runs, ends.costs)]
    given_up = np.full((1, flats.shape[1]), np.nan)
    return np.concatenate([flats, given_up])[run], np.append(ends.costs, np.inf)[run]


def _ways(runs: Runs, costs: np.ndarray) -> Int[np.ndarray, " starts"]:
    """The better way of each start."""
    return np.argmin(np.append(costs, np.inf)[runs.of_start], axis=1)


def _cause(problem: ObservedODE, end: Array, start: np.ndarray) -> str:
    """Why the residuals at a start are not finite."""
    flat = jnp.asarray(start)
    params = problem.unravel(flat)
    try:
        predicted = problem.predicted(params, end, throw=True)
    except SolveError as error:
        return str(error).removeprefix("solve: ")
    noise = problem.noise_at(params)
    if not bool(jnp.all((noise > 0) & jnp.isfinite(noise))):
        return f"noise is {float(jnp.min(noise)):.4g}. Let it be positive, such as an exponential."
    seen, of_each = ~jnp.isnan(problem.ys), problem.nll_of_each(predicted, params)
    of = "residual" if problem.likelihood is None else "likelihood"
    for name, found in (("observe", predicted), (of, of_each)):
        lost = np.asarray(seen & ~jnp.isfinite(found))
        if lost.any():
            at = tuple(map(int, np.argwhere(lost)[0]))
            return (
                f"{name} is not finite for {lost.sum()} of {seen.sum()} observations, first for "
                f"ys{list(at)} = {problem.ys[at]:.4g}, where {predicted[at]:.4g} is predicted. "
                "Look for a logarithm or a root of what is not positive, or start nearer."
            )
    lost = not jnp.isfinite(problem.prior_residuals(params)).all()
    return (
        f"{'prior' if lost else 'the cost'} is not finite. Start nearer, or look for a "
        "logarithm or a root of what is negative."
    )


def _slack(problem: ObservedODE) -> float:
    """How far the cost of a run may be above the least, beyond a factor."""
    return GIVE_UP_NATS * problem.ys.size if problem.is_density else 0.0


def _limit(least: Any, slack: float) -> Any:
    return least + slack if slack else GIVE_UP_FACTOR * least


def _distinct(runs: Runs, costs: np.ndarray, slack: float) -> Runs:
    """Runs that differ: the better of each start, and others that are not far worse than the
    best."""
    flats, kept, to = runs.flats, [], np.full(len(costs) + 1, -1)  # the last for those given up
    better = set(runs.of_start[np.arange(len(runs.of_start)), _ways(runs, costs)])
    order = np.argsort(costs, kind="stable")
    for i in order[np.isfinite(costs[order])]:
        same = [
            place for place, j in enumerate(kept)
            if costs[i] - costs[j] <= SAME_END * abs(costs[j])
            and np.max(np.abs(flats[i] - flats[j]) / (1 + np.abs(flats[j]))) < SAME_END
        ]  # fmt: skip
        if same:
            to[i] = same[0]
        elif (
            i in better
            or len(kept) < STARTS_AT_ONCE
            or costs[i] <= _limit(float(costs[kept[0]]), slack)
        ):
            to[i] = len(kept)
            kept.append(i)
    return Runs(flats[kept], to[runs.of_start])
