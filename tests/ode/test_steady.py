"""Steady states: roots, derivatives by the implicit function theorem, and what has none."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow

import jaxode

Y0 = jnp.ones(2)
PARAMS = jnp.array([2.0, 0.5])


def switch(t, y, p):
    """Production, joint decay, and a slow second species."""
    return jnp.stack([p[0] - y[0] * y[1] - y[0], 1e-3 * (y[0] ** 2 - p[1] * y[1])])


def found(p):
    return jaxode.steady_state(switch, Y0, p).y


@functools.cache
def reverse():
    """`found`, and its derivatives by the parameters and by the start in reverse mode."""
    state = lambda p, y0: jaxode.steady_state(switch, y0, p).y
    both = lambda *inputs: (state(*inputs), *jax.jacrev(state, (0, 1))(*inputs))
    return jax.jit(both)(PARAMS, Y0)


def test_it_is_a_root():
    np.testing.assert_allclose(switch(0.0, reverse()[0], PARAMS), 0.0, atol=1e-12)


def test_derivatives_are_those_of_the_implicit_function_theorem():
    y, by_parameters, by_start = reverse()
    by_y, by_p = jax.jacfwd(switch, (1, 2))(0.0, y, PARAMS)
    np.testing.assert_allclose(by_parameters, -np.linalg.solve(by_y, by_p), rtol=1e-9)
    forward = jax.jit(jax.jacfwd(found))(PARAMS)
    np.testing.assert_allclose(forward, by_parameters, rtol=1e-10)
    assert not by_start.any()


@pytest.mark.slow  # the gradient of a long stiff solve
def test_it_and_its_derivatives_are_those_of_a_long_solve():
    np.testing.assert_allclose(reverse()[0], long_solve(PARAMS), rtol=1e-8)
    np.testing.assert_allclose(reverse()[1], jax.jacrev(long_solve)(PARAMS), rtol=1e-8, atol=1e-10)


def test_what_the_field_closes_over_has_derivatives_too():
    closed = lambda p: jaxode.steady_state(lambda t, y, _: switch(t, y, p), Y0).y.sum()
    np.testing.assert_allclose(jax.jit(jax.grad(closed))(PARAMS), reverse()[1].sum(0), rtol=1e-10)


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
    np.testing.assert_allclose(
        jax.vmap(lambda y, row: switch(0.0, y, each(row)))(found_rows.y, rows), 0.0, atol=1e-12
    )


# (field, start, result, words). All are two numbers, so that one program has them all.
NOT_STEADY = {
    "oscillates": (
        lambda y: jnp.stack([y[1], -y[0]]), [1.0, 0.0], "NOT_STEADY", "does not settle",
    ),
    "drifts": (lambda y: 0 * y + 1.0, [0.0, 0.0], "SINGULAR_MATRIX", "Jacobian of f is singular"),
    "is conserved": (
        lambda y: y[::-1] - y, [1.0, 0.0], "SINGULAR_MATRIX", "eliminate a conserved",
    ),
    "is not finite": (lambda y: jnp.sqrt(y - 2.0), [3.0, 1.0], "NON_FINITE", "not finite"),
    # At 2 - 2 log(2), where the solve has stopped.
    "stops": (lambda y: -1.0 - jnp.sqrt(y), [1.0, 1.0], "NON_FINITE", r"at t=0\.613"),
}  # fmt: skip


def any_not_steady(t, y, number):
    return jax.lax.switch(number, [field for field, *_ in NOT_STEADY.values()], y)


@pytest.mark.parametrize("name", NOT_STEADY)
def test_what_has_no_steady_state_is_named(name):
    _, y0, result, words = NOT_STEADY[name]
    given = any_not_steady, jnp.array(y0), np.int32(list(NOT_STEADY).index(name))
    state = jaxode.steady_state(*given, max_steps=200, throw=False)
    assert state.result == jaxode.Result[result]
    assert jnp.isnan(state.y).all()
    with pytest.raises(jaxode.SolveError, match=rf"^steady_state: .*{words}"):
        jaxode.steady_state(*given, max_steps=200)


@pytest.mark.parametrize("kind", with_slow(["a number", "an array"], ["an array"]))  # as a number
def test_a_parameter_that_is_nan_is_no_steady_state(kind):
    missing = float("nan") if kind == "a number" else jnp.nan * jnp.ones(())
    with pytest.raises(jaxode.SolveError, match=r"^steady_state: .* not finite at t=0"):
        jaxode.steady_state(lambda t, y, a: a["k"] - y, jnp.ones(1), {"k": missing})


@pytest.mark.slow  # as units of any size
def test_rates_of_any_size_are_not_singular():
    field = lambda t, y, a: jnp.stack([-1e6 * (y[0] - 1.0), -(y[1] - 2.0)])
    state = jaxode.steady_state(field, jnp.zeros(2, jnp.float32))
    np.testing.assert_allclose(state.y, [1.0, 2.0], rtol=1e-6)


OPPOSING = {
    "fast": (lambda t, y, a: 1e6 * (a[1] - y * y), jnp.sqrt),
    "of counts": (
        lambda t, y, a: 1e3 * a[1] - y - 1e-3 * y * y, lambda p: 500 * (jnp.sqrt(1 + 4 * p) - 1),
    ),
}  # fmt: skip


@pytest.mark.slow  # as units of any size, and states of any size
@pytest.mark.parametrize("name", OPPOSING)
def test_opposing_rates_of_any_size_are_at_rest_in_single_precision(name):
    field, root = OPPOSING[name]
    rows = jnp.linspace(0.1, 0.9, 20, dtype=jnp.float32)
    y0 = jnp.ones((20, 1), jnp.float32)
    state = jaxode.steady_state(field, y0, row_args=rows, batch="per_sample")
    np.testing.assert_allclose(state.y[:, 0], root(rows), rtol=1e-5)


@pytest.mark.slow  # as states of any size
def test_units_of_any_size_are_not_singular():
    far = jnp.array([1.0, 1e-8], jnp.float32)  # the unit of each state
    field = lambda t, y, a: far * (lambda z: jnp.stack([1 + z[1] - 2 * z[0], z[0] - z[1]]))(y / far)
    state = jaxode.steady_state(field, jnp.zeros(2, jnp.float32), atol=1e-12)
    np.testing.assert_allclose(state.y / far, 1.0, rtol=1e-5)


def switch_of_size(t, y, args):
    """At rest at 0.0689 and 3.79, and unstably at 0.1915, in units of a size."""
    size = args[1]
    z = y / size
    return size * (4 * z * z / (1 + z * z) - z + 0.05)


IN_SINGLE = with_slow(["float32", "float64"], ["float64"])  # other tests have double precision


@pytest.mark.parametrize("dtype", IN_SINGLE)
def test_states_of_any_size_are_those_that_the_flow_settles_to(dtype):
    starts, sizes = np.geomspace(0.02, 50, 30), 10.0 ** np.array([0, -4, -6, -8, -12])
    starts, sizes = np.tile(starts, 5), np.repeat(sizes, 30)
    roots = np.sort(np.roots([-1, 4.05, -1, 0.05]).real)
    settled = np.where(starts < roots[1], roots[0], roots[2])  # a flow in one dimension
    y0 = jnp.asarray((starts * sizes)[:, None], dtype)
    state = jaxode.steady_state(
        switch_of_size, y0, row_args=jnp.asarray(sizes, dtype), batch="per_sample"
    )
    # Up to `rtol`: that of single precision is 1e-5.
    np.testing.assert_allclose(np.asarray(state.y[:, 0]) / sizes, settled, rtol=1e-5)
    assert state.stable.all()


def coming_to_rest(t, y, _):
    """A velocity comes to rest at zero, where forces cancel; another mode takes a long time."""
    return jnp.stack(
        [y[1], 3 - 2 * y[0] - 0.7 * y[1], 1e-4 * (1 - y[2] ** 2), y[4], y[2] ** 2 - y[3] - y[4]]
    )


@pytest.mark.parametrize("dtype", IN_SINGLE)
@pytest.mark.parametrize("start", [0.0, 1.5], ids=["from zero", "at rest"])
def test_a_number_that_only_rounding_moves_takes_few_steps(dtype, start):
    y0 = jnp.array([start, 0.0, 0.2, 0.0, 0.0], dtype)
    state = jaxode.steady_state(coming_to_rest, y0, max_steps=256)
    np.testing.assert_allclose(state.y, [1.5, 0.0, 1.0, 1.0, 0.0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # what begins at zero is above, too
def test_a_long_chain_fills_from_empty():
    field = lambda t, y, _: jnp.concatenate([jnp.ones(1), y[:-1]]) - y
    np.testing.assert_allclose(jaxode.steady_state(field, jnp.zeros(40)).y, 1.0, rtol=1e-10)


def pitchfork(t, y, args):
    x, v = y
    return jnp.stack([args[1] * x - x**3, -v])


def test_states_are_stable_or_not():
    r, x = jnp.array([-1.0, 1.0, 1.0, 1.0]), jnp.array([0.5, 0.0, 0.5, -1e-6])
    state = jaxode.steady_state(pitchfork, jnp.stack([x, 0 * x], 1), row_args=r, batch="per_sample")
    np.testing.assert_allclose(state.y[:, 0], [0.0, 0.0, 1.0, -1.0], atol=1e-9)
    np.testing.assert_array_equal(state.stable, [True, False, True, True])


@pytest.mark.slow  # `SteadyState.stable` is the same under vmap as of rows
def test_states_are_stable_or_not_under_vmap():
    one = jax.jit(lambda r: jaxode.steady_state(pitchfork, jnp.zeros(2), (None, r)).stable)
    np.testing.assert_array_equal(jax.vmap(one)(jnp.array([-1.0, 1.0])), [True, False])
    assert one(1.0).shape == ()


@pytest.mark.parametrize(
    ("matrix", "stable"),
    [
        ([[1.0, 0.0], [0.0, -1.0]], False),  # a saddle
        ([[1e-6, -1.0], [1.0, 1e-6]], False),  # an unstable focus
        ([[0.0, -1.0], [1.0, 0.0]], False),  # a center
        ([[-1e-3, -1.0], [1.0, -1e-3]], True),
        ([[-2.0, 1e8], [1e-8, -1.0]], True),  # units far apart
        ([[-2.0, 3e8], [1e-8, -1.0]], False),
        ([[-1e6, 0.0, 1.0], [3.0, -1e-2, 0.0], [0.0, 1.0, -1.0]], True),  # rates far apart
        ([[-1e6, 0.0, 1.0], [3.0, 1e-2, 0.0], [0.0, 1.0, -1.0]], False),
        ([[-1.0, 1e4], [0.0, -1.0]], True),  # a Jordan block
        (np.diag([-1e-8, 1.0] + 28 * [-1.0]), False),  # many, and one that is slow
        (np.diag([-1e-5, -1.0] + 28 * [-1.0]), True),
        ([[jnp.nan]], False),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stability_is_that_of_the_eigenvalues(matrix, stable, dtype):
    none = jnp.zeros((), jnp.int32)
    state = jaxode.SteadyState(none, none, jnp.array(matrix, dtype))
    assert bool(state.stable) == stable


def multiple(t, y, power):
    return -jnp.where(power == 2, y**2, y**3)


@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("dtype", IN_SINGLE)
def test_a_multiple_root_is_not_found(power, dtype):
    """Newton's method halves its distance at each step, down to what counts as noise."""
    state = jaxode.steady_state(multiple, jnp.array([1.0], dtype), np.int32(power), throw=False)
    assert not state.ok
    assert not state.stable


@pytest.mark.slow  # what oscillates, and what is unstable, are above
def test_a_state_inside_a_limit_cycle_is_not_stable():
    field = lambda t, y, r: jnp.stack([y[0], y[1]]) * (r**2 - y @ y) + jnp.stack([-y[1], y[0]])
    state = jaxode.steady_state(field, jnp.zeros(2), 0.003)
    assert state.ok
    assert not state.stable
    outside = jaxode.steady_state(field, jnp.array([1e-3, 0.0]), 0.003, t1=1e3, throw=False)
    assert outside.result == jaxode.Result.NOT_STEADY


def test_gradients_of_rows_that_fail_are_nan_and_no_others():
    # A drift with a singular Jacobian, what has no root, and two rows as usual.
    field = lambda t, y, args: args[0] * args[1] - jnp.where(args[1] < 0, 0.0, y**2)
    rest = lambda p, rows: jaxode.steady_state(
        field, jnp.ones((4, 1)), p, row_args=rows, batch="per_sample", throw=False
    )
    rows, used = jnp.array([-1.0, jnp.nan, 1.0, 4.0]), jnp.array([False, False, True, True])
    masked = lambda p, rows, used: jnp.where(used[:, None], rest(p, rows).y, 0.0).sum()
    gradient = jax.jit(jax.grad(masked, (0, 1)))
    expected = [jnp.nan, jnp.nan, *(0.5 * np.sqrt(2.0 / rows[2:]))]
    np.testing.assert_allclose(gradient(2.0, rows, ~used | used)[1], expected, rtol=1e-9)
    by_all, by_rows = gradient(2.0, rows, used)
    np.testing.assert_allclose(by_all, (1 + 2) / np.sqrt(8.0), rtol=1e-9)
    np.testing.assert_allclose(by_rows, [0.0, 0.0, *expected[2:]], rtol=1e-9)
    pushed = jax.jit(jax.jacfwd(lambda p: rest(p, rows).y[:, 0]))(2.0)
    np.testing.assert_allclose(pushed, [np.nan, np.nan, 8**-0.5, 2 * 8**-0.5], rtol=1e-9)


def test_second_derivatives():
    root = lambda p: jaxode.steady_state(lambda t, y, p: p - y**2, jnp.ones(1), p).y[0]
    np.testing.assert_allclose(jax.jit(jax.hessian(root))(2.0), -0.25 * 2**-1.5, rtol=1e-9)


@pytest.mark.slow  # a network compiles fifty programs; others have args
@pytest.mark.parametrize("batch", [None, "per_sample"])
def test_args_may_hold_a_network(batch):
    net = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    field = lambda t, y, net: net(y) - y
    y0 = Y0 if batch is None else jnp.stack([Y0, 2 * Y0])
    rest = lambda net: jaxode.steady_state(field, y0, net, batch=batch).y
    y = jnp.atleast_2d(rest(net))[0]
    grads = eqx.filter_jit(eqx.filter_grad(lambda net: rest(net).sum()))(net)
    np.testing.assert_allclose(net(y), y, atol=1e-9)
    by_y, rows = jax.jacfwd(net)(y), 1 if batch is None else 2
    expected = rows * jnp.linalg.solve((jnp.eye(2) - by_y).T, jnp.ones(2))
    np.testing.assert_allclose(grads.layers[-1].bias, expected, rtol=1e-7)


def test_a_batch_has_steps_of_its_own():
    with pytest.raises(ValueError, match=r"steady_state\(batch=\.\.\.\): must be None or 'per_sa"):
        jaxode.steady_state(switch, jnp.ones((4, 2)), PARAMS, batch="joint")
