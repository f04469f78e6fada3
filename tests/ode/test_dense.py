"""The solution between its ends, beside what `test_features.py` has of every feature."""

import functools

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


Y0, RATE = jnp.array([1.0, -0.5]), jnp.array(1.3)


def solved(y0=Y0, t1=3.0, **options):
    options = {"rtol": 1e-9, "atol": 1e-9, "max_steps": 128, **options}
    return jaxode.solve(turn, y0, 0.0, t1, RATE, **options)


SOLVERS = [diffrax.Tsit5(), diffrax.Dopri8(), diffrax.Heun(), jaxode.Rodas5P()]


@pytest.mark.parametrize(
    "solver",
    with_slow(SOLVERS, SOLVERS[1:3]),  # as Tsit5, with other weights
    ids=lambda solver: type(solver).__name__,
)
def test_evaluate_is_what_is_saved(solver):
    tolerance = 1e-3 if isinstance(solver, diffrax.Heun) else 1e-6

    @jax.jit
    def run():
        options = {"solver": solver, "rtol": tolerance, "atol": tolerance, "throw": False}
        s = solved(ts=TIMES, dense=True, **options)
        at = [s.evaluate(t) for t in (TIMES, TIMES[2], 3.0, 0)]
        slopes = jax.vmap(turn, (0, 0, None))(TIMES, s.ys, RATE)
        return (s.ys, s.ys[2], s.y1, Y0), at, s.derivative(TIMES), slopes

    saved, at, derivative, slopes = run()
    for found, expected in zip(at, saved, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    # The derivative of the interpolant is one order less precise than the solution; that of Heun
    # is of a line.
    atol = 5e-2 if isinstance(solver, diffrax.Heun) else 1e-3
    np.testing.assert_allclose(derivative, slopes, atol=atol)


def test_rows_at_a_time_for_all_at_their_own_and_at_several():
    y0, t1 = jnp.stack([Y0, 2 * Y0, -Y0]), jnp.array([3.0, -1.0, 2.0])
    times = jnp.linspace(0.0, 1.0, 5)[None] * t1[:, None]
    s = solved(y0, t1, ts=times, batch="per_sample", dense=True)
    at_all = lambda: [s.evaluate(t) for t in (times, times[:, 2], 0.0, jnp.zeros(3))]
    several, middle, start, starts = jax.jit(at_all)()
    np.testing.assert_allclose(several, s.ys, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(middle, several[:, 2], rtol=1e-14)
    np.testing.assert_allclose(start, y0, rtol=1e-12)
    np.testing.assert_allclose(start, starts, rtol=1e-14)
    with pytest.raises(ValueError, match=r"evaluate\(t=...\): must be a scalar, \[batch\] or"):
        s.evaluate(jnp.zeros(2))


@pytest.mark.slow  # joint steps with other evaluations
def test_a_joint_batch():
    y0 = jnp.stack([Y0, 2 * Y0])
    s = solved(y0, batch="joint", ts=TIMES, dense=True)
    np.testing.assert_allclose(jax.jit(lambda t: s.evaluate(t))(TIMES), s.ys, rtol=1e-12)


def test_outside_is_an_error_or_nan():
    s = solved(dense=True)
    with pytest.raises(ValueError, match=r"evaluate\(t=...\): must lie between .* got 3.5"):
        s.evaluate(jnp.array([1.0, 3.5]))
    inside, outside = jax.jit(lambda t: s.evaluate(t))(jnp.array([1.0, 3.5]))
    assert np.isfinite(inside).all()
    assert np.isnan(outside).all()
    assert np.isnan(jax.jit(lambda t: s.derivative(t))(-0.1)).all()


def test_with_an_event_it_ends_there_and_of_a_failed_solve_it_is_nan():
    event = jaxode.Event(lambda t, y, _: y - 0.2)
    f = lambda t, y, end: jnp.where(t > end, jnp.nan, -y)
    options = {"event": event, "dense": True, "max_steps": 256, "rtol": 1e-9, "atol": 1e-9}
    run = functools.partial(jaxode.solve, f, 1.5, 0.0, 9.0, throw=False, **options)
    s, at = run(9.0), jax.jit(lambda s, t: s.evaluate(t))
    np.testing.assert_allclose(at(s, s.t1), 0.2, atol=1e-9)
    np.testing.assert_allclose(at(s, jnp.array(1.0)), 1.5 * np.exp(-1), atol=1e-7)
    with pytest.raises(ValueError, match="must lie between"):
        s.evaluate(s.t1 + 0.1)
    assert np.isnan(at(run(0.5), jnp.array(0.2)))


def test_masked_times_outside_of_the_span_add_nothing_to_a_gradient():
    """Padding may be infinite. Steps move with the ends, the solution between them does not."""
    times = jnp.array([[0.5, jnp.inf], [0.5, 1.5]])

    def total(a, ends):
        s = jaxode.solve(
            lambda t, y, a: a * y, jnp.ones((2, 1)), 0.0, ends, a,
            batch="per_sample", dense=True, max_steps=64, rtol=1e-8, atol=1e-8,
            throw=False,
        )  # fmt: skip
        return jnp.sum(jnp.where(jnp.isfinite(times), s.evaluate(times)[..., 0], 0))

    by_rate, by_ends = jax.jit(jax.grad(total, (0, 1)))(1.0, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(by_rate, np.exp(0.5) + 1.5 * np.exp(1.5), rtol=1e-6)
    np.testing.assert_allclose(by_ends, np.zeros(2), atol=1e-5)
