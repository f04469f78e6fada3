"""The forward solve: orders, agreement with others, output times, work, and devices that share."""

import gc
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import OPTIMIZED, with_slow
from problems import ALL_ADAPTIVE, ALL_SOLVERS, PROBLEMS, SOLVERS, solver_name

import jaxode

# A solver of each kind, of which the others are tableaux.
OF_A_KIND = diffrax.Euler, diffrax.Tsit5, jaxode.Rodas5P, jaxode.Rosenbrock23


def but(rows, kinds=OF_A_KIND):
    """Solvers, or rows that begin with one, that are of none of the kinds."""
    first = lambda row: row[0] if isinstance(row, tuple) else row
    return [row for row in rows if not isinstance(first(row), kinds)]


@pytest.mark.parametrize(
    ("solver", "order", "adaptive"),
    with_slow(ALL_SOLVERS, but(ALL_SOLVERS, (*OF_A_KIND, diffrax.Dopri8))),  # other tableaux
    ids=solver_name,
)
def test_convergence_order(solver, order, adaptive):
    """The error of N equal steps falls like `N ** -order`."""
    del adaptive
    problem = PROBLEMS[4]
    steps = {1: 4000, 2: 200, 3: 100, 4: 60, 5: 40, 8: 12}[order]

    def error(parts):
        """Of so many solves, one after the other, which share a program."""
        y = problem.y0
        for t0, t1 in itertools.pairwise(np.linspace(0.0, 2.0, parts + 1)):
            y = jaxode.solve(problem.f, y, t0, t1, problem.args, solver=solver, steps=steps).y1
        return np.linalg.norm(y - problem.exact(2.0))

    errors = [error(1), error(4)]
    slope = np.log(errors[0] / errors[1]) / np.log(4)
    # The leading error term of the high-order pairs is so small that the next order shows through.
    assert order - 0.3 < slope < order + 1.1
    assert errors[-1] > 1e-14  # above rounding, so that the slope means something


def any_problem(t, y, args):
    """One program for all problems. The second number of a smaller state stays zero."""
    number, parameter = args
    branches = [
        lambda t, y, a, f=p.f, n=len(p.y0): jnp.pad(f(t, y[:n], a), (0, 2 - n)) for p in PROBLEMS
    ]
    return jax.lax.switch(number, branches, t, y, parameter)


# Of the same interpolants as others, and of orders that are tested above.
KNOWN = diffrax.Midpoint, diffrax.Ralston, diffrax.Dopri5
OF_EACH_KIND = [solver for solver in ALL_ADAPTIVE if type(solver) not in KNOWN]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(
    "solver",
    with_slow(OF_EACH_KIND, but(OF_EACH_KIND)),  # other tableaux
    ids=solver_name,
)
def test_exact_solution_at_tolerance(solver, problem):
    """Forwards and back again, with outputs on the way and at both ends."""
    tolerance, n = 1e-6 if solver.order(None) < 4 else 1e-9, len(problem.y0)
    args = np.int32(PROBLEMS.index(problem)), problem.args
    for t0, t1 in ((problem.t0, problem.t1), (problem.t1, problem.t0)):
        y0, ts = np.pad(problem.exact(t0), (0, 2 - n)), np.linspace(t0, t1, 9)[[0, 0, 1, 4, 8, 8]]
        solution = jaxode.solve(
            any_problem, y0, t0, t1, args, solver=solver, rtol=tolerance, atol=tolerance,
            ts=ts, max_steps=100_000,
        )  # fmt: skip
        exact = np.stack([problem.exact(t) for t in ts])
        # The tolerance bounds the error of one step; these problems amplify it by less than 50.
        np.testing.assert_allclose(solution.y1[:n], exact[-1], atol=50 * tolerance)
        # Between steps, an interpolant of lower order is less precise.
        np.testing.assert_allclose(solution.ys[:, :n], exact, atol=500 * tolerance)
        np.testing.assert_array_equal(solution.ys[:2], [y0] * 2)
        np.testing.assert_array_equal(solution.ys[-2:], [solution.y1] * 2)


STEPPED = [solver for solver, *_ in SOLVERS if type(solver) not in KNOWN]


@pytest.mark.parametrize(
    "solver",
    with_slow(STEPPED, but(STEPPED, (diffrax.Tsit5, diffrax.Dopri8))),  # other tableaux
    ids=solver_name,
)
def test_same_steps_as_diffrax_give_the_same_numbers(solver):
    """On an equal mesh both compute the same discrete solution, dense output included."""
    f = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0]) * (1 + t)])
    y, ts, term = jnp.array([1.0, 0.3]), np.linspace(0.0, 2.0, 13), diffrax.ODETerm(f)
    ours = jaxode.solve(f, y, 0.0, 2.0, solver=solver, steps=5, ts=ts)

    @jax.jit
    def step(t0, t1, y):
        """A step of diffrax, and its dense output at all times, which is right within the step."""
        state = solver.init(term, t0, t1, y, None)
        y1, _, dense, *_ = solver.step(term, t0, t1, y, None, state, made_jump=False)
        path = solver.interpolation_cls(t0=t0, t1=t1, **dense)
        return y1, jax.vmap(path.evaluate)(ts)

    theirs = np.full((13, 2), np.nan)
    for t0, t1 in itertools.pairwise(np.linspace(0.0, 2.0, 6)):
        y, path = step(t0, t1, y)
        within = (t0 <= ts) & (ts <= t1)
        theirs[within] = np.asarray(path)[within]
    np.testing.assert_allclose(ours.ys, theirs, rtol=1e-12, atol=1e-13)


def test_output_times_change_no_step():
    problem = PROBLEMS[1]
    solve = lambda ts: jaxode.solve(problem.f, problem.y0, 0.0, 3.0, problem.args, ts=ts)
    with_ts, without = solve(np.linspace(0.0, 3.0, 50)), solve(None)
    assert with_ts.stats.num_evals == without.stats.num_evals
    np.testing.assert_array_equal(with_ts.y1, without.y1)
    assert without.ys is without.ts is None


WORK = [
    (diffrax.Heun(), {}), (diffrax.Tsit5(), {"steps": 7}), (diffrax.Tsit5(), {"first_step": 0.1}),
    (diffrax.Dopri8(), {}),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "options"), with_slow(WORK, WORK[2:]), ids=solver_name)  # alike
def test_num_evals_is_the_true_number(solver, options):
    calls = []

    def f(t, y, args):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(20 * t) * y

    stats = jaxode.solve(f, jnp.ones(2), 0.0, 3.0, solver=solver, rtol=1e-3, **options).stats
    jax.effects_barrier()
    assert stats.num_evals == len(calls)
    assert stats.num_steps == stats.num_accepted + stats.num_rejected
    if "steps" in options:
        assert (stats.num_accepted, stats.num_rejected) == (7, 0)
    else:
        assert stats.num_accepted > 3


ENDS = [(10, jnp.float64), (49, jnp.float32)]


@pytest.mark.slow  # with the optimizations of XLA
@pytest.mark.parametrize(("steps", "dtype"), ENDS)
def test_equal_steps_end_exactly_when_compiled(steps, dtype):
    """Also where XLA's fused multiply-add rounds the end time differently."""
    ts = jnp.array([1.0, 0.25, 0.0], dtype)
    run = lambda y0: jaxode.solve(lambda t, y, _: -y, y0, 1.0, 0.0, steps=steps, ts=ts, throw=False)
    solution = jax.jit(run, compiler_options=OPTIMIZED)(jnp.ones(2, dtype))
    assert solution.ok
    assert solution.t_reached == 0.0
    assert solution.stats.num_steps == steps
    np.testing.assert_allclose(solution.ys[:, 0], np.exp([0, 0.75, 1]), rtol=3e-3)
    np.testing.assert_allclose(solution.ys[-1], solution.y1, rtol=1e-5)


def test_an_orbit_of_eccentricity_one_half_closes():
    """After its period; the derivative by the end of the solve is the field."""
    field = lambda t, y, _: jnp.concatenate([y[2:], -y[:2] / jnp.sum(y[:2] ** 2) ** 1.5])
    options = {"solver": diffrax.Dopri8(), "rtol": 1e-12, "atol": 1e-12, "throw": False}
    y0 = jnp.array([0.5, 0.0, 0.0, 3**0.5])
    end = lambda t1: (y1 := jaxode.solve(field, y0, 0.0, t1, **options).y1, y1)
    moved, y1 = jax.jit(jax.jacrev(end, has_aux=True))(2 * np.pi)
    # A hundred times the tolerance, and what a period of an orbit makes of it.
    np.testing.assert_allclose(y1, y0, atol=1e-9)
    np.testing.assert_allclose(moved, field(0.0, y0, None), atol=1e-8)


@pytest.mark.slow  # as equation 5 in `test_theory.py`
def test_flow_composes_and_inverts():
    """`F^{s,t}` composed from `F^{s,r}` and `F^{r,t}`; `F^{t,s}` undoes `F^{s,t}`."""
    f = lambda t, y, a: jnp.stack([y[1], -a * jnp.sin(y[0])])
    z = jnp.array([[0.1, 1.0], [2.0, -1.0], [0.5, 0.0]])
    run = lambda z, s, t: jaxode.flow(f, z, s, t, 2.0, rtol=1e-10, atol=1e-10)
    end = run(z, 0.0, 3.0)
    np.testing.assert_allclose(run(run(z, 0.0, 1.3), 1.3, 3.0), end, atol=1e-8)
    np.testing.assert_allclose(run(end, 3.0, 0.0), z, atol=1e-8)
    single = jaxode.solve(f, z[1], 0.0, 3.0, 2.0, rtol=1e-10, atol=1e-10).y1
    np.testing.assert_allclose(end[1], single, atol=1e-8)


def test_values_are_no_reason_to_compile_again(compiled):
    """Tolerances, times, arguments and the initial state may change from call to call."""
    f = lambda t, y, args: -args["rate"] * y

    def run(value):
        return jaxode.solve(
            f, value * jnp.ones(1), value, 2.0, {"rate": value, "name": "decay"},
            rtol=1e-5 * value, atol=1e-6 * value, ts=jnp.array([value, 2.0]),
        )  # fmt: skip

    run(0.5)
    assert compiled
    compiled.clear()
    run(0.7)
    run(0.9)
    assert not compiled


def test_numbers_of_python_have_the_precision_of_the_state():
    fall = lambda t, y, _: {"x": y["v"], "v": -2.0}
    stop = jaxode.Jumps([0.5], lambda t, y, _, i: {"x": y["x"], "v": 0.0})
    y0 = {"x": jnp.float32(1.0), "v": jnp.float32(0.0)}
    y1 = jaxode.solve(fall, y0, 0.0, 1.0, jumps=stop).y1
    assert {leaf.dtype for leaf in y1.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose([y1["x"], y1["v"]], [0.5, -1.0], rtol=1e-5)


def test_relative_tolerance_alone_with_a_component_that_stays_zero():
    y1 = jaxode.solve(lambda t, y, _: -y, jnp.array([1.0, 0.0]), 0.0, 1.0, atol=0.0).y1
    np.testing.assert_allclose(y1, [np.exp(-1), 0.0], rtol=1e-4)


@pytest.mark.slow  # a program in a program
def test_a_field_that_solves_has_a_gradient():
    inner = lambda t, y, a: -a * y
    outer = lambda t, y, a: -jaxode.solve(inner, y, 0.0, 1.0, a, throw=False).y1
    end = lambda a: jaxode.solve(outer, jnp.ones(2), 0.0, 1.0, a, throw=False).y1.sum()
    # y' = -exp(-a) y
    exact = lambda a: 2 * jnp.exp(-jnp.exp(-a))
    found, expected = jax.jit(jax.value_and_grad(end))(0.7), jax.value_and_grad(exact)(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow  # as a number of JAX
def test_gradient_by_a_python_number_inside_of_jit():
    end = lambda a: jaxode.solve(lambda t, y, a: -a * y, jnp.ones(2), 0.0, 1.0, a).y1.sum()
    gradient = jax.jit(lambda: jax.grad(end)(1.0))()
    np.testing.assert_allclose(gradient, -2 * np.exp(-1.0), rtol=1e-4)


def test_no_array_is_kept_after_a_solve():
    size = 12_347

    def run():
        args = jnp.full(size, 0.5)
        end = lambda a: jaxode.solve(lambda t, y, a: -a * y, jnp.ones(size), 0.0, 1.0, a).y1.sum()
        end(args)
        jax.grad(end)(args)

    run()
    gc.collect()
    # Other tests of this process keep arrays of other sizes.
    assert not [x for x in jax.live_arrays() if size in x.shape]


class Heuns(diffrax.Heun):
    """Second-order methods, with a second stage at `at`: Heun's for 1, the midpoint for 1 / 2."""

    at: float
    tableau: diffrax.ButcherTableau = diffrax.Heun.tableau

    def __init__(self, at: float):
        self.at, weight = at, 1 / (2 * at)
        self.tableau = diffrax.ButcherTableau(
            c=np.array([at]), a_lower=(np.array([at]),),
            b_sol=np.array([1 - weight, weight]), b_error=np.array([1.0, -1.0]) * weight,
        )  # fmt: skip


def test_a_subclass_with_arguments_of_its_own():
    """The tableau is that of the instance."""
    problem = PROBLEMS[1]
    run = lambda solver: jaxode.solve(problem.f, problem.y0, 0, 1, problem.args, solver=solver).y1
    midpoint = run(Heuns(0.5))
    assert not np.array_equal(run(Heuns(1.0)), midpoint)
    np.testing.assert_allclose(run(Heuns(1.0)), run(diffrax.Heun()), rtol=1e-13)
    # The error estimate of diffrax's has the other sign.
    np.testing.assert_allclose(midpoint, run(diffrax.Midpoint()), rtol=1e-13)
