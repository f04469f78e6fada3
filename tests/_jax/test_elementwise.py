"""Elementwise functions, by the programs of their tangents."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jaxode
from jaxode._jax.elementwise import is_elementwise

X = 2 * jnp.sin(5 * jnp.arange(1.0, 9.0))  # in no order
ELEMENTWISE = {
    "tanh": jnp.tanh,
    "a rule of its own": jaxode.nn.softplus,
    "branches": jax.nn.elu,
    "a kink": jax.nn.relu,
    "a program in a program": jax.checkpoint(jax.jit(jax.nn.gelu)),
    "its own number for each place": lambda x: jnp.tanh(jnp.arange(8.0) * x),
    "a module with parameters": eqx.nn.PReLU(),
    "constant": jnp.ones_like,
    "the identity": lambda x: x,
}
MIXED = {
    "softmax": jax.nn.softmax,
    "a mean": lambda x: x + x.mean(),
    "a product": lambda x: jnp.ones((8, 8)) @ x,
    "sums": jnp.cumsum,
    "order": jnp.sort,
    "turned": lambda x: x[::-1],
    "turned in a program": jax.jit(lambda x: jnp.roll(jnp.tanh(x), 1)),
    "by number": lambda x: x[jnp.arange(8)[::-1]],
}


@pytest.mark.parametrize("name", ELEMENTWISE | MIXED)
def test_what_is_elementwise(name):
    f = (ELEMENTWISE | MIXED)[name]
    jacobian = jax.jacrev(f)(X)
    diagonal = bool((jacobian == jnp.diag(jnp.diag(jacobian))).all())
    assert is_elementwise(f, X) == diagonal == (name in ELEMENTWISE)


def test_a_value_that_is_traced():
    """Which a gradient flows through."""

    def loss(a):
        assert is_elementwise(lambda x: jnp.tanh(a * x), X)
        return a

    jax.jit(jax.grad(loss))(1.0)
