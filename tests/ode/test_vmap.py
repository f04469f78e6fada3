"""`jax.vmap` of a solve: the same numbers as one solve after the other, as rows of one solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checking_leaks, with_slow

import jaxode
from jaxode.ode.adjoints import vmapped

Y0 = jnp.array([[1.0, 0.5], [2.0, 1.0], [0.3, 0.2]])
A = jnp.array([[1.0, 0.5], [0.7, 1.1], [1.3, 0.2]])
T1 = jnp.array([1.0, 0.0, -0.7])
TS = jnp.array([0.2, 0.5, 1.0])
# A failure is NaN, which `check` finds: programs that can raise take longer to compile.
OPTIONS = {"rtol": 1e-6, "atol": 1e-6, "max_steps": 64, "throw": False}


def field(t, y, a):
    return jnp.stack([a[0] * y[1], -jnp.sin(a[1] * y[0]) + 0.1 * t])


def of_batch(t, y, args):
    shared, row = args
    return field(t, y, shared) + row


def end(y0, a, t1=1.0, f=field, **options):
    return jaxode.solve(f, y0, 0.0, t1, a, **{**OPTIONS, **options}).y1


def outputs(y0, a, ts=TS, t1=1.0):
    return jaxode.solve(field, y0, 0.0, t1, a, ts=ts, **OPTIONS).ys


def batch_of(batch):
    def solved(y0, row):
        both = jnp.stack([y0, 2 * y0]), jnp.stack([row, -row])
        args = {"batch": batch, "row_args": both[1], **OPTIONS}
        return jaxode.solve(of_batch, both[0], 0.0, 1.0, A[0], **args).y1

    return solved


def chain(y0, a, adjoint=jaxode.DiscreteAdjoint(), row=A[1]):
    """A batch, which shares `a`: what a chain of a hierarchical model solves."""
    args = {"batch": "per_sample", "row_args": jnp.stack([row, -row]), "adjoint": adjoint}
    return jaxode.solve(of_batch, jnp.stack([y0, 2 * y0]), 0.0, 1.0, a, **args, **OPTIONS).y1


def dense(y0, a):
    solution = jaxode.solve(field, y0, 0.0, 1.0, a, dense=True, **OPTIONS)
    return solution.evaluate(jnp.array([0.1, 0.77]))


# function, inputs, which are mapped
CASES = {
    "end times": (lambda t1: end(Y0[0], A[0], t1), (T1,), 0),
    "outputs": (outputs, (Y0, A), 0),
    "output times": (lambda ts: outputs(Y0[0], A[0], ts), (jnp.outer(T1**2, TS),), 0),
    "closed over": (
        lambda y0, a: jaxode.solve(lambda t, y, _: field(t, y, a), y0, 0.0, 1.0, **OPTIONS).y1,
        (Y0, A),
        0,
    ),
    "shared arguments": (end, (Y0, A[0]), (0, None)),
    "a joint batch": (batch_of("joint"), (Y0, A), 0),
    "a batch with steps of each sample": (batch_of("per_sample"), (Y0, A), 0),
    "chains": (chain, (Y0, A), 0),
    "chains of the adjoint ODE": (
        lambda y0, a: chain(y0, a, jaxode.BacksolveAdjoint()), (Y0, A), 0
    ),
    "equal steps": (lambda y0, a: end(y0, a, steps=5), (Y0, A), 0),
    "a stiff solver": (lambda y0, a: end(y0, a, solver=jaxode.Rodas5P()), (Y0, A), 0),
    "dense output": (dense, (Y0, A), 0),
    "the adjoint ODE": (lambda y0, a: end(y0, a, adjoint=jaxode.BacksolveAdjoint()), (Y0, A), 0),
}  # fmt: skip


def one_by_one(f, axes, inputs):
    axes = (axes,) * len(inputs) if not isinstance(axes, tuple) else axes
    pick = lambda i: [x if axis is None else x[i] for x, axis in zip(inputs, axes, strict=True)]
    outs = [f(*pick(i)) for i in range(3)]
    return jax.tree.map(lambda *x: jnp.stack(x), *outs)


def check(got, wanted, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=False)


def weighted(f):
    return lambda *inputs: jnp.sum(jnp.sin(1.3 * f(*inputs)))


@pytest.fixture
def only_rows(monkeypatch):
    """Fails where `jax.vmap` is not rows of one solve."""

    def refused(*_):
        raise AssertionError("not rows of one solve")

    for name in ("plain", "one_by_one"):
        monkeypatch.setattr(vmapped, name, refused)


# Single solves are below, those of the adjoint ODE in `test_adjoints.py`, and stiff rows in
# `test_jacobian.py`.
@pytest.mark.parametrize("name", with_slow(CASES, CASES.keys() - {"chains"}))
def test_as_rows_of_one_solve(name, only_rows):
    f, inputs, axes = CASES[name]
    axes = axes if isinstance(axes, tuple) else (axes,) * len(inputs)
    argnums = tuple(range(len(inputs)))

    def with_value(f):
        def loss(*inputs):
            value = f(*inputs)
            return jnp.sum(jnp.sin(1.3 * value)), value

        return jax.grad(loss, argnums, has_aux=True)

    one, of_all = with_value(f), with_value(jax.vmap(f, axes))
    each, values = one_by_one(jax.jit(one), axes, inputs)
    every = jax.jit(lambda *inputs: (jax.vmap(one, axes)(*inputs), of_all(*inputs)))
    summed = tuple(
        jnp.sum(x, axis=0) if axis is None else x for x, axis in zip(each, axes, strict=True)
    )
    check(every(*inputs), ((each, values), (summed, values)))


def in_two(f):
    return jax.vmap(jax.vmap(f, (0, None)), (None, 0))


PROGRAMS = {
    # One that can raise.
    "nested, both": lambda each: jax.vmap(jax.vmap(lambda y, a: each(y, a, throw=True)))(
        Y0[None], A[None]
    ),
    "scan": lambda each: jax.lax.scan(
        lambda y, _: (jax.vmap(each)(y, A), None), Y0, None, length=2
    )[0],
    "vmap of a scan": lambda each: jax.vmap(
        lambda y, a: jax.lax.scan(lambda y, _: (each(y, a), None), y, None, length=2)[0]
    )(Y0, A),
    "gradient of a vmap of a scan": lambda each: jax.grad(
        lambda a: jnp.sum(jax.vmap(
            lambda y, a: jax.lax.scan(lambda y, _: (each(y, a), None), y, None, length=2)[0]
        )(Y0, a) ** 2)
    )(A),
    "nested chains": lambda each: in_two(
        jax.value_and_grad(weighted(lambda y, a: chain(y, a, row=y)), (0, 1))
    )(Y0, A),
    "nested gradients": lambda each: in_two(jax.grad(weighted(each), (0, 1)))(Y0, A),
    "hessian of a sum": lambda each: jax.hessian(
        lambda a: jnp.sum(jax.vmap(weighted(each))(Y0, a))
    )(A),
    "the settings": lambda each: jax.vmap(lambda y, tol: each(y, A[0], rtol=tol))(
        Y0, jnp.array([1e-6, 1e-7, 1e-8])
    ),
    "gradient of the settings": lambda each: jax.vmap(
        lambda y, tol: jax.grad(lambda y: jnp.sum(each(y, A[0], rtol=tol)))(y)
    )(Y0, jnp.array([1e-6, 1e-7, 1e-8])),
    "stored pullbacks": lambda each: jax.vmap(lambda pull, bar: pull(bar)[0])(
        jax.lax.map(lambda y: jax.vjp(lambda y: each(y, A[0]), y)[1], Y0), jnp.ones_like(Y0)
    ),
    "forward mode": lambda each: jax.vmap(
        jax.jacfwd(lambda y, a: each(y, a, adjoint=jaxode.ForwardMode()))
    )(Y0, A),
    "a callback": lambda each: jax.vmap(
        lambda y: jaxode.solve(with_callback, y, 0.0, 1.0, A[0], **OPTIONS).y1
    )(Y0),
}  # fmt: skip


def with_callback(t, y, a):
    jax.debug.callback(lambda t: None, t)
    return field(t, y, a)


# Of what others do as well: gradients of chains and of a scan, and the Hessian of a likelihood in
# `test_attacks_problems.py`.
SLOW = {
    "hessian of a sum", "nested chains", "nested gradients", "gradient of the settings",
    "gradient of a vmap of a scan", "stored pullbacks",
}  # fmt: skip


ONE = jax.jit(lambda y0, a, rtol: end(y0, a, rtol=rtol))
PULL = jax.jit(lambda y0, a, bar: jax.vjp(end, y0, a)[1](bar))


def alone(y0s, rows, rtols=3 * (1e-6,)):
    return jnp.stack([ONE(*each) for each in zip(y0s, rows, rtols, strict=True)])


def gradient_alone(y0, a):
    """Of the `weighted` end."""
    return PULL(y0, a, 1.3 * jnp.cos(1.3 * ONE(y0, a, 1e-6)))


# Of which one solve after the other, or its gradient, by one program, is the reference.
ALONE = {
    "nested, both": lambda: alone(Y0, A)[None],
    "scan": lambda: alone(alone(Y0, A), A),
    "vmap of a scan": lambda: alone(alone(Y0, A), A),
    "the settings": lambda: alone(Y0, 3 * [A[0]], (1e-6, 1e-7, 1e-8)),
    "nested gradients": lambda: jax.tree.map(
        lambda *x: jnp.stack(x).reshape(3, 3, 2), *(gradient_alone(y0, a) for a in A for y0 in Y0)
    ),
    "stored pullbacks": lambda: jnp.stack([PULL(y0, A[0], jnp.ones(2))[0] for y0 in Y0]),
}


@pytest.mark.parametrize("name", with_slow(PROGRAMS, SLOW))
def test_programs_are_those_of_the_plain_rule(name, monkeypatch):
    # As one program: without the small ones of an array each, which are compiled twice here.
    run = lambda each: jax.jit(lambda: PROGRAMS[name](each))()
    got = run(end)
    if name in ALONE:
        check(got, ALONE[name](), 1e-11)
        return
    traced = []
    by_plain_rule = lambda f, rule, *args: (traced.append(1), f(*args))[1]
    monkeypatch.setattr(vmapped, "_with_rule", by_plain_rule)
    # JAX finds no program of the rule for a field that is new, nor with another setting, on which
    # no solve depends, for those of other fields.
    new = lambda t, y, a: field(t, y, a)
    with jax.numpy_rank_promotion("warn"):
        wanted = run(lambda y0, a, **options: end(y0, a, f=new, **options))
    assert traced
    check(got, wanted, 1e-11)


def test_a_stiff_joint_batch_keeps_a_jacobian_of_each_sample(monkeypatch):
    stiff = {"solver": jaxode.Rodas5P(), "batch": "joint", **OPTIONS}
    rows = lambda y0: jaxode.solve(field, y0, 0.0, 1.0, A[0], **stiff).y1
    y0, called, plain = jnp.stack([Y0, 2 * Y0]), [], vmapped.plain
    monkeypatch.setattr(vmapped, "plain", lambda *args: (called.append(1), plain(*args))[1])
    check(jax.vmap(rows)(y0), jnp.stack([rows(y) for y in y0]))
    assert called


def test_busy_solves_run_one_after_the_other(monkeypatch):
    # Of its own, so that no program of rows is found.
    each = jax.value_and_grad(weighted(lambda y0, a: end(y0, a, max_steps=63)))
    wanted = one_by_one(jax.jit(each), 0, (Y0, A))
    called, of_each = [], vmapped.one_by_one
    monkeypatch.setattr(vmapped, "BUSY_WORK", 0)
    monkeypatch.setattr(vmapped, "plain", None)
    monkeypatch.setattr(vmapped, "one_by_one", lambda *args: (called.append(1), of_each(*args))[1])
    check(jax.jit(jax.vmap(each))(Y0, A), wanted)
    assert called


@pytest.mark.slow
def test_a_failed_solve_leaves_the_others_alone():
    blows_up = lambda t, y, a: a * y**2
    run = lambda y, a: jaxode.solve(blows_up, y, 0.0, 1.0, a, throw=False, max_steps=50)
    y, a = np.array([[0.5], [2.0]]), np.ones((2, 1))
    unused = lambda y, a: jnp.sum(jax.vmap(run)(y, a).y1[0, 0])
    solutions, gradients, unused = jax.jit(lambda y, a: (
        jax.vmap(run)(y, a),
        (
            jax.vmap(jax.grad(lambda y, a: run(y, a).y1[0], (0, 1)))(y, a),
            jax.grad(lambda y, a: jnp.sum(jax.vmap(run)(y, a).y1), (0, 1))(y, a),
        ),
        jax.grad(unused)(y, a),
    ))(y, a)  # fmt: skip
    assert solutions.result.tolist()[0] == jaxode.Result.SUCCESS
    assert solutions.result.tolist()[1] != jaxode.Result.SUCCESS
    np.testing.assert_allclose(solutions.y1, [[1.0], [np.nan]], rtol=1e-4)
    for leaf in map(np.asarray, jax.tree.leaves(gradients)):
        assert np.isfinite(leaf[0]).all()
        assert np.isnan(leaf[1]).all()
    np.testing.assert_allclose(unused, [[4.0], [0.0]], rtol=1e-4)


@pytest.mark.slow
def test_failed_rows_of_chains_leave_the_others_alone():
    """A chain whose rows all fail has the values of another one, a chain with one good row not."""
    blows_up = lambda t, y, args: args[0] * args[1] * jnp.sqrt(1.0 / (3.0 - args[0])) * y**2

    def chain(a, row):
        options = {"batch": "per_sample", "row_args": row, "throw": False, "max_steps": 50}
        return jaxode.solve(blows_up, jnp.ones((2, 1)), 0.0, 1.0, a, **options)

    a, rows = np.array([0.5, 1.0, 4.0]), np.array([[1.0, 9.0], [0.3, 0.5], [1.0, 1.0]])

    def used(a, rows):
        solved = jax.vmap(chain)(a, rows)
        return jnp.sum(jnp.where(solved.result == jaxode.Result.SUCCESS, solved.y1[..., 0], 0.0))

    def alone(a, row):
        return jaxode.solve(lambda t, y, a: blows_up(t, y, (a, row)), 1.0, 0.0, 1.0, a).y1

    all_of = lambda a: jnp.sum(jax.vmap(chain)(a, rows).y1)
    (by_a, by_row), every = jax.jit(
        lambda a, rows: (jax.grad(used, (0, 1))(a, rows), jax.grad(all_of)(a))
    )(a, rows)
    of_one = jax.jit(jax.grad(alone, (0, 1)))
    wanted = [of_one(a[i], rows[i, j]) for i, j in ((0, 0), (1, 0), (1, 1))]
    np.testing.assert_allclose(by_a, [wanted[0][0], wanted[1][0] + wanted[2][0], 0.0], rtol=1e-10)
    np.testing.assert_allclose(
        by_row, [[wanted[0][1], 0.0], [wanted[1][1], wanted[2][1]], [0.0, 0.0]], rtol=1e-10
    )
    assert np.isnan(every).tolist() == [True, False, True]


METHODS = {
    "discrete": jaxode.DiscreteAdjoint(),
    "backsolve": jaxode.BacksolveAdjoint(),
}


# `test_transforms.py` has a branch for each row.
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_branch_that_is_not_taken(name):
    """It has zeros in place of the problem, where this field is not finite."""
    singular = lambda t, y, a: -a * jnp.sqrt(y) + 0.3 * y / y**1.5

    def chosen(y0, a):
        solve = lambda: jaxode.solve(singular, y0, 0.0, 1.0, a, adjoint=METHODS[name]).y1.sum()
        return jax.lax.cond(a > 0.15, solve, lambda: y0.sum() * a)

    each, a = jax.jit(jax.grad(chosen, (0, 1))), jnp.array([0.1, 0.2, 0.3])
    y0 = 1 + Y0
    check(jax.jit(jax.vmap(each))(y0, a), one_by_one(each, 0, (y0, a)), 1e-10)


@pytest.mark.slow
def test_nothing_to_solve():
    each = lambda y: end(y, A[0], throw=True)
    none = jnp.zeros((0, 2))
    assert jax.vmap(each)(none).shape == (0, 2)
    assert jax.vmap(jax.grad(weighted(each)))(none).shape == (0, 2)
    rows = lambda a: jaxode.solve(field, none, 0.0, 1.0, a, batch="per_sample").y1
    assert jax.vmap(rows)(A).shape == (3, 0, 2)


def test_nothing_compiles_again(caplog):
    """Nor does what would raise."""
    run = jax.vmap(lambda y0, a: end(y0, a, throw=True))
    run(Y0, A)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(Y0, A)
        assert not [r for r in caplog.records if r.getMessage().startswith("Compiling")]
        run(jnp.concatenate([Y0, Y0]), jnp.concatenate([A, A]))
        assert [r for r in caplog.records if r.getMessage().startswith("Compiling")]


@pytest.mark.slow
def test_no_leaks():
    """Tracing finds them; nothing needs to run."""
    flow = jaxode.cnf(lambda t, y, p: jnp.tanh(p * y), jaxode.standard_normal(2))
    kept = []
    leaking = lambda t, y, p: (kept.append(y), -p * y)[1]
    with checking_leaks():
        jax.make_jaxpr(jax.vmap(jax.grad(lambda p: flow.nll(p, Y0))))(A)
        loud = lambda y0, a: end(y0, a, throw=True)
        jax.make_jaxpr(jax.vmap(jax.grad(weighted(loud))))(Y0, A)
        with pytest.raises(Exception, match="Leaked"):
            jax.make_jaxpr(jax.vmap(lambda p: jaxode.solve(leaking, Y0[0], 0.0, 1.0, p).y1))(A)


@pytest.mark.slow
def test_an_ensemble_of_flows():
    flow = jaxode.cnf(lambda t, y, p: jnp.tanh(p * y), jaxode.standard_normal(2))
    params, x = jnp.array([[1.0, 0.5], [0.3, -0.2]]), jnp.array([[0.5, 1.0], [-1.0, 0.2]])
    methods = (
        lambda p: flow.nll(p, x),
        lambda p: flow.log_prob(p, x).sum(),
        lambda p: flow.sample(p, jax.random.key(0), 2).sum(),
    )
    each = jax.jit(lambda p: [jax.value_and_grad(f)(p) for f in methods])
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *map(each, params))
    check(jax.vmap(each)(params), wanted, 1e-11)
