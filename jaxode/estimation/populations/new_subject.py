"""What a subject that a population does not know yet will show, as a band."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import check_state, floating, numbers
from jaxode._checks.caller import arg
from jaxode._checks.errors import SolveError
from jaxode._checks.samples import check_finite
from jaxode._jax.closure import compiled
from jaxode.estimation.observed.observations import check_times
from jaxode.estimation.observed.observed_system import Experiment
from jaxode.estimation.populations.marginal import Population
from jaxode.estimation.populations.population_arguments import checked_doses
from jaxode.estimation.prediction import Band
from jaxode.ode.interpolations import check_knots

# How many subjects are drawn: a power of two, for Sobol's sequence.
DRAWS = 2048
# The part of them between the ends of a band.
PART_IN_BAND = 0.95


def band_of_new_subject(
    population: Population,
    theta: Float[Array, " p"],
    covariance: Float[Array, "p p"],
    subject: Experiment,
) -> Band:
    """Where the observations of a new subject are, without noise.

    Subjects are drawn by a quasi-random sequence, each with parameters of the population as
    uncertain as estimated. What the observations of the population do not determine is held.
    """
    from scipy import special, stats  # as JAX does, but slow to import

    p, q = len(theta), len(population.places)
    points = stats.qmc.Sobol(p + q, scramble=False).random(DRAWS) + 0.5 / DRAWS
    normal = special.ndtri(points)
    finite = np.where(np.isfinite(covariance), np.asarray(covariance, float), 0.0)
    variances, along = np.linalg.eigh(finite)
    root = along * np.sqrt(np.maximum(variances, 0.0))
    # The first dimensions of the sequence are the most even, and effects vary most.
    effects = jnp.asarray(normal[:, :q], theta.dtype)
    thetas = jnp.asarray(np.asarray(theta) + normal[:, q:] @ root.T, theta.dtype)
    predicted = np.asarray(_predicted(population, thetas, effects, subject))
    lost = ~np.isfinite(predicted).all(axis=tuple(range(1, predicted.ndim)))
    if lost.any():
        raise SolveError(
            f"predict: {lost.sum()} of {DRAWS} subjects drawn from the population cannot be "
            "solved. Let fewer parameters vary, or raise max_steps."
        )
    low, high = np.quantile(predicted, [0.5 - PART_IN_BAND / 2, 0.5 + PART_IN_BAND / 2], axis=0)
    mean = predicted.mean(axis=0)
    return Band(*(jnp.asarray(x, theta.dtype) for x in (mean, low, high)))


@compiled
def _predicted(
    population: Population,
    thetas: Float[Array, "draws p"],
    effects: Float[Array, "draws q"],
    subject: Experiment,
) -> Float[Array, "draws times ..."]:
    """What is observed of each subject that is drawn."""

    def of_draw(pair):
        flat = population.params_of(*pair)
        return population.prediction_of(population.unravel(flat), subject)

    return jax.lax.map(of_draw, (thetas, effects), batch_size=128)


def posed_subject(
    population: Population, ts: Any, y0: Any, row_args: Any, doses: Any
) -> Experiment:
    """The checked data of a new subject."""
    subjects, dtype = population.subjects, population.t0.dtype
    exact = numbers("ts", ts)
    times = floating(exact).astype(dtype)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"{arg('ts')} must be [times]; got shape {times.shape}.")
    check_times(exact, times, population.t0)
    check_knots("ts", population.args, (population.t0, times[-1]))
    state = None
    if callable(population.y0):
        if y0 is not None:
            raise ValueError(f"{arg('y0')} is a function in this population. Leave it out.")
    else:
        state = _like_one(check_state("y0", y0), subjects.y0, "y0", "the state of one subject")
    row = _like_one(row_args, subjects.row, "row_args", "the row of one subject")
    check_knots("row_args", row, (population.t0, times[-1]))
    return Experiment(times, jnp.zeros(0), state, row, _doses(population, doses))


def _doses(population: Population, doses: Any) -> Float[Array, " jumps"] | None:
    """The times of the doses of a new subject."""
    if population.subjects.doses is None:
        if doses is not None:
            raise ValueError(f"{arg('doses')} needs jumps in the population. Leave it out.")
        return None
    if doses is None:
        raise ValueError(f"{arg('doses')} must be the times of the subject's jumps, [jumps].")
    times = floating(numbers("doses", doses)).astype(population.t0.dtype)
    if times.ndim != 1:
        raise ValueError(f"{arg('doses')} must be [jumps]; got shape {times.shape}.")
    (times,) = checked_doses("doses", times, 1, population.t0)
    return jnp.append(times, jnp.inf)  # at least one number


def _like_one(tree: PyTree, rows: PyTree, name: str, what: str) -> PyTree:
    """The tree as arrays. Raises unless it is like one row of `rows`."""
    one_row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)
    if jax.tree.structure(tree) != jax.tree.structure(rows):
        got = "none" if tree is None else f"{jax.tree.structure(tree)}"
        need = "left out" if rows is None else f"{what}, {jax.tree.structure(rows)}"
        raise ValueError(f"{arg(name)} must be {need}; got {got}.")
    for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(one_row), strict=True):
        if jnp.shape(leaf) != like.shape:
            raise ValueError(
                f"{arg(name)} must be {what}, of shape {like.shape}; got shape {jnp.shape(leaf)}."
            )
    arrays = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), tree, one_row)
    check_finite({name: arrays})
    return arrays
