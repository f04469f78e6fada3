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
from jaxode.estimation.profiles import checked_values, fitted_at_values, selected_by
from jaxode.training.budget import Budget


def profile_of_population(
    population: Population,
    theta: Float[np.ndarray, " p"],
    bounds: Bounds,
    where: str | Callable[[PyTree], Array],
    values: Any,
    budget: Budget,
) -> tuple[np.ndarray, np.ndarray]:
    """The typical parameters `[values, n]` and minus the log-likelihood at each value, which is
    infinite beyond the bounds and where the budget ended."""
    n = population.shared
    flat = jnp.asarray(theta[:n], population.t0.dtype)
    selected = selected_by(where, population.unravel, flat)
    if not selected.is_parameter:
        raise ValueError(
            f"{arg('where')} must be one typical parameter of a population, as 'k' or lambda "
            "params: params['k'][0]; got a function of some."
        )
    (place,) = np.flatnonzero(selected.slope)
    lower, upper = (float(bound[place]) for bound in bounds)
    likelihood = PopulationLikelihood(population, theta, bounds, budget)

    def fitted(starts, values):
        (start,), (value,), unreached = np.copy(starts), values, np.full(1, np.inf)
        if not lower <= value <= upper:
            return starts, unreached
        start[place] = likelihood.lower[place] = likelihood.upper[place] = value
        end = likelihood.minimized(start, label="")
        total = None if budget.over else likelihood.trial(end)
        if total is None or not np.isfinite(total.value):
            return starts, unreached
        return end[None], total.values.sum(keepdims=True)

    begun = likelihood.trial(theta)
    if begun is not None:
        likelihood.take_units(theta, begun.information)
    values = checked_values(values, flat.dtype)
    thetas, nlls = fitted_at_values(values, selected.value, theta, fitted, 1, budget)
    return thetas[:, :n], nlls
