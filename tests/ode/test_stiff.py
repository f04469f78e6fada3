"""Stiff problems by jaxode's own solvers: errors, orders, and all that a solve can do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import typed, with_slow
from jax.sharding import Mesh, PartitionSpec
from problems import ROSENBROCK, STIFF, robertson, solver_name

import jaxode

SOLVERS = [solver for solver, _, _ in ROSENBROCK]
RODAS, RATES = SOLVERS[0], jnp.array([0.04, 3e7, 1e4])
Y0 = jnp.array([[1.0, 0.0, 0.0], [0.9, 0.0, 0.1], [0.5, 1e-5, 0.5]])


# Between Robertson's reactions, a fast oscillator and a system of many unknowns.
@pytest.mark.parametrize("problem", with_slow(STIFF, [STIFF[n] for n in (1, 2, 3, 5)]), ids=str)
def test_error_of_reference_problems(problem):
    solution = jaxode.solve(
        problem.f, problem.y0, 0.0, problem.t1, problem.args, solver=RODAS, rtol=1e-7,
        atol=problem.atol,
    )  # fmt: skip
    # 1e-5: two orders above the tolerance, also of species whose own tolerance is looser.
    assert problem.error(solution.y1) < 1e-5


# Equal steps, and the order of the error when the rate is 1e6: classical orders are 5 and 2.
PROTHERO_ROBINSON = [(SOLVERS[0], 10, 3), (SOLVERS[1], 40, 2)]


@pytest.mark.parametrize(("solver", "steps", "order"), PROTHERO_ROBINSON, ids=solver_name)
def test_order_reduction(solver, steps, order):
    """On `y' = -rate (y - sin t) + cos t`, whose solution is `sin t` at any rate."""
    f = lambda t, y, rate: -rate * (y - jnp.sin(t)) + jnp.cos(t)

    def end(parts):
        y = np.sin(np.ones(1))
        for t0, t1 in itertools.pairwise(np.linspace(1.0, 3.0, parts + 1)):
            y = jaxode.solve(f, y, t0, t1, 1e6, solver=solver, steps=steps).y1
        return y[0]

    errors = np.abs(np.array([end(1), end(4)]) - np.sin(3.0))
    assert order - 0.3 < np.log(errors[0] / errors[1]) / np.log(4) < order + 0.5
    assert errors[0] < (1e-10 if order == 3 else 1e-4)


# With few unknowns, for which the elimination is unrolled, and with many.
@pytest.mark.parametrize("n", with_slow([0, 5], [0]), ids=["robertson", "pollution"])
def test_single_precision(n):
    problem = STIFF[n]
    single = lambda x: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x)
    solution = jaxode.solve(
        problem.f, single(problem.y0), 0.0, problem.t1, single(problem.args), solver=RODAS,
        rtol=1e-4, atol=1e-8,
    )  # fmt: skip
    assert solution.y1.dtype == jnp.float32
    assert problem.error(solution.y1) < 5e-3  # what rounding leaves of species of 1e-4


def driven(t, y, args, xp=jnp):
    """Robertson's reactions with a rate of its own for each row, and a source that depends on the
    time."""
    rates, factor = args
    a, b, c = rates[0] * factor * y[0], rates[1] * y[1] ** 2, rates[2] * y[1] * y[2]
    return xp.stack([-a + c + 0.01 * xp.sin(t) * y[0], a - b - c, b])


FACTORS = jnp.array([1.0, 0.3, 3.0])
TS = jnp.array([0.5, 3.0, 33.0])


def run(y0, rates, factors, t0, t1, ts, **options):
    options = {"solver": RODAS, "rtol": 1e-5, "atol": 1e-9, "batch": "per_sample", **options}
    return jaxode.solve(driven, y0, t0, t1, rates, row_args=factors, ts=ts, **options)


@pytest.mark.parametrize("solver", with_slow(SOLVERS, SOLVERS[1:]), ids=solver_name)
def test_rows_are_single_solves(solver):
    batch = run(Y0, RATES, FACTORS, 0.0, 40.0, TS, solver=solver, rtol=1e-4)
    single = jax.jit(
        lambda y0, factor: jaxode.solve(
            driven, y0, 0.0, 40.0, (RATES, factor), ts=TS, solver=solver, rtol=1e-4, atol=1e-9
        )
    )
    for row in range(3):
        alone = single(Y0[row], FACTORS[row])
        np.testing.assert_allclose(batch.y1[row], alone.y1, rtol=1e-9)
        np.testing.assert_allclose(batch.ys[:, row], alone.ys, rtol=1e-9)
        assert batch.stats.num_steps[row] == alone.stats.num_steps
        assert batch.stats.num_evals[row] == alone.stats.num_evals


def test_joint_steps_solve_each_row_alone():
    """They take the same steps; no matrix is larger than that of a row."""
    joint = run(Y0, RATES, FACTORS, 0.0, 40.0, TS, batch="joint", rtol=1e-8, atol=1e-12)
    rows = run(Y0, RATES, FACTORS, 0.0, 40.0, TS, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(joint.ys, rows.ys, rtol=1e-6)
    four = jnp.concatenate([Y0, Y0[:1]]), RATES, jnp.ones(4)
    program = jax.jit(lambda *a: run(*a, 0.0, 40.0, None, batch="joint").y1).lower(*four)
    assert "3x3x4x" in program.as_text()
    assert "12x12" not in program.as_text()


@pytest.mark.slow
def test_events_and_breakpoints():
    half = jaxode.Event(lambda t, y, args: y[0] - 0.5)
    ended = jaxode.solve(
        robertson, Y0[:2], 0.0, 1e4, RATES, batch="per_sample", solver=RODAS, event=half, rtol=1e-8,
        atol=1e-12,
    )  # fmt: skip
    assert ended.event_occurred.all()
    np.testing.assert_allclose(ended.y1[:, 0], 0.5, rtol=1e-7)
    on = lambda t, y, args: jnp.where(t < 1.0, -1e6, -1.0) * (y - 1)
    cut = jaxode.solve(
        on, jnp.zeros(1), 0.0, 2.0, solver=RODAS, breakpoints=[1.0], rtol=1e-8, atol=1e-8
    )
    np.testing.assert_allclose(cut.y1, 1.0, rtol=1e-8)


@pytest.mark.slow
def test_an_empty_span_keeps_the_state_and_follows_the_field():
    end = lambda t1, ts: run(Y0, RATES, FACTORS, 1.0, t1, ts[None], adjoint=jaxode.ForwardMode())
    one = jnp.asarray(1.0)
    both = lambda *times: ((s := end(*times)).y1, s.ys[0])
    (by_end, by_output), (y1, _) = jax.jit(
        lambda *times: (jax.jacfwd(both, (0, 1))(*times), both(*times))
    )(one, one)
    np.testing.assert_array_equal(y1, Y0)
    slopes = jax.jit(jax.vmap(driven, (None, 0, (None, 0))))(1.0, Y0, (RATES, FACTORS))
    np.testing.assert_allclose(by_end[0], slopes, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(by_output[1], slopes, rtol=1e-10, atol=1e-10)
    reverse = lambda t1: run(Y0, RATES, FACTORS, 1.0, t1, None).y1.sum()
    np.testing.assert_allclose(jax.jit(jax.grad(reverse))(one), slopes.sum(), rtol=1e-10, atol=1e-8)


@typed
@pytest.mark.slow
def test_over_devices():
    """Rows and joint steps, split over two devices."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    y0, factors, split = Y0[:2], FACTORS[:2], PartitionSpec("rows")

    def loss(batch, axis_name=None):
        def of(y0, rates, factors):
            solution = run(
                y0, rates, factors, 0.0, 40.0, None, batch=batch, axis_name=axis_name, throw=False
            )
            total = jnp.sum(solution.y1**2)
            return total if axis_name is None else jax.lax.psum(total, axis_name)

        return of

    def summed(*inputs):
        return jax.lax.psum(loss("per_sample")(*inputs), "rows")

    for batch, split_loss in (("joint", loss("joint", "rows")), ("per_sample", summed)):
        over = jax.shard_map(
            split_loss, mesh=mesh, in_specs=(split, PartitionSpec(), split),
            out_specs=PartitionSpec(),
        )  # fmt: skip
        many = jax.jit(jax.grad(over, (0, 1)))(y0, RATES, factors)
        one = jax.jit(jax.grad(loss(batch), (0, 1)))(y0, RATES, factors)
        for a, b in zip(many, one, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7)


def nine_unknowns():
    """More than are unrolled: factors by LAPACK."""
    matrix = -10 * jnp.eye(9) + jax.random.normal(jax.random.key(0), (9, 9))
    return jnp.arange(18.0).reshape(2, 9), matrix


def end_of_nine(y0, matrix, adjoint=jaxode.DiscreteAdjoint()):
    return jaxode.solve(
        lambda t, y, matrix: matrix @ y, y0, 0.0, 1.0, matrix,
        solver=RODAS, rtol=1e-8, atol=1e-8, throw=False, adjoint=adjoint,
    ).y1  # fmt: skip


@typed
def test_more_unknowns_over_devices():
    y0, matrix = nine_unknowns()
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    specs = (PartitionSpec("rows"), PartitionSpec())
    rows = jax.vmap(end_of_nine, (0, None))
    over = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=specs[0]))
    exact = y0 @ scipy.linalg.expm(np.asarray(matrix)).T
    np.testing.assert_allclose(over(y0, matrix), exact, atol=1e-7)


@pytest.mark.slow
def test_more_unknowns_than_are_unrolled():
    """Alone, under `vmap`, and in both modes of derivatives."""
    y0, matrix = nine_unknowns()
    exact = y0 @ scipy.linalg.expm(np.asarray(matrix)).T
    np.testing.assert_allclose(jax.vmap(end_of_nine, (0, None))(y0, matrix), exact, atol=1e-7)
    reverse = jax.jit(jax.jacrev(end_of_nine, 1))(y0[1], matrix)
    forward = jax.jit(jax.jacfwd(lambda m: end_of_nine(y0[1], m, jaxode.ForwardMode())))(matrix)
    np.testing.assert_allclose(reverse, forward, rtol=1e-8, atol=1e-8)


def test_jacobian_that_is_not_finite_where_the_field_is():
    """A row at rest at the square root's zero fails alone, and says so, whatever the steps."""
    f = lambda t, y, args: -jnp.sqrt(y)
    solution = jaxode.solve(
        f, jnp.array([[1.0], [0.0]]), 0.0, 1.0, batch="per_sample", solver=RODAS, throw=False
    )
    np.testing.assert_array_equal(solution.ok, [True, False])
    assert solution.result[1] == jaxode.Result.NON_FINITE_JACOBIAN
    np.testing.assert_allclose(solution.y1[0], 0.25, rtol=1e-4)
    for steps in (None, 2):
        with pytest.raises(
            jaxode.SolveError, match=r"^solve: the Jacobian is not finite at t=0\. L"
        ):
            jaxode.solve(f, jnp.zeros(1), 0.0, 1.0, solver=RODAS, steps=steps)
    by_time = lambda t, y, args: -y + jnp.sqrt(t)
    with pytest.raises(jaxode.SolveError, match=r"the Jacobian is not finite at t=0\. Look"):
        jaxode.solve(by_time, jnp.zeros(1), 0.0, 1.0, solver=RODAS)
    still = jaxode.solve(f, jnp.zeros(1), 0.0, 0.0, solver=RODAS)
    np.testing.assert_array_equal(still.y1, 0.0)


@pytest.mark.parametrize("n", [2, 9])
def test_a_singular_matrix_is_not_a_jacobian_that_is_not_finite(n):
    """With one step of size one, `I / gamma - J` is zero. Steps of another size succeed."""
    gamma = RODAS.tableau.gamma
    run = lambda **options: jaxode.solve(
        lambda t, y, _: y / gamma, jnp.ones(n), 0.0, 1.0, solver=RODAS, **options
    )
    with pytest.raises(
        jaxode.SolveError, match=r"^solve: the linear system of a step is singular at t=0\. Take an"
    ):
        run(steps=1)
    np.testing.assert_allclose(run(first_step=1.0).y1, np.exp(1 / gamma), rtol=1e-3)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["at once", "compiled"])
def test_out_of_steps_does_not_advise_the_solver_in_use(transform):
    run = transform(
        lambda y0: jaxode.solve(robertson, y0, 0.0, 40.0, RATES, solver=RODAS, max_steps=5).y1
    )
    with pytest.raises(
        (jaxode.SolveError, jax.errors.JaxRuntimeError),
        match=r"the steps ran out at t=.*\. Raise max_steps, loosen rtol and atol, pass disc",
    ):
        jax.block_until_ready(run(Y0[0]))
