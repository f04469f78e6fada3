"""What every gradient method promises, over a table of them."""

import dataclasses
import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTIVE,
    AGAIN,
    KINDS,
    METHODS,
    OPTIMIZED,
    REVERSE,
    assert_close,
    gradient,
    of_feature,
    temporary_bytes,
    with_slow,
)
from problems import ARGS, TS, Y0, linear_gradients, pendulum, scalar

import jaxode
from jaxode.ode.loop.checkpoints import STAGE_BYTES

CONTINUOUS = [name for name, method in METHODS.items() if not method.exact]
VARIANTS = [name for name, method in METHODS.items() if method.variant]
OF_ROWS = [name for name, method in METHODS.items() if method.gradient is jax.grad]
INPUTS = (Y0, jnp.array(0.0), jnp.array(3.0), ARGS)

A = jnp.array([[0.3, 1.0, 0.0], [-0.5, -0.2, 0.4], [0.1, 0.0, 0.6]])
V, W = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, -1.0, 2.0])


def linear(t, y, A):
    return A @ y


def loss(adjoint, tolerance=1e-10, **options):
    """NaN for a solve that fails."""

    def loss(y0, t0, t1, args, ts=None):
        solution = jaxode.solve(
            pendulum, y0, t0, t1, args, ts=ts, adjoint=adjoint, rtol=tolerance, atol=tolerance,
            throw=False, **options,
        )  # fmt: skip
        return scalar(solution.y1, jnp.zeros(0) if ts is None else solution.ys)

    return loss


def finite(values):
    """The same, of solves that have not failed."""
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(values))
    return values


def test_methods_are_compared_by_value():
    """Equal ones compile once."""
    for method in METHODS.values():
        again = dataclasses.replace(method.adjoint)
        assert again == method.adjoint
        assert hash(again) == hash(method.adjoint)
    assert len({method.adjoint for method in METHODS.values()}) == len(METHODS)


@functools.cache
def of_all_fates(name, **options):
    """Rows that go forwards, backwards and nowhere, one that explodes, and one without an end."""
    return jaxode.solve(
        lambda t, y, _: y**2, jnp.array([[0.5], [0.5], [0.5], [2.0], [0.5]]),
        t0=jnp.array([0.0, 1.0, 0.5, 0.0, 0.2]), t1=jnp.array([1.0, 0.0, 0.5, 1.0, jnp.inf]),
        ts=jnp.array([[0.0, 0.3, 1], [0.9, 0.2, 0.2], [0.5] * 3, [0.1, 0.3, 0.9], [0.2, 0.4, 0.4]]),
        batch="per_sample", **METHODS[name].options(max_steps=200, throw=False, **options),
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in KINDS if name != "forward"])
def test_the_solution_does_not_depend_on_the_method(name):
    """Nor does the fate of a row."""
    actual = of_all_fates(name)
    expected = of_all_fates("forward", **METHODS[name].needs)
    assert actual.ok.tolist() == [True, True, True, False, False]
    # Not `num_evals`: a method may evaluate more.
    of = lambda s: (
        s.result, s.y1, s.ys, s.t_reached,
        s.stats.num_steps, s.stats.num_accepted, s.stats.num_rejected,
    )  # fmt: skip
    for a, b in zip(of(actual), of(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_linear_system_against_the_matrix_exponential(name):
    """`y(1) = expm(A) y(0)`, whose derivatives are known in closed form."""
    run = jax.jit(lambda tolerance: gradient(name)(
        lambda y0, A: W @ jaxode.solve(
            linear, y0, 0.0, 1.0, A,
            **METHODS[name].options(rtol=tolerance, atol=tolerance, throw=False),
        ).y1,
        (0, 1),
    )(V, A))  # fmt: skip
    y0_bar, A_bar = linear_gradients(A, V, W)
    errors, tolerances = [], (1e-4, 1e-7, 1e-10)
    for tolerance in tolerances:
        actual = run(tolerance)
        errors.append(
            max(np.abs(actual[0] - y0_bar).max() / np.abs(y0_bar).max(),
                np.abs(actual[1] - A_bar).max() / np.abs(A_bar).max())
        )  # fmt: skip
    assert all(error < 10 * tol for error, tol in zip(errors, tolerances, strict=True))
    # A tolerance a million times tighter gives an error at least ten thousand times smaller.
    assert errors[2] < errors[0] / 1e4


@functools.cache
def by_everything(name, **options):
    """Its gradient as a function of the tolerance and of all inputs: one program for both
    directions."""

    def solved(tolerance, *inputs):
        return loss(tolerance=tolerance, **METHODS[name].options(**options))(*inputs)

    return jax.jit(gradient(name)(solved, (1, 2, 3, 4, 5)))


@pytest.mark.parametrize("name", of_feature(CONTINUOUS))
def test_agrees_with_discrete_with_respect_to_everything(name):
    # 1e-7: the tolerance of 1e-10, amplified by the flow and by the interpolation.
    actual, expected = (by_everything(n)(1e-10, *INPUTS, TS) for n in (name, "discrete"))
    assert_close(actual, finite(expected), 1e-7)


@functools.cache
def exact_outputs():
    """Inputs of `y' = a cos(t) y`, and the gradient of `y = y0 exp(a (sin t - sin t0))`."""
    knots = jnp.array([0.0, 0.5, 1.0, 1.5, 2.0])
    beside = jnp.array([0.5 - 1e-13, jnp.nextafter(0.5, 1.0), 1.5 - 1e-5, 1.5 + 1e-5])
    inputs = (jnp.array([0.7]), 0.9, 0.0, 2.0, jnp.sort(jnp.concatenate([knots, beside])))

    def exact(y0, a, t0, t1, ts):
        y = lambda t: y0[0] * jnp.exp(a * (jnp.sin(t) - jnp.sin(t0)))
        return y(t1) + jnp.arange(1.0, 10.0) @ jnp.sin(y(ts))

    return inputs, jax.jit(jax.grad(exact, range(5)))(*inputs)


# Of the discrete adjoint there is `test_discrete.py`.
@pytest.mark.parametrize("name", of_feature(name for name in KINDS if name != "discrete"))
def test_outputs_on_and_beside_the_ends_of_steps(name):
    """Every 16th step ends on a half."""

    def ours(y0, a, t0, t1, ts):
        f = lambda t, y, a: a * jnp.cos(t) * y
        solution = jaxode.solve(f, y0, t0, t1, a, ts=ts, **METHODS[name].options(steps=64))
        return solution.y1[0] + jnp.arange(1.0, 10.0) @ jnp.sin(solution.ys[:, 0])

    inputs, expected = exact_outputs()
    # 1e-7: the dense output of 64 steps of Tsit5 has order 4.
    assert_close(jax.jit(gradient(name)(ours, range(5)))(*inputs), expected, 1e-7)


@pytest.mark.parametrize("name", of_feature(KINDS))
def test_zero_span(name):
    """`y1 = y0`, and the derivatives of `y1` and of an output by the times are `-+f`."""

    def run(y0, t0, t1, ts, rate):
        f = lambda t, y, rate: rate * t * y
        solution = jaxode.solve(f, y0, t0, t1, rate, ts=ts, **METHODS[name].options(throw=False))
        return solution.y1[0] + 10 * solution.ys[0, 0], solution.y1

    t, y0 = jnp.array(2.0), jnp.array([3.0])
    each = gradient(name)(run, tuple(range(5)), has_aux=True)
    (*bars, rate_bar), y1 = jax.jit(each)(y0, t, t, t[None], jnp.array(1.0))
    expected = (11.0, -66.0, 6.0, 60.0)
    np.testing.assert_allclose([x.sum() for x in bars], expected, rtol=1e-12)
    assert rate_bar == 0.0
    np.testing.assert_array_equal(y1, y0)


# As many outputs as in `TS`.
BACK = (Y0, jnp.array(3.0), jnp.array(0.5), ARGS, jnp.array([2.9, 2.9, 1.0, 1.0, 0.5, 0.5]))


@pytest.mark.parametrize("name", METHODS)
def test_backwards_in_time(name):
    expected = by_everything("discrete", steps=400)(1e-10, *BACK)
    assert_close(by_everything(name)(1e-10, *BACK), finite(expected), 1e-7)


@functools.cache
def by_state_and_args(name, tolerance=1e-10, **options):
    solved = loss(tolerance=tolerance, **METHODS[name].options(**options))
    return jax.jit(jax.grad(solved, (0, 3)))(*INPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUOUS)
def test_equal_steps_converge_to_the_gradient(name):
    """The error of 20 and 40 steps of Tsit5 falls by about 2 ** 5."""
    exact = by_state_and_args("discrete", 1e-12)
    errors = []
    for steps in (20, 40):
        actual = by_state_and_args(name, steps=steps)
        difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), actual, exact)
        errors.append(max(map(float, jax.tree.leaves(difference))))
    assert errors[1] < errors[0] / 15
    assert errors[1] < 1e-4


@functools.cache
def of_a_batch(name, control):
    """Its gradient as a function of the tolerance."""
    z = jnp.array([[0.1, 1.0], [2.0, -1.0], [0.5, 0.0]])

    @jax.jit
    def run(tolerance):
        options = METHODS[name].options(rtol=tolerance, atol=tolerance, batch=control, throw=False)
        loss = lambda z, args: jnp.sum(jnp.sin(jaxode.flow(pendulum, z, 2.0, 0.0, args, **options)))
        return jax.grad(loss, (0, 1))(z, ARGS)

    return run


# Rows that wait are harder on few checkpoints than joint steps.
BATCHES = [
    (name, control) for name in OF_ROWS for control in ("joint", "per_sample")
    if name not in VARIANTS or control == "per_sample"
]  # fmt: skip


@pytest.mark.parametrize(("name", "control"), of_feature(BATCHES))
def test_batches(name, control):
    """Parameter gradients add up over the rows."""
    expected = of_a_batch("discrete", control)(1e-11)
    assert_close(of_a_batch(name, control)(1e-9), finite(expected), 1e-6)


# Of other methods there is `test_vmap.py`, but for a tangent of rows.
FAST = [("backsolve", "grad of vmap")]
SLOW = [(name, "grad of vmap") for name in ("discrete", "forward")]
SLOW += [(name, "vmap of grad of scan") for name in ("discrete", "backsolve")]
SLOW += [("discrete", "scan")]


@pytest.mark.parametrize(("name", "transform"), with_slow(FAST + SLOW, SLOW))
def test_under_transformations(name, transform):
    grad, values = gradient(name), jnp.array([0.5, 1.0, 3.0])
    options = METHODS[name].options(rtol=1e-9, atol=1e-9, throw=False)

    def one(a):
        f = lambda t, y, a: -a * jnp.sin(y)
        return jaxode.solve(f, jnp.ones(2), 0.0, 1.0, a, **options).y1[0]

    # y' = -a sin y with y(0) = 1 has tan(y / 2) = tan(1 / 2) exp(-a t), whose slope is -sin y.
    exact = -np.sin(2 * np.arctan(np.tan(0.5) * np.exp(-np.asarray(values))))
    over_scan = lambda f, values: jax.lax.scan(lambda c, a: (c, f(a)), 0.0, values)[1]
    gradients = {
        "grad of vmap": grad(lambda values: jnp.sum(jax.vmap(one)(values))),
        "scan": lambda values: over_scan(grad(one), values),
        "vmap of grad of scan": jax.vmap(
            lambda a: grad(lambda a: over_scan(one, a)[0])(a[None])[0]
        ),
    }
    np.testing.assert_allclose(jax.jit(gradients[transform])(values), exact, rtol=1e-6)


TRANSFORMS = {
    "jit": lambda f: f,
    "vmap": lambda f: jax.jit(jax.vmap(f, (None, 0, None, None, None, None))),
}


# Of a row of a solve in forward mode there is `test_vmap.py`.
@pytest.mark.parametrize("transform", with_slow(TRANSFORMS, ["vmap"]))
@pytest.mark.parametrize(
    "name", [name for name in KINDS if METHODS[name].exact and name != "discrete"]
)
def test_exact_methods_equal_discrete(name, transform):
    """They differentiate the same steps on the same mesh, with respect to everything."""
    y0 = Y0 if transform == "jit" else jnp.stack([Y0, 3 * Y0])

    def run(name, **options):
        return TRANSFORMS[transform](by_everything(name, **options))(1e-6, y0, *INPUTS[1:], TS)

    assert_close(run(name), finite(run("discrete", **METHODS[name].needs)), 1e-12)


@functools.cache
def second_derivatives(name, again, **options):
    solved = loss(**METHODS[name].options(**options))
    run = lambda p: solved(p[:2], 0.0, 3.0, (p[2], p[3]), TS)
    return jax.jit(again(gradient(name)(run)))(jnp.array([1.0, 0.5, 2.0, 0.3]))


# `test_transforms.py` has others, against a closed form.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "again"), [case for case in AGAIN if case[0] != "forward"])
def test_second_derivatives(name, again):
    method = METHODS[name]
    expected = second_derivatives("forward", jax.jacfwd, **method.needs)
    # Those of the adjoint ODE are as exact as its solution.
    actual = second_derivatives(name, again)
    assert_close(actual, finite(expected), 1e-10 if method.exact else 1e-6)


# With complex ones it is below.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_reverse_over_reverse_without_parameters_or_with_narrow_ones(dtype):
    """The exact end is `y0 / (1 + rate y0)`."""

    def end(y0, rate):
        f = lambda t, y, r: -(1.0 if dtype is None else r.astype(y.dtype)) * y**2
        given = None if dtype is None else rate
        return jaxode.solve(
            f, y0, 0.0, 1.0, given, adjoint=jaxode.BacksolveAdjoint(), rtol=1e-9, atol=1e-9
        ).y1.sum()

    rate = jnp.ones((), dtype or float)
    hessian = jax.jit(jax.jacrev(jax.grad(end)))(jnp.full(1, 2.0), rate)
    np.testing.assert_allclose(hessian, [[-2 / 27]], rtol=1e-6)
    if dtype is not None:
        second = jax.jit(jax.grad(jax.grad(end, 1), 1))(jnp.full(1, 2.0), rate)
        np.testing.assert_allclose(second, 16 / 27, rtol=1e-5)


@pytest.mark.parametrize(("name", "again"), of_feature(AGAIN, slow=["forward", "backsolve"]))
def test_second_derivatives_of_a_failed_solve_are_nan(name, again):
    """The solution of `y' = r y^2` ends at `t = 1 / (r y0)`."""

    def run(y0, rate):
        return jaxode.solve(
            lambda t, y, r: r * y**2, y0, 0.0, 3.0, rate,
            **METHODS[name].options(throw=False, max_steps=200),
        ).y1[0]  # fmt: skip

    second = jax.jit(again(gradient(name)(run, (0, 1)), (0, 1)))(jnp.ones(1), jnp.array(1.0))
    assert [bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(second)] == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "again"), [case for case in AGAIN if METHODS[case[0]].exact])
def test_hessian_at_zero_span(name, again):
    """`y1 = y0 exp(-2 (t1 - t0))`, which has curvature where no step is taken, too."""
    run = lambda t: jaxode.solve(
        lambda t, y, _: -2 * y, jnp.array([3.0]), t[0], t[1], **METHODS[name].options()
    ).y1[0]  # fmt: skip
    hessian = jax.jit(again(gradient(name)(run)))(jnp.ones(2))
    np.testing.assert_allclose(hessian, 3 * np.array([[4.0, -4.0], [-4.0, 4.0]]), rtol=1e-12)


UNSUPPORTED = {
    "reverse mode of ForwardMode": (
        RuntimeError,
        lambda: jax.eval_shape(jax.grad(loss(jaxode.ForwardMode())), *INPUTS),
        "ForwardMode: a solve with this adjoint has forward-mode derivatives only (jax.jvp, "
        "jax.jacfwd). Use adjoint=jaxode.DiscreteAdjoint() for jax.grad and jax.vjp.",
    ),
    **{
        f"{mode} of {name}": (
            TypeError,
            lambda call=call, method=METHODS[name]: call(
                lambda y0: loss(**method.options())(y0, *INPUTS[1:])
            ),
            f"{type(METHODS[name].adjoint).__name__}: can't apply forward-mode differentiation "
            "(jax.jvp, jax.jacfwd) to this gradient method, which has reverse mode (jax.grad, "
            "jax.vjp). Use "
            "adjoint=jaxode.ForwardMode().",
        )
        for name in KINDS
        if not METHODS[name].jvp
        for mode, call in {
            "jvp": lambda f: jax.jvp(f, (Y0,), (Y0,)),
            "jacfwd": lambda f: jax.jacfwd(f)(Y0),
        }.items()
    },
    **{
        f"reverse over reverse of {name}": (
            RuntimeError,
            lambda method=METHODS[name]: jax.eval_shape(
                jax.jacrev(jax.grad(loss(**method.options()))), *INPUTS
            ),
            f"{type(METHODS[name].adjoint).__name__}: the gradient of a solve can be "
            "differentiated in forward mode only, as in jax.jacfwd(jax.grad(...)). Use "
            "adjoint=jaxode.BacksolveAdjoint() for reverse over reverse.",
        )
        for name in REVERSE
        if jax.jacrev not in METHODS[name].again
    },
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_method_cannot_do_names_the_one_that_can(name):
    exception, call, message = UNSUPPORTED[name]
    with pytest.raises(exception) as info:
        call()
    assert str(info.value) == message


@pytest.mark.slow
def test_backsolve_is_wrong_where_the_docs_say_so():
    """An overdamped pendulum contracts by e^-40, so backwards it is thrown to where it hangs up.

    There `y = cos t + pi` attracts backwards, and the cotangent grows instead of falling.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(adjoint, tolerance):
        f = lambda t, y, a: -a * jnp.sin(y - jnp.cos(t))
        y1 = lambda a: jaxode.solve(
            f, jnp.array([2.0]), 0.0, 2.0, a, adjoint=adjoint, rtol=tolerance, atol=tolerance
        ).y1[0]
        return jax.grad(y1)(20.0)

    reference = run(jaxode.DiscreteAdjoint(), 1e-11)
    np.testing.assert_allclose(run(jaxode.DiscreteAdjoint(), 1e-5), reference, rtol=1e-2)
    wrong = run(METHODS["backsolve"].adjoint, 1e-5)
    assert jnp.isfinite(wrong)
    assert abs(wrong) > 1000 * abs(reference)


@functools.cache
def stiff_decay(name):
    """The end of `y' = -100 (y - k cos t)`, and its gradient by the start and by `k`."""

    @jax.jit
    def run(k, t1):
        f = lambda t, y, k: -100.0 * (y - k * jnp.cos(t))
        end = lambda y0, k: jaxode.solve(
            f, y0, 0.0, t1, k, adjoint=METHODS[name].adjoint, throw=False, max_steps=20_000
        ).y1[0]
        return jax.value_and_grad(end, (0, 1))(jnp.array([2.0]), k)

    return run


@pytest.mark.slow
def test_backsolve_fails_where_the_docs_say_so():
    """Decay by e^-1000 is growth by e^1000 backwards: from noise to overflow, which is NaN."""
    assert jnp.isnan(stiff_decay("backsolve")(0.0, 10.0)[1][0]).all()
    # The exact gradient, e^-1000, is zero; atol: the default tolerance.
    np.testing.assert_allclose(stiff_decay("discrete")(0.0, 10.0)[1][0], 0.0, atol=1e-5)


@pytest.mark.slow
def test_discrete_of_stiff_decay():
    # y(1) is k times (100^2 cos 1 + 100 sin 1) / (100^2 + 1), up to e^-100.
    slope = (1e4 * np.cos(1.0) + 1e2 * np.sin(1.0)) / (1e4 + 1)
    value, (_, by_k) = stiff_decay("discrete")(1.0, 1.0)
    np.testing.assert_allclose((value, by_k), slope, rtol=1e-3)


@pytest.mark.slow
def test_failure_of_the_backward_solve_is_nan():
    """The backward solve runs out of steps where the forward one does not."""

    def gradient(throw):
        def end(y0):
            s = jaxode.solve(
                lambda t, y, _: -y, y0, 0.0, 1.0, max_steps=20, throw=throw,
                adjoint=jaxode.BacksolveAdjoint(rtol=1e-13, atol=1e-13),
            )  # fmt: skip
            return s.y1.sum(), s.ok

        return jax.jit(jax.grad(end, has_aux=True))(jnp.ones(2))

    lost, ok = gradient(throw=False)
    assert ok
    assert jnp.isnan(lost).all()
    message = r"SolveError: backward solve: the steps ran out at t=0\.\d+\. Raise max_steps"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(gradient(throw=True))


@pytest.mark.parametrize("control", with_slow(["joint", "per_sample"], ["joint"]))
def test_row_whose_backward_solve_fails(control):
    """Row 1 is stiff and runs out of steps backwards; row 0 has nothing to solve."""
    f = lambda t, y, _: jnp.stack([jnp.zeros(()), -y[0] * y[1]])
    z = jnp.array([[0.0, 1.0], [1.0, 1.0]])
    adjoint = jaxode.BacksolveAdjoint(rtol=1e-13, atol=1e-13)

    def run(z, throw):
        options = {"max_steps": 20, "adjoint": adjoint, "throw": throw}
        if control == "per_sample":
            return jaxode.flow(f, z, 0.0, 1.0, batch=control, **options).sum()
        return jax.vmap(lambda y: jaxode.solve(f, y, 0.0, 1.0, **options).y1)(z).sum()

    gradient = jax.jit(jax.grad(run), static_argnums=1)
    lost = jnp.isnan(gradient(z, False))
    assert lost.tolist() == [[False, False], [True, True]]
    message = (
        r"SolveError: backward solve: the steps ran out at t=0\.\d+ in 1 of 2 rows, first in row 1"
        ". Raise max_steps"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(gradient(z, True))


@pytest.mark.parametrize("name", with_slow(OF_ROWS, ["discrete", "backsolve"]))
def test_gradient_of_a_row_does_not_depend_on_its_neighbours(name):
    """Nor do the gradients of its outputs, in rows of opposite stiffness."""
    f = lambda t, y, rate: jnp.stack([jnp.zeros(()), -rate * y[0] * y[1]])
    z = jnp.array([[1.0, 1.0], [50.0, 1.0], [0.1, 1.0]])

    @jax.jit
    @jax.grad
    def run(z):
        solution = jaxode.solve(
            f, z, 0.0, 2.0, 1.3, batch="per_sample", ts=jnp.array([0.0, 0.03, 0.5, 2.0]),
            **METHODS[name].options(),
        )  # fmt: skip
        return jnp.sum(solution.y1) + jnp.sum(jnp.sin(solution.ys))

    together = run(z)
    for i in range(3):
        alone = run(jnp.broadcast_to(z[i], z.shape))[0]  # among equals: one program for all
        np.testing.assert_allclose(together[i], alone, rtol=1e-12, atol=1e-14)


def memory(name, size=50_000, times=None, compiler_options=None, **options):
    """Temporary bytes of a gradient, in states."""
    ts = None if times is None else jnp.linspace(0.0, 1.0, times)

    def run(y0):
        solution = jaxode.solve(
            lambda t, y, _: -jnp.sin(y), y0, 0.0, 1.0, ts=ts, throw=False,
            **METHODS[name].options(**options),
        )  # fmt: skip
        return jnp.sum(solution.y1 if ts is None else solution.ys**2)

    return temporary_bytes(run, jnp.ones(size), options=compiler_options) / (8 * size)


@pytest.mark.slow
def test_memory_of_many_steps():
    """64 checkpoints by default, some with stages, what is not kept, and a few states at work.

    By default, of the program that users run.
    """
    euler = {"solver": diffrax.Euler(), "max_steps": 4096, "compiler_options": OPTIMIZED}
    many = memory("discrete", steps=20_000, **euler)
    assert 64 < many < 72 + STAGE_BYTES / (8 * 50_000)
    # Ten times the steps cost their times alone, 8 bytes each, in at most four buffers.
    assert many - memory("discrete", steps=2_000, **euler) < 4 * 18_000 / 50_000


@pytest.mark.slow
def test_memory_of_backsolve_does_not_grow_with_steps():
    size = 10_000
    assert memory("backsolve", size, max_steps=100) == memory("backsolve", size, max_steps=10**6)
    assert memory("backsolve", size, steps=10) == memory("backsolve", size, steps=10**6)
    few, many = (memory("backsolve", size, times) for times in (10, 100))
    # Each output costs itself, its cotangent and one copy.
    assert many - few < 3.1 * 90


@pytest.mark.slow
@pytest.mark.parametrize("name", ["discrete", "backsolve"])
def test_parameter_gradient_is_one_copy_whatever_the_batch(name):
    """1.5 million parameters, batch 1000, per-sample steps."""
    m = jaxode.nn.ConcatSquash(4, (1220, 1220), key=jax.random.key(0))
    m = jax.tree.map(lambda x: x.astype(jnp.float32), m)
    size = sum(leaf.size for leaf in jax.tree.leaves(m)) * 4
    assert size > 1.49e6 * 4

    def run(m, z):
        return jnp.sum(
            jaxode.flow(jaxode.nn.field, z, 0.0, 1.0, m, batch="per_sample", throw=False,
                        adjoint=METHODS[name].adjoint, max_steps=64)
        )  # fmt: skip

    small, large = (
        temporary_bytes(run, m, jnp.ones((batch, 4), jnp.float32)) for batch in (10, 1000)
    )
    activations = 1000 * 1220 * 4
    # The batch adds activations of a few layers, not 990 gradients of 6 MB each.
    assert large - small < 11 * activations
    # No room for a second copy beside the gradient, nor in the loop.
    assert small < 1.5 * size


def test_an_attempt_that_overflows_leaves_no_trace_in_the_gradient_of_a_row_that_waits():
    """Its stages are not finite, and are of a step that another row has taken alone."""
    z = jnp.array([[0.1], [1000.0]])

    def loss(z, a):
        y1 = jaxode.flow(
            lambda t, y, a: -a * y**3, z, 0.0, 1.0, a, batch="per_sample", first_step=0.1,
            rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        return jnp.sum(y1)

    gradient = jax.jit(jax.grad(loss, (0, 1)))(z, jnp.array(1.0))
    # Of z / sqrt(1 + 2 a z^2), at a = 1.
    start = np.asarray(z)
    slope = (1 + 2 * start**2) ** -1.5
    exact = slope, -np.sum(start**3 * slope)
    for ours, theirs in zip(gradient, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def decay(t, y, rate):
    return -rate * y * y * jnp.cos(t)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_parameters_are_outside_of_the_error_norm(name):
    """A parameter in other units has another gradient, but the backward solve the same steps."""

    @jax.jit
    @jax.grad
    def by_state(y0, unit):
        f = lambda t, y, rate: decay(t, y, rate * unit)
        return jaxode.solve(f, y0, 0.0, 3.0, 2.0 / unit, **METHODS[name].options()).y1.sum()

    # With the parameters in the norm, they differ by 1e-6.
    np.testing.assert_allclose(by_state(Y0, 1e-8), by_state(Y0, 1.0), rtol=1e-11)


def test_the_backward_solve_restarts_where_the_loss_does_not_depend_on_outputs():
    def loss(rate, ts, weight):
        solution = jaxode.solve(
            decay, Y0, 0.0, 1.0, rate, ts=ts, adjoint=jaxode.BacksolveAdjoint(), rtol=1e-2,
            atol=1e-2,
        )  # fmt: skip
        outputs = 0.0 if weight is None else weight * jnp.sum(solution.ys)
        return jnp.sum(solution.y1**2) + outputs

    ts, gradient = jnp.linspace(0.0, 1.0, 9), jax.jit(jax.grad(loss))
    unused = float(gradient(2.0, ts, None))
    assert unused == pytest.approx(float(gradient(2.0, ts, 0.0)), rel=1e-12)
    assert unused != pytest.approx(float(gradient(2.0, None, None)), rel=1e-6)


def test_reverse_over_reverse_by_complex_parameters():
    """The derivatives of `exp(-|c|^2)`."""
    f = lambda t, y, c: -(c * jnp.conj(c)).real * y
    end = lambda c: jaxode.solve(
        f, jnp.ones(1), 0.0, 1.0, c, adjoint=jaxode.BacksolveAdjoint(), rtol=1e-9, atol=1e-9
    ).y1[0]  # fmt: skip
    exact = lambda c: jnp.exp(-(c * jnp.conj(c)).real)
    again = lambda end: jax.jit(jax.grad(lambda c: (jax.grad(end)(c) * (1 - 2j)).real))
    c = jnp.array(1 + 1j)
    np.testing.assert_allclose(again(end)(c), again(exact)(c), rtol=1e-6)
