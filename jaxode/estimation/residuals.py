"""Residuals of an ODE with parameters, and least squares from several starts."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import floating
from jaxode._jax.closure import compiled
from jaxode.ode.adjoints import ForwardMode
from jaxode.ode.field import call_field
from jaxode.ode.pieces import Jumps
from jaxode.ode.solve import solve

# Least squares ends when a step changes the parameters by less than this part.
PARAMETER_TOLERANCE = {jnp.dtype("float64"): 1e-6, jnp.dtype("float32"): 1e-3}


class ObservedODE(eqx.Module):
    """An ODE with unknown parameters, and its observations.

    Half squares of its residuals are negative log-densities, up to a constant.
    """

    f: Callable[..., PyTree]
    y0: PyTree
    """The state at `t0`, or a function of the parameters."""
    t0: Float[Array, ""]
    ts: Float[Array, " times"] | Float[Array, "rows times"]
    ys: Float[Array, "times ..."] | Float[Array, "rows times ..."]
    template: PyTree
    """Parameters, for their shapes."""
    observe: Callable[..., Array] | None
    residual: Callable[[Array, Array], Array] | None
    noise: Float[Array, "..."]
    """Divides the residuals: the noise if it is given, else the spread of `ys`."""
    estimated: bool
    """Whether the residuals say the noise."""
    prior: Callable[[PyTree], PyTree] | None
    row_args: PyTree
    options: dict[str, Any]

    @property
    def unit(self) -> Float[Array, ""] | float:
        """Multiply residuals by this to get units of `ys`."""
        return self.noise if self.estimated else 1.0

    def unravel(self, flat: Float[Array, " n"]) -> PyTree:
        """The parameters."""
        return ravel_pytree(self.template)[1](flat)

    def start(self, params: PyTree) -> PyTree:
        """The state at `t0`."""
        return self.y0(params) if callable(self.y0) else self.y0

    def predicted(self, params: PyTree, end: Float[Array, ""], throw: bool = False) -> Array:
        """Predict the observations up to `end`, and hold them constant from there on."""
        ts, batch = jnp.minimum(self.ts, end), None if self.ts.ndim == 1 else "per_sample"
        options = self.options
        if (jumps := options.get("jumps")) is not None:  # those after the end are padding
            times = floating(jumps.times)
            times = jnp.where(times > ts[..., -1:], jnp.inf, times)
            options = {**options, "jumps": Jumps(times, jumps.change)}
        ys = solve(
            self.f, self.start(params), self.t0, ts[..., -1], params, ts=ts, batch=batch,
            row_args=self.row_args, adjoint=ForwardMode(), throw=throw, **options,
        ).ys  # fmt: skip
        observe = self.observe
        if observe is None:
            return ys

        def seen(t, y, row):
            return call_field(observe, t, y, params, "observe", "what is observed", row=row)

        each = jax.vmap(seen, (0, 0, None))
        return each(ts, ys, None) if batch is None else jax.vmap(each)(ts, ys, self.row_args)

    def residuals(self, flat: Float[Array, " n"], end: Float[Array, ""]) -> Float[Array, " m"]:
        """Residuals of observations up to `end`, zero where missing or later; and of the prior."""
        params = self.unravel(flat)
        predicted = self.predicted(params, end)
        seen = (self.ts <= end).reshape(self.ts.shape + (1,) * (self.ys.ndim - self.ts.ndim))
        seen = seen & ~jnp.isnan(self.ys)
        ys = jnp.where(seen, self.ys, jax.lax.stop_gradient(predicted))
        if self.residual is None:
            apart = (predicted - ys) / self.noise
        else:
            apart = self.residual(predicted, ys)
        found = [jnp.where(seen, apart, 0.0).ravel()]
        if self.prior is not None:
            found.extend(jnp.ravel(leaf) for leaf in jax.tree.leaves(self.prior(params)))
        return jnp.concatenate(found)


class Fits(NamedTuple):
    """The end of least squares from each start."""

    flats: Float[Array, "starts n"]
    costs: Float[Array, " starts"]
    """Half the sums of squares."""
    converged: Bool[Array, " starts"]
    jacobians: Float[Array, "starts m n"]


@compiled
def costs_at(residuals: Callable[..., Array], data: Any, flats: Float[Array, "starts n"]) -> Array:
    """Half the sum of squares at each start; infinite where it cannot be solved."""
    costs = jax.vmap(lambda flat: 0.5 * jnp.sum(residuals(flat, data) ** 2))(flats)
    return jnp.where(jnp.isfinite(costs), costs, jnp.inf)


@compiled
def least_squares(
    residuals: Callable[..., Array],
    data: Any,
    flats: Float[Array, "starts n"],
    fixed: Bool[Array, " n"],
    steps: int,
    hold: Float[Array, " starts"],
) -> Fits:
    """Minimize half the sum of squares from each start, by Levenberg-Marquardt.

    Args:
        residuals: a function `residuals(flat, data)` of one vector of parameters.
        data: whatever else it depends on.
        flats: the starts.
        fixed: parameters that stay where they start.
        steps: the largest number of steps.
        hold: weighs the distance from the start, in units of its size or one, as further residuals,
            which the result does not count.
    """
    import optimistix as optx

    tolerance = PARAMETER_TOLERANCE[flats.dtype]
    method = optx.LevenbergMarquardt(tolerance, math.sqrt(tolerance) * tolerance)

    def improve(start, hold):
        def of_free(flat):
            return residuals(jnp.where(fixed, start, flat), data)

        def held(scaled, _):
            r, jacobian = linearized(of_free, unit * scaled)
            return jnp.concatenate([r, hold * (scaled - start / unit)]), (r, jacobian)

        unit = jnp.maximum(jnp.abs(start), 1.0)  # of each parameter, since the damping has none
        found = optx.least_squares(
            held, method, start / unit, max_steps=steps, throw=False, has_aux=True
        )
        r, jacobian = found.aux
        cost = 0.5 * jnp.sum(r**2)
        cost = jnp.where(jnp.isfinite(cost), cost, jnp.inf)
        return Fits(unit * found.value, cost, found.result == optx.RESULTS.successful, jacobian)

    return jax.vmap(improve)(flats, hold)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def linearized(
    f: Callable[[Array], Array], x: Float[Array, " n"]
) -> tuple[Float[Array, " m"], Float[Array, "m n"]]:
    """`f(x)` and its Jacobian, which is also the derivative of the first: a product with it solves
    no ODE again."""

    def twice(x):
        y = f(x)
        return y, y

    jacobian, y = jax.jacfwd(twice, has_aux=True)(x)
    return y, jacobian


@linearized.defjvp
def _(f, primals, tangents):
    y, jacobian = linearized(f, *primals)
    return (y, jacobian), (jacobian @ tangents[0], jnp.zeros_like(jacobian))


def of_observations(flat: Float[Array, " n"], data: tuple[ObservedODE, Float[Array, ""]]) -> Array:
    """The residuals of observations up to a time, as `least_squares` takes them."""
    problem, end = data
    return problem.residuals(flat, end)
