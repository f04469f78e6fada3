"""A family of methods that jaxode does not have is one class: its step, and its dense output.

Its gradient is that of its step. A family with a faster one defines `pull_back`, too.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode
from jaxode.ode.solvers.base import Method
from jaxode.ode.solvers.explicit import Solver

GAMMA, ITERATIONS = 1 - 0.5**0.5, 6


@dataclass(frozen=True, eq=False)
class DiagonallyImplicit(Method):
    """Alexander's SDIRK method of order 2, by Newton's method with the Jacobian at the start.

    Stage 0 is the vector field at the start. The others solve `k_i = f(t + c_i h, y + h sum_j A_ij
    k_j)`, where `A_ii` is `GAMMA`.
    """

    implicit: ClassVar[bool] = True
    dense: ClassVar[np.ndarray] = np.array([[0.0, 1 - GAMMA, GAMMA]])

    def evaluate(self, field, t, h, y, slope, count):
        unit = jnp.eye(y.shape[1], dtype=y.dtype)
        k, push = jax.linearize(lambda y: field(t, y), y)
        columns = jax.vmap(lambda e: push(jnp.broadcast_to(e, y.shape)))(unit)
        matrix, stages = unit[None] - GAMMA * h[:, None, None] * columns.transpose(1, 2, 0), [k]
        for c, start in ((GAMMA, y), (1.0, None))[: count - 1]:
            start = y + h[:, None] * (1 - GAMMA) * k if start is None else start

            def improved(_, k, t=t + c * h, start=start):
                rest = field(t, start + GAMMA * h[:, None] * k) - k
                return k + jnp.linalg.solve(matrix, rest[..., None])[..., 0]

            k = jax.lax.fori_loop(0, ITERATIONS, improved, k)
            stages.append(k)
        return jnp.stack(stages)


@dataclass(frozen=True)
class SDIRK2(Solver):
    method: ClassVar[Method] = DiagonallyImplicit(
        "SDIRK2", 2, 2, b=np.array([0, 1 - GAMMA, GAMMA]), b_error=np.array([0, -GAMMA, GAMMA]),
        first_same_as_last=False,
    )  # fmt: skip


Y0 = jnp.array([[2.0, 0.0], [1.0, -0.5]])
MU = jnp.array([1.0, 5.0])
OPTIONS = {"batch": "per_sample", "row_args": MU, "max_steps": 1000}


def van_der_pol(t, y, args):
    scale, mu = args
    return jnp.stack([y[1], mu * (scale * (1 - y[0] ** 2) * y[1] - y[0] * jnp.cos(0.1 * t))])


def loss(inputs, solver, **options):
    y0, t1, ts, scale = inputs
    solution = jaxode.solve(
        van_der_pol, y0, 0.0, t1, scale, ts=ts, solver=solver, **OPTIONS | options
    )
    return jnp.sum(solution.y1[:, 0] ** 2) + jnp.sum(jnp.sin(solution.ys[..., 0]))


INPUTS = Y0, jnp.asarray(0.5), jnp.array([0.1, 0.3]), jnp.asarray(1.0)


@pytest.mark.slow  # of the method, not of jaxode
def test_it_converges_with_its_order():
    ends = INPUTS[0], INPUTS[1], INPUTS[1][None], INPUTS[3]  # an output inside has order one
    exact = loss(ends, jaxode.Rodas5P(), rtol=1e-10, atol=1e-10)
    errors = [abs(loss(ends, SDIRK2(), steps=steps) - exact) for steps in (40, 80)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 2, atol=0.3)


def test_its_gradient_is_exact():
    """Forward and reverse mode agree to rounding, where the solution is a rough one."""
    run = lambda adjoint: lambda x: loss(x, SDIRK2(), rtol=1e-2, atol=1e-2, adjoint=adjoint)
    reverse = jax.jit(jax.grad(run(jaxode.DiscreteAdjoint(checkpoints=3))))(INPUTS)
    forward = jax.jit(jax.jacfwd(run(jaxode.ForwardMode())))(INPUTS)
    for a, b in zip(reverse, forward, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow  # of the method, not of jaxode
def test_stability_is_that_of_the_method():
    """A rate of 1e6 takes no more steps than one of 1e3."""

    def steps(rate):
        f = lambda t, y, rate: -rate * (y - jnp.cos(t))
        solution = jaxode.solve(f, jnp.ones(1), 0.0, 1.0, rate, solver=SDIRK2(), rtol=1e-4)
        assert solution.y1[0] == pytest.approx(np.cos(1.0), abs=2e-3)
        return int(solution.stats.num_steps)

    assert steps(1e6) <= 1.5 * steps(1e3)


@pytest.mark.slow  # `test_features.py` has them for each family that jaxode has
def test_it_takes_events_breakpoints_and_doses():
    options = {"solver": SDIRK2(), "rtol": 1e-6, "atol": 1e-6}
    jumps = jaxode.Jumps([0.5], lambda t, y, rate, i: y + 1)
    event = jaxode.Event(lambda t, y, rate: y[0] - 0.9)

    def end(rate):
        f = lambda t, y, rate: jnp.where(t < 0.25, 0.0, -rate) * y
        solution = jaxode.solve(
            f, jnp.ones(1), 0.0, 6.0, rate, jumps=jumps, event=event, breakpoints=[0.25], **options
        )
        return solution.t1

    closed = lambda rate: 0.5 + jnp.log((jnp.exp(-0.25 * rate) + 1) / 0.9) / rate
    # The level is passed once before the dose.
    closed_first = lambda rate: 0.25 + jnp.log(1 / 0.9) / rate
    found = jax.jit(jax.value_and_grad(end))
    np.testing.assert_allclose(found(0.2), jax.value_and_grad(closed)(0.2), rtol=1e-4)
    np.testing.assert_allclose(found(2.0), jax.value_and_grad(closed_first)(2.0), rtol=1e-4)
