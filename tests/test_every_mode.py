"""Every mode and order of differentiation: `check_grads` as it stands, and pairs of modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from helpers import METHODS, checking_leaks, with_slow
from jax.test_util import check_grads
from test_features import ALL, EACH_ONCE, loss_of

import jaxode
from jaxode.nn import MLP, field

# Finite differences of a computed solution move its steps, so the tolerance is tight.
SOLVE = functools.partial(jaxode.solve, rtol=1e-10, atol=1e-10, max_steps=400)
P, Y0 = jnp.array([0.7, -0.4]), jnp.array([0.3, 0.8])
T, X = jnp.array([0.4, 0.9]), jnp.array([[0.2, -0.5], [1.0, 0.3]])
NETWORK = MLP(2, (3,), key=jax.random.key(0))
FLOW = jaxode.cnf(field, jaxode.standard_normal(2), rtol=1e-10, atol=1e-10)
NOISY = jaxode.cnf(
    field, jaxode.standard_normal(2), divergence=jaxode.divergence.hutchinson(),
    rtol=1e-10, atol=1e-10,
)  # fmt: skip
KEY = jax.random.key(1)


def slope(t, y, p):
    return jnp.stack([y[1] + jnp.sin(t), -jnp.sin(y[0]) * p[0] + p[1] * y[1]])


def end(y0, p, t0, t1):
    return SOLVE(slope, y0, t0, t1, p).y1


def outputs(y0, p, ts):
    return SOLVE(slope, y0, 0.0, 1.0, p, ts=ts).ys


def rows(y0, p, ends):
    def of_row(t, y, args):
        return slope(t, y, args[0] * args[1])

    return SOLVE(of_row, y0, 0.0, ends, p, row_args=1 + y0, batch="per_sample").y1


def doses(y0, p, times, amounts):
    jumps = jaxode.Jumps(times, lambda t, y, args, i: y + amounts[i])
    return SOLVE(slope, y0, 0.0, 1.0, p, jumps=jumps).y1


def time_of_an_event(y0, p):
    event = jaxode.Event(lambda t, y, args: y[0] - 0.6 * args[0])
    solution = SOLVE(slope, y0, 0.0, 4.0, p, event=event)
    return solution.t1, solution.y1


def between_steps(y0, p, t):
    return SOLVE(slope, y0, 0.0, 1.0, p, dense=True).evaluate(t)


def breakpoint_within(y0, p):
    def kinked(t, y, p):
        return slope(t, y, jnp.where(t < 0.5, p, 2 * p))

    return SOLVE(kinked, y0, 0.0, 1.0, p, breakpoints=[0.5]).y1


def stiff(y0, p):
    return SOLVE(slope, y0, 0.0, 1.0, p, solver=jaxode.Rodas5P()).y1


def equal_steps(y0, p):
    return jaxode.solve(slope, y0, 0.0, 1.0, p, steps=3).y1


def odeint(y0, p, ts):
    return jaxode.odeint(lambda y, t, p: slope(t, y, p), y0, ts, p, rtol=1e-10, atol=1e-10)


def nll(flow, network, x):
    return flow.nll(network, x, key=KEY)


def matching(network, x):
    return FLOW.matching_loss(network, x, key=KEY)


MOST = {
    "end": (end, (Y0, P, 0.1, 1.0)),
    "outputs": (outputs, (Y0, P, T)),
    "rows": (rows, (X, P, jnp.array([1.0, 1.5]))),
    "doses": (doses, (Y0, P, T, X)),
    "the time of an event": (time_of_an_event, (Y0, P)),
    "between steps": (between_steps, (Y0, P, T)),
    "a breakpoint": (breakpoint_within, (Y0, P)),
    "stiff": (stiff, (Y0, P)),
    "steps=3": (equal_steps, (Y0, P)),
    "log_prob": (FLOW.log_prob, (NETWORK, X)),
    "sample": (lambda network: FLOW.sample(network, KEY, 2), (NETWORK,)),
    "nll": (functools.partial(nll, FLOW), (NETWORK, X)),
    "nll, Hutchinson": (functools.partial(nll, NOISY), (NETWORK, X)),
    "matching_loss": (matching, (NETWORK, X)),
}


# Each compiles a program for each pair of modes.
@pytest.mark.parametrize("name", with_slow(MOST, [name for name in MOST if name != "steps=3"]))
def test_check_grads_of_the_default_method(name):
    """With its default modes, forward and reverse, and the first order before the second."""
    function, inputs = MOST[name]
    check_grads(jax.jit(function), inputs, order=2)


@pytest.mark.slow  # its two gradients are compared by `test_odeint.py`, this tests second ones
def test_check_grads_of_odeint():
    """Which has reverse mode, as the original."""
    check_grads(jax.jit(odeint), (Y0, P, T), order=2, modes=["rev"])


def test_third_derivatives():
    """Reverse mode thrice, against forward mode, of a solution of three equal steps."""

    def curved(p, adjoint=None):
        options = {} if adjoint is None else {"adjoint": adjoint}
        return jaxode.solve(slope, Y0, 0.0, 1.0, p, steps=3, **options).y1[0]

    along = jnp.array([0.3, -1.1])

    def forward_of(f):
        return lambda p: jax.jvp(f, (p,), (along,))[1]

    expected = forward_of(forward_of(jax.jacfwd(lambda p: curved(p, jaxode.ForwardMode()))))
    by_reverse = jax.grad(lambda p: jax.grad(lambda p: jax.grad(curved)(p) @ along)(p) @ along)
    np.testing.assert_allclose(jax.jit(by_reverse)(P), jax.jit(expected)(P), rtol=1e-10)


def test_no_traced_value_outlives_its_program():
    with checking_leaks():
        jax.jit(jax.grad(lambda y0: equal_steps(y0, P).sum()))(Y0)


def losses(name, method):
    """A loss of a case, and the same in closed form."""
    # Tighter than that of the case, since dense output, of order 4, moves second derivatives more.
    tight = {"rtol": 1e-11, "atol": 1e-11, "max_steps": 1000}
    case, options = CASES[name], tight | {"adjoint": METHODS[method].adjoint}
    computed = lambda x: loss_of(case.seen(x, case.solve(x, **options)), ALL)
    return computed, lambda x: loss_of(case.exact(x), ALL)


def forward(loss, along):
    return lambda x: jax.jvp(loss, (x,), (along,))[1]


def reverse(loss, along):
    def slope(x):
        bars = jax.grad(loss)(x)
        return sum(jnp.vdot(bars[name], along[name]) for name in along)

    return slope


WAYS = {jax.jacfwd: forward, jax.jacrev: reverse}
OF_CASES = [("discrete", name) for name in EACH_ONCE]
OF_CASES += [("backsolve", "doses in spans of each row"), ("forward", "equal steps")]


@pytest.mark.slow  # a program of a second derivative for each feature
@pytest.mark.parametrize(("method", "name"), OF_CASES)
def test_second_derivatives_of_a_feature_are_those_of_the_closed_form(method, name):
    """Along a direction of all inputs. Reverse over reverse needs the rules of the other pairs,
    too; `check_grads` tests each pair, of fewer features at a time."""
    x, (loss, exact) = CASES[name].inputs, losses(name, method)
    along = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(1.0 + leaf.size)[1:]).reshape(leaf.shape), x
    )
    expected = jax.jit(forward(forward(exact, along), along))(x)
    first, then = METHODS[method].pairs[-1]
    curvature = jax.jit(WAYS[then](WAYS[first](loss, along), along))(x)
    np.testing.assert_allclose(curvature, expected, rtol=1e-6)
