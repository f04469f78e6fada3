"""The first step is neither timid nor rash, and none is longer than the largest."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import ALL_SOLVERS, solver_name

import jaxode
from jaxode.ode.loop.step_size import Controller
from jaxode.ode.solvers.explicit import method_of

SOLVERS = [solver for solver, _, adaptive in ALL_SOLVERS if adaptive]


@functools.cache
def estimated_error(solver):
    """Maps `z` to the error estimate of one step of `y' = y`, `y(0) = 1`, to the time `z`."""
    tableau = method_of(solver)

    @jax.jit
    def of(z):
        step = jnp.zeros(1), jnp.full(1, z), jnp.ones((1, 1))
        k = tableau.evaluate(lambda t, y: y, *step, None, tableau.stages)
        return abs(z * tableau.b_error @ k[:, 0, 0])

    return of


@functools.partial(jax.jit, static_argnums=0)
def first_step_at(solver, slope, span, tol):
    """Of `y' = slope y`."""
    rtol = atol = jnp.asarray(tol)
    controller = Controller(rtol, atol, max_steps=1)
    field, problem = lambda t, y: slope * y, (jnp.zeros(1), jnp.ones((1, 3)), jnp.full(1, span))
    return controller.guess_first_step(field, method_of(solver), *problem)[0][0]


@pytest.mark.parametrize("solver", SOLVERS, ids=solver_name)
def test_first_step_of_a_linear_equation_has_the_error_that_is_asked_for(solver):
    """In any unit of time."""
    for unit in (1e-3, 1.0, 1e3):
        h = first_step_at(solver, -1 / unit, 1e3 * unit, 1e-10)
        assert 0.3 < estimated_error(solver)(-h / unit) / 2e-10 < 1


@pytest.mark.parametrize("slope", [-1.0, jnp.inf, jnp.nan, 1e300, 0.0])
def test_first_step_is_finite_for_any_slope_and_goes_no_further_than_the_end(slope):
    assert 0 < float(first_step_at(diffrax.Tsit5(), slope, 1.0, 1e-6)) <= 1
    for span in (1e-9, -1e-9):
        assert float(first_step_at(diffrax.Tsit5(), -1.0, span, 1e-6)) == pytest.approx(span)


def test_a_smooth_solution_takes_one_step():
    solution = jaxode.solve(lambda t, y, a: 0.2 * jnp.sin(y), jnp.ones(3), 0.0, 1.0, rtol=1e-6)
    assert (int(solution.stats.num_accepted), int(solution.stats.num_rejected)) == (1, 0)


def test_the_largest_step_is_not_exceeded():
    """Neither at the end, nor by the first step, which would pass over the pulse."""
    steps = {"max_step": 0.1, "first_step": 0.1}
    solution = jaxode.solve(lambda t, y, _: -y, jnp.ones(1), 0.0, 0.109, **steps)
    assert int(solution.stats.num_accepted) == 2
    pulse = lambda t, y, _: jnp.where((t > 0.4) & (t < 0.8), 1.0, 0.0) + 0 * y
    end = lambda h: jaxode.solve(pulse, jnp.zeros(1), 0.0, 10.0, max_step=0.05, first_step=h).y1[0]
    assert end(1.0) == end(0.05) > 0.39


def test_a_rejected_step_is_not_tried_again_where_times_are_coarse():
    t0 = np.float32(1e5)
    y0, t1 = jnp.ones(1, jnp.float32), t0 + 5 * np.spacing(t0)
    solution = jaxode.solve(
        lambda t, y, a: a * y, y0, t0, t1, jnp.float32(-58), rtol=1e-4, atol=0.0, throw=False
    )
    assert int(solution.stats.num_rejected) < 50
