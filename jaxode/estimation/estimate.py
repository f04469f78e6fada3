"""Parameters of an ODE from noisy observations, from one or from many first guesses."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import check_not_traced, floating
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_finite
from jaxode.estimation.observations import Given, posed
from jaxode.estimation.residuals import ObservedODE, least_squares, of_observations
from jaxode.estimation.slopes import match_slopes
from jaxode.estimation.starts import (
    FULL_ROUNDS,
    STARTS_AT_ONCE,
    STEPS_PER_ROUND,
    Ends,
    Runs,
    improved,
    with_matched,
)
from jaxode.ode.field import VectorField
from jaxode.ode.solve import solve
from jaxode.ode.solvers.rosenbrock import Rodas5P, Rosenbrock23

# The largest singular value, as a part of the first, of a direction that changes no residual.
NULL_SINGULAR_VALUE = {jnp.dtype("float64"): 1e-7, jnp.dtype("float32"): 1e-4}
NULL_COMPONENT = 1e-3  # the largest component of a null vector in a parameter that is determined
VAGUE_ERROR = 10.0  # warn of standard errors above this, in units of 1 + |parameter|
# Warn of residuals beyond the given noise if their chi-square is this many standard deviations
# above its mean, and this many times the mean: a smaller factor hardly changes standard errors.
UNLIKELY_DEVIATIONS, UNLIKELY_FACTOR = 4.5, 1.2
NOT_OPTIONS = (  # options of `solve` that it sets, or has no use for
    "f", "y0", "t0", "t1", "args", "batch", "row_args", "ts", "adjoint", "throw", "dense", "event",
    "axis_name", "steps", "mass",
)  # fmt: skip


class Estimate(eqx.Module):
    """Parameters that fit observations best."""

    params: PyTree[Array]
    """The parameters with the least squares, shaped like one of `starts`."""
    cost: Float[Array, ""]
    """Half the sum of squares: with known noise, minus the log-likelihood up to a constant."""
    covariance: Float[Array, "n n"]
    """Covariance of the parameters as one vector, in the order of `jax.tree.leaves(params)`."""
    errors: PyTree[Array]
    """The standard error of each parameter; infinite where the observations do not determine it."""
    noise: Float[Array, "..."] | None
    """The standard deviation of the observations: as given, or what the residuals say. None with
    `residual`, which has its own."""
    starts: PyTree[Array]
    """The end of each start, `[starts, ...]`; NaN where a better one replaced it."""
    costs: Float[Array, " starts"]
    """Half the sum of squares where each start ended; infinite where it was given up."""
    converged: Bool[Array, ""]
    """Whether least squares ended at its tolerance."""
    _problem: ObservedODE
    _together: int = eqx.field(static=True)

    @public("profile")
    def profile(
        self, where: Callable[[PyTree], Array], values: Float[Array, " values"]
    ) -> tuple[Float[Array, " values"], PyTree[Array]]:
        """Fix one parameter at each of `values`, and estimate the others again.

        Where the first result is below 3.84, the value is in the confidence interval of 95%
        (Raue et al. 2009, doi:10.1093/bioinformatics/btp358). A profile that stays flat is a
        parameter that the observations do not determine. The noise is that of the estimate. Below
        zero, the value has led to better parameters than the estimate.

        Args:
            where: which parameter, as `lambda params: params["k"][0]`.
            values: of this parameter, `[values]`.

        Returns:
            Twice the log-likelihood ratio of each value against the estimate, and the other
            parameters there, `[values, ...]`.

        Raises:
            TypeError, ValueError: if `where` is not one number of the parameters.
        """
        flat, unravel = ravel_pytree(self.params)
        chosen = _one_parameter(where, flat, unravel)
        value = flat[chosen][0]
        values = floating(values).astype(flat.dtype)
        if values.ndim != 1:
            raise ValueError(f"{arg('values')} must be [values]; got shape {values.shape}.")
        check_finite({"values": values})
        # In order of distance from the estimate. Each starts where the nearest one that is done
        # has ended.
        order = np.argsort(np.abs(np.asarray(values - value)), kind="stable")
        ends, costs = np.zeros((len(values), len(flat))), np.zeros(len(values))
        done = [(float(value), np.asarray(flat))]
        data = self._problem, jnp.max(self._problem.ts)
        size = self._together  # for which there is a program
        for part in np.split(order, range(size, len(order), size)):
            rows = np.resize(part, size)
            near = [min(done, key=lambda pair: abs(pair[0] - float(values[i])))[1] for i in rows]
            starts = jnp.where(chosen, values[rows][:, None], jnp.asarray(np.stack(near)))
            found = least_squares(
                of_observations, data, starts, chosen, STEPS_PER_ROUND, jnp.zeros(size, flat.dtype)
            )
            ends[rows], costs[rows] = found.flats, found.costs
            done += [(float(values[i]), ends[i]) for i in part if np.isfinite(costs[i])]
        given, unit = self._problem.noise, self._problem.unit
        scale = 1.0 if self.noise is None else jnp.mean((given / self.noise) ** 2)
        ratio = 2 * scale * (jnp.asarray(costs, flat.dtype) - self.cost / unit**2)
        return ratio, jax.vmap(unravel)(jnp.asarray(ends, flat.dtype))


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
    noise: float | Float[Array, "..."] | None = None,
    residual: Callable[[Array, Array], Array] | None = None,
    prior: Callable[[PyTree], PyTree] | None = None,
    match: bool | None = None,
    row_args: PyTree = None,
    **options: Any,
) -> Estimate:
    """Estimate the parameters of `dy/dt = f(t, y, params)` from observations, by least squares.

    From each start, slopes of smoothed observations are matched by the field, which needs no solve
    and rarely gets stuck; starts that fit the first observations go on, too. Then
    Levenberg-Marquardt (Optimistix), with derivatives in forward mode, fits a sixteenth of the
    observations, an eighth, and so on to all of them, eight starts at a time, as rows of one solve;
    those that are far worse than others are given up. Let positive parameters be logarithms.

    Args:
        f: vector field `f(t, y, params)`, or `f(t, y, (params, row))` with `row_args`.
        y0: state at `t0`, or a function of the parameters that returns it.
        ts: times of the observations, `[times]`, in order; or of several experiments, `[rows,
            times]`, each with its own state `y0`, `[rows, ...]`.
        ys: observations, `[times, ...]` or `[rows, times, ...]`. NaN where one is missing.
        starts: first guesses of the parameters, a pytree of arrays `[starts, ...]`.
        t0: the time of `y0`.
        observe: what is observed, `observe(t, y, params)`; with `row_args`, of `(params, row)`. By
            default the state.
        noise: standard deviation of the observations, shaped to broadcast with one of `ys`. By
            default it is one number, which the residuals say.
        residual: `residual(predicted, observed)` whose half squares are negative log-densities up
            to a constant, in place of their difference by the noise: in units of its deviations.
        prior: residuals of the parameters, such as `lambda p: (p - mean) / deviation`.
        match: whether to match slopes first. By default, if the state is observed, without
            `jumps`, and the solver is not one for stiff fields, whose slopes a spline does not
            resolve.
        row_args: arguments of each experiment, `[rows, ...]`.
        options: of `jaxode.solve`, such as `solver`, `breakpoints`, `jumps`, `max_steps`. `rtol`
            and `atol` are 1e-6, or 1e-5 in single precision; without `observe`, `atol` is this part
            of the spread of `ys`, if that is below one.

    Returns:
        An `Estimate`.

    Raises:
        TypeError, ValueError: for an invalid argument.
        SolveError: if no start could be solved for the first observations.

    Warns:
        UserWarning: of parameters that the observations do not determine, such as those at a bound;
            of residuals that are larger than the given noise, or `residual`, says; and if least
            squares has not converged.
    """
    check_not_traced("chooses among starts", starts, ts, ys)
    known = inspect.signature(solve).parameters
    if wrong := [name for name in options if name in NOT_OPTIONS or name not in known]:
        raise TypeError(f"{arg(wrong[0])} is not an option of estimate. Leave it out.")
    problem, flats = posed(
        Given(f, y0, ts, ys, starts, t0, observe, noise, residual, prior, row_args, options)
    )
    solver = options.get("solver")
    stiff = isinstance(solver, Rodas5P | Rosenbrock23)
    cannot = "observe" if observe is not None else "jumps" if options.get("jumps") else None
    if match and cannot:
        raise ValueError(f"{arg('match')} needs smooth states; got {cannot}. Leave one out.")
    matched = None
    if match or (match is None and not (stiff or cannot)):
        matched = match_slopes(problem, flats)
    if match and matched is None:
        raise ValueError(
            f"{arg('match')} needs five observations of each series, at times that are not too "
            "uneven, and a start at which f is finite. Leave it out."
        )
    if matched is None:
        runs = Runs(np.asarray(flats), np.arange(len(flats))[:, None])
        size = min(STARTS_AT_ONCE, len(flats))
    else:
        runs = with_matched(problem, np.asarray(flats), *matched)
        size = min(STARTS_AT_ONCE, 2 * len(flats))
    return _described(problem, improved(problem, runs, size), size)


def _described(problem: ObservedODE, ends: Ends, together: int) -> Estimate:
    unravel, dtype, best = problem.unravel, problem.ts.dtype, int(np.argmin(ends.costs))
    flat, cost, jacobian = ends.runs.flats[best], float(ends.costs[best]), ends.jacobians[best]
    used = len(jacobian) - int(np.isnan(problem.ys).sum())
    noise, scale, free = problem.noise, 1.0, used - len(flat)
    if problem.residual is None and problem.estimated:
        scale = 2 * cost / free
        noise = jnp.asarray(math.sqrt(scale) * problem.unit, dtype)
    elif _is_unlikely(2 * cost, free):
        warnings.warn(
            f"estimate: residuals are {math.sqrt(2 * cost / free):.3g} times the noise: half their "
            f"squares sum to {cost:.3g} for {free} degrees of freedom. The model does not fit, or "
            "the noise is larger. The standard errors are too small.",
            stacklevel=4,
        )
    noise = noise if problem.residual is None else None
    covariance, errors = _uncertainty(jacobian, scale, NULL_SINGULAR_VALUE[dtype])
    wide = errors > VAGUE_ERROR * (1 + np.abs(flat))
    if vague := [name for name, of in zip(_names(problem.template), wide, strict=True) if of]:
        warnings.warn(
            f"estimate: the observations do not determine {', '.join(vague)}: their standard "
            "errors are of no use. They are at a bound, or others make up for them. Fix them, give "
            "a prior, or look at Estimate.profile.",
            stacklevel=4,
        )
    if not ends.converged[best]:
        warnings.warn(
            f"estimate: least squares did not converge in {STEPS_PER_ROUND * FULL_ROUNDS} steps. "
            "The standard errors may be wrong. Start nearer, or lower rtol and atol.",
            stacklevel=4,
        )
    starts, costs = _ends_of_starts(ends)
    square = float(problem.unit) ** 2
    return Estimate(
        params=unravel(jnp.asarray(flat, dtype)),
        cost=jnp.asarray(cost * square, dtype),
        covariance=jnp.asarray(covariance, dtype),
        errors=unravel(jnp.asarray(errors, dtype)),
        noise=noise,
        starts=jax.vmap(unravel)(jnp.asarray(starts, dtype)),
        costs=jnp.asarray(costs * square, dtype),
        converged=jnp.asarray(ends.converged[best]),
        _problem=problem,
        _together=together,
    )


def _ends_of_starts(ends: Ends) -> tuple[np.ndarray, np.ndarray]:
    """Where each start ended on the better of its ways, and half the sum of squares there."""
    flats, of_start = ends.runs
    costs = np.append(ends.costs, np.inf)[of_start]
    way = np.argmin(costs, axis=1)[:, None]
    run = np.take_along_axis(of_start, way, axis=1)[:, 0]
    given_up = np.full((1, flats.shape[1]), np.nan)
    return np.concatenate([flats, given_up])[run], costs.min(axis=1)


def _one_parameter(
    where: Callable[[PyTree], Array], flat: Float[Array, " n"], unravel: Callable[[Array], PyTree]
) -> Bool[Array, " n"]:
    """Mark the parameter that `where` chooses, in the vector of all."""
    try:
        value, slope = jax.value_and_grad(lambda flat: jnp.reshape(where(unravel(flat)), ()))(flat)
    except (TypeError, KeyError, IndexError) as error:
        raise TypeError(
            f"{arg('where')} must choose one number, as lambda params: params['k'][0]; got "
            f"{type(error).__name__}: {error}"
        ) from error
    chosen = slope != 0
    if int(chosen.sum()) != 1 or slope[chosen][0] != 1 or value != flat[chosen][0]:
        raise ValueError(
            f"{arg('where')} must choose one parameter itself, and no function of some. Pass "
            "values of it."
        )
    return chosen


def _is_unlikely(square: float, free: int) -> bool:
    """Whether a chi-square is too large, by Wilson and Hilferty (1931), and by how much errors
    would change."""
    if free <= 0 or square <= UNLIKELY_FACTOR * free:
        return False
    spread = 2 / (9 * free)
    return (square / free) ** (1 / 3) - (1 - spread) > UNLIKELY_DEVIATIONS * math.sqrt(spread)


def _uncertainty(jacobian: np.ndarray, scale: float, tiny: float):
    """The covariance and the standard errors of the parameters, infinite for those without effect.
    Singular values up to this `tiny` part of the largest count as zero."""
    jacobian = np.nan_to_num(jacobian)
    # At least as many rows as parameters, so that every direction has a vector.
    jacobian = np.pad(jacobian, ((0, jacobian.shape[1]), (0, 0)))
    sizes = np.linalg.norm(jacobian, axis=0)
    units = np.where(sizes > 0, sizes, 1.0)
    _, values, vectors = np.linalg.svd(jacobian / units, full_matrices=False)
    none = values <= max(values[0], 1e-30) * tiny
    lost = (sizes == 0) | (np.abs(vectors[none]) > NULL_COMPONENT).any(axis=0)
    inverse = vectors[~none].T / values[~none] ** 2 @ vectors[~none]
    covariance = scale * inverse / units / units[:, None]
    unknown = np.where(np.eye(len(units)) > 0, np.inf, 0.0)
    covariance = np.where(lost | lost[:, None], unknown, covariance)
    return covariance, np.sqrt(np.diag(covariance))


def _names(template: PyTree) -> list[str]:
    """Name each number, such as `['k'][0]`."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = jax.tree_util.keystr(path) or "params"
        names += [name + "".join(f"[{i}]" for i in at) for at in np.ndindex(leaf.shape)]
    return names
