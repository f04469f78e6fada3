"""Parameters of an ODE from noisy observations, from one or from many first guesses."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import check_not_traced
from jaxode._checks.caller import public
from jaxode.estimation.best_fit import best_fit, precision_of, warn_of_fit
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.observed.observations import EstimateArguments, posed
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.observed.user_functions import check_options
from jaxode.estimation.prediction import Band, predicted_band
from jaxode.estimation.profiles import Profile
from jaxode.estimation.search.levenberg_marquardt import search_budget
from jaxode.estimation.search.multistart import searched
from jaxode.estimation.search.progress_lines import as_text
from jaxode.estimation.search.starts import MultiStart, Outcomes, outcome_of_starts
from jaxode.estimation.uncertainty import nll_of
from jaxode.ode.field import VectorField

# Arguments of `solve` that `estimate` sets itself, or that are of no use to it.
NOT_OPTIONS_OF_ESTIMATE = (
    "f", "y0", "t0", "t1", "args", "batch", "row_args", "ts", "adjoint", "throw", "dense", "event",
    "axis_name", "steps", "mass",
)  # fmt: skip


class Estimate(eqx.Module):
    """Parameters that fit observations best."""

    params: PyTree[Array]
    """The likeliest parameters, shaped like one of `starts`."""
    cost: Float[Array, ""]
    """Half the sum of squares, or what stands for it: with known noise, minus the log-likelihood
    above that of a perfect fit, and half the squares of the prior. With a function of noise, or a
    likelihood of your own, `nll` and half the squares of the prior."""
    nll: Float[Array, ""]
    """Minus the log-likelihood, with all constants, without the prior. NaN with `residual`, whose
    constants are not known."""
    covariance: Float[Array, "n n"]
    """Covariance of the parameters as one vector, in the order of `jax.tree.leaves(params)`."""
    errors: PyTree[Array]
    """The standard error of each parameter: infinite where the observations do not determine it,
    NaN at a bound, or if equal bounds fix it."""
    noise: Float[Array, "..."] | None
    """The noise: as given, at these parameters, or what the residuals say. None for Poisson's
    likelihood, one of your own, and `residual`."""
    starts: PyTree[Array]
    """The end of each start, `[starts, ...]`; NaN where it could not be solved."""
    costs: Float[Array, " starts"]
    """`cost` where each start ended; infinite where it could not be solved."""
    converged: Bool[Array, ""]
    """Whether the search ended at its tolerance or, if the observations do not determine all
    parameters, with less than 0.01 nats to gain."""
    _unbounded: Float[Array, "n n"]
    """The covariance as if no parameter had come to a bound; `covariance` if the others are
    determined by bounds alone."""
    _problem: ObservedODE
    _bounds: Bounds
    _together: int = eqx.field(static=True)
    """How many starts were rows of one solve."""
    _counts: tuple[int, int] = eqx.field(static=True)
    """The number of parameters, with the noise if the residuals say it, and of observations."""

    def __repr__(self) -> str:
        measures = {"cost": self.cost, "nll": self.nll}
        table = [("estimate", self.params), ("error", self.errors)]
        return as_text("Estimate", self.converged, measures, [table]) or super().__repr__()

    @property
    def aic(self) -> Float[Array, ""]:
        """Akaike's criterion: `2 * nll` and two for each parameter, the noise too if the residuals
        say it."""
        return 2 * self.nll + 2 * self._counts[0]

    @property
    def bic(self) -> Float[Array, ""]:
        """The Bayesian criterion: `2 * nll` and the logarithm of the number of observations for
        each parameter, the noise too if the residuals say it."""
        return 2 * self.nll + self._counts[0] * math.log(self._counts[1])

    @public("predict")
    def predict(self, ts: Float[Array, " times"] | Float[Array, "rows times"]) -> Band:
        """Predict what is observed at other times, without noise.

        Args:
            ts: times, `[times]`, in order, not before `t0`; or `[rows, times]` of the experiments.

        Returns:
            `mean`, and `low` and `high`, which hold 95% of predictions for parameters as uncertain
            as estimated, by the delta method. A parameter at a bound is as uncertain as if it had
            none, which is rather too much, unless others are determined by that bound. They are
            infinite where the observations do not determine what is predicted.

        Raises:
            TypeError, ValueError: if `ts` are not such times, or beyond the knots of an input.
            SolveError: if the solve fails.
        """
        return predicted_band(self._problem, self.params, self._unbounded, ts)

    @public("profile")
    def profile(
        self,
        where: str | Callable[[PyTree], Array],
        values: Float[Array, " values"],
        *,
        seconds: float | None = None,
        progress: bool = False,
    ) -> tuple[Float[Array, " values"], PyTree[Array]]:
        """Hold a parameter, or a function of some, at each of `values`, and estimate again.

        Where the first result is below 3.84, the value is in the confidence interval of 95%
        (Raue et al. 2009, doi:10.1093/bioinformatics/btp358). A profile that stays flat is a
        parameter that the observations do not determine. The noise is that of the estimate. Below
        zero, the value has led to better parameters than the estimate.

        Args:
            where: which parameter, by name, as `"k"`, or as `lambda params: params["k"][0]`; or a
                smooth function, as `lambda params: params["beta"] / params["gamma"]`. A function is
                held to a hundred-thousandth of its standard error.
            values: of it, `[values]`.
            seconds: wall-clock time, without limit by default. It does not count compilation. Those
                nearest to the estimate come first; Ctrl-C keeps these, too.
            progress: write lines on stderr.

        Returns:
            Twice the log-likelihood ratio of each value against the estimate, infinite where it was
            not reached or is beyond `bounds`, and the parameters there, `[values, ...]`.

        Raises:
            TypeError, ValueError: if `where` is not one number with a slope at the estimate.
        """
        budget = search_budget(None, seconds, progress)
        flat, unravel = ravel_pytree(self.params)
        unit = self._problem.unit
        noise = self.noise if self._problem.estimated else None
        scale = 1.0 if noise is None else (unit / noise) ** 2
        covariance = scale * self.covariance
        profile = Profile(self._problem, self._bounds, self._together, flat, covariance, where)
        flats, costs = profile.at(values, budget)
        ratio = 2 * scale * (jnp.asarray(costs, flat.dtype) - self.cost / unit**2)
        return ratio, jax.vmap(unravel)(jnp.asarray(flats, flat.dtype))


@public("estimate")
def estimate(
    f: VectorField,
    y0: PyTree[Float[Array, "..."]] | Callable[[PyTree], PyTree],
    ts: Float[Array, " times"] | Float[Array, "rows times"],
    ys: Float[Array, "times ..."] | Float[Array, "rows times ..."],
    starts: PyTree[Float[Array, "starts ..."]],
    *,
    t0: float | Float[Array, ""] = 0.0,
    observe: Callable[[Array, PyTree, PyTree], Array] | None = None,
    likelihood: str | Callable[[Array, Array, PyTree], Array] | None = None,
    noise: float | Float[Array, "..."] | Callable[..., Array] | None = None,
    residual: Callable[..., Array] | None = None,
    prior: Callable[[PyTree], PyTree] | None = None,
    bounds: tuple[PyTree, PyTree] | None = None,
    match: bool | None = None,
    args: PyTree = None,
    row_args: PyTree = None,
    seconds: float | None = None,
    steps: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Estimate:
    """Estimate the parameters of `dy/dt = f(t, y, params)` by maximum likelihood.

    From each start, slopes of smoothed observations are matched by the field, which needs no solve
    and rarely gets stuck; starts that fit the first observations go on, too. Then
    Levenberg-Marquardt, with derivatives in forward mode, fits a sixteenth of the observations, an
    eighth, and so on to all of them, eight starts at a time, as rows of one solve: a start that
    ends is replaced by the next. Without slopes, or where these led astray, a start is fitted to
    all observations at once, too. Each ends at its better way. Likelihoods other than the normal
    one take the place of squares by their Fisher information (Fisher scoring). Ctrl-C ends the
    search with the best so far. Let positive parameters be logarithms, or give bounds.

    Args:
        f: vector field `f(t, y, params)`, or `f(t, y, (params, row))` with `row_args`.
        y0: state at `t0`, or a function `y0(params)` that returns it. With `row_args`, it may be
            `y0(params, row)`, the state of one row.
        ts: times of the observations, `[times]`, in order; or of several experiments, `[rows,
            times]`, each with its own state `y0`, `[rows, ...]`.
        ys: observations, `[times, ...]` or `[rows, times, ...]`. NaN where one is missing.
        starts: first guesses of the parameters, a pytree of arrays `[starts, ...]`.
        t0: the time of `y0`.
        observe: what is observed, `observe(t, y, params)`; with `row_args`, of `(params, row)`. By
            default the state.
        likelihood: "normal" by default; "log_normal", whose median is predicted; "laplace";
            "poisson" or "negative_binomial", whose mean is predicted; or `likelihood(predicted,
            observed, params)`, the log-density of each observation, shaped like `ys`.
        noise: standard deviation of the observations (of their logarithms if log-normal), their
            mean distance (Laplace), or the size k (negative binomial: the variance is `mean +
            mean**2 / k`), shaped to broadcast with one of `ys`. Or a function `noise(params)` or
            `noise(params, row)` of what is estimated, too: until all observations are fitted, it
            stays at the start. By default it is one number, which the residuals say.
        residual: `residual(predicted, observed)`, or of `(predicted, observed, params)`, whose half
            squares are negative log-densities up to a constant, in place of their difference by
            the noise: in units of its deviations.
        prior: residuals of the parameters, such as `lambda p: (p - mean) / deviation`.
        bounds: `(low, high)`, each a number or a pytree like one of `starts`; infinite where there
            is none. They hold at each step. Equal ones fix a parameter, which does not count.
        match: whether to match slopes first. By default, if the state is observed, without
            `jumps`, and the solver is not one for stiff fields, whose slopes a spline does not
            resolve.
        args: data that change from call to call, a pytree: with it, all functions get the pair
            `(params, args)` in place of `params`. Others of the same shapes compile nothing anew.
        row_args: arguments of each experiment, `[rows, ...]`.
        seconds: wall-clock time of the search, without limit by default. It does not count
            compilation. The search ends late by up to ten steps of eight starts and an evaluation
            of each.
        steps: of the search on all observations, 200 by default.
        progress: write lines on stderr.
        options: of `jaxode.solve`, such as `solver`, `breakpoints`, `jumps`, `max_steps`. `rtol`
            is 1e-6, or 1e-5 in single precision, and `atol` is `rtol` times the size of each number
            of the state: the spread of its observations or, with `observe`, the least that solves
            from the starts come to.

    Returns:
        An `Estimate`.

    Raises:
        TypeError, ValueError: for an invalid argument.
        SolveError: if no start can be solved.

    Warns:
        UserWarning: of parameters that the observations do not determine; of those that ended at a
            bound; of starts that end at different parameters with the same cost; of residuals that
            are larger than a known noise says; and if the search has not converged.
    """
    check_not_traced("chooses among starts", starts, ts, ys)
    budget = search_budget(steps, seconds, progress)
    check_options(options, NOT_OPTIONS_OF_ESTIMATE)
    problem, flats, bounds = posed(
        EstimateArguments(
            f, y0, ts, ys, starts, t0, observe, likelihood, noise, residual, prior, bounds,
            args, row_args, options,
        )
    )  # fmt: skip
    return _described(*searched(problem, flats, bounds, budget, match))


def _described(search: MultiStart, outcomes: Outcomes) -> Estimate:
    """The estimate where the best run ended. Warns if something is wrong with it."""
    problem, dtype = search.problem, search.problem.ts.dtype
    fit = best_fit(search, outcomes)
    precision = precision_of(search, fit)
    starts, costs = outcome_of_starts(outcomes)
    warn_of_fit(search, fit, precision, starts, costs)
    unit = float(problem.unit) ** 2
    return Estimate(
        params=fit.params,
        cost=jnp.asarray(fit.cost * unit, dtype),
        nll=nll_of(problem, fit.params, fit.cost, fit.observations),
        covariance=jnp.asarray(precision.covariance, dtype),
        errors=problem.unravel(jnp.asarray(precision.errors, dtype)),
        noise=fit.noise,
        starts=jax.vmap(problem.unravel)(jnp.asarray(starts, dtype)),
        costs=jnp.asarray(costs * unit, dtype),
        converged=jnp.asarray(precision.converged),
        _unbounded=jnp.asarray(precision.unbounded, dtype),
        _problem=problem,
        _bounds=search.bounds,
        _together=search.size,
        _counts=(fit.parameters, fit.observations),
    )
