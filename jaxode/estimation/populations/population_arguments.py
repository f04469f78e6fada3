"""Check what `jaxode.estimate_population` gets, and pose the population."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import (
    check_args,
    check_bool,
    check_number,
    check_state,
    floating,
    non_negative,
    numbers,
)
from jaxode._checks.caller import arg
from jaxode._checks.errors import first_row
from jaxode._checks.rules import TIME
from jaxode._checks.samples import check_finite, check_rows
from jaxode._checks.times import infinite_padding
from jaxode.estimation.observed.observations import as_data, check_observed, check_times
from jaxode.estimation.observed.observed_system import Experiment
from jaxode.estimation.observed.tolerances import with_atol
from jaxode.estimation.observed.user_functions import (
    check_function,
    check_noise_shape,
    check_observed_shape,
    check_options,
    index_with_axis,
)
from jaxode.estimation.populations.marginal import Population
from jaxode.ode.field import check_field
from jaxode.ode.pieces import Jumps, check_jumps

# The relative tolerance of solves.
POPULATION_RTOL = {jnp.dtype("float64"): 1e-6, jnp.dtype("float32"): 1e-5}
# Arguments of `solve` that `estimate_population` sets itself.
NOT_OPTIONS_OF_POPULATIONS = (
    "f", "y0", "t0", "t1", "args", "batch", "row_args", "ts", "adjoint", "throw",
)  # fmt: skip


class PopulationArguments(NamedTuple):
    """The arguments of `estimate_population`, as the user passed them."""

    f: Any
    y0: Any
    ts: Any
    ys: Any
    start: Any
    vary: Any
    t0: Any
    observe: Any
    noise: Any
    args: Any
    row_args: Any
    correlated: Any
    options: dict[str, Any]
    """Options of `solve`."""


def posed_population(arguments: PopulationArguments) -> tuple[Population, np.ndarray]:
    """The checked population, and the first guess of all that is estimated."""
    y0, noise, options = arguments.y0, arguments.noise, arguments.options
    check_field("f", arguments.f, "f(t, y, params)")
    check_bool("correlated", arguments.correlated)
    check_options(options, NOT_OPTIONS_OF_POPULATIONS)
    for name, call in (("observe", "t, y, params"), ("noise", "predicted, params")):
        if (function := getattr(arguments, name)) is not None:
            check_function(name, function, (call,))
    check_jumps(options.get("jumps"))
    template, places, deviations = _varying(arguments.start, arguments.vary)
    times, ys, t0 = _observations(arguments)
    row_args = arguments.row_args
    rows = None if row_args is None else check_rows("row_args", row_args, len(times))
    states = None if callable(y0) else check_rows("y0", check_state("y0", y0), len(times))
    doses, options = None, {"rtol": POPULATION_RTOL[times.dtype], **options}
    if (jumps := options.get("jumps")) is not None:
        doses = checked_doses("jumps", floating(jumps.times).astype(times.dtype), len(times), t0)
        options["jumps"] = Jumps(jnp.zeros(0), jumps.change)  # the times are those of a subject
    population = Population(
        f=arguments.f, y0=y0 if callable(y0) else None, t0=t0, observe=arguments.observe,
        noise=noise, places=places,
        correlated=arguments.correlated, template=template,
        args=as_data(arguments.args, (t0, times.max())),
        subjects=Experiment(times, ys, states, rows, doses), options=options,
    )  # fmt: skip
    _check_shapes(population)
    root = deviations
    if arguments.correlated:
        root = jnp.diag(deviations)[jnp.tril_indices(len(places))]
    flat = ravel_pytree(template)[0]
    if "atol" not in options:
        population = with_atol(population, ys, 1, flat[None])
    theta = np.asarray(jnp.concatenate([flat, root, jnp.zeros(int(noise is None), times.dtype)]))
    return population, with_noise_of_residuals(population, theta)


def _observations(arguments: PopulationArguments) -> tuple[Array, Array, Array]:
    """The times `[subjects, times]` and values of the observations, and the initial time."""
    check_number("t0", arguments.t0, TIME, kind="time")
    dtype = jnp.result_type(float)
    exact, values = numbers("ts", arguments.ts), numbers("ys", arguments.ys)
    times, ys, t0 = (floating(x).astype(dtype) for x in (exact, values, arguments.t0))
    if times.ndim == 1 and ys.ndim >= 2:
        times = jnp.broadcast_to(times[None], (len(ys), len(times)))
    if times.ndim != 2 or ys.shape[:2] != times.shape or not times.size:
        raise ValueError(
            f"{arg('ys')} must be [subjects, times, ...] for ts [times] or [subjects, times]; got "
            f"shapes {ys.shape} and {jnp.shape(arguments.ts)}."
        )
    check_times(exact, times, t0)
    check_observed(ys)
    return times, ys, t0


def _check_shapes(population: Population) -> None:
    """Raise unless predictions and their noise are like observations: others would broadcast."""
    subject = jax.tree.map(lambda leaf: leaf[0], population.subjects)
    params, shape = population.template, subject.ys.shape
    predicted = jax.eval_shape(population.prediction_of, params, subject)
    if population.observe is not None:
        check_observed_shape(predicted, shape, "its ys")
    elif (got := getattr(predicted, "shape", predicted)) != shape:
        cure = "Let ys and y0 have the same axes after times and subjects, or pass observe."
        if got == (*shape, 1):
            cure = f"Pass {index_with_axis(1 + len(shape))}."
        raise ValueError(
            f"{arg('ys')} of a subject must be like its states, {got}; got {shape}. {cure}"
        )
    if population.noise is not None:
        noise = jax.eval_shape(population.noise, predicted, population.with_args(params))
        check_noise_shape(noise, shape, "the predictions of a subject")


def checked_doses(
    name: str, doses: Array, subjects: int, t0: Array
) -> Float[Array, "subjects jumps"]:
    """The times of the jumps of each subject, which are the argument `name`."""
    if doses.ndim not in (1, 2) or doses.shape[:-1] not in ((), (subjects,)):
        raise ValueError(
            f"{arg(name)} times must be [jumps], or [subjects, jumps] of the {subjects} "
            f"subjects; got shape {doses.shape}."
        )
    doses = jnp.broadcast_to(infinite_padding(jnp, doses), (subjects, doses.shape[-1]))
    from_start = jnp.concatenate([jnp.broadcast_to(t0, (subjects, 1)), doses], axis=1)
    wrong = np.asarray(~(from_start[:, 1:] >= from_start[:, :-1]).all(axis=1))
    first_row(
        wrong,
        lambda i: (
            f"{arg(name)} times must be in order from t0, {t0:g}; got "
            f"{np.asarray(doses[i]).tolist()}{f' for subject {i}' if subjects > 1 else ''}. Sort "
            "them, and pad with infinity."
        ),
    )
    return doses


def cause(population: Population, theta: np.ndarray, i: int) -> str:
    """Why a subject has no finite likelihood, and what to do."""
    no_effects = jnp.zeros(len(population.places), population.t0.dtype)
    subject = jax.tree.map(lambda leaf: leaf[i], population.subjects)
    flat = population.params_of(jnp.asarray(theta), no_effects)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(subject.row)):
        return "Its row_args are not finite: leave the subject out, or fix their source."
    mean, log_noise = np.asarray(population.moments(flat, subject))
    lost = ~np.isnan(subject.ys) & np.isfinite(mean) & ~np.isfinite(log_noise)
    if population.noise is None or not lost.any():
        return "Start nearer, or raise max_steps."
    noise = population.noise(jnp.asarray(mean), population.with_args(population.unravel(flat)))
    noise = np.broadcast_to(noise, mean.shape)
    at = tuple(map(int, np.argwhere(lost)[0]))
    return (
        f"noise is {noise[at]:.4g} for ys{[i, *at]} = {subject.ys[at]:.4g}, where "
        f"{mean[at]:.4g} is predicted. Let it be positive, as with a constant that is added."
    )


def _varying(start: Any, vary: Any) -> tuple[PyTree, Array, Array]:
    """The typical parameters, the places of those that vary in their vector, and the first guess
    of their deviations."""
    start = check_args("start", start)
    if not isinstance(start, dict) or not start:
        raise TypeError(
            f"{arg('start')} must be a dictionary of parameters; got {start!r}. Pass first guesses "
            "by name, such as start={'k': 1.0}."
        )
    if not isinstance(vary, dict) or not vary or not vary.keys() <= start.keys():
        raise ValueError(
            f"{arg('vary')} must be a dictionary of deviations, by names of start, "
            f"{list(start)}; got {vary!r}. Pass such as vary={{{next(iter(start))!r}: 0.3}}."
        )
    dtype = jnp.result_type(float)
    template = jax.tree.map(lambda leaf: floating(leaf).astype(dtype), start)
    check_finite({"start": template})
    marks = {}
    for name, tree in template.items():
        size = non_negative("vary", vary[name]) if name in vary else 0.0
        if name in vary and not size > 0:
            raise ValueError(f"{arg('vary')} must be positive deviations; got {size} for {name!r}.")
        marks[name] = jax.tree.map(lambda leaf, size=size: jnp.full(leaf.shape, size), tree)
    flat = ravel_pytree(marks)[0].astype(dtype)
    places = jnp.asarray(np.flatnonzero(np.asarray(flat)))
    return template, places, flat[places]


def with_noise_of_residuals(population: Population, theta: np.ndarray) -> np.ndarray:
    """Let the noise be the root-mean-square residual without effects, unless it is a function."""
    if population.noise is not None:
        return theta
    no_effects = jnp.zeros(len(population.places), population.t0.dtype)
    flat = population.params_of(jnp.asarray(theta), no_effects)
    mean, _ = jax.vmap(population.moments, (None, 0), 1)(flat, population.subjects)
    residuals = np.asarray(population.subjects.ys - mean)
    mask = np.isfinite(residuals)
    square, largest = (
        np.sum(np.asarray(x)[mask] ** 2) / max(mask.sum(), 1)
        for x in (residuals, population.subjects.ys)
    )
    square = max(square, np.finfo(residuals.dtype).eps ** 2 * largest)
    return np.append(theta[:-1], 0.5 * math.log(square or 1.0))
