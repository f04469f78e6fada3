"""Fields that jump, solved with `breakpoints`: no pulse is lost, nor in any gradient."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, of_feature, with_slow

import jaxode
from jaxode import Result, divergence

WIDTH = 0.02
K = 0.7
JUMPS = jnp.array([0.7, 0.3])
NEVER = (9.0, -jnp.inf, jnp.inf, -4.0)


def pulse(t, y, start):
    return jnp.where((t >= start) & (t < start + WIDTH), 1.0, 0.0).astype(t.dtype) + 0 * y


def linear(t, y, k):
    """`y' = k c(t) y`, where `c` is 1, then -2, then 5."""
    return k * jnp.where(t < 0.3, 1.0, jnp.where(t < 0.7, -2.0, 5.0)) * y


def exponent(t):
    """The integral of `c` from zero."""
    return jnp.where(t < 0.3, t, jnp.where(t < 0.7, 0.9 - 2 * t, 5 * t - 4.0))


def nonlinear(t, y, k):
    """A field without closed form, on which the solver makes errors."""
    return k * jnp.where(t < 0.3, jnp.cos(3 * y), jnp.where(t < 0.7, -2.0 * y**2, jnp.sin(t + y)))


PULSED = [diffrax.Tsit5(), diffrax.Dopri8(), diffrax.Bosh3()]


@pytest.mark.parametrize("solver", with_slow(PULSED, PULSED[1:]), ids=repr)
def test_a_pulse_is_found_wherever_it_is(solver):
    """Forwards and backwards."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def end(start, t0, t1):
        points = jnp.stack([start + WIDTH, start])
        return jaxode.solve(
            pulse, jnp.zeros(1), t0, t1, start, solver=solver, breakpoints=points, throw=False
        )

    places = jnp.linspace(0.0, 1.0 - WIDTH, 41)
    for span in ((0.0, 1.0), (1.0, 0.0)):
        solution = end(places, *span)
        # Rounding: piecewise constant slopes are integrated exactly.
        np.testing.assert_allclose(solution.y1[:, 0], WIDTH * (span[1] - span[0]), rtol=1e-12)
        assert (solution.stats.num_rejected == 0).all()


def dose(t, y, sign):
    return jnp.where((sign * t >= 5) & (sign * t < 5.01), 100.0, 0.0).astype(y.dtype) + 0 * y


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pulse_early_in_a_long_span_in_single_precision(sign):
    """The steps across its edges are a few roundings of their times long, and not of the last."""
    run = lambda t0, t1: jaxode.solve(
        dose, jnp.zeros(1, jnp.float32), t0, t1, float(sign), breakpoints=(sign * 5.0, sign * 5.01)
    )
    for t0, t1 in ((0.0, 1e5), (1e5, 0.0), (-1e5, 1e4)):
        np.testing.assert_allclose(run(sign * t0, sign * t1).y1, sign * np.sign(t1 - t0), rtol=1e-4)


ENDS = {
    "a breakpoint at the end, backwards": (1.0, 0.5, 0.5, jnp.float64),
    "a breakpoint before a long span": (5.0, 1e5, 4.99, jnp.float32),
    "a breakpoint beside the end": (1.0, 0.0, -1e-16, jnp.float64),
}


@pytest.mark.parametrize("name", with_slow(ENDS, list(ENDS)[1:]))
def test_the_ends_move_the_same_pieces_in_each_step(name):
    """`y' = cos(t / t1)`; a reverse derivative by the ends asks each step for its piece again."""
    t0, t1, point, dtype = ENDS[name]
    scale = max(abs(t0), abs(t1))

    def end(t0, t1):
        f = lambda t, y, _: (jnp.cos(t / scale) / scale).astype(y.dtype)
        return jaxode.solve(f, jnp.zeros((), dtype), t0, t1, breakpoints=(point,)).y1

    slopes = jax.jit(jax.grad(end, (0, 1)))(t0, t1)
    expected = -np.cos(t0 / scale) / scale, np.cos(t1 / scale) / scale
    np.testing.assert_allclose(slopes, expected, rtol=2e-3, atol=1e-3 / scale)


def test_a_singularity_that_can_be_integrated():
    f = lambda t, y, _: 1 / jnp.sqrt(jnp.abs(t - 0.5)) + 0 * y
    ends = [
        float(jaxode.solve(f, jnp.zeros(1), 0.0, 1.0, breakpoints=points).y1[0])
        for points in ((0.5,), ())
    ]
    # The error of some fifty steps at the default tolerance, 1e-5.
    assert ends[0] == pytest.approx(8**0.5, abs=5e-4)
    assert ends[1] != pytest.approx(8**0.5, abs=5e-4)


SIDES = [(side, dtype) for side in ("left", "right") for dtype in (jnp.float32, jnp.float64)]


@pytest.mark.parametrize(("side", "dtype"), with_slow(SIDES, SIDES[:3]))
def test_stages_see_their_own_side_of_a_large_jump(dtype, side):
    """Were one of them to see the other side, its step would be rejected."""

    @jax.jit
    @jax.vmap
    def end(t0, t1, b):
        def f(t, y, b):
            before = t < b if side == "left" else t <= b
            return jnp.where(before, -1.0, 1e6).astype(dtype) + 0 * y

        return jaxode.solve(f, jnp.zeros(1, dtype), t0, t1, b, breakpoints=b[None], throw=False)

    key = jax.random.split(jax.random.key(0), 3)
    t0 = jax.random.uniform(key[0], (200,), dtype, -3, 3)
    t1 = jax.random.uniform(key[1], (200,), dtype, -3, 3)
    t0, t1 = t0.at[:4].set(0.0), t1.at[:2].set(1.0)
    b = t0 + (t1 - t0) * jax.random.uniform(key[2], (200,), dtype)
    b = b.at[:6].set(jnp.concatenate([t0[:2], t1[2:4], jnp.zeros(2, dtype)]))
    solution = end(t0, t1, b)
    assert solution.ok.all()
    assert (solution.stats.num_rejected == 0).all()
    integral = lambda t: jnp.where(t < b, -(t - b), 1e6 * (t - b))
    # A few roundings of the time, of size three, times the slope.
    atol = 1e6 * 3 * 10 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(solution.y1[:, 0], integral(t1) - integral(t0), atol=atol)


@pytest.mark.parametrize("points", [(), NEVER], ids=["none", "outside"])
def test_breakpoints_outside_of_the_span_change_nothing(points):
    run = lambda points: jaxode.solve(
        nonlinear, jnp.ones(2), 0.0, 0.25, jnp.asarray(K), breakpoints=points
    )
    plain, other = run(None), run(points)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), plain, other))


def test_order_and_doubles_do_not_matter():
    run = lambda *points: jaxode.solve(
        linear, jnp.ones(2), 0.0, 1.0, K, breakpoints=jnp.array(points)
    )
    one, other = run(0.3, 0.7, 0.7, 0.3), run(0.7, 0.3, 0.7, 0.7)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, other))


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["joint", "per_sample"])
def test_the_gradient_is_exact_on_a_coarse_mesh(batch):
    """Forward and reverse mode agree to rounding, where the solution is a rough one."""
    y0, ts = jnp.array([[1.0, 0.2], [-0.4, 2.0]]), jnp.array([0.2, 0.3, 0.9])

    def end(inputs, adjoint):
        y0, t0, t1, k, ts = inputs
        solution = jaxode.solve(
            nonlinear, y0, t0, t1, k, batch=batch, ts=ts, adjoint=adjoint, breakpoints=JUMPS,
            rtol=1e-2, atol=1e-2,
        )  # fmt: skip
        return jnp.sum(solution.y1**2) + jnp.sum(jnp.sin(solution.ys))

    inputs = (y0, jnp.asarray(0.0), jnp.asarray(1.0), jnp.asarray(K), ts)
    reverse = jax.jit(jax.grad(lambda x: end(x, jaxode.DiscreteAdjoint())))(inputs)
    forward = jax.jit(jax.jacfwd(lambda x: end(x, jaxode.ForwardMode())))(inputs)
    for a, b in zip(jax.tree.leaves(reverse), jax.tree.leaves(forward), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "tolerance", "error"),
    [(diffrax.Tsit5(), 1e-8, 1e-6), (diffrax.Heun(), 1e-6, 1e-4)],
    ids=["Lobatto", "Legendre"],
)
def test_the_training_loss_and_its_gradient_across_jumps(solver, tolerance, error):
    """`z` scales by a factor that is known, and the divergence is the same everywhere.

    The errors of some hundred steps; Heun's stages are not shared between steps.
    """
    x = jnp.array([[0.5, -1.0], [2.0, 0.1], [0.3, 0.3]])

    def loss(k, t0, t1):
        flow = jaxode.cnf(
            linear, jaxode.standard_normal(2), t0=t0, t1=t1, breakpoints=JUMPS, rtol=tolerance,
            atol=tolerance, solver=solver, divergence=divergence.exact(),
        )  # fmt: skip
        return flow.nll(k, x, key=jax.random.key(0))

    def closed(k, t0, t1):
        growth = k * (exponent(t1) - exponent(t0))
        z = x * jnp.exp(-growth)
        return jnp.mean(0.5 * jnp.sum(z**2, axis=1) + jnp.log(2 * jnp.pi) + 2 * growth)

    inputs = tuple(map(jnp.asarray, (K, 0.0, 1.0)))
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs)
    exact, exact_grads = jax.jit(jax.value_and_grad(closed, (0, 1, 2)))(*inputs)
    np.testing.assert_allclose(value, exact, rtol=error)
    for a, b in zip(grads, exact_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=error)


def test_log_prob_and_samples_across_jumps():
    flow = jaxode.cnf(
        linear, jaxode.standard_normal(2), breakpoints=(0.3, 0.7), rtol=1e-8, atol=1e-8
    )
    z = jnp.array([[0.5, -1.0]])
    x = flow.from_base(jnp.asarray(K), z)
    np.testing.assert_allclose(x, z * jnp.exp(K * exponent(1.0)), rtol=1e-6)
    np.testing.assert_allclose(flow.to_base(jnp.asarray(K), x), z, rtol=1e-6)


@pytest.mark.slow
def test_stiff_solvers_take_breakpoints_too():
    solution = jaxode.solve(
        linear, jnp.ones(1), 0.0, 1.0, K, solver=jaxode.Rodas5P(), breakpoints=JUMPS,
        rtol=1e-7, atol=1e-7,
    )  # fmt: skip
    np.testing.assert_allclose(solution.y1, jnp.exp(K * exponent(1.0)), rtol=1e-5)


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


# Breakpoints need error control.
ACROSS_JUMPS = {name: method for name, method in METHODS.items() if method.adaptive}


@pytest.mark.parametrize(
    "name", of_feature(ACROSS_JUMPS, slow=("backsolve", "forward", "discrete from few"))
)
def test_a_time_at_a_breakpoint_moves_the_state_along_the_field(name):
    """A dose comes as an infusion starts, whose time does not move."""
    method = ACROSS_JUMPS[name]
    options = method.options(breakpoints=[0.5], rtol=1e-9, atol=1e-9)
    infusion = lambda t, y, k: jnp.where(t >= 0.5, 1.0, 0.0) - k * y

    def end(time, k):
        jumps = jaxode.Jumps(time[None], lambda t, y, k, i: y + 2.0)
        start = jnp.ones(1)
        return jaxode.solve(infusion, start, 0.0, 1.0, k, jumps=jumps, **options).y1[0]

    def closed(time, k):
        infused = (1 - jnp.exp(-0.5 * k)) / k
        return jnp.exp(-k) + 2 * jnp.exp(-k * (1 - time)) + infused

    inputs = jnp.asarray(0.5), jnp.asarray(1.5)
    found = jax.jit(method.gradient(end, (0, 1)))(*inputs)
    np.testing.assert_allclose(found, jax.grad(closed, (0, 1))(*inputs), rtol=1e-6)
    until = lambda t1: jaxode.solve(infusion, jnp.ones(1), 0.0, t1, 1.5, **options).y1[0]
    slope = jax.jit(method.gradient(until))(jnp.asarray(0.5))
    np.testing.assert_allclose(slope, infusion(0.5, until(0.5), 1.5), rtol=1e-6)


def test_a_piece_of_a_solve_may_be_shorter_than_the_steps_across_breakpoints():
    """Between jumps, or on the way to an event. In float32 at 5e3 they are 2.4 long."""
    f = lambda t, y, _: jnp.where(t < 5000.5, 1.0, 0.0).astype(y.dtype) + 0 * y
    run = lambda t0, **options: jaxode.solve(
        f, jnp.zeros(1, jnp.float32), t0, 5010.0, breakpoints=[5000.5], **options
    )
    two = jaxode.Jumps([5000.0, 5001.0], lambda t, y, args, i: y + 1)
    np.testing.assert_allclose(run(4990.0, jumps=two).y1, 12.5, rtol=1e-3)
    stopped = run(4999.0, event=jaxode.Event(lambda t, y, _: t - 5001.0))
    np.testing.assert_allclose([stopped.t1, *stopped.y1], [5001.0, 1.5], rtol=1e-3)


def test_a_span_must_be_longer_than_the_steps_across_its_breakpoints():
    """In float32 at 1e4 such a step is 5e-3 long, and no error control sees it."""
    f = lambda t, y, _: jnp.where(t < 1e4 + 0.4, 1.0, 3.0).astype(y.dtype) + 0 * y
    run = lambda t1, y0: jaxode.solve(f, y0, 1e4, t1, breakpoints=[1e4 + 0.4], throw=False)
    with pytest.raises(jaxode.SolveError, match=r"solve\(breakpoints=...\): .* must be longer"):
        jaxode.solve(f, jnp.float32(0), 1e4, 1e4 + 1, breakpoints=[1e4 + 0.4])
    traced = jax.jit(run)(1e4 + 1, jnp.float32(0))
    assert traced.result == Result.INVALID_ARGUMENT
    np.testing.assert_allclose(run(1e4 + 1, jnp.float64(0)).y1, 2.2, rtol=1e-9)
    # Far outside of the span they are ignored.
    apart = jaxode.solve(f, jnp.float32(0), 1e4, 1e4 + 0.3, breakpoints=[2e4])
    np.testing.assert_allclose(apart.y1, 0.3, rtol=1e-2)
    # With times of each row it is that row alone.
    rows = jaxode.solve(
        f, jnp.zeros((2, 1), jnp.float32), np.array([0.0, 1e4]), np.array([1.0, 1e4 + 1]),
        breakpoints=[1e4 + 0.4], batch="per_sample", throw=False,
    )  # fmt: skip
    assert list(rows.result) == [Result.SUCCESS, Result.INVALID_ARGUMENT]
