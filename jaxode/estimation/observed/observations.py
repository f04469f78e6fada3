"""Check what `jaxode.estimate` gets, and pose the problem."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import (
    check_args,
    check_number,
    check_state,
    floating,
    numbers,
    one_of,
)
from jaxode._checks.caller import arg
from jaxode._checks.rules import TIME
from jaxode._checks.samples import check_finite, check_rows
from jaxode._checks.times import check_observed_times
from jaxode.estimation.observed.bounds import Bounds, checked_bounds
from jaxode.estimation.observed.likelihoods import LIKELIHOODS, Likelihood, LogNormal
from jaxode.estimation.observed.observed_system import ObservedODE, needs_row, of_rows
from jaxode.estimation.observed.tolerances import PARAMETER_TOLERANCE, spreads, with_atol
from jaxode.estimation.observed.user_functions import (
    broadcasts,
    check_function,
    check_noise_shape,
    check_observed_shape,
    index_with_axis,
)
from jaxode.ode.field import check_field
from jaxode.ode.interpolations import check_knots
from jaxode.ode.pieces import check_jumps

# How a user's functions are called, and how they may be with `row_args`.
CALLS = {
    "observe": ("t, y, params",),
    "residual": ("predicted, observed", "predicted, observed, params"),
    "likelihood": ("predicted, observed, params",),
    "prior": ("params",),
    "y0": ("params",),
    "noise": ("params",),
}
CALLS_WITH_ROW = {"y0": ("params, row",), "noise": ("params, row",)}


class EstimateArguments(NamedTuple):
    """The arguments of `estimate`, as the user passed them."""

    f: Any
    y0: Any
    ts: Any
    ys: Any
    starts: Any
    t0: Any
    observe: Any
    likelihood: Any
    noise: Any
    residual: Any
    prior: Any
    bounds: Any
    args: Any
    row_args: Any
    options: dict[str, Any]
    """Options of `solve`."""


def posed(
    arguments: EstimateArguments,
) -> tuple[ObservedODE, Float[Array, "starts n"], Bounds]:
    """The checked problem, the starts as vectors, and their bounds."""
    _check_functions(arguments)
    starts = _starts(arguments.starts)
    flats = jax.vmap(lambda tree: ravel_pytree(tree)[0])(starts)
    dtype, template = flats.dtype, jax.tree.map(lambda leaf: leaf[0], starts)
    ts, ys, t0 = _observations(arguments, dtype)
    likelihood = _likelihood(arguments, ys)
    bounds = checked_bounds(arguments.bounds, template, flats)
    noise = _noise(arguments, likelihood, ys, int(bounds.movable.sum()))
    args = as_data(arguments.args, (t0, jnp.max(ts)))
    y0, row_args = _experiments(arguments, template, args, ts, ys, t0)
    problem = ObservedODE(
        f=arguments.f, y0=y0, t0=t0, ts=ts, ys=ys, template=template, observe=arguments.observe,
        likelihood=likelihood, residual=arguments.residual, noise=noise,
        estimated=arguments.noise is None and getattr(likelihood, "noise_rule", "") == "estimated",
        prior=arguments.prior, args=args, row_args=row_args,
        options={"rtol": max(PARAMETER_TOLERANCE[dtype] / 100, 1e-6), **arguments.options},
    )  # fmt: skip
    _check_shapes(problem)
    if "atol" not in arguments.options:
        problem = with_atol(problem, ys, ts.ndim - 1, flats)
    return problem, flats, bounds


def _check_functions(arguments: EstimateArguments) -> None:
    """Raise for functions that cannot be called as they will be."""
    check_field("f", arguments.f, "f(t, y, params)")
    if arguments.likelihood is not None and not callable(arguments.likelihood):
        one_of("likelihood", arguments.likelihood, tuple(LIKELIHOODS))
    for name, calls in CALLS.items():
        function, with_row = getattr(arguments, name), CALLS_WITH_ROW.get(name, ())
        is_number = name in ("y0", "noise", "likelihood") and not callable(function)
        if function is not None and not is_number:
            rows = arguments.row_args is not None
            check_function(name, function, calls + with_row * rows, with_row * (not rows))
    check_jumps(arguments.options.get("jumps"))


def as_data(args: Any, span: tuple[Array, Array]) -> PyTree:
    """The data, with numbers as arrays, so that other ones are no new program."""
    check_knots("args", args, span)

    def as_array(leaf):
        return jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf

    return jax.tree.map(as_array, check_args("args", args))


def _experiments(
    arguments: EstimateArguments, template: PyTree, args: PyTree, ts: Array, ys: Array, t0: Array
):
    """The initial state or the function that returns it, and the arguments of each experiment."""
    y0, row_args = arguments.y0, arguments.row_args
    if ts.ndim == 2 and row_args is not None:
        row_args = check_rows("row_args", row_args, len(ts))
    params = template if args is None else (template, args)
    state = check_state("y0", of_rows(y0, params, row_args) if callable(y0) else y0)
    if ts.ndim == 2:
        check_rows("y0", state, len(ts))
    elif row_args is not None:
        raise ValueError(
            f"{arg('row_args')} are of several experiments; got ts of one. Pass ts [rows, times]."
        )
    check_knots("row_args", row_args, (t0, ts[..., -1]))
    if arguments.observe is None:
        _check_whole(state, ts, ys)
    if not callable(y0):
        y0 = jax.tree.map(lambda leaf: leaf.astype(ts.dtype), state)
    return y0, row_args


def _check_shapes(problem: ObservedODE) -> None:
    """Raise unless predictions and residuals are like observations: others would broadcast."""
    shape = problem.ys.shape
    if problem.observe is not None:
        returned = jax.eval_shape(problem.predicted, problem.template, jnp.max(problem.ts))
        check_observed_shape(returned, shape)
    if callable(problem.noise):
        check_noise_shape(_noise_of_first_row(problem), shape[problem.ts.ndim :], "an observation")
    if isinstance(problem.likelihood, Likelihood):
        return
    name, returns = "residual", "residuals"
    if problem.likelihood is not None:
        name, returns = "likelihood", "log-densities"

    def call(predicted, observed, params):
        if problem.likelihood is not None:
            return problem.likelihood(predicted, observed, problem.with_args(params))
        return problem.residuals(predicted, observed, params=params)

    returned = jax.eval_shape(call, problem.ys, problem.ys, problem.template)
    if getattr(returned, "shape", None) != shape:
        raise ValueError(f"{arg(name)} must return {returns} like ys, {shape}; got {returned}.")


def _starts(starts: Any) -> PyTree[Array]:
    starts = check_args("starts", starts)
    if texts := [leaf for leaf in jax.tree.leaves(starts) if isinstance(leaf, str)]:
        raise TypeError(
            f"{arg('starts')} must be first guesses, numbers; got the text {texts[0]!r}. Pass them "
            f"by name, such as starts={{{texts[0]!r}: jnp.array([1.0])}}."
        )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(starts)]
    if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,)):
        raise ValueError(
            f"{arg('starts')} leaves must share a leading axis of starts; got shapes {shapes}. For "
            "one start, add it: jax.tree.map(lambda x: jnp.asarray(x)[None], starts)."
        )
    # In the default precision: with that of single numbers, a search ends far from the best.
    starts = jax.tree.map(lambda leaf: floating(leaf).astype(jnp.result_type(float)), starts)
    check_finite({"starts": starts})
    return starts


def _observations(arguments: EstimateArguments, dtype: Any) -> tuple[Array, Array, Array]:
    """The times and values of the observations, and the initial time."""
    check_number("t0", arguments.t0, TIME, kind="time")
    exact, values = numbers("ts", arguments.ts), numbers("ys", arguments.ys)
    ts, ys, t0 = (floating(x).astype(dtype) for x in (exact, values, arguments.t0))
    if ts.ndim not in (1, 2) or ys.shape[: ts.ndim] != ts.shape or not ts.size:
        raise ValueError(
            f"{arg('ys')} must be [times, ...] for ts [times], or [rows, times, ...] for ts "
            f"[rows, times]; got shapes {ys.shape} and {ts.shape}."
        )
    check_times(exact, ts, t0)
    check_observed(ys)
    return ts, ys, t0


def check_observed(ys: Array) -> None:
    """Raise unless observations are finite, or NaN where one is missing."""
    values = np.asarray(ys)  # compiles nothing
    if np.isinf(values).any():
        raise ValueError(f"{arg('ys')} must be finite, or NaN where missing; got infinity.")
    if np.isnan(values).all():
        raise ValueError(f"{arg('ys')} must hold an observation; got NaN alone.")


def check_times(exact: Any, ts: Array, t0: Array) -> None:
    """Raise unless times are in order after `t0`, also the `exact` ones before rounding."""
    check_finite({"ts": ts})
    check_observed_times(float(t0), exact, ts.dtype)
    times = np.asarray(ts)  # compiles nothing
    if (np.diff(times, axis=-1) < 0).any():
        raise ValueError(f"{arg('ts')} must be in order. Sort them, and ys with them.")
    if (times[..., 0] < np.asarray(t0)).any():
        raise ValueError(
            f"{arg('ts')} must not be before t0, {float(t0):.15g}; got {times.min():.15g}. Pass "
            "the state at the first of them, and t0."
        )


def _likelihood(arguments: EstimateArguments, ys: Array) -> Any:
    """A `Likelihood` by its name, the user's own function, or None with a residual."""
    name = arguments.likelihood
    if arguments.residual is not None:
        if name is not None:
            raise ValueError(f"{arg('likelihood')} is not used with residual. Leave one out.")
        return None
    if callable(name):
        return name
    likelihood = LIKELIHOODS["normal" if name is None else name]
    values = np.asarray(ys)
    if likelihood.values == "counts":
        wrong, rule = (values < 0) | (values != np.round(values)), "counts: whole, from zero"
    elif likelihood.values == "positive":
        wrong, rule = values <= 0, "positive"
    else:
        return likelihood
    if (wrong := wrong & ~np.isnan(values)).any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(
            f"{arg('ys')} must be {rule}, for likelihood={name!r}; got ys{list(at)} = "
            f"{values[at]:g}. Pass NaN where one is missing, or another likelihood."
        )
    return likelihood


def _noise(arguments: EstimateArguments, likelihood: Any, ys: Array, count: int) -> Any:
    """The user's noise, checked; else the spread of `ys`, as a unit for the absolute tolerances of
    the search."""
    noise, used = arguments.noise, int((~np.isnan(np.asarray(ys))).sum())
    rule = getattr(likelihood, "noise_rule", "unused")
    if noise is not None and rule == "unused":
        other = "residual" if likelihood is None else f"likelihood={arguments.likelihood!r}"
        other = "a likelihood of your own" if callable(arguments.likelihood) else other
        raise ValueError(f"{arg('noise')} is not used with {other}. Leave one out.")
    if noise is None and rule == "needed":
        raise ValueError(
            f"{arg('noise')} is needed for likelihood={arguments.likelihood!r}. Pass numbers, or a "
            "function of the parameters to estimate it: noise=lambda params: params['k']."
        )
    if noise is None and rule == "unused":
        return jnp.asarray(1.0, ys.dtype)
    if noise is None:
        if arguments.prior is not None:
            raise ValueError(f"{arg('prior')} is weighed against the noise. Pass noise, too.")
        if used <= count:
            raise ValueError(
                f"{arg('ys')} must be more than the {count} parameters, to say the noise; got "
                f"{used}. Pass noise."
            )
        values = np.asarray(ys, float)
        values = np.log(values) if isinstance(likelihood, LogNormal) else values
        return jnp.asarray(spreads(values, jnp.ndim(arguments.ts) - 1) or 1.0, ys.dtype)
    return noise if callable(noise) else _noise_numbers(noise, ys)


def _noise_numbers(noise: Any, ys: Array) -> Array:
    """The user's noise as an array."""
    array = floating(numbers("noise", noise)).astype(ys.dtype)
    if not bool(((array > 0) & jnp.isfinite(array)).all()):
        raise ValueError(f"{arg('noise')} must be positive and finite; got {noise}.")
    if not broadcasts(array.shape, ys.shape):
        raise ValueError(
            f"{arg('noise')} must broadcast to ys, {ys.shape}; got shape {array.shape}."
        )
    return array


def _noise_of_first_row(problem: ObservedODE) -> Any:
    """The shape of what a function of the noise returns."""
    noise: Any = problem.noise
    rows = problem.row_args
    by_row = rows is not None and needs_row(noise)
    row = (jax.tree.map(lambda leaf: leaf[0], rows),) if by_row else ()
    return jax.eval_shape(noise, problem.with_args(problem.template), *row)


def _check_whole(state: PyTree[Array], ts: Array, ys: Array) -> None:
    """Raise unless observations are states, without `observe`."""
    if not isinstance(state, jax.Array):
        raise ValueError(f"{arg('y0')} must be one array without observe. Pass it.")
    whole = (*ts.shape, *state.shape[ts.ndim - 1 :])
    if whole != ys.shape:
        lacks_axis = whole == (*ys.shape, 1)
        cure = index_with_axis(ys.ndim) if lacks_axis else "observe(t, y, params)"
        raise ValueError(
            f"{arg('ys')} must be states, {whole}, without observe; got shape {ys.shape}. Pass "
            f"{cure}."
        )
