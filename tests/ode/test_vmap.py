"""`jax.vmap` of a solve: the same numbers as one solve after the other, as rows of one solve.

For every feature of a solve, `test_features.py` has the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import only_rows_of_one_solve, with_slow

import jaxode
from jaxode.ode.adjoints import vmap

Y0 = jnp.array([[1.0, 0.5], [2.0, 1.0], [0.3, 0.2]])
A = jnp.array([[1.0, 0.5], [0.7, 1.1], [1.3, 0.2]])
# A failure is NaN, which `check` finds: programs that can raise take longer to compile.
OPTIONS = {"rtol": 1e-6, "atol": 1e-6, "max_steps": 64, "throw": False}


def field(t, y, a):
    return jnp.stack([a[0] * y[1], -jnp.sin(a[1] * y[0]) + 0.1 * t])


def of_batch(t, y, args):
    shared, row = args
    return field(t, y, shared) + row


def end(y0, a, t1=1.0, f=field, **options):
    return jaxode.solve(f, y0, 0.0, t1, a, **{**OPTIONS, **options}).y1


def chain(y0, a, row=A[1], adjoint=jaxode.DiscreteAdjoint(), batch="per_sample"):
    """A batch, which shares `a`: what a chain of a hierarchical model solves."""
    args = {"batch": batch, "row_args": jnp.stack([row, -row]), "adjoint": adjoint}
    return jaxode.solve(of_batch, jnp.stack([y0, 2 * y0]), 0.0, 1.0, a, **args, **OPTIONS).y1


def closed_over(y0, a):
    return jaxode.solve(lambda t, y, _: field(t, y, a), y0, 0.0, 1.0, **OPTIONS).y1


def mapped(f):
    """`jax.vmap`, one after the other."""
    return lambda *inputs: jax.lax.map(lambda each: f(*each), inputs)


def check(got, wanted, tolerance=1e-11):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=False)


def with_gradient(f):
    """Of a loss of all numbers, by all inputs."""

    def loss(*inputs):
        value = f(*inputs)
        return jnp.sum(jnp.sin(1.3 * value)), value

    return lambda *inputs: jax.grad(loss, tuple(range(len(inputs))), has_aux=True)(*inputs)


CASES = {
    "chains": chain,
    "chains of the adjoint ODE": lambda y0, a: chain(y0, a, adjoint=jaxode.BacksolveAdjoint()),
    "joint steps": lambda y0, a: chain(y0, a, batch="joint"),
    "closed over": closed_over,
    "the adjoint ODE": lambda y0, a: end(y0, a, adjoint=jaxode.BacksolveAdjoint()),
}


ALIKE = ["chains", "joint steps", "the adjoint ODE"]


@pytest.mark.parametrize("name", with_slow(CASES, ALIKE))  # three large programs each
def test_as_rows_of_one_solve(name, monkeypatch):
    """The gradient of each, and that of their sum."""
    f = CASES[name]
    with only_rows_of_one_solve(monkeypatch):
        several = jax.jit(
            lambda *inputs: (
                jax.vmap(with_gradient(f))(*inputs),
                with_gradient(jax.vmap(f))(*inputs),
            )
        )(Y0, A)
    one_by_one = jax.jit(mapped(with_gradient(f)))(Y0, A)
    check(several, (one_by_one, one_by_one), 1e-12)


def with_callback(t, y, a):
    jax.debug.callback(lambda t: None, t)
    return field(t, y, a)


def beside_the_mean(y0, a):
    """Rows that exchange values in their field, mapped by a name."""

    def pulled(t, y, a):
        return a * (jax.lax.pmean(y, "rows") - y)

    return jaxode.solve(pulled, y0, 0.0, 1.0, a, steps=2, throw=False).y1


def twice(y0, a):
    return jax.lax.scan(lambda y, _: (end(y, a), None), y0, None, length=2)[0]


def in_two(over, f):
    return over(lambda a: over(lambda y0: f(y0, a))(Y0))(A)


def by_tolerance(y0, tolerance):
    return with_gradient(lambda y0: end(y0, A[0], rtol=tolerance))(y0)


def in_a_branch(y0, a):
    """The one that is not taken has zeros in place of the problem, where this field is infinite."""
    singular = lambda t, y, a: -a * jnp.sqrt(y) + 0.3 * y / y**1.5
    return jax.lax.cond(a[0] > 0.8, lambda: end(y0 + 1, a, f=singular), lambda: y0 * a)


def chain_of_failures(a, row):
    """Both rows of the first chain succeed, one of the second, and none of the third."""
    explodes = lambda t, y, args: args[0] * args[1] * jnp.sqrt(1.0 / (3.0 - args[0])) * y**2
    options = {"batch": "per_sample", "row_args": row} | OPTIONS
    s = jaxode.solve(explodes, jnp.ones((2, 1)), 0.0, 1.0, a, **options)
    return jnp.where(s.ok[:, None], s.y1, 0.0)


# Programs of solves `over` several inputs: `jax.vmap`, or `mapped`.
PROGRAMS = {
    # One that can raise.
    "nested": lambda over: over(over(lambda y, a: end(y, a, throw=True)))(Y0[None], A[None]),
    "nested chains and their gradients": lambda over: in_two(
        over, with_gradient(lambda y, a: chain(y, a, row=y))
    ),
    "a scan of several": lambda over: jax.lax.scan(
        lambda y, _: (over(end)(y, A), None), Y0, None, length=2
    )[0],
    "the gradient of several scans": lambda over: with_gradient(over(twice))(Y0, A),
    "the hessian of a sum": lambda over: jax.hessian(
        lambda a: jnp.sum(over(lambda y0, a: jnp.sin(1.3 * end(y0, a)))(Y0, a))
    )(A),
    "the settings, and a gradient": lambda over: over(by_tolerance)(
        Y0, jnp.array([1e-6, 1e-7, 1e-8])
    ),
    "stored pullbacks": lambda over: over(lambda pull, bar: pull(bar)[0])(
        jax.lax.map(lambda y: jax.vjp(lambda y: end(y, A[0]), y)[1], Y0), jnp.ones_like(Y0)
    ),
    "forward mode": lambda over: over(
        jax.jacfwd(lambda y, a: end(y, a, adjoint=jaxode.ForwardMode()))
    )(Y0, A),
    "a callback": lambda over: over(lambda y0, a: end(y0, a, f=with_callback))(Y0, A),
    "a branch": lambda over: over(with_gradient(in_a_branch))(Y0, A),
    "failed rows": lambda over: over(with_gradient(chain_of_failures))(
        jnp.array([0.3, 1.0, 4.0]), jnp.array([[0.3, 0.5], [1.0, 9.0], [1.0, 1.0]])
    ),
}


LARGE = ["nested chains and their gradients", "the gradient of several scans", "stored pullbacks"]
LARGE += ["the hessian of a sum", "the settings, and a gradient", "a branch", "a scan of several"]


@pytest.mark.parametrize("name", with_slow(PROGRAMS, LARGE))  # the others have the same rules
def test_programs_do_the_same_one_by_one(name):
    """Each as one program: without the small ones of an array, which are compiled twice here."""
    check(*(jax.jit(lambda over=over: PROGRAMS[name](over))() for over in (jax.vmap, mapped)))


def test_rows_may_exchange_values_by_the_name_of_their_axis():
    """Equal rates keep the mean, which each row approaches by the steps of one solve."""

    def together(y0):
        return jax.vmap(with_gradient(lambda y: beside_the_mean(y, 1.3)), axis_name="rows")(y0)

    def alone(y0):
        mean = jnp.broadcast_to(y0.mean(0), y0.shape)
        ends = jaxode.solve(lambda t, y, m: 1.3 * (m - y), y0, 0.0, 1.0, mean, steps=2).y1
        return jnp.sum(jnp.sin(1.3 * ends)), ends

    check(jax.jit(together)(Y0), jax.jit(jax.grad(alone, has_aux=True))(Y0), 1e-12)


def test_a_field_may_print_in_order(capfd):
    def printing(t, y, a):
        jax.debug.print("at {t}", t=t, ordered=True)
        return -y

    jax.jit(lambda y: jaxode.solve(printing, y, 0.0, 1.0, steps=1, throw=False).y1)(Y0[0])
    jax.effects_barrier()
    assert "at 0.0\nat " in capfd.readouterr().out


def test_pullbacks_of_several_cotangents_may_be_mapped_again():
    """As those of `jax.jacrev`, and of matrices."""
    _, pull = jax.vjp(lambda y: end(y, A[0]), Y0[0])
    bars = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    twice = jax.jit(lambda bars: jax.vmap(jax.vmap(lambda bar: pull(bar)[0]))(bars))(bars)
    jacobian = jax.jit(jax.jacrev(end))(Y0[0], A[0])
    check(twice, jnp.stack([jacobian, 2 * jacobian]))


@pytest.mark.slow  # a path that runs plain JAX
def test_a_stiff_joint_batch_keeps_a_jacobian_of_each_sample(monkeypatch):
    stiff = {"solver": jaxode.Rodas5P(), "batch": "joint", **OPTIONS}
    rows = lambda y0: jaxode.solve(field, y0, 0.0, 1.0, A[0], **stiff).y1
    y0, called, plain = jnp.stack([Y0, 2 * Y0]), [], vmap.plain
    monkeypatch.setattr(vmap, "plain", lambda *args: (called.append(1), plain(*args))[1])
    check(jax.vmap(rows)(y0), jnp.stack([rows(y) for y in y0]))
    assert called


def test_busy_solves_run_one_after_the_other(monkeypatch):
    called, of_each = [], vmap.one_by_one
    monkeypatch.setattr(vmap, "BUSY_WORK", 0)
    monkeypatch.setattr(vmap, "plain", None)
    monkeypatch.setattr(vmap, "one_by_one", lambda *args: (called.append(1), of_each(*args))[1])
    # Of its own, so that no program of rows is found.
    each = with_gradient(lambda y0, a: end(y0, a, max_steps=63))
    check(*(jax.jit(over(each))(Y0, A) for over in (jax.vmap, mapped)))
    assert called


@pytest.mark.slow  # empty batches
def test_nothing_to_solve():
    none = jnp.zeros((0, 2))
    assert jax.vmap(with_gradient(lambda y0: end(y0, A[0])))(none)[1].shape == (0, 2)
    rows = lambda a: jaxode.solve(field, none, 0.0, 1.0, a, batch="per_sample", throw=False).y1
    assert jax.vmap(rows)(A).shape == (3, 0, 2)
