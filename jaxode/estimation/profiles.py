"""Profiles of the likelihood: parameters, or functions of them, at fixed values."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import floating
from jaxode._checks.caller import arg
from jaxode._checks.samples import check_finite
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.search.levenberg_marquardt import minimize
from jaxode.estimation.search.objectives import LocalModel, Objective, of_observations
from jaxode.training.budget import Budget

# A residual holds a function at a value. Its weight is this, by the standard error of the function:
# each round then shrinks the distance to the value about a hundred times.
HOLDING_WEIGHT = 10.0
# The largest number of rounds.
HOLDING_ROUNDS = 6
# End when the distance is below this part of the standard error.
HOLDING_TOLERANCE = 1e-5


class Held(Objective):
    """An objective with a function of the parameters held near a value.

    The value is the last number of `flat`, which bounds fix. By the weight, it is also the
    multiplier of an augmented Lagrangian.
    """

    objective: Objective
    where: Callable[[Array], Array]
    weight: Float[Array, ""]

    @property
    def count(self) -> int:
        return self.objective.count + 1

    def quantities(self, flat, start):
        distance = self.weight * (self.where(flat[:-1]) - flat[-1])
        return jnp.append(self.objective.quantities(flat[:-1], start[:-1]), distance)

    def local(self, flat, start, quantities, jacobian):
        model = self.objective.local(flat[:-1], start[:-1], quantities[:-1], jacobian[:-1, :-1])
        rows = jnp.pad(model.jacobian, ((0, 0), (0, 1)))
        return LocalModel(
            model.cost + 0.5 * quantities[-1] ** 2,
            jnp.append(model.residuals, quantities[-1]),
            jnp.concatenate([rows, jacobian[-1:]]),
        )


class Selected(NamedTuple):
    """The function of the parameters that a user holds at values."""

    where: Callable[[Array], Array]
    """A function of the parameters as a vector."""
    value: float
    """Its value at the estimate."""
    slope: Float[np.ndarray, " n"]
    """Its slope there."""
    is_parameter: bool
    """Whether it is one of the parameters."""


def selected_by(
    where: str | Callable[[PyTree], Array], unravel: Callable[[Array], PyTree], flat: Array
) -> Selected:
    """The function that a user passed or named. Raises if it is not one number with a slope."""
    select = operator.itemgetter(where) if isinstance(where, str) else where

    def of_vector(flat):
        return jnp.reshape(select(unravel(flat)), ()).astype(flat.dtype)

    try:
        value, slope = jax.value_and_grad(of_vector)(flat)
    except (TypeError, KeyError, IndexError) as error:
        raise TypeError(
            f"{arg('where')} must return one number, as lambda params: params['k'][0]; got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not bool(jnp.isfinite(value) & jnp.isfinite(slope).all() & (slope != 0).any()):
        raise ValueError(
            f"{arg('where')} must have a finite slope at the estimate that is not zero; got "
            f"the value {value:.4g} and the slope {slope}."
        )
    slope, chosen = np.asarray(slope), np.asarray(slope != 0)
    is_parameter = chosen.sum() == 1 and slope[chosen][0] == 1 and value == flat[chosen][0]
    return Selected(of_vector, float(value), slope, bool(is_parameter))


def checked_values(values: Any, dtype: Any) -> Float[np.ndarray, " values"]:
    """The values of a profile, as an array."""
    array = np.asarray(floating(values).astype(dtype))
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{arg('values')} must be [values]; got shape {array.shape}.")
    check_finite({"values": array})
    return array


def fitted_at_values(
    values: Float[np.ndarray, " values"],
    value: float,
    vector: Float[np.ndarray, " p"],
    fitted: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    size: int,
    budget: Budget,
) -> tuple[np.ndarray, np.ndarray]:
    """The parameters and the cost at each value, which is infinite where the budget ended.

    Values are taken in order of their distance from the estimate. The search for each starts where
    that for the nearest value before it has ended.

    Args:
        values: which to hold.
        value: that of the estimate.
        vector: the estimate.
        fitted: estimates again from starts `[size, p]`, with these values held, `[size]`. Returns
            where it ends, and the costs there.
        size: how many values at a time.
        budget: ends the searches.
    """
    order = np.argsort(np.abs(values - value), kind="stable")
    vectors, costs = np.tile(vector, (len(values), 1)), np.full(len(values), np.inf)
    done = [(value, vector)]
    for part in np.split(order, range(size, len(order), size)):
        rows = np.resize(part, size)
        starts = [min(done, key=lambda pair: abs(pair[0] - values[i]))[1] for i in rows]
        vectors[rows], costs[rows] = fitted(np.stack(starts), values[rows])
        if budget.over:
            break
        done += [(float(values[i]), vectors[i]) for i in part if np.isfinite(costs[i])]
        budget.show(f"profile: {np.isfinite(costs).sum()} of {len(values)} values")
    budget.finish()
    return vectors, costs


class Profile:
    """Estimates the parameters again with `where` held at values.

    Args:
        problem: the observations.
        bounds: of the parameters.
        size: how many values at a time, as many as the program of the search takes.
        flat: the estimate.
        covariance: of the estimate, in units of the cost.
        where: a function of the parameters, or the name of one.
    """

    def __init__(
        self, problem: ObservedODE, bounds: Bounds, size: int, flat: Float[Array, " n"],
        covariance: Float[Array, "n n"], where: str | Callable[[PyTree], Array],
    ):  # fmt: skip
        self.bounds, self.size, self.flat = Bounds(*map(np.asarray, bounds)), size, np.asarray(flat)
        self.objective = of_observations(problem, jnp.max(problem.ts))
        selected = selected_by(where, problem.unravel, flat)
        self.where, self.value, slope, self.is_parameter = selected
        self.chosen = slope != 0
        finite = np.where(np.isfinite(covariance), covariance, 0.0)
        error = float(np.sqrt(slope @ finite @ slope))
        self.error = error if error > 0 else max(abs(self.value), 1.0)

    def at(self, values: Any, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
        """The parameters and the cost at each value, which is infinite where the budget ended."""
        values = checked_values(values, self.flat.dtype)
        fitted = functools.partial(
            self._of_parameter if self.is_parameter else self._of_function, budget
        )
        return fitted_at_values(values, self.value, self.flat, fitted, self.size, budget)

    def _of_parameter(self, budget: Budget, starts: np.ndarray, values: np.ndarray):
        """Fit with the parameter fixed at values by equal bounds."""
        starts = np.where(self.chosen, values[:, None], starts)
        fixed = Bounds(*(np.where(self.chosen, starts, bound) for bound in self.bounds))
        fits = minimize(
            self.objective, starts, fixed, int(budget.steps), size=self.size, budget=budget
        )
        lower, upper = (
            np.broadcast_to(bound, self.flat.shape)[self.chosen] for bound in self.bounds
        )
        inside = (lower <= values) & (values <= upper)
        # A search that the budget has cut short says nothing of its value.
        inside &= fits.converged | (not budget.over)
        return fits.flats, np.where(inside, fits.costs, np.inf)

    def _of_function(self, budget: Budget, starts: np.ndarray, values: np.ndarray):
        """Fit with the function held at values, which moves the aims by the distances left."""
        objective = Held(self.objective, self.where, jnp.asarray(HOLDING_WEIGHT / self.error))
        bounds = [np.broadcast_to(bound, starts.shape) for bound in self.bounds]
        tolerance, aims = HOLDING_TOLERANCE * self.error, values
        fits: Any = None
        for _ in range(HOLDING_ROUNDS):
            flats = np.column_stack([starts, aims])
            fixed = Bounds(*(np.column_stack([bound, aims]) for bound in bounds))
            fits = minimize(
                objective, flats, fixed, int(budget.steps), size=self.size, budget=budget
            )
            starts = fits.flats[:, :-1]
            distance = np.asarray(jax.vmap(self.where)(jnp.asarray(starts))) - values
            if budget.over or not (np.abs(distance) > tolerance).any():
                break
            aims = aims - np.nan_to_num(distance)
        costs = fits.costs - 0.5 * fits.residuals[:, -1] ** 2
        reached = (np.abs(distance) <= tolerance) & (fits.converged | (not budget.over))
        return starts, np.where(reached, costs, np.inf)
