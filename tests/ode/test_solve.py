"""The forward solve: orders, agreement with others, directions, output times, statistics."""

import gc
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from helpers import OPTIMIZED, with_slow
from problems import ALL_ADAPTIVE, ALL_SOLVERS, PROBLEMS, SOLVERS, solver_name

import jaxode


@pytest.mark.parametrize(("solver", "order", "adaptive"), ALL_SOLVERS, ids=solver_name)
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
ALIKE = [row for row in SOLVERS if type(row[0]) in KNOWN]
OF_EACH_KIND = [solver for solver in ALL_ADAPTIVE if type(solver) not in KNOWN]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("solver", OF_EACH_KIND, ids=solver_name)
def test_exact_solution_at_tolerance(solver, problem):
    tolerance, n = 1e-6 if solver.order(None) < 4 else 1e-9, len(problem.y0)
    solution = jaxode.solve(
        any_problem, np.pad(problem.y0, (0, 2 - n)), problem.t0, problem.t1,
        (np.int32(PROBLEMS.index(problem)), problem.args), solver=solver, rtol=tolerance,
        atol=tolerance, max_steps=100_000,
    )  # fmt: skip
    assert solution.ok
    # The tolerance bounds the error of one step; these problems amplify it by less than 50.
    np.testing.assert_allclose(solution.y1[:n], problem.exact(problem.t1), atol=50 * tolerance)


def test_agrees_with_diffrax_and_scipy():
    """Pendulum, which has no elementary solution."""
    f = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])])
    solver, y0, tolerance = diffrax.Tsit5(), np.array([1.0, 0.3]), 1e-7
    ours = jaxode.solve(f, y0, 0.0, 5.0, solver=solver, rtol=tolerance, atol=tolerance)
    theirs = diffrax.diffeqsolve(
        diffrax.ODETerm(f), solver, 0.0, 5.0, None, jnp.asarray(y0), max_steps=None,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    )  # fmt: skip
    reference = scipy.integrate.solve_ivp(
        lambda t, y: [y[1], -np.sin(y[0])], (0.0, 5.0), y0, method="DOP853", rtol=1e-12, atol=1e-12
    ).y[:, -1]
    # As accurate as diffrax at the same tolerance, to within a factor of 5 plus rounding.
    error, their_error = np.abs(ours.y1 - reference).max(), np.abs(theirs.ys[0] - reference).max()
    assert error < 5 * their_error + 1e-9
    np.testing.assert_allclose(ours.y1, theirs.ys[0], atol=100 * tolerance)


@pytest.mark.parametrize(
    ("solver", "order", "adaptive"), with_slow(SOLVERS, ALIKE), ids=solver_name
)
def test_same_steps_as_diffrax_give_the_same_numbers(solver, order, adaptive):
    """On an equal mesh both compute the same discrete solution, dense output included."""
    del order, adaptive
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


@pytest.mark.parametrize("solver", OF_EACH_KIND, ids=solver_name)
def test_output_times(solver):
    """Saved states follow the exact solution, also at both ends, and backwards in time."""
    problem = PROBLEMS[1]
    ts = np.array([0.0, 0.0, 0.1, 0.11, 0.5, 1.7, 2.9, 3.0, 3.0])
    exact = np.stack([problem.exact(t) for t in ts])
    options = {"solver": solver, "rtol": 1e-7, "atol": 1e-7, "max_steps": 50_000}
    forward = jaxode.solve(problem.f, problem.y0, 0.0, 3.0, problem.args, ts=ts, **options)
    tolerance = 1e-5 if solver.order(None) > 4 else 1e-4
    np.testing.assert_allclose(forward.ys, exact, atol=tolerance)
    np.testing.assert_array_equal(forward.ys[0], problem.y0)
    np.testing.assert_array_equal(forward.ys[-2:], [forward.y1] * 2)
    y1 = problem.exact(3.0)
    backward = jaxode.solve(problem.f, y1, 3.0, 0.0, problem.args, ts=ts[::-1], **options)
    np.testing.assert_allclose(backward.ys, exact[::-1], atol=tolerance)
    np.testing.assert_array_equal(backward.ys[-2:], [backward.y1] * 2)


def test_output_times_change_no_step():
    problem = PROBLEMS[1]
    solve = lambda ts: jaxode.solve(problem.f, problem.y0, 0.0, 3.0, problem.args, ts=ts)
    with_ts, without = solve(np.linspace(0.0, 3.0, 50)), solve(None)
    assert with_ts.stats.num_evals == without.stats.num_evals
    np.testing.assert_array_equal(with_ts.y1, without.y1)
    assert without.ys is None
    assert without.ts is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_pytree_state_keeps_structure_and_dtype(dtype):
    y0 = {"a": jnp.ones((2, 3), dtype), "b": (jnp.zeros((), dtype), jnp.full((1,), 2.0, dtype))}
    f = lambda t, y, rate: jax.tree.map(lambda x: rate * x, y)
    rate = jnp.asarray(-0.5, dtype)
    solution = jaxode.solve(f, y0, 0.0, 2.0, rate, ts=jnp.array([1.0, 2.0], dtype))
    assert jax.tree.structure(solution.y1) == jax.tree.structure(y0)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((solution.y1, solution.ys)))
    assert solution.ys["a"].shape == (2, 2, 3)
    np.testing.assert_allclose(solution.y1["a"], np.exp(-1.0), rtol=1e-4)
    np.testing.assert_allclose(solution.ys["b"][1][0], 2 * np.exp(-0.5), rtol=1e-4)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (diffrax.Heun(), {}), (diffrax.Heun(), {"steps": 7}),
        (diffrax.Tsit5(), {}), (diffrax.Tsit5(), {"steps": 7}),
        (diffrax.Tsit5(), {"first_step": 0.1}), (diffrax.Dopri8(), {}),
    ],
    ids=solver_name,
)  # fmt: skip
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


EQUAL_STEPS = [(1, jnp.float64), (3, jnp.float32), (10, jnp.float64), (49, jnp.float32)]


@pytest.mark.parametrize(("steps", "dtype"), with_slow(EQUAL_STEPS, EQUAL_STEPS[:3]))
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


def test_zero_span_returns_the_initial_state():
    f = lambda t, y, args: y / jnp.zeros(())
    ts = jnp.array([1.0, 1.0])
    solution = jaxode.solve(f, jnp.array([3.0]), 1.0, 1.0, ts=ts)
    assert solution.ok
    assert solution.stats.num_accepted == 0
    np.testing.assert_array_equal(solution.y1, [3.0])
    np.testing.assert_array_equal(solution.ys, [[3.0], [3.0]])


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


def test_first_step_far_from_time_zero_in_single_precision():
    """A first step below the resolution of the time must not be taken for an underflow."""
    t0 = jnp.asarray(1e4, jnp.float32)
    solution = jaxode.solve(
        lambda t, y, _: jnp.ones_like(y), jnp.zeros(1, jnp.float32), t0, t0 + 10
    )
    np.testing.assert_allclose(solution.y1, 10.0, rtol=1e-5)


def test_joint_control_over_devices_takes_the_norm_over_the_whole_batch():
    """With `axis_name`, split halves take the steps of the whole batch."""
    f = lambda t, y, args: jnp.stack([jnp.zeros(()), -y[0] * y[1]])
    z = jnp.array([[1.0, 1.0], [30.0, 1.0], [0.1, 1.0], [2.0, 1.0]])
    whole = jaxode.solve(f, z, 0.0, 1.0, batch="joint")
    halves = jax.vmap(
        lambda z: jaxode.solve(f, z, 0.0, 1.0, batch="joint", axis_name="half"),
        axis_name="half",
    )(z.reshape(2, 2, 2))
    assert (halves.stats.num_steps == whole.stats.num_steps).all()
    np.testing.assert_allclose(halves.y1.reshape(4, 2), whole.y1, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(("solver", "steps"), [(diffrax.Tsit5(), None), (diffrax.Euler(), 20)])
def test_devices_that_share_their_steps_fail_together(solver, steps):
    """The state of the other one is part of the field."""
    options = {"axis_name": "half", "solver": solver, "steps": steps, "throw": False}
    f = lambda t, y, _: jnp.where(y > 2, jnp.nan, jax.lax.psum(y, "half"))
    run = lambda y: jaxode.solve(f, y, 0.0, 0.7, **options)
    solution = jax.vmap(run, axis_name="half")(jnp.array([[1.0], [0.0]]))
    np.testing.assert_array_equal(solution.result, jaxode.Result.NON_FINITE)
    assert np.isnan(solution.y1).all()


def falling(t, y, args):
    return -y


@pytest.mark.parametrize(
    "y0", [2.0, jnp.asarray(2.0), jnp.full((), 2.0)], ids=["float", "weak", "full"]
)
def test_weakly_typed_state_is_solved_in_double_precision(y0):
    solution = jaxode.solve(falling, y0, 0.0, 1.0, rtol=1e-12, atol=1e-12)
    assert solution.t_reached.dtype == jnp.float64
    np.testing.assert_allclose(solution.y1, 2 * np.exp(-1), rtol=1e-11)


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


@pytest.mark.slow
def test_a_field_that_solves_is_solved_again():
    inner = lambda t, y, a: -a * y
    outer = lambda t, y, a: -jaxode.solve(inner, y, 0.0, 1.0, a, throw=False).y1
    end = lambda a: jaxode.solve(outer, jnp.ones(2), 0.0, 1.0, a).y1.sum()
    a = jnp.array(0.7)
    assert end(a) == end(a)
    # y' = -exp(-a) y
    exact = lambda a: 2 * jnp.exp(-jnp.exp(-a))
    np.testing.assert_allclose(end(a), exact(a), rtol=1e-4)
    slope = -exact(a) * jnp.log(exact(a) / 2)
    np.testing.assert_allclose(jax.jit(jax.grad(end))(a), slope, rtol=1e-4)


def test_gradient_by_a_python_number_inside_of_jit():
    end = lambda a: jaxode.solve(lambda t, y, a: -a * y, jnp.ones(2), 0.0, 1.0, a).y1.sum()
    gradient = jax.jit(lambda: jax.grad(end)(1.0))()
    np.testing.assert_allclose(gradient, -2 * np.exp(-1.0), rtol=1e-4)


@pytest.mark.slow
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
