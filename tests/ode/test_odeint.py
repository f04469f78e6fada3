"""The drop-in replacement against the original."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, with_slow
from jax.experimental import ode
from jax.test_util import check_grads

import jaxode

T = jnp.linspace(0.1, 2.0, 7)


def test_signature():
    ours, theirs = inspect.signature(jaxode.odeint), inspect.signature(ode.odeint)
    shape = lambda signature: [(p.name, p.kind, p.default) for p in signature.parameters.values()]
    assert shape(ours) == shape(theirs)


# Most are fields of the upstream test suite: (func, y0, t, args).
RANDOM = np.random.default_rng(0).normal(size=(3, 3))
FIELDS = {
    "leaves of any rank": (
        lambda y, t, m, g: {"a": -m * y["a"] - g * y["b"][0, 0], "b": jnp.sin(y["a"]) - y["b"]},
        {"a": np.array(1.0), "b": np.array([[0.5, -1.0]])}, T, (0.25, 9.8),
    ),
    "weird time": (
        lambda y, t: jnp.stack([y[1] * -t, -y[1] - 9.8 * jnp.sin(y[0])]),
        np.array([np.pi - 0.1, 0.0]), jnp.linspace(0.0, 1.0, 11), (),
    ),
    "decay with arrays": (
        lambda y, t, a, b: -jnp.sqrt(t) - y + a - jnp.mean((y + b) ** 2),
        RANDOM[0], jnp.linspace(0.1, 0.2, 4), (RANDOM[1], RANDOM[2]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", with_slow(FIELDS, list(FIELDS)[1:]))  # two programs each
def test_values_and_gradients_agree_with_the_original(name):
    func, y0, t, args = FIELDS[name]

    def run(odeint):
        def loss(y0, t, args):
            ys = jax.tree.leaves(odeint(func, y0, t, *args))
            weights = jnp.arange(1.0, 1 + len(t))
            return sum(jnp.sum(weights @ jnp.sin(y.reshape(len(t), -1))) for y in ys)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(y0, t, args)

    # Both at the default tolerance of 1.4e-8, amplified by the weights.
    assert_close(run(jaxode.odeint), run(ode.odeint), 1e-5)


def test_backwards_in_time():
    """Which the original does not do."""
    func, y0, t, args = FIELDS["leaves of any rank"]
    ys = jaxode.odeint(func, y0, t, *args)
    back = jaxode.odeint(func, jax.tree.map(lambda y: y[-1], ys), t[::-1], *args)
    assert_close(jax.tree.map(lambda y: y[::-1], back), ys, 1e-6)


@pytest.mark.slow  # seven programs each; second derivatives by the adjoint ODE: `test_adjoints.py`
@pytest.mark.parametrize("name", FIELDS)
def test_check_grads_as_the_tests_of_the_original_call_it(name):
    func, y0, t, args = FIELDS[name]
    run = functools.partial(jaxode.odeint, func)
    check_grads(run, (y0, t, *args), modes=["rev"], order=2, atol=1e-3, rtol=1e-3)


# Slow: it runs step by step in Python, as debugging does.
@pytest.mark.slow
def test_without_jit():
    """Upstream issue 2598: `vmap` of a solve."""
    run = lambda y0: jaxode.odeint(
        lambda y, t: y, y0, jnp.array([0.0, 1.0]), rtol=1e-3, atol=1e-3
    )[-1]  # fmt: skip
    y0 = jnp.array([[1.0, 2.0], [0.0, -1.0]])
    with jax.disable_jit():
        np.testing.assert_allclose(jax.vmap(run)(y0), np.e * y0, rtol=1e-2)


TURN = {
    "a list for an array": (lambda y, t: [y[1], -y[0]], jnp.array([0.0, 1.0])),
    "an array for a list": (lambda y, t: jnp.stack([y[1], -y[0]]), list(jnp.array([0.0, 1.0]))),
    "a list of numbers": (lambda y, t: [y[1], -y[0]], [0.0, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", with_slow(TURN, list(TURN)[:2]))  # two programs each
def test_structures_that_the_original_takes(name, default_settings):
    """In single precision, as most of its users have it."""
    func, y0 = TURN[name]
    y0 = jax.tree.map(lambda x: x if isinstance(x, float) else x.astype(jnp.float32), y0)
    ours, theirs = (
        odeint(func, y0, T.astype(jnp.float32)) for odeint in (jaxode.odeint, ode.odeint)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_a_failed_solve_is_nan_and_so_is_its_gradient():
    """Steps are unlimited, so a backward solve from nowhere would never end."""
    ys = jaxode.odeint(lambda y, t: y**2, jnp.ones(1), jnp.array([0.0, 0.5, 2.0]), mxstep=100)
    assert jnp.isnan(ys).all()
    run = lambda y0, t: jaxode.odeint(lambda y, t: -y, y0, t).sum()
    gradient = jax.jit(jax.grad(run))(jnp.ones(1), jnp.array([0.0, 0.5, jnp.nan]))
    assert jnp.isnan(gradient).all()


def test_defaults_in_single_precision():
    dtype = jnp.float32
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


def test_times_that_float32_cannot_tell_apart(default_settings):
    """Those of NumPy are looked at before JAX has made them float32."""
    one = lambda y, t: jnp.ones_like(y)
    for start in (1.7e9, 1e8, 1e7):
        with pytest.raises(ValueError, match=r"odeint\(t0=..., t1=...\): the span .* is lost"):
            jaxode.odeint(one, jnp.zeros(1), start + np.array([0.0, 0.3, 0.6, 1.4]))
    f = lambda t, y, _: jnp.ones_like(y)
    solve = lambda t1, ts: jaxode.solve(f, jnp.zeros(1), 1e8, t1, ts=ts, throw=False)
    with pytest.raises(ValueError, match=r"the span .* is lost"):
        jax.jit(lambda ts: solve(1e8 + 3, ts))(jnp.array([1e8]))
    known = 1e8 + np.array([1.0, 2.0, 3.0])
    assert jax.jit(lambda t1: solve(t1, known))(1e8 + 8).result == jaxode.Result.INVALID_ARGUMENT
    late = jax.jit(lambda t1: jaxode.solve(f, jnp.zeros(1), 1e8 + 3, t1, throw=False).result)
    assert late(np.float32(1e8 + 8)) == jaxode.Result.INVALID_ARGUMENT
