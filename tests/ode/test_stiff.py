"""Stiff problems by jaxode's own solvers: errors, orders, gradients, devices and failures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import with_slow
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from problems import ROSENBROCK, STIFF, linear_gradients, robertson, solver_name

import jaxode

SOLVERS = [solver for solver, _, _ in ROSENBROCK]
RODAS = SOLVERS[0]
FEW = 8
"""So many unknowns, for which the elimination is unrolled, have all but two of the problems."""


def of_few(t, y, number):
    """One program for all of them. The other numbers of a smaller state stay zero."""
    branches = [
        lambda t, y, p=p, n=len(p.y0): jnp.pad(p.f(t, y[:n], p.args), (0, FEW - n))
        for p in STIFF if len(p.y0) <= FEW
    ]  # fmt: skip
    return jax.lax.switch(number, branches, t, y)


@pytest.mark.parametrize("problem", with_slow(STIFF, STIFF[-1:]), ids=str)  # a large matrix
def test_error_of_reference_problems(problem):
    n, f, y0, args = len(problem.y0), problem.f, problem.y0, problem.args
    if n <= FEW:
        number = [p.name for p in STIFF if len(p.y0) <= FEW].index(problem.name)
        f, y0, args = of_few, np.pad(y0, (0, FEW - n)), np.int32(number)
    solution = jaxode.solve(
        f, y0, 0.0, problem.t1, args, solver=RODAS, rtol=1e-7, atol=problem.atol
    )
    # 1e-5: two orders above the tolerance, also of species whose own tolerance is looser.
    assert problem.error(solution.y1[:n]) < 1e-5


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


def test_no_matrix_of_joint_steps_is_larger_than_that_of_a_row():
    solve = lambda y0: jaxode.solve(
        robertson, y0, 0.0, 40.0, STIFF[0].args, solver=RODAS, batch="joint", throw=False
    )
    program = jax.jit(lambda y0: solve(y0).y1).lower(jnp.ones((4, 3))).as_text()
    assert "3x3x4x" in program
    assert "12x12" not in program


# Two numbers, turned against the axes, are drawn to a path: one fast and the other slowly.
TURN = jnp.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
SPEEDS, LEVELS = jnp.array([1e5, 0.3]), jnp.array([1.0, 0.5])


def path(t, k):
    return TURN @ (k**2 * (2 + jnp.sin(t)) * LEVELS)


def drawn(t, y, args):
    """`path` is a solution."""
    k = args[0] * args[1]
    level, slope = k**2 * (2 + jnp.sin(t)) * LEVELS, k**2 * jnp.cos(t) * LEVELS
    return TURN @ (slope - SPEEDS * ((TURN.T @ y) ** 3 - level**3))


def of_path(x, tolerance=None, **options):
    """A loss of two rows that start on their paths, but for `move`. In closed form without a
    tolerance, if `move` is zero."""
    on_path = lambda t: jax.vmap(path, (None, 0))(t, x["k"] * x["q"])
    if tolerance is None:
        y1, ys = on_path(x["t1"]), jax.vmap(on_path)(x["ts"])
    else:
        solution = jaxode.solve(
            drawn, on_path(x["t0"]) + x["move"], x["t0"], x["t1"], x["k"], row_args=x["q"],
            ts=x["ts"], rtol=tolerance, atol=tolerance, max_steps=4096, throw=False, **options,
        )  # fmt: skip
        y1, ys = solution.y1, solution.ys
    return jnp.sum(y1 @ jnp.array([1.0, -2.0])) + jnp.sum(jnp.sin(ys[..., 0]) * ys[..., 1])


X = {
    "k": jnp.array(1.1), "q": jnp.array([1.0, 0.7]), "t0": jnp.array(0.1), "t1": jnp.array(2.0),
    "ts": jnp.array([0.5, 1.3]), "move": jnp.zeros((2, 2)),
}  # fmt: skip
# The tolerance of a fine mesh, and the error there: by times, where rates of 1e5 cancel.
GRADIENTS = [(SOLVERS[0], "per_sample", 1e-9, 1e-5), (SOLVERS[1], "joint", 1e-6, 1e-3)]


@pytest.mark.parametrize(
    ("solver", "batch", "fine", "error"),
    with_slow(GRADIENTS, GRADIENTS[1:]),  # two programs, of the same steps with other numbers
    ids=solver_name,
)
def test_gradients_by_everything(solver, batch, fine, error):
    """In closed form; and on a coarse mesh, with a replay of most steps, as in forward mode."""
    of = lambda adjoint: (
        lambda x, tolerance: of_path(x, tolerance, solver=solver, batch=batch, adjoint=adjoint)
    )
    reverse = jax.jit(jax.grad(of(jaxode.DiscreteAdjoint(4))))
    found, exact = reverse(X, fine), jax.jit(jax.grad(of_path))(X)
    for name in X.keys() - {"move"}:
        np.testing.assert_allclose(found[name], exact[name], rtol=error, atol=error)
    along = jax.tree.map(lambda x: jnp.cos(jnp.arange(1.0, 1 + x.size)).reshape(x.shape), X)
    push = jax.jit(lambda x, tolerance: jax.jvp(
        lambda x: of(jaxode.ForwardMode())(x, tolerance), (x,), (along,)
    )[1])  # fmt: skip
    x = X | {"move": jnp.full((2, 2), 0.01)}
    products = jax.tree.map(lambda bar, move: jnp.sum(bar * move), reverse(x, 1e-3), along)
    # Rates of 1e5 per unit of time, times a derivative by the size of a step: they cancel.
    np.testing.assert_allclose(sum(products.values()), push(x, 1e-3), rtol=1e-8)


# Slow: forward over reverse of a stiff step compiles for ten seconds, and no other test has it.
@pytest.mark.slow
def test_second_derivatives():
    by_k = lambda **options: lambda k: of_path(X | {"k": k}, **options)
    solved = by_k(tolerance=1e-8, solver=RODAS, batch="per_sample")
    found = jax.jit(jax.jacfwd(jax.grad(solved)))(X["k"])
    np.testing.assert_allclose(found, jax.hessian(by_k())(X["k"]), rtol=1e-5)


# More unknowns than are unrolled: factors by LAPACK.
NINE = jnp.sin(jnp.arange(18.0).reshape(2, 9))
MATRIX = -10 * jnp.eye(9) + jax.random.normal(jax.random.key(0), (9, 9))
OVER_DEVICES = {
    "rows": {"batch": "per_sample"},
    "joint steps": {"batch": "joint", "axis_name": "rows"},
    "a Jacobian by the user": {
        "batch": "per_sample", "solver": jaxode.Rodas5P(jacobian=lambda t, y, matrix: matrix),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", with_slow(OVER_DEVICES, list(OVER_DEVICES)[1:]))  # as rows
def test_many_unknowns_over_devices(case):
    """Rows that are split, with parameters that all share: the end, and its gradients."""
    given = {"solver": RODAS, "rtol": 1e-8, "atol": 1e-8, "throw": False, **OVER_DEVICES[case]}
    solve = lambda y0, matrix: jaxode.solve(
        lambda t, y, matrix: matrix @ y, y0, 0.0, 1.0, matrix, **given
    ).y1  # fmt: skip
    mesh, specs = Mesh(np.array(jax.devices()[:2]), ("rows",)), (P("rows"), P())
    weights = jnp.arange(1.0, 10.0)

    def loss(y0, matrix):
        y1 = jax.shard_map(solve, mesh=mesh, in_specs=specs, out_specs=P("rows"))(y0, matrix)
        return jnp.sum(y1 @ weights), y1

    (by_y0, by_matrix), y1 = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(NINE, MATRIX)
    exact = NINE @ scipy.linalg.expm(np.asarray(MATRIX)).T
    np.testing.assert_allclose(y1, exact, atol=1e-7)
    each = [linear_gradients(MATRIX, v, np.asarray(weights)) for v in NINE]
    np.testing.assert_allclose(by_y0, [by_v for by_v, _ in each], atol=1e-6)
    np.testing.assert_allclose(by_matrix, sum(by for _, by in each), atol=1e-6)


def test_jacobian_that_is_not_finite_where_the_field_is():
    """A row at rest at the square root's zero fails alone, and says so, whatever the steps."""
    f = lambda t, y, args: -jnp.sqrt(y)
    solution = jaxode.solve(
        f, jnp.array([[1.0], [0.0]]), 0.0, 1.0, batch="per_sample", solver=RODAS, throw=False
    )
    np.testing.assert_array_equal(solution.ok, [True, False])
    assert solution.result[1] == jaxode.Result.NON_FINITE_JACOBIAN
    np.testing.assert_allclose(solution.y1[0], 0.25, rtol=1e-4)
    by_time = lambda t, y, args: -y + jnp.sqrt(t)
    for field, steps in ((f, None), (f, 2), (by_time, None)):
        message = r"^solve: the Jacobian is not finite at t=0\. Look"
        with pytest.raises(jaxode.SolveError, match=message):
            jaxode.solve(field, jnp.zeros(1), 0.0, 1.0, solver=RODAS, steps=steps)
    still = jaxode.solve(f, jnp.zeros(1), 0.0, 0.0, solver=RODAS)
    np.testing.assert_array_equal(still.y1, 0.0)


@pytest.mark.parametrize("n", with_slow([2, 9], [9]))  # `test_linear.py` has large ones
def test_a_singular_matrix_is_not_a_jacobian_that_is_not_finite(n):
    """With one step of size one, `I / gamma - J` is zero. Steps of another size succeed."""
    gamma = RODAS.method.gamma
    run = lambda **options: jaxode.solve(
        lambda t, y, _: y / gamma, jnp.ones(n), 0.0, 1.0, solver=RODAS, **options
    )
    message = r"^solve: the linear system of a step is singular at t=0\. Take an"
    with pytest.raises(jaxode.SolveError, match=message):
        run(steps=1)
    np.testing.assert_allclose(run(first_step=1.0).y1, np.exp(1 / gamma), rtol=1e-3)


def test_out_of_steps_does_not_advise_the_solver_in_use():
    y0, rates = STIFF[0].y0, STIFF[0].args
    message = r"the steps ran out at t=.*\. Raise max_steps, loosen rtol and atol, pass disc"
    with pytest.raises(jaxode.SolveError, match=message):
        jaxode.solve(robertson, y0, 0.0, 40.0, rates, solver=RODAS, max_steps=5)
