"""The adjoint ODE with the state recomputed backwards: memory of one state."""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode.adjoints.continuous import (
    Segment,
    adjoint_product,
    check_tolerances,
    finish,
    solve_segment,
    with_tolerances,
)
from jaxode.integrate import Integration, Method, integrate


@dataclass(frozen=True)
class BacksolveAdjoint:
    """Solve the adjoint ODE backwards together with the state itself, from its end.

    Memory is that of one state, whatever the number of steps; nothing of the forward solve is kept
    but its end and the states at `ts`, from which the recomputed state is restarted. The gradient is
    that of the continuous problem, exact up to the tolerances, not that of the computed solution.

    The recomputed state is wrong where the ODE is unstable backwards in time, as for stiff decay:
    then the gradient is wrong, too, without a sign of it. `DiscreteAdjoint` has no such weakness.

    Args:
        rtol: relative tolerance of the backward solve; that of the forward solve by default.
        atol: absolute tolerance of the backward solve; that of the forward solve by default.

    References: Chen et al. (2018), arXiv:1806.07366; Kidger et al. (2021), arXiv:2009.09457, for
    keeping the parameters out of the error norm.
    """

    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self):
        check_tolerances("BacksolveAdjoint", self.rtol, self.atol)

    def integrate(
        self,
        field: Callable[..., Float[Array, "rows n"]],
        args: PyTree,
        y0: Float[Array, "rows n"],
        t0: Float[Array, ""],
        t1: Float[Array, ""],
        ts: Float[Array, " times"] | None,
        method: Method,
    ) -> Integration:
        """Solve `dy/dt = field(t, y, args)`, differentiable in everything but `method`."""
        return _integrate((field, args, y0, t0, t1, ts), method, self.rtol, self.atol)


@eqx.filter_custom_vjp
def _integrate(inputs, method, rtol, atol):
    del rtol, atol
    field, args, y0, t0, t1, ts = inputs
    return integrate(lambda t, y: field(t, y, args), method, y0, t0, t1, ts)[0]


@_integrate.def_fwd
def _forward(perturbed, inputs, method, rtol, atol):
    del perturbed, rtol, atol
    field, args, y0, t0, t1, ts = inputs
    integration, _ = integrate(lambda t, y: field(t, y, args), method, y0, t0, t1, ts)
    return integration, integration


@_integrate.def_bwd
def _backward(integration, out, perturbed, inputs, method, rtol, atol):
    field, args, y0, t0, t1, ts = inputs
    params, rest = eqx.partition((field, args), perturbed[:2])

    def apply(params, t, y):
        field, args = eqx.combine(params, rest)
        return field(t, y, args)

    def adjoint_field(t, state, weight):
        y, a = jnp.split(state, 2, axis=1)
        f, da, integrand = adjoint_product(apply, params, t, y, a, weight)
        return jnp.concatenate([f, da], axis=1), integrand

    method = with_tolerances(method, rtol, atol)
    n = y0.shape[1]
    y1, ys = integration.y1, integration.ys
    y1_bar = jnp.zeros_like(y0) if out.y1 is None else out.y1
    start = jnp.broadcast_to(t1, y0.shape[:1])
    zeros = jax.tree.map(jnp.zeros_like, params)
    segment = Segment.start(start, -integration.h, jnp.concatenate([y1, y1_bar], axis=1), zeros)
    solve = lambda segment, end: solve_segment(
        adjoint_field, method, segment, jnp.broadcast_to(end, y0.shape[:1]), t1 - t0
    )
    if out.ys is None:
        segment = solve(segment, t0)
    else:
        # One loop for all segments: to each saved time, where the state is restarted from what the
        # forward solve saved and the cotangent jumps, and last to the start.
        count = ts.shape[0]

        def body(i, segment):
            j = count - 1 - i
            at_output = j >= 0
            segment = solve(segment, jnp.where(at_output, ts[jnp.maximum(j, 0)], t0))
            y, a = jnp.split(segment.y, 2, axis=1)
            y = jnp.where(at_output, ys[jnp.maximum(j, 0)], y)
            a = a + jnp.where(at_output, out.ys[jnp.maximum(j, 0)], 0.0)
            return segment._replace(y=jnp.concatenate([y, a], axis=1))

        segment = jax.lax.fori_loop(0, count + 1, body, segment)
    y0_bar = segment.y[:, n:]
    return finish(apply, params, perturbed, inputs, integration, out, y0_bar, segment)
