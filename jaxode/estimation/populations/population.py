"""Parameters of an ODE of which each subject has its own: nonlinear mixed effects."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import check_bool
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import SolveError
from jaxode.estimation.observed.bounds import Bounds, checked_bounds, names
from jaxode.estimation.populations.marginal import Population
from jaxode.estimation.populations.maximum import Maximum, PopulationLikelihood
from jaxode.estimation.populations.new_subject import band_of_new_subject, posed_subject
from jaxode.estimation.populations.pooled import fitted_as_one
from jaxode.estimation.populations.population_arguments import (
    PopulationArguments,
    cause,
    posed_population,
    with_noise_of_residuals,
)
from jaxode.estimation.populations.population_profile import profile_of_population
from jaxode.estimation.prediction import Band
from jaxode.estimation.search.levenberg_marquardt import search_budget
from jaxode.estimation.search.progress_lines import as_text
from jaxode.ode.field import VectorField
from jaxode.training.budget import Budget

# A deviation has ended at zero if it is below this part of its standard error.
ZERO_DEVIATION = 0.01


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
    _population: Population
    _theta: Float[Array, " p"]
    """All that is estimated, in the order of `covariance`."""
    _bounds: Bounds
    """The bounds of the typical parameters."""

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

    @public("predict")
    def predict(
        self,
        ts: Float[Array, " times"],
        *,
        y0: PyTree[Float[Array, "..."]] = None,
        row_args: PyTree = None,
        doses: Float[Array, " jumps"] | None = None,
    ) -> Band:
        """Predict what is observed of a new subject, without noise.

        Args:
            ts: times, `[times]`, in order, not before `t0`.
            y0: the state of the subject at `t0`, if those of the population were arrays.
            row_args: the subject's row, if the population has rows.
            doses: the times of its jumps, `[jumps]`, if the population has jumps.

        Returns:
            `mean`, the mean over subjects, and `low` and `high`, between which 95% of them are.
            These are of 2048 subjects, drawn by Sobol's sequence, the same at each call; each has
            typical parameters and deviations as uncertain as estimated. Parameters at a bound are
            held there, as are those that the observations do not determine.

        Raises:
            TypeError, ValueError: for an invalid argument.
            SolveError: if a subject that is drawn cannot be solved.
        """
        subject = posed_subject(self._population, ts, y0, row_args, doses)
        return band_of_new_subject(self._population, self._theta, self.covariance, subject)

    @public("profile")
    def profile(
        self,
        where: str | Callable[[PyTree], Array],
        values: Float[Array, " values"],
        *,
        seconds: float | None = None,
        progress: bool = False,
    ) -> tuple[Float[Array, " values"], PyTree[Array]]:
        """Hold a typical parameter at each of `values`, and estimate all others again.

        Where the first result is below 3.84, the value is in the confidence interval of 95%. Below
        zero, the value has led to better parameters than the estimate.

        Args:
            where: which parameter, by name, as `"k"`, or as `lambda params: params["k"][0]`.
            values: of it, `[values]`.
            seconds: wall-clock time, without limit by default. It does not count compilation. Those
                nearest to the estimate come first; Ctrl-C keeps these, too.
            progress: write lines on stderr.

        Returns:
            Twice the log-likelihood ratio of each value against the estimate, to about 0.001,
            infinite where it was not reached or is beyond `bounds`, and the typical parameters
            there, `[values, ...]`.

        Raises:
            TypeError, ValueError: if `where` is not one of the typical parameters.
        """
        flats, nlls = profile_of_population(
            self._population,
            np.asarray(self._theta),
            self._bounds,
            where,
            values,
            search_budget(None, seconds, progress),
        )
        ratio = 2 * (jnp.asarray(nlls, self.nll.dtype) - self.nll)
        return ratio, jax.vmap(self._population.unravel)(jnp.asarray(flats, self.nll.dtype))


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
    bounds: tuple[PyTree, PyTree] | None = None,
    pool: bool = True,
    seconds: float | None = None,
    steps: int | None = None,
    progress: bool = False,
    **options: Any,
) -> PopulationEstimate:
    """Estimate typical parameters and their spread between subjects by maximum likelihood.

    Subject `i` has the parameters `params + effects[i]`, and the effects are normal: let positive
    parameters be logarithms, whose effects are factors. The likelihood of each subject is
    integrated over its effects by Laplace's method with the expected Hessian, which is first-order
    conditional estimation with interaction (FOCEI). It is exact for models that are linear in the
    effects and have constant noise. Gradients are exact. First, all subjects are fitted as one, by
    the search of `jaxode.estimate`; the population begins there, or at `start` if that is likelier.
    The search is damped Fisher scoring, of populations of more than 50 by some of the subjects
    first; it ends by steps of Newton's method. Standard errors are of that Hessian, by differences
    of gradients. Ctrl-C ends the search with the best so far.

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
        bounds: `(low, high)` of the typical parameters, each a number or a dictionary like `start`;
            infinite where there is none. Equal ones fix a parameter. Subjects may vary beyond.
        pool: whether to fit all subjects as one first.
        seconds: wall-clock time of the search, without limit by default. It does not count
            compilation. If it ends early, errors are those of the expected Hessian.
        steps: of each search, 200 by default.
        progress: write lines on stderr.
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
            or a parameter ended at a bound or a deviation at zero, by their names.

    References:
        Lindstrom and Bates 1990, doi:10.2307/2532087; Wang 2007, doi:10.1007/s10928-007-9060-6.
    """
    population, theta = posed_population(
        PopulationArguments(
            f, y0, ts, ys, start, vary, t0, observe, noise, args, row_args, correlated, options
        )
    )
    budget = search_budget(steps, seconds, progress, least_steps=0)
    flat = jnp.asarray(theta[: population.shared])
    vectors = checked_bounds(bounds, population.template, flat[None], "start")
    check_bool("pool", pool)
    likelihood = PopulationLikelihood(population, theta, vectors, budget)
    pooled = None
    if pool and budget.steps:
        pooled = fitted_as_one(population, flat, vectors, budget)
    theta = _begun(likelihood, theta, pooled)
    if len(likelihood.chunks) > 1:
        theta = likelihood.minimized(theta, chunks=1)
    theta = likelihood.minimized(theta)
    maximum = likelihood.polished(theta)
    return _described(population, maximum, likelihood.effects, budget, vectors)


def _begun(
    likelihood: PopulationLikelihood, theta: np.ndarray, pooled: np.ndarray | None
) -> np.ndarray:
    """Where the search of a population begins: at the start of the user, or where all subjects fit
    as one, whichever is likelier. Raises if neither can be solved."""
    population, start = likelihood.population, likelihood.at(theta)
    if pooled is not None:
        other = with_noise_of_residuals(population, np.append(pooled, theta[len(pooled) :]))
        total = likelihood.at(other)
        if np.isfinite(total.values).all() and total.usable and not start.value <= total.value:
            theta, start = other, total
    if not (solved := np.isfinite(start.values)).all():
        i = int(np.argmin(solved))
        raise SolveError(
            f"{arg('start')} must be such that each subject can be solved; subject {i} has no "
            f"finite likelihood. {cause(population, theta, i)}"
        )
    likelihood.take_units(theta, start.information)
    return theta


def _described(
    population: Population,
    maximum: Maximum,
    effects: Float[Array, "subjects q"],
    budget: Budget,
    bounds: Bounds,
) -> PopulationEstimate:
    """The estimate at the maximum of the likelihood. Warns if something is wrong with it."""
    theta, unravel = jnp.asarray(maximum.theta), population.unravel
    flat, root, log_noise = population.split(theta)
    deviations = jnp.sqrt(jnp.diag(root @ root.T))
    # The rows of the root in units of the deviations, also of those that are zero.
    directions = root / jnp.where(deviations > 0, deviations, 1.0)[:, None]
    errors = np.sqrt(np.diag(maximum.covariance)[: population.shared])
    deviation_errors = _deviation_errors(population, maximum)
    _warn(population, maximum, np.asarray(deviations), deviation_errors, budget)

    def params_of(z):
        return unravel(population.params_of(theta, z))

    def named(values):
        return _by_name(population, values)

    return PopulationEstimate(
        params=unravel(flat),
        errors=unravel(jnp.asarray(errors)),
        deviations=named(deviations),
        deviation_errors=named(jnp.asarray(deviation_errors)),
        correlation=directions @ directions.T,
        noise=jnp.exp(log_noise[0]) if len(log_noise) else None,
        subjects=jax.vmap(params_of)(effects),
        shrinkage=named(1 - jnp.std(effects @ directions.T, axis=0)),
        nll=jnp.asarray(maximum.nll),
        covariance=jnp.asarray(maximum.covariance),
        converged=jnp.asarray(maximum.converged and not maximum.undetermined.any()),
        _observed=int((~np.isnan(np.asarray(population.subjects.ys))).sum()),
        _population=population,
        _theta=theta,
        _bounds=bounds,
    )


def _deviation_errors(population: Population, maximum: Maximum) -> Float[np.ndarray, " q"]:
    """Standard errors of the deviations, by the delta method for the rows of the root. NaN for
    those that the observations do not determine."""

    def deviations(theta):
        squares = jnp.sum(population.split(theta)[1] ** 2, axis=1)
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)

    covariance = maximum.covariance
    slopes = np.asarray(jax.jacfwd(deviations)(jnp.asarray(maximum.theta)))
    unknown = np.isnan(np.diag(covariance))
    variances = np.diag(slopes @ np.where(np.isnan(covariance), 0.0, covariance) @ slopes.T)
    return np.sqrt(np.where((slopes[:, unknown] != 0).any(axis=1), np.nan, variances))


def _warn(
    population: Population,
    maximum: Maximum,
    deviations: np.ndarray,
    deviation_errors: np.ndarray,
    budget: Budget,
) -> None:
    """Warn of parameters that are not determined, a search that did not converge, and deviations
    that ended at zero."""
    if maximum.undetermined.any():
        undetermined = ", ".join(np.array(_names(population))[maximum.undetermined])
        also = "" if maximum.converged else " Nor did the search converge."
        warnings.warn(
            f"estimate_population: the observations do not determine {undetermined}: the "
            "likelihood hardly changes with them, and they have no errors. Leave them out, or let "
            f"fewer parameters vary.{also}",
            stacklevel=5,
        )
    elif not maximum.converged:
        warnings.warn(
            f"estimate_population: the search {budget.describe()}. Start nearer, let fewer "
            "parameters vary, or raise steps.",
            stacklevel=5,
        )
    bounded = maximum.at_bound[: population.shared] & maximum.movable[: population.shared]
    if bounded.any():
        stopped = ", ".join(np.array(names(population.template))[bounded])
        warnings.warn(
            f"estimate_population: {stopped} ended at a bound. The standard errors are those of "
            "the others, as if it were fixed there.",
            stacklevel=5,
        )
    zero = deviations <= ZERO_DEVIATION * deviation_errors
    if zero.any():
        varying = np.array(names(population.template))[np.asarray(population.places)]
        warnings.warn(
            f"estimate_population: the deviation of {', '.join(varying[zero])} ended at zero: the "
            "observations show no difference between subjects in it. Leave it out of vary.",
            stacklevel=5,
        )


def _names(population: Population) -> list[str]:
    """The names of all entries of `theta`."""
    typical = names(population.template)
    varying = [typical[i] for i in population.places.tolist()]
    spread = [f"deviation of {name}" for name in varying]
    if population.correlated:
        rows, columns = np.tril_indices(len(varying))
        spread = [f"root[{i}, {j}] of the covariance" for i, j in zip(rows, columns, strict=True)]
    return typical + spread + ["noise"] * (population.noise is None)


def _by_name(population: Population, values: Float[Array, " q"]) -> dict[str, Array]:
    """Values of the parameters that vary, by name."""
    zeros = jnp.zeros(population.shared, values.dtype)
    varies = population.unravel(zeros.at[population.places].set(1.0))
    tree = population.unravel(zeros.at[population.places].set(values))
    return {name: leaf for name, leaf in tree.items() if bool(varies[name].all())}
