"""Gradients of solves that fail: masked rows add nothing, and what is used raises or is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, gradient, with_slow

import jaxode

TS = jnp.array([0.3, 0.8])
# The first explodes at about t = 0.4, the next two fail at once.
BAD = jnp.array([[2.0], [jnp.nan], [jnp.inf], [0.1], [0.2]])
GOOD = jnp.where(jnp.arange(5)[:, None] < 3, 0.15, BAD)
KEEP = jnp.arange(5) >= 3


def explosive(t, y, args):
    rate, shift = args
    return rate * jnp.exp(-0.1 * t) * y**2 * jnp.sqrt(jnp.abs(y) + shift)


def masked(name, way):
    """A loss of the rows to `keep`, by all that a solve depends on."""

    def loss(inputs, keep):
        z, t0, t1, ts, args, scale = inputs
        f = lambda t, y, args: scale * explosive(t, y, args)
        options = METHODS[name].options(ts=ts, throw=False, max_steps=200)
        if way == "vmap":
            solution = jax.vmap(lambda y: jaxode.solve(f, y, t0, t1, args, **options))(z)
            ys = jnp.moveaxis(solution.ys, 1, 0)
        else:
            solver = {"solver": jaxode.Rodas5P()} if way == "stiff" else {}
            batch = "joint" if way == "joint" else "per_sample"
            solution = jaxode.solve(f, z, t0, t1, args, batch=batch, **options, **solver)
            ys = solution.ys
        kept = lambda x: jnp.where(keep[:, None], x, 0.0)
        return jnp.sum(kept(solution.y1) ** 2) + jnp.sum(kept(ys) ** 3)

    return loss, lambda z: (z, 0.0, 1.0, TS, (jnp.array(1.0), jnp.array(0.1)), jnp.array(1.1))


# `vmap` is rows of one solve.
MASKED = [
    *((name, "per_sample") for name in ("discrete", "backsolve", "forward")),
    *(("discrete", "vmap"), ("discrete", "stiff"), ("discrete", "joint"), ("backsolve", "joint")),
]


ONLY_HERE = [("discrete", "per_sample"), ("backsolve", "per_sample"), ("discrete", "joint")]
ELSEWHERE = [case for case in MASKED if case not in ONLY_HERE]


@pytest.mark.parametrize(("name", "way"), with_slow(MASKED, ELSEWHERE))  # in `test_features.py`
def test_failed_rows_that_are_masked_add_nothing_to_any_gradient(name, way):
    loss, inputs = masked(name, way)
    run = jax.jit(gradient(name)(loss))
    lost = run(inputs(BAD), jnp.ones(5, bool))
    assert jnp.isnan(lost[0])[:3].all()
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(lost[1:]))
    keep = KEEP & (way != "joint")  # with joint steps all rows fail together
    actual, expected = run(inputs(BAD), keep), run(inputs(GOOD), keep)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # The rows that are left take the same steps: equal up to the order of sums.
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(actual[0][:3], 0.0)


X = jnp.array([[0.3, -0.2], [0.1, 0.5], [0.7, 0.2], [-0.4, 0.9]])
CONTEXT, WEIGHTS = jnp.array([[1.0], [0.5], [0.2], [0.1]]), jnp.array([1.0, 2.0, 0.0, 0.0])
PARAMS = {"w": jnp.array([[0.3, -0.2], [0.5, 0.1]]), "base": jaxode.diagonal_normal(2)}


def nll(params, t1, x, context, weights):
    f = lambda t, z, args: jnp.tanh(args[0] @ z + args[1]) * jnp.sqrt(jnp.sum(z * z) + 0.1)
    flow = jaxode.cnf(
        f, params["base"], t1=t1, batch="per_sample", divergence=jaxode.divergence.hutchinson(),
        regularizers=(jaxode.regularizers.kinetic_energy(0.1),),
    )  # fmt: skip
    options = {"key": jax.random.key(1), "context": context, "weights": weights}
    return flow.nll_and_stats(params["w"], x, **options)


def test_failed_samples_of_weight_zero_add_nothing_to_nll():
    """One has data that is NaN, one such a context."""
    run = jax.jit(jax.value_and_grad(nll, (0, 1, 2, 3), has_aux=True))
    bad = X.at[2].set(jnp.nan), CONTEXT.at[3].set(jnp.nan)
    (value, stats), actual = run(PARAMS, 1.0, *bad, WEIGHTS)
    (expected_value, _), expected = run(PARAMS, 1.0, X, CONTEXT, WEIGHTS)
    np.testing.assert_allclose(value, expected_value, rtol=1e-13)
    assert jnp.isnan(stats.log_prob).tolist() == [False, False, True, True]
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    (value, _), lost = run(PARAMS, 1.0, *bad, jnp.ones(4))
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves((value, lost[:2])))


def exploding(**options):
    solution = lambda z: jaxode.solve(lambda t, y, _: y**2, z, 0.0, 1.0, max_steps=200, **options)
    return lambda z: jnp.sum(solution(z).ys if "ts" in options else solution(z).y1)


FLOW = jaxode.cnf(lambda t, z, p: -p * z**3, jaxode.standard_normal(1), max_steps=20, throw=True)
compiled_gradient = lambda f: jax.jit(jax.grad(f))
# (a function of rows of which one fails, how it is differentiated)
RAISING = {
    "grad": (exploding(), jax.grad),
    "jit(grad) of ts, per sample": (exploding(ts=TS, batch="per_sample"), compiled_gradient),
    "jit(grad) of vmap": (lambda z: jnp.sum(jax.vmap(exploding())(z)), compiled_gradient),
    "jit(grad), backsolve": (exploding(adjoint=jaxode.BacksolveAdjoint()), compiled_gradient),
    "jit(jacfwd), forward": (
        exploding(adjoint=jaxode.ForwardMode()), lambda f: jax.jit(jax.jacfwd(f)),
    ),
    "jit(grad) of nll": (lambda z: FLOW.nll(1.0, 30 * z), compiled_gradient),
}  # fmt: skip


LARGER = ["jit(grad) of vmap", "jit(grad) of nll", "jit(jacfwd), forward"]


@pytest.mark.parametrize("case", with_slow(RAISING, LARGER))  # report as the others
def test_failed_solve_raises_where_its_derivative_alone_is_used(case):
    run, differentiate = RAISING[case]
    with pytest.raises(
        (jaxode.SolveError, jax.errors.JaxRuntimeError), match=r"(solve|nll|prob): the"
    ):
        jax.block_until_ready(differentiate(run)(jnp.array([[0.1], [2.0]])))
