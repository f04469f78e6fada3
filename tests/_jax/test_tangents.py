"""Identity functions with a tangent of their own."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._jax.tangents import with_tangent


def moved_by(x, rate):
    """A pair that does not move with the rate in its first number, and by itself in the second."""

    def tangent(primals, dots):
        (pair, rate), (_, rate_dot) = primals, dots
        return None, 0 * pair[1] if rate_dot is None else rate * rate_dot

    return with_tangent(x, tangent, rate)


def test_the_tangent_of_a_leaf_stays_its_own_beside_one_of_zero():
    pair, four = (jnp.array([1.0, 2.0]), jnp.array(3.0)), jnp.array(4.0)
    values, dots = jax.jvp(lambda rate: moved_by(pair, rate), (four,), (jnp.ones(()),))
    for value, expected in zip(values, pair, strict=True):
        np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(dots[0], np.zeros(2))
    assert dots[1] == 4
    assert jax.grad(jax.grad(lambda rate: moved_by(pair, rate)[1]))(four) == 1


def test_each_row_has_a_tangent_of_its_own():
    rates = jnp.array([1.0, 2.0])
    slopes = jax.vmap(jax.grad(lambda rate: moved_by((jnp.zeros(2), rate), rate)[1]))(rates)
    np.testing.assert_array_equal(slopes, rates)
