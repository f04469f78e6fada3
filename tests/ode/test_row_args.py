"""Parameters of each row: equal to a loop of single solves, and to their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode

ROWS = 3
RNG = np.random.default_rng(0)
Y0 = jnp.asarray(RNG.normal(size=(ROWS, 2)))
ARGS = jnp.array(0.7)
ROW_ARGS = {
    "matrix": jnp.asarray(RNG.normal(size=(ROWS, 2, 2))) / 2,
    "shift": jnp.asarray(RNG.normal(size=ROWS)),
}


def field(t, y, args):
    scale, row = args
    return jnp.sin(row["matrix"] @ y) * scale + row["shift"] * t


@pytest.mark.slow
def test_the_condition_of_an_event_sees_the_row():
    levels = jnp.array([0.5, 0.25, 0.1])
    event = jaxode.Event(lambda t, y, args: y[0] - args[1])

    def times(levels):
        decay = lambda t, y, args: -args[0] * y
        return jaxode.solve(
            decay, jnp.ones((3, 1)), 0.0, 9.0, 2.0, row_args=levels, batch="per_sample",
            event=event, rtol=1e-9, atol=1e-9,
        ).t1  # fmt: skip

    slopes, found = jax.jit(jax.jacrev(lambda x: (times(x),) * 2, has_aux=True))(levels)
    np.testing.assert_allclose(found, -np.log(levels) / 2, rtol=1e-7)
    np.testing.assert_allclose(slopes, np.diag(-1 / (2 * levels)), rtol=1e-6, atol=1e-12)


def test_dense_and_flow_and_export():
    solution = jaxode.solve(
        field, Y0, 0.0, 1.0, ARGS, row_args=ROW_ARGS, batch="per_sample", dense=True, max_steps=32
    )
    np.testing.assert_allclose(
        jax.jit(lambda t: solution.evaluate(t))(1.0), solution.y1, rtol=1e-12
    )
    run = lambda y, row_args: jaxode.flow(
        field, y, 0.0, 1.0, ARGS, row_args=row_args, batch="per_sample"
    )
    np.testing.assert_array_equal(run(Y0, ROW_ARGS), solution.y1)


@pytest.mark.slow
def test_keys_of_random_numbers():
    """A random field for each row; one that fails is left out of the gradient."""
    keys = jax.random.split(jax.random.key(0), ROWS)

    def random_field(t, y, args):
        rate, key = args
        return jnp.sin(jax.random.normal(key, (2, 2)) @ y) * rate

    def ends(rate, y0):
        s = jaxode.solve(
            random_field, y0, 0.0, 1.0, rate, row_args=keys, batch="per_sample", throw=False
        )
        return jnp.sum(jnp.where(s.ok[:, None], s.y1, 0.0)), s.y1

    def one_by_one(rate, rows):
        one = lambda i: jaxode.solve(random_field, Y0[i], 0.0, 1.0, (rate, keys[i])).y1
        return sum(jnp.sum(one(i)) for i in rows)

    rates = jax.jit(jax.grad(ends, has_aux=True))
    for y0, rows in ((Y0, (0, 1, 2)), (Y0.at[1].set(jnp.inf), (0, 2))):
        found, y1 = rates(ARGS, y0)
        expected = jax.jit(jax.grad(one_by_one), static_argnums=1)(ARGS, rows)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert jnp.isfinite(y1).all(1).sum() == len(rows)


def test_a_field_that_ignores_its_row_is_told_of_the_pair():
    with pytest.raises(TypeError, match=r"raised TypeError: .*, the pair \(args, row\) of a solve"):
        jaxode.solve(
            lambda t, y, args: -args["shift"] * y, Y0, 0.0, 1.0, row_args=ROW_ARGS, batch="joint"
        )
