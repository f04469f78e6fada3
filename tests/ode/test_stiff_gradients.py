"""Gradients of stiff solves: against SciPy, forward mode, and in rows that fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from helpers import assert_close
from problems import robertson, solver_name
from test_stiff import FACTORS, RATES, RODAS, SOLVERS, TS, Y0, driven, run

import jaxode

INPUTS = (Y0, RATES, FACTORS, jnp.asarray(0.0), jnp.asarray(40.0), TS)
WEIGHTS = jnp.array([[1.0, 1e4, -2.0], [0.5, 2e4, 1.0], [-1.0, 3e4, 0.3]])
"""The second species is of 1e-5."""


def loss(y0, rates, factors, t0, t1, ts, **options):
    solution = run(y0, rates, factors, t0, t1, ts, **options)
    return jnp.sum(WEIGHTS * solution.y1) + jnp.sum(WEIGHTS[None] * jnp.sin(solution.ys))


@functools.cache
def by_radau():
    """The derivatives of the loss of the last row, by SciPy from the variational equation."""
    y0, rates, factor, (t0, t1, ts) = Y0[2], RATES, FACTORS[2], INPUTS[3:]
    f = lambda t, y, rates, factor: driven(t, y, (rates, factor))
    # Directions: the numbers of the state, the logarithms of the rates, the factor, the start.
    start = jnp.zeros((8, 3)).at[:3].set(jnp.eye(3)).at[7].set(-f(t0, y0, rates, factor))
    of_rates = jnp.zeros((8, 3)).at[3:6].set(jnp.diag(rates))
    of_factor = jnp.zeros(8).at[6].set(1.0)

    @jax.jit
    def both(t, state):
        y, moves = state[:3], state[3:].reshape(8, 3)
        inputs = (y, rates, factor)
        push = lambda *dots: jax.jvp(functools.partial(f, t), inputs, dots)[1]
        return jnp.concatenate([f(t, *inputs), jax.vmap(push)(moves, of_rates, of_factor).ravel()])

    path = scipy.integrate.solve_ivp(
        lambda t, state: np.asarray(both(np.float64(t), state)), (float(t0), float(t1)),
        np.concatenate([y0, np.ravel(start)]), method="Radau", rtol=1e-10, atol=1e-14,
        dense_output=True,
    )  # fmt: skip
    w, parts = np.asarray(WEIGHTS[2]), lambda x: (x[:3], x[3:].reshape(8, 3))
    y1, ends = parts(path.y[:, -1])
    outputs = [parts(path.sol(float(t))) for t in ts]
    slopes = ends @ w + sum(moves @ (w * np.cos(y)) for y, moves in outputs)
    second = outputs[1][0]
    by_ts = (w * np.cos(second)) @ f(ts[1], second, rates, factor)
    return {
        "y0": slopes[:3], "rates": slopes[3:6] / np.asarray(rates), "row_args": slopes[6],
        "times": np.array([slopes[7], w @ f(t1, y1, rates, factor), by_ts]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def gradient():
    """Of the last row."""
    options = {"rtol": 1e-9, "atol": 1e-13, "max_steps": 1024}
    weights = jnp.array([0.0, 0.0, 1.0])[:, None]

    def last(*inputs):
        solution = run(*inputs, **options)
        outputs = (weights * WEIGHTS)[None] * jnp.sin(solution.ys)
        return jnp.sum(weights * WEIGHTS * solution.y1) + jnp.sum(outputs)

    y0, rates, factors, *times = jax.jit(jax.grad(last, range(6)))(*INPUTS)
    return y0[2], rates, factors[2], *times


@pytest.mark.slow
@pytest.mark.parametrize("by", ["y0", "rates", "row_args", "times"])
def test_against_scipy(gradient, by):
    y0, rates, factor, t0, t1, ts = gradient
    found = {"y0": y0, "rates": rates, "row_args": factor, "times": jnp.stack([t0, t1, ts[1]])}
    np.testing.assert_allclose(found[by], by_radau()[by], rtol=1e-4)


PAIRS = [(SOLVERS[0], "joint"), (SOLVERS[1], "per_sample")]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "batch"), PAIRS, ids=solver_name)
def test_modes_agree_on_a_coarse_mesh(solver, batch):
    """With a replay of most steps, on the steps of a loose tolerance."""
    options = {"solver": solver, "batch": batch, "rtol": 1e-3, "atol": 1e-7}
    of = lambda adjoint: lambda *inputs: loss(*inputs, adjoint=adjoint, **options)
    reverse = jax.jit(jax.grad(of(jaxode.DiscreteAdjoint(4)), range(6)))(*INPUTS)
    forward = jax.jit(jax.jacfwd(of(jaxode.ForwardMode()), range(6)))(*INPUTS)
    assert_close(reverse[:3], forward[:3], 1e-10)
    # Rates of 1e4 per unit of time, times a derivative by the size of a step: they cancel.
    assert_close(reverse[3:], forward[3:], 1e-7)


@pytest.mark.slow
def test_parameters_gathered_once_per_step(monkeypatch):
    """As for networks with more parameters than work."""
    options = {"rtol": 2e-3, "atol": 1e-7}  # of its own, so that nothing is compiled yet
    monkeypatch.setattr("jaxode.ode.adjoints.sweep.PARAMETERS_PER_WORK", 0)
    gathered = jax.jit(jax.grad(lambda *inputs: loss(*inputs, **options), range(6)))(*INPUTS)
    forward = lambda *inputs: loss(*inputs, adjoint=jaxode.ForwardMode(), **options)
    expected = jax.jit(jax.jacfwd(forward, range(6)))(*INPUTS)
    assert_close(gathered[:3], expected[:3], 1e-10)


@pytest.mark.slow
def test_forward_over_reverse():
    def end(rates, adjoint=jaxode.DiscreteAdjoint()):
        scaled = RATES * rates
        return loss(Y0, scaled, FACTORS, 0.0, 40.0, TS, rtol=1e-3, atol=1e-7, adjoint=adjoint)

    ones = jnp.ones(3)
    hessian = jax.jit(jax.jacfwd(jax.grad(end)))(ones)
    forward = lambda rates: jax.jacfwd(end)(rates, jaxode.ForwardMode())
    assert_close(hessian, jax.jit(jax.jacfwd(forward))(ones), 1e-8)


@pytest.mark.slow
def test_dense_output():
    """Evaluated at the times of the outputs, with the gradients of those."""

    def value(y0, rates, ts, dense):
        solution = jaxode.solve(
            robertson, y0, 0.0, 40.0, rates, solver=RODAS, rtol=1e-4, atol=1e-8, max_steps=64,
            dense=dense, ts=None if dense else ts,
        )  # fmt: skip
        ys = solution.evaluate(ts) if dense else solution.ys
        return jnp.sum(WEIGHTS * ys), ys

    found = [
        jax.jit(jax.grad(lambda *inputs, d=dense: value(*inputs, d), (0, 1, 2), has_aux=True))(
            Y0[0], RATES, TS
        )
        for dense in (False, True)
    ]
    assert_close(found[0][1], found[1][1], 1e-12)
    assert_close(found[0][0][:2], found[1][0][:2], 1e-10)
    assert_close(found[0][0][2], found[1][0][2], 1e-7)


@jax.jit
@functools.partial(jax.grad, argnums=range(4), has_aux=True)
def of_rows_that_end(y0, rates, factors, t1):
    """The gradient of their sum, and which they are."""
    options = {"throw": False, "max_steps": 128, "rtol": 1e-4}
    solution = run(y0, rates, factors, 0.0, t1, None, **options)
    values = jnp.sum(WEIGHTS[: len(y0)] * solution.y1, axis=1)
    return jnp.sum(jnp.where(solution.ok, values, 0)), solution.ok


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_failed_row_on_which_nothing_depends(fails):
    """One that never takes a step, or one whose steps run out."""
    y0, t1 = Y0, jnp.full(3, 40.0)
    y0, t1 = (y0.at[1, 0].set(jnp.inf), t1) if fails == "before" else (y0, t1.at[1].set(1e6))
    gradients, ok = of_rows_that_end(y0, RATES, FACTORS, t1)
    np.testing.assert_array_equal(ok, [True, False, True])
    # The same as if the row were one of the others, with weights of zero.
    others = of_rows_that_end(Y0, RATES, FACTORS, jnp.full(3, 40.0))[0]
    for number in (0, 2, 3):
        np.testing.assert_array_equal(gradients[number][1], 0)
        np.testing.assert_allclose(gradients[number][::2], others[number][::2], rtol=1e-10)
    assert jnp.isfinite(gradients[1]).all()


def test_a_failed_row_with_a_jacobian_by_the_user():
    """It is NaN from its start, and so are its stages."""
    solver = jaxode.Rodas5P(jacobian=lambda t, y, a: -a * jnp.eye(1))

    @jax.jit
    @jax.grad
    def gradient(a):
        solution = jaxode.solve(
            lambda t, y, a: -a * y, jnp.array([[1.0], [jnp.nan]]), 0.0, 1.0, a, solver=solver,
            batch="per_sample", throw=False, max_steps=64,
        )  # fmt: skip
        return jnp.sum(jnp.where(solution.ok[:, None], solution.y1, 0.0))

    np.testing.assert_allclose(gradient(1.0), -np.exp(-1), rtol=1e-3)


@pytest.mark.slow
def test_a_thousand_rows():
    """Rates over three decades: all succeed, and so do their gradients."""
    spread = 10 ** np.random.default_rng(0).uniform(-1.5, 1.5, (1000, 3))
    f = lambda t, y, args: robertson(t, y, args[1])

    def total(rates):
        solution = jaxode.solve(
            f, jnp.tile(Y0[0], (1000, 1)), 0.0, 100.0, batch="per_sample", row_args=rates,
            solver=RODAS, rtol=1e-4, atol=1e-8, max_steps=128, throw=False,
        )  # fmt: skip
        return jnp.sum(solution.y1[:, 0]), solution.ok

    gradient, ok = jax.jit(jax.grad(total, has_aux=True))(RATES[None] * spread)
    assert ok.all()
    assert jnp.isfinite(gradient).all()
    # More of the first species reacts at a larger first rate, and less at a larger third.
    assert (gradient[:, 0] < 0).all()
    assert (gradient[:, 2] > 0).all()
