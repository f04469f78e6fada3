"""Properties of every feature of a solve, over the table of `cases.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ROWS
from helpers import (
    AGAIN,
    METHODS,
    REVERSE,
    assert_close,
    only_rows_of_one_solve,
    with_slow,
)

import jaxode
from jaxode import Result

TIGHT = 1e-10  # which dense output and derivatives amplify
LOST = 2  # the row that fails
ALL = jnp.arange(1.0, 1 + ROWS)  # the weights of the rows in a loss
OTHERS = ALL.at[LOST].set(0.0)
JOINT = [name for name, case in CASES.items() if case.is_joint]
OF_ROWS = [name for name in CASES if name not in JOINT]
# Each feature once, for what costs a program of its own and does not look into pieces of a solve.
EACH_ONCE = [
    *("the solution between steps", "doses in spans of each row", "equal steps"),
    *("joint steps, doses and a breakpoint", "stiff, doses and a breakpoint"),
    *("doses, a breakpoint and an event", "an event that changes the state, in spans of each row"),
]
# In `make test`: what has code of its own. The other cases are pairs of these, or parts of one;
# `tests/ode/test_stiff.py` and `tests/ode/test_breakpoints.py` test those solves fast.
FAST = [
    *("the solution between steps", "doses in spans of each row", "joint steps"),
    "an event that changes the state, in spans of each row",
]


def but(cases, fast=FAST):
    """Names of cases that are not `fast`."""
    return [name for name in cases if name not in fast]


def loss_of(found, weights):
    """A loss that weighs each number differently. Rows of weight zero are masked."""
    total = 0.0
    for name, leaf in found.items():
        each = jnp.where(weights[:, None] > 0, leaf.reshape(ROWS, -1), 0.0)
        each = jnp.sin((2 + len(name)) * each) @ jnp.arange(1.0, 1 + each.shape[1])
        total += weights @ each
    return total


def program(name, method="discrete"):
    """`(inputs, weights, tolerance) -> (the gradient by all inputs, (what is seen, solution))`."""
    kind = CASES[name].program
    return _program(next(like for like in CASES if CASES[like].program == kind), method)


@functools.cache
def _program(name, method):
    def loss(x, weights, tolerance):
        settings = {"rtol": tolerance, "atol": tolerance, "adjoint": METHODS[method].adjoint}
        solution = CASES[name].solve(x, **settings)
        found = CASES[name].seen(x, solution)
        return loss_of(found, weights), (found, solution)

    return jax.jit(METHODS[method].gradient(loss, has_aux=True))


@functools.cache
def expected(name):
    """The gradient of the closed form, and its values."""

    def loss(x):
        found = CASES[name].exact(x)
        return loss_of(found, ALL), found

    return jax.jit(jax.grad(loss, has_aux=True))(CASES[name].inputs)


def failures(case):
    """Inputs with one row that fails, its code, and what is said without `jit`, if it is told."""
    x = case.inputs
    lost = lambda name, value: x | {name: x[name].at[LOST].set(value)}
    yield lost("q", jnp.nan), Result.NON_FINITE, "solve: the vector field or the state is not fin"
    yield lost("y0", jnp.inf), Result.NON_FINITE, r"solve\(y0=...\): must be finite; got NaN or inf"
    for name in ["dose"] * bool(case.doses) + ["kept"] * case.changes:
        said = "solve: the state after a change is not finite"
        yield lost(name, jnp.nan), Result.NON_FINITE_CHANGE, said
    for name in case.ends:
        yield lost(name, jnp.nan), Result.INVALID_ARGUMENT, None
    for name in ("ts", "at"):
        if name in x and x[name].ndim == 2:
            yield lost(name, x[name][LOST, ::-1]), Result.INVALID_ARGUMENT, None


@pytest.mark.parametrize("name", with_slow(CASES, but(CASES)))  # pairs compile for seconds
def test_values_and_gradients_are_those_of_the_closed_form(name):
    """By every input."""
    case, (slopes, values) = CASES[name], expected(name)
    gradient, (found, solution) = program(name)(case.inputs, ALL, TIGHT)
    assert_close(found, values, 1e-8)
    assert_close(gradient, slopes, 1e-6)
    assert solution.ok.all()
    np.testing.assert_array_equal(solution.t_reached, found.get("t1", case.inputs["t1"]))
    if case.event:
        came = [happens[-1] != "end" for happens, _ in case.plans]
        np.testing.assert_array_equal(solution.event_occurred, came)


# What an adjoint does on its own, one case of each: it sees pieces of a solve, not features.
# Forward mode is JAX's own, of the loop that all run.
BY_METHOD = {
    "backsolve": ["doses and outputs", "doses backwards", "a breakpoint and outputs"],
    "forward": ["doses and outputs", "doses backwards"],
}
OF_ALL = ["an event that changes the state", "equal steps"]
OF_METHODS = [(by, name) for by in BY_METHOD for name in BY_METHOD[by] + OF_ALL]
ONLY_HERE = [("backsolve", "doses and outputs")]


@pytest.mark.parametrize(
    ("method", "name"),
    with_slow(OF_METHODS, but(OF_METHODS, ONLY_HERE)),  # `test_adjoints.py` has forward mode
)
def test_every_method_has_the_gradient_of_the_closed_form(method, name):
    """And exact ones the same gradient where the solution is a rough one."""
    run, x, (slopes, values) = program(name, method), CASES[name].inputs, expected(name)
    gradient, (found, _) = run(x, ALL, TIGHT)
    assert_close(found, values, 1e-8)
    assert_close(gradient, slopes, 1e-6)
    if METHODS[method].exact:
        assert_close(run(x, ALL, 1e-3)[0], program(name)(x, ALL, 1e-3)[0], 1e-10)


@pytest.mark.parametrize("name", with_slow(OF_ROWS, but(OF_ROWS)))  # as their gradients above
def test_a_row_that_fails_leaves_the_others_alone(name):
    """To the last bit: their values, and the gradients of a loss that masks it."""
    case, run = CASES[name], program(name)
    clean, (whole, _) = run(case.inputs, OTHERS, TIGHT)
    for x, code, _ in failures(case):
        gradient, (found, solution) = run(x, OTHERS, TIGHT)
        np.testing.assert_array_equal(solution.result, code * (np.arange(ROWS) == LOST))
        for key, leaf in found.items():
            np.testing.assert_array_equal(np.delete(leaf, LOST, 0), np.delete(whole[key], LOST, 0))
            assert jnp.isnan(leaf[LOST]).all()
        # A row that is on its event moves by roundings as long as another one searches.
        assert_close(gradient, clean, 1e-13 if case.event else 0.0)
        # Without a mask, no gradient that the rows share is a number.
        assert jnp.isnan(run(x, ALL, TIGHT)[0]["p"])


RAISED = ["doses in spans of each row"]


@pytest.mark.parametrize("name", with_slow(EACH_ONCE, but(EACH_ONCE, RAISED)))  # without gradients
def test_a_failure_is_raised_with_its_row(name):
    case = CASES[name]
    rows = "" if name in JOINT else f" in 1 of {ROWS} rows, first in row {LOST}"
    for x, _, said in failures(case):
        if said is not None:
            with pytest.raises(jaxode.SolveError, match=f"^{said}.*{rows}"):
                case.solve(x, throw=True)


@pytest.mark.slow  # the programs above without `jit`, which changes no value
@pytest.mark.parametrize("name", EACH_ONCE)
def test_a_failure_is_masked_without_jit(name):
    case, lost = CASES[name], (np.arange(ROWS) == LOST) | (name in JOINT)
    for x, code, said in failures(case):
        if said is None:
            continue
        solution = case.solve(x)
        np.testing.assert_array_equal(solution.result, code * (lost[0] if name in JOINT else lost))
        np.testing.assert_array_equal(jnp.isnan(solution.y1).all(axis=1), lost)
        _, (found, _) = program(name)(x, ALL, TIGHT)
        # Another fusion of products.
        np.testing.assert_allclose(solution.y1, found["y1"], rtol=1e-13)


UNDER_VMAP = ["an event in spans of each row", *(name for name in EACH_ONCE if name in OF_ROWS)]
FEW = ["doses in spans of each row"]


@pytest.mark.parametrize("name", with_slow(UNDER_VMAP, but(UNDER_VMAP, FEW)))  # large programs
def test_vmap_over_single_solves_is_the_solve_of_rows(name, monkeypatch):
    """Values, work, and gradients by what each row has for itself and what all share."""
    case, x = CASES[name], CASES[name].inputs
    each = {"y0", "q", "at", "dose", "kept", *case.ends} | (
        {"ts"} if case.times == "each" else set()
    )
    axes = {key: 0 if key in each else None for key in x}

    def one(x):
        solution = case.solve(x)
        return case.seen(x, solution), solution.stats

    def loss(x, weights):
        found, stats = jax.vmap(one, (axes,))(x)
        return loss_of(found, weights), (found, stats)

    run = jax.jit(jax.grad(loss, has_aux=True))
    with only_rows_of_one_solve(monkeypatch):
        gradient, (found, stats) = run(x, ALL)
    of_rows, (found_of_rows, solution) = program(name)(x, ALL, TIGHT)
    # Sums in another order.
    assert_close((gradient, found), (of_rows, found_of_rows), 1e-9)
    if not case.event:  # rows look for their events together
        jax.tree.map(np.testing.assert_array_equal, stats, solution.stats)
    failed, *_ = next(failures(case))
    assert_close(run(failed, OTHERS)[0], program(name)(failed, OTHERS, TIGHT)[0], 1e-9)


IN_SINGLE = ["an event that changes the state, in spans of each row"]


@pytest.mark.parametrize("name", with_slow(EACH_ONCE, but(EACH_ONCE, IN_SINGLE)))  # alike
def test_single_precision(name):
    case = CASES[name]
    x = {key: leaf.astype(jnp.float32) for key, leaf in case.inputs.items()}
    found = case.seen(x, case.solve(x, rtol=1e-5, atol=1e-6))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}
    assert_close(found, expected(name)[1], 1e-4)


@pytest.mark.slow  # that of a time is in `tests/ode/test_events.py`
@pytest.mark.parametrize(("method", "again"), [case for case in AGAIN if case[0] in REVERSE])
def test_second_derivatives(method, again):
    """Of the time of an event and of the state there, along a direction of all inputs."""
    case = CASES["an event"]._replace(times=None)
    x, options = case.inputs, {"adjoint": METHODS[method].adjoint}
    way = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(1.0 + leaf.size)[1:]).reshape(leaf.shape), x)

    def curvature(loss, again):
        if again is jax.jacfwd:
            return jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (way,))[1])(x)
        dot = lambda tree: sum(jnp.vdot(tree[name], way[name]) for name in way)
        return jax.jit(jax.grad(lambda x: dot(jax.grad(loss)(x))))(x)

    found = curvature(lambda x: loss_of(case.seen(x, case.solve(x, **options)), ALL), again)
    exact = curvature(lambda x: loss_of(case.exact(x), ALL), jax.jacfwd)
    assert_close(found, exact, 1e-6)
