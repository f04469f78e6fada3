"""All subjects of a population fitted as one: where the search of the population begins."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.errors import SolveError
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.observed.likelihoods import LIKELIHOODS, LOG_ROOT_2_PI
from jaxode.estimation.observed.observed_system import ObservedODE, needs_row
from jaxode.estimation.observed.tolerances import spreads
from jaxode.estimation.populations.marginal import Population
from jaxode.estimation.search.multistart import searched
from jaxode.ode.pieces import Jumps
from jaxode.training.budget import Budget


@dataclasses.dataclass(frozen=True)
class StateOfAll:
    """The initial state of each of several subjects, by a function of parameters that they share.

    Compared by value, so that programs are found again.
    """

    y0: Callable[[PyTree], PyTree]
    subjects: int

    def __call__(self, params: PyTree) -> PyTree:
        def repeat(leaf):
            return jnp.broadcast_to(leaf, (self.subjects, *jnp.shape(leaf)))

        return jax.tree.map(repeat, self.y0(params))


@dataclasses.dataclass(frozen=True)
class NormalByPrediction:
    """The normal log-density of observations whose deviation is a function of their mean."""

    noise: Callable[[Array, PyTree], Array]

    def __call__(self, predicted: Array, observed: Array, params: PyTree) -> Array:
        noise = jax.vmap(lambda mean: jnp.broadcast_to(self.noise(mean, params), mean.shape))(
            predicted
        )
        # A deviation of zero belongs to an observation that is missing, or to a bad start.
        noise = jnp.where(noise > 0, noise, 1.0)
        return -0.5 * ((observed - predicted) / noise) ** 2 - jnp.log(noise) - LOG_ROOT_2_PI


def fitted_as_one(
    population: Population, flat: Float[Array, " n"], bounds: Bounds, budget: Budget
) -> np.ndarray | None:
    """The parameters that fit all subjects best if none varies, by the search of `estimate`.

    Its slopes and growing parts of the observations lead back from guesses from which the search
    of a population would go astray. None if it cannot be solved, or if there are too few
    observations.
    """
    observations = int((~np.isnan(np.asarray(population.subjects.ys))).sum())
    if observations <= len(flat):
        return None
    try:
        search, outcomes = searched(
            _as_one(population), flat[None], bounds, budget, label="estimate_population: as one"
        )
    except SolveError:
        return None
    best = outcomes.runs.flats[int(np.argmin(outcomes.costs))]
    return np.clip(best, *map(np.asarray, search.bounds))


def _as_one(population: Population) -> ObservedODE:
    """The subjects as experiments of one system, whose parameters they share."""
    subjects, y0 = population.subjects, population.y0
    if y0 is None:
        y0 = subjects.y0
    elif subjects.row is None or not needs_row(y0):
        y0 = StateOfAll(y0, len(subjects.ts))
    options = dict(population.options)
    if subjects.doses is not None:
        options["jumps"] = Jumps(subjects.doses, options["jumps"].change)
    ys = np.asarray(subjects.ys, float)
    likelihood: Any = LIKELIHOODS["normal"]
    noise = jnp.asarray(spreads(ys, 1) or 1.0, subjects.ys.dtype)
    if population.noise is not None:
        likelihood, noise = NormalByPrediction(population.noise), jnp.ones((), subjects.ys.dtype)
    return ObservedODE(
        f=population.f, y0=y0, t0=population.t0, ts=subjects.ts, ys=subjects.ys,
        template=population.template, observe=population.observe, likelihood=likelihood,
        residual=None, noise=noise, estimated=population.noise is None, prior=None,
        args=population.args, row_args=subjects.row, options=options,
    )  # fmt: skip
