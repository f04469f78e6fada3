"""An ODE with unknown parameters, and its observations."""

from collections.abc import Callable
from typing import Any

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


class ObservedODE(eqx.Module):
    """An ODE with unknown parameters, and its observations."""

    f: Callable[..., PyTree]
    y0: PyTree
    """The state at `t0`, or a function of the parameters."""
    t0: Float[Array, ""]
    ts: Float[Array, " times"] | Float[Array, "rows times"]
    ys: Float[Array, "times ..."] | Float[Array, "rows times ..."]
    template: PyTree
    """Parameters, for their shapes."""
    observe: Callable[..., Array] | None
    likelihood: Any
    """A `Likelihood`, a user's log-density, or None with `residual`."""
    residual: Any
    """A user's function, or None."""
    noise: Any
    """An array or a function, as given; else the spread of `ys`."""
    estimated: bool
    """Whether the noise is estimated from the residuals."""
    prior: Callable[[PyTree], PyTree] | None
    args: PyTree
    """Data that the functions get together with the parameters, or None."""
    row_args: PyTree
    options: dict[str, Any]

    @property
    def unit(self) -> Float[Array, ""] | float:
        """Multiply residuals by this to get units of `ys`."""
        return jnp.asarray(self.noise) if self.estimated else 1.0

    @property
    def is_density(self) -> bool:
        """Whether costs are log-densities, and not distances from a perfect fit."""
        named = isinstance(self.likelihood, Likelihood)
        return self.likelihood is not None and not (named and not callable(self.noise))

    def unravel(self, flat: Float[Array, " n"]) -> PyTree:
        """The parameters."""
        return ravel_pytree(self.template)[1](flat)

    def with_args(self, params: PyTree) -> PyTree:
        """The argument `params` of a user's function: with `args`, the pair `(params, args)`."""
        return params if self.args is None else (params, self.args)

    def start(self, params: PyTree) -> PyTree:
        """The state at `t0`."""
        if not callable(self.y0):
            return self.y0
        return of_rows(self.y0, self.with_args(params), self.row_args)

    def states(self, params: PyTree, end: Float[Array, ""], throw: bool = False) -> PyTree:
        """The states at the times of the observations, those after `end` as at `end`."""
        ts, batch = jnp.minimum(self.ts, end), None if self.ts.ndim == 1 else "per_sample"
        options = self.options
        if (jumps := options.get("jumps")) is not None:  # those after the end are padding
            times = floating(jumps.times)
            times = jnp.where(times > ts[..., -1:], jnp.inf, times)
            options = {**options, "jumps": Jumps(times, jumps.change)}
        return solve(
            self.f, self.start(params), self.t0, ts[..., -1], self.with_args(params), ts=ts,
            batch=batch, row_args=self.row_args, adjoint=ForwardMode(), throw=throw, **options,
        ).ys  # fmt: skip

    def predicted(self, params: PyTree, end: Float[Array, ""], throw: bool = False) -> Array:
        """Predict the observations, those after `end` as at `end`."""
        ys, observe, params = self.states(params, end, throw), self.observe, self.with_args(params)
        if observe is None:
            return ys
        ts = jnp.minimum(self.ts, end)

        def observed(t, y, row):
            return call_field(observe, t, y, params, "observe", "what is observed", row=row)

        at_times = jax.vmap(observed, (0, 0, None))
        if ts.ndim == 1:
            return at_times(ts, ys, None)
        return jax.vmap(at_times)(ts, ys, self.row_args)

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
