"""The training step of a Neural ODE by each library in JAX; PyTorch's are in `in_torch.py`.

A solver of a problem is `ys(params, y0, ts, tolerance)`, the states after the first time; of
series, at all of their times.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.harness.fairness import JaxStep, exact_gradient
from benchmarks.harness.problems import OdeProblem, Series, batched


def step(p: OdeProblem, ys, static: bool = False) -> JaxStep:
    def loss(params, y0, ts, tolerance):
        found = ys(params, y0, ts, tolerance)
        target = jnp.sin(jnp.arange(found.shape[0], dtype=found.dtype))[:, None, None]
        return jnp.mean((found - target) ** 2)

    return JaxStep(loss, *p, static=static)


def jaxode_step(p: OdeProblem, adjoint: Any = jaxode.DiscreteAdjoint()) -> JaxStep:
    ys = lambda params, y0, ts, tolerance: jaxode.solve(
        jaxode.nn.field, y0, ts[0], ts[-1], params, ts=ts[1:], adjoint=adjoint, rtol=tolerance,
        atol=tolerance, throw=False, batch="joint",
    ).ys  # fmt: skip
    return step(p, ys)


def by_diffrax(params, y0, ts, tolerance, field, t0, solver: Any, adjoint: Any):
    chosen: Any = adjoint(tolerance) if callable(adjoint) else adjoint
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), solver, t0, ts[-1], None, y0, args=params,
        saveat=diffrax.SaveAt(ts=ts), throw=False, adjoint=chosen,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    ).ys  # fmt: skip


CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()


def diffrax_step(
    p: OdeProblem, adjoint: Any = CHECKPOINTED, solver: Any = diffrax.Tsit5()
) -> JaxStep:
    ys = lambda params, y0, ts, tolerance: by_diffrax(
        params, y0, ts[1:], tolerance, batched, ts[0], solver, adjoint
    )
    return step(p, ys)


def odeint_step(p: OdeProblem, solve) -> JaxStep:
    """By `jax.experimental.ode.odeint`, or its likeness in jaxode."""
    swapped = lambda y, t, params: batched(t, y, params)
    ys = lambda params, y0, ts, tolerance: solve(
        swapped, y0, ts, params, rtol=tolerance, atol=tolerance
    )[1:]
    return step(p, ys, static=True)


def exact(p: OdeProblem) -> list[np.ndarray]:
    return exact_gradient(lambda q: diffrax_step(q, solver=diffrax.Dopri8()), p)


def series_loss(ys, ts, real, xp: Any = jnp):
    """The mean square of the distance to a wave, over what is no padding."""
    squares = ((ys - xp.sin(3 * ts)[..., None]) ** 2).mean(-1)
    return xp.where(real, squares, xp.zeros_like(squares)).sum() / real.sum()


def series_step(p: Series, solve, **options: Any) -> JaxStep:
    def loss(params, y0, ts, real, tolerance):
        return series_loss(solve(params, y0, ts, tolerance, **options), ts, real)

    return JaxStep(loss, *p)


def series_by_jaxode(params, y0, ts, tolerance):
    return jaxode.solve(
        jaxode.nn.field, y0, ts[:, 0], ts[:, -1], params, batch="per_sample", ts=ts, rtol=tolerance,
        atol=tolerance, throw=False,
    ).ys  # fmt: skip


def series_by_diffrax(params, y0, ts, tolerance, solver: Any = diffrax.Tsit5()):
    one = lambda y0, ts: by_diffrax(
        params, y0, ts, tolerance, jaxode.nn.field, ts[0], solver, CHECKPOINTED
    )
    return jax.vmap(one)(y0, ts)


def exact_of_series(p: Series) -> list[np.ndarray]:
    make = lambda q: series_step(q, series_by_diffrax, solver=diffrax.Dopri8())
    return exact_gradient(make, p)
