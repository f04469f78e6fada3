"""Stiff problems by diffrax's implicit solvers, behind the same call."""

import functools
import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from problems import robertson

import jaxode

pytestmark = pytest.mark.slow


# The methods that diffrax has for its own solvers.
OF_DIFFRAX = [jaxode.DiscreteAdjoint(), jaxode.ForwardMode()]


def van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def radau(f, y0, span, args, ts, **options):
    return scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(f(t, y, args)), span, y0, method="Radau", t_eval=ts, **options
    ).y.T


def test_van_der_pol():
    ts = np.array([500.0, 1000.0, 2000.0])
    solution = jaxode.solve(
        van_der_pol, jnp.array([2.0, 0.0]), 0.0, 2000.0, 1000.0, ts=ts, solver=diffrax.Kvaerno5(),
        rtol=1e-7, atol=1e-9, max_steps=20_000,
    )  # fmt: skip
    y0, span = [2.0, 0.0], (0.0, 2000.0)
    reference = radau(jax.jit(van_der_pol), y0, span, 1000.0, ts, rtol=1e-9, atol=1e-11)
    # 1e-6: the tolerance; the relaxation oscillation keeps errors of the phase small.
    np.testing.assert_allclose(solution.ys, reference, rtol=1e-6)
    assert solution.stats.num_evals == -1
    assert solution.stats.num_steps > 1000


K = jnp.array([0.04, 3e7, 1e4])


def test_robertson_and_its_gradient():
    """Backwards in time the solution explodes; the discrete adjoint does not go there."""
    run = lambda k: jaxode.solve(
        robertson, jnp.array([1.0, 0.0, 0.0]), 0.0, 100.0, k, solver=diffrax.Kvaerno5(),
        rtol=1e-8, atol=1e-10, throw=False,
    ).y1[0]  # fmt: skip

    @jax.jit
    def both(t, state, _):
        """The state, and its derivatives by the logarithms of the rates."""
        y, moves = state[:3], state[3:].reshape(3, 3)
        push = lambda dy, dk: jax.jvp(functools.partial(robertson, t), (y, K), (dy, dk))[1]
        return jnp.concatenate([robertson(t, y, K), jax.vmap(push)(moves, jnp.diag(K)).ravel()])

    start = np.array([1.0] + 11 * [0.0])
    end = radau(both, start, (0.0, 100.0), None, None, rtol=1e-11, atol=1e-13)[-1]
    value, gradient = jax.jit(jax.value_and_grad(run))(K)
    np.testing.assert_allclose(value, end[0], rtol=1e-7)
    np.testing.assert_allclose(gradient, end[3::3] / K, rtol=1e-4)


def test_first_step_far_from_time_zero_in_single_precision():
    """As `test_solve.py` has for other solvers."""
    t0 = jnp.asarray(1e4, jnp.float32)
    solution = jaxode.solve(
        lambda t, y, _: jnp.ones_like(y), jnp.zeros(1, jnp.float32), t0, t0 + 10,
        solver=diffrax.Kvaerno3(),
    )  # fmt: skip
    np.testing.assert_allclose(solution.y1, 10.0, rtol=1e-5)


@pytest.mark.parametrize("adjoint", OF_DIFFRAX, ids=str)
def test_infinite_argument_that_does_not_matter(adjoint):
    f = lambda t, y, a: -jnp.minimum(y, a)
    run = lambda y0: jaxode.solve(
        f, y0, 0.0, 1.0, jnp.array(jnp.inf), solver=diffrax.Kvaerno3(), adjoint=adjoint
    ).y1.sum()
    both = derivative_of(adjoint)(lambda y0: (run(y0),) * 2, has_aux=True)
    slopes, value = both(jnp.ones(2))
    # 1e-4: an order above the default tolerance.
    np.testing.assert_allclose(value, 2 * np.exp(-1.0), rtol=1e-4)
    np.testing.assert_allclose(slopes, np.exp(-1.0) * np.ones(2), rtol=1e-4)


def test_every_gradient_of_a_failed_solve_is_nan():
    """Also by what the solve does not depend on."""

    def run(y0, args, t0, t1, ts):
        f = lambda t, y, args: y**2 + 0.0 * args["used"]
        solution = jaxode.solve(
            f, y0, t0, t1, args, ts=ts, solver=diffrax.Kvaerno3(), max_steps=20, throw=False
        )
        return solution.y1.sum()

    args = {"used": jnp.ones(1), "not": jnp.array(jnp.inf)}
    inputs = (jnp.ones(1), args, 0.0, 3.0, jnp.array([0.5]))
    for gradient in jax.tree.leaves(jax.jit(jax.grad(run, range(5)))(*inputs)):
        assert jnp.isnan(gradient).all()


def linear(t, y, a):
    return -a * t * y


def outputs(a, y0, t0, t1, ts, **options):
    options = {"solver": diffrax.Kvaerno3(), "rtol": 1e-8, "atol": 1e-8, **options}
    solution = jaxode.solve(linear, y0, t0, t1, a, ts=ts, **options)
    return solution.y1.sum() + jnp.sum(jnp.array([[1.0], [2.0]]) * solution.ys)


def exact(a, y0, t0, t1, ts):
    flow = lambda t: y0 * jnp.exp(-0.5 * a * (t**2 - t0**2))
    return flow(t1).sum() + flow(ts[0]).sum() + 2.0 * flow(ts[1]).sum()


EXACT = jax.jit(jax.grad(exact, range(5)))
POINTS = {
    "forward": (2.0, jnp.ones(2), 0.3, 1.5, jnp.array([0.7, 1.2])),
    "backward": (2.0, jnp.ones(2), 1.5, 0.3, jnp.array([1.2, 0.7])),
    "empty": (2.0, jnp.ones(2), 0.3, 0.3, jnp.array([0.3, 0.3])),
}
# Equal steps are differentiated at a looser tolerance: diffrax's root finder gives up on one that
# it cannot reach, and cannot take a shorter step.
EQUAL_STEPS = {"steps": 60, "rtol": 1e-6, "atol": 1e-6}
DISCRETE, FORWARD = OF_DIFFRAX
CASES = [
    *((adjoint, point, {"max_step": 0.1}) for adjoint in OF_DIFFRAX for point in POINTS),
    (DISCRETE, "forward", EQUAL_STEPS),
]


def derivative_of(adjoint):
    return jax.jacfwd if isinstance(adjoint, jaxode.ForwardMode) else jax.grad


@functools.cache
def by_everything(adjoint, **options):
    """One program for all points."""
    run = lambda *inputs: outputs(*inputs, adjoint=adjoint, **options)
    return jax.jit(derivative_of(adjoint)(run, argnums=(0, 1, 2, 3, 4)))


@pytest.mark.parametrize(("adjoint", "point", "options"), CASES, ids=str)
def test_derivatives_by_everything(adjoint, point, options):
    actual = by_everything(adjoint, **options)(*POINTS[point])
    expected = EXACT(*POINTS[point])
    for mine, theirs in zip(actual, expected, strict=True):
        # 1e-5: the tolerance, and that of an interpolant's derivative by the time.
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_both_methods_differentiate_the_same_steps():
    one, two = (by_everything(method, max_step=0.1)(*POINTS["forward"]) for method in OF_DIFFRAX)
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-8)


def test_adjoint_settings_reach_diffrax(monkeypatch):
    seen = []
    solve = diffrax.diffeqsolve
    monkeypatch.setattr(
        diffrax, "diffeqsolve", lambda *args, **kw: (seen.append(kw), solve(*args, **kw))[1]
    )
    run = lambda adjoint: jax.grad(lambda a: jaxode.solve(
        linear, jnp.ones(1), 0.0, 1.0, a, solver=diffrax.Kvaerno3(), adjoint=adjoint, max_step=0.1
    ).y1.sum())(2.0)  # fmt: skip
    run(jaxode.DiscreteAdjoint(checkpoints=5))
    assert seen[0]["adjoint"].checkpoints == 5
    assert seen[0]["stepsize_controller"].control.dtmax is not None


def test_equal_steps_solve_to_the_tolerances_of_the_call():
    """Implicit Euler has the solution `y / (1 + h a)` per step."""
    run = lambda a: jaxode.solve(
        lambda t, y, a: -a * y, jnp.ones(1), 0.0, 1.0, a, solver=diffrax.ImplicitEuler(), steps=20
    )
    ends = lambda a: ((s := run(a)).y1[0], s)
    gradient, solution = jax.jit(jax.grad(ends, has_aux=True))(2.0)
    np.testing.assert_allclose(solution.y1, 1.1**-20, rtol=1e-4)
    assert solution.stats.num_steps == 20
    np.testing.assert_allclose(gradient, -(1.1**-21), rtol=1e-4)


BECOME_NAN = (
    lambda t, y: -2 * y * jnp.sqrt(0.5 - t),
    lambda t, y: -2 * jnp.sqrt(y) - 0.1,
    lambda t, y: y * jnp.sqrt(t + 0.5),
    lambda t, y: y * jnp.nan,
    lambda t, y: jnp.sign(0.5 - y),
    lambda t, y: jnp.where(t > 0.5, jnp.nan, 1.0) * y,
)


def becomes_nan(t, y, which):
    return jax.lax.switch(which, BECOME_NAN, t, y)


NOT_FINITE = "the vector field or the state is not finite at t="


@pytest.mark.parametrize(
    ("which", "t1", "options", "message"),
    [
        (0, 1.0, {}, f"solve: {NOT_FINITE}0.5."),
        (0, 1.0, {"ts": np.array([0.2, 0.9]), "adjoint": FORWARD}, f"solve: {NOT_FINITE}0.5."),
        (0, 1.0, {"steps": 100}, f"{NOT_FINITE}0.5."),
        (0, 1.0, {"max_steps": 16}, "the steps ran out at t=0.41"),
        (1, 9.0, {}, NOT_FINITE),
        (2, -1.0, {}, NOT_FINITE),
        (3, 1.0, {}, NOT_FINITE),
    ],
)
def test_cause_and_time_of_a_failure(which, t1, options, message):
    with pytest.raises(jaxode.SolveError, match=re.escape(message)) as error:
        jaxode.solve(
            becomes_nan, jnp.ones(2), 0.0, t1, jnp.asarray(which), solver=diffrax.Kvaerno3(),
            **options,
        )  # fmt: skip
    assert "t=nan" not in str(error.value)


@pytest.mark.parametrize(
    ("which", "result"),
    [(4, jaxode.Result.STEP_SIZE_UNDERFLOW), (5, jaxode.Result.NON_FINITE)],
    ids=["jumps", "NaN"],
)
def test_steps_that_no_longer_move_the_time_end_the_solve(which, result):
    solution = jaxode.solve(
        becomes_nan, jnp.ones(2), 0.0, 2.0, jnp.asarray(which), solver=diffrax.Kvaerno3(),
        throw=False,
    )  # fmt: skip
    assert solution.result == result
    assert solution.stats.num_steps < 300
    np.testing.assert_allclose(solution.t_reached, 0.5, atol=1e-6)
    assert jnp.isnan(solution.y1).all()


@functools.cache
def with_derivative(adjoint):
    """The derivative by `a` of a solve that may fail, and its solution."""

    def run(a, t1, ts):
        s = jaxode.solve(
            linear, jnp.ones(2), 0.0, t1, a, ts=ts, solver=diffrax.Kvaerno3(), throw=False,
            adjoint=adjoint,
        )  # fmt: skip
        return s.y1.sum(), s

    return jax.jit(derivative_of(adjoint)(run, has_aux=True))


@pytest.mark.parametrize("adjoint", OF_DIFFRAX, ids=str)
@pytest.mark.parametrize(
    ("t1", "ts"),
    [(1.0, [0.7, 0.2]), (1.0, [0.7, 1.2]), (1.0, [0.7, np.nan]), (np.inf, [0.2, 0.7])],
)
def test_times_that_are_invalid_at_run_time(t1, ts, adjoint):
    derivative, solution = with_derivative(adjoint)(2.0, t1, jnp.array(ts))
    assert solution.result == jaxode.Result.INVALID_ARGUMENT
    assert jnp.isnan(solution.y1).all()
    assert jnp.isnan(solution.ys).all()
    assert solution.t_reached == 0.0
    assert jnp.isnan(derivative)


def test_derivatives_that_implicit_solvers_do_not_have():
    run = lambda a, adjoint: jaxode.solve(
        linear, jnp.ones(1), 0.0, 1.0, a, solver=diffrax.Kvaerno3(), adjoint=adjoint
    ).y1[0]
    with pytest.raises(RuntimeError, match=r"^ForwardMode: a solve with this adjoint has forward"):
        jax.eval_shape(lambda a: jax.grad(run)(a, jaxode.ForwardMode()), 2.0)
    message = "^DiscreteAdjoint: with an implicit solver, the gradient of a solve"
    for second in (jax.jacrev, jax.jacfwd):
        with pytest.raises(RuntimeError, match=message):
            jax.eval_shape(second(jax.grad(lambda a: run(a, jaxode.DiscreteAdjoint()))), 2.0)
    second = jax.jacfwd(jax.jacfwd(run))(2.0, jaxode.ForwardMode())
    # `exp(-a / 2)` twice; 1e-3: two orders above the default tolerance.
    np.testing.assert_allclose(second, np.exp(-1.0) / 4, rtol=1e-3)


def test_split_states_need_an_explicit_solver():
    run = lambda y: (
        jaxode.solve(linear, y, 0.0, 1.0, 1.0, solver=diffrax.Kvaerno3(), axis_name="i").y1
    )
    with pytest.raises(ValueError, match=r"^solve\(axis_name=...\): needs a solver of jaxode's"):
        jax.vmap(run, axis_name="i")(jnp.ones((2, 2)))


def test_batch_with_joint_steps():
    z = jnp.array([[1.0], [2.0]])
    y1 = jaxode.flow(lambda t, y, a: -a * y, z, 0.0, 1.0, 2.0, solver=diffrax.Kvaerno3())
    np.testing.assert_allclose(y1, z * np.exp(-2.0), rtol=1e-3)
