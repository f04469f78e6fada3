"""Parameters of an ODE from noisy observations, from one or from many first guesses."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import (
    check_not_traced,
    floating,
)
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import SolveError
from jaxode._checks.samples import check_finite
from jaxode.ode.field import VectorField
from jaxode.ode.matching import match_slopes
from jaxode.ode.misfit import Misfit, least_squares, of_observations
from jaxode.ode.observations import posed
from jaxode.ode.solvers.rosenbrock import Rodas5P, Rosenbrock23

ROWS = 8  # starts that are improved at once
FACTOR = 10.0  # of the least cost, above which all but the `ROWS` best starts are given up
PARTS = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0  # of the observations, one after the other
STEPS, ROUNDS = 50, 4  # of least squares, and how often all observations get them
ALIKE = 1e-3  # relative distance of two ends that are one
TINY = {jnp.dtype("float64"): 1e-7, jnp.dtype("float32"): 1e-4}  # singular values that are none
LOOSE, VAGUE = 0.1, 100.0  # of a direction without values; errors beside 1 + the size of a number
OWN = ("batch", "ts", "t1", "adjoint", "throw", "dense", "event", "axis_name", "steps")


class Estimate(eqx.Module):
    """Parameters that fit observations best."""

    params: PyTree[Array]
    """Those with the least squares, shaped like one of `starts`."""
    cost: Float[Array, ""]
    """Half the sum of squares: with known noise, minus the log-likelihood up to a constant."""
    covariance: Float[Array, "n n"]
    """Of the parameters as one vector, in the order of `jax.tree.leaves(params)`."""
    errors: PyTree[Array]
    """The standard error of each parameter; infinite where the observations do not determine it."""
    noise: Float[Array, "..."]
    """The standard deviation of the observations: as given, or what the residuals say."""
    starts: PyTree[Array]
    """Where each start ended, `[starts, ...]`; NaN where it was given up for a better one."""
    costs: Float[Array, " starts"]
    """Half the sum of squares where each start ended; infinite where it was given up."""
    converged: Bool[Array, ""]
    """Whether least squares ended at its tolerance."""
    _problem: Misfit
    _together: int = eqx.field(static=True)

    @public("profile")
    def profile(
        self, where: Callable[[PyTree], Array], values: Float[Array, " values"]
    ) -> tuple[Float[Array, " values"], PyTree[Array]]:
        """Fix one parameter at each of `values`, and estimate the others again.

        Where the first result is below 3.84, half of that by the cost, the value is in the
        confidence interval of 95% (Raue et al. 2009, doi:10.1093/bioinformatics/btp358). A profile
        that stays flat is a parameter that the observations do not determine.

        Args:
            where: which parameter, as `lambda params: params["k"][0]`.
            values: of this parameter.

        Returns:
            Twice the log-likelihood ratio of each value against the estimate, and the other
            parameters there, `[values, ...]`.

        Raises:
            TypeError, ValueError: if `where` is not one number of the parameters.
        """
        flat, unravel = ravel_pytree(self.params)
        try:
            chosen = jax.grad(lambda flat: jnp.reshape(where(unravel(flat)), ()))(flat) != 0
        except (TypeError, KeyError, IndexError) as error:
            raise TypeError(
                f"{arg('where')} must choose one number, as lambda params: params['k'][0]; got "
                f"{type(error).__name__}: {error}"
            ) from error
        if int(chosen.sum()) != 1:
            raise ValueError(f"{arg('where')} must choose one parameter; got {int(chosen.sum())}.")
        values = jnp.ravel(floating(values)).astype(flat.dtype)
        check_finite({"values": values})
        # From the nearest value on, each from where the one before it ended.
        order = np.argsort(np.abs(np.asarray(values - flat[chosen][0])), kind="stable")
        ends, costs = np.zeros((len(values), len(flat))), np.zeros(len(values))
        known = [(float(flat[chosen][0]), np.asarray(flat))]
        data = self._problem, jnp.max(self._problem.ts)
        size = self._together  # for which there is a program
        for part in np.split(order, range(size, len(order), size)):
            rows = np.resize(part, size)
            near = [min(known, key=lambda pair: abs(pair[0] - float(values[i])))[1] for i in rows]
            starts = jnp.where(chosen, values[rows][:, None], jnp.stack([*map(jnp.asarray, near)]))
            found = least_squares(of_observations, data, starts, chosen, STEPS)
            ends[rows], costs[rows] = found[0], found[1]
            known += [(float(values[i]), ends[i]) for i in part if np.isfinite(costs[i])]
        given = self._problem.noise if self._problem.residual is None else 1.0
        scale = jnp.mean((given / self.noise) ** 2)
        ratio = 2 * scale * (jnp.asarray(costs, flat.dtype) - self.cost)
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
    and rarely gets stuck. Then Levenberg-Marquardt (Optimistix), with derivatives in forward mode,
    fits a sixteenth of the observations, an eighth, and so on to all of them, for eight starts at
    once, as rows of one solve; those that are far worse than others are given up. Let positive
    parameters be logarithms.

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
            to a constant, in place of their difference by the noise.
        prior: residuals of the parameters, such as `lambda p: (p - mean) / deviation`.
        match: whether to match slopes first. By default, if the state is observed and the solver is
            not one for stiff fields, whose slopes a spline does not resolve.
        row_args: arguments of each experiment, `[rows, ...]`.
        options: of `jaxode.solve`, such as `solver`, `breakpoints`, `jumps`, `max_steps`. `rtol`
            and `atol` are 1e-6, or 1e-5 in single precision.

    Returns:
        An `Estimate`.

    Raises:
        TypeError, ValueError: for an invalid argument.
        SolveError: if no start could be solved for the first observations.

    Warns:
        UserWarning: of parameters that the observations do not determine, such as those at a bound,
            and if least squares has not converged.
    """
    check_not_traced("chooses among starts", starts, ts, ys)
    if own := [name for name in OWN if name in options]:
        raise TypeError(f"{arg(own[0])} is not for estimate, which sets it. Leave it out.")
    functions: dict[str, Any] = {"observe": observe, "residual": residual, "prior": prior}
    problem, flats = posed(f, y0, ts, ys, starts, t0, functions, noise, row_args, options)
    solver = options.get("solver")
    stiff = isinstance(solver, Rodas5P | Rosenbrock23 | diffrax.AbstractImplicitSolver)
    if match is None:
        match = observe is None and not stiff
    elif match and observe is not None:
        raise ValueError(f"{arg('match')} needs the whole state; got observe, too. Leave one out.")
    count, came_from = len(flats), np.arange(len(flats))
    matched = match_slopes(problem, flats) if match else None
    if matched is not None and np.isfinite(matched[1]).any():
        ends, costs = map(np.asarray, matched)
        came_from, flats = _distinct(ends, costs, came_from)
    return _described(problem, *_improved(problem, flats, came_from, count))


def _improved(problem: Misfit, flats: Any, came_from: np.ndarray, count: int):
    """The best end, its cost, Jacobian and whether it converged, the ends and costs of all starts,
    and how many are improved at once."""
    times = np.unique(np.asarray(problem.ts))
    free, flats = jnp.zeros(flats.shape[1], bool), jnp.asarray(flats)
    size = min(ROWS, len(flats))
    for number in range(len(PARTS) + ROUNDS - 1):
        part = PARTS[min(number, len(PARTS) - 1)]
        end = jnp.asarray(times[math.ceil(part * len(times)) - 1], problem.ts.dtype)
        found = []
        for i in range(0, len(flats), size):
            rows = np.resize(np.arange(i, min(i + size, len(flats))), size)
            some = least_squares(of_observations, (problem, end), flats[rows], free, STEPS)
            found.append([np.asarray(x)[: len(flats) - i] for x in some])
        ends, costs, converged, jacobians = map(np.concatenate, zip(*found, strict=True))
        if not np.isfinite(costs).any():
            raise SolveError(
                f"{arg('starts')} none could be solved up to t = {float(end):g}. Start nearer, "
                "raise max_steps, or pass a solver for stiff fields."
            )
        last = number == len(PARTS) + ROUNDS - 2
        if last or (part == 1 and converged[np.argmin(costs)]):
            break
        came_from, flats = _distinct(ends, costs, came_from)
        flats = jnp.asarray(flats)
    best = int(np.argmin(costs))
    of_starts = np.full((count, flats.shape[1]), np.nan)
    of_costs, known = np.full(count, np.inf), came_from >= 0
    of_starts[known], of_costs[known] = ends[came_from[known]], costs[came_from[known]]
    end = ends[best], costs[best], jacobians[best], bool(converged[best])
    return *end, of_starts, of_costs, size


def _distinct(ends: np.ndarray, costs: np.ndarray, came_from: np.ndarray):
    """The ends that differ, without those that are far worse than the best, and the place of each
    start among them, or -1."""
    order, kept, to = np.argsort(costs, kind="stable"), [], np.full(len(ends), -1)
    for i in order[np.isfinite(costs[order])]:
        apart = [np.max(np.abs(ends[i] - ends[j]) / (1 + np.abs(ends[j]))) for j in kept]
        if apart and min(apart) < ALIKE:
            to[i] = int(np.argmin(apart))
        elif len(kept) < ROWS or costs[i] <= FACTOR * costs[kept[0]]:
            to[i] = len(kept)
            kept.append(i)
    return np.where(came_from >= 0, to[came_from], -1), ends[kept]


def _described(problem: Misfit, flat, cost, jacobian, converged, ends, costs, together) -> Estimate:
    unravel, dtype = problem.unravel, problem.ts.dtype
    used = len(jacobian) - int(np.isnan(problem.ys).sum())
    noise, scale = problem.noise, 1.0
    if problem.residual is None and problem.estimated:
        scale = 2 * float(cost) / (used - len(flat))
        noise = jnp.asarray(math.sqrt(scale), dtype)
    covariance, errors = _uncertainty(jacobian, scale, TINY[dtype])
    wide = errors > VAGUE * (1 + np.abs(flat))
    if vague := [name for name, of in zip(_names(problem.template), wide, strict=True) if of]:
        warnings.warn(
            f"estimate: the observations do not determine {', '.join(vague)}: their standard "
            "errors are of no use. They are at a bound, or others make up for them. Fix them, give "
            "a prior, or look at Estimate.profile.",
            stacklevel=4,
        )
    if not converged:
        warnings.warn(
            f"estimate: least squares did not converge in {STEPS * ROUNDS} steps. The standard "
            "errors may be wrong. Start nearer, or lower rtol and atol.",
            stacklevel=4,
        )
    tree = lambda x: unravel(jnp.asarray(x, dtype))
    return Estimate(
        tree(flat), jnp.asarray(cost, dtype), jnp.asarray(covariance, dtype), tree(errors), noise,
        jax.vmap(unravel)(jnp.asarray(ends, dtype)), jnp.asarray(costs, dtype),
        jnp.asarray(converged), problem, together,
    )  # fmt: skip


def _uncertainty(jacobian: np.ndarray, scale: float, tiny: float):
    """The covariance of the parameters and its root; infinite for those without effect."""
    jacobian = np.nan_to_num(jacobian)
    sizes = np.linalg.norm(jacobian, axis=0)
    units = np.where(sizes > 0, sizes, 1.0)
    _, values, vectors = np.linalg.svd(jacobian / units, full_matrices=False)
    none = values <= max(values[0], 1e-30) * tiny
    lost = (sizes == 0) | (np.abs(vectors[none]) > LOOSE).any(axis=0)
    inverse = vectors.T / np.where(none, 1.0, values) ** 2 @ vectors
    covariance = scale * inverse / units / units[:, None]
    unknown = np.where(np.eye(len(units)) > 0, np.inf, 0.0)
    covariance = np.where(lost | lost[:, None], unknown, covariance)
    return covariance, np.sqrt(np.diag(covariance))


def _names(template: PyTree) -> list[str]:
    """Of each number, such as `['k'][0]`."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = jax.tree_util.keystr(path) or "params"
        names += [name + "".join(f"[{i}]" for i in at) for at in np.ndindex(leaf.shape)]
    return names
