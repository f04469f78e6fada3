"""The drop-in replacement against the original."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import ode
from jax.test_util import check_grads
from scipy.integrate import solve_ivp

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
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(Y0, T, 0.25, 9.8)

    for a, b in zip(
        jax.tree.leaves(run(jaxode.odeint)), jax.tree.leaves(run(ode.odeint)), strict=True
    ):
        # Both at the default tolerance of 1.4e-8, amplified by the weights.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# The fields of the upstream test suite: (func, y0, t, args).
RANDOM = np.random.default_rng(0).normal(size=(3, 3))
UPSTREAM = {
    "pendulum near the top": (
        lambda y, t, m, g: jnp.stack([y[1], -m * y[1] - g * jnp.sin(y[0])]),
        [np.pi - 0.1, 0.0], np.linspace(0.0, 1.0, 11), (0.25, 9.8),
    ),
    "weird time": (
        lambda y, t: jnp.stack([y[1] * -t, -y[1] - 9.8 * jnp.sin(y[0])]),
        [np.pi - 0.1, 0.0], np.linspace(0.0, 1.0, 11), (),
    ),
    "decay with arrays": (
        lambda y, t, a, b: -jnp.sqrt(t) - y + a - jnp.mean((y + b) ** 2),
        RANDOM[0], np.linspace(0.1, 0.2, 4), (RANDOM[1], RANDOM[2]),
    ),
    "swoop": (
        lambda y, t, a, b: y - jnp.sin(t) - jnp.cos(t) * a + b,
        np.linspace(1.1, 10.9, 10), np.array([0.1, 0.2]), (0.1, 0.3),
    ),
    "backwards": (
        lambda y, t, a: -a * jnp.sin(y) * t, [0.3, -1.0], np.array([2.0, 0.7, 0.1]), (0.5,),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_fields_against_scipy_and_differences(name):
    func, y0, t, args = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | float) else x,
        (UPSTREAM[name][0], np.array(UPSTREAM[name][1]), *UPSTREAM[name][2:]),
    )
    run = jax.jit(lambda y0, t, args: jaxode.odeint(func, y0, t, *args, rtol=1e-10, atol=1e-10))
    slope = jax.jit(func)
    scipy = solve_ivp(
        lambda t, y: np.asarray(slope(jnp.asarray(y), jnp.asarray(t), *args)),
        (t[0], t[-1]), y0, "DOP853", t, rtol=1e-9, atol=1e-9,
    )  # fmt: skip
    np.testing.assert_allclose(run(y0, t, args), scipy.y.T, rtol=1e-6)
    check_grads(run, (y0, t, args), order=1, modes=("rev",), rtol=1e-5)


@pytest.mark.slow
def test_state_of_leaves_of_any_rank():
    y0 = (jnp.array(-0.1), jnp.array([[[0.1]]]))
    run = lambda a: jaxode.odeint(
        lambda y, t, a: jax.tree.map(lambda x: -a * x, y), y0, jnp.array([0.0, 1.0]), a
    )
    scalar, cube = run(0.5)
    np.testing.assert_allclose(scalar[-1], -0.1 * np.exp(-0.5), rtol=1e-7)
    np.testing.assert_allclose(cube[-1], 0.1 * np.exp(-0.5).reshape(1, 1, 1), rtol=1e-7)
    gradient = jax.grad(lambda a: run(a)[1][-1, 0, 0, 0])(0.5)
    np.testing.assert_allclose(gradient, -0.1 * np.exp(-0.5), rtol=1e-6)


@pytest.mark.slow
def test_gradients_of_third_order():
    """`y(1) = exp(-a)` has the third derivative `-exp(-a)`."""
    run = lambda a: jaxode.odeint(
        lambda y, t, a: -a * y, jnp.ones(()), jnp.array([0.0, 1.0]), a, rtol=1e-9, atol=1e-9
    )[-1]
    third = jax.jit(jax.grad(jax.grad(jax.grad(run))))(0.7)
    np.testing.assert_allclose(third, -np.exp(-0.7), rtol=1e-6)


TURN = {
    "a list for an array": (lambda y, t: [y[1], -y[0]], jnp.array([0.0, 1.0])),
    "an array for a list": (lambda y, t: jnp.stack([y[1], -y[0]]), list(jnp.array([0.0, 1.0]))),
    "a list of numbers": (lambda y, t: [y[1], -y[0]], [0.0, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", TURN)
def test_structures_that_the_original_takes(name, default_settings):
    """In single precision, as most of its users have it."""
    func, y0 = TURN[name]
    y0 = jax.tree.map(lambda x: x if isinstance(x, float) else x.astype(jnp.float32), y0)
    ours, theirs = (
        odeint(func, y0, T.astype(jnp.float32)) for odeint in (jaxode.odeint, ode.odeint)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_forward_mode_raises_what_the_original_does():
    """Upstream issue 3558."""
    run = lambda odeint, a: odeint(lambda y, t: -a * y, jnp.ones(()), T)[-1]
    for odeint in (jaxode.odeint, ode.odeint):
        with pytest.raises(TypeError, match="can't apply forward-mode"):
            jax.jacfwd(partial(run, odeint))(0.5)


@pytest.mark.slow
def test_without_jit():
    """Upstream issue 2598: `vmap` of a solve, step by step in Python."""
    run = lambda y0: jaxode.odeint(
        lambda y, t: y, y0, jnp.array([0.0, 1.0]), rtol=1e-3, atol=1e-3
    )[-1]  # fmt: skip
    y0 = jnp.array([[1.0, 2.0], [0.0, -1.0]])
    with jax.disable_jit():
        np.testing.assert_allclose(jax.vmap(run)(y0), np.e * y0, rtol=1e-2)


@pytest.mark.slow
def test_gradients_of_second_order():
    run = jax.jit(
        lambda y0, t, m: jaxode.odeint(
            lambda y, t, m: -m * jnp.sin(y) * t, y0, t, m, rtol=1e-10, atol=1e-10
        )
    )
    inputs = (jnp.array([1.0, 2.0]), jnp.array([0.0, 0.4, 1.0]), jnp.array(0.7))
    check_grads(run, inputs, modes=("rev",), order=2, rtol=1e-4)


@pytest.mark.slow
def test_grad_of_vmap_and_closures():
    """Upstream issues 8783 (grad with vmap) and 7326 (silent failure)."""

    def run(a, y0):
        return jaxode.odeint(lambda y, t: -a * y, y0, jnp.array([0.0, 1.0]))[-1].sum()

    y0 = jnp.array([[1.0], [2.0]])
    batched = jax.jit(jax.grad(lambda a: jax.vmap(run, (None, 0))(a, y0).sum()))(0.5)
    np.testing.assert_allclose(batched, -3 * np.exp(-0.5), rtol=1e-6)


def test_failure_is_nan():
    ys = jaxode.odeint(lambda y, t: y**2, jnp.ones(1), jnp.array([0.0, 0.5, 2.0]), mxstep=100)
    assert jnp.isnan(ys).all()


def test_gradient_of_a_failed_solve_ends_and_is_nan():
    """Steps are unlimited, so a backward solve from nowhere would never end."""
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
