"""Profiles of the likelihood: parameters, or functions of them, at fixed values."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import floating
from jaxode._checks.caller import arg
from jaxode._checks.samples import check_finite
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.search.budget import MOST_STEPS
from jaxode.estimation.search.levenberg_marquardt import Box, minimize
from jaxode.estimation.search.objectives import Local, Objective, of_observations

# A function is held at a value by residuals of ten times its curvature, which shrink the distance a
# hundred times each round, until it is below this part of the standard error.
STIFFNESS, ROUNDS, HELD = 10.0, 6, 1e-5


class Held(Objective):
    """An objective, and a function of the parameters near the last number of `flat`, which stays.

    That number is the value and the multiplier of an augmented Lagrangian, by the weight.
    """

    objective: Objective
    where: Callable[[Array], Array]
    weight: Float[Array, ""]

    @property
    def count(self) -> int:
        return self.objective.count + 1

    def quantities(self, flat, start):
        apart = self.weight * (self.where(flat[:-1]) - flat[-1])
        return jnp.append(self.objective.quantities(flat[:-1], start[:-1]), apart)

    def local(self, flat, start, quantities, jacobian):
        near = self.objective.local(flat[:-1], start[:-1], quantities[:-1], jacobian[:-1, :-1])
        rows = jnp.pad(near.jacobian, ((0, 0), (0, 1)))
        return Local(
            near.cost + 0.5 * quantities[-1] ** 2,
            jnp.append(near.residuals, quantities[-1]),
            jnp.concatenate([rows, jacobian[-1:]]),
        )


class Profile:
    """Estimates the parameters again with `where` held at values.

    Args:
        problem: the observations.
        box: bounds of the parameters.
        size: how many values at a time, for which there is a program.
        flat: the estimate.
        covariance: of the estimate, in units of the cost.
        where: a function of the parameters, or the name of one.
    """

    def __init__(
        self, problem: ObservedODE, box: Box, size: int, flat: Float[Array, " n"],
        covariance: Float[Array, "n n"], where: str | Callable[[PyTree], Array],
    ):  # fmt: skip
        where = operator.itemgetter(where) if isinstance(where, str) else where
        self.box, self.size, self.flat = Box(*map(np.asarray, box)), size, np.asarray(flat)
        self.objective = of_observations(problem, jnp.max(problem.ts))
        self.where = lambda flat: jnp.reshape(where(problem.unravel(flat)), ()).astype(flat.dtype)
        try:
            value, slope = jax.value_and_grad(self.where)(flat)
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
        self.value, chosen = float(value), np.asarray(slope != 0)
        known = np.where(np.isfinite(covariance), covariance, 0.0)
        error = float(np.sqrt(slope @ known @ slope))
        self.error = error if error > 0 else max(abs(self.value), 1.0)
        one = chosen.sum() == 1 and slope[chosen][0] == 1 and value == flat[chosen][0]
        self.is_parameter, self.chosen = one, chosen

    def at(self, values: Any) -> tuple[np.ndarray, np.ndarray]:
        """The parameters and the cost at each value, in order of distance from the estimate: each
        starts where the nearest one that is done has ended."""
        values = np.asarray(floating(values).astype(self.flat.dtype))
        if values.ndim != 1:
            raise ValueError(f"{arg('values')} must be [values]; got shape {values.shape}.")
        check_finite({"values": values})
        order = np.argsort(np.abs(values - self.value), kind="stable")
        ends, costs = np.zeros((len(values), len(self.flat))), np.zeros(len(values))
        done = [(self.value, self.flat)]
        for part in np.split(order, range(self.size, len(order), self.size)):
            rows = np.resize(part, self.size)
            near = [min(done, key=lambda pair: abs(pair[0] - values[i]))[1] for i in rows]
            fitted = self._of_parameter if self.is_parameter else self._of_function
            ends[rows], costs[rows] = fitted(np.stack(near), values[rows])
            done += [(float(values[i]), ends[i]) for i in part if np.isfinite(costs[i])]
        return ends, costs

    def _of_parameter(self, starts: np.ndarray, values: np.ndarray):
        starts = np.where(self.chosen, values[:, None], starts)
        held = Box(*(np.where(self.chosen, starts, bound) for bound in self.box))
        found = minimize(self.objective, starts, held, MOST_STEPS, size=self.size)
        low, high = (np.broadcast_to(bound, self.flat.shape)[self.chosen] for bound in self.box)
        inside = (low <= values) & (values <= high)
        return found.flats, np.where(inside, found.costs, np.inf)

    def _of_function(self, starts: np.ndarray, values: np.ndarray):
        objective = Held(self.objective, self.where, jnp.asarray(STIFFNESS / self.error))
        wide = [np.broadcast_to(bound, starts.shape) for bound in self.box]
        aims = values
        found: Any = None
        for _ in range(ROUNDS):
            ends = np.column_stack([starts, aims])
            held = Box(*(np.column_stack([bound, aims]) for bound in wide))
            found = minimize(objective, ends, held, MOST_STEPS, size=self.size)
            starts = found.flats[:, :-1]
            apart = np.asarray(jax.vmap(self.where)(jnp.asarray(starts))) - values
            if not (np.abs(apart) > HELD * self.error).any():
                break
            aims = aims - np.nan_to_num(apart)
        costs = found.costs - 0.5 * found.residuals[:, -1] ** 2
        return starts, np.where(np.abs(apart) <= HELD * self.error, costs, np.inf)
