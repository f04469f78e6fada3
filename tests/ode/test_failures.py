"""Every failed solve says so: which way it failed, where, and what to change."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AT_RUN_TIME, METHODS, REVERSE, with_slow

import jaxode
from jaxode.nn import MLP
from jaxode.ode.field import check_field
from jaxode.ode.options import SolveOptions


def decay(t, y, args):
    return -y


def solve(f=decay, y0=jnp.ones(2), t1=2.0, **options):
    return jaxode.solve(f, y0, 0.0, t1, **options)


def blow_up(t, y, args):
    return y**2  # reaches infinity at t = 1 / y0


def overflow(t, y, args):
    return 1000 * y  # e^709 is the largest number of double precision


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
    (overflow, {}, 3, r"the vector field or the state is not finite at t=0\.70\d*\. Check"),
    # A stiff solver does not recommend itself. For steps that run out, see `test_stiff.py`.
    (
        blow_up, {"solver": jaxode.Rodas5P()}, 2,
        r"the step size fell below the resolution of the time at t=1\.00001\. Loosen .* vector "
        r"field\.$",
    ),
]  # fmt: skip
IDS = ["max_steps", "underflow", "nan", "nan and few steps", "nan with fixed steps"]
IDS += ["overflow", "underflow, stiff"]


# The same in all eager solves, which then share their programs.
TS = jnp.array([0.1, 2.0])


@pytest.mark.parametrize(("f", "options", "code", "message"), FAILURES, ids=IDS)
def test_a_failed_solve_raises_or_is_nan_with_a_code(f, options, code, message):
    with pytest.raises(jaxode.SolveError, match="^solve: " + message):
        solve(f, ts=TS, **options)
    solution = solve(f, throw=False, ts=TS, **options)
    assert int(solution.result) == code
    assert not solution.ok
    assert jnp.isnan(solution.y1).all()
    assert jnp.isnan(solution.ys).all()
    assert 0 <= solution.t_reached < 1.1


def ends(y0):
    return solve(y0=y0, max_steps=2).y1


def explodes(y0):
    return solve(blow_up, y0).y1


def between(y0):
    return solve(y0=y0, max_steps=2, dense=True).evaluate(0.01)


def time_of_event(y0):
    return solve(nan_after, y0, event=jaxode.Event(lambda t, y, _: y[0] - 0.1)).t1


COMPILED = [
    (jax.jit, ends, "the steps ran out"),
    # The message is put together from the codes of all rows, whichever these are.
    (jax.vmap, ends, "the steps ran out"),
    (lambda f: jax.jit(jax.vmap(f)), explodes, "the step size fell below"),
    # All that a program uses.
    (jax.jit, between, "the steps ran out"),
    (jax.jit, time_of_event, "the vector field or the state is not finite"),
]


@pytest.mark.parametrize(
    ("transform", "run", "message"),
    with_slow(COMPILED, COMPILED[2:4]),  # reported as by the others
)
def test_a_failed_solve_raises_when_compiled(transform, run, message):
    y0 = jnp.ones((3, 2)) if transform is not jax.jit else jnp.ones(2)
    with pytest.raises(AT_RUN_TIME, match="SolveError: solve: " + message):
        jax.block_until_ready(transform(run)(y0))


@pytest.mark.parametrize(
    ("size", "rtol", "atol"), [(1.0, 1e-20, 0.0), (1e30, 0.0, 1e-5)], ids=["rtol", "atol"]
)
def test_a_tolerance_out_of_reach_is_not_taken_for_a_field_that_is_not_finite(size, rtol, atol):
    """In float32, where the square of such an error is not finite."""
    y0 = jnp.full(2, size, jnp.float32)
    solution = solve(y0=y0, rtol=rtol, atol=atol, throw=False)
    assert solution.result == jaxode.Result.MAX_STEPS_REACHED


@pytest.mark.parametrize("name", REVERSE)
def test_the_gradient_of_a_failed_row_is_no_number(name):
    """Also where its cotangent is one."""
    options = METHODS[name].options(max_steps=64, throw=False)
    end = lambda y0, rate: jaxode.flow(
        lambda t, y, rate: rate * y**2, y0, 0.0, 1.0, rate, batch="per_sample", **options
    ).sum()
    by_start, by_rate = jax.jit(jax.grad(end, (0, 1)))(jnp.array([[0.1], [2.0]]), 1.0)
    assert jnp.isnan(by_start[:, 0]).tolist() == [False, True]
    assert jnp.isnan(by_rate)


def test_failed_rows_are_named():
    z = jnp.array([[0.1], [2.0], [0.2], [5.0]])
    with pytest.raises(
        jaxode.SolveError,
        match=r"^flow: the step size fell below .* at t=0\.500003 in 2 of 4 rows, first in row 1\.",
    ):
        jaxode.flow(blow_up, z, 0.0, 1.0, batch="per_sample")


@pytest.mark.slow  # `tests/flows/test_bad_data.py` has others
def test_training_loss_of_a_failed_solve():
    """At once when it runs outside jit, and NaN under jit."""
    flow = jaxode.cnf(lambda t, z, p: -p * z**3, jaxode.standard_normal(2), max_steps=5)
    x = jnp.full((4, 2), 3.0)
    with pytest.raises(jaxode.SolveError, match=r"^nll: the steps ran out at t="):
        flow.nll(1.0, x)
    values = jax.jit(jax.value_and_grad(flow.nll, (0, 1)))(1.0, x)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(values))


def test_compiled_training_step_has_no_host_callback():
    """So that it can be stored in the persistent compilation cache."""

    def lowered(**options):
        flow = jaxode.cnf(lambda t, z, p: -z, jaxode.standard_normal(2), **options)
        step = jax.jit(jax.value_and_grad(flow.nll, argnums=1))
        return step.lower(None, jnp.ones((4, 2))).as_text()

    assert "callback(" not in lowered()
    assert "callback(" in lowered(throw=True)


def with_numpy(t, y, args):
    return np.sin(y)


def with_several(t, y, args):
    return np.pi * np.linalg.norm(y) * y


def with_a_table(t, y, args):
    return np.arange(3.0)[jnp.int32(t)] * y


def with_a_branch(t, y, args):
    if t > 0.5:
        return y
    return -y


def with_a_number(t, y, args):
    return -float(t) * y


def with_math(t, y, args):
    return math.cos(t) * y


def with_an_index(t, y, args):
    return [y, -y][jnp.int32(t)]


UNTRACEABLE = {
    with_numpy: ("uses NumPy on", "return np.sin(y)", "Write jnp.sin for np.sin."),
    with_several: ("uses NumPy on", "return np.pi", "Write jnp.linalg.norm for np.linalg.norm."),
    with_a_table: ("uses NumPy on", "return np.arange(3.0)", "Write jnp"),
    with_a_branch: ("branches on", "if t > 0.5:", "Write jnp.where"),
    with_a_number: ("makes a number of Python of", "return -float(t) * y", "Leave float"),
    with_math: ("uses math on", "return math.cos(t) * y", "Write jnp.cos for math.cos."),
    with_an_index: ("counts or indexes by", "return [y, -y]", "Index an array of jnp"),
}


@pytest.mark.parametrize("f", UNTRACEABLE)
def test_what_jax_cannot_trace_is_told_with_its_line(f):
    does, line, cure = UNTRACEABLE[f]
    number = f.__code__.co_firstlineno + 1
    place = f"in line {number} of {__file__}: `{line}"
    told = re.escape(f"solve: f {does} an array that JAX traces, {place}") + ".*" + re.escape(cure)
    with pytest.raises(TypeError, match=told) as info:
        solve(f)
    assert isinstance(info.value.__cause__, jax.errors.JAXTypeError | jax.errors.JAXIndexError)


def test_a_condition_that_jax_cannot_trace_is_told():
    with pytest.raises(
        TypeError, match=r"^solve: condition uses NumPy on .* `lambda|Write jnp.sin"
    ):
        solve(event=jaxode.Event(lambda t, y, _: np.sin(y[0])))


@functools.wraps(lambda y, t, args: y)
def adapted(t, y, args):
    return y


KEPT = [
    adapted, lambda x, y, args: y,
    lambda t, t0, args: t0, lambda a, t, args: t, lambda *args: args[1],
    functools.partial(lambda y, t, state: state, 1.0), MLP(1, (2,), key=jax.random.key(0)), jnp.add,
]  # fmt: skip


@pytest.mark.parametrize("f", KEPT)
def test_other_names_of_time_and_state_are_kept(f):
    check_field("f", f, "f(t, y, args)")


def test_a_tolerance_below_roundings_is_told():
    options = SolveOptions.make(rtol=1e-8)
    (single, double), code = map(options.remedies, map(np.dtype, ("f4", "f8"))), 1
    told = "rtol=1e-08 is below a few roundings of float32, 1.2e-07: use float64, by jax.config.upd"
    assert single[code].startswith(told)
    assert "or raise it to 1e-06. Otherwise: Raise max_steps" in single[code]
    assert not double
    with pytest.raises(jaxode.SolveError, match=r"steps ran out .*rtol=1e-08 is below a few"):
        solve(y0=jnp.ones(2, jnp.float32), max_steps=2, rtol=1e-8)
