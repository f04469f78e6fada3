"""Gradients under attack: failed rows, errors that programs drop, rules of differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AGAIN, KINDS, METHODS, REVERSE, gradient, of_feature, with_slow

import jaxode

TS = jnp.array([0.3, 0.8])
# The first explodes at about t = 0.4, the next two fail at once.
BAD = jnp.array([[2.0], [jnp.nan], [jnp.inf], [0.1], [0.2]])
GOOD = jnp.where(jnp.arange(5)[:, None] < 3, 0.15, BAD)
KEEP = jnp.arange(5) >= 3


def explosive(t, y, args):
    rate, shift = args
    return rate * jnp.exp(-0.1 * t) * y**2 * jnp.sqrt(jnp.abs(y) + shift)


def masked(name, way, ts=None):
    """A loss of the rows to `keep` of all that a solve depends on."""

    def loss(inputs, keep):
        z, t0, t1, ts, args, scale = inputs
        f = lambda t, y, args: scale * explosive(t, y, args)
        options = METHODS[name].options(ts=ts, throw=False, max_steps=200)
        if way == "vmap":
            solution = jax.vmap(lambda y: jaxode.solve(f, y, t0, t1, args, **options))(z)
            ys = None if ts is None else jnp.moveaxis(solution.ys, 1, 0)
        else:
            solution = jaxode.solve(f, z, t0, t1, args, batch="per_sample", **options)
            ys = solution.ys
        total = jnp.sum(jnp.where(keep[:, None], solution.y1, 0.0) ** 2)
        return total if ys is None else total + jnp.sum(jnp.where(keep[:, None], ys, 0.0) ** 3)

    return loss, lambda z: (z, 0.0, 1.0, ts, (jnp.array(1.0), jnp.array(0.1)), jnp.array(1.1))


# `vmap` is rows of one solve, and of one without a tape.
MASKED = [*((name, "per_sample") for name in KINDS), ("discrete", "vmap"), ("backsolve", "vmap")]
# Of rows by backsolve there are two, below.
OTHERS = [case for case in MASKED if case != ("discrete", "vmap")]


@pytest.mark.parametrize(("name", "way"), with_slow(MASKED, OTHERS))
def test_failed_rows_that_are_masked_add_nothing_to_any_gradient(name, way):
    loss, inputs = masked(name, way, TS)
    run = jax.jit(gradient(name)(loss))
    lost = run(inputs(BAD), jnp.ones(5, bool))
    assert jnp.isnan(lost[0])[:3].all()
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(lost[1:]))
    if not METHODS[name].masks:
        return
    actual, expected = run(inputs(BAD), KEEP), run(inputs(GOOD), KEEP)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # The rows that are left take the same steps: equal up to the order of sums.
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(actual[0][:3], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "again"), [case for case in AGAIN if case[0] in REVERSE])
def test_second_derivatives_where_failed_rows_are_masked(name, again):
    loss, inputs = masked(name, "per_sample")

    def of(by, z, keep):
        z, t0, t1, ts, _, scale = inputs(z)
        return loss((z, t0, t1, ts, (by[0], by[1]), scale), keep)

    run = jax.jit(again(jax.grad(of)))
    by = jnp.array([1.0, 0.1])
    if METHODS[name].masks:
        np.testing.assert_allclose(run(by, BAD, KEEP), run(by, GOOD, KEEP), rtol=1e-13)
    assert jnp.isnan(run(by, BAD, jnp.ones(5, bool))).all()


@pytest.mark.parametrize("name", of_feature(name for name in KINDS if METHODS[name].masks))
def test_a_failed_joint_solve_that_is_masked_adds_nothing(name):
    """One row that fails fails all, and so does a system without a batch."""

    def loss(z, rate):
        options = METHODS[name].options(throw=False, max_steps=200, batch="joint")
        solution = jaxode.solve(explosive, z, 0.0, 1.0, (rate, 0.1), **options)
        return jnp.sum(jnp.where(solution.ok, solution.y1, 0.0)) + rate**2

    by_z, by_rate = jax.jit(gradient(name)(loss, (0, 1)))(BAD, jnp.array(1.5))
    assert not by_z.any()
    assert by_rate == 3.0


def test_a_solution_that_the_loss_does_not_use_has_no_gradient():
    def loss(y0):
        return jaxode.solve(lambda t, y, _: -y, y0, 0.0, 1.0).t_reached + jnp.sum(y0)

    assert jax.jit(jax.grad(loss))(jnp.ones(2)).tolist() == [1.0, 1.0]


def test_rows_on_which_nothing_depends_need_no_backward_solve():
    """Decay by e^-1000 overflows backwards in time."""

    def loss(rate, keep):
        f = lambda t, y, rate: jnp.stack([jnp.zeros(()), -rate * y[0] * y[1]])
        z = jnp.array([[1.0, 1.0], [1000.0, 1.0]])
        y1 = jaxode.solve(
            f, z, 0.0, 1.0, rate, batch="per_sample", adjoint=jaxode.BacksolveAdjoint(),
            throw=False,
        ).y1  # fmt: skip
        return jnp.sum(jnp.where(keep[:, None], y1, 0.0))

    run = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(run(1.0, jnp.array([True, False])), -np.exp(-1.0), rtol=1e-3)
    assert jnp.isnan(run(1.0, jnp.array([True, True])))


def test_a_rejected_step_of_a_row_does_not_reach_the_gradient_that_rows_share():
    """Backwards in time a first try goes below zero, where the root is NaN, and is rejected."""

    def loss(rate):
        f = lambda t, y, rate: rate * jnp.sqrt(y)
        return jaxode.solve(
            f, jnp.array([[0.1], [3.0]]), 0.0, 5.0, rate, batch="per_sample", rtol=1e-3, atol=1e-3,
            adjoint=jaxode.BacksolveAdjoint(),
        ).y1.sum()  # fmt: skip

    # y1 = (sqrt(y0) + 5 rate / 2)^2, to the tolerance of 1e-3.
    expected = 5 * (np.sqrt([0.1, 3.0]) + 2.5).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(1.0), expected, rtol=1e-2)


X = jnp.array([[0.3, -0.2], [0.1, 0.5], [0.7, 0.2], [-0.4, 0.9], [0.2, 0.1]])
CONTEXT = jnp.array([[1.0], [0.5], [0.2], [0.1], [0.3]])
WEIGHTS = jnp.array([1.0, 2.0, 1.0, 0.0, 0.0])
PARAMS = {"w": jnp.array([[0.3, -0.2], [0.5, 0.1]]), "base": jaxode.diagonal_normal(2)}
LOSSES = [name for name in REVERSE if METHODS[name].masks]


@pytest.mark.parametrize("name", with_slow(LOSSES, LOSSES[1:]))
def test_failed_samples_of_weight_zero_add_nothing_to_nll(name):
    """One has data that is NaN, one such a context."""

    def f(t, z, args):
        w, context = args
        return jnp.tanh(w @ z + context) * jnp.sqrt(jnp.sum(z * z) + 0.1)

    def loss(params, x, context, weights, t1):
        flow = jaxode.cnf(
            f, params["base"], t1=t1, batch="per_sample",
            divergence=jaxode.divergence.hutchinson(),
            regularizers=(jaxode.regularizers.kinetic_energy(0.1),), **METHODS[name].options(),
        )  # fmt: skip
        return flow.nll_and_stats(
            params["w"], x, key=jax.random.key(1), context=context, weights=weights
        )

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))
    bad = X.at[3].set(jnp.nan), CONTEXT.at[4].set(jnp.nan)
    (value, stats), actual = run(PARAMS, *bad, WEIGHTS, 1.0)
    (expected_value, _), expected = run(PARAMS, X, CONTEXT, WEIGHTS, 1.0)
    np.testing.assert_allclose(value, expected_value, rtol=1e-13)
    assert jnp.isnan(stats.log_prob).tolist() == [False, False, False, True, True]
    # The samples that failed have no weight, of which they know no derivative.
    of_others = lambda bars: (bars[0], bars[1], bars[2], bars[3][:3], bars[4])
    leaves = map(jax.tree.leaves, (of_others(actual), of_others(expected)))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    (value, _), lost = run(PARAMS, *bad, jnp.ones(5), 1.0)
    assert jnp.isnan(value)
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves((lost[0], lost[4])))


def exploding(**options):
    solution = lambda z: jaxode.solve(lambda t, y, _: y**2, z, 0.0, 1.0, max_steps=200, **options)
    return lambda z: jnp.sum(solution(z).ys if "ts" in options else solution(z).y1)


FLOW = jaxode.cnf(lambda t, z, p: -p * z**3, jaxode.standard_normal(1), max_steps=20, throw=True)
# (a function of rows of which one fails, how it is differentiated)
RAISING = {
    "grad": (exploding(), jax.grad),
    "jit(grad)": (exploding(), lambda f: jax.jit(jax.grad(f))),
    "jit(grad) of ts": (exploding(ts=TS), lambda f: jax.jit(jax.grad(f))),
    "jit(grad), per sample": (exploding(batch="per_sample"), lambda f: jax.jit(jax.grad(f))),
    "jit(grad) of vmap": (
        lambda z: jnp.sum(jax.vmap(exploding())(z)), lambda f: jax.jit(jax.grad(f)),
    ),
    "jit(vmap) of grad": (exploding(), lambda f: jax.jit(jax.vmap(jax.grad(f)))),
    "jit(grad) of scan": (
        lambda z: jnp.sum(jax.lax.scan(lambda c, y: (c, exploding()(y)), 0, z)[1]),
        lambda f: jax.jit(jax.grad(f)),
    ),
    **{
        f"jit({gradient(name).__name__}), {name}": (
            exploding(**METHODS[name].options()), lambda f, name=name: jax.jit(gradient(name)(f)),
        )
        for name in KINDS if name != "discrete"
    },
    "jit(grad), stiff": (exploding(solver=jaxode.Rodas5P()), lambda f: jax.jit(jax.grad(f))),
    "jit(grad) of nll": (lambda z: FLOW.nll(1.0, 30 * z), lambda f: jax.jit(jax.grad(f))),
    "jit(grad) of log_prob": (
        lambda z: FLOW.log_prob(1.0, 30 * z).sum(), lambda f: jax.jit(jax.grad(f)),
    ),
}  # fmt: skip


# Programs around a solve of which there are others: of outputs, of rows, and of densities.
SLOW = {
    "jit(grad), stiff", "jit(grad) of ts", "jit(grad) of scan", "jit(grad) of vmap",
    "jit(grad) of log_prob", "jit(vmap) of grad",
    "jit(grad), per sample", "jit(jacfwd), forward", "grad",
}  # fmt: skip


@pytest.mark.parametrize("case", with_slow(RAISING, SLOW))
def test_failed_solve_raises_where_its_derivative_alone_is_used(case):
    run, differentiate = RAISING[case]
    with pytest.raises(
        (jaxode.SolveError, jax.errors.JaxRuntimeError), match=r"(solve|nll|prob): the"
    ):
        jax.block_until_ready(differentiate(run)(jnp.array([[0.1], [2.0]])))


@jax.custom_jvp
def product_with_jvp(A, y):
    return A @ y


@product_with_jvp.defjvp
def _product_jvp(primals, tangents):
    (A, y), (dA, dy) = primals, tangents
    # By the function itself, whose rule then also gives the second derivatives.
    return product_with_jvp(A, y), product_with_jvp(A, dy) + dA @ y


@jax.custom_vjp
def product_with_vjp(A, y):
    return A @ y


product_with_vjp.defvjp(
    lambda A, y: (A @ y, (A, y)),
    lambda inputs, bar: (bar[:, None] @ inputs[1][None], inputs[0].T @ bar),
)


def in_branch(product):
    """In inner programs: those of `jit` and `cond`."""
    choose = lambda A, y: jax.lax.cond(y[0] > 0, product, lambda A, y: y, A, y)
    return jax.jit(choose)


def derivative(product, name, again=None):
    def loss(A, y0):
        f = lambda t, y, A: product(A, y)
        return jaxode.solve(f, y0, 0.0, 1.0, A, **METHODS[name].options(throw=False)).y1.sum()

    first = gradient(name)(loss, (0, 1))
    return first if again is None else again(first, (0, 1))


def of_nll(product):
    flow = jaxode.cnf(
        lambda t, z, A: product(A, z), jaxode.standard_normal(2),
        divergence=jaxode.divergence.exact(),
    )  # fmt: skip
    return jax.value_and_grad(lambda A, y: flow.nll(A, y[None]), (0, 1))


def of_jump(A, y0):
    jumps = jaxode.Jumps(jnp.array([0.5]), lambda t, y, A, i: product_with_vjp(A, y))
    return jaxode.solve(lambda t, y, A: y, y0, 0.0, 1.0, A, jumps=jumps, throw=False).y1.sum()


def of_event(A, y0):
    event = jaxode.Event(lambda t, y, A: product_with_jvp(A, y)[0] - 1.5)
    return jaxode.solve(lambda t, y, A: y, y0, 0.0, 1.0, A, event=event, throw=False).t1


def by_either(A, y):
    return product_with_vjp(A, y) + product_with_jvp(A, y)


PRODUCTS = {
    # Both kinds of rules, where a method takes both.
    **{f"both, {name}": derivative(by_either, name) for name in REVERSE},
    **{f"jvp, {name}": derivative(product_with_jvp, name) for name in KINDS if name not in REVERSE},
    "vjp in a branch": derivative(in_branch(product_with_vjp), "discrete"),
    "jvp in a branch": derivative(in_branch(product_with_jvp), "forward"),
    **{
        f"jvp, {again.__name__} of {name}": derivative(product_with_jvp, name, again)
        for name, again in AGAIN
        if again is not jax.jacrev
    },
    "both, jacrev of backsolve": derivative(by_either, "backsolve", jax.jacrev),
    "nll": of_nll(product_with_jvp),
    "the change at a jump": jax.grad(of_jump, (0, 1)),
    "the condition for an event": jax.grad(of_event, (0, 1)),
    "vmap": jax.vmap(derivative(product_with_vjp, "discrete"), (None, 0)),
}


SLOW_PRODUCTS = [case for case in PRODUCTS if " of " in case]


@pytest.mark.parametrize("case", with_slow(PRODUCTS, SLOW_PRODUCTS))
def test_products_in_rules_of_differentiation_run_at_full_precision(case):
    y0 = jnp.ones((3, 2)) if case == "vmap" else jnp.ones(2)
    program = jax.jit(PRODUCTS[case]).lower(jnp.eye(2), y0).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > (7 if "both" in case else 3)
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []


def tangent_of_rate(**options):
    run = lambda y0, rate: (
        jaxode.solve(lambda t, y, r: -r * y, y0, 0.0, 1.0, rate, throw=False, **options).y1
    )
    return lambda y0: jax.jvp(lambda rate: run(y0, rate), (1.0,), (1.0,))[1]


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", [name for name in KINDS if not METHODS[name].jvp])
def test_forward_mode_names_the_cure_where_the_tangent_has_no_batch(name, compile_):
    """Only the state is mapped: `vmap` does not change the tangent."""
    run = compile_(jax.vmap(tangent_of_rate(**METHODS[name].options())))
    with pytest.raises(TypeError, match=r"Use adjoint=jaxode\.ForwardMode\(\)"):
        run(jnp.ones((3, 2)))
