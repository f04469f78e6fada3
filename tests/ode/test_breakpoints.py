"""Fields that jump, solved with `breakpoints`: no pulse is lost, nor in any gradient."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, with_slow

import jaxode
from jaxode import Result

WIDTH = 0.02
K = 0.7


def pulse(t, y, start):
    return jnp.where((t >= start) & (t < start + WIDTH), 1.0, 0.0).astype(t.dtype) + 0 * y


def linear(t, y, k):
    """`y' = k c(t) y`, where `c` is 1, then -2, then 5."""
    return k * jnp.where(t < 0.3, 1.0, jnp.where(t < 0.7, -2.0, 5.0)) * y


def exponent(t):
    """The integral of `c` from zero."""
    return jnp.where(t < 0.3, t, jnp.where(t < 0.7, 0.9 - 2 * t, 5 * t - 4.0))


OF_EACH_ORDER = [diffrax.Tsit5(), diffrax.Dopri8(), diffrax.Bosh3()]


@pytest.mark.parametrize(
    "solver",
    with_slow(OF_EACH_ORDER, OF_EACH_ORDER[1:]),  # as Tsit5
    ids=repr,
)
def test_a_pulse_is_found_wherever_it_is(solver):
    """Forwards and backwards."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def end(start, t0, t1):
        options = {"breakpoints": jnp.stack([start + WIDTH, start]), "throw": False}
        return jaxode.solve(pulse, jnp.zeros(1), t0, t1, start, solver=solver, **options)

    places = jnp.linspace(0.0, 1.0 - WIDTH, 41)
    for span in ((0.0, 1.0), (1.0, 0.0)):
        solution = end(places, *span)
        # Rounding: piecewise constant slopes are integrated exactly.
        np.testing.assert_allclose(solution.y1[:, 0], WIDTH * (span[1] - span[0]), rtol=1e-12)
        assert (solution.stats.num_rejected == 0).all()


def dose(t, y, sign):
    return jnp.where((sign * t >= 5) & (sign * t < 5.01), 100.0, 0.0).astype(y.dtype) + 0 * y


@pytest.mark.slow  # float32; other pulses are above
@pytest.mark.parametrize("sign", [1, -1])
def test_a_pulse_early_in_a_long_span_in_single_precision(sign):
    """The steps across its edges are a few roundings of their times long, and not of the last."""
    run = lambda t0, t1: jaxode.solve(
        dose, jnp.zeros(1, jnp.float32), t0, t1, float(sign), breakpoints=(sign * 5.0, sign * 5.01)
    )
    for t0, t1 in ((0.0, 1e5), (1e5, 0.0), (-1e5, 1e4)):
        np.testing.assert_allclose(run(sign * t0, sign * t1).y1, sign * np.sign(t1 - t0), rtol=1e-4)


# (t0, t1, breakpoint)
ENDS = [(1.0, 0.5, 0.5), (1.0, 0.0, -1e-16), (5.0, 1e5, np.float32(4.99))]


@pytest.mark.parametrize(("t0", "t1", "point"), with_slow(ENDS, ENDS[2:]))  # float32, as float64
def test_the_ends_move_the_same_pieces_in_each_step(t0, t1, point):
    """A reverse derivative by the ends asks each step for its piece again."""
    dtype, scale = np.result_type(point), max(abs(t0), abs(t1))
    slopes = slopes_by_ends(dtype.name)(t0, t1, point, scale)
    expected = -np.cos(t0 / scale) / scale, np.cos(t1 / scale) / scale
    np.testing.assert_allclose(slopes, expected, rtol=2e-3, atol=1e-3 / scale)


@functools.cache
def slopes_by_ends(dtype):
    """Of `y' = cos(t / scale) / scale`."""

    def end(t0, t1, point, scale):
        f = lambda t, y, scale: (jnp.cos(t / scale) / scale).astype(y.dtype)
        options = {"breakpoints": point[None], "throw": False}
        return jaxode.solve(f, jnp.zeros((), dtype), t0, t1, scale, **options).y1

    return jax.jit(jax.grad(end, (0, 1)))


def test_a_singularity_that_can_be_integrated():
    f = lambda t, y, _: 1 / jnp.sqrt(jnp.abs(t - 0.5)) + 0 * y
    end = jaxode.solve(f, jnp.zeros(1), 0.0, 1.0, breakpoints=(0.5,)).y1[0]
    # The error of some fifty steps at the default tolerance, 1e-5.
    assert float(end) == pytest.approx(8**0.5, abs=5e-4)


DTYPES = [jnp.float32, jnp.float64]


@pytest.mark.parametrize("dtype", with_slow(DTYPES, DTYPES[1:]))  # as float32
def test_stages_see_their_own_side_of_a_large_jump(dtype):
    """Were one of them to see the other side, its step would be rejected."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
    def end(t0, t1, b, left):
        def f(t, y, b):
            before = jnp.where(left, t < b, t <= b)
            return jnp.where(before, -1.0, 1e6).astype(dtype) + 0 * y

        return jaxode.solve(f, jnp.zeros(1, dtype), t0, t1, b, breakpoints=b[None], throw=False)

    t0, t1, part = np.random.default_rng(0).uniform(-3, 3, (3, 200)).astype(dtype)
    t0[:4], t1[:2] = 0, 1
    b = t0 + (t1 - t0) * (part + 3) / 6
    b[:6] = [*t0[:2], *t1[2:4], 0, 0]
    integral = lambda t: np.where(t < b, -(t - b), 1e6 * (t - b))
    for left in (True, False):
        solution = end(t0, t1, b, left)
        assert solution.ok.all()
        assert (solution.stats.num_rejected == 0).all()
        # A few roundings of the time, of size three, times the slope.
        atol = 1e6 * 3 * 10 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(solution.y1[:, 0], integral(t1) - integral(t0), atol=atol)


# Of a solve until 0.5: outside, in another order and doubled, infinite.
SAME = [((0.3, 0.3), (0.3, 0.3)), ((0.3, 0.7), (-4.0, 0.3)), ((0.3, jnp.inf), (0.3, -jnp.inf))]
SAME += [((9.0, -4.0), None), ((), None), ((jnp.inf, -jnp.inf), None)]


@pytest.mark.parametrize(("points", "others"), SAME)
def test_breakpoints_outside_of_the_span_and_their_order_change_nothing(points, others):
    run = lambda points: jaxode.solve(linear, jnp.ones(2), 0.0, 0.5, K, breakpoints=points)
    both = run(points), run(others)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *both))


# (solver, tolerance, error)
QUADRATURES = [(diffrax.Tsit5(), 1e-8, 1e-6), (diffrax.Heun(), 1e-6, 1e-4)]


@pytest.mark.slow  # quadratures in pieces of a solve
@pytest.mark.parametrize(
    ("solver", "tolerance", "error"),
    QUADRATURES,
    ids=["Lobatto", "Legendre"],
)
def test_the_training_loss_and_its_gradient_across_jumps(solver, tolerance, error):
    """`z` scales by a factor that is known, and the divergence is the same everywhere.

    The errors of some hundred steps; Heun's stages are not shared between steps.
    """
    x = jnp.array([[0.5, -1.0], [2.0, 0.1], [0.3, 0.3]])

    def loss(k, t0, t1):
        flow = jaxode.cnf(
            linear, jaxode.standard_normal(2), t0=t0, t1=t1, breakpoints=[0.7, 0.3],
            rtol=tolerance, atol=tolerance, solver=solver, divergence=jaxode.divergence.exact(),
        )  # fmt: skip
        return flow.nll(k, x), flow.from_base(k, x)

    def closed(k, t0, t1):
        growth = k * (exponent(t1) - exponent(t0))
        z = x * jnp.exp(-growth)
        nll = jnp.mean(0.5 * jnp.sum(z**2, axis=1) + jnp.log(2 * jnp.pi) + 2 * growth)
        return nll, x * jnp.exp(growth)

    inputs = tuple(map(jnp.asarray, (K, 0.0, 1.0)))
    of = lambda loss: jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    found, exact = of(loss), of(closed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=error)


def test_a_breakpoint_that_turns_out_to_be_nan():
    run = jax.jit(
        lambda b: jaxode.solve(linear, jnp.ones(1), 0.0, 1.0, K, breakpoints=(0.3, b), throw=False)
    )
    assert run(jnp.nan).result == Result.INVALID_ARGUMENT
    assert run(0.7).result == Result.SUCCESS


def test_a_field_that_is_not_finite_at_a_breakpoint_fails():
    f = lambda t, y, _: jnp.where(t < 0.5, 1.0, jnp.nan) + 0 * y
    solution = jaxode.solve(f, jnp.zeros(1), 0.0, 1.0, breakpoints=(0.5,), throw=False)
    assert solution.result == Result.NON_FINITE
    assert float(solution.t_reached) == pytest.approx(0.5, abs=1e-12)


# Slow: `test_features.py` has the gradient by times of doses with each method.
@pytest.mark.parametrize("name", with_slow(["discrete", "backsolve"], ["backsolve"]))  # as above
def test_a_time_at_a_breakpoint_moves_the_state_along_the_field(name):
    """A dose comes as an infusion starts, whose time does not move; or the solve ends there."""
    infusion = lambda t, y, k: jnp.where(t >= 0.5, 1.0, 0.0) - k * y

    def end(time, t1, k):
        options = METHODS[name].options(rtol=1e-9, atol=1e-9, throw=False)
        options["jumps"] = jaxode.Jumps(time[None], lambda t, y, k, i: y + 2.0)
        return jaxode.solve(infusion, jnp.ones(1), 0.0, t1, k, breakpoints=[0.5], **options).y1[0]

    def closed(time, t1, k):
        infused = jnp.where(t1 == 0.5, 0.0, (1 - jnp.exp(-k * (t1 - 0.5))) / k)  # before it starts
        return jnp.exp(-k * t1) + 2 * jnp.exp(-k * (t1 - time)) + infused

    run, exact = (jax.jit(jax.grad(f, (0, 1, 2))) for f in (end, closed))
    for time, t1 in ((0.5, 1.0), (0.3, 0.5)):
        inputs = jnp.asarray(time), jnp.asarray(t1), jnp.asarray(1.5)
        np.testing.assert_allclose(run(*inputs), exact(*inputs), rtol=1e-6)


@pytest.mark.slow  # three programs in float32; others have pulses early in a long span
def test_a_span_may_be_a_few_roundings_of_its_times_long():
    """In float32 at 1e4 a rounding is 1e-3."""
    f = lambda t, y, _: jnp.where(t < 1e4 + 0.4, 1.0, 3.0).astype(y.dtype) + 0 * y
    run = lambda **options: jaxode.solve(
        f, jnp.zeros(2, jnp.float32), 1e4, 1e4 + 1, breakpoints=[1e4 + 0.4], **options
    )
    np.testing.assert_allclose(run().y1, 2.2, rtol=2e-3)
    two = jaxode.Jumps([1e4, 1e4 + 0.5], lambda t, y, args, i: y + 1)
    np.testing.assert_allclose(run(jumps=two).y1, 4.2, rtol=2e-3)
    stopped = run(event=jaxode.Event(lambda t, y, _: t - (1e4 + 0.5)))
    np.testing.assert_allclose([stopped.t1 - 1e4, stopped.y1[0]], [0.5, 0.7], rtol=5e-3)


@pytest.mark.parametrize("name", with_slow(["solve", "nll"], ["nll"]))  # pieces of a larger solve
def test_rows_have_breakpoints_of_their_own(name):
    """With gradients by them: the rate of each row changes there."""
    rate = lambda t, at: jnp.where(t < at[0], 1.0, jnp.where(t < at[1], -2.0, 0.5))
    points = jnp.array([[0.3, 0.7], [0.1, 0.9], [0.5, 2.0]])  # the last lies beyond the end
    padded, y0 = lambda at: jnp.where(at < 1, at, jnp.inf), jnp.array([[1.0], [2.0], [0.5]])
    options = {"batch": "per_sample", "rtol": 1e-9, "atol": 1e-9, "throw": False}

    def growth(at):
        a, b = jnp.minimum(at[:, 0], 1.0), jnp.minimum(at[:, 1], 1.0)
        return a - 2 * (b - a) + 0.5 * (1 - b)

    def end(at):
        f = lambda t, y, args: rate(t, args[1]) * y
        return jaxode.solve(
            f, y0, 0.0, 1.0, row_args=at, breakpoints=padded(at), **options
        ).y1.sum()

    def nll(at):
        f = lambda t, z, args: rate(t, args[1]) * z
        flow = jaxode.cnf(f, jaxode.standard_normal(1), breakpoints=padded(at), **options)
        return flow.nll(None, y0, context=at)

    def closed_nll(at):
        z, total = y0[:, 0] * jnp.exp(-growth(at)), growth(at)
        return jnp.mean(0.5 * z**2 + 0.5 * jnp.log(2 * jnp.pi) + total)

    closed_end = lambda at: jnp.sum(y0[:, 0] * jnp.exp(growth(at)))
    pair = (end, closed_end) if name == "solve" else (nll, closed_nll)
    found, exact = (jax.jit(jax.value_and_grad(run))(points) for run in pair)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", with_slow(["shared", "of each row"], ["shared"]))  # as of each row
def test_a_row_that_fails_beyond_a_breakpoint_adds_nothing_to_others(name):
    points = [5.0] if name == "shared" else [[5.0], [0.5]]
    f = lambda t, y, a: a * jnp.where(t > 5, jnp.inf, 1.0) * y

    def loss(a):
        s = jaxode.solve(
            f, jnp.ones((2, 1)), 0.0, jnp.array([10.0, 1.0]), a, batch="per_sample",
            breakpoints=jnp.array(points), throw=False, rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        return s.y1[1, 0]

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.3), np.exp(0.3), rtol=1e-6)
