"""Linear systems of samples, against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode.ode.solvers.linear import MOST_UNROLLED, factorize, solve_factorized

SAMPLES = 7
solved = jax.jit(lambda a, b: solve_factorized(factorize(a), b))


def matrices(n):
    """Some with a zero where the first pivot would be, and rows of very different size."""
    a = np.random.default_rng(n).normal(size=(SAMPLES, n, n))
    if n > 1:
        a[0, 0, 0] = 0
        a[1] *= 10.0 ** np.linspace(-6, 6, n)[:, None]
        a[2, :, 0] = [0] * (n - 1) + [1]
    return a


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, MOST_UNROLLED, MOST_UNROLLED + 1])
def test_solves_either_way(n):
    a, b = matrices(n), np.random.default_rng(0).normal(size=(SAMPLES, n))

    def both(a, b):
        factors = factorize(a.transpose(1, 2, 0))
        return solve_factorized(factors, b), solve_factorized(factors, b, transposed=True)

    x, transposed = jax.jit(both)(a, b)
    np.testing.assert_allclose(x, np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-9)
    expected = np.linalg.solve(a.swapaxes(1, 2), b[..., None])[..., 0]
    np.testing.assert_allclose(transposed, expected, rtol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_order_of_the_equations_is_found_once(transposed):
    """By a factorization, and not again by each of its solves."""
    n = MOST_UNROLLED + 1
    factors = jax.eval_shape(factorize, jnp.ones((n, n, SAMPLES)))
    program = jax.make_jaxpr(partial(solve_factorized, transposed=transposed))(
        factors, jnp.ones((SAMPLES, n))
    )
    assert "triangular_solve" in str(program)
    assert not any(name in str(program) for name in ("pivots", "sort[", "while["))


def test_samples_that_cannot_be_solved_spoil_no_other():
    """Rows of few unknowns that fail are in `test_failed_gradients.py`."""
    a = matrices(MOST_UNROLLED + 1)
    a[3], a[4] = np.nan, 0
    x = solved(jnp.asarray(a.transpose(1, 2, 0)), jnp.ones((SAMPLES, len(a[0]))))
    np.testing.assert_array_equal(np.isfinite(x).all(axis=1), np.isin(range(SAMPLES), (3, 4)) == 0)


def test_the_scale_of_an_equation_does_not_choose_pivots():
    """Without it, the large first row is the pivot, and the second equation is lost in float32."""
    a = jnp.array([[1.0, 1e8], [1.0, 1.0]], jnp.float32)
    x = solved(a[:, :, None], jnp.array([[1e8, 2.0]], jnp.float32))
    np.testing.assert_allclose(x, [[1.0, 1.0]], rtol=1e-6)
