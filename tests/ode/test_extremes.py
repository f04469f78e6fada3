"""States, times and sizes of any kind: a right answer or the right error, never a wrong number."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, REVERSE, with_slow

import jaxode
from jaxode import Result

E = np.exp(-1.0)
FINE = {"rtol": 1e-9, "atol": 1e-9}


def decay(t, y, rate):
    return -rate * y


STEPS = [None, "joint", "per_sample"]


@pytest.mark.parametrize("batch", with_slow(STEPS, STEPS[:2]))  # alike
def test_scales_of_the_state(batch):
    run = functools.partial(jaxode.solve, decay, t0=0.0, t1=1.0, args=1.0, batch=batch, throw=False)
    # With a relative tolerance the scale does not matter; an absolute one hides what is below.
    for scale in (1e30, 1e200, 1e-30, 1e-200):
        y1 = run(y0=np.full((2, 3), scale), rtol=1e-6, atol=0.0).y1
        np.testing.assert_allclose(y1, scale * E, rtol=1e-5)
    big = run(y0=jnp.full((2, 3), 1e30, jnp.float32))
    np.testing.assert_allclose(big.y1, 1e30 * E, rtol=1e-4)
    # XLA on the CPU flushes denormals to zero: the error of that is below the least normal.
    tiny = run(y0=jnp.full((2, 3), 1e-40, jnp.float32))
    assert tiny.ok.all()
    np.testing.assert_allclose(tiny.y1, 0.0, atol=float(jnp.finfo(jnp.float32).tiny))
    for value in (np.nan, np.inf, -np.inf):
        s = run(y0=np.array([[1.0, value, 3.0], [1.0, 2.0, 3.0]]))
        alone = batch == "per_sample"  # the other sample has its own steps
        lost = [Result.NON_FINITE, Result.SUCCESS] if alone else Result.NON_FINITE
        np.testing.assert_array_equal(s.result, lost)
        assert jnp.isnan(s.y1[0]).all()
        np.testing.assert_allclose(s.y1[1], [E, 2 * E, 3 * E] if alone else np.nan, rtol=1e-4)


@functools.cache
def gradient_of_end(name):
    """By the state and the rate, as a function of these and of the absolute tolerance."""

    def end(y0, rate, atol):
        options = METHODS[name].options(rtol=1e-8, atol=atol, throw=False)
        return jaxode.solve(decay, y0, 0.0, 1.0, rate, **options).y1

    return jax.jit(jax.grad(end, (0, 1)))


@pytest.mark.parametrize("name", REVERSE)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_gradients_at_extreme_scales(name, scale):
    """`d (y0 e^-rate) / d (y0, rate)`."""
    y0_bar, rate_bar = gradient_of_end(name)(scale, 1.0, 1e-8 * scale)
    # BacksolveAdjoint has one absolute tolerance for the state and its cotangent.
    loose = scale > 1 and name == "backsolve"
    np.testing.assert_allclose(y0_bar, E, rtol=1e-5 if not loose else 1e-3)
    np.testing.assert_allclose(rate_bar, -scale * E, rtol=1e-5 if not loose else 1e-3)


FLOWS = [((), 0, "joint"), ((), 0, "per_sample"), ((2, 3, 4), 1, "per_sample"), ((), 3, "joint")]


@pytest.mark.parametrize(
    ("event", "batch", "control"),
    with_slow(FLOWS, [FLOWS[1], FLOWS[3]]),  # another shape is another program
    ids=str,
)
def test_flow_of_any_event_and_batch(control, event, batch):
    z = 1 + jnp.arange(batch * np.prod(event, dtype=int), dtype=float).reshape(batch, *event)
    # A failure is NaN, if there is a number to show it.
    options = {"batch": control, "rtol": 1e-7, "atol": 1e-7, "throw": batch == 0}

    def total(z):
        y1 = jaxode.flow(decay, z, 0.0, 1.0, 1.0, **options)
        return jnp.sum(y1), y1

    bar, y1 = jax.jit(jax.grad(total, has_aux=True))(z)
    assert y1.shape == z.shape
    np.testing.assert_allclose(y1, z * E, rtol=1e-4)
    np.testing.assert_allclose(bar, np.full(z.shape, E), rtol=1e-4)


def leafwise(t, y, args):
    return jax.tree.map(jnp.negative, y)


STATES = [
    1.0, np.float64(1.0), np.ones(1), (1.0, np.ones((1, 2))),
    {"a": [np.ones(2), (np.ones(()), None)]}, (np.ones((0, 3), np.float32), np.ones((2, 1, 2))),
    (np.ones(2, np.float32), np.ones(1)), np.ones(2, np.float16), jnp.ones(2, jnp.bfloat16),
    np.asfortranarray(np.ones((2, 3))), jnp.zeros((2, 0)), jnp.asarray(1.0),
]  # fmt: skip


SHAPES = [number for number in range(len(STATES)) if number not in (0, 4, 6, 8)]


@pytest.mark.parametrize("number", with_slow(range(len(STATES)), SHAPES))  # each is a program
def test_states(number):
    y0 = STATES[number]
    solution = jaxode.solve(leafwise, y0, 0, 1, ts=[0.5, 1.0])
    y1, of = solution.y1, lambda tree: jax.tree.leaves(tree)
    assert jax.tree.structure(y1) == jax.tree.structure(solution.ys) == jax.tree.structure(y0)
    for before, after, saved in zip(of(y0), of(y1), of(solution.ys), strict=True):
        assert after.dtype == saved.dtype == jnp.result_type(before)
        assert (after.shape, saved.shape) == (np.shape(before), (2, *np.shape(before)))
        # The tolerance is 1e-5; half a rounding of a leaf that is less precise.
        precision = max(2e-5, float(jnp.finfo(after.dtype).eps))
        np.testing.assert_allclose(np.asarray(after, float), E, rtol=precision)
        np.testing.assert_allclose(np.asarray(saved[0], float), E**0.5, rtol=2 * precision)


@pytest.mark.parametrize("rank", with_slow([0, 1, 2, 3], [0, 1, 3]))  # each is a program
def test_stiff_solvers_take_states_of_any_shape(rank):
    shape = [(), (0,), (2, 0), (1, 2, 2)][rank]
    solver = {"solver": jaxode.Rodas5P(), "rtol": 1e-7, "atol": 1e-7}
    y1 = jaxode.solve(decay, jnp.full(shape, 2.0), 0.0, 1.0, 1.0, **solver).y1
    assert y1.shape == shape
    np.testing.assert_allclose(y1, 2 * E, rtol=1e-5)


Y0, A = jnp.array([1.0, 2.0]), jnp.array([0.5, 1.5])


def exact(t):
    return Y0 * jnp.exp(-A * t)


# (start, end, output times), which are six or none: two programs serve all.
TIMES = [
    (0, 1, None), (np.int64(0), np.uint8(1), None), (np.uint8(1), np.uint8(0), None),
    (jnp.array(0), np.float16(1), None), (0.0, 1.0, [0, 0, 0.5, 0.5, 1, 1]), (0, 5, range(6)),
    (1.0, 0.0, (1.0, 0.5, 0.5, 0.0, 0.0, 0.0)), (0.0, 1.0, np.arange(6) * 0.2),
    (1.0, 1.0, [1.0] * 6), (0.0, 1.0, np.float32([0.1, 0.7] + 4 * [0.9])),
    (0.0, 1e-12, [5e-13] * 6), (0.0, 1e-310, None), (-3, -1, [-2] * 6),
]  # fmt: skip


@pytest.mark.parametrize(("t0", "t1", "ts"), TIMES, ids=str)
def test_times(t0, t1, ts):
    solution = jaxode.solve(decay, Y0, t0, t1, A, ts=ts, **FINE)
    assert solution.t_reached == float(t1)
    np.testing.assert_allclose(solution.y1, exact(float(t1) - float(t0)), rtol=1e-7)
    if ts is not None:
        expected = [exact(float(t) - float(t0)) for t in ts]
        np.testing.assert_allclose(solution.ys, expected, rtol=1e-6)


def slowed(t, y, args):
    return -args[0] * y / args[1]


@pytest.mark.parametrize("unit", [1e-14, 1e-7, 1e7, 1e14, 1e30, -1e30])
def test_units_of_time(unit):
    run = lambda unit: jaxode.solve(slowed, Y0, 0.0, unit, (A, unit), **FINE)
    solution, usual = run(unit), run(1.0)
    np.testing.assert_allclose(solution.y1, exact(1.0), rtol=1e-7)
    # Only the first step has an opinion on units, and steps grow tenfold.
    more = abs(int(solution.stats.num_steps) - int(usual.stats.num_steps))
    assert more <= abs(math.log10(abs(unit))) + 1


def test_a_weakly_typed_state_is_solved_in_double_precision():
    for y0 in (2.0, jnp.asarray(2.0), jnp.full((), 2.0)):
        solution = jaxode.solve(decay, y0, 0.0, 1.0, 1.0, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(solution.y1, 2 * E, rtol=1e-11)


@pytest.mark.slow  # steps run out in `test_failures.py`
def test_as_many_steps_as_needed_are_enough():
    """More than can be counted are no limit."""
    needed = int(jaxode.solve(decay, Y0, 0.0, 1.0, A, **FINE).stats.num_steps)
    run = lambda n: jaxode.solve(decay, Y0, 0.0, 1.0, A, max_steps=n, throw=False, **FINE).result
    assert run(needed) == run(10**10) == Result.SUCCESS
    assert run(needed - 1) == Result.MAX_STEPS_REACHED


def test_first_step_far_from_time_zero_in_single_precision():
    """A first step below the resolution of the time must not be taken for an underflow."""
    t0 = jnp.asarray(1e4, jnp.float32)
    solution = jaxode.solve(
        lambda t, y, _: jnp.ones_like(y), jnp.zeros(1, jnp.float32), t0, t0 + 10
    )
    np.testing.assert_allclose(solution.y1, 10.0, rtol=1e-5)


def test_a_state_that_is_not_finite_fails_over_an_empty_span():
    """A row of padding, which a mask of `ok` leaves out."""
    y0, t1 = jnp.array([[1.0], [jnp.nan]]), jnp.array([1.0, 0.0])
    solution = jaxode.solve(decay, y0, 0.0, t1, 1.0, batch="per_sample", throw=False)
    np.testing.assert_array_equal(solution.ok, [True, False])
    assert solution.result[1] == Result.NON_FINITE
