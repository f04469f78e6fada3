"""What is not finite: named where it comes from, told from other failures, and not made by us."""

import jax
import jax.numpy as jnp
import pytest
from helpers import AT_RUN_TIME, with_slow

import jaxode
from jaxode import Result

ONE, X = jnp.ones(2), jnp.ones((3, 2))


def decay(t, y, rate):
    return -rate * y


def end(y0, **options):
    return jaxode.solve(decay, y0, 0.0, 1.0, 2.0, **options).y1.sum()


@pytest.mark.parametrize("max_steps", with_slow([5, 8, 10], [8]))  # between the others
def test_steps_that_run_out_before_a_nan_are_not_the_cause(max_steps):
    f = lambda t, y, way: jnp.where(way * t > 0.5, jnp.nan, -way * y)
    for way in (1.0, -1.0):
        solution = jaxode.solve(
            f, jnp.ones(1), 0.0, 2 * way, way, throw=False, max_steps=max_steps
        )  # fmt: skip
        assert solution.stats.num_steps == max_steps
        assert solution.result == Result.NON_FINITE


def test_a_nan_that_was_made_up_for_is_not_the_cause():
    """A first step that is far too long overshoots to where the field is not finite."""
    f = lambda t, y, args: jnp.where(y > 2, jnp.nan, -100 * y)
    options = {"first_step": 1.0, "rtol": 1e-10, "atol": 1e-10, "max_steps": 60, "throw": False}
    solution = jaxode.solve(f, jnp.ones(1), 0.0, 100.0, **options)
    assert solution.stats.num_rejected > 0
    assert solution.result == Result.MAX_STEPS_REACHED


FLOW = jaxode.cnf(decay, jaxode.standard_normal(2))
FINITE = {
    "vmap of gradient": lambda: jax.vmap(jax.grad(end))(X),
    "backsolve": lambda: jax.grad(lambda y0: end(y0, adjoint=jaxode.BacksolveAdjoint()))(ONE),
    "gradient of nll": lambda: jax.grad(FLOW.nll)(1.0, X),
    "gradient of log_prob": lambda: jax.grad(lambda p: FLOW.log_prob(p, X).sum())(1.0),
}


@pytest.mark.parametrize("name", with_slow(FINITE, ["gradient of log_prob"]))  # as that of nll
def test_a_solve_that_succeeds_passes_under_debug_nans(name):
    with jax.debug_nans(True):
        assert jnp.isfinite(FINITE[name]()).all()


BAD = X.at[1, 0].set(jnp.nan)
OF_ROWS = r"must be finite; got NaN or inf in 1 of 3 rows, first in row 1\. Leave those rows out, "
OF_ONE = r"must be finite; got NaN or inf\. Fix its source\."
in_tree = lambda t, y, args: {"a": -y["a"]}
# A call of a state, and the message. That of one state is in the table of wrong inputs.
NOT_FINITE = {
    "a tree": (
        lambda y0: jaxode.solve(in_tree, {"a": y0}, 0.0, 1.0), rf"solve\(y0=...\): {OF_ONE}",
    ),
    "joint": (lambda y0: end(y0, batch="joint"), rf"solve\(y0=...\): {OF_ROWS}"),
    "per sample": (lambda y0: end(y0, batch="per_sample"), rf"solve\(y0=...\): {OF_ROWS}"),
    "vmap": (jax.vmap(end), rf"solve\(y0=...\): {OF_ONE} This fails in 1 of 3 rows, first in row"),
    "flow": (lambda z: jaxode.flow(decay, z, 0.0, 1.0, 2.0), rf"flow\(z=...\): {OF_ROWS}"),
    "a field": (
        lambda y0: jaxode.solve(lambda t, y, _: y / 0, ONE, 0.0, 1.0),
        "solve: the vector field or the state is not finite",
    ),
    "base": (
        lambda z: jaxode.cnf(
            decay, jaxode.flows.bases.DiagonalNormal(z[1], z[0])
        ).sample(2.0, jax.random.key(0), 3),
        r"cnf\(base=...\): must draw finite samples; got NaN or inf in 3 of 3 rows, first in row 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_state_that_is_not_finite_is_named(call, message):
    with pytest.raises((jaxode.SolveError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(call(BAD))


def test_a_program_that_has_run_before_says_the_same():
    run = jax.jit(lambda y0: jaxode.solve(lambda t, y, args: -y, y0, 0.0, 1.0).y1)
    bad, said = ONE.at[1].set(jnp.nan), rf"SolveError: solve\(y0=...\): {OF_ONE}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        jax.block_until_ready(run(bad))
    jax.block_until_ready(run(ONE))
    with pytest.raises(AT_RUN_TIME, match=said):
        jax.block_until_ready(run(bad))
