"""Every failed solve says so: which way it failed, where, and what to change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode


def decay(t, y, args):
    return -y


def solve(f=decay, y0=jnp.ones(2), t0=0.0, t1=1.0, **options):
    return jaxode.solve(f, y0, t0, t1, **options)


def blow_up(t, y, args):
    return y**2  # reaches infinity at t = 1 / y0


def nan_after(t, y, args):
    return jnp.where(t > 0.5, jnp.nan, -y)


def nan_always(t, y, args):
    return jnp.nan * y


STIFF = r"If the problem is stiff, use solver=jaxode\.Rodas5P\(\)\.$"
# (vector field, options, code, start of the message). The times are where the mathematics fails.
FAILURES = [
    (
        decay, {"max_steps": 2}, 1,
        rf"the steps ran out at t=0\.\d+\. Raise max_steps, .*\. {STIFF}",
    ),
    (
        blow_up, {}, 2,
        rf"the step size fell below the resolution of the time at t=1\.00001\. Loosen.*\. {STIFF}",
    ),
    (nan_after, {}, 3, r"the vector field or the state is not finite at t=0\.5\. Check the vector"),
    (
        nan_always, {"max_steps": 16}, 3,
        r"the vector field or the state is not finite at t=0\. Check the vector",
    ),
    (
        nan_after, {"steps": 8}, 3,
        r"the vector field or the state is not finite at t=0\.5\. Check the vector",
    ),
    # A stiff solver does not recommend itself. For steps that run out, see `test_stiff.py`.
    (
        blow_up, {"solver": jaxode.Rodas5P()}, 2,
        r"the step size fell below the resolution of the time at t=1\.00001\. Loosen .* vector "
        r"field\.$",
    ),
]  # fmt: skip
IDS = ["max_steps", "underflow", "nan", "nan and few steps", "nan with fixed steps"]
IDS += ["underflow, stiff"]


# The same in all eager solves, which then share their programs.
TS = jnp.array([0.1, 2.0])


@pytest.mark.parametrize(("f", "options", "code", "message"), FAILURES, ids=IDS)
def test_failed_solve_raises(f, options, code, message):
    del code
    with pytest.raises(jaxode.SolveError, match="^solve: " + message):
        solve(f, t1=2.0, ts=TS, **options)


COMPILED = [(jax.jit, *row) for row in FAILURES[:3]]
# The message is put together from the codes of all rows, whichever these are.
COMPILED += [(jax.vmap, *FAILURES[0]), (lambda f: jax.jit(jax.vmap(f)), *FAILURES[1])]


@pytest.mark.parametrize(
    ("transform", "f", "options", "code", "message"), COMPILED,
    ids=[*IDS[:3], "vmap", "jit of vmap"],
)  # fmt: skip
def test_failed_solve_raises_when_compiled(transform, f, options, code, message):
    del code
    run = transform(lambda y0: solve(f, y0, t1=2.0, **options).y1)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="SolveError: solve: " + message.split(r" at")[0]
    ):
        jax.block_until_ready(run(jnp.ones((3, 2))))


@pytest.mark.parametrize(("f", "options", "code", "message"), FAILURES, ids=IDS)
def test_failed_solve_without_throw_is_nan_with_a_code(f, options, code, message):
    del message
    solution = solve(f, t1=2.0, throw=False, ts=TS, **options)
    assert int(solution.result) == code
    assert not solution.ok
    assert jnp.isnan(solution.y1).all()
    assert jnp.isnan(solution.ys).all()
    assert 0 <= solution.t_reached < 1.1


@pytest.mark.parametrize(
    ("size", "rtol", "atol"), [(1.0, 1e-20, 0.0), (1e30, 0.0, 1e-5)], ids=["rtol", "atol"]
)
def test_a_tolerance_out_of_reach_is_not_taken_for_a_field_that_is_not_finite(size, rtol, atol):
    """In float32, where the square of such an error is not finite."""
    y0 = jnp.full(2, size, jnp.float32)
    solution = solve(y0=y0, rtol=rtol, atol=atol, throw=False)
    assert solution.result == jaxode.Result.MAX_STEPS_REACHED


def test_failed_rows_are_named():
    z = jnp.array([[0.1], [2.0], [0.2], [5.0]])
    with pytest.raises(
        jaxode.SolveError,
        match=r"^flow: the step size fell below .* at t=0\.500003 in 2 of 4 rows, first in row 1\.",
    ):
        jaxode.flow(blow_up, z, 0.0, 1.0, batch="per_sample")


@pytest.mark.slow
def test_training_loss_of_a_failed_solve():
    """At once when it runs outside jit, NaN under jit, and an error there with throw=True."""
    unstable = lambda t, z, p: -p * z**3
    make = lambda **options: jaxode.cnf(
        unstable, jaxode.standard_normal(2), max_steps=50, **options
    )
    x = jnp.full((4, 2), 3.0)
    with pytest.raises(jaxode.SolveError, match=r"^nll: the steps ran out at t="):
        make().nll(1.0, x)
    loss, gradients = jax.jit(jax.value_and_grad(make().nll, (0, 1)))(1.0, x)
    assert np.isnan(loss)
    assert all(np.isnan(gradient).all() for gradient in gradients)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="SolveError: nll: the steps ran out at t="
    ):
        jax.block_until_ready(jax.jit(jax.value_and_grad(make(throw=True).nll))(1.0, x))
    assert np.isnan(make(throw=False).nll(1.0, x))
    with pytest.raises(jaxode.SolveError, match=r"^log_prob: the steps ran out at t="):
        make().log_prob(1.0, x)


def test_compiled_training_step_has_no_host_callback():
    """So that it can be stored in the persistent compilation cache."""

    def lowered(**options):
        flow = jaxode.cnf(lambda t, z, p: -z, jaxode.standard_normal(2), **options)
        step = jax.jit(jax.value_and_grad(flow.nll, argnums=1))
        return step.lower(None, jnp.ones((4, 2))).as_text()

    assert "callback(" not in lowered()
    assert "callback(" in lowered(throw=True)
