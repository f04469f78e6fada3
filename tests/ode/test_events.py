"""Solves that end where a condition crosses zero, against closed forms."""

import functools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTIVE, AGAIN, METHODS, assert_close, gradient, with_slow

import jaxode
from jaxode import Event

# A failure is NaN, which equals no closed form: programs that can raise take longer to compile.
TIGHT = {"rtol": 1e-11, "atol": 1e-11, "throw": False}


def decay(t, y, rate):
    return -rate * y


LEVEL = Event(lambda t, y, rate: y - 0.2)


def fall(t, state, g):
    del t
    return state[1], -g


GROUND = Event(lambda t, state, g: state[0], direction=-1)


@pytest.mark.slow
def test_bouncing_ball():
    """Bounces `k` come at `(1 + 2 e + ... + 2 e^k) sqrt(2 h / g)`, with `e` what is left."""
    e, h, g = 0.8, jnp.array(1.7), 9.81

    def bounces(h):
        def bounce(carry, _):
            state, t = carry
            s = jaxode.solve(fall, state, t, t + 5.0, g, event=GROUND, max_step=0.5, **TIGHT)
            return ((s.y1[0], -e * s.y1[1]), s.t1), s.t1

        start = (h, jnp.zeros_like(h)), jnp.zeros_like(h)
        times = jax.lax.scan(bounce, start, None, length=3)[1]
        return times, times

    first = np.sqrt(2 * h / g)
    expected = first * (1 + 2 * np.array([0, e, e + e**2]))
    slopes, times = jax.jit(jax.jacrev(bounces, has_aux=True))(h)
    np.testing.assert_allclose(times, expected, atol=1e-8)
    np.testing.assert_allclose(slopes, expected / (2 * h), atol=1e-8)


def test_rows_have_events_of_their_own():
    """One early, one late, one never, one that goes back in time."""
    y0, t1 = jnp.array([0.5, 1.5, 0.1, 0.1]), jnp.array([9.0, 9.0, 9.0, -9.0])

    def run(y0, rate):
        s = jaxode.solve(
            decay, y0, 0.0, t1, rate, batch="per_sample", event=LEVEL,
            ts=jnp.stack([0.1 * t1, t1], 1), **TIGHT,
        )  # fmt: skip
        return s.t1.sum(), s

    bar, s = jax.jit(jax.grad(run, (0, 1), has_aux=True))(y0, 1.0)
    assert list(s.event_occurred) == [True, True, False, True]
    times = np.log(y0 / 0.2)
    times[2:3] = 9.0
    np.testing.assert_allclose(s.t1, times, atol=1e-9)
    np.testing.assert_allclose(s.y1, [0.2, 0.2, 0.1 * np.exp(-9), 0.2], atol=1e-9)
    # Outputs beyond the event are the state there.
    beyond = np.abs(0.1 * t1) > np.abs(times)
    seen = np.where(beyond, times, 0.1 * t1)
    np.testing.assert_allclose(s.ys[:, 0], y0 * np.exp(-seen), rtol=1e-9)
    np.testing.assert_array_equal(s.ts[:, 1], t1)
    np.testing.assert_allclose(s.ys[:, 1], s.y1, rtol=1e-12)
    came = np.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(bar[0], came / y0, atol=1e-8)
    np.testing.assert_allclose(bar[1], -np.sum(came * times), atol=1e-7)


SINE = lambda t, y, _: jnp.stack([y[1], -y[0]])
# The level of a sine, or the time, in which direction, when, and whether.
AT = {
    "never": ((1.5, 9.0), 0, 6.0, False),
    "at the start": ((0.0, 9.0), 0, 0.0, True),
    "zero at the start, but it rises": ((0.0, 9.0), -1, np.pi, True),
    "rising": ((0.5, 9.0), 1, np.pi / 6, True),
    "falling": ((0.5, 9.0), -1, 5 * np.pi / 6, True),
    "at the end": ((1.5, 6.0), 0, 6.0, True),
}


@functools.cache
def sine_until(direction):
    event = Event(
        lambda t, y, at: jnp.where(at[1] < 9, t - at[1], y[0] - at[0]), direction=direction
    )
    y0 = jnp.array([0.0, 1.0])
    return jax.jit(lambda at: jaxode.solve(SINE, y0, 0.0, 6.0, at, event=event, **TIGHT))


@pytest.mark.parametrize("name", AT)
def test_when(name):
    at, direction, time, came = AT[name]
    s = sine_until(direction)(at)
    assert bool(s.event_occurred) == came
    np.testing.assert_allclose(s.t1, time, atol=1e-8)
    np.testing.assert_allclose(s.t_reached, time, atol=1e-8)


def test_the_first_of_two_in_one_step():
    event = Event(lambda t, y, _: (y - 0.31) * (y - 0.52))
    s = jaxode.solve(lambda t, y, _: jnp.ones_like(y), 0.0, 0.0, 6.0, event=event, first_step=1.0)
    np.testing.assert_allclose(s.t1, 0.31, rtol=1e-12)


LOOSE = [diffrax.Tsit5(), diffrax.Heun(), diffrax.Dopri8()]


@pytest.mark.parametrize("solver", with_slow(LOOSE, LOOSE[1:]), ids=repr)
def test_at_a_loose_tolerance_the_condition_is_zero_at_the_event(solver):
    """The time has the error of the solve, not the larger one of the interpolant."""
    event = Event(lambda t, y, _: y**3 - 0.2**3)
    s = jax.jit(lambda: jaxode.solve(
        decay, 1.5, 0.0, 9.0, 1.0, event=event, solver=solver, rtol=1e-3, atol=1e-3))()  # fmt: skip
    np.testing.assert_allclose(s.y1, 0.2, rtol=1e-5)
    np.testing.assert_allclose(s.t1, np.log(7.5), rtol=1e-2)


@pytest.mark.slow
def test_a_crossing_is_not_lost_between_two_steps():
    """Levels at the states between which steps end, in float32."""
    y0 = jnp.float32(1.5)
    steps = jaxode.solve(decay, y0, 0.0, 3.0, 1.0, dense=True, max_steps=64).interpolant.path.steps
    levels = jnp.asarray(steps.y[1 : int(steps.count), 0, 0])
    around = jnp.concatenate([jnp.nextafter(levels, -9), levels, jnp.nextafter(levels, 9)])
    at = lambda level: Event(lambda t, y, _: y - level)
    occurs = lambda level: jaxode.solve(decay, y0, 0.0, 3.0, 1.0, event=at(level)).event_occurred
    came = jax.jit(jax.vmap(occurs))
    assert came(around).all()


def test_in_single_precision_every_row_settles():
    """In kelvin: a rounding of the state moves the event further than its time is resolved."""
    rates = jnp.linspace(0.08, 0.12, 256, dtype=jnp.float32)
    cool = lambda t, kelvin, args: -args[1] * (kelvin - 293.15)
    event = Event(lambda t, kelvin, _: kelvin - 293.2)

    @jax.jit
    def run(rates):
        start = jnp.full(len(rates), 300.0, jnp.float32)
        options = {"row_args": rates, "batch": "per_sample", "throw": False}
        return jaxode.solve(cool, start, 0.0, 100.0, event=event, **options)

    solution = run(rates)
    assert solution.ok.all()
    np.testing.assert_allclose(solution.t1, math.log(6.85 / 0.05) / rates, rtol=3e-3)


def test_a_condition_without_slope_has_no_derivative():
    """The time is found, but the implicit function theorem does not hold."""
    f = lambda t, y, args: decay(t, y, args[0])
    event = Event(lambda t, y, args: jnp.where(args[1], (t - args[0]) ** 3, jnp.sign(t - args[0])))
    run = lambda a, cubic: jaxode.solve(f, 1.0, 0.0, 1.0, (a, cubic), event=event).t1
    both = jax.jit(jax.value_and_grad(run))
    for cubic in (True, False):
        time, slope = both(0.5, cubic)
        # The third power of less is below the rounding of the condition.
        np.testing.assert_allclose(time, 0.5, atol=1e-5)
        assert not np.isfinite(slope)


def cooling(condition, t1):
    f = lambda t, y, args: -0.02 * (y - 15)
    return jaxode.solve(f, 20.0, 0.0, t1, event=Event(condition, direction=1), throw=False)


@pytest.mark.parametrize(
    ("condition", "t1", "at"),
    [
        (lambda t, y, args: y - jnp.where(t < 8, 25.0, 18.0), 24.0, 8),  # Newton: to the end
        (lambda t, y, args: y - jnp.where(t < 8, 25.0, 18.0), 2000.0, 8),  # to a fall through zero
        # To a value close to zero, from which the fall is near.
        (lambda t, y, args: y - jnp.where(t < 8.9, 25.0, 19.15), 24.0, 8.9),
        pytest.param(  # to the start
            lambda t, y, args: jnp.where(t < 5, -1 - t, 1 + t), 900.0, 5, marks=pytest.mark.slow
        ),
    ],
)
def test_a_condition_that_jumps_across_zero_is_not_found_elsewhere(condition, t1, at):
    solution = cooling(condition, t1)
    assert solution.result == jaxode.Result.EVENT_NOT_FOUND
    assert np.isnan(solution.t1)
    np.testing.assert_allclose(solution.t_reached, at, atol=1e-6)


@pytest.mark.slow
def test_the_level_of_a_condition_without_slope_has_no_derivative():
    run = lambda a: jaxode.solve(decay, 1.0, 0.0, 1.0, 1.0, event=Event(lambda t, *_: (t - a) ** 3))
    assert not np.isfinite(jax.jit(jax.grad(lambda a: run(a).t1))(0.5))


@pytest.mark.slow
def test_a_row_at_rest_without_an_event_has_the_gradient_of_its_end():
    run = lambda y0: jaxode.solve(decay, y0, 0.0, 9.0, 0.0, event=LEVEL).y1
    assert jax.jit(jax.grad(run))(0.5) == 1


def no_event(rate):
    """The condition is not a number at the end."""
    event = jaxode.Event(lambda t, y, _: jnp.sqrt(y[0]) - 3)
    fall = lambda t, y, rate: -rate * jnp.ones_like(y)
    return jaxode.solve(fall, jnp.ones(1), 0.0, 2.0, rate, event=event).y1[0]


TO_TWO = jaxode.Event(lambda t, y, args: y[0] - 2)


def one_of_two_solves_fails(rate):
    f = lambda t, y, rate: jnp.where(y > 5, jnp.nan, rate * y)
    solve = lambda y0: jaxode.solve(f, y0, 0.0, 1.0, rate, event=TO_TWO, throw=False)
    solution = jax.vmap(solve)(jnp.array([[1.0], [6.0]]))
    return jnp.sum(jnp.where(solution.ok, solution.t1, 0))


def one_of_two_rows_fails(rate):
    solution = jaxode.solve(
        lambda t, y, args: args[0] * args[1] * y, jnp.ones((2, 1)), 0.0, 1.0, rate, event=TO_TWO,
        row_args=jnp.array([1.0, jnp.nan]), batch="per_sample", throw=False,
    )  # fmt: skip
    return jnp.sum(jnp.where(solution.ok, solution.t1, 0))


@pytest.mark.parametrize(
    ("run", "slope"),
    [
        (no_event, -2.0),
        pytest.param(one_of_two_solves_fails, -np.log(2) / 0.9**2, marks=pytest.mark.slow),
        pytest.param(one_of_two_rows_fails, -np.log(2) / 0.9**2, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_has_no_event_adds_nothing_that_is_not_finite(run, slope):
    np.testing.assert_allclose(jax.jit(jax.grad(run))(0.9), slope, rtol=1e-4)


@pytest.mark.slow
def test_rows_without_an_event_have_the_gradient_of_their_end():
    """Before it hits the ground; and beside rows that rest, or fail, which are masked."""
    end = lambda h: jaxode.solve(fall, (h, 0.0 * h), 0.0, 0.1, 9.81, event=GROUND).y1[0]
    np.testing.assert_allclose(jax.jit(jax.grad(end))(2.0), 1.0, rtol=1e-9)
    f = lambda t, y, a: jnp.where(y > 5.0, jnp.nan, a * y)
    event = Event(lambda t, y, a: y[0] - 2.0 * a)
    y0 = jnp.array([[1.0], [0.0], [6.0]])

    def total(a, y0):
        s = jaxode.solve(f, y0, 0.0, 1.0, a, batch="per_sample", event=event, **TIGHT)
        return jnp.sum(jnp.where(s.ok & s.event_occurred, s.t1 + s.y1[:, 0], 0))

    grad = jax.jit(jax.grad(total))
    one = grad(0.9, jnp.tile(y0[:1], (3, 1))) / 3
    np.testing.assert_allclose(grad(0.9, y0), one, rtol=1e-12)
    assert np.isfinite(one)


def grow(t, state, rate):
    y, z = state
    return -rate * y, rate * t * z


@pytest.mark.slow
@pytest.mark.parametrize(("name", "again"), [case for case in AGAIN if case[0] in ADAPTIVE])
def test_second_derivatives(name, again):
    """Of the time and of the state there, with a linear condition and a field that moves."""
    event = Event(lambda t, state, rate: state[0] - rate / 4)
    options = METHODS[name].options(event=event, **TIGHT)

    def run(x):
        s = jaxode.solve(grow, (x[1], jnp.ones_like(x[1])), 0.0, 9.0, x[0], **options)
        return s.t1 + s.y1[1]

    def exact(x):
        t = jnp.log(4 * x[1] / x[0]) / x[0]
        return t + jnp.exp(x[0] * t * t / 2)

    x, first = jnp.array([1.1, 2.0]), gradient(name)
    both = jax.jit(again(lambda x: (first(run)(x),) * 2, has_aux=True))
    expected = jax.jit(lambda x: (jax.hessian(exact)(x), jax.grad(exact)(x)))(x)
    assert_close(both(x), expected, rtol=1e-7)


def test_third_derivatives_are_an_error():
    run = lambda y0: (
        jaxode.solve(decay, y0, 0.0, 9.0, 1.0, event=LEVEL, adjoint=jaxode.ForwardMode()).t1
    )
    with pytest.raises(Exception, match="only first and second derivatives"):
        jax.eval_shape(jax.jacfwd(jax.jacfwd(jax.jacfwd(run))), 1.5)


@pytest.mark.slow
def test_a_failed_solve_raises_where_the_time_alone_is_used():
    f = lambda t, y, a: jnp.where(t > 0.5, jnp.nan, -a * y)
    event = Event(lambda t, y, _: y - 0.1)
    run = lambda a, throw: jaxode.solve(f, 1.0, 0.0, 1.0, a, event=event, throw=throw).t1
    with pytest.raises(jax.errors.JaxRuntimeError, match="the vector field or the state is not"):
        jax.block_until_ready(jax.jit(lambda a: run(a, True))(1.0))
    value, slope = jax.jit(jax.value_and_grad(lambda a: run(a, False)))(1.0)
    assert np.isnan(value)
    assert np.isnan(slope)


def test_a_failed_solve_is_one_with_an_event():
    f, event = lambda t, y, _: jnp.where(t > 0.5, jnp.nan, -y), Event(lambda t, y, _: y - 0.1)
    s = jaxode.solve(f, 1.0, 0.0, 1.0, event=event, throw=False)
    assert s.result == jaxode.Result.NON_FINITE
    assert np.isnan(s.y1)
    with pytest.raises(jaxode.SolveError, match="solve: the vector field or the state is not fin"):
        jaxode.solve(f, 1.0, 0.0, 1.0, event=event)


def to_the_level():
    return jaxode.solve(
        decay, 1.5, 0.0, 9.0, 1.0, event=LEVEL, dense=True, max_steps=256, **TIGHT
    )  # fmt: skip


def test_the_interpolant_ends_at_the_event():
    s = to_the_level()
    at_the_event = jax.jit(lambda: s.evaluate(s.t1))()
    np.testing.assert_allclose(at_the_event, 0.2, atol=1e-9)
    with pytest.raises(ValueError, match="must lie between"):
        s.evaluate(s.t1 + 0.1)


@pytest.mark.slow
def test_an_event_that_is_not_found_is_told_with_its_time():
    event = jaxode.Event(lambda t, y, _: jnp.where(y < 1, y - 3, y))
    s = jaxode.solve(lambda t, y, _: jnp.ones_like(y), 0.0, 0.0, 5.0, event=event, throw=False)
    assert s.result == jaxode.Result.EVENT_NOT_FOUND
    np.testing.assert_allclose(s.t_reached, 1, atol=1e-3)
