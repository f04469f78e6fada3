"""A Jacobian that the user gives: equal to that by forward mode, with gradients through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import jaxode

STATE = {"a": jnp.array([[1.0, 0.5], [0.2, -0.3]]), "b": jnp.array([0.3, 1.2])}
INPUTS = (STATE, jnp.array(30.0), jnp.array([1.0, 0.4]), jnp.asarray(0.1), jnp.asarray(1.1))


def field(t, y, args):
    (rate, row), a, b = args, y["a"], y["b"]
    return {"a": -rate * a + a[::-1] * b * row, "b": jnp.sin(t) * a[0] - b**2 + jnp.cos(t)}


def jacobian(t, y, args):
    """By `a[0]`, `a[1]` and `b`."""
    (rate, row), a, b = args, y["a"], y["b"]
    by_b = a[::-1] * row
    last = jnp.stack([jnp.sin(t), jnp.zeros_like(t), -2 * b])
    return jnp.stack(
        [jnp.stack([-rate, b * row, by_b[0]]), jnp.stack([b * row, -rate, by_b[1]]), last]
    )


def of_state(y0, rate, rows, t0, t1, **options):
    options = {"batch": "per_sample", "rtol": 1e-4, "atol": 1e-6, "throw": False} | options
    return jaxode.solve(field, y0, t0, t1, rate, row_args=rows, **options)


def test_equal_to_forward_mode():
    """Solutions, and gradients by all that there is, of a state with structure."""

    def both(given):
        def loss(*inputs):
            y1 = of_state(*inputs, solver=jaxode.Rosenbrock23(given), steps=6).y1
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in y1.values()), y1

        return jax.jit(jax.grad(loss, range(5), has_aux=True))(*INPUTS)

    assert_close(both(jacobian), both(None), 1e-12)


@pytest.mark.slow  # five programs for an order
@pytest.mark.parametrize("solver", [jaxode.Rodas5P, jaxode.Rosenbrock23])
def test_order_with_one_that_is_wrong(solver):
    """Two: error control takes more steps."""
    half = lambda *inputs: jacobian(*inputs) / 2
    y0, rate, rows, t0, t1 = INPUTS
    exact, middle = of_state(*INPUTS, rtol=1e-12, atol=1e-12).y1["b"], (t0 + t1) / 2
    go = lambda y, a, b: of_state(y, rate, rows, a, b, solver=solver(half), steps=80).y1
    ends = go(y0, t0, t1), go(go(y0, t0, middle), middle, t1)
    coarse, fine = (jnp.abs(end["b"] - exact).max() for end in ends)
    assert 1.8 < jnp.log2(coarse / fine) < 2.3
    right, wrong = (of_state(*INPUTS, solver=jaxode.Rodas5P(f)) for f in (jacobian, half))
    assert (wrong.stats.num_steps > 2 * right.stats.num_steps).all()


def decay(t, y, args):
    return -args * y + jnp.cos(t)


def end(y0, rate, jacobian=None, f=decay, **options):
    return jaxode.solve(
        f, y0, 0.0, 1.0, rate, solver=jaxode.Rodas5P(jacobian), rtol=1e-3, atol=1e-5, max_steps=64,
        **options,
    ).y1  # fmt: skip


Y, RATES = jnp.ones((3, 2)), jnp.array([1.0, 20.0, 400.0])


def closing_over(rate, scale=1.0):
    return lambda t, y, args: -scale * rate * jnp.eye(2)


def test_one_that_is_wrong_has_exact_gradients():
    """Of the steps that were taken: by reverse mode as by forward mode."""
    of = lambda adjoint: lambda rate: end(
        Y[0], rate, closing_over(rate, 0.5), lambda t, y, a: -a * y**3, adjoint=adjoint, throw=False
    ).sum()  # fmt: skip
    reverse = jax.jit(jax.grad(of(jaxode.DiscreteAdjoint())))(RATES[0])
    forward = jax.jit(jax.jacfwd(of(jaxode.ForwardMode())))(RATES[0])
    np.testing.assert_allclose(reverse, forward, rtol=1e-11)


@pytest.mark.slow  # two programs; a failed row closes over its value, too
def test_rows_under_vmap():
    """Each closes over a value of its own."""
    ends = lambda given: jax.jit(
        jax.vmap(lambda y, a: end(y, a, closing_over(a) if given else None, throw=False))
    )(Y, RATES)
    assert_close(ends(True), ends(False), 1e-12)


# A singular matrix: with one step of size one, `I / gamma - J` is zero.
RESONANT = jnp.eye(2) / jaxode.Rodas5P.method.gamma
NOT_FINITE = r"the Jacobian is not finite at t=0\. Check what the jacobian of the solver returns"
# (the Jacobian, options, start of the message)
FAILURES = {
    "not finite": (jnp.full((2, 2), jnp.nan), {}, NOT_FINITE),
    "infinite": (jnp.full((2, 2), jnp.inf), {"steps": 1}, NOT_FINITE),
    "singular": (
        RESONANT, {"steps": 1},
        r"the linear system of a step is singular at t=0\. Compare the jacobian of the solver with",
    ),
    "of the wrong sign": (
        400 * jnp.eye(2), {},
        r"the steps ran out at t=0\.\d+\. Compare the jacobian of the solver with jax\.jacfwd",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_one_that_fails_is_named(name):
    matrix, options, message = FAILURES[name]
    with pytest.raises(jaxode.SolveError, match=f"^solve: {message}"):
        end(Y[0], RATES[2], lambda t, y, args: matrix, **options)


def test_a_failed_row():
    """It is NaN from its start, and so are its stages."""

    @jax.jit
    @jax.grad
    def gradient(rate, y0):
        y1 = end(y0, rate, closing_over(rate), batch="per_sample", throw=False)
        return jnp.sum(y1[jnp.array([0, 2])])

    lost = gradient(RATES[0], Y.at[1].set(jnp.nan))
    np.testing.assert_allclose(lost, gradient(RATES[0], Y), rtol=1e-12)


@pytest.mark.slow  # compiles what it has exported again
def test_exported():
    run = jax.jit(lambda y0, rate: end(y0, rate, closing_over(rate), throw=False))
    exported = jax.export.deserialize(jax.export.export(run)(Y[0], RATES[0]).serialize())
    np.testing.assert_array_equal(exported.call(Y[0], RATES[2]), run(Y[0], RATES[2]))


def of_reverse_mode(back):
    """`decay`, without forward mode."""
    f = jax.custom_vjp(lambda t, y, rate: decay(t, y, rate))
    f.defvjp(lambda *inputs: jax.vjp(decay, *inputs), back)
    return f


@pytest.mark.slow  # the gradients of two stiff programs
def test_a_field_without_forward_mode():
    found, expected = (
        jax.jit(jax.value_and_grad(lambda a, f=f: end(Y[0], a, closing_over(a), f).sum()))(RATES[1])
        for f in (of_reverse_mode(lambda pull, bar: pull(bar)), decay)
    )
    assert_close(found, expected, 1e-12)


def test_a_field_without_forward_mode_is_told_what_it_needs():
    f = of_reverse_mode(lambda pull, bar: pull(bar))
    message = (
        r"^Rodas5P: f needs a forward mode; got TypeError: can't apply .*"
        r"custom_vjp function. Pass its Jacobian, as jaxode.Rodas5P\(jacobian=...\), or use"
    )
    with pytest.raises(TypeError, match=message):
        end(Y[0], RATES[1], f=f)
    not_linear_back = of_reverse_mode(lambda pull, bar: jax.tree.map(jnp.abs, pull(bar)))
    message = (
        r"^Rodas5P: f needs a forward mode by the time; got TypeError: can't apply .*"
        r"custom_vjp function. Use jax.custom_jvp in place of"
    )
    with pytest.raises(TypeError, match=message):
        end(Y[0], RATES[1], closing_over(RATES[1]), not_linear_back)
