"""Properties of every feature of a solve, over the table of `cases.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ROWS
from helpers import METHODS, assert_close

import jaxode

LOST = 2  # the row that fails
ALL = jnp.arange(1.0, 1 + ROWS)  # the weights of the rows in a loss
JOINT = [name for name, case in CASES.items() if case.options.get("batch") == "joint"]
OF_ROWS = [name for name in CASES if name not in JOINT]


def loss_of(found, weights):
    """A loss that weighs each number differently. Rows of weight zero are masked."""
    total = 0.0
    for name, leaf in found.items():
        each = jnp.where(weights[:, None] > 0, leaf.reshape(ROWS, -1), 0.0)
        each = jnp.sin((2 + len(name)) * each) @ jnp.arange(1.0, 1 + each.shape[1])
        total += weights @ each
    return total


@functools.cache
def program(name, method="discrete"):
    """`(inputs, weights) -> (what is seen, the gradient of a loss by all inputs)`."""

    def loss(x, weights):
        found = CASES[name].seen(x, adjoint=METHODS[method].adjoint)
        return loss_of(found, weights), found

    return jax.jit(METHODS[method].gradient(loss, has_aux=True))


@functools.cache
def expected(name):
    """The gradient of the closed form, and its values."""

    def loss(x):
        found = CASES[name].exact(x)
        return loss_of(found, ALL), found

    return jax.jit(jax.grad(loss, has_aux=True))(CASES[name].inputs)


def without(case):
    """The inputs with a rate that is not a number in one row."""
    x = case.inputs
    return x | {"q": x["q"].at[LOST].set(jnp.nan)}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_closed_form(name):
    """By every input. The tolerance is 1e-10, which dense output and derivatives amplify."""
    (gradient, found), (slopes, values) = program(name)(CASES[name].inputs, ALL), expected(name)
    assert_close(found, values, 1e-8)
    assert_close(gradient, slopes, 1e-6)


# What an adjoint does on its own, one case of each: it sees pieces of a solve, not features.
BY_METHOD = [
    *("outputs of each row", "doses and outputs", "doses backwards", "a breakpoint and outputs"),
    *("an event and outputs", "an event that changes the state", "equal steps"),
]


@pytest.mark.parametrize("name", BY_METHOD)
@pytest.mark.parametrize("method", ["backsolve", "forward"])
def test_every_method_has_the_gradient_of_the_closed_form(method, name):
    (gradient, found), (slopes, values) = (
        program(name, method)(CASES[name].inputs, ALL),
        expected(name),
    )
    assert_close(found, values, 1e-8)
    assert_close(gradient, slopes, 1e-6)


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_row_that_fails_leaves_the_others_alone(name):
    """To the last bit: their values, and the gradients of a loss that masks it."""
    case, weights = CASES[name], ALL.at[LOST].set(0.0)
    gradient, found = program(name)(without(case), weights)
    clean, whole = program(name)(case.inputs, weights)
    for key, leaf in found.items():
        np.testing.assert_array_equal(np.delete(leaf, LOST, 0), np.delete(whole[key], LOST, 0))
        assert jnp.isnan(leaf[LOST]).all()
    # A row that is on its event moves by roundings as long as another one searches.
    assert_close(gradient, clean, 1e-13 if case.event else 0.0)


@pytest.mark.parametrize("name", CASES)
def test_a_failure_is_raised_with_its_row_or_masked(name):
    """Without `jit`, which changes no value."""
    case, lost = CASES[name], np.arange(ROWS) == LOST
    rows = "" if name in JOINT else f" in 1 of {ROWS} rows, first in row {LOST}"
    with pytest.raises(jaxode.SolveError, match=f"field or the state is not finite.*{rows}"):
        case.solve(without(case), throw=True)
    solution = case.solve(without(case))
    lost = lost.any() if name in JOINT else lost
    np.testing.assert_array_equal(solution.result, jaxode.Result.NON_FINITE * lost)
    np.testing.assert_array_equal(jnp.isnan(solution.y1).all(axis=1), lost)
    _, found = program(name)(without(case), ALL)
    np.testing.assert_allclose(solution.y1, found["y1"], rtol=1e-13)  # another fusion of products


@pytest.mark.parametrize("name", OF_ROWS)
def test_vmap_over_single_solves_is_the_solve_of_rows(name):
    """Values, and gradients by what each row has for itself and what all share."""
    case, x = CASES[name], CASES[name].inputs
    each = {"y0", "q", "at"} | ({"t0", "t1"} if case.ends else set())
    each |= {"ts"} if case.times == "each" else set()
    axes = {key: 0 if key in each else None for key in x}

    def loss(x):
        found = jax.vmap(case.seen, (axes,))(x)
        return loss_of(found, ALL), found

    # Sums in another order.
    assert_close(jax.jit(jax.grad(loss, has_aux=True))(x), program(name)(x, ALL), 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name):
    case = CASES[name]
    x = {key: leaf.astype(jnp.float32) for key, leaf in case.inputs.items()}
    found = case.seen(x, rtol=1e-5, atol=1e-6)
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}
    assert_close(found, expected(name)[1], 1e-4)
