"""Each wrong input of the tables in `inputs` gets its sentence: function, argument and rule.

Outside of a program the value is known. In one it may be traced, and its shape or dtype breaks the
rule while the program is traced, or the value does when it runs.
"""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AT_RUN_TIME
from inputs import density, flows, ode, rules
from inputs.calls import OUTSIDE, USUAL, S, call
from inputs.values import VALUES

import jaxode
from jaxode._checks import rules as checks

ROWS = [
    (name, given, kind, words)
    for table in (ode.ROWS, flows.ROWS, density.ROWS)
    for (name, kind), rows in table.items()
    for given, words in rows
] + rules.ROWS


def start_of(name, given, words):
    """The start of a message, as a regular expression."""
    where = f"{name.split()[0]}({next(iter(given), '')}=...): "
    start = words[1:] if words.startswith("^") else where + words
    return re.escape(start).replace(r"\~", "(?s:.*)")


def raises(kind, start):
    return pytest.raises(kind, match=f"^{start}")


def total(tree):
    """The sum of all floating numbers, for a gradient."""
    return sum(jnp.sum(x) for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x))


def run(way, name, given):
    """The call, in a program with the arrays of the input and with a number as inputs."""
    arrays, others = eqx.partition(given, lambda x: isinstance(x, jax.Array))
    whole = lambda s, arrays: call(name, s, eqx.combine(arrays, others))
    if way != "all":
        return (jax.jit(whole) if way == "jit" else whole)(1.0, arrays)
    floats, rest = eqx.partition((jnp.ones(()), arrays), eqx.is_inexact_array)
    floats, rest = jax.tree.map(lambda x: jnp.stack([x, x]), (floats, rest))
    of_row = lambda floats, rest: whole(*eqx.combine(floats, rest))
    return jax.jit(jax.grad(lambda floats: total(jax.vmap(of_row)(floats, rest))))(floats)


def ways(name, given):
    """Eagerly, and in a program of all transformations."""
    if name.startswith(OUTSIDE) or "outside" in name:
        return ("eager",)
    if not any(value is S for value in USUAL.get(name, {}).values()):
        return ("eager", "jit")
    return ("eager", "all")


def once_each(rows, places):
    """Rows, of which those that repeat the entries at `places` are for the full suite alone."""
    known, marked = set(), []
    for row in rows:
        key = tuple(row[place] for place in places)
        repeats = "eager" not in key and key in known
        known.add(key)
        marks = [pytest.mark.slow] * repeats  # as eagerly, but traced
        marked.append(pytest.param(*row, marks=marks))
    return marked


def ids(x):
    return x[:60].replace("::", ":") if isinstance(x, str) else ""


@pytest.mark.parametrize(
    ("way", "name", "given", "kind", "words"),
    once_each([(way, *row) for row in ROWS for way in ways(*row[:2])], (0, 1)),
    ids=ids,
)
def test_what_is_wrong_is_told_while_a_call_is_traced(way, name, given, kind, words, request):
    if "float32" in name:
        request.getfixturevalue("default_settings")
    with raises(kind, start_of(name, given, words)):
        run(way, name, given)


@functools.cache
def program(name, way, throw):
    """The call of a row of `VALUES` with all inputs traced."""
    call = functools.partial(VALUES[name].run, throw=throw)
    if way == "vmap":
        return jax.jit(jax.vmap(lambda given: call(**given)))

    def gradient(given):
        floats, others = eqx.partition(given, eqx.is_inexact_array)
        return jax.grad(lambda floats: total(call(**eqx.combine(floats, others))))(floats)

    return jax.jit(gradient if way == "grad" else lambda given: call(**given))


def inputs(name, changes):
    """The good inputs with changes, in the dtypes of the good ones."""
    good = VALUES[name].good
    arrays = {name: x.astype(good[name].dtype) for name, x in changes.items() if np.ndim(x)}
    return good | changes | arrays


def given_to(program, name, way, changes):
    """Runs it with arrays, and under `jax.vmap` with good ones before those with the changes."""
    wrong = jax.tree.map(jnp.asarray, inputs(name, changes))
    if way == "vmap":
        wrong = jax.tree.map(lambda *both: jnp.stack(both), VALUES[name].good, wrong)
    return jax.block_until_ready(program(wrong))


OF_VALUES = [(name, *row) for name, values in VALUES.items() for row in values.rows]
IN_PROGRAMS = [(way, *row) for row in OF_VALUES for way in VALUES[row[0]].ways]
# In `make test`, one program for each way to tell, and one for each way to make no number. What is
# told of `x` and `context` outside of programs is told by the same code for these.
LIKE_LOG_PROB = ["log_prob_and_error", "to_base", "from_base", "sample", "sample_and_log_prob"]
TOLD = [("vmap", "nll"), *(("jit", name) for name in VALUES if name not in LIKE_LOG_PROB)]
MASKED = [("jit", name) for name in ("solve", "solve with jumps", "matching_loss", "log_prob")]
MASKED += [("vmap", "solve"), ("vmap", "nll"), ("grad", "nll")]


def with_fast(rows, programs):
    """Rows, of which those that begin with others than these are for the full suite alone."""
    start = len(programs[0])
    slow = lambda row: [pytest.mark.slow] * (row[:start] not in programs)  # the same checks
    return [pytest.param(*row, marks=slow(row)) for row in rows]


def in_batch(words, way):
    """The words with the numbers of the rows."""
    rows, before = (6, 3) if way == "vmap" else (3, 0)
    return words.format(rows=rows, at=range(before, 6))


AT_ONCE = [(name,) for name in VALUES if name not in LIKE_LOG_PROB[:-1]]


@pytest.mark.parametrize(
    ("name", "changes", "kind", "words", "start"), with_fast(OF_VALUES, AT_ONCE), ids=ids
)
def test_a_value_that_is_known_is_told_at_once(name, changes, kind, words, start):
    del start
    with raises(kind, start_of(name, changes, in_batch(words, "eager"))):
        VALUES[name].run(**inputs(name, changes), throw=True)


# With one argument, or with several, of each call.
KNOWN = [
    (name, len(changes) > 1, changes, words, start)
    for name, changes, kind, words, start in OF_VALUES
    if kind is ValueError
]


@pytest.mark.parametrize(
    ("name", "several", "changes", "words", "start"), once_each(KNOWN, (0, 1)), ids=ids
)
def test_a_value_that_is_known_is_told_in_a_program(name, several, changes, words, start):
    """At once, or by the program: a comparison of arguments, or of rows, waits until it runs."""
    words, start = (start_of(name, changes, in_batch(x, "eager")) for x in (words, start))
    waits = AT_RUN_TIME if several or "pairs" in name else ValueError
    run = jax.jit(lambda: VALUES[name].run(**inputs(name, changes), throw=True))
    with pytest.raises(waits, match=f"^{words}|SolveError: {start}"):
        jax.block_until_ready(run())


@pytest.mark.parametrize(
    ("way", "name", "changes", "kind", "words", "start"),
    with_fast(IN_PROGRAMS, TOLD),
    ids=ids,
)
def test_a_value_is_told_by_the_program_that_meets_it(way, name, changes, kind, words, start):
    start = start_of(name, changes, in_batch(start, way))
    with pytest.raises(AT_RUN_TIME, match=f"SolveError: {start}"):
        given_to(program(name, way, True), name, way, changes)


@pytest.mark.parametrize(
    ("way", "name", "changes", "kind", "words", "start"),
    with_fast(IN_PROGRAMS, MASKED),
    ids=ids,
)
def test_a_wrong_value_makes_no_number_without_throw(way, name, changes, kind, words, start):
    """In its row alone under `jax.vmap`; and no gradient."""
    found = given_to(program(name, way, False), name, way, changes)
    if way == "grad":
        found = found[next(iter(VALUES[name].good))]
    if way == "vmap":
        good, found = (jax.tree.map(lambda x, i=i: x[i], found) for i in (0, 1))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good))
    if name.startswith("solve") and way != "grad":
        invalid, lost = jaxode.Result.INVALID_ARGUMENT, jaxode.Result.NON_FINITE
        assert found.pop("result") == (lost if kind is jaxode.SolveError else invalid)
    lost = [np.isnan(leaf) for leaf in jax.tree.leaves(found)]
    assert lost
    assert all(leaf.all() if name.startswith("solve") else leaf.any() for leaf in lost)


# What is like a row of "solve", and right.
KEPT = [
    {},
    {"t1": -1.0, "ts": -np.array([0.2, 0.5, 0.8])},
    {"t0": 100.0, "t1": 101.0, "ts": 100 + np.array([0.2, 0.5, 0.8])},
    {"ts": np.array([0.5, 1 - 1e-9, 1.0])},
    {"t1": 0.0, "ts": np.zeros(3)},
    {"rtol": 0.0},
    {"atol": 0.0},
]


@pytest.mark.parametrize("changes", KEPT, ids=str)
def test_what_keeps_the_rules_is_solved(changes):
    given = inputs("solve", changes)
    found = given_to(program("solve", "jit", False), "solve", "jit", changes)
    for s in (found, VALUES["solve"].run(**given, throw=True)):
        # 1e-2: ten times the tolerance.
        np.testing.assert_allclose(s["ys"][:, 0], np.exp(given["t0"] - given["ts"]), rtol=1e-2)


WAYS = [(way, name) for name in VALUES for way in VALUES[name].ways]


@pytest.mark.parametrize(("way", "name"), with_fast(WAYS, [way for way in TOLD if way in MASKED]))
def test_good_inputs_are_the_same_whether_wrong_ones_would_raise(way, name):
    quiet, loud = (given_to(program(name, way, throw), name, way, {}) for throw in (False, True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(quiet))
    jax.tree.map(np.testing.assert_array_equal, quiet, loud)


def test_odeint_is_nan_where_a_rule_is_broken():
    """It has no `throw`."""
    run = jax.jit(lambda t, rtol: jaxode.odeint(lambda y, t: -y, jnp.ones(2, "f4"), t, rtol=rtol))
    times, far = np.arange(3.0), 1e8 + np.arange(1.0, 4.0)
    for t, rtol in ((10 * far, 1e-3), (times, np.inf), (far, 1e-3)):
        assert jnp.isnan(run(t, rtol)).all()
    assert jnp.isfinite(run(times, 1e-3)).all()


def test_a_tolerance_that_a_leaf_of_the_state_does_not_resolve():
    y0 = {"coarse": jnp.ones(1, jnp.float16), "fine": jnp.ones(1, jnp.float32)}
    f = lambda t, y, args: jax.tree.map(jnp.negative, y)
    run = lambda rtol, atol: jaxode.solve(f, y0, 0.0, 1.0, throw=False, rtol=rtol, atol=atol)
    with pytest.raises(ValueError, match=r"^solve\(rtol=1e-10, atol=1e-10\)"):
        run(1e-10, 1e-10)
    of_both = jax.jit(lambda tolerance: run(tolerance, tolerance).result)
    assert of_both(1e-10) == jaxode.Result.INVALID_ARGUMENT
    assert of_both(1e-5) == jaxode.Result.SUCCESS
    # Each leaf resolves its own.
    of_each = jax.jit(lambda fine: run(0.0, {"coarse": 1e-3, "fine": fine}).result)
    assert of_each(1e-9) == jaxode.Result.SUCCESS
    assert of_each(0.0) == jaxode.Result.INVALID_ARGUMENT
    with pytest.raises(ValueError, match=r"positive in float16, a dtype of the state\.$"):
        run(0.0, {"coarse": 1e-9, "fine": 1e-9})


def test_a_new_rule_is_one_row(monkeypatch):
    """Checked at once where the value is known, by the program where it is traced."""
    holds = lambda rtol: rtol <= 0.1
    rule = checks.Rule("{name}=...", holds, "must be at most a tenth", "Tighten it.")
    monkeypatch.setattr(checks, "SOLVE", (*checks.SOLVE, (rule, ("rtol",))))
    told = r"solve\(rtol=...\): must be at most a tenth"
    solve = lambda rtol: jaxode.solve(lambda t, y, _: -y, jnp.ones(2), 0.0, 1.0, rtol=rtol).y1
    with pytest.raises(ValueError, match=told + "; got 0.5. Tighten it."):
        solve(0.5)
    assert jnp.isfinite(jax.jit(solve)(0.01)).all()
    with pytest.raises(AT_RUN_TIME, match=told + ". Tighten it."):
        jax.block_until_ready(jax.jit(solve)(0.5))


def test_the_innermost_function_is_named_after_a_failure_inside_of_it():
    density = jaxode.bind(jaxode.cnf(lambda t, z, _: -z, jaxode.standard_normal(2)), None)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^log_prob\(x=...\): must have shape"):
            density.log_prob(jnp.ones(3))
        with pytest.raises(ValueError, match=r"^cnf\(rtol=...\): must be a finite tolerance"):
            jaxode.cnf(lambda t, z, _: -z, jaxode.standard_normal(2), rtol=-1.0)
