"""DiscreteAdjoint: exact for the computed solution, from few states.

`test_adjoints.py` compares it with forward mode, with respect to everything.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, with_slow

import jaxode


def test_an_attempt_that_overflows_leaves_no_trace_in_the_gradient_of_a_row_that_waits():
    """Its stages are not finite, and are of a step that another row has taken alone."""
    z = jnp.array([[0.1], [1000.0]])

    def loss(z, a, t):
        solution = jaxode.solve(
            lambda t, y, a: -a * y**3, z, 0.0, 1.0, a, batch="per_sample", first_step=0.1,
            ts=jnp.stack([t, 1.0]), rtol=1e-8, atol=1e-8, throw=False,
        )  # fmt: skip
        return jnp.sum(solution.y1) + jnp.sum(solution.ys[0])

    by_z, by_a, by_t = jax.jit(jax.grad(loss, (0, 1, 2)))(z, jnp.array(1.0), jnp.array(0.0))
    # Of z / sqrt(1 + 2 a z^2), at a = 1, and of the start.
    slope = (1 + 2 * z**2) ** -1.5
    np.testing.assert_allclose(by_z, 1 + slope, rtol=1e-4)
    np.testing.assert_allclose(by_a, -jnp.sum(z**3 * slope), rtol=1e-4)
    np.testing.assert_allclose(by_t, -jnp.sum(z**3), rtol=1e-12)


# There is room for the stages of all states for one copy of it, and then of one, and of none.
@pytest.mark.parametrize("copies", with_slow([60_000, 150_000], [150_000]))  # a program more
def test_stages_may_be_kept_beside_some_of_the_states_only(copies):
    def mean(y0):
        f = lambda t, y, _: -y * jnp.cos(t + y)
        adjoint = jaxode.DiscreteAdjoint(6)
        return jaxode.solve(f, y0, 0.0, 3.0, steps=12, adjoint=adjoint, throw=False).y1.mean()

    of = lambda copies: copies * jax.jit(jax.grad(mean))(jnp.full(copies, 2.0))
    np.testing.assert_allclose(of(copies), np.broadcast_to(of(1), copies), rtol=1e-12)


SOLVERS = [diffrax.Tsit5(), jaxode.Rodas5P()]


@pytest.mark.parametrize(
    "solver",
    with_slow(SOLVERS, SOLVERS[1:]),  # the same sums, of larger programs
    ids=["explicit", "stiff"],
)
def test_gathering_the_parameter_gradient_once_a_step_changes_nothing(solver, monkeypatch):
    """As for more parameters than work."""
    A = jax.random.normal(jax.random.key(0), (3, 3))

    def gradient():
        f = lambda t, y, A: jnp.tanh(A @ y + t)
        end = lambda A, t1: (
            jaxode.solve(f, jnp.ones(3), 0.0, t1, A, solver=solver, steps=3, throw=False).y1
        )
        # Another function each time: another program, traced with the patch.
        return jax.jit(jax.grad(lambda *inputs: end(*inputs).sum(), (0, 1)))(A, jnp.array(1.0))

    found = []
    for most in (0, 1e9):
        monkeypatch.setattr("jaxode.ode.adjoints.sweep.PARAMETERS_PER_WORK", most)
        found.append(gradient())
    assert_close(*found, 1e-12)


def test_many_steps_within_few_checkpoints():
    """20,000 Euler steps of `y' = -a y` have the closed form `(1 - a h) ** 20000`."""

    def end(a):
        return jaxode.solve(
            lambda t, y, a: -a * y, jnp.ones(1), 0.0, 1.0, a, solver=diffrax.Euler(), steps=20_000,
            adjoint=jaxode.DiscreteAdjoint(8), throw=False,
        ).y1[0]  # fmt: skip

    expected = -((1 - 2.0 / 20_000) ** 19_999)
    np.testing.assert_allclose(jax.jit(jax.grad(end))(2.0), expected, rtol=1e-11)


class Field(eqx.Module):
    """Its program hides the rate in that of an inner `jit`."""

    rate: jax.Array
    label: str = "any static thing"

    def __call__(self, t, y, args):
        return jax.jit(lambda y: -self.rate * y)(y)


def test_a_module_as_a_field():
    """As a constant, which another program must not have, and differentiated."""
    end = lambda y0, field: jaxode.solve(field, y0, 0.0, 1.0, rtol=1e-8, atol=1e-8).y1.sum()
    for rate in (1.0, 2.0, 1.0):
        by_y0 = jax.value_and_grad(end)(jnp.ones(1), Field(jnp.array([rate])))
        np.testing.assert_allclose(by_y0[0], np.exp(-rate), rtol=1e-6)
        np.testing.assert_allclose(by_y0[1], np.exp(-rate), rtol=1e-6)
    by_field = eqx.filter_grad(lambda field: end(jnp.ones(1), field))(Field(jnp.array([0.5])))
    np.testing.assert_allclose(by_field.rate, -np.exp(-0.5), rtol=1e-6)


@pytest.mark.parametrize("adjoint", [jaxode.DiscreteAdjoint(), jaxode.BacksolveAdjoint()])
def test_rules_of_differentiation_in_a_field_are_followed(adjoint):
    """`y' = -y`, whose rule says that the slope is `-2`: the cotangent decays by that."""
    forward, reverse = jax.custom_jvp(lambda y: -y), jax.custom_vjp(lambda y: -y)
    forward.defjvp(lambda primals, tangents: (-primals[0], -2.0 * tangents[0]))
    reverse.defvjp(lambda y: (-y, None), lambda _, bar: (-2.0 * bar,))

    def end(y0):
        f = lambda t, y, _: jnp.stack([forward(y[0]), reverse(y[1])])
        options = {"rtol": 1e-8, "atol": 1e-8, "adjoint": adjoint, "throw": False}
        y1 = jaxode.solve(f, y0, 0.0, 1.0, **options).y1
        return y1.sum(), y1

    gradient, y1 = jax.jit(jax.grad(end, has_aux=True))(jnp.ones(2))
    np.testing.assert_allclose(y1, [np.exp(-1.0)] * 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [np.exp(-2.0)] * 2, rtol=1e-6)
