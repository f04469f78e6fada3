"""The search from many starts, on more and more of the observations."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.caller import arg
from jaxode._checks.errors import SolveError
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.search.levenberg_marquardt import STARTS_AT_ONCE, Fits, minimize
from jaxode.estimation.search.objectives import of_observations
from jaxode.training.budget import Budget

# Keep each start's better run, the best eight, and those within this factor of the least cost.
GIVE_UP_FACTOR = 10.0
# The same, in nats an observation above the least cost, if costs are log-densities: these have no
# least value.
GIVE_UP_NATS = 10.0
# Fit the observations up to these parts of their times, one part after the other.
PARTS_OF_TIMES = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0
# Until all observations are fitted, weigh the distance from a start by this much of its residuals.
HOLD_WEIGHT = 0.1
# The largest number of steps on a part of the observations.
STEPS_OF_PART = 50
# Merge runs whose parameters and costs differ by less than this part of them.
SAME_END = 1e-3


class Runs(NamedTuple):
    """Parameters that are improved side by side. Several runs may belong to one start."""

    flats: Float[np.ndarray, "runs n"]
    of_start: Int[np.ndarray, "starts columns"]
    """The runs of each start, or -1."""

    def with_more(
        self, flats: Float[np.ndarray, "starts n"], mask: Bool[np.ndarray, " starts"]
    ) -> "Runs":
        """Add a run from `flats` for each start in the mask."""
        column = np.where(mask, len(self.flats) + np.cumsum(mask) - 1, -1)
        of_start = np.concatenate([self.of_start, column[:, None]], axis=1)
        return Runs(np.concatenate([self.flats, flats[mask]]), of_start)

    def least(self, costs: Float[np.ndarray, " runs"]) -> Float[np.ndarray, " starts"]:
        """The least cost of the runs of each start."""
        return np.min(np.append(costs, np.inf)[self.of_start], axis=1)

    def best(self, costs: Float[np.ndarray, " runs"]) -> Int[np.ndarray, " starts"]:
        """The run of each start that costs least."""
        columns = np.argmin(np.append(costs, np.inf)[self.of_start], axis=1)
        return self.of_start[np.arange(len(self.of_start)), columns]


class Outcomes(NamedTuple):
    """Where the runs of a search ended."""

    runs: Runs
    costs: Float[np.ndarray, " runs"]
    converged: Bool[np.ndarray, " runs"]
    residuals: Float[np.ndarray, "runs m"]
    information: Float[np.ndarray, "runs k n"]
    """A root of the Fisher information."""
    gradients: Float[np.ndarray, "runs n"]
    """The gradient of the cost."""


@dataclasses.dataclass(frozen=True)
class MultiStart:
    """What all runs of a search from many starts share."""

    problem: ObservedODE
    starts: Float[np.ndarray, "starts n"]
    bounds: Bounds
    size: int
    """How many runs are rows of one solve."""
    budget: Budget
    label: str = "estimate"
    """The search in progress lines."""

    def fitted(self, flats: Float[np.ndarray, "runs n"], end: Array, steps: int) -> Fits:
        """Fit the observations up to a time, from each of `flats`."""
        return minimize(
            of_observations(self.problem, end), flats, self.bounds,
            min(int(self.budget.steps), steps),
            size=self.size, hold=HOLD_WEIGHT if end < jnp.max(self.problem.ts) else 0.0,
            budget=self.budget, label=f"{self.label}: observations up to {float(end):.4g}",
        )  # fmt: skip

    def costs(self, flats: Float[np.ndarray, "runs n"], end: Array) -> Float[np.ndarray, " runs"]:
        """The costs of the observations up to a time, by the program of the search."""
        objective = of_observations(self.problem, end)
        fits = minimize(objective, flats, self.bounds, 0, size=self.size, budget=self.budget)
        return fits.costs

    @property
    def slack(self) -> float:
        """How far the cost of a run may be above the least, in nats; 0 if a factor counts."""
        return GIVE_UP_NATS * self.problem.ys.size if self.problem.is_density else 0.0


def end_of_part(problem: ObservedODE, number: int) -> Array:
    """The last time of a part of the observations, which has more of them than parameters."""
    ts, ys = (np.asarray(x) for x in (problem.ts, problem.ys))
    times, at = np.unique(ts, return_inverse=True)
    observed = (~np.isnan(ys)).reshape(ts.size, -1).sum(axis=1)
    so_far = np.cumsum(np.bincount(at.ravel(), observed))
    first = np.searchsorted(so_far, len(ravel_pytree(problem.template)[0]), side="right")
    last = math.ceil(PARTS_OF_TIMES[min(number, len(PARTS_OF_TIMES) - 1)] * len(times)) - 1
    return jnp.asarray(times[min(max(last, first), len(times) - 1)], ts.dtype)


def runs_from_starts(starts: Float[np.ndarray, "starts n"]) -> Runs:
    """One run from each start."""
    return Runs(starts, np.arange(len(starts))[:, None])


def runs_from_slopes(
    search: MultiStart, flats: Float[np.ndarray, "starts n"], costs: Float[np.ndarray, " starts"]
) -> Runs:
    """A run from where each start came by its slopes, and one from each start that costs little
    itself on the first observations."""
    starts = search.starts
    matched = _distinct(runs_from_starts(flats), costs, 0.0)
    matches = len(matched.flats)  # at least one
    candidates = np.concatenate([matched.flats, starts])
    first_costs = search.costs(candidates, end_of_part(search.problem, 0))
    good = first_costs[matches:] <= _limit(first_costs.min(), search.slack)
    return matched.with_more(starts, good)


def improved(search: MultiStart, runs: Runs, matched: bool) -> Outcomes:
    """Improve runs on more and more observations, then on all of them.

    If no run can be solved for a part of the observations, since the part before misled them, all
    begin there again.

    Args:
        search: what all runs share.
        runs: where they begin.
        matched: whether they begin where slopes were matched.
    """
    runs, with_starts = _improved_on_parts(search, runs, matched)
    outcomes = _improved_on_all(search, runs, with_starts)
    search.budget.finish()
    return outcomes


def _improved_on_parts(search: MultiStart, runs: Runs, matched: bool) -> tuple[Runs, bool]:
    """Improve runs on each part of the observations but all, while the budget lasts.

    Then each start gets a further run from where it began; if slopes were `matched`, only those
    that went astray, or ended above their start. Also returns whether the budget lasted for that.
    """
    end, costs = end_of_part(search.problem, 0), np.zeros(0)
    for number in range(len(PARTS_OF_TIMES) - 1):
        if search.budget.over:
            return runs, False
        end = end_of_part(search.problem, number)
        fits = search.fitted(runs.flats, end, STEPS_OF_PART)
        misled = np.full(len(search.starts), np.isinf(fits.costs).all())
        runs, fits = _with_runs_from_starts(search, runs, fits, misled, end, STEPS_OF_PART)
        costs = runs.least(fits.costs)
        runs = _distinct(runs, fits.costs, search.slack)
    astray = np.full(len(search.starts), True)
    if matched:
        astray = _astray(costs, search.costs(search.starts, end), search.slack)
    return runs.with_more(search.starts, astray), True


def _improved_on_all(search: MultiStart, runs: Runs, with_starts: bool) -> Outcomes:
    """Improve runs on all observations. `with_starts` says that some of them begin at the starts;
    the other starts get such a run if they cost less than where their runs end."""
    starts, steps = search.starts, int(search.budget.steps)
    end = end_of_part(search.problem, len(PARTS_OF_TIMES) - 1)
    if not with_starts:
        runs = runs.with_more(starts, np.any(runs.flats[runs.of_start[:, 0]] != starts, axis=1))
    fits = search.fitted(runs.flats, end, steps)
    costs = runs.least(fits.costs)
    again = np.full(len(starts), np.isinf(costs).all())
    if with_starts and (alone := runs.of_start[:, -1] < 0).any():
        again[alone] = search.costs(starts[alone], end) < costs[alone]
    runs, fits = _with_runs_from_starts(search, runs, fits, again, end, steps)
    return Outcomes(runs, *fits[1:])


def _with_runs_from_starts(
    search: MultiStart, runs: Runs, fits: Fits, again: np.ndarray, end: Array, steps: int
) -> tuple[Runs, Fits]:
    """The runs where `fits` ended, and those of the starts in the mask `again`, which are fitted
    anew from where they began. Raises if none could be solved."""
    if again.any():
        runs = runs.with_more(search.starts, again)
        more = search.fitted(search.starts[again], end, steps)
        fits = Fits(*(np.concatenate(pair) for pair in zip(fits, more, strict=True)))
    if not np.isfinite(fits.costs).any():
        raise SolveError(
            f"{arg('starts')} none could be solved up to t = {float(end):g}. From one of "
            f"them, {_cause(search.problem, end, search.starts[0])}"
        )
    return runs._replace(flats=fits.flats), fits


def _astray(
    costs: Float[np.ndarray, " starts"], of_starts: np.ndarray, slack: float
) -> Bool[np.ndarray, " starts"]:
    """Whether the best run of each start costs far more than that of another, or than the start."""
    return costs > _limit(np.minimum(costs.min(), of_starts), slack)


def outcome_of_starts(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Where the best run of each start ended, and the costs there; NaN and infinity if all were
    given up."""
    runs = outcomes.runs
    best = runs.best(outcomes.costs)
    given_up = np.full((1, runs.flats.shape[1]), np.nan)
    return np.concatenate([runs.flats, given_up])[best], np.append(outcomes.costs, np.inf)[best]


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
    observed, nll = ~jnp.isnan(problem.ys), problem.nll_of_each(predicted, params)
    by_user = "residual" if problem.likelihood is None else "likelihood"
    for name, values in (("observe", predicted), (by_user, nll)):
        lost = np.asarray(observed & ~jnp.isfinite(values))
        if lost.any():
            at = tuple(map(int, np.argwhere(lost)[0]))
            return (
                f"{name} is not finite for {lost.sum()} of {observed.sum()} observations, first "
                f"for ys{list(at)} = {problem.ys[at]:.4g}, where {predicted[at]:.4g} is predicted. "
                "Look for a logarithm or a root of what is not positive, or start nearer."
            )
    lost = not jnp.isfinite(problem.prior_residuals(params)).all()
    return (
        f"{'prior' if lost else 'the cost'} is not finite. Start nearer, or look for a "
        "logarithm or a root of what is negative."
    )


def _limit(least: Any, slack: float) -> Any:
    """The largest cost of runs that go on: `slack` above the least, or else by a factor."""
    return least + slack if slack else GIVE_UP_FACTOR * least


def _distinct(runs: Runs, costs: np.ndarray, slack: float) -> Runs:
    """Merge runs that end alike, and give up those that are far worse than the best.

    The best run of each start goes on, and so do the best eight.
    """
    flats, distinct, place = (
        runs.flats,
        [],
        np.full(len(costs) + 1, -1),
    )  # the last for those given up
    better = set(runs.best(costs))
    order = np.argsort(costs, kind="stable")
    for i in order[np.isfinite(costs[order])]:
        same = [
            number for number, j in enumerate(distinct)
            if costs[i] - costs[j] <= SAME_END * abs(costs[j])
            and np.max(np.abs(flats[i] - flats[j]) / (1 + np.abs(flats[j]))) < SAME_END
        ]  # fmt: skip
        if same:
            place[i] = same[0]
        elif (
            i in better
            or len(distinct) < STARTS_AT_ONCE
            or costs[i] <= _limit(float(costs[distinct[0]]), slack)
        ):
            place[i] = len(distinct)
            distinct.append(i)
    return Runs(flats[distinct], place[runs.of_start])
