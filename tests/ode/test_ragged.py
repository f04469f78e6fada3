"""Start, end and output times of each row: against a Python loop of single solves."""

import functools
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, METHODS, assert_close, gradient, of_feature

import jaxode

# The rows have different spans, two go back in time, one is empty.
T0 = np.array([0.0, 0.3, 2.0, 1.0, -0.5])
T1 = np.array([2.0, 0.9, 0.5, 1.0, -1.5])
COUNTS = np.array([4, 2, 3, 1, 1])
TIMES = [
    np.linspace(a, b, n + 1)[1:] if n > 1 else np.array([b])
    for a, b, n in zip(T0, T1, COUNTS, strict=True)
]
TS = np.stack([np.append(t, np.full(4 - len(t), t[-1])) for t in TIMES])
Y0 = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
ARGS = jnp.array([[0.2, 1.1], [-0.9, -0.1]])
OPTIONS = {"rtol": 1e-6, "atol": 1e-8, "max_steps": 64}
RAGGED = (Y0, jnp.asarray(T0), jnp.asarray(T1), jnp.asarray(TS), ARGS, jnp.array(0.3))


def field(t, y, args):
    a, shift = args
    return jnp.tanh(a @ y) + shift * jnp.sin(t) * y


def solve(y0, t0, t1, ts, args, shift, name="discrete", **options):
    # `shift` is closed over.
    f = lambda t, y, a: jnp.tanh(a @ y) + shift * jnp.sin(t) * y
    return jaxode.solve(f, y0, t0, t1, args, ts=ts, **METHODS[name].options(**OPTIONS, **options))


def scalar(y1, ys, real):
    """Of the outputs that are no padding."""
    weights = jnp.where(real[..., None], 1.0 + jnp.arange(8.0).reshape(4, 2), 0.0)
    return jnp.sum(jnp.sin(y1)) + jnp.sum(weights * ys**2)


def in_one_call(name):
    def loss(y0, t0, t1, ts, args, shift):
        s = solve(y0, t0, t1, ts, args, shift, name, batch="per_sample")
        return scalar(s.y1, s.ys, jnp.arange(4)[None] < COUNTS[:, None]), s

    return loss


def row_by_row(name):
    def loss(y0, t0, t1, ts, args, shift, real):
        s = solve(y0, t0, t1, ts, args, shift, name)
        return scalar(s.y1, s.ys, real), s

    return loss


@functools.cache
def both(name):
    def of(loss):
        with_itself = lambda *x: ((result := loss(*x))[0], result)
        each = gradient(name)(with_itself, tuple(range(6)), has_aux=True)
        return jax.jit(lambda *x: each(*x)[::-1])

    single, rows = of(row_by_row(name)), []
    for i in range(5):
        of_row = [x[i] for x in RAGGED[:4]]
        rows.append(single(*of_row, *RAGGED[4:], jnp.arange(4) < COUNTS[i]))
    total, solutions = sum(value for (value, _), _ in rows), [s for (_, s), _ in rows]
    bars = list(zip(*(bars for _, bars in rows), strict=True))
    bars = (*map(jnp.stack, bars[:4]), sum(bars[4]), sum(bars[5]))
    return of(in_one_call(name))(*RAGGED), ((total, solutions), bars)


# Values, and closed forms of gradients, have other tests.
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_single_solves(name):
    ((value, s), bars), ((expected, singles), single_bars) = both(name)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert s.ys.shape == (5, 4, 2)
    assert_close((s.y1, s.ys), (np.stack([x.y1 for x in singles]),
                                np.stack([x.ys for x in singles])), 1e-12)  # fmt: skip
    # 1e-11 for the adjoint ODE: its steps depend on the rounding of its error norm.
    assert_close(bars, single_bars, 1e-12 if METHODS[name].exact else 1e-11)


@pytest.mark.slow
def test_the_work_is_that_of_single_solves():
    ((_, s), _), ((_, singles), _) = both("discrete")
    rows = jax.tree.map(lambda *x: np.stack(x), *(single.stats for single in singles))
    jax.tree.map(np.testing.assert_array_equal, s.stats, rows)


def test_padding_changes_neither_results_nor_work():
    padded = np.concatenate([TS, np.repeat(TS[:, -1:], 3, axis=1)], axis=1)
    run = lambda ts: jax.jit(lambda ts: solve(*RAGGED[:3], ts, *RAGGED[4:], batch="per_sample"))(ts)
    a, b = run(jnp.asarray(TS)), run(jnp.asarray(padded))
    np.testing.assert_array_equal(a.y1, b.y1)
    np.testing.assert_array_equal(a.ys, b.ys[:, :4])
    np.testing.assert_array_equal(b.ys[:, 4:], np.repeat(b.ys[:, 3:4], 3, axis=1))
    np.testing.assert_array_equal(a.stats.num_evals, b.stats.num_evals)


@pytest.mark.slow
def test_shared_times_with_ends_of_rows_under_jit(default_settings):
    """In float32, with as many times as rows, and not."""
    for times in (2, 3):
        ts = np.linspace(0.1, 0.4, times, dtype=np.float32)
        run = partial(
            jaxode.solve, lambda t, y, _: -y, jnp.ones((3, 1)), 0.0, batch="per_sample", ts=ts,
            throw=False,
        )  # fmt: skip
        for solution in (run(np.array([1.0, 2.0, 1e9])), jax.jit(run)(jnp.array([1.0, 2.0, 1e9]))):
            assert solution.ys.shape == (times, 3, 1)
            expected = np.broadcast_to(np.exp(-ts)[:, None], (times, 2))
            np.testing.assert_allclose(solution.ys[:, :2, 0], expected, rtol=1e-4)
            assert list(solution.ok) == [True, True, False]


SHAPES = {
    "t1": (0.0, T1, None),
    "t0": (T0, 3.0, None),
    "ts of all, ends of rows": (np.zeros(5), np.array([1.0, 2.0, 3.0, 1.5, 1.0]), [0.0, 0.5, 1.0]),
    "ts of rows, ends of all": (0.0, 2.0, np.sort(np.random.default_rng(1).uniform(0, 2, (5, 3)))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_time_may_be_of_all_rows_or_of_each(shape):
    t0, t1, ts = SHAPES[shape]
    ts = None if ts is None else np.asarray(ts)
    f = lambda t, y, _: t * y
    s = jaxode.solve(f, Y0, t0, t1, ts=ts, batch="per_sample", rtol=1e-9, atol=1e-9)
    exact = lambda t: Y0 * np.exp((np.square(t) - np.square(np.broadcast_to(t0, 5))) / 2)[:, None]
    np.testing.assert_allclose(s.y1, exact(np.broadcast_to(t1, 5)), rtol=1e-7)
    if ts is None:
        assert s.ys is None
    elif ts.ndim == 1:
        assert s.ys.shape == (3, 5, 2)
        np.testing.assert_allclose(s.ys, [exact(np.full(5, t)) for t in ts], rtol=1e-5)
    else:
        assert s.ys.shape == (5, 3, 2)
        np.testing.assert_allclose(s.ys[:, 1], exact(ts[:, 1]), rtol=1e-5)


def test_flow_there_and_back_with_times_of_each_row():
    f = lambda t, y, a: jnp.tanh(a @ y) + jnp.sin(t) * y
    options = {"batch": "per_sample", "rtol": 1e-10, "atol": 1e-10}
    z = jaxode.flow(f, Y0, T0, T1, ARGS, **options)
    np.testing.assert_allclose(jaxode.flow(f, z, T1, T0, ARGS, **options), Y0, rtol=1e-8)


@pytest.mark.slow
def test_a_row_with_times_out_of_order_fails_alone():
    ts = np.array(TS)
    ts[1] = ts[1, ::-1]
    ts[2, 1] = np.nan
    run = lambda ts, throw: jaxode.solve(
        field, *RAGGED[:3], RAGGED[4:], ts=ts, batch="per_sample", throw=throw, **OPTIONS
    )
    s = run(ts, False)
    assert list(s.result) == [
        0,
        jaxode.Result.INVALID_ARGUMENT,
        jaxode.Result.INVALID_ARGUMENT,
        0,
        0,
    ]
    np.testing.assert_array_equal(s.ys[0], run(TS, False).ys[0])
    assert np.isnan(s.ys[1:3]).all()
    message = r"solve\(ts=...\): times must be in order .* 2 of 5 rows, first in row 1"
    with pytest.raises(jaxode.SolveError, match=message):
        run(ts, True)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(lambda ts: run(ts, True).y1)(ts))
    # Masked, the rows add nothing to any gradient.
    loss = lambda args, ts: jnp.sum(
        jnp.where((s := solve(*RAGGED[:3], ts, args, RAGGED[5],
                              batch="per_sample", throw=False)).ok[:, None, None], s.ys, 0)
    )  # fmt: skip
    rest = np.array([0, 3, 4])
    alone = lambda args: jnp.sum(
        jaxode.solve(
            field, Y0[rest], T0[rest], T1[rest], (args, RAGGED[5]), ts=TS[rest],
            batch="per_sample", **OPTIONS,
        ).ys
    )  # fmt: skip
    found, expected = jax.jit(jax.grad(loss))(ARGS, ts), jax.jit(jax.grad(alone))(ARGS)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_lost_span_of_all_rows_raises_beside_outputs_of_each():
    y0, ts = jnp.zeros((2, 1), jnp.float32), np.full((2, 1), 1e8)
    with pytest.raises(ValueError, match=r"the span from 100000000.0 to 100000005.0 is lost in"):
        jaxode.solve(field, y0, 1e8, 1e8 + 5, ts=ts, batch="per_sample")


def test_times_of_rows_that_float32_cannot_tell_apart():
    y0 = jnp.ones((2, 1), jnp.float32)
    f = lambda t, y, _: -y
    s = jaxode.solve(
        f, y0, np.array([0.0, 1e9]), np.array([1.0, 1e9 + 1]), batch="per_sample", throw=False
    )
    assert list(s.result) == [0, jaxode.Result.INVALID_ARGUMENT]
    ts = np.array([[0.5, 1.0], [1e8 + 1, 1e8 + 2]])
    s = jaxode.solve(
        f, y0, np.array([0.0, 1e8]), np.array([1.0, 1e8 + 64]), ts=ts, batch="per_sample",
        throw=False,
    )  # fmt: skip
    assert list(s.result) == [0, jaxode.Result.INVALID_ARGUMENT]


@pytest.mark.slow
def test_negative_padding_is_named():
    ts = np.where(np.arange(4) < COUNTS[:, None], np.abs(TS) + 1, -1.0)
    with pytest.raises(jaxode.SolveError, match=r"ts=.* Pad a row with .* rows, first in row"):
        jaxode.solve(lambda t, y, _: y, Y0, 0.0, 9.0, ts=np.sort(ts)[:, ::-1], batch="per_sample")


@pytest.mark.parametrize("name", of_feature(KINDS))
def test_a_padding_row_at_a_singular_time_adds_nothing(name):
    """It has an empty span, where the field is infinite, and nothing depends on it."""

    def loss(p, t0, t1):
        y0, f = jnp.ones((len(t0), 1)), lambda t, y, p: p * y / t
        options = METHODS[name].options(batch="per_sample", throw=False, **OPTIONS)
        s = jaxode.solve(f, y0, t0, t1, p, **options)
        return s.y1[0, 0], s.ok

    slope = jax.jit(gradient(name)(loss, 0, has_aux=True))
    rows, ok = slope(0.5, jnp.array([0.1, 0.0]), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(rows, np.log(10) * 10**0.5, rtol=1e-4)
    assert ok.all()


def test_padding_has_no_slope_where_the_field_is_no_number():
    """At the last time, with the state of the start."""
    ts = jnp.array([[1.0, 2.0], [2.0, 2.0]])

    def loss(ts):
        f = lambda t, y, _: 1 + jnp.sqrt(y - t)
        options = METHODS["backsolve"].options(batch="per_sample", throw=False, **OPTIONS)
        return jaxode.solve(f, jnp.ones((2, 1)), 0.0, 2.0, ts=ts, **options).ys[:, 0].sum()

    # With u = y - t, du/dt = sqrt(u), u(0) = 1.
    expected = [[1 + 1.5, 0.0], [1 + 2.0, 0.0]]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(ts), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("times", [False, True])
def test_a_row_waits_for_others_where_the_field_is_no_number(times):
    """The midpoint rule never comes to the end of its steps."""

    def loss(c, y0, rows, t1):
        f = lambda t, y, a: a[1] * (a[0] - y) / (1.0 - t)
        options = {"solver": diffrax.Midpoint(), "rtol": 1e-3, "atol": 1e-3, "throw": False}
        return jaxode.solve(
            f, y0, 0.0, t1, c, batch="per_sample", row_args=rows, **options
        ).y1.sum()

    slope = jax.jit(jax.grad(loss, (0, 3) if times else 0))
    rows, y0 = jnp.array([1.0, 3.0]), jnp.zeros((2, 1))
    alone = [slope(2.0, y0[:1], rows[i : i + 1], 1.0) for i in range(2)]
    expected = jax.tree.map(lambda a, b: a + b, *alone)
    for a, b in zip(*map(jax.tree.leaves, (slope(2.0, y0, rows, 1.0), expected)), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=1e-9)
