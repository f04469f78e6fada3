"""The solution between its ends."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow

import jaxode

A = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
TIMES = jnp.linspace(0.1, 2.9, 7)


def turn(t, y, a):
    return a * (A @ y) + 0.1 * jnp.cos(t)


def solved(y0, t0, t1, a, **options):
    options = {"rtol": 1e-9, "atol": 1e-9, "max_steps": 128, **options}
    return jaxode.solve(turn, y0, t0, t1, a, **options)


Y0, RATE = jnp.array([1.0, -0.5]), jnp.array(1.3)
SOLVERS = [diffrax.Tsit5(), diffrax.Dopri8(), diffrax.Bosh3(), diffrax.Heun(), jaxode.Rodas5P()]


@pytest.mark.parametrize(
    "solver",
    with_slow(SOLVERS, SOLVERS[1:3]),
    ids=lambda solver: type(solver).__name__,
)
def test_evaluate_is_what_is_saved(solver):
    tolerance = 1e-3 if isinstance(solver, diffrax.Heun) else 1e-6

    @jax.jit
    def run():
        s = solved(
            Y0, 0.0, 3.0, RATE, ts=TIMES, dense=True, solver=solver, rtol=tolerance, atol=tolerance
        )
        at = [s.evaluate(t) for t in (TIMES, TIMES[2], 3.0, 0)]
        slopes = jax.vmap(turn, (0, 0, None))(TIMES, s.ys, RATE)
        return s, at, s.derivative(TIMES), slopes

    s, at, derivative, slopes = run()
    for found, expected in zip(at, (s.ys, s.ys[2], s.y1, Y0), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    # The derivative of the interpolant is one order less precise than the solution; that of Heun
    # is of a line.
    atol = 5e-2 if isinstance(solver, diffrax.Heun) else 1e-3
    np.testing.assert_allclose(derivative, slopes, atol=atol)


@pytest.mark.slow
def test_gradients_in_either_mode():
    forward = jaxode.ForwardMode()
    value = lambda a: jnp.sum(
        solved(Y0, 0.0, 3.0, a, dense=True, adjoint=forward).evaluate(TIMES)[:, 0]
    )
    reverse = lambda a: jnp.sum(solved(Y0, 0.0, 3.0, a, dense=True).evaluate(TIMES)[:, 0])
    forwards = jax.jit(jax.jacfwd(value))(RATE)
    np.testing.assert_allclose(forwards, jax.jit(jax.grad(reverse))(RATE), rtol=1e-10)


def test_rows_at_a_time_for_all_at_their_own_and_at_several():
    y0, t1 = jnp.stack([Y0, 2 * Y0, -Y0]), jnp.array([3.0, -1.0, 2.0])
    s = jax.jit(lambda: solved(y0, 0.0, t1, RATE, batch="per_sample", dense=True))()
    times = jnp.linspace(0.0, 1.0, 5)[None] * t1[:, None]
    at_all = lambda: [s.evaluate(t) for t in (times, times[:, 2], 0.0, jnp.zeros(3))]
    several, middle, start, starts = jax.jit(at_all)()
    assert several.shape == (3, 5, 2)
    np.testing.assert_allclose(several[:, 0], y0, rtol=1e-12)
    np.testing.assert_allclose(several[:, -1], s.y1, rtol=1e-12)
    np.testing.assert_allclose(middle, several[:, 2], rtol=1e-14)
    for i in range(3):
        single = solved(y0[i], 0.0, t1[i], RATE, ts=times[i])
        np.testing.assert_allclose(several[i], single.ys, rtol=1e-11)
    np.testing.assert_allclose(start, starts, rtol=1e-14)
    with pytest.raises(ValueError, match=r"evaluate\(t=...\): must be a scalar, \[batch\] or"):
        s.evaluate(jnp.zeros(2))


def test_a_joint_batch():
    y0 = jnp.stack([Y0, 2 * Y0])
    s = solved(y0, 0.0, 3.0, RATE, batch="joint", ts=TIMES, dense=True)
    np.testing.assert_allclose(jax.jit(lambda t: s.evaluate(t))(TIMES), s.ys, rtol=1e-12)


def test_outside_is_an_error_or_nan():
    s = solved(Y0, 0.0, 3.0, RATE, dense=True)
    with pytest.raises(ValueError, match=r"evaluate\(t=...\): must lie between .* got 3.5"):
        s.evaluate(jnp.array([1.0, 3.5]))
    inside, outside = jax.jit(lambda t: s.evaluate(t))(jnp.array([1.0, 3.5]))
    assert np.isfinite(inside).all()
    assert np.isnan(outside).all()
    assert np.isnan(jax.jit(lambda t: s.derivative(t))(-0.1)).all()


@pytest.mark.slow
def test_a_failed_solve_with_an_event_is_nan_at_any_time():
    f = lambda t, y, _: jnp.where(t > 0.5, jnp.nan, -y)
    event = jaxode.Event(lambda t, y, _: y - 0.1)
    s = jaxode.solve(f, 1.0, 0.0, 1.0, event=event, dense=True, max_steps=64, throw=False)
    assert np.isnan(s.evaluate(0.2))


@pytest.mark.slow
def test_a_failed_row_can_be_masked():
    f = lambda t, y, a: jnp.where(y > 5.0, jnp.nan, a * y)
    # Of the others, one fails on its way, and one from the start.
    y0 = jnp.array([[1.0], [4.0], [6.0]])

    def total(a, y0, every):
        s = jaxode.solve(
            f, y0, 0.0, 1.0, a, batch="per_sample", dense=True, max_steps=32, throw=False
        )
        kept = jnp.where((s.ok | every)[:, None], s.evaluate(0.7), 0.0)
        return jnp.sum(kept), (s.ok, s.evaluate(0.1))

    grad = jax.jit(jax.grad(total, has_aux=True))
    found, (ok, early) = grad(1.0, y0, False)
    assert list(ok) == [True, False, False]
    assert np.isnan(early[1]).all()
    one = grad(1.0, jnp.tile(y0[:1], (3, 1)), False)[0] / 3
    np.testing.assert_allclose(found, one, rtol=1e-12)
    assert np.isnan(grad(1.0, y0, True)[0])


def test_a_failed_solve_raises_where_only_the_interpolant_is_used():
    run = jax.jit(lambda a: jaxode.solve(
        lambda t, y, a: a * y, 1.0, 0.0, 1.0, a, dense=True, max_steps=4
    ).evaluate(0.01))  # fmt: skip
    with pytest.raises(jax.errors.JaxRuntimeError, match="solve: the steps ran out"):
        jax.block_until_ready(run(1e3))


def test_masked_times_outside_of_the_span_add_nothing_to_a_gradient():
    """Padding may be infinite."""
    times = jnp.array([[0.5, jnp.inf], [0.5, 1.5]])

    def total(a):
        s = jaxode.solve(
            lambda t, y, a: a * y, jnp.ones((2, 1)), 0.0, jnp.array([1.0, 2.0]), a,
            batch="per_sample", dense=True, max_steps=64, rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        return jnp.sum(jnp.where(jnp.isfinite(times), s.evaluate(times)[..., 0], 0))

    np.testing.assert_allclose(
        jax.jit(jax.grad(total))(1.0), np.exp(0.5) + 1.5 * np.exp(1.5), rtol=1e-6
    )
