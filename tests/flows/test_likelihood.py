"""The fused objective against plain autodiff through the recorded steps, and what it promises."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import METHODS, REVERSE, assert_close, of_feature, optional, with_slow

import jaxode
from jaxode._jax.closure import compiled
from jaxode.flows.integrands import Integrands
from jaxode.flows.likelihood.quadrature import gauss
from jaxode.ode.adjoints import sweep
from jaxode.ode.loop.integrate import integrate
from jaxode.ode.system import make_system, pose

BATCH, DIM = 5, 2
KEY = jax.random.key(3)
BASE = jaxode.standard_normal(DIM)


def field(t, z, args):
    """Nonlinear in everything; with or without a context."""
    params, context = args if len(args) == 2 else (args, jnp.zeros(DIM))
    w1, w2, b = params
    return w2 @ jnp.tanh(w1 @ (z + context) + b * t) + 0.3 * jnp.sin(z) * t


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


PARAMS = (normal(0, 4, DIM), normal(1, DIM, 4), normal(2, 4))
X, CONTEXT = normal(4, BATCH, DIM), 0.3 * normal(5, BATCH, DIM)
WEIGHTS = jnp.array([1.0, 2.0, 0.5, 1.5, 3.0])

ESTIMATORS = {
    "exact": jaxode.divergence.exact(),
    "hutchinson": jaxode.divergence.hutchinson(),
    "three probes": jaxode.divergence.hutchinson(3, "gaussian"),
}

REGULARIZERS = (
    jaxode.regularizers.kinetic_energy(0.7), jaxode.regularizers.jacobian_frobenius(0.2),
)  # fmt: skip


def make(**options):
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    return jaxode.cnf(field, BASE, **{**tolerances, **options})


def probes_of(flow, x):
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(len(x)))
    return jax.vmap(flow.divergence.init)(keys, x)


def recorded_times(flow, params, x, context):
    """The mesh of the forward solve, `[steps + 1, rows]`."""
    carried, span = Integrands(flow.f, flow.divergence).field, (flow.t1, flow.t0)
    system = make_system(
        carried, x, span, params, flow.solve_options, row_args=context, batch=flow.batch
    )

    @compiled
    def solve(system):
        problem, method, _ = pose(system)
        return integrate(problem, method, 2)[1]

    tape = solve(system)
    return tape.times[: int(tape.num_steps) + 1]


def reference(flow, times):
    """The objective as a plain function, step by step and stage by stage, for autodiff.

    Its loops are scans, as straight-line code takes long to compile.
    """
    tableau = flow.solve_options.tableau
    A, b, c = (jnp.asarray(x) for x in (tableau.A, tableau.b, tableau.c))
    theta, weight = map(jnp.asarray, gauss(tableau))

    def one(params, x, context, probe, mesh):
        args = params if context is None else (params, context)

        def costs(t, z):
            """The divergence, and what the loss adds for the regularizers, in forward time."""
            g = lambda z: field(t, z, args)
            J = jax.jacfwd(g)(z)
            squares = jnp.sum(J**2) if probe is None else jnp.mean(jnp.sum((probe @ J.T) ** 2, 1))
            values = {"kinetic_energy": jnp.sum(g(z) ** 2), "jacobian_frobenius": squares}
            running = sum(r.weight * values[r.name] for r in flow.regularizers)
            return flow.divergence.apply(g, z, probe)[1], running

        def step(carry, interval):
            z, log_det, running = carry
            t, h = interval

            def stage(k, row):
                i, a, c = row
                return k.at[i].set(field(t + c * h, z + h * a @ k, args)), None

            k = jnp.zeros((tableau.stages, DIM))
            k, _ = jax.lax.scan(stage, k, (jnp.arange(tableau.stages), A, c))
            at = lambda s: costs(t + s * h, z + h * tableau.dense_weights(s) @ k)
            div, cost = jax.vmap(at)(theta)
            log_det, running = log_det + h * weight @ div, running + jnp.abs(h) * weight @ cost
            return (z + h * b @ k, log_det, running), None

        intervals = mesh[:-1], jnp.diff(mesh)
        start = (x, jnp.zeros(()), jnp.zeros(()))
        (z, log_det, running), _ = jax.lax.scan(step, start, intervals)
        return BASE.log_prob(z) + log_det - running

    def loss(params, x, context, weights):
        probes = probes_of(flow, x)
        meshes = jnp.broadcast_to(times.T, (len(x), len(times)))
        axes = (None, 0, None if context is None else 0, None if probes is None else 0, 0)
        log_prob = jax.vmap(one, axes)(params, x, context, probes, meshes)
        return -jnp.sum(weights * log_prob) / jnp.sum(weights)

    return loss


# Where a constant of the library is patched: a program of its own, traced with that.
ANEW = {"max_steps": 4095}
# Each option that changes the program is in one of them at least.
CASES = {
    "hutchinson": {"divergence": ESTIMATORS["hutchinson"]},
    "a solver without a shared stage": {"solver": diffrax.Heun(), "rtol": 1e-2, "atol": 1e-2},
    "equal steps": {"solver": diffrax.Euler(), "steps": 7},
    "regularized, Dopri8": {
        "regularizers": REGULARIZERS,
        "divergence": ESTIMATORS["exact"],
        "solver": diffrax.Dopri8(),
    },
    "regularized, three probes, per-sample steps": {
        "regularizers": REGULARIZERS,
        "divergence": ESTIMATORS["three probes"],
        "batch": "per_sample",
    },
    "regularized, few checkpoints": {
        "regularizers": REGULARIZERS,
        "divergence": ESTIMATORS["hutchinson"],
        "adjoint": jaxode.DiscreteAdjoint(2),
        "rtol": 1e-6,
        "atol": 1e-6,
    },
}


GATHERED = "hutchinson", "regularized, few checkpoints", "a solver without a shared stage"
# Without a gradient other programs run.
VALUES = ("hutchinson", "regularized, three probes, per-sample steps", GATHERED[1])


@functools.cache
def by_autodiff(name):
    flow = make(**CASES[name])
    times = recorded_times(flow, PARAMS, X, CONTEXT)
    plain = jax.jit(jax.value_and_grad(reference(flow, times), (0, 1, 2, 3)))
    return plain(PARAMS, X, CONTEXT, WEIGHTS)


# That of Heun's method is gathered with nodes as one batch.
PROGRAMS = [(name, False) for name in CASES] + [(name, True) for name in GATHERED[:2]]


# Others have options that others have as well: few checkpoints and gathered gradients, which
# `test_discrete.py` compares, Heun's method, which `test_breakpoints.py` takes, and regularizers,
# which other gradient methods have below.
@pytest.mark.parametrize(("name", "gathered"), with_slow(PROGRAMS, PROGRAMS[1:]))
def test_equals_autodiff_through_the_recorded_steps(name, gathered, monkeypatch):
    """Value and gradient, the parameters' by stage or gathered by step."""
    expected = by_autodiff(name)
    if gathered:
        monkeypatch.setattr(sweep, "PARAMETERS_PER_WORK", 0)
    flow = make(**CASES[name], **(ANEW if gathered else {}))
    inputs = (PARAMS, X, CONTEXT, WEIGHTS)

    def loss(params, x, context, weights):
        return flow.nll(params, x, key=KEY, context=context, weights=weights)

    value, gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*inputs)
    assert_close((value, gradient), expected, 1e-11)
    if name in VALUES and not gathered:
        np.testing.assert_allclose(jax.jit(loss)(*inputs), value, rtol=1e-13)


@pytest.mark.parametrize("name", with_slow(["hutchinson", GATHERED[2]], GATHERED[2:]))
def test_nodes_as_one_batch_on_an_accelerator(name, monkeypatch):
    expected = by_autodiff(name)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    flow = make(**CASES[name], max_steps=4094)
    loss = lambda *inputs: flow.nll(*inputs[:2], key=KEY, context=inputs[2], weights=inputs[3])
    actual = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(PARAMS, X, CONTEXT, WEIGHTS)
    assert_close(actual, expected, 1e-11)


# Across jumps they are in `test_breakpoints.py`.
@pytest.mark.slow
@pytest.mark.parametrize(("control", "together"), [("joint", False), ("per_sample", True)])
def test_gradient_by_the_times(control, together, monkeypatch):
    """The mesh stays where it is relative to its two ends."""
    if together:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    make_at = lambda t0, t1: make(
        t0=t0, t1=t1, batch=control, divergence=ESTIMATORS["exact"], **(ANEW if together else {}),
    )  # fmt: skip
    inputs = (jnp.array(0.1), jnp.array(0.9))
    flow = make_at(*inputs)
    mesh = (recorded_times(flow, PARAMS, X, CONTEXT) - inputs[1]) / (inputs[0] - inputs[1])

    def plain(t0, t1):
        times = t1 + mesh * (t0 - t1)
        return reference(flow, times)(PARAMS, X, CONTEXT, WEIGHTS)

    def fused(t0, t1):
        return make_at(t0, t1).nll(PARAMS, X, key=KEY, context=CONTEXT, weights=WEIGHTS)

    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(*inputs)
    assert_close(jax.jit(jax.value_and_grad(fused, (0, 1)))(*inputs), expected, 1e-11)


def end_time(key, batch=2, **options):
    """Where a solve of the loss ends: for `f = 1` it carries `x` to `x - t1 + end`."""
    ones = lambda t, z, args: jnp.ones_like(z)
    flow = jaxode.cnf(ones, jaxode.standard_normal(1), **options)
    x = jnp.arange(float(batch))[:, None]
    log_prob = flow.nll_and_stats(None, x, key=key)[1].log_prob
    return log_prob[0] - log_prob[1] - 0.5 + flow.t1


@pytest.mark.parametrize("t0", with_slow([0.0, 2.0], [0.0]))
def test_steer_ends_at_a_uniform_random_time(t0):
    t1, steer = 1.0 - t0, 0.4
    keys = jax.random.split(KEY, 2000)
    ends = jax.jit(jax.vmap(lambda key: end_time(key, t0=t0, t1=t1, steer=steer)))(keys)
    uniform = scipy.stats.uniform(t0 - steer, 2 * steer)
    # The keys are fixed, and the ends are those of 2000 draws that no test of size 1% rejects.
    assert scipy.stats.kstest(ends, uniform.cdf).pvalue > 0.01
    np.testing.assert_allclose(end_time(keys[0], 5, t0=t0, t1=t1, steer=steer), ends[0], rtol=1e-12)


def test_steer_beyond_a_traced_span_has_no_loss():
    """Some ends would be on the other side of the data."""

    def loss(t1):
        flow = make(t1=t1, steer=0.5, throw=False, divergence=ESTIMATORS["exact"])
        return flow.nll(PARAMS, X, key=KEY)

    losses = jax.jit(jax.vmap(loss))(jnp.array([0.6, 0.5, 0.1]))
    np.testing.assert_array_equal(jnp.isfinite(losses), [True, False, False])


@pytest.mark.slow
def test_steer_is_the_loss_of_a_flow_that_ends_there():
    """Value and gradient by autodiff of that flow, with the same noise."""
    options = {
        "divergence": ESTIMATORS["hutchinson"], "batch": "per_sample",
        "regularizers": REGULARIZERS, "t0": 1.0, "t1": -0.5,
    }  # fmt: skip
    flow = make(steer=0.3, **options)
    end = end_time(KEY, t0=flow.t0, t1=flow.t1, steer=0.3)
    assert abs(end - flow.t0) > 0.05
    there = make(**{**options, "t0": end})
    inputs = (PARAMS, X, CONTEXT, WEIGHTS)
    times = recorded_times(there, PARAMS, X, CONTEXT)
    expected = jax.jit(jax.value_and_grad(reference(there, times), (0, 1, 2, 3)))(*inputs)

    def loss(params, x, context, weights):
        return flow.nll(params, x, key=KEY, context=context, weights=weights)

    actual = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*inputs)
    assert_close(actual, expected, 1e-11)
    np.testing.assert_allclose(jax.jit(loss)(*inputs), actual[0], rtol=1e-13)


def test_steer_leaves_the_density_alone():
    options = {"divergence": ESTIMATORS["hutchinson"]}
    flow, plain = make(steer=0.3, **options), make(**options)
    np.testing.assert_array_equal(
        flow.log_prob(PARAMS, X, key=KEY), plain.log_prob(PARAMS, X, key=KEY)
    )
    np.testing.assert_array_equal(flow.to_base(PARAMS, X), plain.to_base(PARAMS, X))


@pytest.mark.slow
def test_steer_with_another_gradient_method():
    tight = {"rtol": 1e-10, "atol": 1e-10, "divergence": ESTIMATORS["hutchinson"], "steer": 0.3}
    gradient = lambda flow: jax.jit(jax.grad(lambda params: flow.nll(params, X, key=KEY)))(PARAMS)
    by_adjoint = gradient(make(adjoint=jaxode.BacksolveAdjoint(), **tight))
    assert_close(by_adjoint, gradient(make(**tight)), 1e-6)


@pytest.mark.slow
def test_converges_to_the_tight_gradient():
    """As the tolerance falls, at the order of the solver or better."""
    divergence = ESTIMATORS["hutchinson"]

    @jax.jit
    def gradient(tolerance):
        flow = make(divergence=divergence, rtol=tolerance, atol=tolerance)
        return jax.grad(lambda params: flow.nll(params, X, key=KEY))(PARAMS)

    tight = make(divergence=divergence, rtol=1e-11, atol=1e-11, adjoint=jaxode.BacksolveAdjoint())
    expected = jax.jit(jax.grad(lambda params: tight.nll(params, X, key=KEY)))(PARAMS)
    error = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        pairs = zip(gradient(tolerance), expected, strict=True)
        error.append(max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs))
    assert error[1] < error[0] / 20
    assert error[2] < error[1] / 20
    assert error[2] < 1e-7


@pytest.mark.slow
def test_samples_of_half_precision(default_settings):
    """They are solved in float32; the derivative and the base density see them as they are."""
    flow = jaxode.cnf(jaxode.nn.field, BASE)
    m = jaxode.nn.ConcatSquash(DIM, (8, 8), key=KEY)
    x = jax.random.normal(jax.random.key(0), (8, DIM)).astype(jnp.bfloat16)
    loss, gradient = jax.value_and_grad(flow.nll)(m, x)
    expected, single = jax.value_and_grad(flow.nll)(m, x.astype(jnp.float32))
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(loss, expected, rtol=2 * eps)
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(single), strict=True):
        assert leaf.dtype == jnp.float32
        # A few roundings of each sample, relative to the largest entry.
        np.testing.assert_allclose(leaf, other, rtol=0, atol=4 * eps * jnp.abs(other).max())


@pytest.mark.slow
def test_under_transformations():
    flow = make(divergence=ESTIMATORS["hutchinson"])
    loss = lambda params, x, key: flow.nll(params, x, key=key)
    gradient = jax.grad(loss)
    expected = jax.jit(gradient)(PARAMS, X, KEY)
    checkpointed = jax.jit(jax.grad(jax.checkpoint(loss)))
    assert_close(checkpointed(PARAMS, X, KEY), expected, 1e-12)
    assert_close(eqx.filter_value_and_grad(loss)(PARAMS, X, KEY)[1], expected, 1e-12)
    two = jnp.stack([X, X[::-1]])
    keys = jnp.stack([KEY, KEY])
    batched = jax.jit(jax.vmap(gradient, (None, 0, 0)))(PARAMS, two, keys)
    assert_close(jax.tree.map(lambda leaf: leaf[0], batched), expected, 1e-12)
    _, scanned = jax.jit(lambda: jax.lax.scan(
        lambda carry, inputs: (carry, gradient(PARAMS, *inputs)), 0, (two, keys)
    ))()  # fmt: skip
    assert_close(jax.tree.map(lambda leaf: leaf[0], scanned), expected, 1e-12)


@pytest.mark.slow
def test_parameters_of_flax():
    linen = optional("flax.linen")
    module = linen.Dense(DIM, param_dtype=jnp.float64)
    params = module.init(KEY, jnp.zeros(DIM))
    flow = jaxode.cnf(lambda t, z, p: jnp.tanh(module.apply(p, z)), BASE, rtol=1e-9, atol=1e-9)
    run = jax.jit(jax.value_and_grad(flow.nll))
    _, gradient = run(params, X)
    direction = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), params)
    moved = lambda e: run(jax.tree.map(lambda p, d: p + e * d, params, direction), X)[0]
    slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-6)


@pytest.mark.slow
def test_hessian_forward_over_reverse():
    flow = make(divergence=ESTIMATORS["exact"])
    times = recorded_times(flow, PARAMS, X, None)
    plain = lambda b: reference(flow, times)((*PARAMS[:2], b), X, None, jnp.ones(BATCH))
    fused = lambda b: flow.nll((*PARAMS[:2], b), X)
    expected = jax.jit(jax.jacfwd(jax.grad(plain)))(PARAMS[2])
    assert_close(jax.jit(jax.jacfwd(jax.grad(fused)))(PARAMS[2]), expected, 1e-10)
    with pytest.raises(Exception, match="nll: the gradient of a solve can be differentiated in"):
        jax.jacrev(jax.grad(fused))(PARAMS[2])


@pytest.mark.slow
def test_values_that_the_field_and_the_base_close_over_get_gradients():
    flow = make(divergence=ESTIMATORS["exact"])

    def closed(params, mean):
        class Base:
            event_shape = (DIM,)
            log_prob = staticmethod(lambda z: BASE.log_prob(z - mean[None]))
            sample = staticmethod(BASE.sample)

        return jaxode.cnf(
            lambda t, z, _: field(t, z, params), Base, rtol=1e-4, atol=1e-4,
            divergence=ESTIMATORS["exact"],
        ).nll(None, X)  # fmt: skip

    mean = jnp.array([0.2, -0.1])
    by_params, by_mean = jax.jit(jax.grad(closed, (0, 1)))(PARAMS, mean)
    shifted = lambda params, mean: (
        -jnp.mean(
            BASE.log_prob(flow.to_base(params, X) - mean[None])
            - BASE.log_prob(flow.to_base(params, X))
        )
    )
    total = lambda p, mean: flow.nll(p, X) + shifted(p, mean)
    assert_close((by_params, by_mean), jax.jit(jax.grad(total, (0, 1)))(PARAMS, mean), 1e-11)


@pytest.mark.slow
def test_a_failed_solve_is_nan():
    """Loss and gradients; also the other way round, with an error. Of joint steps there is
    `test_failures.py`."""
    flow = make(batch="per_sample", divergence=ESTIMATORS["exact"], max_steps=1, rtol=1e-9)
    loss = lambda params, x: flow.nll(params, x)
    value, gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))(PARAMS, X)
    assert np.isnan(value)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(jaxode.SolveError, match="nll: the steps ran out"):
        flow.nll(PARAMS, X)


@functools.cache
def by_method(name):
    """The loss with its statistics, and the gradients."""
    tight = {"rtol": 1e-10, "atol": 1e-10, "regularizers": REGULARIZERS}
    flow = make(**METHODS[name].options(divergence=ESTIMATORS["hutchinson"], **tight))
    loss = lambda params, x, context: flow.nll_and_stats(params, x, key=KEY, context=context)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(PARAMS, X, CONTEXT)


@pytest.mark.parametrize("name", of_feature(name for name in REVERSE if name != "discrete"))
def test_other_gradient_methods_agree(name):
    """They solve the augmented ODE: the lecture's own algorithms."""
    (value, stats), gradient = by_method("discrete")
    (other, other_stats), other_gradient = by_method(name)
    np.testing.assert_allclose(other, value, rtol=1e-8)
    assert_close(other_gradient, gradient, 1e-6)
    for cost in ("kinetic_energy", "jacobian_frobenius"):
        np.testing.assert_allclose(other_stats.running[cost], stats.running[cost], rtol=1e-7)
    np.testing.assert_allclose(other_stats.log_det, stats.log_det, atol=1e-7)


def test_a_regularizer_of_the_jacobian_with_a_field_that_has_a_closed_form():
    """`auto()` takes the exact trace for the loss, and the closed form for the density."""
    network = jaxode.nn.ConcatSquash(DIM, (8,), key=KEY)
    regularized = {"regularizers": REGULARIZERS[1:], "rtol": 1e-8, "atol": 1e-8}
    losses = [
        jaxode.cnf(jaxode.nn.field, BASE, divergence=choice, **regularized).nll(network, X)
        for choice in (jaxode.divergence.auto(), jaxode.divergence.exact())
    ]
    np.testing.assert_allclose(*losses, rtol=1e-10)
    many = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(16), **regularized)
    network, x = jaxode.nn.ConcatSquash(16, (8,), key=KEY), normal(8, 3, 16)
    with pytest.raises(ValueError, match="a stochastic divergence needs random numbers"):
        many.nll(network, x)
    assert many.log_prob(network, x).shape == (3,)


@pytest.mark.slow
def test_steer_is_a_function_of_the_key_whatever_the_dtype():
    flow = make(steer=0.5, divergence=ESTIMATORS["exact"], rtol=1e-6, atol=1e-6)
    double = (PARAMS, X, CONTEXT)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), double)
    loss = lambda params, x, context: flow.nll(params, x, context=context, key=KEY)
    np.testing.assert_allclose(loss(*single), loss(*double), rtol=1e-4)
