"""What must work under `jit`, `vmap`, `grad`, `scan` and their like: the numbers are the same.

Each row runs twice: on a solve of `y' = -a y`, and on its closed form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checking_leaks, with_slow

import jaxode

Y0, A = jnp.array([1.0, 2.0]), jnp.array([0.5, 1.5])
BACK, FORWARD = {"adjoint": jaxode.BacksolveAdjoint()}, {"adjoint": jaxode.ForwardMode()}


def decay(t, y, a):
    return -a * y


def solved(a, t1=1.0, y0=Y0, t0=0.0, f=decay, **options):
    return jaxode.solve(f, y0, t0, t1, a, **{"rtol": 1e-9, "atol": 1e-9, **options}).y1


def exact(a, t1=1.0, y0=Y0, t0=0.0, f=decay, **options):
    return y0 * jnp.exp(-a * (t1 - t0))


def summed(end):
    return lambda *inputs, **options: end(*inputs, **options).sum()


def scanned(end):
    body = lambda y, t, a: (end(a, t + 0.25, y, t), None)
    times = jnp.array([0.0, 0.25, 0.5, 0.75])
    return lambda a: jax.lax.scan(lambda y, t: body(y, t, a), Y0, times)[0].sum()


def chosen(end):
    """Each branch is a separate solve with its gradient method."""
    total = summed(end)
    return lambda a, on: jax.lax.cond(on, lambda: total(a), lambda: total(a, 2.0, **BACK))


def donated(end):
    y0 = jnp.array(Y0)
    y1 = jax.jit(lambda y0: end(A, y0=y0), donate_argnums=0)(y0)
    assert y0.is_deleted()
    return y1


def traced_settings(end):
    run = lambda tolerance, first, largest, point: end(
        A, rtol=tolerance, atol=tolerance, first_step=first, max_step=largest,
        breakpoints=point[None],
    )  # fmt: skip
    tolerances, firsts = jnp.array([1e-8, 1e-9, 1e-10]), jnp.array([0.1, 0.01, 0.5])
    return jax.vmap(run)(tolerances, firsts, jnp.array([1.0, 0.1, 0.05]), jnp.array([0.3, 0.5, 7]))


AS, ON = jnp.stack([A, 2 * A]), jnp.array([True, False])
PROGRAMS = {
    "vmap of the settings": lambda end: jax.jit(lambda: traced_settings(end))(),
    "jit of all jacobians": lambda end: jax.jit(jax.jacrev(end, (0, 1, 2)))(A, 1.0, Y0),
    "jit of all jacobians forward": lambda end: jax.jit(
        jax.jacfwd(lambda *inputs: end(*inputs, **FORWARD), (0, 1, 2))
    )(A, 1.0, Y0),
    "forward over reverse": lambda end: jax.jit(jax.hessian(summed(end)))(A),
    "forward over a vmap of gradients": lambda end: jax.jit(jax.jacfwd(lambda a: jnp.sum(
        jax.vmap(jax.grad(lambda y0: jnp.sum(end(a, y0=y0) ** 2)))(AS) ** 2
    )))(A),
    "donation": donated,
    "checkpoint": lambda end: jax.jit(jax.grad(jax.checkpoint(summed(end))))(A),
    "gradient of a scan": lambda end: jax.jit(jax.grad(scanned(end)))(A),
    "a loop until the state is small": lambda end: jax.lax.while_loop(
        lambda y: y.max() > 0.1, lambda y: end(A, y0=y), Y0
    ),
    "map": lambda end: jax.lax.map(lambda y0: end(A, y0=y0), AS),
    "vmap of the gradient of a cond": lambda end: jax.jit(
        jax.vmap(jax.grad(chosen(end)), (None, 0))
    )(A, ON),
    "linearize": lambda end: jax.jit(
        lambda a: jax.linearize(lambda a: end(a, **FORWARD), a)[1](jnp.ones(2))
    )(A),
    "checks of leaks": lambda end: checking_leaks()(
        lambda: jax.jit(jax.grad(summed(end)))(1.01 * A)
    )(),
}  # fmt: skip


LARGE = ["vmap of the gradient of a cond", "forward over a vmap of gradients"]
LARGE += ["jit of all jacobians forward"]


@pytest.mark.parametrize(
    "name",
    with_slow(PROGRAMS, LARGE),  # two derivatives in one program, or those of another row
)
def test_programs_around_a_solve(name):
    # 1e-7: a hundred times the tolerance, for derivatives of second order.
    both = map(PROGRAMS[name], (solved, exact))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8)


def solving(t, y, a):
    rates = jnp.stack([a / 4, 3 * a / 4])
    summed, _ = jax.lax.scan(lambda total, rate: (total - rate * y, None), 0 * y, rates)
    return jnp.linalg.solve(jnp.diag(y), y * summed)


@jax.custom_vjp
def own_rule(y, a):
    return -a * y


own_rule.defvjp(lambda y, a: (own_rule(y, a), (y, a)), lambda r, g: (-r[1] * g, -r[0] * g))


def with_other_leaves(t, y, p):
    noise = 0 * jax.random.normal(p["key"], (2,))
    return jnp.where(p["mask"], own_rule(y ** p["power"], p["a"]), 0.0) + noise


square = lambda c: (c * jnp.conj(c)).real
of_square = lambda t, y, c: -square(c) * y
COMPLEX = jnp.array([1 + 1j, 0.5j])
as_it_is = lambda a: a
# (field, options, parameters, what it makes of them, their rate)
FIELDS = {
    "the gradient of an energy": (
        lambda t, y, a: -jax.grad(lambda y: 0.5 * (a * y * y).sum())(y), {}, A, as_it_is, as_it_is,
    ),
    "a scan and equations": (solving, {}, A, as_it_is, as_it_is),
    "a branch that is NaN": (
        lambda t, y, a: jax.lax.cond(t < 5.0, lambda: -a * y, lambda: jnp.nan * y), {}, A,
        as_it_is, as_it_is,
    ),
    "parameters that are no numbers": (
        with_other_leaves, {}, A,
        lambda a: {
            "a": a, "key": jax.random.key(0), "mask": ON, "power": jnp.array(1), "on": True,
            "name": "x", "no": None,
        },
        lambda a: jnp.where(ON, a, 0.0),
    ),
    "complex parameters": (of_square, {}, COMPLEX, as_it_is, square),
}  # fmt: skip


INSIDE = ["a scan and equations", "a branch that is NaN", "the gradient of an energy"]


@pytest.mark.parametrize("name", with_slow(FIELDS, INSIDE))  # JAX's own derivatives
def test_gradients_by_the_parameters_of_any_field(name):
    f, options, value, args, rate = FIELDS[name]
    actual = jax.jit(jax.grad(lambda a: summed(solved)(args(a), f=f, **options)))(value)
    expected = jax.jit(jax.grad(lambda a: summed(exact)(rate(a))))(value)
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-8)
