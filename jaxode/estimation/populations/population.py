"""Parameters of an ODE of which each subject has its own: nonlinear mixed effects."""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import (
    check_args,
    check_bool,
    check_number,
    check_state,
    floating,
    integer,
    non_negative,
    numbers,
    takes,
)
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import SolveError
from jaxode._checks.rules import TIME
from jaxode._checks.samples import check_finite, check_rows
from jaxode._checks.times import infinite_padding
from jaxode._jax.closure import compiled
from jaxode.estimation.observed.bounds import names
from jaxode.estimation.observed.observations import as_data, broadcasts, check_observed, check_times
from jaxode.estimation.observed.tolerances import (
    positive,
    rough,
    sizes_of_states,
    spreads,
    tolerances,
)
from jaxode.estimation.populations.marginal import Population, Subject
from jaxode.estimation.populations.maximum import Maximum, PopulationLikelihood
from jaxode.estimation.search.progress_lines import as_text
from jaxode.ode.field import VectorField, check_field
from jaxode.ode.pieces import check_jumps
from jaxode.ode.solve import solve

ZERO = 0.01  # of its standard error, below which a deviation has ended at zero
TAKEN = "f", "y0", "t0", "t1", "args", "batch", "row_args", "ts", "adjoint", "throw"  # of `solve`


class PopulationEstimate(eqx.Module):
    """What a population shares, and each of its subjects."""

    params: PyTree[Array]
    """The typical parameters: those of the population, and the median of those that vary."""
    errors: PyTree[Array]
    """Their standard errors; NaN for what the observations do not determine, which is named in a
    warning."""
    deviations: dict[str, Array]
    """The standard deviation between subjects of each parameter that varies."""
    deviation_errors: dict[str, Array]
    """Their standard errors, with NaN as in `errors`; rough where a deviation is near zero."""
    correlation: Float[Array, "q q"]
    """Between parameters that vary, in the order of `jax.tree.leaves(deviations)`."""
    noise: Float[Array, ""] | None
    """The standard deviation of an observation; None if `noise` is a function."""
    subjects: PyTree[Array]
    """The likeliest parameters of each subject, `[subjects, ...]`."""
    shrinkage: dict[str, Array]
    """One minus the standard deviation of the subjects' effects by that of the population. Near
    one, the observations of a subject say little about its own parameter."""
    nll: Float[Array, ""]
    """Minus the log-likelihood by Laplace's method, with all constants."""
    covariance: Float[Array, "p p"]
    """Of the typical parameters as one vector, then of the deviations (with `correlated`, of the
    lower triangle of the root of the covariance), then of the logarithm of the noise."""
    converged: Bool[Array, ""]
    """Whether the search ended at its tolerance, and the observations determine all parameters."""
    _observed: int = eqx.field(static=True)

    def __repr__(self) -> str:
        tables = [
            [("estimate", self.params), ("error", self.errors)],
            [
                ("deviation", self.deviations),
                ("error", self.deviation_errors),
                ("shrinkage", self.shrinkage),
            ],
        ]
        text = as_text("PopulationEstimate", self.converged, {"nll": self.nll}, tables)
        return text or super().__repr__()

    @property
    def aic(self) -> Float[Array, ""]:
        """Akaike's criterion: `2 * nll` and two for each parameter of the population."""
        return 2 * self.nll + 2 * len(self.covariance)

    @property
    def bic(self) -> Float[Array, ""]:
        """The Bayesian criterion, by the number of observations."""
        return 2 * self.nll + len(self.covariance) * math.log(self._observed)


@public("estimate_population")
def estimate_population(
    f: VectorField,
    y0: PyTree[Float[Array, "subjects ..."]] | Callable[..., PyTree],
    ts: Float[Array, " times"] | Float[Array, "subjects times"],
    ys: Float[Array, "subjects times ..."],
    start: dict[str, Float[Array, "..."]],
    vary: dict[str, float],
    *,
    t0: float | Float[Array, ""] = 0.0,
    observe: Callable[[Array, PyTree, PyTree], Array] | None = None,
    noise: Callable[[Array, PyTree], Array] | None = None,
    args: PyTree = None,
    row_args: PyTree = None,
    correlated: bool = False,
    steps: int = 200,
    **options: Any,
) -> PopulationEstimate:
    """Estimate typical parameters and their spread between subjects by maximum likelihood.

    Subject `i` has the parameters `params + effects[i]`, and the effects are normal: let positive
    parameters be logarithms, whose effects are factors. The likelihood of each subject is
    integrated over its effects by Laplace's method with the expected Hessian, which is first-order
    conditional estimation with interaction (FOCEI). It is exact for models that are linear in the
    effects and have constant noise. Gradients are exact. The search is damped Fisher scoring, of
    populations of more than 50 by some of the subjects first; it ends by steps of Newton's method.
    Standard errors are of that Hessian, by differences of gradients.

    Args:
        f: vector field `f(t, y, params)`, or `f(t, y, (params, row))` with `row_args`.
        y0: states at `t0`, `[subjects, ...]`, or a function `y0(params)` or, with `row_args`,
            `y0(params, row)` of one subject.
        ts: times of the observations, `[subjects, times]`, in order, or `[times]` for all.
        ys: observations, `[subjects, times, ...]`. NaN where one is missing.
        start: first guess of the typical parameters, a dictionary of arrays.
        vary: the parameters that vary between subjects, by name, with a first guess of their
            standard deviation.
        t0: the time of `y0`.
        observe: what is observed, `observe(t, y, params)`; with `row_args`, of `(params, row)`. By
            default the state.
        noise: the standard deviation of an observation, `noise(predicted, params)`, such as
            `jnp.exp(params["part"]) * predicted`. By default one number, which is estimated.
        args: data that change from call to call, a pytree: with it, all functions get the pair
            `(params, args)` in place of `params`. Others of the same shapes compile nothing anew.
        row_args: arguments of each subject, `[subjects, ...]`, such as its dose.
        correlated: whether to estimate correlations between the parameters that vary.
        steps: of the search.
        options: of `jaxode.solve`, such as `solver`, `max_steps`, and `jumps`, doses with times
            `[jumps]` or `[subjects, jumps]`. `rtol` is 1e-6, or 1e-5 in single precision, and
            `atol` is `rtol` times the size of each number of the state.

    Returns:
        A `PopulationEstimate`.

    Raises:
        TypeError, ValueError: for an invalid argument.
        SolveError: if a subject cannot be solved at the start.

    Warns:
        UserWarning: if the search has not converged, the observations do not determine parameters,
            or a deviation ended at zero, by their names.

    References:
        Lindstrom and Bates 1990, doi:10.2307/2532087; Wang 2007, doi:10.1007/s10928-007-9060-6.
    """
    population, theta = _posed(
        _Given(f, y0, ts, ys, start, vary, t0, observe, noise, args, row_args, correlated, options)
    )
    steps = integer("steps", steps, least=0)
    likelihood = PopulationLikelihood(population, theta)
    begun = likelihood.at(theta)
    if not (solved := np.isfinite(begun.values)).all():
        i = int(np.argmin(solved))
        raise SolveError(
            f"{arg('start')} must be such that each subject can be solved; subject {i} has no "
            f"finite likelihood. {_cause(population, theta, i)}"
        )
    likelihood.take_units(theta, begun.information)
    if len(likelihood.parts) > 1:
        theta = likelihood.minimized(theta, steps, parts=1)
    theta = likelihood.minimized(theta, steps)
    return _described(population, likelihood.polished(theta), likelihood)


def _described(
    population: Population, found: Maximum, likelihood: PopulationLikelihood
) -> PopulationEstimate:
    theta, nll, covariance, converged, free = found
    flat, root, log_noise = population.split(jnp.asarray(theta))
    unravel = population.unravel
    n = population.shared
    between = root @ root.T
    deviations = jnp.sqrt(jnp.diag(between))

    # The delta method, of the rows of the root.
    def rooted(theta):
        squares = jnp.sum(population.split(theta)[1] ** 2, axis=1)
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)

    slopes = np.asarray(jax.jacfwd(rooted)(jnp.asarray(theta)))
    unknown = np.isnan(np.diag(covariance))
    variances = np.diag(slopes @ np.where(np.isnan(covariance), 0.0, covariance) @ slopes.T)
    of_deviations = np.sqrt(np.where((slopes[:, unknown] != 0).any(axis=1), np.nan, variances))
    errors = np.sqrt(np.diag(covariance)[:n])
    # Of effects in units of the deviation, as those of a deviation of zero are, too.
    directions = root / jnp.where(deviations > 0, deviations, 1.0)[:, None]
    shrunk = 1 - jnp.std(likelihood.effects @ directions.T, axis=0)
    if free.any():
        names_of_free = ", ".join(np.array(_names(population))[free])
        warnings.warn(
            f"estimate_population: the observations do not determine {names_of_free}: the "
            "likelihood hardly changes with them, and they have no errors. Leave them out, or let "
            f"fewer parameters vary.{'' if converged else ' Nor did the search converge.'}",
            stacklevel=4,
        )
    elif not converged:
        warnings.warn(
            "estimate_population: the search did not converge. Start nearer, such as where "
            "jaxode.estimate of all subjects as one ends, let fewer parameters vary, or raise "
            "steps.",
            stacklevel=4,
        )

    none = np.asarray(deviations) <= ZERO * of_deviations
    if none.any():
        varying = np.array(names(population.template))[np.asarray(population.places)]
        warnings.warn(
            f"estimate_population: the deviation of {', '.join(varying[none])} ended at zero: the "
            "observations show no difference between subjects in it. Leave it out of vary.",
            stacklevel=4,
        )

    def params_of(z):
        return unravel(population.params_of(jnp.asarray(theta), z))

    def named(values):
        return _at_places(population, values)

    return PopulationEstimate(
        params=unravel(flat),
        errors=unravel(jnp.asarray(errors)),
        deviations=named(deviations),
        deviation_errors=named(jnp.asarray(of_deviations)),
        correlation=directions @ directions.T,
        noise=jnp.exp(log_noise[0]) if len(log_noise) else None,
        subjects=jax.vmap(params_of)(likelihood.effects),
        shrinkage=named(shrunk),
        nll=jnp.asarray(nll),
        covariance=jnp.asarray(covariance),
        converged=jnp.asarray(converged and not free.any()),
        _observed=int((~np.isnan(np.asarray(population.subjects.ys))).sum()),
    )


def _names(population: Population) -> list[str]:
    """Of all that is estimated, in the order of `theta`."""
    typical = names(population.template)
    varying = [typical[i] for i in population.places.tolist()]
    spread = [f"deviation of {name}" for name in varying]
    if population.correlated:
        rows, columns = np.tril_indices(len(varying))
        spread = [f"root[{i}, {j}] of the covariance" for i, j in zip(rows, columns, strict=True)]
    return typical + spread + ["noise"] * (population.noise is None)


def _at_places(population: Population, values: Float[Array, " q"]) -> dict[str, Array]:
    """Values of the parameters that vary, by name."""
    none = jnp.zeros(population.shared, values.dtype)
    varies = population.unravel(none.at[population.places].set(1.0))
    tree = population.unravel(none.at[population.places].set(values))
    return {name: leaf for name, leaf in tree.items() if bool(varies[name].all())}


class _Given(NamedTuple):
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


def _posed(given: _Given) -> tuple[Population, np.ndarray]:
    """The checked population, and the first guess of all that is estimated."""
    f, y0, ts, ys, start, vary, t0, observe, noise, args, row_args, correlated, options = given
    check_field("f", f, "f(t, y, params)")
    check_bool("correlated", correlated)
    _check_functions(observe, noise, options)
    template, places, deviations = _varying(start, vary)
    check_number("t0", t0, TIME, kind="time")
    dtype = jnp.result_type(float)
    exact = numbers("ts", ts)
    times, seen, t0 = (floating(x).astype(dtype) for x in (exact, numbers("ys", ys), t0))
    if times.ndim == 1 and seen.ndim >= 2:
        times = jnp.broadcast_to(times[None], (len(seen), len(times)))
    if times.ndim != 2 or seen.shape[:2] != times.shape or not times.size:
        raise ValueError(
            f"{arg('ys')} must be [subjects, times, ...] for ts [times] or [subjects, times]; got "
            f"shapes {seen.shape} and {jnp.shape(ts)}."
        )
    check_times(exact, times, t0)
    check_observed(seen)
    rows = None if row_args is None else check_rows("row_args", row_args, len(times))
    states = None if callable(y0) else check_rows("y0", check_state("y0", y0), len(times))
    jumps, doses = options.pop("jumps", None), None
    if jumps is not None:
        doses = _doses(floating(jumps.times).astype(dtype), times, t0)
    options = {"rtol": 1e-6 if dtype == jnp.float64 else 1e-5, **options}
    subjects = Subject(times, seen, states, rows, doses)
    population = Population(
        f=f, y0=y0 if callable(y0) else None, t0=t0, observe=observe, noise=noise,
        change=None if jumps is None else jumps.change, places=places, correlated=correlated,
        template=template, args=as_data(args, (t0, times.max())), subjects=subjects,
        options=options,
    )  # fmt: skip
    _check_shapes(population)
    root = jnp.diag(deviations)[jnp.tril_indices(len(places))] if correlated else deviations
    flat = ravel_pytree(template)[0]
    if "atol" not in options:
        atol = _tolerances(population, flat)
        population = dataclasses.replace(population, options={**options, "atol": atol})
    theta = [flat, root] if noise is not None else [flat, root, jnp.zeros(1, dtype)]
    theta = np.asarray(jnp.concatenate(theta))
    return population, _with_noise(population, theta) if noise is None else theta


def _tolerances(population: Population, flat: Float[Array, " n"]) -> PyTree[Array]:
    """The absolute tolerance of each number of the state, by the observations of it or, if there
    are none, by a rough solve from the start."""
    ys = np.asarray(population.subjects.ys, float)
    if population.observe is None and (~np.isnan(ys)).any(axis=(0, 1)).all():
        sizes = positive(spreads(ys, 1, (0, 1)))
    else:
        sizes = sizes_of_states(*_states(population, flat))
    return tolerances(population.options["rtol"], sizes, population.t0.dtype)


@compiled
def _states(population: Population, flat: Float[Array, " n"]) -> tuple[PyTree, PyTree]:
    """Where the state of each subject begins and what it comes to, with an axis of one start."""

    def each(subject):
        y0 = population.start(flat, subject)
        options = rough(population.options, y0, rows=False)
        return y0, dataclasses.replace(population, options=options).states(flat, subject)

    found = jax.lax.map(each, population.subjects)
    return jax.tree.map(lambda leaf: leaf[None], found)


def _check_shapes(population: Population) -> None:
    """Raise unless predictions and their noise are like observations: others would broadcast."""
    subject = jax.tree.map(lambda leaf: leaf[0], population.subjects)
    flat, shape = ravel_pytree(population.template)[0], subject.ys.shape
    found = jax.eval_shape(population.predicted, flat, subject)
    got = getattr(found, "shape", found)
    if got != shape and population.observe is not None:
        raise ValueError(
            f"{arg('observe')} must return one observation, so that those of a subject are like "
            f"its ys, {shape}; got {got}."
        )
    if got != shape:
        cure = "Let ys and y0 have the same axes after times and subjects, or pass observe."
        if got == (*shape, 1):
            cure = f"Pass ys[{', '.join(':' * (1 + len(shape)))}, None], since y0 is an array."
        raise ValueError(
            f"{arg('ys')} of a subject must be like its states, {got}; got {shape}. {cure}"
        )
    if population.noise is None:
        return
    noise = jax.eval_shape(population.noise, found, population.given(flat))
    got = getattr(noise, "shape", noise)
    if not (isinstance(got, tuple) and broadcasts(got, shape)):
        raise ValueError(
            f"{arg('noise')} must return what broadcasts with the predictions of a subject, "
            f"{shape}; got {got}."
        )


def _doses(doses: Array, times: Array, t0: Array) -> Float[Array, "subjects jumps"]:
    """The times of jumps, with infinity for those after the last observation of a subject."""
    if doses.ndim not in (1, 2) or doses.shape[:-1] not in ((), (len(times),)):
        raise ValueError(
            f"{arg('jumps')} times must be [jumps], or [subjects, jumps] of the {len(times)} "
            f"subjects; got shape {doses.shape}."
        )
    doses = jnp.broadcast_to(infinite_padding(jnp, doses), (len(times), doses.shape[-1]))
    from_start = jnp.concatenate([jnp.broadcast_to(t0, (len(times), 1)), doses], axis=1)
    wrong = np.asarray(~(from_start[:, 1:] >= from_start[:, :-1]).all(axis=1))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"{arg('jumps')} times must be in order from t0, {t0:g}; got "
            f"{np.asarray(doses[i]).tolist()} for subject {i}. Sort them, and pad with infinity."
        )
    return jnp.where(doses > times[:, -1:], jnp.inf, doses)


def _cause(population: Population, theta: np.ndarray, i: int) -> str:
    """Why a subject has no finite likelihood, and what to do."""
    none = jnp.zeros(len(population.places), population.t0.dtype)
    subject = jax.tree.map(lambda leaf: leaf[i], population.subjects)
    flat = population.params_of(jnp.asarray(theta), none)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(subject.row)):
        return "Its row_args are not finite: leave the subject out, or fix their source."
    mean, log_noise = np.asarray(population.moments(flat, subject))
    lost = ~np.isnan(subject.ys) & np.isfinite(mean) & ~np.isfinite(log_noise)
    if population.noise is None or not lost.any():
        return "Start nearer, or raise max_steps."
    noise = population.noise(jnp.asarray(mean), population.given(flat))
    noise = np.broadcast_to(noise, mean.shape)
    at = tuple(map(int, np.argwhere(lost)[0]))
    return (
        f"noise is {noise[at]:.4g} for ys{[i, *at]} = {subject.ys[at]:.4g}, where "
        f"{mean[at]:.4g} is predicted. Let it be positive, as with a constant that is added."
    )


def _check_functions(observe, noise, options) -> None:
    """Raise for functions that cannot be called as they will be, and for other options."""
    for name, function, call in (
        ("observe", observe, ("t", "y", "params")),
        ("noise", noise, ("predicted", "params")),
    ):
        if function is not None and not (callable(function) and takes(function, *call)):
            got = inspect.signature(function) if callable(function) else repr(function)
            raise TypeError(f"{arg(name)} must be a function ({', '.join(call)}); got {got}.")
    known = inspect.signature(solve).parameters
    if wrong := [name for name in options if name in TAKEN or name not in known]:
        raise TypeError(f"{arg(wrong[0])} is not an option of estimate_population. Leave it out.")
    check_jumps(options.get("jumps"))


def _varying(start: Any, vary: Any) -> tuple[PyTree, Array, Array]:
    """The typical parameters, and of those that vary the places and the deviations."""
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


def _with_noise(population: Population, theta: np.ndarray) -> np.ndarray:
    """With the noise that the start leaves, for which no effects are needed."""
    none = jnp.zeros(len(population.places), population.t0.dtype)
    flat = population.params_of(jnp.asarray(theta), none)
    mean, _ = jax.vmap(population.moments, (None, 0), 1)(flat, population.subjects)
    apart = np.asarray(population.subjects.ys - mean)
    seen = np.isfinite(apart)
    square, most = (
        np.sum(np.asarray(x)[seen] ** 2) / max(seen.sum(), 1)
        for x in (apart, population.subjects.ys)
    )
    square = max(square, np.finfo(apart.dtype).eps ** 2 * most)
    return np.append(theta[:-1], 0.5 * math.log(square or 1.0))
