"""What every gradient method promises, over a table of them."""

import functools
from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AGAIN, KINDS, METHODS, REVERSE, assert_close, gradient, with_slow
from problems import ARGS, TS, Y0, linear_gradients, pendulum, scalar

import jaxode

A = jnp.array([[0.3, 1.0, 0.0], [-0.5, -0.2, 0.4], [0.1, 0.0, 0.6]])
V, W = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, -1.0, 2.0])
PRECISIONS = [(name, np.float64, (1e-4, 1e-7, 1e-10)) for name in KINDS]
PRECISIONS += [(name, np.float32, (1e-5,)) for name in REVERSE]
AGAIN_IN_FLOAT32 = [row for row in PRECISIONS if row[0] == "forward" or row[1] == np.float32]


@pytest.mark.parametrize(
    ("name", "dtype", "tolerances"),
    with_slow(PRECISIONS, AGAIN_IN_FLOAT32),  # `test_features.py` has float32 and forward mode
)
def test_linear_system_against_the_matrix_exponential(name, dtype, tolerances):
    """`y(1) = expm(A) y(0)`, whose derivatives are known in closed form."""

    def end(y0, A, tolerance):
        options = METHODS[name].options(rtol=tolerance, atol=tolerance, throw=False)
        return W.astype(dtype) @ jaxode.solve(
            lambda t, y, A: A @ y, y0, 0.0, 1.0, A, **options
        ).y1  # fmt: skip

    run, expected = jax.jit(gradient(name)(end, (0, 1))), linear_gradients(A, V, W)
    errors = []
    for tolerance in tolerances:
        found = run(V.astype(dtype), A.astype(dtype), dtype(tolerance))
        assert {leaf.dtype for leaf in found} == {np.dtype(dtype)}
        relative = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()
        errors.append(max(map(relative, found, expected)))
    assert all(error < 10 * tol for error, tol in zip(errors, tolerances, strict=True))
    # A tolerance a million times tighter gives an error at least ten thousand times smaller.
    assert errors[-1] <= errors[0] * (tolerances[-1] / tolerances[0]) ** (2 / 3)


class Kutta(diffrax.AbstractERK):
    """Of order two, whose last stage is the next step's first; the one before has no weight."""

    tableau: ClassVar = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([-1.0, 2.0]), np.array([0.0, 1.0, 0.0])),
        b_sol=np.array([0.0, 1.0, 0.0, 0.0]),
        b_error=np.array([-1 / 6, 1 / 3, -1 / 6, 0.0]),
        c=np.array([0.5, 1.0, 1.0]),
    )
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    term_compatible_contr_kwargs = None

    def order(self, terms):
        return 2


FORWARDS = (Y0, jnp.array(0.0), jnp.array(3.0), ARGS, TS)
BACK = (Y0, jnp.array(3.0), jnp.array(0.5), ARGS, jnp.array([2.9, 2.9, 1.0, 1.0, 0.5, 0.5]))
ROWS = (jnp.stack([Y0, 2 * Y0]), *FORWARDS[1:])
# Some outputs are at ends of the steps of 0.75, and beside them.
ON_KNOTS = (*FORWARDS[:4], jnp.array([0.0, 0.75 - 1e-9, 0.75, 1.5, 1.5 + 1e-3, 3.0]))
# (method, inputs, tolerance, options, error)
EVERYTHING = {
    "discrete": ("discrete", FORWARDS, 1e-5, {}, 1e-12),
    "discrete, backwards": ("discrete", BACK, 1e-5, {}, 1e-12),
    "few checkpoints": ("discrete from few checkpoints", FORWARDS, 1e-5, {}, 1e-12),
    "outputs on ends of steps": ("discrete", ON_KNOTS, 1e-5, {"steps": 4}, 1e-12),
    "a stage at the end": ("discrete", FORWARDS, 1e-2, {"solver": diffrax.Heun()}, 1e-12),
    "a stage without weight": ("discrete", FORWARDS, 1e-2, {"solver": Kutta()}, 1e-12),
    # Of the same problem, not of the same steps: the tolerance, which the flow amplifies.
    "backsolve": ("backsolve", FORWARDS, 1e-11, {}, 1e-7),
    "backsolve, backwards": ("backsolve", BACK, 1e-11, {}, 1e-7),
    "backsolve, joint steps": ("backsolve", ROWS, 1e-11, {"batch": "joint"}, 1e-7),
}  # fmt: skip


@functools.cache
def by_everything(name, options):
    """Its gradient as a function of the tolerance and of all inputs."""

    def loss(tolerance, y0, t0, t1, args, ts):
        solution = jaxode.solve(
            pendulum, y0, t0, t1, args, ts=ts, rtol=tolerance, atol=tolerance, throw=False,
            **METHODS[name].options(**dict(options)),
        )  # fmt: skip
        return jnp.sum(scalar(solution.y1, solution.ys))

    return jax.jit(gradient(name)(loss, (1, 2, 3, 4, 5)))


OF_OTHERS = ["outputs on ends of steps", "a stage at the end", "backsolve, joint steps"]
OF_OTHERS += ["a stage without weight"]


@pytest.mark.parametrize("case", with_slow(EVERYTHING, OF_OTHERS))  # two programs each
def test_agrees_with_forward_mode_with_respect_to_everything(case):
    """Which is JAX's own, of the loop that all run."""
    name, inputs, tolerance, options, error = EVERYTHING[case]
    actual, expected = (
        by_everything(method, tuple(options.items()))(tolerance, *inputs)
        for method in (name, "forward")
    )
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    assert_close(actual, expected, error)


ZERO_SPAN = [*((name, {}) for name in KINDS), ("discrete", {"solver": jaxode.Rodas5P()})]


@pytest.mark.parametrize(
    ("name", "options"),
    with_slow(ZERO_SPAN, [ZERO_SPAN[-1], ("forward", {})]),  # the sizes of their steps are the same
    ids=[*KINDS, "stiff"],
)
def test_zero_span(name, options):
    """`y1 = y0`, and the derivatives of `y1` and of an output by the times are `-+f`."""

    def run(y0, t0, t1, ts, rate):
        f = lambda t, y, rate: rate * t * y
        given = METHODS[name].options(throw=False, **options)
        solution = jaxode.solve(f, y0, t0, t1, rate, ts=ts, **given)
        return solution.y1[0] + 10 * solution.ys[0, 0], solution.y1

    t, y0 = jnp.array(2.0), jnp.array([3.0])
    each = gradient(name)(run, tuple(range(5)), has_aux=True)
    (*bars, rate_bar), y1 = jax.jit(each)(y0, t, t, t[None], jnp.array(1.0))
    np.testing.assert_allclose([x.sum() for x in bars], (11.0, -66.0, 6.0, 60.0), rtol=1e-12)
    assert rate_bar == 0.0
    np.testing.assert_array_equal(y1, y0)


def of_rows(p, ts, weights, bad, keep, options=None):
    """A loss of the rows to `keep`, by parameters `p`. With no `options`, in closed form.

    `y' = a cos(t) y + b^3 + bad y^2`, whose solution is that below if `b` or `a`, and `bad`, are
    zero.
    """
    y0, a, b, t0, t1 = p
    y0 = y0 * jnp.array([[1.0], [0.5]])
    if options is None:
        y = lambda t: y0 * jnp.exp(a * (jnp.sin(t) - jnp.sin(t0))) + b**3 * (t - t0)
        y1, ys = y(t1), jnp.stack([y(t) for t in ts])
    else:
        f = lambda t, y, args: a * jnp.cos(t) * y + b**3 + args[1] * y**2
        solution = jaxode.solve(
            f, y0, t0, t1, ts=ts, row_args=bad, batch="per_sample", rtol=1e-10, atol=1e-10,
            max_steps=200, throw=False, **options,
        )  # fmt: skip
        y1, ys = solution.y1, solution.ys
    y1, ys = (jnp.where(keep, x[..., 0], 0.0) for x in (y1, ys))
    return jnp.sum(y1) + jnp.sum(weights @ jnp.sin(ys))


EXACT = jax.jit(jax.hessian(of_rows))


# Of forward mode, which takes as long to trace, `test_transforms.py` has others.
OF_REVERSE = [case for case in AGAIN if case[0] != "forward"]
AGAIN_IN_REVERSE = [case for case in OF_REVERSE if case[1] is jax.jacrev]


# Fast tests of reverse over reverse are in `test_modes.py` and `test_every_mode.py`.
@pytest.mark.parametrize(("name", "again"), with_slow(OF_REVERSE, AGAIN_IN_REVERSE))
def test_second_derivatives(name, again):
    """Of one program, at values of each kind."""
    loss = functools.partial(of_rows, options=METHODS[name].options())
    run, exact = jax.jit(again(gradient(name)(loss))), EXACT
    p, by_time = jnp.array([0.7, 0.9, 0.0, 0.1, 2.0]), (jnp.array([0.6, 2.0]), jnp.array([2.0, -1]))
    good, both, first = jnp.zeros(2), jnp.array([True, True]), jnp.array([True, False])

    def close(found, expected, tolerance=1e-5):
        """What the dense output, of order 4, leaves of the tolerance of 1e-10."""
        np.testing.assert_allclose(found, expected, atol=tolerance)

    close(run(p, *by_time, good, both), exact(p, *by_time, good, both))
    # A failed row adds nothing if it is masked, and otherwise there is no derivative.
    bad = jnp.array([0.0, 1e3])
    close(run(p, *by_time, bad, first), exact(p, *by_time, good, first))
    assert jnp.isnan(run(p, *by_time, bad, both)).all()
    # The error estimate of a constant field is zero: error control has no part in derivatives.
    p = p.at[1].set(0.0).at[2].set(1.3)
    others = np.ix_(*2 * [[0, 2, 3, 4]])  # not by `a`
    close(run(p, *by_time, good, both)[others], exact(p, *by_time, good, both)[others])
    if METHODS[name].exact:  # there is curvature where no step is taken, too
        p, by_time = jnp.array([0.7, 0.9, 0.0, 0.1, 0.1]), (jnp.full(2, 0.1), jnp.zeros(2))
        close(run(p, *by_time, good, both), exact(p, *by_time, good, both), 1e-12)


def test_forward_over_forward_where_the_error_estimate_is_zero():
    """`y1 = 1 + 2 a^3` has the second derivative `12 a`."""
    y1 = lambda a: jaxode.solve(
        lambda t, y, a: a**3 * jnp.ones(1), jnp.ones(1), 0.0, 2.0, a, adjoint=jaxode.ForwardMode()
    ).y1[0]  # fmt: skip
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.jacfwd(y1)))(1.3), 12 * 1.3, rtol=1e-12)


def decay(y0, rate, **options):
    return jaxode.solve(lambda t, y, rate: -rate * y, y0, 0.0, 1.0, rate, throw=False, **options)


def test_a_solution_that_the_loss_does_not_use_has_no_gradient():
    loss = lambda y0: decay(y0, 1.0).t_reached + jnp.sum(y0)
    assert jax.jit(jax.grad(loss))(jnp.ones(2)).tolist() == [1.0, 1.0]


def of_one_tangent(f, y0, rate):
    """Only the state is mapped: `vmap` does not change the tangent."""
    by_rate = lambda y0: jax.jvp(lambda rate: f(y0, rate), (rate,), (rate,))[1]
    return jax.vmap(by_rate)(jnp.stack([y0, y0]))


NO_FORWARD = r"BacksolveAdjoint: can't apply forward-mode.*adjoint=jaxode\.DiscreteAdjoint\(\)"
NO_REVERSE = r"ForwardMode: .*forward-mode derivatives only.*adjoint=jaxode\.DiscreteAdjoint\(\)"
in_jit = lambda f, *x: of_one_tangent(jax.jit(f), *x)
# (error, method, how to differentiate a function, message)
UNSUPPORTED = [
    (RuntimeError, "forward", lambda f, *x: jax.eval_shape(jax.jacrev(f), *x), NO_REVERSE),
    (TypeError, "backsolve", lambda f, *x: jax.jacfwd(f)(*x), NO_FORWARD),
    (TypeError, "backsolve", of_one_tangent, NO_FORWARD),
    (TypeError, "backsolve", in_jit, NO_FORWARD),
]


@pytest.mark.parametrize(("error", "name", "differentiate", "message"), UNSUPPORTED)
def test_what_a_method_cannot_do_names_the_one_that_can(error, name, differentiate, message):
    run = lambda y0, rate: decay(y0, rate, **METHODS[name].options()).y1
    with pytest.raises(error, match=message):
        differentiate(run, jnp.ones(2), 1.0)
