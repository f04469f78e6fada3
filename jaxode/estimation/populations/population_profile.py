"""Profiles of the likelihood of a population: a typical parameter at fixed values."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.caller import arg
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.populations.marginal import Population
from jaxode.estimation.populations.maximum import PopulationLikelihood
from jaxode.estimation.profiles import checked_values, selected_by
from jaxode.estimation.search.budget import Budget


def profile_of_population(
    population: Population,
    theta: Float[np.ndarray, " p"],
    bounds: Bounds,
    where: str | Callable[[PyTree], Array],
    values: Any,
    budget: Budget,
) -> tuple[np.ndarray, np.ndarray]:
    """The typical parameters `[values, n]` and minus the log-likelihood at each value, which is
    infinite beyond the bounds and where the budget ended.

    Values are taken in order of their distance from the estimate. The search for each starts where
    that for the nearest value before it has ended.
    """
    n = population.shared
    flat = jnp.asarray(theta[:n], population.t0.dtype)
    selected = selected_by(where, population.unravel, flat)
    if not selected.is_parameter:
        raise ValueError(
            f"{arg('where')} must be one typical parameter of a population, as 'k' or lambda "
            "params: params['k'][0]; got a function of some."
        )
    (place,) = np.flatnonzero(selected.slope)
    values = checked_values(values, flat.dtype)
    lower, upper = (np.array(bound, float) for bound in bounds)
    inside = (lower[place] <= values) & (values <= upper[place])
    likelihood = PopulationLikelihood(population, theta, bounds, budget)
    likelihood.take_units(theta, likelihood.at(theta).information)
    flats, nlls = np.tile(theta[:n], (len(values), 1)), np.full(len(values), np.inf)
    done = [(selected.value, theta)]
    for i in np.argsort(np.abs(values - selected.value), kind="stable"):
        if not inside[i]:
            continue
        start = min(done, key=lambda pair: abs(pair[0] - values[i]))[1].copy()
        start[place] = likelihood.lower[place] = likelihood.upper[place] = values[i]
        end = likelihood.minimized(start)
        total = None if budget.over else likelihood.trial(end)
        if total is None:
            break
        if np.isfinite(total.value):
            flats[i], nlls[i] = end[:n], total.value
            done.append((float(values[i]), end))
        reached = f"{int(np.isfinite(nlls).sum())} of {len(values)} values"
        budget.show(f"PopulationEstimate.profile: {reached}, least nll {nlls.min():.6g}")
    budget.finish()
    return flats, nlls
