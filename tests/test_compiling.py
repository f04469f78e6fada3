"""What is called by itself is compiled once; inside of `jax.jit` it is traced once."""

import jax
import jax.numpy as jnp

import jaxode
from jaxode.compiling import compiled


def counted():
    """A compiled square with a rule of its own, and how often it was traced without it."""
    traced = []

    @jax.custom_vjp
    def square(x):
        traced.append(x)
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, bar: (2 * x * bar,))
    return compiled(square), traced


def test_a_gradient_inside_of_jit_does_not_trace_the_value():
    square, traced = counted()
    assert jax.jit(jax.grad(square))(3.0) == 6
    assert not traced


def test_calls_by_themselves_share_one_program():
    square, traced = counted()
    for x in map(jnp.asarray, (3.0, 4.0)):
        assert jax.grad(square)(x) == 2 * x
        assert (jax.vmap(square)(jnp.full(2, x)) == x * x).all()
        assert square(x) == x * x
    assert len(traced) == 1


def test_a_training_step_has_no_program_inside():
    params = jaxode.nn.MLP(2, (4,), key=jax.random.key(0))
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2))
    energy = lambda params, y: jnp.sum(jaxode.solve(jaxode.nn.field, y, 0.0, 1.0, params).y1)
    for loss, x in ((flow.nll, jnp.ones((3, 2))), (energy, jnp.ones(2))):
        text = str(jax.make_jaxpr(jax.grad(loss))(params, x))
        assert "while" in text
        assert "_jitted" not in text
        assert "name=_integrate" not in text
