"""Events at which the state changes, and the solve goes on: a ball that bounces, cells that divide.

The gradients are those of closed forms, which jump with the state ("saltation").
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTIVE, METHODS, assert_close, gradient

import jaxode

G, TS = 9.81, np.linspace(0.0, 2.0, 9)
# A failure is NaN, which equals no closed form: programs that can raise take longer to compile.
OPTIONS = {"rtol": 1e-9, "atol": 1e-9, "max_steps": 64, "throw": False}


def fall(t, y, g):
    return jnp.stack([y[1], -g])


def bounce(height, kept, g, most=4, **options):
    """Of a ball that keeps a part of its speed; it is dropped by rest."""
    event = jaxode.Event(
        lambda t, y, g: y[0], direction=-1, most=most,
        change=lambda t, y, g, i: jnp.stack([0 * y[0], -kept * y[1]]),
    )  # fmt: skip
    y0 = jnp.stack([height, jnp.zeros_like(height)], axis=-1)
    return jaxode.solve(fall, y0, 0.0, 2.0, g, event=event, **OPTIONS | options)


def height_at(times, height, kept, g, bounces):
    """The height after so many bounces, at times of their own."""
    start, speed, heights = jnp.sqrt(2 * height / g), jnp.sqrt(2 * g * height), []
    starts = [(0.0, height, 0.0)]
    for _ in range(4):
        speed = kept * speed
        starts.append((start, 0.0, speed))
        start = start + 2 * speed / g
    for t, count in zip(times, bounces, strict=True):
        begin, h, v = starts[count]
        heights.append(h + v * (t - begin) - g * (t - begin) ** 2 / 2)
    return jnp.stack(heights)


BALL = jnp.array(1.0), jnp.array(0.7), jnp.array(G)
BOUNCES = [0, 0, 1, 1, 1, 2, 2, 3, 4]


def test_one_more_event_ends_the_solve():
    """At its time, with the state before; outputs beyond it repeat that."""
    s = bounce(*BALL, most=1, ts=TS)
    first, speed = np.sqrt(2 / G), 0.7 * np.sqrt(2 * G)
    assert s.event_occurred
    np.testing.assert_allclose(s.t1, first + 2 * speed / G, rtol=1e-8)
    np.testing.assert_allclose(s.y1, [0.0, -speed], atol=1e-7)
    np.testing.assert_array_equal(s.ys[5:], np.broadcast_to(s.y1, (4, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTIVE)
def test_outputs_and_gradients(name):
    """By the start, what the change closes over, and the arguments."""
    loss = lambda heights: jnp.sum(jnp.sin(3 * heights[5:]))

    def found(*inputs):
        s = bounce(*inputs, **METHODS[name].options(ts=TS))
        return loss(s.ys[:, 0]), s

    def exact(*inputs):
        heights = height_at(TS, *inputs, BOUNCES)
        return loss(heights), heights

    bars, s = jax.jit(gradient(name)(found, (0, 1, 2), has_aux=True))(*BALL)
    expected_bars, expected = jax.jit(jax.grad(exact, (0, 1, 2), has_aux=True))(*BALL)
    assert_close(bars, expected_bars, 1e-6)
    np.testing.assert_allclose(s.ys[:, 0], expected, atol=1e-8)
    np.testing.assert_allclose(s.y1[0], expected[-1], atol=1e-8)
    assert not s.event_occurred
    assert s.t1 == s.t_reached == 2.0
    assert s.stats.num_steps == s.stats.num_accepted + s.stats.num_rejected


@pytest.mark.slow
def test_a_change_is_differentiated_only_where_it_happens():
    """Each bounce costs the energy `a`. Where the ball is slow, there is no root."""
    fall = lambda t, y, a: jnp.stack([y[1], -9.81 + 0 * y[1]])
    bounce = lambda t, y, a, i: jnp.stack([0 * y[0], jnp.sqrt(y[1] ** 2 - 2 * a)])

    def height(a):
        event = jaxode.Event(lambda t, y, a: y[0], direction=-1, change=bounce, most=3)
        return jaxode.solve(fall, jnp.array([1.0, 0.0]), 0.0, 0.8, a, event=event).y1[0]

    left = 0.8 - np.sqrt(2 / 9.81)  # after the first bounce, with the speed v
    v = lambda a: np.sqrt(2 * 9.81 - 2 * a)
    value, slope = jax.jit(jax.value_and_grad(height))(3.0)
    np.testing.assert_allclose(value, v(3.0) * left - 9.81 / 2 * left**2, rtol=1e-5)
    np.testing.assert_allclose(slope, -left / v(3.0), rtol=1e-5)


def test_a_change_that_is_not_finite_is_named():
    """It fails in its row alone, at the time of the event."""
    event = jaxode.Event(
        lambda t, y, args: y[0] - 2.0, direction=1, most=3,
        change=lambda t, y, args, i: jnp.where(args[1] > 1, y / 0.0, y / 2),
    )  # fmt: skip
    run = lambda **options: jaxode.solve(
        lambda t, y, args: y, jnp.ones((2, 1)), 0.0, 1.0, row_args=jnp.array([1.0, 2.0]),
        event=event, batch="per_sample", **options,
    )  # fmt: skip
    s = run(throw=False)
    assert list(s.result) == [jaxode.Result.SUCCESS, jaxode.Result.NON_FINITE_CHANGE]
    assert np.isnan(s.y1[:, 0]).tolist() == [False, True]
    np.testing.assert_allclose(s.t_reached, [1.0, np.log(2)], rtol=1e-4)
    with pytest.raises(
        jaxode.SolveError,
        match=r"^solve: the state after a change is not finite at t=0.693\d* in 1 of 2 rows",
    ):
        run()


def test_cells_that_divide_when_they_are_large():
    """With rows of their own, and the number of the division."""
    rates = jnp.array([1.0, 2.0])
    event = jaxode.Event(
        lambda t, y, args: y["size"] - 2.0, direction=1, most=5,
        change=lambda t, y, args, i: {"size": y["size"] / 2, "divided": i.astype(float) + 1},
    )  # fmt: skip
    s = jaxode.solve(
        lambda t, y, args: {"size": args[1] * y["size"], "divided": 0 * y["divided"]},
        {"size": jnp.ones(2), "divided": jnp.zeros(2)}, 0.0, 1.5, row_args=rates, event=event,
        batch="per_sample", **OPTIONS,
    )  # fmt: skip
    grown = rates * 1.5 / np.log(2)
    np.testing.assert_array_equal(s.y1["divided"], np.floor(grown))
    np.testing.assert_allclose(s.y1["size"], 2 ** (grown % 1), rtol=1e-7)


@pytest.mark.slow
def test_outputs_after_the_last_event_do_not_move_with_their_times():
    event = jaxode.Event(lambda t, y, _: y[0] - 1, change=lambda t, y, _, i: y - 1, most=1)

    def last(ts):
        s = jaxode.solve(
            lambda t, y, _: jnp.ones_like(y), jnp.zeros((1, 1)), 0.0, 9.0, ts=ts, event=event,
            batch="per_sample", **OPTIONS,
        )  # fmt: skip
        assert s.ys.shape == (1, 3, 1)
        return s.ys[0, 2, 0]

    value, slope = jax.jit(jax.value_and_grad(last))(jnp.array([[0.1, 5.0, 5.0]]))
    np.testing.assert_allclose(value, 1, rtol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
