"""Arguments that are known only at run time keep the same rules, and a failure names its cause."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AT_RUN_TIME, with_slow

import jaxode
from jaxode import Result

Y0 = jnp.ones(2, jnp.float32)


def decay(t, y, args):
    return -y


def solve(given, y0=Y0, f=decay, **options):
    return jaxode.solve(f, y0, args=None, **given, **options)


GOOD = {
    "t0": 0.0, "t1": 1.0, "ts": np.array([0.2, 0.5, 0.8]), "rtol": 1e-3, "atol": 1e-3,
    "first_step": 0.1, "max_step": 0.5,
}  # fmt: skip
FAR = 1e8 + np.array([1.0, 2.0, 3.0])  # In float32, times there are 8 apart.

# (the argument to be named, what differs from GOOD), with a state in float32 and times in float64.
BROKEN = [
    ("t0", {"t0": np.nan}),
    ("t1", {"t1": np.inf}),
    ("t1", {"t0": 1e9, "t1": 1e9 + 1, "ts": 1e9 + GOOD["ts"]}),
    ("ts", {"t0": 1e8, "t1": 1e8 + 16, "ts": FAR}),
    ("ts", {"t0": 1e8, "t1": 1e8 + 8000, "ts": FAR}),
    ("ts", {"t0": 0.0, "t1": 1.0, "ts": np.array([0.5, 0.2, 0.8])}),
    ("ts", {"t0": 0.0, "t1": -1.0}),
    ("ts", {"t1": 0.7}),
    ("ts", {"ts": np.array([0.2, np.nan, 0.8])}),
    *(("rtol", {"rtol": value}) for value in (np.nan, -1e-3, np.inf)),
    *(("atol", {"atol": value}) for value in (np.nan, -1e-3, np.inf)),
    ("rtol", {"rtol": 0.0, "atol": 0.0}),
    ("atol", {"rtol": 0.0, "atol": 1e-60}),
    *(("first_step", {"first_step": value}) for value in (np.nan, -0.1, 0.0, np.inf)),
    *(("max_step", {"max_step": value}) for value in (np.nan, -0.1, 0.0, np.inf)),
]
# What looks alike and is right.
KEPT = [
    {},
    {"t1": -1.0, "ts": -GOOD["ts"]},
    {"t0": 100.0, "t1": 101.0, "ts": 100 + GOOD["ts"]},
    {"ts": np.array([0.5, 1 - 1e-9, 1.0])},
    {"t1": 0.0, "ts": np.zeros(3)},
    {"rtol": 0.0},
    {"atol": 0.0},
]


def values(changes):
    return {name: np.asarray(value) for name, value in (GOOD | changes).items()}


def quiet(given):
    return solve(given, throw=False)


RUN = jax.jit(quiet)
RUN_TWO = jax.vmap(quiet)
RUN_LOUD = jax.jit(lambda given: solve(given).y1)
RUN_TWO_LOUD = jax.jit(jax.vmap(lambda given: solve(given).y1))
GRADIENT = jax.jit(jax.grad(lambda y0, given: solve(given, y0, throw=False).y1.sum()))
GRADIENT_LOUD = jax.jit(jax.grad(lambda y0, given: solve(given, y0).y1.sum()))


def raises(argument, run, *inputs):
    with pytest.raises(AT_RUN_TIME, match=rf"SolveError: solve\([^)]*{argument}="):
        jax.block_until_ready(run(*inputs))


def eager(given, argument):
    with pytest.raises(ValueError, match=rf"^solve\([^)]*{argument}="):
        solve({name: v if v.ndim else float(v) for name, v in given.items()})


def jitted(given, argument):
    solution = RUN(given)
    assert solution.result == Result.INVALID_ARGUMENT
    assert solution.stats.num_steps == 0
    assert jnp.isnan(solution.y1).all()
    assert jnp.isnan(solution.ys).all()
    raises(argument, RUN_LOUD, given)


def vmapped(given, argument):
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), values({}), given)
    solution = RUN_TWO(both)
    np.testing.assert_array_equal(solution.result, [Result.SUCCESS, Result.INVALID_ARGUMENT])
    # 1e-2: ten times the tolerance.
    np.testing.assert_allclose(solution.y1[0], np.exp(-1.0), rtol=1e-2)
    assert jnp.isnan(solution.y1[1]).all()
    raises(argument, RUN_TWO_LOUD, both)


def differentiated(given, argument):
    assert jnp.isnan(GRADIENT(Y0, given)).all()
    raises(argument, GRADIENT_LOUD, Y0, given)


@pytest.mark.parametrize("check", [eager, jitted])
@pytest.mark.parametrize(("argument", "changes"), BROKEN, ids=str)
def test_a_broken_rule_is_named(check, argument, changes):
    check(values(changes), argument)


# One rule for each argument: all ways evaluate the same ones.
@pytest.mark.parametrize("check", [vmapped, differentiated])
@pytest.mark.parametrize(("argument", "changes"), dict(BROKEN).items(), ids=str)
def test_a_broken_rule_is_named_in_every_way_to_solve(check, argument, changes):
    check(values(changes), argument)


@pytest.mark.parametrize("run", [quiet, RUN], ids=["eager", "jit"])
@pytest.mark.parametrize("changes", KEPT, ids=str)
def test_what_keeps_the_rules_is_solved(run, changes):
    given = values(changes)
    solution = run(given)
    assert solution.ok
    # 1e-2: ten times the tolerance.
    expected = np.exp(-(given["ts"] - given["t0"]))
    np.testing.assert_allclose(solution.ys[:, 0], expected, rtol=1e-2)


@pytest.mark.parametrize("run", [GRADIENT, GRADIENT_LOUD], ids=["quiet", "loud"])
def test_what_keeps_the_rules_has_a_gradient(run):
    # 1e-2: ten times the tolerance.
    np.testing.assert_allclose(run(Y0, values({})), np.exp(-1.0), rtol=1e-2)


@pytest.mark.slow
def test_what_keeps_the_rules_does_not_raise():
    np.testing.assert_allclose(RUN_LOUD(values({})), np.exp(-1.0), rtol=1e-2)


ODEINT = jax.jit(lambda t, rtol: jaxode.odeint(lambda y, t: -y, Y0, t, rtol=rtol))


@pytest.mark.parametrize(
    ("t", "rtol"), [(1e9 + np.arange(3.0), 1e-3), (np.arange(3.0), np.inf), (FAR, 1e-3)], ids=str
)
def test_odeint_is_nan_where_a_rule_is_broken(t, rtol):
    assert jnp.isnan(ODEINT(t, rtol)).all()
    assert jnp.isfinite(ODEINT(np.arange(3.0), 1e-3)).all()


def test_a_tolerance_that_a_leaf_of_the_state_does_not_resolve():
    y0 = {"coarse": jnp.ones(1, jnp.float16), "fine": jnp.ones(1, jnp.float32)}
    f = lambda t, y, args: jax.tree.map(jnp.negative, y)
    run_with = partial(jaxode.solve, f, y0, 0.0, 1.0, throw=False)
    run = lambda tol: run_with(rtol=tol, atol=tol)
    with pytest.raises(ValueError, match=r"^solve\(rtol=1e-10, atol=1e-10\)"):
        run(1e-10)
    assert jax.jit(run)(1e-10).result == Result.INVALID_ARGUMENT
    assert jax.jit(run)(1e-5).ok
    # Each leaf resolves its own.
    of_each = lambda fine: run_with(rtol=0.0, atol={"coarse": 1e-3, "fine": fine})
    assert of_each(1e-9).ok
    assert jax.jit(of_each)(1e-9).ok
    assert jax.jit(of_each)(0.0).result == Result.INVALID_ARGUMENT
    with pytest.raises(ValueError, match=r"positive in float16, a dtype of the state\.$"):
        run_with(rtol=0.0, atol={"coarse": 1e-9, "fine": 1e-9})


def nan_after(t, y, way):
    """Is not finite beyond half the unit of time, in this direction."""
    return jnp.where(way * t > 0.5, jnp.nan, -way * y)


@pytest.mark.parametrize("max_steps", [5, 8, 10])
def test_steps_that_run_out_before_a_nan_are_not_the_cause(max_steps):
    options = {"throw": False, "max_steps": max_steps}
    for way in (1.0, -1.0):
        solution = jaxode.solve(nan_after, jnp.ones(1), 0.0, 2 * way, way, **options)
        assert solution.stats.num_steps == max_steps
        assert solution.result == Result.NON_FINITE


def test_a_nan_that_was_made_up_for_is_not_the_cause():
    """A first step that is far too long overshoots to where the field is not finite."""
    f = lambda t, y, args: jnp.where(y > 2, jnp.nan, -100 * y)
    options = {"first_step": 1.0, "rtol": 1e-10, "atol": 1e-10, "max_steps": 60, "throw": False}
    solution = jaxode.solve(f, jnp.ones(1), 0.0, 100.0, **options)
    assert solution.stats.num_rejected > 0
    assert solution.result == Result.MAX_STEPS_REACHED


def scaled(t, y, rate):
    return -rate * y


def end(y0, **options):
    return jaxode.solve(scaled, y0, 0.0, 1.0, 2.0, **options).y1.sum()


FLOW = jaxode.cnf(scaled, jaxode.standard_normal(2))
X = jnp.ones((3, 2))
FINITE = {
    "solve": lambda: end(jnp.ones(2)),
    "vmap": lambda: jax.vmap(end)(X),
    "gradient": lambda: jax.grad(end)(jnp.ones(2)),
    "vmap of gradient": lambda: jax.vmap(jax.grad(end))(X),
    "jit of vmap of gradient": lambda: jax.jit(jax.vmap(jax.grad(end)))(X),
    "backsolve": lambda: jax.grad(lambda y0: end(y0, adjoint=jaxode.BacksolveAdjoint()))(Y0),
    "nll": lambda: FLOW.nll(1.0, X),
    "gradient of nll": lambda: jax.grad(FLOW.nll)(1.0, X),
    "gradient of log_prob": lambda: jax.grad(lambda p: FLOW.log_prob(p, X).sum())(1.0),
}


@pytest.mark.parametrize(
    "name",
    with_slow(
        FINITE,
        [
            "vmap of gradient", "jit of vmap of gradient", "gradient of log_prob", "backsolve",
            "nll", "solve", "vmap",
        ],
    ),
)  # fmt: skip
def test_a_solve_that_succeeds_passes_under_debug_nans(name):
    with jax.debug_nans(True):
        assert jnp.isfinite(FINITE[name]()).all()


BAD_STATE = X.at[1, 0].set(jnp.nan)
OF_ROWS = r"must be finite; got NaN or inf in 1 of 3 rows, first in row 1\. Leave those rows out, "
OF_ONE = r"must be finite; got NaN or inf\. Fix its source\."
# (call of a state, the state, the message)
NOT_FINITE = {
    "solve": (lambda y0: end(y0), BAD_STATE, rf"solve\(y0=...\): {OF_ONE}"),
    "a tree": (
        lambda y0: jaxode.solve(lambda t, y, args: {"a": -y["a"]}, {"a": y0}, 0.0, 1.0).y1,
        BAD_STATE, rf"solve\(y0=...\): {OF_ONE}",
    ),
    "joint": (lambda y0: end(y0, batch="joint"), BAD_STATE, rf"solve\(y0=...\): {OF_ROWS}"),
    "per sample": (
        lambda y0: end(y0, batch="per_sample"), BAD_STATE, rf"solve\(y0=...\): {OF_ROWS}",
    ),
    "vmap": (
        jax.vmap(end), BAD_STATE,
        rf"solve\(y0=...\): {OF_ONE} This fails in 1 of 3 rows, first in row 1\.",
    ),
    "flow": (
        lambda z: jaxode.flow(scaled, z, 0.0, 1.0, 2.0), BAD_STATE, rf"flow\(z=...\): {OF_ROWS}",
    ),
    "a field": (
        lambda y0: jaxode.solve(lambda t, y, args: y / 0, y0, 0.0, 1.0).y1, X,
        "solve: the vector field or the state is not finite",
    ),
}  # fmt: skip


EAGER = lambda f: f
# Where the compiled program is that of another.
LIKE_OTHERS = ("a tree", "flow", "joint")
IN_BOTH = [(name, EAGER) for name in NOT_FINITE]
IN_BOTH += [(name, jax.jit) for name in NOT_FINITE if name not in LIKE_OTHERS]


@pytest.mark.parametrize(
    ("name", "compile"), IN_BOTH, ids=lambda x: {EAGER: "eager", jax.jit: "jit"}.get(x, x)
)
def test_a_state_that_is_not_finite_is_named(name, compile):
    call, state, message = NOT_FINITE[name]
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(compile(call)(state))


def test_a_program_that_has_run_before_says_the_same():
    run = jax.jit(lambda y0: jaxode.solve(lambda t, y, args: -y, y0, 0.0, 1.0).y1)
    bad, said = Y0.at[1].set(jnp.nan), rf"SolveError: solve\(y0=...\): {OF_ONE}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        jax.block_until_ready(run(bad))
    jax.block_until_ready(run(Y0))
    with pytest.raises(AT_RUN_TIME, match=said):
        jax.block_until_ready(run(bad))


def test_a_list_of_arrays_is_a_state():
    y1 = jaxode.solve(lambda t, y, args: [-y[0], -y[1]], [Y0, 2 * Y0], 0.0, 1.0).y1
    np.testing.assert_allclose(y1[1], 2 * np.exp(-1.0), rtol=1e-4)
