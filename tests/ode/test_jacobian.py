"""A Jacobian that the user gives: equal to that by forward mode, with gradients through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, typed
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode

SOLVERS = [jaxode.Rodas5P, jaxode.Rosenbrock23]
Y0 = {"a": jnp.array([[1.0, 0.5], [0.2, -0.3]]), "b": jnp.array([0.3, 1.2])}
RATE, ROWS = jnp.array(30.0), jnp.array([1.0, 0.4])
TIMES = jnp.asarray(0.1), jnp.asarray(1.1), jnp.array([0.3, 0.9])
INPUTS = (Y0, RATE, ROWS, *TIMES)


def field(t, y, args):
    rate, row = args
    a, b = y["a"], y["b"]
    return {"a": -rate * a + a[::-1] * b * row, "b": jnp.sin(t) * a[0] - b**2 + jnp.cos(t)}


def jacobian(t, y, args):
    """By `a[0]`, `a[1]` and `b`."""
    (rate, row), (a, b) = args, (y["a"], y["b"])
    by_b = a[::-1] * row
    last = jnp.stack([jnp.sin(t), jnp.zeros_like(t), -2 * b])
    return jnp.stack(
        [jnp.stack([-rate, b * row, by_b[0]]), jnp.stack([b * row, -rate, by_b[1]]), last]
    )


def half(t, y, args):
    return jacobian(t, y, args) / 2


def run(y0, rate, rows, t0, t1, ts, f=field, **options):
    given = {"batch": "per_sample", "rtol": 1e-4, "atol": 1e-6, "max_steps": 256}
    return jaxode.solve(f, y0, t0, t1, rate, row_args=rows, ts=ts, **given | options)


def loss(*inputs, **options):
    solution = run(*inputs, **options)
    leaves = jax.tree.leaves((solution.y1, solution.ys))
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), solution


PAIRS = [(SOLVERS[0], "per_sample"), (SOLVERS[1], "joint")]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "batch"), PAIRS)
def test_equal_to_forward_mode(solver, batch):
    """Solutions, and gradients by all that there is, with a replay of most steps."""
    of = lambda f, *inputs: loss(
        *inputs, solver=solver(f), batch=batch, adjoint=jaxode.DiscreteAdjoint(4)
    )
    both = jax.jit(jax.value_and_grad(of, range(1, 7), has_aux=True), static_argnums=0)
    given, by_forward_mode = both(jacobian, *INPUTS), both(None, *INPUTS)
    assert_close(jax.tree.leaves(given), jax.tree.leaves(by_forward_mode), 1e-12)


@pytest.mark.slow
def test_order_with_one_that_is_wrong():
    """Two, of both methods."""
    inputs = *INPUTS[:-1], None
    exact = run(*inputs, rtol=1e-12, atol=1e-12, max_steps=4096).y1["b"]
    y0, rate, rows, t0, t1, _ = INPUTS
    middle = (t0 + t1) / 2
    for solver in SOLVERS:
        go = lambda y, a, b, s=solver(half): run(y, rate, rows, a, b, None, solver=s, steps=80).y1
        ends = go(y0, t0, t1), go(go(y0, t0, middle), middle, t1)
        coarse, fine = (jnp.abs(end["b"] - exact).max() for end in ends)
        assert 1.8 < jnp.log2(coarse / fine) < 2.3


@pytest.mark.slow
def test_one_that_is_wrong_takes_more_steps_and_has_exact_gradients():
    """Of the steps that were taken: by reverse mode as by forward mode."""
    right, wrong = (run(*INPUTS, solver=jaxode.Rodas5P(f)) for f in (jacobian, half))
    fine = run(*INPUTS, solver=jaxode.Rodas5P(), rtol=1e-9, atol=1e-9)
    assert (wrong.stats.num_steps > 2 * right.stats.num_steps).all()
    # What error control allows: the global error is ten times the tolerance.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), wrong.ys, fine.ys)
    of = lambda adjoint: (
        lambda *inputs: loss(*inputs, solver=jaxode.Rodas5P(half), adjoint=adjoint)[0]
    )
    reverse = jax.jit(jax.grad(of(jaxode.DiscreteAdjoint()), range(6)))(*INPUTS)
    forward = jax.jit(jax.jacfwd(of(jaxode.ForwardMode()), range(6)))(*INPUTS)
    assert_close(reverse, forward, 1e-11)


def test_rows_under_vmap():
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), Y0)
    ends = lambda f: jax.jit(
        jax.vmap(lambda y0: run(y0, *INPUTS[1:], solver=jaxode.Rodas5P(f)).y1)
    )(several)
    assert_close(ends(jacobian), ends(None), 1e-12)


def decay(t, y, args):
    return -args * y + jnp.cos(t)


def end(y0, rate, jacobian=None, f=decay, **options):
    return jaxode.solve(
        f, y0, 0.0, 1.0, rate, solver=jaxode.Rodas5P(jacobian), rtol=1e-3, atol=1e-5, max_steps=64,
        **options,
    ).y1  # fmt: skip


Y, RATES = jnp.ones((3, 2)), jnp.array([1.0, 20.0, 400.0])


def closing_over(rate):
    return lambda t, y, args: -rate * jnp.eye(2)


@pytest.mark.slow
def test_closed_over_values_under_vmap_and_second_derivatives():
    def total(y0, rate, given, adjoint):
        return jnp.sum(end(y0, rate, closing_over(rate) if given else None, adjoint=adjoint) ** 2)

    def all_of(given):
        of = lambda adjoint: lambda y0, rate: total(y0, rate, given, adjoint)
        reverse, forward = of(jaxode.DiscreteAdjoint()), of(jaxode.ForwardMode())
        first = lambda y0, rate: (jax.grad(reverse, (0, 1))(y0, rate),) * 2
        second_and_first = jax.vmap(jax.jacfwd(first, 1, has_aux=True))(Y, RATES)
        return second_and_first, jax.jvp(jax.vmap(forward), (Y, RATES), (Y, RATES))

    assert_close(*(jax.jit(all_of, static_argnums=0)(given) for given in (True, False)), 1e-11)


# A singular matrix: with one step of size one, `I / gamma - J` is zero.
RESONANT = jnp.eye(2) / jaxode.Rodas5P.tableau.gamma
FAILURES = {
    "not finite": (
        lambda t, y, args: jnp.full((2, 2), jnp.nan), {},
        r"the Jacobian is not finite at t=0\. Check what the jacobian of the solver returns",
    ),
    "infinite": (
        lambda t, y, args: jnp.full((2, 2), jnp.inf), {"steps": 1},
        r"the Jacobian is not finite at t=0\. Check what the jacobian of the solver returns",
    ),
    "singular": (
        lambda t, y, args: RESONANT, {"steps": 1},
        r"the linear system of a step is singular at t=0\. Compare the jacobian of the solver with",
    ),
    "of the wrong sign": (
        lambda t, y, args: 400 * jnp.eye(2), {},
        r"the steps ran out at t=0\.\d+\. Compare the jacobian of the solver with jax\.jacfwd",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_one_that_fails_is_named(name):
    jacobian, options, message = FAILURES[name]
    with pytest.raises(jaxode.SolveError, match=f"^solve: {message}"):
        end(Y[0], RATES[2], jacobian, **options)


@typed
@pytest.mark.slow
def test_over_devices():
    """Rows that are split, with a rate that all share."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))

    def loss(y0, rate):
        return jax.lax.psum(jnp.sum(jax.vmap(end, (0, None, None))(y0, rate, given)), "rows")

    def given(t, y, rate):
        return -rate * jnp.eye(2)

    over = jax.shard_map(loss, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P())
    found = jax.jit(jax.grad(over, (0, 1)))(Y[:2], RATES[1])
    one = lambda y0, rate: jnp.sum(jax.vmap(end, (0, None))(y0, rate))
    assert_close(found, jax.jit(jax.grad(one, (0, 1)))(Y[:2], RATES[1]), 1e-12)


def test_exported():
    run = jax.jit(lambda y0, rate: end(y0, rate, closing_over(rate), throw=False))
    exported = jax.export.deserialize(jax.export.export(run)(Y[0], RATES[0]).serialize())
    np.testing.assert_array_equal(exported.call(Y[0], RATES[2]), run(Y[0], RATES[2]))


@jax.custom_vjp
def of_reverse_mode(t, y, rate):
    return decay(t, y, rate)


of_reverse_mode.defvjp(
    lambda *inputs: jax.vjp(decay, *inputs), lambda pull, bar: pull(bar)
)  # fmt: skip


def test_a_field_without_forward_mode():
    of = lambda f: lambda rate: jnp.sum(end(Y[0], rate, closing_over(rate), f))
    found, expected = (
        jax.jit(jax.value_and_grad(of(f)))(RATES[1]) for f in (of_reverse_mode, decay)
    )
    assert_close(found, expected, 1e-12)
    with pytest.raises(
        TypeError,
        match=r"^Rodas5P: f needs a forward mode; got TypeError: can't apply .*"
        r"custom_vjp function. Pass its Jacobian, as jaxode.Rodas5P\(jacobian=...\), or use",
    ):
        end(Y[0], RATES[1], f=of_reverse_mode)


@jax.custom_vjp
def not_linear_back(t, y, rate):
    return decay(t, y, rate)


not_linear_back.defvjp(
    lambda *inputs: jax.vjp(decay, *inputs), lambda pull, bar: jax.tree.map(jnp.abs, pull(bar))
)


def test_a_field_without_a_derivative_by_the_time():
    with pytest.raises(
        TypeError,
        match=r"^Rodas5P: f needs a forward mode by the time; got TypeError: can't apply .*"
        r"custom_vjp function. Use jax.custom_jvp in place of",
    ):
        end(Y[0], RATES[1], closing_over(RATES[1]), not_linear_back)


def test_an_empty_state_with_a_tolerance_of_each_number():
    found = jaxode.solve(lambda t, y, a: -y, jnp.zeros(0), 0.0, 1.0, atol=np.array([1e-3]))
    assert found.y1.shape == (0,)
