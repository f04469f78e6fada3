"""Steady states: roots, derivatives by the implicit function theorem, and what has none."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode

Y0 = jnp.ones(2)
PARAMS = jnp.array([2.0, 0.5])


def switch(t, y, p):
    """Production, joint decay, and a slow second species."""
    return jnp.stack([p[0] - y[0] * y[1] - y[0], 1e-3 * (y[0] ** 2 - p[1] * y[1])])


def found(p):
    return jaxode.steady_state(switch, Y0, p).y


def test_it_is_a_root_that_a_long_solve_reaches():
    y = found(PARAMS)
    np.testing.assert_allclose(switch(0.0, y, PARAMS), 0.0, atol=1e-12)
    np.testing.assert_allclose(y, long_solve(PARAMS), rtol=1e-8)


def test_derivatives_are_those_of_a_long_solve():
    np.testing.assert_allclose(
        jax.jacrev(found)(PARAMS), jax.jacrev(long_solve)(PARAMS), rtol=1e-8, atol=1e-10
    )
    np.testing.assert_allclose(jax.jacfwd(found)(PARAMS), jax.jacrev(found)(PARAMS), rtol=1e-10)
    assert not jax.jacrev(lambda y0: jaxode.steady_state(switch, y0, PARAMS).y)(Y0).any()


def test_what_the_field_closes_over_has_derivatives_too():
    closed = lambda p: jaxode.steady_state(lambda t, y, _: switch(t, y, p), Y0).y.sum()
    np.testing.assert_allclose(
        jax.grad(closed)(PARAMS), jax.grad(lambda p: found(p).sum())(PARAMS), rtol=1e-10
    )


def long_solve(p):
    solver = {"solver": jaxode.Rodas5P(), "rtol": 1e-10, "atol": 1e-12}
    return jaxode.solve(switch, Y0, 0.0, 1e6, p, **solver).y1


def test_rows_have_their_own():
    rows = jnp.linspace(1.0, 3.0, 4)
    each = lambda first: jnp.stack([first, PARAMS[1]])
    field = lambda t, y, args: switch(t, y, each(args[1]))
    found_rows = jaxode.steady_state(
        field, jnp.ones((4, 2)), row_args=rows, batch="per_sample", throw=False
    )
    assert found_rows.ok.all()
    for y, row in zip(found_rows.y, rows, strict=True):
        np.testing.assert_allclose(y, found(each(row)), rtol=1e-9)


@pytest.mark.parametrize(
    ("field", "y0", "result", "words"),
    [
        (lambda t, y, a: jnp.stack([y[1], -y[0]]), [1.0, 0.0], "NOT_STEADY", "does not settle"),
        (lambda t, y, a: 0 * y + 1.0, [0.0, 0.0], "SINGULAR_MATRIX", "Jacobian of f is singular"),
        (lambda t, y, a: y[::-1] - y, [1.0, 0.0], "SINGULAR_MATRIX", "eliminate a conserved"),
        (lambda t, y, a: jnp.sqrt(y - 2.0), [3.0, 1.0], "NON_FINITE", "not finite"),
    ],
    ids=["oscillates", "drifts", "is conserved", "is not finite"],
)
def test_what_has_no_steady_state_is_named(field, y0, result, words):
    options = {"max_steps": 200}
    state = jaxode.steady_state(field, jnp.array(y0), throw=False, **options)
    assert state.result == jaxode.Result[result]
    assert jnp.isnan(state.y).all()
    with pytest.raises(jaxode.SolveError, match=rf"^steady_state: .*{words}"):
        jaxode.steady_state(field, jnp.array(y0), **options)


def test_rates_of_any_size_are_not_singular():
    field = lambda t, y, a: jnp.stack([-1e6 * (y[0] - 1.0), -(y[1] - 2.0)])
    state = jaxode.steady_state(field, jnp.zeros(2, jnp.float32))
    np.testing.assert_allclose(state.y, [1.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "root"),
    [
        (lambda t, y, a: 1e6 * (a[1] - y * y), jnp.sqrt),
        (lambda t, y, a: 1e3 * a[1] - y - 1e-3 * y * y, lambda p: 500 * (jnp.sqrt(1 + 4 * p) - 1)),
    ],
    ids=["fast", "of counts"],
)
def test_opposing_rates_of_any_size_are_at_rest_in_single_precision(field, root):
    rows = jnp.linspace(0.1, 0.9, 20, dtype=jnp.float32)
    y0 = jnp.ones((20, 1), jnp.float32)
    state = jaxode.steady_state(field, y0, row_args=rows, batch="per_sample")
    np.testing.assert_allclose(state.y[:, 0], root(rows), rtol=1e-5)


def test_units_of_any_size_are_not_singular():
    far = jnp.array([1.0, 1e-8], jnp.float32)  # the unit of each state
    field = lambda t, y, a: far * (lambda z: jnp.stack([1 + z[1] - 2 * z[0], z[0] - z[1]]))(y / far)
    state = jaxode.steady_state(field, jnp.zeros(2, jnp.float32), atol=1e-12)
    np.testing.assert_allclose(state.y / far, 1.0, rtol=1e-5)


@pytest.mark.parametrize("batch", [None, "per_sample"])
def test_args_may_hold_a_network(batch):
    net = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    field = lambda t, y, net: net(y) - y
    y0 = Y0 if batch is None else jnp.stack([Y0, 2 * Y0])
    rest = lambda net: jaxode.steady_state(field, y0, net, batch=batch).y
    y, grads = jnp.atleast_2d(rest(net))[0], eqx.filter_grad(lambda net: rest(net).sum())(net)
    np.testing.assert_allclose(net(y), y, atol=1e-9)
    by_y, rows = jax.jacfwd(net)(y), 1 if batch is None else 2
    expected = rows * jnp.linalg.solve((jnp.eye(2) - by_y).T, jnp.ones(2))
    np.testing.assert_allclose(grads.layers[-1].bias, expected, rtol=1e-7)


def test_a_failure_names_the_time_at_which_the_solve_stopped():
    with pytest.raises(jaxode.SolveError, match=r"^steady_state: .* at t=0\.613"):  # 2 - 2 log(2)
        jaxode.steady_state(lambda t, y, a: -1.0 - jnp.sqrt(y), jnp.ones(1))


def test_a_batch_has_steps_of_its_own():
    with pytest.raises(ValueError, match=r"steady_state\(batch=\.\.\.\): must be None or 'per_sa"):
        jaxode.steady_state(switch, jnp.ones((4, 2)), PARAMS, batch="joint")
