"""Least squares from many starts, on more and more of the observations."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.caller import arg
from jaxode._checks.errors import SolveError
from jaxode.estimation.residuals import Misfit, least_squares, misfits, of_observations

ROWS = 8  # starts that are improved at once
FACTOR = 10.0  # of the least cost, above which all but the `ROWS` best starts are given up
PARTS = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0  # of the observations, one after the other
HOLD = 0.1  # weight of the distance from a start, in residuals of it, but for all observations
STEPS, ROUNDS = 50, 4  # of least squares, and how often all observations get them
ALIKE = 1e-3  # relative distance of two ends that are one


class Runs(NamedTuple):
    """Parameters that are improved side by side."""

    flats: Float[np.ndarray, "runs n"]
    of_start: Int[np.ndarray, "starts ways"]
    """The runs of each start, or -1."""


class Ends(NamedTuple):
    """The state of the runs."""

    runs: Runs
    costs: Float[np.ndarray, " runs"]
    converged: Bool[np.ndarray, " runs"]
    jacobians: Float[np.ndarray, "runs m n"]


def with_matched(problem: Misfit, starts: np.ndarray, ends: np.ndarray, costs: np.ndarray) -> Runs:
    """Collect the ends of gradient matching and of fits to the first observations."""
    count = len(starts)
    matched = _distinct(Runs(ends, np.arange(count)[:, None]), costs)
    least = len(matched.flats)  # at least one
    # Of a size that does not depend on the data.
    together = np.concatenate([np.resize(matched.flats, (count, starts.shape[1])), starts])
    data = problem, _end(problem, 0)
    of_all = np.asarray(misfits(of_observations, data, jnp.asarray(together)))
    near = np.flatnonzero(of_all[count:] <= FACTOR * of_all.min())
    place = np.full(count, -1)
    place[near] = least + np.arange(len(near))
    flats = np.concatenate([matched.flats, starts[near]])
    return Runs(flats, np.concatenate([matched.of_start, place[:, None]], axis=1))


def _end(problem: Misfit, number: int) -> Array:
    """The last time of a part of the observations, which are more than the parameters."""
    ts, ys = (np.asarray(part) for part in (problem.ts, problem.ys))
    times, at = np.unique(ts, return_inverse=True)
    seen = (~np.isnan(ys)).reshape(ts.size, -1).sum(axis=1)
    so_far = np.cumsum(np.bincount(at.ravel(), seen))
    first = np.searchsorted(so_far, len(ravel_pytree(problem.template)[0]), side="right")
    last = math.ceil(PARTS[min(number, len(PARTS) - 1)] * len(times)) - 1
    return jnp.asarray(times[min(max(last, first), len(times) - 1)], ts.dtype)


def improved(problem: Misfit, runs: Runs, size: int) -> Ends:
    """The ends of runs of least squares, `size` at a time, on more and more observations."""
    free = jnp.zeros(runs.flats.shape[1], bool)
    for number in range(len(PARTS) + ROUNDS - 1):
        data, found = (problem, _end(problem, number)), []
        whole = number >= len(PARTS) - 1
        for i in range(0, len(runs.flats), size):
            rows = np.resize(np.arange(i, min(i + size, len(runs.flats))), size)
            starts = jnp.asarray(runs.flats[rows])
            hold = jnp.zeros(size, starts.dtype)
            if not whole:  # what few observations do not determine would run away
                misfit = misfits(of_observations, data, starts) / problem.ys.size
                hold = jnp.where(jnp.isfinite(misfit), HOLD * jnp.sqrt(misfit), hold)
            some = least_squares(of_observations, data, starts, free, STEPS, hold)
            found.append([np.asarray(x)[: len(runs.flats) - i] for x in some])
        given = runs.flats
        flats, costs, converged, jacobians = map(np.concatenate, zip(*found, strict=True))
        runs = runs._replace(flats=flats)
        if not np.isfinite(costs).any():
            raise SolveError(
                f"{arg('starts')} none could be solved up to t = {float(data[1]):g}. From one of "
                f"them, {_cause(*data, given[0])}"
            )
        if whole and (converged[np.argmin(costs)] or number == len(PARTS) + ROUNDS - 2):
            break
        runs = _distinct(runs, costs)
    return Ends(runs, costs, converged, jacobians)


def _cause(problem: Misfit, end: Array, start: np.ndarray) -> str:
    """Why the residuals at a start are not finite."""
    flat = jnp.asarray(start)
    params = problem.unravel(flat)
    try:
        predicted = problem.predicted(params, end, throw=True)
    except SolveError as error:
        return str(error).removeprefix("solve: ")
    residuals, seen = problem.residuals(flat, end), ~jnp.isnan(problem.ys)
    for name, found in (("observe", predicted), ("residual", residuals[: predicted.size])):
        lost = np.asarray(seen & ~jnp.isfinite(found.reshape(predicted.shape)))
        if lost.any():
            at = tuple(map(int, np.argwhere(lost)[0]))
            return (
                f"{name} is not finite for {lost.sum()} of {seen.sum()} observations, first for "
                f"ys{list(at)} = {problem.ys[at]:.4g}, where {predicted[at]:.4g} is predicted. "
                "Look for a logarithm or a root of what is not positive, or start nearer."
            )
    lost = not jnp.isfinite(residuals[predicted.size :]).all()
    return (
        f"{'prior' if lost else 'the sum of squares'} is not finite. Start nearer, or look for a "
        "logarithm or a root of what is negative."
    )


def _distinct(runs: Runs, costs: np.ndarray) -> Runs:
    """Runs that differ, without those that are far worse than the best."""
    flats, kept, to = runs.flats, [], np.full(len(costs) + 1, -1)  # the last for those given up
    order = np.argsort(costs, kind="stable")
    for i in order[np.isfinite(costs[order])]:
        same = [
            place for place, j in enumerate(kept)
            if costs[i] <= (1 + ALIKE) * costs[j]
            and np.max(np.abs(flats[i] - flats[j]) / (1 + np.abs(flats[j]))) < ALIKE
        ]  # fmt: skip
        if same:
            to[i] = same[0]
        elif len(kept) < ROWS or costs[i] <= FACTOR * costs[kept[0]]:
            to[i] = len(kept)
            kept.append(i)
    return Runs(flats[kept], to[runs.of_start])
