"""Interpolations that a field gets must cover the span of its solve."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode

KNOTS = jnp.array([0.0, 1.0, 2.0])


def field(t, y, args):
    return args.evaluate(t) - y


def of_row(t, y, args):
    return args[1].evaluate(t) - y


def solved(t1, t0=0.0, **options):
    path = diffrax.LinearInterpolation(KNOTS, KNOTS)
    return jaxode.solve(field, jnp.zeros(()), t0, t1, path, **options).y1


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 2.0), (2.0, 0.0), (0.5, 1.5), (0.0, 2.0 + 1e-9)])
def test_a_span_within_the_knots_is_solved(t0, t1):
    assert np.isfinite(solved(t1, t0))


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 2.5), (-1.0, 2.0), (2.5, 0.0)])
def test_a_span_beyond_the_knots_raises(t0, t1):
    with pytest.raises(ValueError, match=r"^solve\(args=...\): an interpolation must cover"):
        solved(t1, t0)


def test_rows_have_their_own_knots():
    knots = jnp.stack([KNOTS, 0.5 * KNOTS])
    paths = jax.vmap(diffrax.LinearInterpolation)(knots, knots)
    run = lambda t1: (
        jaxode.solve(of_row, jnp.zeros(2), 0.0, t1, row_args=paths, batch="per_sample").y1
    )
    assert np.isfinite(run(1.0)).all()
    assert np.isfinite(run(jnp.array([2.0, 1.0]))).all()
    with pytest.raises(ValueError, match="knots from 0 to 1, in 1 of 2 rows, first in row 1"):
        run(1.5)


def test_an_event_may_end_before_the_last_knot():
    event = jaxode.Event(lambda t, y, args: t - 1.5)
    assert np.isfinite(solved(10.0, event=event))


def test_what_is_traced_is_not_known():
    assert np.isfinite(jax.jit(solved)(3.0))
