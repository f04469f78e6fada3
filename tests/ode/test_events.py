"""Solves that end, or whose state changes, where a condition crosses zero, against closed forms.

Rows, outputs, gradients and failures are those of every feature: `test_features.py`.
"""

import functools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, REVERSE, with_slow

import jaxode
from jaxode import Event, Result

# A failure is NaN, which equals no closed form: programs that can raise take longer to compile.
TIGHT = {"rtol": 1e-11, "atol": 1e-11, "throw": False}


# A second derivative of a while loop in a scan, whose names JAX has lost.
WITH_PIECES = pytest.mark.xfail(
    jax.__version_info__ < (0, 10), raises=TypeError, strict=True, reason="JAX before 0.10"
)


def decay(t, y, rate):
    return -rate * y


LEVEL = Event(lambda t, y, rate: y - 0.2)
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


OF_EACH_ORDER = [diffrax.Tsit5(), diffrax.Heun(), diffrax.Dopri8()]


@pytest.mark.parametrize(
    "solver",
    with_slow(OF_EACH_ORDER, OF_EACH_ORDER[1:]),  # as Tsit5
    ids=repr,
)
def test_at_a_loose_tolerance_the_condition_is_zero_at_the_event(solver):
    """The time has the error of the solve, not the larger one of the interpolant."""
    options = {"event": Event(lambda t, y, _: y**3 - 0.2**3), "solver": solver, "throw": False}
    s = jaxode.solve(decay, 1.5, 0.0, 9.0, 1.0, rtol=1e-3, atol=1e-3, **options)
    np.testing.assert_allclose(s.y1, 0.2, rtol=1e-5)
    np.testing.assert_allclose(s.t1, np.log(7.5), rtol=1e-2)


def test_a_crossing_is_not_lost_between_two_steps():
    """Levels at the states between which steps end, in float32."""
    options = {"rtol": 1e-6, "throw": False}
    run = functools.partial(jaxode.solve, decay, jnp.float32(1.5), 0.0, 3.0, 1.0, **options)
    steps = run(dense=True, max_steps=64).interpolant.trajectory
    levels = jnp.asarray(steps.y[0, 1 : int(steps.count[0]), 0, 0])
    around = jnp.concatenate([jnp.nextafter(levels, -9), levels, jnp.nextafter(levels, 9)])
    at = lambda level: Event(lambda t, y, _: y - level)
    came = jax.jit(jax.vmap(lambda level: run(event=at(level)).event_occurred))
    assert len(levels) > 5
    assert came(around).all()


@pytest.mark.slow  # float32, which `test_features.py` has
def test_in_single_precision_every_row_settles():
    """In kelvin: a rounding of the state moves the event further than its time is resolved."""
    rates = jnp.linspace(0.08, 0.12, 64, dtype=jnp.float32)
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


@pytest.mark.slow  # a derivative that does not exist
def test_a_condition_without_slope_has_no_derivative():
    """The time is found, but the implicit function theorem does not hold."""
    field = lambda t, y, args: -jnp.where(args[1], 1.0, args[0]) * y
    event = Event(lambda t, y, args: jnp.where(args[1], (t - args[0]) ** 3, jnp.sign(t - args[0])))
    run = lambda a, cubic: (
        jaxode.solve(field, 1.0, 0.0, 1.0, (a, cubic), event=event, throw=False).t1
    )
    both = jax.jit(jax.value_and_grad(run))
    for cubic in (True, False):
        time, slope = both(0.5, cubic)
        # The third power of less is below the rounding of the condition.
        np.testing.assert_allclose(time, 0.5, atol=1e-5)
        assert not np.isfinite(slope)


# When the condition jumps across zero, the values of `y` for which it is zero before and after,
# and the end of the solve.
JUMPS = {
    "Newton goes to the end": (8.0, 25.0, 18.0, 24.0),
    "Newton goes to a fall through zero": (8.0, 25.0, 18.0, 2000.0),
    "the value is close to zero, from which the fall is near": (8.9, 25.0, 19.15, 24.0),
}
JUMPING = Event(lambda t, y, jump: y - jnp.where(t < jump[0], jump[1], jump[2]), direction=1)


@pytest.mark.parametrize("name", JUMPS)
def test_a_condition_that_jumps_across_zero_is_not_found_elsewhere(name):
    *jump, t1 = JUMPS[name]
    s = jaxode.solve(
        lambda t, y, _: -0.02 * (y - 15), 20.0, 0.0, t1, tuple(jump), event=JUMPING, throw=False
    )
    assert s.result == Result.EVENT_NOT_FOUND
    assert np.isnan(s.t1)
    np.testing.assert_allclose(s.t_reached, jump[0], atol=1e-6)


def not_a_number_at_the_end(rate):
    event = Event(lambda t, y, _: jnp.sqrt(y[0]) - 3)
    fall = lambda t, y, rate: -rate * jnp.ones_like(y)
    return jaxode.solve(fall, jnp.ones(1), 0.0, 2.0, rate, event=event, throw=False).y1[0]


def at_rest(y0):
    return jaxode.solve(decay, y0, 0.0, 9.0, 0.0, event=LEVEL, throw=False).y1


NOT_CROSSED = [(not_a_number_at_the_end, -2.0), (at_rest, 1.0)]


@pytest.mark.parametrize(("run", "slope"), with_slow(NOT_CROSSED, NOT_CROSSED[1:]))  # the same rule
def test_a_condition_that_does_not_cross_zero_adds_nothing(run, slope):
    np.testing.assert_allclose(jax.jit(jax.grad(run))(0.9), slope, rtol=1e-12)


@pytest.mark.slow  # traces three times, for a message
def test_third_derivatives_are_an_error():
    options = {"event": LEVEL, "adjoint": jaxode.ForwardMode()}
    run = lambda y0: jaxode.solve(decay, y0, 0.0, 9.0, 1.0, **options).t1
    with pytest.raises(Exception, match="only first and second derivatives"):
        jax.eval_shape(jax.jacfwd(jax.jacfwd(jax.jacfwd(run))), 1.5)


@pytest.mark.slow  # `test_features.py` has changes; these are five of them
def test_cells_that_divide_when_they_are_large():
    """With the number of the division."""
    rates = jnp.array([1.0, 2.0])
    event = Event(
        lambda t, y, args: y["size"] - 2.0, direction=1, most=5,
        change=lambda t, y, args, i: {"size": y["size"] / 2, "divided": i.astype(float) + 1},
    )  # fmt: skip
    s = jaxode.solve(
        lambda t, y, args: {"size": args[1] * y["size"], "divided": 0 * y["divided"]},
        {"size": jnp.ones(2), "divided": jnp.zeros(2)}, 0.0, 1.5, row_args=rates, event=event,
        batch="per_sample", **TIGHT,
    )  # fmt: skip
    grown = rates * 1.5 / np.log(2)
    np.testing.assert_array_equal(s.y1["divided"], np.floor(grown))
    np.testing.assert_allclose(s.y1["size"], 2 ** (grown % 1), rtol=1e-7)


FALLS = Event(lambda t, y, args: y[0], direction=-1)
CUTS = {
    "none": {},
    "a breakpoint outside": {"breakpoints": [5.0]},
    "a breakpoint": {"breakpoints": [0.5]},
    "a dose at the start": {"jumps": jaxode.Jumps([0.0], lambda t, y, args, i: y)},
}


@pytest.mark.parametrize("name", with_slow(CUTS, list(CUTS)[:3]))  # no change at the start
def test_a_condition_that_is_zero_at_the_start_and_rises_is_no_fall(name):
    """A ball is thrown from the ground."""
    ball = lambda t, y, args: jnp.stack([y[1], -10.0 * jnp.ones(())])
    s = jaxode.solve(ball, jnp.array([0.0, 5.0]), 0.0, 2.0, event=FALLS, **CUTS[name])
    np.testing.assert_allclose(s.t1, 1.0, rtol=1e-6)


def sine_of_the_time(a, method, **options):
    """`sin(t1)` with `t1 = 2 / a`."""
    level = Event(lambda t, y, args: y - 2.0)
    options = {"rtol": 1e-8, "atol": 1e-8, "adjoint": METHODS[method].adjoint, **options}
    f = lambda t, y, a: a * jnp.ones(())
    return jnp.sin(jaxode.solve(f, jnp.zeros(()), 0.0, 2.0, a, event=level, **options).t1)


AGAIN_BY = [(method, again) for method in REVERSE for again in (jax.jacfwd, jax.jacrev)]


@WITH_PIECES
@pytest.mark.parametrize(("method", "again"), with_slow(AGAIN_BY, AGAIN_BY[1:]))  # a program each
def test_second_derivatives_of_a_function_of_the_time_of_an_event_after_a_breakpoint(method, again):
    """In a scan over pieces."""
    time = lambda a: sine_of_the_time(a, method, breakpoints=[0.5], throw=False)
    found = jax.jit(again(jax.grad(time)))(1.3)
    exact = jax.grad(jax.grad(lambda a: jnp.sin(2 / a)))(1.3)
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.slow  # outputs of an event that ends pieces: `test_features.py`
def test_outputs_after_an_event_at_the_start_repeat_its_state():
    counted = Event(lambda t, y, args: y[0], 0, lambda t, y, args, i: y + jnp.array([0, 1.0]), 2)
    s = jaxode.solve(
        lambda t, y, args: jnp.array([1.0, 0.0]), jnp.zeros(2), 1.0, 2.0, ts=[1.0, 1.25, 2.0],
        event=counted, breakpoints=[1.5],
    )  # fmt: skip
    np.testing.assert_array_equal(s.ys[-1], s.y1)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
def test_outputs_before_an_event_are_kept_and_later_ones_repeat_its_state(sign):
    event = Event(lambda t, y, args: sign * t - 0.6)
    ts = sign * jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    s = jaxode.solve(lambda t, y, args: jnp.ones_like(y), 0.0, 0.0, sign, ts=ts, event=event)
    np.testing.assert_allclose(sign * s.ys, [0.0, 0.25, 0.5, 0.6, 0.6], atol=1e-6)
