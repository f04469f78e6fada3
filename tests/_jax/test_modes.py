"""Every mode and order, for a loop of a length that only the run knows, against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxode._jax.modes import differentiable, with_sweep

MOST, STEPS = 16, 5
P = jax.random.normal(jax.random.key(0), (2, 2))
Y = jnp.array([0.3, -0.2])
YS = jnp.stack([Y, -Y, 2 * Y])


def slope(t, y, p):
    return jnp.tanh(p @ y) + t


def euler(leaves):
    """Steps of Euler's method with all of their states, in a loop without a known length."""
    y, p = leaves
    count = jnp.where(jnp.isfinite(y).all(), jnp.int32(STEPS), 0)
    h = 1.0 / count.astype(y.dtype)

    def step(carry):
        i, y, states = carry
        return i + 1, y + h * slope(i.astype(y.dtype) * h, y, p), states.at[i].set(y)

    start = jnp.int32(0), y, jnp.zeros((MOST, *y.shape))
    _, y, states = jax.lax.while_loop(lambda carry: carry[0] < count, step, start)
    return y, states, count


def record(moved, leaves):
    y, *kept = euler(leaves)
    return [y], kept[1], kept


def recorded_sweep(moved, touched, leaves, kept, bars):
    """The chain rule through the recorded steps, last to first."""
    (_, p), (states, count), (bar,) = leaves, kept, bars
    h = 1.0 / count.astype(p.dtype)

    def step(carry):
        i, y_bar, p_bar = carry
        by_y, by_p = jax.vjp(lambda y, p: slope(i.astype(p.dtype) * h, y, p), states[i], p)[1](
            y_bar
        )
        return i - 1, y_bar + h * by_y, p_bar + h * by_p

    start = count - 1, bar, jnp.zeros_like(p)
    _, *by_both = jax.lax.while_loop(lambda carry: carry[0] >= 0, step, start)
    return [by for by, flag in zip(by_both, moved, strict=True) if flag]


def run(leaves):
    y, _, count = euler(leaves)
    return [y], count


FUNCTION = with_sweep(run, record, recorded_sweep)


@jax.jit
def solve(y, p):
    return differentiable(FUNCTION, run, [y, p])[0][0]


@jax.jit
def plain(y, p):
    h = 1.0 / STEPS
    return jax.lax.fori_loop(0, STEPS, lambda i, y: y + h * slope(i.astype(y.dtype) * h, y, p), y)


def loss(solve, y, p):
    return jnp.sum(solve(y, p) ** 2)


def over_rows(of, solve):
    return lambda y, p: jax.vmap(of(functools.partial(loss, solve)), (0, None))(YS, p)


def of_rows(solve, y, p):
    return jax.vmap(functools.partial(loss, solve), (0, None))(YS, p).sum()


BOTH = (0, 1)
# A loss of a solve, differentiated. What a gradient method needs is one row.
WAYS = {
    "grad": lambda f: jax.grad(f, BOTH),
    "grad by one": lambda f: jax.grad(f, 1),
    "jacfwd": lambda f: jax.jacfwd(f, BOTH),
    "hessian": lambda f: jax.hessian(f, BOTH),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f, BOTH), BOTH),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f, 1), 0),
    "jacrev, thrice": lambda f: jax.jacrev(jax.jacrev(jax.jacrev(f))),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f), BOTH),
    "linearize": lambda f: lambda y, p: jax.linearize(f, y, p)[1](y, p),
    "by the directions of several products": lambda f: (
        lambda y, p: jax.grad(
            lambda ys: jnp.sum(
                jax.vmap(lambda along: jax.jvp(jax.grad(f), (y, p), (along, p))[1])(ys)
            )
        )(YS)
    ),
}


@pytest.mark.parametrize("order", [1, 2])
def test_check_grads_as_it_stands(order):
    check_grads(solve, (Y, P), order=order)


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_are_those_of_plain_jax(way):
    found, expected = (
        jax.jit(WAYS[way](functools.partial(loss, solved)))(Y, P) for solved in (solve, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", ["grad", "jacfwd", "jacrev of jacrev"])
def test_each_row_has_its_own_under_vmap(way):
    found, expected = (jax.jit(over_rows(WAYS[way], solved))(Y, P) for solved in (solve, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", ["grad by one", "hessian"])
def test_rows_add_up_in_the_gradient_of_what_they_share(way):
    found, expected = (
        jax.jit(WAYS[way](functools.partial(of_rows, solved)))(Y, P) for solved in (solve, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_a_gradient_computes_no_tangent():
    """The steps and their sweep are all of its loops."""
    program = jax.jit(jax.grad(functools.partial(loss, solve), BOTH)).lower(Y, P).compile()
    assert program.as_text().count(" while(") == 2


def test_other_outputs_have_no_derivative():
    outputs, others = jax.jit(functools.partial(differentiable, FUNCTION, run))([Y, P])
    np.testing.assert_allclose(outputs[0], plain(Y, P), rtol=1e-14)
    assert int(others) == STEPS


def summed(leaves):
    return jax.lax.psum(jnp.sin(leaves[0]), "rows"), None


def sweep_of_sum(moved, touched, leaves, kept, bars):
    return [jnp.cos(leaves[0]) * jax.lax.psum(bars[0], "rows")]


@pytest.mark.parametrize("order", [1, 2])
def test_rows_that_are_mapped_by_name_may_exchange_values(order):
    function = with_sweep(summed, lambda moved, leaves: (*summed(leaves), None), sweep_of_sum)
    own = lambda x: differentiable(function, summed, [x])[0]
    x, found = jnp.arange(3.0), []
    for f in (own, lambda x: summed([x])[0]):
        way = jax.grad(f)
        way = way if order == 1 else jax.grad(lambda x, way=way: way(x))
        found.append(jax.jit(jax.vmap(way, axis_name="rows"))(x))
    np.testing.assert_allclose(*found, rtol=1e-12)
