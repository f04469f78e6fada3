"""DiscreteAdjoint: exact for the computed solution, from few states."""

from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from problems import ARGS, TS, Y0, pendulum, scalar

import jaxode
from jaxode.ode.loop.integrate import integrate
from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.tableau import tableau_of
from jaxode.ode.options import SolveOptions


def recorded_times(solver, t0, t1, ts, tolerance):
    """The mesh that `solve` chooses, from 0 to 1."""
    stepper = SolveOptions(solver, tolerance, tolerance).stepper(Y0.dtype, Y0)
    field = lambda t, y, args: pendulum(t[0], y[0], args)[None]

    @jax.jit
    def record(y0, ts):
        problem = Problem(field, ARGS, y0, jnp.array([t0]), jnp.array([t1]), ts)
        _, tape = integrate(problem, stepper, 64)
        return tape.times, tape.num_steps

    times, num_steps = record(Y0[None], ts[:, None])
    times = times[: int(num_steps) + 1, 0]
    assert 4 < num_steps < 60
    return (times - t0) / (t1 - t0)


def plain(solver, mesh, y0, t0, t1, args, ts):
    """The same Runge-Kutta steps as a loop over them and their stages, for plain autodiff."""
    tableau = tableau_of(solver)
    A, b, c = (jnp.asarray(x) for x in (tableau.A, tableau.b, tableau.c))

    def step(carry, interval):
        y, ys = carry
        number, s, s_next = interval
        t, h = t0 + s * (t1 - t0), (s_next - s) * (t1 - t0)

        def stage(k, row):
            i, a, c = row
            return k.at[i].set(pendulum(t + c * h, y + h * a @ k, args)), None

        k = jnp.zeros((tableau.stages, y.size))
        k, _ = jax.lax.scan(stage, k, (jnp.arange(tableau.stages), A, c))
        theta = (ts - t) / h
        here = ((theta > 0) & (theta <= 1 + 1e-12)) | ((number == 0) & (ts == t0))
        ys = jnp.where(here[:, None], y[None] + h * jax.vmap(tableau.dense_weights)(theta) @ k, ys)
        return (y + h * b @ k, ys), None

    # An output that no step gives stays NaN.
    start = (y0, jnp.full((len(ts), y0.size), jnp.nan))
    return jax.lax.scan(step, start, (jnp.arange(len(mesh) - 1), mesh[:-1], mesh[1:]))[0]


class Kutta(diffrax.AbstractERK):
    """Of order two, whose last stage is the next step's first; the one before has no weight."""

    tableau: ClassVar = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([-1.0, 2.0]), np.array([0.0, 1.0, 0.0])),
        b_sol=np.array([0.0, 1.0, 0.0, 0.0]),
        b_error=np.array([-1 / 6, 1 / 3, -1 / 6, 0.0]),
        c=np.array([0.5, 1.0, 1.0]),
    )
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    term_compatible_contr_kwargs = None

    def order(self, terms):
        return 2


class Case(NamedTuple):
    tolerance: float | None = 1e-5
    """None for four equal steps."""
    solver: Any = diffrax.Tsit5()
    times: tuple[float, float] = (0.0, 3.0)
    ts: Any = TS
    checkpoints: int = 64


KNOTS = jnp.array([0.0, 0.5 - 1e-9, 0.5, 0.5 + 1e-9, 1.0, 1.5, 1.5 + 1e-3, 2.0])
# A low order gets a loose tolerance, so that it takes few steps.
CASES = {
    "few checkpoints": Case(checkpoints=3),
    "backwards in time": Case(times=(3.0, 0.0), ts=TS[::-1]),
    "outputs on and beside the ends of steps": Case(None, times=(0.0, 2.0), ts=KNOTS),
    "a stage at the end of its step": Case(1e-2, diffrax.Heun()),
    "a stage without weight before one that is used again": Case(1e-2, Kutta()),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_autodiff_through_the_steps_that_were_taken(name):
    tolerance, solver, times, ts, checkpoints = CASES[name]
    options = {"solver": solver, "adjoint": jaxode.DiscreteAdjoint(checkpoints), "throw": False}
    if tolerance is None:
        mesh, options["steps"] = jnp.linspace(0.0, 1.0, 5), 4
    else:
        mesh = recorded_times(solver, *times, ts, tolerance)
        options |= {"rtol": tolerance, "atol": tolerance}

    def ours(y0, t0, t1, args, ts):
        solution = jaxode.solve(pendulum, y0, t0, t1, args, ts=ts, **options)
        return scalar(solution.y1, solution.ys)

    reference = lambda *inputs: scalar(*plain(solver, mesh, *inputs))
    inputs = (Y0, *map(jnp.asarray, times), ARGS, ts)
    actual, expected = (
        jax.jit(jax.value_and_grad(f, range(5)))(*inputs) for f in (ours, reference)
    )
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_gradient_of_an_output_at_the_start_when_a_row_was_rejected(control):
    """`y' = -y^2`: the time derivative at the start is `-y0^2`, whatever the other rows do."""

    def start(t):
        solution = jaxode.solve(
            lambda t, y, _: -y * y, jnp.array([[1.0], [1000.0]]), 0.0, 1.0, batch=control,
            ts=jnp.stack([t, 1.0]), first_step=0.1,
        )  # fmt: skip
        return solution.ys[0].sum(), solution.stats.num_rejected

    gradient, rejected = jax.jit(jax.grad(start, has_aux=True))(0.0)
    np.testing.assert_allclose(gradient, -1_000_001.0, rtol=1e-12)
    assert rejected.max() > 0


def test_an_attempt_that_overflows_leaves_no_trace_in_the_gradient_of_a_row_that_waits():
    """Its stages are not finite, and are of a step that another row has taken alone."""
    z = jnp.array([[0.1], [1000.0]])
    loss = lambda z, a: jaxode.flow(
        lambda t, y, a: -a * y**3, z, 0.0, 1.0, a, batch="per_sample", first_step=0.1, rtol=1e-8,
        atol=1e-8,
    ).sum()  # fmt: skip
    by_z, by_a = jax.jit(jax.grad(loss, (0, 1)))(z, jnp.array(1.0))
    # Of z / sqrt(1 + 2 a z^2), at a = 1.
    slope = (1 + 2 * z**2) ** -1.5
    np.testing.assert_allclose(by_z, slope, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(by_a, -jnp.sum(z**3 * slope), rtol=1e-4)


def test_stages_may_be_kept_beside_some_of_the_states_only():
    """There is room for those of all states, of one, or of none, as copies of it grow in number."""

    def mean(y0):
        f = lambda t, y, _: -y * jnp.cos(t + y)
        adjoint = jaxode.DiscreteAdjoint(6)
        return jaxode.solve(f, y0, 0.0, 3.0, steps=12, adjoint=adjoint, throw=False).y1.mean()

    of = lambda copies: copies * jax.jit(jax.grad(mean))(jnp.full(copies, 2.0))
    one, *others = map(of, (1, 60_000, 150_000))
    for several in others:
        np.testing.assert_allclose(several, np.broadcast_to(one, several.shape), rtol=1e-12)


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), jaxode.Rodas5P()], ids=["explicit", "stiff"])
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
