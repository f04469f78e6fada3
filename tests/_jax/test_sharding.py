"""A batch over eight devices, under `jax.shard_map`: the numbers of one device."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import OPTIMIZED, with_slow
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxode
from benchmarks.harness.hlo import collectives
from jaxode._jax import sharding

# Before, an array of zeros made like another did not vary like it.
AXIS, DEVICES, BATCH, DIM = "batch", 8, 16, 2
EVERYWHERE, SPLIT = P(), P(AXIS)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


PARAMS = (normal(0, 16, DIM), normal(1, DIM, 16), normal(2, 16))
X, CONTEXT, KEY = normal(4, BATCH, DIM), 0.3 * normal(5, BATCH, DIM), jax.random.key(3)
WEIGHTS = jnp.linspace(0.1, 2.0, BATCH)


def field(t, z, args):
    (w1, w2, b), context = args
    return w2 @ jnp.tanh(w1 @ (z + context) + b * t) + 0.3 * jnp.sin(z) * t


def loss_of(axis_name, **options):
    options = {"divergence": jaxode.divergence.hutchinson(), "rtol": 1e-4, "atol": 1e-4, **options}
    flow = jaxode.cnf(field, jaxode.standard_normal(DIM), axis_name=axis_name, **options)
    return lambda params, x, context, weights: flow.nll(
        params, x, key=KEY, context=context, weights=weights
    )


@functools.cache
def of_one_device(**options):
    """The loss of a batch on one device and its gradient, as a program."""
    return jax.jit(jax.value_and_grad(loss_of(None, **options), (0, 1)))


def sharded(loss, axes=AXIS):
    """Value and gradient of the mean over the devices, which are in two rows for two axes."""
    two = isinstance(axes, tuple)
    devices = np.array(jax.devices()[:DEVICES]).reshape((4, 2) if two else -1)
    mesh, split = Mesh(devices, axes if two else (axes,)), P(axes)
    mean = lambda *inputs: jax.lax.pmean(loss(*inputs), axes)
    return jax.jit(
        jax.shard_map(
            jax.value_and_grad(mean, (0, 1)), mesh=mesh, in_specs=(EVERYWHERE, split, split, split),
            out_specs=(EVERYWHERE, (EVERYWHERE, split)),
        )
    )  # fmt: skip


@functools.cache
def of_all_devices(axis_name=AXIS, axes=AXIS, **options):
    return sharded(loss_of(axis_name, **options), axes)


def assert_same(actual, expected, rtol=1e-12):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max())


TWO = ("x", "a")
# The axes of the mesh, `axis_name`, and options of the flow. Samples with their own steps need no
# name; then the mean over devices is that of the batch if all weights are one.
LOSSES = {
    "joint steps": (AXIS, AXIS, {}),
    "over two axes": (TWO, TWO, {}),
    "orthogonal probes, regularized, two checkpoints, raising": (AXIS, AXIS, {
        "divergence": jaxode.divergence.hutchinson(2, "orthogonal"),
        "regularizers": (
            jaxode.regularizers.kinetic_energy(0.7), jaxode.regularizers.jacobian_frobenius(0.2),
        ),
        "adjoint": jaxode.DiscreteAdjoint(2), "throw": True,
    }),
    "backsolve": (AXIS, AXIS, {"adjoint": jaxode.BacksolveAdjoint()}),
    "steps of each sample, over two axes": (TWO, None, {"batch": "per_sample"}),
}  # fmt: skip


OF_PARTS = [name for name in LOSSES if name not in ("joint steps", list(LOSSES)[-1])]


@pytest.mark.parametrize("name", with_slow(LOSSES, OF_PARTS))  # programs of eight devices
def test_a_batch_over_devices_is_that_of_one(name):
    axes, axis_name, options = LOSSES[name]
    # The error estimate amplifies rounding, and the steps of an adjoint ODE follow it.
    rtol = 1e-10 if name == "backsolve" else 1e-12
    inputs = (PARAMS, X, CONTEXT, WEIGHTS if axis_name else jnp.ones(BATCH))
    expected = of_one_device(**options)(*inputs)
    assert_same(of_all_devices(axis_name, axes, **options)(*inputs), expected, rtol)


def curvature(loss):
    """Products of the Hessian by the parameters and a direction: forward and reverse of reverse."""
    along = jax.tree.map(jnp.cos, PARAMS)

    def products(params, *inputs):
        gradient = jax.grad(lambda params: loss(params, *inputs))

        def slope(params):
            bars = gradient(params)
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, bars, along)))

        return jax.jvp(gradient, (params,), (along,))[1], jax.grad(slope)(params)

    return products


@pytest.mark.slow  # programs of second derivatives, of a device and of eight
@pytest.mark.parametrize("name", ["joint steps", "backsolve"])
def test_second_derivatives_over_devices_are_those_of_one(name):
    axes, axis_name, options = LOSSES[name]
    options = {**options, "divergence": jaxode.divergence.exact()}
    mesh, inputs = Mesh(np.array(jax.devices()[:DEVICES]), (AXIS,)), (PARAMS, X, CONTEXT, WEIGHTS)

    def mean(*inputs):
        return jax.lax.pmean(loss_of(axis_name, **options)(*inputs), axes)

    specs = (EVERYWHERE, SPLIT, SPLIT, SPLIT)
    sharded = jax.shard_map(curvature(mean), mesh=mesh, in_specs=specs, out_specs=EVERYWHERE)
    expected = jax.jit(curvature(loss_of(None, **options)))(*inputs)
    assert_same(jax.jit(sharded)(*inputs), expected, 1e-10)


@pytest.mark.slow  # programs of a device and of eight
def test_each_device_takes_the_joint_steps_of_its_own_rows():
    """With error control a part of the batch has other steps than the whole."""
    rows = [slice(i, i + BATCH // DEVICES) for i in range(0, BATCH, BATCH // DEVICES)]
    options = {"divergence": jaxode.divergence.exact()}
    alone, inputs = of_one_device(**options), (PARAMS, X, CONTEXT, WEIGHTS)
    each = [alone(PARAMS, X[row], CONTEXT[row], WEIGHTS[row]) for row in rows]
    mean = jax.tree.map(lambda *parts: sum(parts) / DEVICES, *[(v, bars[0]) for v, bars in each])
    by_x = jnp.concatenate([bars[1] for _, bars in each]) / DEVICES
    found = of_all_devices(None, **options)(*inputs)
    assert_same(found, (mean[0], (mean[1], by_x)))


def loss_that_closes_over(params, x, context, weights, vary=lambda params: params):
    params = vary(params)
    flow = jaxode.cnf(
        lambda t, z, args: field(t, z, (params, args[1])), jaxode.standard_normal(DIM),
        steps=6, divergence=jaxode.divergence.exact(),
    )  # fmt: skip
    return flow.nll(None, x, context=context, weights=weights)


UNWEIGHTED = (PARAMS, X, CONTEXT, jnp.ones(BATCH))


def test_closed_over_parameters_must_vary():
    with pytest.raises(ValueError, match="closes over a differentiated array of shape"):
        sharded(loss_that_closes_over)(*UNWEIGHTED)


@pytest.mark.slow  # programs of a device and of eight
def test_closed_over_parameters_that_vary():
    loss, vary = loss_that_closes_over, lambda params: sharding.vary(params, frozenset([AXIS]))
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(*UNWEIGHTED)
    assert_same(sharded(lambda *inputs: loss(*inputs, vary))(*UNWEIGHTED), expected)


def crossing(axis_name):
    """What devices exchange in a program with XLA's optimizations."""
    inputs = (PARAMS, X, CONTEXT, WEIGHTS)
    compiled = of_all_devices(axis_name).lower(*inputs).compile(OPTIMIZED)
    return collectives(compiled.as_text())


PARAMETER_BYTES = sum(leaf.nbytes for leaf in PARAMS)


@pytest.mark.slow  # XLA optimizes two programs
def test_the_parameter_gradient_crosses_once_and_joint_steps_cost_one_number_each():
    found = crossing(AXIS)
    inside = [c for c in found if c["depth"] > 0]
    # One in the loop over steps, and one in the two evaluations of the first step.
    assert [c["bytes"] for c in inside] == [8, 8]
    assert {c["kind"] for c in found} == {"all-reduce"}
    outside = [c["bytes"] for c in found if c["depth"] == 0]
    assert sum(size >= PARAMETER_BYTES for size in outside) == 1
    assert sum(outside) <= PARAMETER_BYTES + 8 * 8
    # Devices that step for themselves share the gradient and the loss alone.
    found = crossing(None)
    assert [c["depth"] for c in found] == [0]
    assert sum(c["bytes"] for c in found) == PARAMETER_BYTES + 8


def test_without_the_types_of_shard_map():
    """With `check_vma=False` the name says which rows are whose, and gradients need a mean."""
    loss, mesh = loss_of(AXIS), Mesh(np.array(jax.devices()[:DEVICES]), (AXIS,))

    def step(*inputs):
        mean = lambda *inputs: jax.lax.pmean(loss(*inputs), AXIS)
        return jax.lax.pmean(jax.value_and_grad(mean)(*inputs), AXIS)

    specs, inputs = (EVERYWHERE, SPLIT, SPLIT, SPLIT), (PARAMS, X, CONTEXT, WEIGHTS)
    run = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=EVERYWHERE, check_vma=False)
    value, (by_params, _) = of_one_device()(*inputs)
    assert_same(jax.jit(run)(*inputs), (value, by_params))


@pytest.mark.slow  # as the loss of a batch over devices
def test_flow_and_its_gradient_over_devices():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), (AXIS,))

    def ends(params, x, axis_name):
        f = lambda t, z, params: field(t, z, (params, jnp.zeros(DIM)))
        ts = jnp.array([0.3, 0.9])
        out = jaxode.solve(f, x, 0.0, 1.0, params, batch="joint", ts=ts, axis_name=axis_name)
        return jnp.sum(out.y1**2) + jnp.sum(jnp.cos(out.ys))

    expected = jax.jit(jax.value_and_grad(lambda p: ends(p, X, None)))(PARAMS)
    total = lambda p, x: jax.lax.psum(ends(p, x, AXIS), AXIS)
    step = jax.shard_map(
        jax.value_and_grad(total), mesh=mesh, in_specs=(EVERYWHERE, SPLIT), out_specs=EVERYWHERE
    )
    assert_same(jax.jit(step)(PARAMS, X), expected)


def test_a_failure_on_one_device_makes_the_loss_nan():
    inputs = (PARAMS, X.at[3].set(jnp.nan), CONTEXT, WEIGHTS)
    value, (gradient, _) = of_all_devices()(*inputs)
    assert np.isnan(value)
    assert np.isnan(gradient[0]).all()


RAISES = """
import jax, jax.numpy as jnp, jaxode
from jax.sharding import PartitionSpec as P

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
flow = jaxode.cnf(lambda t, z, a: a * z, jaxode.standard_normal(1))
x = jnp.array([[1.0], [jnp.nan]])
mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
log_prob = lambda x: flow.log_prob(0.5, x)
run = jax.shard_map(log_prob, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
jax.block_until_ready(jax.jit(run)(x))
"""


def test_a_failure_on_one_device_raises():
    """In a separate process: JAX keeps the error of an effect for whatever waits next."""
    process = subprocess.run([sys.executable, "-c", RAISES], capture_output=True, text=True)
    assert process.returncode != 0
    assert "log_prob(x=...): must be finite" in process.stderr


def test_a_part_of_a_state_without_a_cotangent_of_its_own_goes_along():
    """Its cotangent comes from the other parts, by the field."""
    f = lambda t, y, _: jax.lax.psum(y, "i")
    options = {"axis_name": "i", "adjoint": jaxode.BacksolveAdjoint(), "rtol": 1e-7, "atol": 1e-7}

    def first(y):
        end = jaxode.solve(f, y, 0.0, 1.0, **options).y1[0]
        return jnp.where(jax.lax.axis_index("i") == 0, end, 0)

    gradient = jax.jit(jax.vmap(jax.grad(first), axis_name="i"))(jnp.array([[1.0], [2.0]]))
    other = (np.exp(2) - 1) / 2  # of the exponential of a matrix of ones
    np.testing.assert_allclose(gradient, [[1 + other], [other]], rtol=1e-5)


@pytest.mark.parametrize("option", ["first_step", "max_step"])
def test_step_sizes_must_be_those_of_all_devices(option):
    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    run = lambda z: jaxode.flow(
        lambda t, y, a: -y, z, 0.0, 1.0, axis_name="i", **{option: 0.1 / jnp.abs(z).max()}
    )
    with pytest.raises(ValueError, match=r"axis_name='i'.*got some that vary over \['i'\]"):
        jax.shard_map(run, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(jnp.ones((2, 1)))


@pytest.mark.parametrize("loss", ["nll", "matching_loss"])
@pytest.mark.parametrize("axes", [None, "b"])
def test_an_axis_that_is_not_mapped_is_named(loss, axes):
    flow = jaxode.cnf(lambda t, z, a: -a * z, jaxode.standard_normal(DIM), axis_name=("i", "b"))
    run = lambda x: getattr(flow, loss)(1.0, x, key=KEY)
    if axes:
        mesh = Mesh(np.array(jax.devices()[:2]), axes)
        run = jax.shard_map(run, mesh=mesh, in_specs=P(axes), out_specs=P())
    missing = r"\['i'\]" if axes else r"\['i', 'b'\]"
    with pytest.raises(ValueError, match=rf"^{loss}\(axis_name=.*got {missing}, which none"):
        run(X)


def test_steps_over_two_axes_need_the_same_times_on_all():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("x", "a"))
    ends = lambda z, t: jaxode.flow(lambda t, y, a: -y, z, 0.0, t[0], axis_name=("x", "a"))
    run = jax.shard_map(ends, mesh=mesh, in_specs=(P(("x", "a")), P("a")), out_specs=P(("x", "a")))
    with pytest.raises(
        ValueError, match=r"axis_name=\('x', 'a'\).*got some that vary over \['a'\]"
    ):
        run(X, jnp.ones(2))


@pytest.mark.slow  # what XLA does by itself
def test_a_sharded_batch_under_plain_jit():
    """XLA splits the program itself, and the numbers are those of one device."""
    split = NamedSharding(Mesh(np.array(jax.devices()[:DEVICES]), (AXIS,)), SPLIT)
    run = of_one_device()
    expected = run(PARAMS, X, CONTEXT, WEIGHTS)
    actual = run(PARAMS, *(jax.device_put(rows, split) for rows in (X, CONTEXT, WEIGHTS)))
    assert actual[1][1].sharding.device_set == split.device_set
    assert_same(actual, expected)
