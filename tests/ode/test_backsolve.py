"""The adjoint ODE: what only a backward solve of its own can get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Y0

import jaxode

BACK = jaxode.BacksolveAdjoint()


def stiff(t, y, _):
    """The first number is the rate of the second."""
    return jnp.stack([jnp.zeros(()), -y[0] * y[1]])


def test_a_row_whose_backward_solve_fails():
    """Row 1 runs out of steps backwards; row 0 has nothing to solve."""
    z = jnp.array([[0.0, 1.0], [1.0, 1.0]])
    options = {"max_steps": 20, "adjoint": jaxode.BacksolveAdjoint(rtol=1e-13, atol=1e-13)}
    total = lambda z, throw: jaxode.flow(
        stiff, z, 0.0, 1.0, batch="per_sample", throw=throw, **options
    ).sum()  # fmt: skip
    gradient = jax.jit(jax.grad(total), static_argnums=1)
    assert jnp.isnan(gradient(z, False)).tolist() == [[False, False], [True, True]]
    message = (
        r"SolveError: backward solve: the steps ran out at t=0\.\d+ in 1 of 2 rows, first in row 1"
        ". Raise max_steps"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(gradient(z, True))


def test_rows_on_which_nothing_depends_need_no_backward_solve():
    """Decay by e^-1000 overflows backwards in time."""

    def loss(rate, keep):
        f = lambda t, y, rate: rate * stiff(t, y, None)
        z = jnp.array([[1.0, 1.0], [1000.0, 1.0]])
        options = {"batch": "per_sample", "adjoint": BACK, "throw": False}
        y1 = jaxode.solve(f, z, 0.0, 1.0, rate, **options).y1
        return jnp.sum(jnp.where(keep[:, None], y1, 0.0))

    run = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(run(1.0, jnp.array([True, False])), -np.exp(-1.0), rtol=1e-3)
    assert jnp.isnan(run(1.0, jnp.array([True, True])))


def test_a_rejected_step_of_a_row_does_not_reach_the_gradient_that_rows_share():
    """Backwards in time a first try goes below zero, where the root is NaN, and is rejected."""

    def loss(rate):
        f = lambda t, y, rate: rate * jnp.sqrt(y)
        options = {"batch": "per_sample", "rtol": 1e-3, "atol": 1e-3, "adjoint": BACK}
        return jaxode.solve(f, jnp.array([[0.1], [3.0]]), 0.0, 5.0, rate, **options).y1.sum()

    # y1 = (sqrt(y0) + 5 rate / 2)^2, to the tolerance of 1e-3.
    expected = 5 * (np.sqrt([0.1, 3.0]) + 2.5).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(1.0), expected, rtol=1e-2)


def test_parameters_are_outside_of_the_error_norm():
    """A parameter in other units has another gradient, but the backward solve the same steps."""

    @jax.jit
    @jax.grad
    def by_state(y0, unit):
        f = lambda t, y, rate: -rate * unit * y * y * jnp.cos(t)
        return jaxode.solve(f, y0, 0.0, 3.0, 2.0 / unit, adjoint=BACK, throw=False).y1.sum()

    # With the parameters in the norm, they differ by 1e-6.
    np.testing.assert_allclose(by_state(Y0, 1e-8), by_state(Y0, 1.0), rtol=1e-11)


def test_the_backward_solve_restarts_at_outputs_on_which_the_loss_does_not_depend():
    """An overdamped pendulum contracts by e^-40, so backwards it is thrown to where it hangs up."""

    def gradient(adjoint, ts=None):
        f = lambda t, y, a: -a * jnp.sin(y - jnp.cos(t))
        options = {"ts": ts, "adjoint": adjoint, "rtol": 1e-6, "atol": 1e-6, "throw": False}
        end = lambda a: jaxode.solve(f, jnp.array([2.0]), 0.0, 2.0, a, **options).y1[0]
        return jax.jit(jax.grad(end))(20.0)

    exact = gradient(jaxode.DiscreteAdjoint())
    np.testing.assert_allclose(gradient(BACK, jnp.linspace(0.0, 2.0, 81)), exact, rtol=1e-2)
    assert not abs(gradient(BACK) / exact - 1) < 10
