"""An ODE with unknown parameters, and its observations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import floating, takes
from jaxode.estimation.observed.likelihoods import Likelihood
from jaxode.ode.adjoints import ForwardMode
from jaxode.ode.field import call_field
from jaxode.ode.pieces import Jumps
from jaxode.ode.solve import solve


class Experiment(NamedTuple):
    """The data of one experiment, or of several with a leading axis of rows."""

    ts: Float[Array, "*rows times"]
    """The times of the observations."""
    ys: Float[Array, "..."]
    """The observations, `[times, ...]` or `[rows, times, ...]`, with NaN where one is missing."""
    y0: PyTree[Float[Array, "..."]]
    """The state at the initial time, or None if it is a function of the parameters."""
    row: PyTree
    """The experiment's row of `row_args`, or None."""
    doses: Float[Array, "*rows jumps"] | None
    """The times of doses, or None."""

    def until(self, end: Float[Array, ""]) -> "Experiment":
        """The experiment with times after `end` moved to it."""
        return self._replace(ts=jnp.minimum(self.ts, end))


class ObservedSystem(eqx.Module):
    """An ODE with unknown parameters, and what is observed of it."""

    f: Callable[..., PyTree]
    y0: Any
    """A function of the parameters that returns the state at `t0`, or a state."""
    t0: Float[Array, ""]
    template: PyTree
    """Parameters, for their shapes."""
    observe: Callable[..., Array] | None
    args: PyTree
    """Data that the functions get together with the parameters, or None."""
    options: dict[str, Any]
    """Options of `solve`. Only the change at a dose counts of `jumps`."""

    def unravel(self, flat: Float[Array, " n"]) -> PyTree:
        """The parameters."""
        return ravel_pytree(self.template)[1](flat)

    def with_args(self, params: PyTree) -> PyTree:
        """The argument `params` of a user's function: with `args`, the pair `(params, args)`."""
        return params if self.args is None else (params, self.args)

    def initial_state(self, params: PyTree, experiment: Experiment) -> PyTree:
        """The state of an experiment at `t0`."""
        if not callable(self.y0):
            return experiment.y0
        params, row = self.with_args(params), experiment.row
        if row is None or not needs_row(self.y0):
            return self.y0(params)
        if experiment.ts.ndim == 1:
            return self.y0(params, row)
        return jax.vmap(lambda row: self.y0(params, row))(row)

    def states_of(self, params: PyTree, experiment: Experiment, throw: bool = False) -> PyTree:
        """The states of an experiment at the times of its observations. Doses after the last of
        these do not come."""
        ts, row, params_of_f = experiment.ts, experiment.row, self.with_args(params)
        options = dict(self.options)
        if (doses := experiment.doses) is not None:
            doses = jnp.where(doses > ts[..., -1:], jnp.inf, doses)
            options["jumps"] = Jumps(doses, options["jumps"].change)
        if ts.ndim == 2:
            options |= {"batch": "per_sample", "row_args": row}
        elif row is not None:
            params_of_f = params_of_f, row
        return solve(
            self.f, self.initial_state(params, experiment), self.t0, ts[..., -1], params_of_f,
            ts=ts, adjoint=ForwardMode(), throw=throw, **options,
        ).ys  # fmt: skip

    def prediction_of(self, params: PyTree, experiment: Experiment, throw: bool = False) -> Array:
        """What is observed of an experiment, without noise."""
        states, observe = self.states_of(params, experiment, throw), self.observe
        if observe is None:
            return states
        params = self.with_args(params)

        def observed(t, y, row):
            return call_field(observe, t, y, params, "observe", "what is observed", row=row)

        at_times = jax.vmap(observed, (0, 0, None))
        if experiment.ts.ndim == 2:
            at_times = jax.vmap(at_times)
        return at_times(experiment.ts, states, experiment.row)

    def states_of_rows(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """The states of all experiments, `[rows, ...]` at the initial time and `[rows, times, ...]`
        at the times of the observations. A single experiment is one row."""
        raise NotImplementedError


class ObservedODE(ObservedSystem):
    """An ODE with unknown parameters, and its observations."""

    ts: Float[Array, " times"] | Float[Array, "rows times"]
    ys: Float[Array, "times ..."] | Float[Array, "rows times ..."]
    likelihood: Any
    """A `Likelihood`, a user's log-density, or None with `residual`."""
    residual: Any
    """A user's function, or None."""
    noise: Any
    """An array or a function, as given; else the spread of `ys`."""
    estimated: bool
    """Whether the noise is estimated from the residuals."""
    prior: Callable[[PyTree], PyTree] | None
    row_args: PyTree

    @property
    def unit(self) -> Float[Array, ""] | float:
        """Multiply residuals by this to get units of `ys`."""
        return jnp.asarray(self.noise) if self.estimated else 1.0

    @property
    def is_density(self) -> bool:
        """Whether costs are log-densities, and not distances from a perfect fit."""
        named = isinstance(self.likelihood, Likelihood)
        return self.likelihood is not None and not (named and not callable(self.noise))

    @property
    def experiments(self) -> Experiment:
        """The observations, of one experiment or of several."""
        jumps = self.options.get("jumps")
        doses = None if jumps is None else floating(jumps.times)
        y0 = None if callable(self.y0) else self.y0
        return Experiment(self.ts, self.ys, y0, self.row_args, doses)

    def states_of_rows(self, params: PyTree) -> tuple[PyTree, PyTree]:
        experiments = self.experiments
        states = self.initial_state(params, experiments), self.states_of(params, experiments)
        return states if self.ts.ndim == 2 else jax.tree.map(lambda leaf: leaf[None], states)

    def predicted(self, params: PyTree, end: Float[Array, ""], throw: bool = False) -> Array:
        """Predict the observations, those after `end` as at `end`."""
        return self.prediction_of(params, self.experiments.until(end), throw)

    def noise_at(self, params: PyTree) -> Float[Array, "..."]:
        """The noise of each observation."""
        noise: Any = self.noise
        if not callable(noise):
            return jnp.broadcast_to(noise, self.ys.shape)
        params = self.with_args(params)
        if self.row_args is None or not needs_row(noise):
            return jnp.broadcast_to(jnp.asarray(noise(params)), self.ys.shape)

        def of_row(row):
            return jnp.broadcast_to(jnp.asarray(noise(params, row)), self.ys.shape[1:])

        return jax.vmap(of_row)(self.row_args)

    def nll_of_each(self, predicted: Array, params: PyTree) -> Array:
        """Minus the log-density of each observation; with `residual`, up to a constant."""
        if self.likelihood is None:
            return 0.5 * self.residuals(predicted, self.ys, params) ** 2
        if not isinstance(self.likelihood, Likelihood):
            return -self.likelihood(predicted, self.ys, self.with_args(params))
        noise = self.noise_at(params)
        misfit = self.likelihood.half_deviance(predicted, self.ys, noise)
        return misfit + self.likelihood.saturated(self.ys, noise)

    def residuals(self, predicted: Array, observed: Array, params: PyTree) -> Array:
        """The user's residuals."""
        more = () if takes(self.residual, "predicted", "observed") else (self.with_args(params),)
        return self.residual(predicted, observed, *more)

    def mask(self, end: Float[Array, ""]) -> Bool[Array, "..."]:
        """Mark the observations up to `end` that are not missing."""
        early = (self.ts <= end).reshape(self.ts.shape + (1,) * (self.ys.ndim - self.ts.ndim))
        return early & ~jnp.isnan(self.ys)

    def prior_residuals(self, params: PyTree) -> Float[Array, " k"]:
        """Residuals of the parameters."""
        if self.prior is None:
            return jnp.zeros(0, self.ts.dtype)
        leaves = jax.tree.leaves(self.prior(self.with_args(params)))
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def of_rows(function: Callable[..., PyTree], params: PyTree, rows: PyTree) -> PyTree:
    """`function(params)`, or `function(params, row)` of each row if it needs the row."""
    if rows is None or not needs_row(function):
        return function(params)
    return jax.vmap(lambda row: function(params, row))(rows)


def needs_row(function: Callable[..., Any]) -> bool:
    """Whether a function needs a second argument. One with a default is not passed."""
    return not takes(function, "params")
