"""The whole search for the parameters of an observed system, from one or many starts."""

import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.caller import arg
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.search.levenberg_marquardt import STARTS_AT_ONCE
from jaxode.estimation.search.slopes import match_slopes
from jaxode.estimation.search.starts import (
    MultiStart,
    Outcomes,
    improved,
    runs_from_slopes,
    runs_from_starts,
)
from jaxode.ode.solvers.rosenbrock import Rodas5P, Rosenbrock23
from jaxode.training.budget import Budget


def searched(
    problem: ObservedODE,
    flats: Float[Array, "starts n"],
    bounds: Bounds,
    budget: Budget,
    match: bool | None = None,
    label: str = "estimate",
) -> tuple[MultiStart, Outcomes]:
    """Search for the parameters that fit best: first by slopes where these can be matched, then by
    Levenberg-Marquardt on more and more observations.

    Args:
        problem: the observed system.
        flats: the starts.
        bounds: of the parameters.
        budget: ends the search.
        match: whether to match slopes; by default, if the state is observed without jumps and the
            solver is not one for stiff fields.
        label: of progress lines.

    Returns:
        The search, and where its runs ended.

    Raises:
        ValueError: if slopes are to be matched, and cannot.
        SolveError: if no start can be solved.
    """
    by_slopes = match_slopes(problem, flats, bounds, budget) if _matches(problem, match) else None
    if match and by_slopes is None:
        raise ValueError(
            f"{arg('match')} needs five observations of each series, at times that are not too "
            "uneven, and a start at which f is finite. Leave it out."
        )
    most = len(flats) if by_slopes is None else 2 * len(flats)
    search = MultiStart(
        problem, np.asarray(flats), bounds, min(STARTS_AT_ONCE, most), budget, label
    )
    if by_slopes is None:
        runs = runs_from_starts(search.starts)
    else:
        runs = runs_from_slopes(search, *by_slopes)
    return search, improved(search, runs, matched=by_slopes is not None)


def _matches(problem: ObservedODE, match: bool | None) -> bool:
    """Whether to match slopes. Raises if they are asked for, and the states are not smooth."""
    options = problem.options
    if problem.observe is not None:
        cannot = "observe"
    else:
        cannot = "jumps" if options.get("jumps") is not None else None
    if match and cannot:
        raise ValueError(f"{arg('match')} needs smooth states; got {cannot}. Leave one out.")
    stiff = isinstance(options.get("solver"), Rodas5P | Rosenbrock23)
    return not (stiff or cannot) if match is None else match
