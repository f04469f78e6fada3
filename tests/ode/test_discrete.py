"""DiscreteAdjoint: exact for the computed solution, in bounded memory."""

import functools
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import temporary_bytes, with_slow
from problems import ARGS, TS, Y0, pendulum, scalar, solver_name

import jaxode
from jaxode.ode.loop import checkpoints
from jaxode.ode.loop.integrate import integrate
from jaxode.ode.loop.problem import Problem
from jaxode.ode.solvers.explicit import method_of
from jaxode.ode.options import SolveOptions


def recorded_times(solver, ts, tolerance):
    """The mesh that `solve` chooses."""
    stepper = SolveOptions(solver, tolerance, tolerance).stepper(Y0.dtype, Y0)
    field = lambda t, y, args: pendulum(t[0], y[0], args)[None]

    @jax.jit
    def record(y0, ts):
        problem = Problem(field, ARGS, y0, jnp.array([0.0]), jnp.array([3.0]), ts)
        _, tape = integrate(problem, stepper, 64)
        return tape.times, tape.num_steps

    times, num_steps = record(Y0[None], None if ts is None else ts[:, None])
    return times[: int(num_steps) + 1, 0]


def plain(solver, mesh, y0, t0, t1, args, ts):
    """The same Runge-Kutta steps as a loop over them and their stages, for plain autodiff."""
    tableau = method_of(solver)
    A, b, c = (jnp.asarray(x) for x in (tableau.A, tableau.b, tableau.c))
    mesh = (mesh - mesh[0]) / (mesh[-1] - mesh[0])

    def step(carry, interval):
        y, ys = carry
        number, s, s_next = interval
        t, h = t0 + s * (t1 - t0), (s_next - s) * (t1 - t0)

        def stage(k, row):
            i, a, c = row
            return k.at[i].set(pendulum(t + c * h, y + h * a @ k, args)), None

        k = jnp.zeros((tableau.stages, y.size))
        k, _ = jax.lax.scan(stage, k, (jnp.arange(tableau.stages), A, c))
        if ts is not None:
            here = ((t < ts) & (ts <= t + h + 1e-12)) | ((number == 0) & (ts == t0))
            weights = jax.vmap(tableau.dense_weights)((ts - t) / h)
            ys = jnp.where(here[:, None], y[None] + h * weights @ k, ys)
        return (y + h * b @ k, ys), None

    # An output that no step gives stays NaN.
    start = (y0, jnp.zeros(0) if ts is None else jnp.full((len(ts), y0.size), jnp.nan))
    intervals = (jnp.arange(len(mesh) - 1), mesh[:-1], mesh[1:])
    return jax.lax.scan(step, start, intervals)[0]


CASES = [(diffrax.Tsit5(), 3, 1e-5, TS)]
# Of other stages, or of the end alone. A low order gets a loose tolerance, so that it takes few
# steps.
SLOW = [(diffrax.Heun(), 64, 1e-2, TS), (diffrax.Dopri8(), 64, 1e-5, TS)]
SLOW += [(diffrax.Tsit5(), 3, 1e-5, None)]


def case_name(value):
    return {type(None): "end", type(TS): "ts"}.get(type(value)) or solver_name(value)


def arguments(with_ts):
    inputs = (Y0, jnp.array(0.0), jnp.array(3.0), ARGS, TS if with_ts else None)
    return inputs, (0, 1, 2, 3, 4) if with_ts else (0, 1, 2, 3)


@functools.cache
def by_autodiff(solver, tolerance, with_ts):
    """The value and the gradient, through the steps that `solve` takes."""
    inputs, argnums = arguments(with_ts)
    mesh = recorded_times(solver, inputs[-1], tolerance)
    assert 4 < len(mesh) < 60
    reference = lambda *inputs: scalar(*plain(solver, mesh, *inputs))
    return jax.jit(jax.value_and_grad(reference, argnums))(*inputs)


@pytest.mark.parametrize(
    ("solver", "checkpoints", "tolerance", "ts"), CASES + with_slow(SLOW, SLOW), ids=case_name
)
def test_equals_autodiff_through_the_recorded_steps(solver, checkpoints, tolerance, ts):
    def ours(y0, t0, t1, args, ts):
        solution = jaxode.solve(
            pendulum, y0, t0, t1, args, ts=ts, solver=solver,
            adjoint=jaxode.DiscreteAdjoint(checkpoints), rtol=tolerance, atol=tolerance,
            throw=False,
        )  # fmt: skip
        return scalar(solution.y1, jnp.zeros(0) if ts is None else solution.ys)

    inputs, argnums = arguments(ts is not None)
    expected = by_autodiff(solver, tolerance, ts is not None)
    actual = jax.jit(jax.value_and_grad(ours, argnums))(*inputs)
    if ts is not None:
        (value, (*bars, bar_ts)), (exact, (*exact_bars, exact_ts)) = actual, expected
        actual, expected = (value, bars), (exact, exact_bars)
        np.testing.assert_allclose(bar_ts, exact_ts, rtol=1e-11, atol=1e-12)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13, equal_nan=False)
    jax.tree.map(close, actual, expected)


def test_outputs_on_and_beside_the_ends_of_steps_equal_autodiff():
    """Four steps on [0, 2]; the loops of both save an output on a knot from the step before it."""
    ts = jnp.array([0.0, 0.5 - 1e-9, 0.5, 0.5 + 1e-9, 1.0, 1.5, 1.5 + 1e-3, 2.0])
    inputs = (Y0, jnp.array(0.0), jnp.array(2.0), ARGS, ts)
    mesh = jnp.linspace(0.0, 1.0, 5)

    def ours(y0, t0, t1, args, ts):
        solution = jaxode.solve(pendulum, y0, t0, t1, args, ts=ts, steps=4, throw=False)
        return scalar(solution.y1, solution.ys)

    reference = lambda *inputs: scalar(*plain(diffrax.Tsit5(), mesh, *inputs))
    argnums = (0, 1, 2, 3, 4)
    expected = jax.jit(jax.value_and_grad(reference, argnums))(*inputs)
    actual = jax.jit(jax.value_and_grad(ours, argnums))(*inputs)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, equal_nan=False)
    jax.tree.map(close, actual, expected)


def test_module_as_vector_field_gets_gradients():
    class Field(eqx.Module):
        rate: jax.Array
        label: str = "any static thing"

        def __call__(self, t, y, args):
            return -self.rate * y

    loss = lambda field: jaxode.solve(field, jnp.ones(2), 0.0, 1.0).y1.sum()
    gradient = eqx.filter_grad(loss)(Field(jnp.array(0.5)))
    np.testing.assert_allclose(gradient.rate, -2 * np.exp(-0.5), rtol=1e-4)


@pytest.mark.slow
def test_gradient_of_an_output_at_the_start_when_a_row_was_rejected():
    """`y' = -y^2`: the time derivative at the start is `-y0^2`, whatever the other rows do."""
    z = jnp.array([[1.0], [1000.0]])

    def start(t, control):
        solution = jaxode.solve(
            lambda t, y, _: -y * y, z, 0.0, 1.0, batch=control,
            ts=jnp.stack([t, 1.0]), first_step=0.1,
        )  # fmt: skip
        return solution.ys[0].sum(), solution.stats.num_rejected

    run = jax.jit(jax.grad(start, has_aux=True), static_argnums=1)
    for control in ("joint", "per_sample"):
        gradient, rejected = run(0.0, control)
        np.testing.assert_allclose(gradient, -1_000_001.0, rtol=1e-12)
    assert rejected.tolist()[1] > 0


@pytest.mark.slow
def test_hessian_where_the_error_estimate_is_zero():
    """`y1 = 1 + 2 a^3` has the second derivative `12 a`; the error control has no part in it."""
    f = lambda t, y, a: a**3 * jnp.ones(1)
    y1 = lambda a, **by: jaxode.solve(f, jnp.ones(1), 0.0, 2.0, a, **by).y1[0]
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.grad(y1)))(1.3), 12 * 1.3, rtol=1e-12)
    forward = jax.jacfwd(jax.jacfwd(functools.partial(y1, adjoint=jaxode.ForwardMode())))
    np.testing.assert_allclose(jax.jit(forward)(1.3), 12 * 1.3, rtol=1e-12)


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


@pytest.mark.slow
def test_a_stage_without_weight_before_one_that_is_used_again():
    ts, options = jnp.array([0.3, 1.0]), {"solver": Kutta(), "rtol": 1e-7, "atol": 1e-7}
    ends = lambda a: jaxode.solve(
        lambda t, y, a: -a * y, jnp.ones(1), 0.0, 1.0, a, ts=ts, **options
    ).ys.sum()
    expected = -(ts * jnp.exp(-2.0 * ts)).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(ends))(2.0), expected, rtol=1e-4)


class Inner(eqx.Module):
    """A field whose program hides a constant in the jaxpr of an inner `jit`."""

    table: jax.Array

    def __call__(self, t, y, args):
        return jax.jit(lambda y: -self.table * y)(y)


def test_arrays_hidden_in_a_field_are_followed():
    for rate in (1.0, 2.0, 1.0):
        run = lambda y0, f=Inner(jnp.array([rate])): jaxode.solve(
            f, y0, 0.0, 1.0, rtol=1e-8, atol=1e-8
        ).y1[0]
        value, gradient = jax.value_and_grad(run)(jnp.ones(1))
        np.testing.assert_allclose((value, gradient[0]), np.exp(-rate), rtol=1e-6)


@pytest.mark.parametrize("adjoint", [jaxode.DiscreteAdjoint(), jaxode.BacksolveAdjoint()])
def test_rules_of_differentiation_in_a_field_are_followed(adjoint):
    """`y' = -y`, whose rule says that the slope is `-2`: the cotangent decays by that."""

    @jax.custom_jvp
    def forward(y):
        return -y

    forward.defjvp(lambda primals, tangents: (-primals[0], -2.0 * tangents[0]))

    @jax.custom_vjp
    def reverse(y):
        return -y

    reverse.defvjp(lambda y: (-y, None), lambda _, bar: (-2.0 * bar,))
    f = lambda t, y, _: jnp.stack([forward(y[0]), reverse(y[1])])
    options = {"rtol": 1e-8, "atol": 1e-8, "adjoint": adjoint, "throw": False}
    run = lambda y0: jaxode.solve(f, y0, 0.0, 1.0, **options).y1
    with_end = jax.grad(lambda y0: ((y := run(y0)).sum(), y), has_aux=True)
    gradient, y1 = jax.jit(with_end)(jnp.ones(2))
    np.testing.assert_allclose(y1, np.exp(-1.0) * np.ones(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.exp(-2.0) * np.ones(2), rtol=1e-6)


@pytest.mark.slow
def test_stages_may_be_kept_beside_some_of_the_states_only(monkeypatch):
    """With those of all states, of two, of none: the same gradient."""

    def bar(y0, max_steps):
        solution = jaxode.solve(
            pendulum, y0, 0.0, 3.0, ARGS, ts=TS, adjoint=jaxode.DiscreteAdjoint(6), rtol=1e-7,
            max_steps=max_steps,
        )  # fmt: skip
        return scalar(solution.y1, solution.ys)

    gradient = jax.jit(jax.grad(bar), static_argnums=1)
    expected = gradient(Y0, 100)
    for sets in (0, 1, 3):
        monkeypatch.setattr(checkpoints, "STAGE_BYTES", sets * 7 * Y0.nbytes)
        # Another `max_steps` is another program, traced with the patch.
        np.testing.assert_allclose(gradient(Y0, 101 + sets), expected, rtol=1e-13)


def test_a_largest_step_is_not_exceeded_at_the_end():
    solution = jaxode.solve(
        lambda t, y, _: -y, jnp.ones(1), 0.0, 0.109, max_step=0.1, first_step=0.1
    )
    assert int(solution.stats.num_accepted) == 2


def test_the_first_step_is_not_larger_than_the_largest():
    """It would pass over the pulse."""
    pulse = lambda t, y, _: jnp.where((t > 0.4) & (t < 0.8), 1.0, 0.0) + 0 * y
    end = lambda h: jaxode.solve(pulse, jnp.zeros(1), 0.0, 10.0, max_step=0.05, first_step=h).y1[0]
    assert end(1.0) == end(0.05) > 0.39


def test_products_of_the_solver_run_at_full_precision():
    """Accelerators would otherwise round the stages of a float32 solve to 10 or 7 bits."""

    def loss(y0, A, t0, ts):
        return jaxode.solve(lambda t, y, A: A @ y, y0, t0, 1.0, A, ts=ts).ys.sum()

    inputs = jnp.ones(3), jnp.eye(3), jnp.zeros(()), jnp.array([0.5, 1.0])
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(*inputs))
    products = program.count("dot_general[")
    assert products > 10
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def precisions(**options):
    """Of the products in the gradient of a solve, with how many of the field and of the solver."""

    def loss(y0, A):
        return jaxode.solve(lambda t, y, A: A @ y, y0, 0.0, 1.0, A, **options).y1.sum()

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones(3), jnp.eye(3)))
    return {name: program.count(f"precision=(Precision.{name}") for name in ("HIGHEST", "DEFAULT")}


def test_products_of_the_field_run_at_the_precision_that_is_asked_for():
    full, low = precisions(), precisions(precision="default")
    assert full["DEFAULT"] == 0 < low["DEFAULT"]
    assert sum(full.values()) == sum(low.values())
    # What is set for JAX counts as well, but less than what is asked for.
    with jax.default_matmul_precision("default"):
        assert precisions() == low
        assert precisions(precision="highest") == full
    with pytest.raises(ValueError, match=r"solve\(precision=...\): must be None, 'highest'"):
        precisions(precision="low")


@pytest.mark.slow
def test_memory_grows_with_checkpoints_only():
    size = 50_000
    y0, state = jnp.ones(size), size * 8

    def measure(checkpoints=16, max_steps=100):
        adjoint = jaxode.DiscreteAdjoint(checkpoints)
        solve = lambda y0: jaxode.solve(
            lambda t, y, _: -jnp.sin(y),
            y0,
            0.0,
            1.0,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
        return temporary_bytes(lambda y0: jnp.sum(solve(y0).y1), y0)

    base = measure()
    # Ten thousand more steps cost their times (8 bytes each, in at most four buffers) and no state.
    assert measure(max_steps=10_100) - base < 4 * 8 * 10_000
    grown = measure(checkpoints=32) - base
    assert 16 * state * 0.9 < grown < 3 * 16 * state


def test_gathering_the_parameter_gradient_once_a_step_changes_nothing(monkeypatch):
    """One system has more parameters than work, so its gradient is gathered; a batch does not."""
    A = jax.random.normal(jax.random.key(0), (40, 40)) / 10
    f = lambda t, y, A: jnp.tanh(A @ y + t)

    def gradient(f):
        run = lambda A, t1: jaxode.solve(f, jnp.ones(40), 0.0, t1, A, steps=5).y1.sum()
        return jax.jit(jax.grad(run, (0, 1)))(A, jnp.array(1.0))

    gathered = gradient(f)
    monkeypatch.setattr("jaxode.ode.adjoints.sweep.PARAMETERS_PER_WORK", 1e9)
    expected = gradient(lambda t, y, A: f(t, y, A))  # another program, traced with the patch
    for a, b in zip(gathered, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("checkpoints", with_slow([8, 64], [64]))
def test_many_steps_within_few_checkpoints(checkpoints):
    """20,000 Euler steps of `y' = -a y` have the closed form `(1 - a h) ** 20000`."""

    def loss(a):
        return jaxode.solve(
            lambda t, y, a: -a * y, jnp.ones(1), 0.0, 1.0, a, solver=diffrax.Euler(), steps=20_000,
            adjoint=jaxode.DiscreteAdjoint(checkpoints), throw=False,
        ).y1[0]  # fmt: skip

    expected = -((1 - 2.0 / 20_000) ** 19_999)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(2.0), expected, rtol=1e-11)


@pytest.mark.slow
def test_float32():
    y0 = Y0.astype(jnp.float32)
    args = jax.tree.map(lambda x: x.astype(jnp.float32), ARGS)
    loss = lambda y0, args: jnp.sum(jaxode.solve(pendulum, y0, 0.0, 3.0, args).y1)
    run = jax.jit(jax.grad(loss, (0, 1)))
    single, double = run(y0, args), run(Y0, ARGS)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-3)


@pytest.mark.slow
def test_with_per_sample_steps_the_memory_is_that_of_the_times_of_max_steps_for_each_sample():
    def memory(max_steps, batch=256):
        loss = lambda z: jnp.sum(
            jaxode.flow(
                lambda t, y, args: -y, z, 0.0, 1.0, batch="per_sample", throw=False,
                max_steps=max_steps,
            )
        )  # fmt: skip
        return temporary_bytes(loss, jnp.ones((batch, 2))) / (8 * batch)

    # In numbers a sample; the compiler may move a few.
    np.testing.assert_allclose(memory(4096) - memory(256), 4096 - 256, rtol=0.01)
