"""The vjp with copies of transposes: the numbers of `jax.vjp`, in every mode of differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow

from jaxode import nn
from jaxode._jax import pullback
from jaxode._jax.pullback import vjp

M = nn.ConcatSquash(3, (5, 4), key=jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (6, 3))
CT = jax.random.normal(jax.random.key(2), (6, 3))


def layers(m, x):
    return jax.vmap(lambda x: m(0.3, x))(x)


def repeated(m, x):
    """With a loop, a choice and inner `jit`, of which only the last is looked into."""
    once = jax.jit(lambda x: layers(m, x))
    x = jax.lax.scan(lambda x, _: (once(x), None), once(x), None, length=2)[0]
    return jax.lax.cond(x[0, 0] > 0, lambda x: 2 * x, lambda x: x, once(x))


def convolved(m, x):
    """Products with other dimensions, and one with a batch of matrices."""
    first = jnp.einsum("bi,bj->ij", x, layers(m, x))
    stack = jnp.stack([x, 2 * x])
    return jnp.einsum("kbi,kij->bj", stack, jnp.stack([first, first.T]))


FUNCTIONS = {"layers": layers, "repeated": repeated, "convolved": convolved}


def gradient(vjp, function):
    def value_and_cotangents(m, x, ct):
        value, pull = vjp(function, m, x)
        return value, pull(ct)

    return value_and_cotangents


# The order of the sums differs.
def close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


CASES = [(name, lambda f: f) for name in FUNCTIONS]
CASES += [("convolved", jax.jacrev), ("layers", jax.jacfwd)]


@pytest.mark.parametrize(("name", "mode"), with_slow(CASES, CASES[-2:-1]))  # second derivatives
def test_is_that_of_jax(name, mode):
    both = (jax.jit(mode(gradient(v, FUNCTIONS[name])))(M, X, CT) for v in (vjp, jax.vjp))
    close(*both)


def test_batched():
    stacked = jnp.stack([X, X + 1])
    one = lambda vjp: jax.jit(jax.vmap(lambda x: gradient(vjp, layers)(M, x, CT)))(stacked)
    close(one(vjp), one(jax.vjp))


def test_keeps_the_transpose_of_each_weight_apart():
    program = str(jax.make_jaxpr(gradient(vjp, layers))(M, X, CT))
    assert program.count("kept_apart") == 3


@pytest.mark.parametrize(("platform", "copies"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_copies_are_for_the_platform_that_a_program_is_lowered_for(platform, copies):
    traced = jax.jit(gradient(vjp, layers)).trace(M, X, CT)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == copies


def test_an_error_in_the_backward_pass_is_raised_at_once():
    calls = []

    @jax.custom_vjp
    def field(x):
        return x

    def backward(_, bar):
        calls.append(bar)
        raise OSError("mine")

    field.defvjp(lambda x: (x, None), backward)
    with pytest.raises(OSError, match="mine"):
        vjp(field, X)[1](CT)
    assert len(calls) == 1


def test_an_error_of_its_own_is_not_hidden(monkeypatch):
    def broken(*_):
        raise AssertionError("broken")

    monkeypatch.setattr(pullback, "_evaluate", broken)
    with pytest.raises(AssertionError, match="broken"):
        gradient(vjp, layers)(M, X, CT)
