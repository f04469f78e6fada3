"""Extreme inputs give a right answer or the right error, never a wrong number."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, REVERSE, of_feature, with_slow

import jaxode
from jaxode import Result, divergence

decay = lambda t, y, rate: -rate * y
E = np.exp(-1.0)

# Everything that takes a state: (name, run(y0, **options) -> (state, ok)). A new one is one row.
ENTRIES = [
    ("solve", lambda y0, **options: jaxode.solve(decay, y0, 0.0, 1.0, 1.0, throw=False, **options)),
    *(
        (
            f"flow {control}",
            lambda y0, control=control, **options: jaxode.solve(
                decay, y0, 0.0, 1.0, 1.0, batch=control, throw=False, **options
            ),
        )
        for control in ("joint", "per_sample")
    ),
]  # fmt: skip
NAMES = [name for name, _ in ENTRIES]


def odeint(y0, t=(0.0, 1.0)):
    return jaxode.odeint(lambda y, t: -y, y0, jnp.asarray(t))[-1]


@pytest.mark.parametrize("run", [run for _, run in ENTRIES], ids=NAMES)
@pytest.mark.parametrize("scale", [1e30, 1e200, 1e-30, 1e-200])
def test_scales_of_the_state(run, scale):
    """With a relative tolerance the scale does not matter; an absolute one hides what is below."""
    y1 = run(np.full((2, 3), scale), rtol=1e-6, atol=0.0).y1
    np.testing.assert_allclose(y1, scale * E, rtol=1e-5)


@pytest.mark.parametrize("run", [run for _, run in ENTRIES], ids=NAMES)
def test_single_precision_at_its_ends(run):
    """XLA on the CPU flushes denormals to zero: the error of that is below the least normal."""
    big = run(jnp.full((2, 3), 1e30, jnp.float32))
    np.testing.assert_allclose(big.y1, 1e30 * E, rtol=1e-4)
    denormal = jnp.full((2, 3), 1e-40, jnp.float32)
    tiny = run(denormal)
    assert tiny.ok.all()
    np.testing.assert_allclose(tiny.y1, 0.0, atol=float(jnp.finfo(jnp.float32).tiny))


@pytest.mark.parametrize("run", [run for _, run in ENTRIES], ids=NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_state_that_is_not_finite(run, value):
    """An error and NaN: also a state that is infinite has no derivative to trust."""
    solution = run(np.array([[1.0, value, 3.0], [1.0, 2.0, 3.0]]))
    codes = np.atleast_1d(solution.result)
    assert codes[0] == Result.NON_FINITE
    rows = slice(0, 1) if codes.size > 1 else slice(None)
    assert jnp.isnan(solution.y1[rows]).all()
    if codes.size > 1:  # the other sample has its own steps
        assert codes[1] == Result.SUCCESS
        np.testing.assert_allclose(solution.y1[1], [E, 2 * E, 3 * E], rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_odeint_of_a_state_that_is_not_finite_is_nan(value):
    assert jnp.isnan(odeint(jnp.array([1.0, value]))).all()


def test_overflow_on_the_way_is_an_error():
    grow = lambda t, y, _: 1000 * y
    solution = jaxode.solve(grow, jnp.ones(2), 0.0, 1.0, throw=False)
    assert not solution.ok
    assert jnp.isnan(solution.y1).all()
    # e^709 is the largest number of double precision.
    assert 0.5 < solution.t_reached < 0.71


@functools.cache
def gradient_of_end(name):
    """By the state and the rate, as a function of these and of the absolute tolerance."""

    def end(y0, rate, atol):
        options = METHODS[name].options(rtol=1e-8, atol=atol, throw=False)
        return jaxode.solve(decay, y0, 0.0, 1.0, rate, **options).y1

    return jax.jit(jax.grad(end, (0, 1)))


@pytest.mark.parametrize("name", of_feature(REVERSE))
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_gradients_at_extreme_scales(name, scale):
    """`d (y0 e^-rate) / d (y0, rate)`."""
    y0_bar, rate_bar = gradient_of_end(name)(scale, 1.0, 1e-8 * scale)
    # BacksolveAdjoint has one absolute tolerance for the state and its cotangent.
    loose = scale > 1 and name == "backsolve"
    np.testing.assert_allclose(y0_bar, E, rtol=1e-5 if not loose else 1e-3)
    np.testing.assert_allclose(rate_bar, -scale * E, rtol=1e-5 if not loose else 1e-3)


@pytest.mark.parametrize("t", [(1.0,), (1.0, 1.0), (1.0, 1.0, 1.0)], ids=len)
def test_odeint_over_an_empty_span(t):
    np.testing.assert_array_equal(odeint(jnp.array([2.0, 3.0]), t), [2.0, 3.0])


FLOWS = [
    ((), 0, "joint"), ((), 0, "per_sample"), ((), 1, "joint"), ((), 3, "joint"),
    ((2, 3, 4), 1, "per_sample"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "batch", "control"), with_slow(FLOWS, FLOWS[2:4]), ids=str)
def test_flow_of_any_event_and_batch(control, event, batch):
    z = 1 + jnp.arange(batch * np.prod(event, dtype=int), dtype=float).reshape(batch, *event)
    # A failure is NaN, if there is a number to show it.
    options = {"batch": control, "rtol": 1e-7, "atol": 1e-7, "throw": batch == 0}

    def total(z):
        y1 = jaxode.flow(decay, z, 0.0, 1.0, 1.0, **options)
        return jnp.sum(y1), y1

    bar, y1 = jax.jit(jax.grad(total, has_aux=True))(z)
    assert y1.shape == z.shape
    np.testing.assert_allclose(y1, z * E, rtol=1e-4)
    np.testing.assert_allclose(bar, np.full(z.shape, E), rtol=1e-4)


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), jaxode.Rodas5P()], ids=str)
@pytest.mark.parametrize(
    "y0", [jnp.zeros((0,)), pytest.param(jnp.zeros((2, 0)), marks=pytest.mark.slow)], ids=str
)
def test_state_of_no_numbers(y0, solver):
    solution = jaxode.solve(decay, y0, 0.0, 1.0, 1.0, solver=solver)
    assert solution.ok
    assert solution.y1.shape == y0.shape


@pytest.mark.parametrize(
    ("solver", "event"),
    [
        (diffrax.Tsit5(), ()), (diffrax.Tsit5(), (1, 2, 2)), (jaxode.Rodas5P(), ()),
        (jaxode.Rodas5P(), (1, 2, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_solve_of_any_event(solver, event):
    y0 = jnp.full(event, 2.0)
    y1 = jaxode.solve(decay, y0, 0.0, 1.0, 1.0, solver=solver, rtol=1e-7, atol=1e-7).y1
    assert y1.shape == event
    np.testing.assert_allclose(y1, 2 * E, rtol=1e-5)


@pytest.mark.parametrize("t", [1e30, -1e30])
def test_times_far_away(t):
    """What counts is how far the field goes in them."""
    y1 = jaxode.solve(lambda t, y, _: -y / 1e30, jnp.ones(1), 0.0, t).y1
    np.testing.assert_allclose(y1, np.exp(-np.sign(t)), rtol=1e-4)


def test_span_of_a_denormal_number():
    y1 = jaxode.solve(decay, jnp.ones(1), 0.0, 1e-310, 1.0, throw=False).y1
    np.testing.assert_allclose(y1, 1.0, rtol=1e-15)


# --- flows. `dz/dt = p z` carries N(0, 1) to N(0, e^2p), in every dimension of an event.

P = 0.5


def scaling(t, z, p):
    return p * z


def normal(event, **options):
    return jaxode.cnf(scaling, jaxode.standard_normal(event), rtol=1e-8, atol=1e-8, **options)


def exact_log_prob(x, p=P):
    dims = x[0].size if x.shape[0] else 1
    x = x.reshape(x.shape[0], -1)
    return -0.5 * ((x * np.exp(-p)) ** 2).sum(1) - dims * (p + 0.5 * np.log(2 * np.pi))


DENSITIES = [((), 3, "joint"), ((2, 1, 2), 1, "per_sample")]


@pytest.mark.slow
@pytest.mark.parametrize(("event", "batch", "control"), DENSITIES, ids=str)
def test_cnf_of_any_event_and_batch(control, event, batch):
    flow = normal(event, batch=control)
    x = jax.random.normal(jax.random.key(0), (batch, *event))
    np.testing.assert_allclose(flow.log_prob(P, x), exact_log_prob(x), rtol=1e-6)
    loss, gradient = jax.value_and_grad(flow.nll)(P, x)
    np.testing.assert_allclose(loss, -exact_log_prob(x).mean(), rtol=1e-6)
    slope = x[0].size - (x**2).sum() / batch * np.exp(-2 * P)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)
    sample, log_prob = flow.sample_and_log_prob(P, jax.random.key(1), batch)
    assert sample.shape == (batch, *event)
    np.testing.assert_allclose(log_prob, exact_log_prob(sample), rtol=1e-6)


EMPTY = [("joint", divergence.exact()), ("per_sample", divergence.hutchinson())]


@pytest.mark.parametrize(("control", "estimator"), EMPTY, ids=["joint-exact", "per_sample-noisy"])
def test_cnf_of_an_empty_batch(control, estimator):
    """No densities, and no samples; the mean of nothing is an error."""
    flow = normal((2,), batch=control, divergence=estimator)
    x, key = jnp.zeros((0, 2)), jax.random.key(0)
    assert flow.log_prob(P, x, key=key).shape == (0,)
    with pytest.raises(ValueError, match=r"^nll\(x=...\): must have at least one row"):
        flow.nll(P, x, key=key)
    assert flow.sample(P, key, 0).shape == (0, 2)
    sample, log_prob = flow.sample_and_log_prob(P, key, 0)
    assert (sample.shape, log_prob.shape) == ((0, 2), (0,))


@pytest.mark.slow
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_cnf_over_an_empty_span_is_its_base(control):
    flow = normal((2,), t0=1.0, t1=1.0, batch=control)
    x = jax.random.normal(jax.random.key(0), (3, 2))
    base = flow.base.log_prob(x)
    np.testing.assert_array_equal(flow.log_prob(P, x), base)
    np.testing.assert_array_equal(flow.to_base(P, x), x)
    loss, (p_bar, x_bar) = jax.value_and_grad(flow.nll, (0, 1))(P, x)
    np.testing.assert_allclose(loss, -base.mean(), rtol=1e-14)
    assert p_bar == 0.0
    np.testing.assert_allclose(x_bar, x / 3, rtol=1e-14)
    base_key, _ = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(
        flow.sample(P, jax.random.key(0), 3), flow.base.sample(base_key, (3,))
    )


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-310])
def test_cnf_at_extreme_scales(scale):
    flow = normal((2,), batch="per_sample")
    x = scale * jnp.array([[1.0, -2.0], [0.5, 1.0]])
    np.testing.assert_allclose(flow.log_prob(P, x), exact_log_prob(x), rtol=1e-5)
    np.testing.assert_allclose(flow.nll(P, x), -exact_log_prob(x).mean(), rtol=1e-5)
    x_bar = jax.grad(flow.nll, 1)(P, x)
    np.testing.assert_allclose(x_bar, x * np.exp(-2 * P) / 2, rtol=1e-5, atol=1e-300)


def test_log_density_beyond_the_largest_number_is_minus_infinity():
    """In single precision `x^2` overflows at 1e30, where the density is zero."""
    x = jnp.full((1, 2), 1e30, jnp.float32)
    p = jnp.asarray(P, jnp.float32)
    assert normal((2,)).log_prob(p, x) == -np.inf


@functools.cache
def quiet(control):
    """A flow that does not raise, and its loss with the gradient."""
    flow = normal((2,), batch=control, throw=False)
    return flow, jax.jit(jax.value_and_grad(flow.nll))


# With joint steps: `test_bad_data.py`.
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_cnf_of_data_that_is_not_finite(value):
    """An error that says so, or NaN: in the loss, in every gradient, and in that row's density."""
    flow = normal((2,), batch="per_sample")
    x = jnp.array([[0.1, 0.2], [value, 1.0]])
    for call in (flow.log_prob, flow.to_base, flow.nll):
        with pytest.raises(
            jaxode.SolveError,
            match=r"=\.\.\.\): must be finite; got .* 1 of 2 rows, first in row 1",
        ):
            call(P, x)
    with pytest.raises(
        jaxode.SolveError, match=r"=\.\.\.\): must be finite; got .* 1 of 2 rows, first in row 1"
    ):
        flow.from_base(P, x)
    silent, with_gradient = quiet("per_sample")
    loss, gradient = with_gradient(P, x)
    assert np.isnan(loss)
    assert np.isnan(gradient)
    log_prob = silent.log_prob(P, x)
    assert np.isnan(log_prob[1])
    np.testing.assert_allclose(log_prob[0], exact_log_prob(x)[0], rtol=1e-6)


@pytest.mark.parametrize("p", [np.nan, np.inf, 1e30])
def test_parameters_that_are_not_of_this_world(p):
    flow, with_gradient = quiet("joint")
    x = jnp.array([[0.1, 0.2], [0.3, 1.0]])
    loss, gradient = with_gradient(p, x)
    assert np.isnan(loss)
    assert np.isnan(gradient)
    assert np.isnan(flow.log_prob(p, x)).all()
    assert np.isnan(flow.sample(p, jax.random.key(0), 3)).all()


def test_more_steps_than_can_be_counted_are_no_limit():
    run = lambda **options: jaxode.solve(decay, jnp.ones(1), 0.0, 1.0, 1.0, **options).y1
    np.testing.assert_array_equal(run(max_steps=10**10), run(max_steps=2**31 - 1))


@pytest.mark.slow
def test_second_derivatives_of_an_empty_batch():
    options = {"batch": "per_sample", "adjoint": jaxode.BacksolveAdjoint()}
    run = lambda z: jaxode.flow(lambda t, z, _: -z * z, z, 0.0, 1.0, **options).sum()
    assert jax.jacrev(jax.grad(run))(jnp.zeros((0, 2))).shape == (0, 2, 0, 2)


def test_a_state_that_is_not_finite_fails_over_an_empty_span():
    """A row of padding, which a mask of `ok` leaves out."""
    y0, t1 = jnp.array([[1.0], [jnp.nan]]), jnp.array([1.0, 0.0])
    solution = jaxode.solve(decay, y0, 0.0, t1, 1.0, batch="per_sample", throw=False)
    np.testing.assert_array_equal(solution.ok, [True, False])
    assert solution.result[1] == jaxode.Result.NON_FINITE
