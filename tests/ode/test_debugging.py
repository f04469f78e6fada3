"""`backward_stats`: the work of a backward solve."""

import dataclasses

import diffrax
import jax
import jax.numpy as jnp
import pytest
from helpers import KINDS, METHODS, with_slow

import jaxode

Y0 = jnp.array([1.0, 0.5])
# The methods that solve the adjoint ODE.
CONTINUOUS = [METHODS[name].adjoint for name in KINDS if not METHODS[name].exact]


def decay(t, y, rate):
    return -rate * y * y * jnp.cos(t)


def name(adjoint):
    return type(adjoint).__name__


def test_counts_the_evaluations_of_the_backward_solve():
    """Every call of the vector field is counted on the host."""
    calls = []

    def f(t, y, rate):
        jax.debug.callback(lambda: calls.append(1))
        return decay(t, y, rate)

    adjoint = jaxode.BacksolveAdjoint(rtol=1e-7)
    forward = jaxode.solve(f, Y0, 0.0, 1.0, 2.0, adjoint=adjoint)
    backward = jaxode.backward_stats(f, Y0, 0.0, 1.0, 2.0, adjoint=adjoint)
    jax.effects_barrier()
    # The forward solve ran once for `forward`, and twice within `backward_stats`.
    assert len(calls) == 3 * forward.stats.num_evals + backward.num_evals
    assert backward.num_steps == backward.num_accepted + backward.num_rejected


@pytest.mark.parametrize("adjoint", with_slow(CONTINUOUS, CONTINUOUS[1:]), ids=name)
def test_parameters_are_outside_of_the_error_norm(adjoint):
    """A parameter in other units has another gradient, but the same steps."""

    def f(t, y, args):
        rate, unit = args
        return decay(t, y, rate * unit)

    plain, scaled = (
        jaxode.backward_stats(f, Y0, 0.0, 3.0, (2.0 / unit, unit), adjoint=adjoint)
        for unit in (1.0, 1e-8)
    )
    assert plain == scaled


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", CONTINUOUS, ids=name)
def test_tolerances_of_the_backward_solve_are_its_own(adjoint):
    loose, tight = (
        jaxode.backward_stats(
            decay, Y0, 0.0, 1.0, 2.0, adjoint=dataclasses.replace(adjoint, rtol=tol, atol=tol)
        )
        for tol in (1e-3, 1e-9)
    )
    assert tight.num_accepted > 2 * loose.num_accepted


@pytest.mark.parametrize("adjoint", with_slow(CONTINUOUS, CONTINUOUS[1:]), ids=name)
def test_outputs_restart_the_backward_solve(adjoint):
    stats = jaxode.backward_stats(
        decay, Y0, 0.0, 1.0, 2.0, adjoint=adjoint, ts=jnp.linspace(0.0, 1.0, 9),
        loss=lambda solution: jnp.sum(solution.ys**2),
    )  # fmt: skip
    assert stats.num_accepted >= 8


def test_the_backward_solve_restarts_where_the_loss_does_not_depend_on_outputs():
    def loss(rate, ts, weight):
        solution = jaxode.solve(
            decay,
            Y0,
            0.0,
            1.0,
            rate,
            ts=ts,
            adjoint=jaxode.BacksolveAdjoint(),
            rtol=1e-2,
            atol=1e-2,
        )
        outputs = 0.0 if weight is None else weight * jnp.sum(solution.ys)
        return jnp.sum(solution.y1**2) + outputs

    ts, gradient = jnp.linspace(0.0, 1.0, 9), jax.jit(jax.grad(loss))
    unused = float(gradient(2.0, ts, None))
    assert unused == pytest.approx(float(gradient(2.0, ts, 0.0)), rel=1e-12)
    assert unused != pytest.approx(float(gradient(2.0, None, None)), rel=1e-6)


def test_the_backward_solve_starts_from_the_gradient_of_the_loss():
    """Ten million times the cotangent needs more steps for the same absolute error."""
    adjoint = jaxode.InterpolatingAdjoint(rtol=1e-12, atol=1e-5)
    small, large = (
        jaxode.backward_stats(
            decay, Y0, 0.0, 1.0, 2.0, adjoint=adjoint,
            loss=lambda solution, scale=scale: scale * jnp.sum(solution.y1),
        )
        for scale in (1.0, 1e7)
    )  # fmt: skip
    assert large.num_accepted > 2 * small.num_accepted


def test_needs_a_backward_solve():
    with pytest.raises(TypeError, match=r"backward_stats\(adjoint=...\): must have a backward"):
        jaxode.backward_stats(decay, Y0, 0.0, 1.0, 2.0, adjoint=jaxode.DiscreteAdjoint())


def test_needs_an_explicit_solver():
    with pytest.raises(
        ValueError, match=r"backward_stats\(solver=...\): must be an explicit .*no5"
    ):
        jaxode.backward_stats(
            decay, Y0, 0.0, 1.0, 2.0,
            adjoint=jaxode.BacksolveAdjoint(), solver=diffrax.Kvaerno5(),
        )  # fmt: skip
