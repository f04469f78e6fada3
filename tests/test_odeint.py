"""The drop-in replacement against the original."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import ode
from jax.test_util import check_grads

import jaxode

T = jnp.linspace(0.1, 2.0, 7)


def pend(y, t, m, g):
    return {"angle": y["speed"], "speed": -m * y["speed"] - g * jnp.sin(y["angle"])}


Y0 = {"angle": jnp.array([1.0, 0.3]), "speed": jnp.array([0.0, -1.0])}


def test_signature():
    ours, theirs = inspect.signature(jaxode.odeint), inspect.signature(ode.odeint)
    shape = lambda signature: [(p.name, p.kind, p.default) for p in signature.parameters.values()]
    assert shape(ours) == shape(theirs)


def test_values_and_gradients_agree_with_the_original():
    def run(odeint):
        weights = jnp.arange(14.0).reshape(7, 2)
        loss = lambda y0, t, m, g: sum(
            jnp.sum(weights * jnp.sin(leaf)) for leaf in odeint(pend, y0, t, m, g).values()
        )
        return jax.value_and_grad(loss, (0, 1, 2, 3))(Y0, T, 0.25, 9.8)

    for a, b in zip(
        jax.tree.leaves(run(jaxode.odeint)), jax.tree.leaves(run(ode.odeint)), strict=True
    ):
        # Both at the default tolerance of 1.4e-8, amplified by the weights.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_second_order():
    run = lambda y0, t, m: jaxode.odeint(
        lambda y, t, m: -m * jnp.sin(y) * t, y0, t, m, rtol=1e-10, atol=1e-10
    )
    inputs = (jnp.array([1.0, 2.0]), jnp.array([0.0, 0.4, 1.0]), jnp.array(0.7))
    check_grads(run, inputs, modes=("rev",), order=2, rtol=1e-4)


def test_grad_of_vmap_and_closures():
    """Upstream issues 8783 (grad with vmap) and 7326 (silent failure)."""

    def run(a, y0):
        return jaxode.odeint(lambda y, t: -a * y, y0, jnp.array([0.0, 1.0]))[-1].sum()

    y0 = jnp.array([[1.0], [2.0]])
    batched = jax.grad(lambda a: jax.vmap(run, (None, 0))(a, y0).sum())(0.5)
    np.testing.assert_allclose(batched, -3 * np.exp(-0.5), rtol=1e-6)


def test_failure_is_nan():
    ys = jaxode.odeint(lambda y, t: y**2, jnp.ones(1), jnp.array([0.0, 0.5, 2.0]), mxstep=100)
    assert jnp.isnan(ys).all()


def test_gradient_of_a_failed_solve_ends_and_is_nan():
    """Steps are unlimited, so a backward solve from nowhere would never end."""
    run = lambda y0, t: jaxode.odeint(lambda y, t: -y, y0, t).sum()
    gradient = jax.jit(jax.grad(run))(jnp.ones(1), jnp.array([0.0, 0.5, jnp.nan]))
    assert jnp.isnan(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_defaults_in_both_precisions(dtype):
    ys = jaxode.odeint(lambda y, t: -y, jnp.ones(1, dtype), jnp.array([0.0, 1.0], dtype))
    assert ys.dtype == dtype
    np.testing.assert_allclose(ys[:, 0], [1.0, np.exp(-1)], rtol=1e-6)


def test_hmax_sees_a_pulse_that_longer_steps_would_miss():
    """A pulse of area one at t = 50; without a bound the steps grow past it."""
    pulse = lambda y, t: (
        jnp.exp(-0.5 * ((t - 50.0) / 0.1) ** 2) / (0.1 * np.sqrt(2 * np.pi)) + 0 * y
    )
    run = lambda hmax: jaxode.odeint(pulse, jnp.zeros(1), jnp.array([0.0, 100.0]), hmax=hmax)[-1, 0]
    np.testing.assert_allclose(run(0.1), 1.0, rtol=1e-6)
    assert run(jnp.inf) < 0.1


def test_one_time_returns_the_initial_state():
    np.testing.assert_array_equal(jaxode.odeint(lambda y, t: -y, jnp.ones(2), T[:1]), [[1.0, 1.0]])
