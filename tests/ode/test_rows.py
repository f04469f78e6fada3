"""Times and parameters of each row: what no other feature of a solve has."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, REVERSE, with_slow

import jaxode

# The rows have different spans, two go back in time, one is empty.
T0 = np.array([0.0, 0.3, 2.0, 1.0, -0.5])
T1 = np.array([2.0, 0.9, 0.5, 1.0, -1.5])
# Padded with the last time of each row.
TS = np.array([[0.5, 1, 1.5, 2], [0.6, 0.9, 0.9, 0.9], [1.5, 1, 0.5, 0.5], [1] * 4, [-1.5] * 4])
Y0 = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
ARGS = jnp.array([[0.2, 1.1], [-0.9, -0.1]])
OPTIONS = {"rtol": 1e-6, "atol": 1e-8, "max_steps": 64}
ROW_ARGS = {
    "matrix": jnp.arange(20.0).reshape(5, 2, 2) / 10,
    "shift": jnp.arange(5.0),
}


def field(t, y, args):
    scale, row = args
    return jnp.tanh(scale @ row["matrix"] @ y) + row["shift"] * t


def solve(ts, **options):
    options = OPTIONS | {"batch": "per_sample", "row_args": ROW_ARGS} | options
    return jaxode.solve(field, Y0, T0, T1, ARGS, ts=ts, **options)


def test_padding_changes_neither_results_nor_work():
    padded = np.concatenate([TS, np.repeat(TS[:, -1:], 3, axis=1)], axis=1)
    a, b = solve(TS), solve(padded)
    np.testing.assert_array_equal(a.y1, b.y1)
    np.testing.assert_array_equal(a.ys, b.ys[:, :4])
    np.testing.assert_array_equal(b.ys[:, 4:], np.repeat(b.ys[:, 3:4], 3, axis=1))
    np.testing.assert_array_equal(a.stats.num_evals, b.stats.num_evals)


@pytest.mark.slow  # as under vmap in `test_features.py`
def test_a_row_is_a_single_solve_and_flow_returns_its_end():
    """To rounding, with as many evaluations."""
    s = solve(TS)
    for i in range(5):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], ROW_ARGS)
        alone = jaxode.solve(field, Y0[i], T0[i], T1[i], (ARGS, own), ts=TS[i], **OPTIONS)
        np.testing.assert_allclose(s.y1[i], alone.y1, rtol=1e-12)
        np.testing.assert_allclose(s.ys[i], alone.ys, rtol=1e-12)
        assert s.stats.num_evals[i] == alone.stats.num_evals
    options = {"batch": "per_sample", "row_args": ROW_ARGS, **OPTIONS}
    np.testing.assert_array_equal(jaxode.flow(field, Y0, T0, T1, ARGS, **options), s.y1)


@pytest.mark.slow  # compiles random numbers
def test_keys_of_random_numbers():
    """A random field for each row; one that fails is left out of the gradient."""
    keys = jax.random.split(jax.random.key(0), 3)

    def random_field(t, y, args):
        rate, key = args
        return jax.random.normal(key, (2,)) * rate * y

    def ends(rate, y0):
        s = jaxode.solve(
            random_field, y0, 0.0, 1.0, rate, row_args=keys, batch="per_sample", throw=False
        )
        return jnp.sum(jnp.where(s.ok[:, None], s.y1, 0.0))

    rates = jnp.stack([jax.random.normal(key, (2,)) for key in keys])
    y0 = jnp.ones((3, 2)).at[1].set(jnp.inf)
    found = jax.jit(jax.grad(ends))(0.7, y0)
    expected = jnp.sum(rates[::2] * jnp.exp(0.7 * rates[::2]))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", with_slow(REVERSE, ["backsolve"]))  # as below
def test_a_padding_row_at_a_singular_time_adds_nothing(name):
    """It has an empty span, where the field is infinite, and nothing depends on it."""

    def loss(p, t0, t1):
        y0, f = jnp.ones((len(t0), 1)), lambda t, y, p: p * y / t
        options = METHODS[name].options(batch="per_sample", throw=False, **OPTIONS)
        s = jaxode.solve(f, y0, t0, t1, p, **options)
        return s.y1[0, 0], s.ok

    slope, ok = jax.jit(jax.grad(loss, has_aux=True))(0.5, jnp.array([0.1, 0]), jnp.array([1.0, 0]))
    np.testing.assert_allclose(slope, np.log(10) * 10**0.5, rtol=1e-4)
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


def test_a_row_waits_for_others_where_the_field_is_no_number():
    """The midpoint rule never comes to the end of its steps."""

    def loss(c, y0, rows, t1):
        f = lambda t, y, a: a[1] * (a[0] - y) / (1.0 - t)
        options = {"solver": diffrax.Midpoint(), "rtol": 1e-3, "atol": 1e-3, "throw": False}
        s = jaxode.solve(f, y0, 0.0, t1, c, batch="per_sample", row_args=rows, **options)
        return s.y1.sum()

    slope = jax.jit(jax.grad(loss, (0, 3)))
    rows, y0 = jnp.array([1.0, 3.0]), jnp.zeros((2, 1))
    alone = [slope(2.0, y0, jnp.full(2, row), 1.0) for row in rows]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *alone)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(slope(2.0, y0, rows, 1.0), expected, rtol=1e-9)


def test_a_field_that_ignores_its_row_is_told_of_the_pair():
    with pytest.raises(TypeError, match=r"raised TypeError: .*, the pair \(args, row\) of a solve"):
        jaxode.solve(
            lambda t, y, args: -args["shift"] * y, Y0, 0.0, 1.0, row_args=ROW_ARGS, batch="joint"
        )
