"""Solves that end where a condition crosses zero, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode
from jaxode import Event

TIGHT = {"rtol": 1e-11, "atol": 1e-11}
METHODS = {
    "discrete": jaxode.DiscreteAdjoint(),
    "backsolve": jaxode.BacksolveAdjoint(),
    "interpolating": jaxode.InterpolatingAdjoint(),
    "forward": jaxode.ForwardMode(),
}


def decay(t, y, rate):
    return -rate * y


LEVEL = Event(lambda t, y, rate: y - 0.2)


@pytest.mark.parametrize("name", METHODS)
def test_decay_to_a_level(name):
    """`t = log(y0 / level) / rate + t0`, and what is integrated up to then."""

    def run(y0, t0, rate):
        s = jaxode.solve(decay, y0, t0, 9.0, rate, event=LEVEL, adjoint=METHODS[name], **TIGHT)
        return jnp.stack([s.t1, s.y1])

    inputs = (jnp.array(1.5), jnp.array(0.5), jnp.array(0.7))
    jacobian = jax.jacfwd if name == "forward" else jax.jacrev
    value, slopes = jax.jit(lambda *x: (run(*x), jacobian(run, (0, 1, 2))(*x)))(*inputs)
    y0, t0, rate = inputs
    time = np.log(y0 / 0.2) / rate
    np.testing.assert_allclose(value, [t0 + time, 0.2], rtol=1e-9)
    # The state at the level stays there.
    expected = np.array([[1 / (rate * y0), 0], [1, 0], [-time / rate, 0]])
    np.testing.assert_allclose(np.stack(slopes), expected, atol=1e-8)


def fall(t, state, g):
    del t
    return state[1], -g


GROUND = Event(lambda t, state, g: state[0], direction=-1)


def test_bouncing_ball():
    """Bounces `k` come at `(1 + 2 e + ... + 2 e^k) sqrt(2 h / g)`, with `e` what is left."""
    e, h, g = 0.8, jnp.array(1.7), 9.81

    @jax.jit
    def bounces(h):
        state, t, times = (h, jnp.zeros_like(h)), jnp.zeros_like(h), []
        for _ in range(3):
            s = jaxode.solve(fall, state, t, t + 5.0, g, event=GROUND, max_step=0.5, **TIGHT)
            state, t = (s.y1[0], -e * s.y1[1]), s.t1
            times.append(t)
        return jnp.stack(times)

    first = np.sqrt(2 * h / g)
    expected = first * (1 + 2 * np.array([0, e, e + e**2]))
    np.testing.assert_allclose(bounces(h), expected, atol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.jacrev(bounces))(h), expected / (2 * h), atol=1e-8)


def test_rows_have_events_of_their_own():
    """One early, one late, one never, one that goes back in time."""
    y0, t1 = jnp.array([0.5, 1.5, 0.1, 0.1]), jnp.array([9.0, 9.0, 9.0, -9.0])

    def run(y0, rate):
        return jaxode.solve(
            decay, y0, 0.0, t1, rate, batch="per_sample", event=LEVEL,
            ts=jnp.stack([0.1 * t1, t1], 1), **TIGHT,
        )  # fmt: skip

    s = jax.jit(run)(y0, 1.0)
    assert list(s.event) == [True, True, False, True]
    times = np.log(y0 / 0.2)
    times[2:3] = 9.0
    np.testing.assert_allclose(s.t1, times, atol=1e-9)
    np.testing.assert_allclose(s.y1, [0.2, 0.2, 0.1 * np.exp(-9), 0.2], atol=1e-9)
    # Outputs beyond the event are the state there.
    beyond = np.abs(0.1 * t1) > np.abs(times)
    np.testing.assert_allclose(s.ts[:, 0], np.where(beyond, times, 0.1 * t1), atol=1e-9)
    np.testing.assert_allclose(s.ys[:, 0], y0 * np.exp(-s.ts[:, 0]), rtol=1e-7)
    np.testing.assert_allclose(s.ys[:, 1], s.y1, rtol=1e-12)
    bar = jax.jit(jax.grad(lambda y0, rate: run(y0, rate).t1.sum(), (0, 1)))(y0, 1.0)
    came = np.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(bar[0], came / y0, atol=1e-8)
    np.testing.assert_allclose(bar[1], -np.sum(came * times), atol=1e-7)


SINE = lambda t, y, _: jnp.stack([y[1], -y[0]])
AT = {
    "never": (Event(lambda t, y, _: y[0] - 1.5), 6.0, False),
    "at the start": (Event(lambda t, y, _: y[0]), 0.0, True),
    "zero at the start, but it rises": (Event(lambda t, y, _: y[0], direction=-1), np.pi, True),
    "rising": (Event(lambda t, y, _: y[0] - 0.5, direction=1), np.pi / 6, True),
    "falling": (Event(lambda t, y, _: y[0] - 0.5, direction=-1), 5 * np.pi / 6, True),
    "two in one step, the first": (Event(lambda t, y, _: (t - 0.31) * (t - 0.52)), 0.31, True),
    "at the end": (Event(lambda t, y, _: t - 6.0), 6.0, True),
}


@functools.cache
def time_of(name, steps):
    return jax.jit(lambda: jaxode.solve(
        SINE, jnp.array([0.0, 1.0]), 0.0, 6.0, event=AT[name][0], steps=steps,
        **({} if steps else TIGHT),
    ))()  # fmt: skip


@pytest.mark.parametrize("name", AT)
def test_when(name):
    _, time, came = AT[name]
    # Steps of 0.6 have both crossings inside.
    steps = 10 if "two" in name else None
    s = time_of(name, steps)
    assert bool(s.event) == came
    np.testing.assert_allclose(s.t1, time, atol=1e-8)
    np.testing.assert_allclose(s.t_reached, time, atol=1e-8)


def test_a_tangent_condition_has_no_derivative():
    """`t^3` touches zero with slope zero: the implicit function theorem does not hold."""
    event = Event(lambda t, y, a: (t - a) ** 3)
    run = lambda a: jaxode.solve(decay, 1.0, 0.0, 1.0, a, event=event).t1
    assert not np.isfinite(jax.jit(jax.grad(run))(0.5))


def test_a_failed_solve_is_one_with_an_event():
    f = lambda t, y, _: jnp.where(t > 0.5, jnp.nan, -y)
    s = jaxode.solve(f, 1.0, 0.0, 1.0, event=Event(lambda t, y, _: y - 0.1), throw=False)
    assert s.result == jaxode.Result.NON_FINITE
    assert np.isnan(s.y1)
    with pytest.raises(jaxode.SolveError, match="solve: the vector field or the state is not fin"):
        jaxode.solve(f, 1.0, 0.0, 1.0, event=Event(lambda t, y, _: y - 0.1))


def test_the_interpolant_ends_at_the_event():
    s = jaxode.solve(decay, 1.5, 0.0, 9.0, 1.0, event=LEVEL, dense=True, max_steps=256, **TIGHT)
    np.testing.assert_allclose(s.evaluate(s.t1), 0.2, atol=1e-9)
    with pytest.raises(ValueError, match="must lie between"):
        s.evaluate(s.t1 + 0.1)


WRONG = {
    "a function": ({"event": lambda t, y, _: y}, r"event=...\): must be a jaxode.Event"),
    "a vector": ({"event": Event(lambda t, y, _: jnp.ones(3))}, r"must return a floating scalar"),
    "joint steps": ({"event": LEVEL, "batch": "joint"}, r"Use batch='per_sample'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_events(name):
    given, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        jaxode.solve(decay, jnp.ones((2, 1)), 0.0, 1.0, 1.0, **given)
    with pytest.raises(ValueError, match=r"Event\(direction=...\): must be -1, 0 or 1; got 2"):
        Event(lambda t, y, _: y, direction=2)
