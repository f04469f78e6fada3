"""A density as a pytree: in transformations, on disk, and in programs that are served."""

import copy
import pickle

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import optional, trained, with_slow

import jaxode

KEY = jax.random.key(0)
# Equal steps, which compile sooner: what is kept and served does not depend on them.
PARAMS, FLOW = trained(), jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), steps=2)
DATA = np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))
# The map of data is the first of both others.
MAPS = [DATA, jaxode.standardize.normal(DATA), jaxode.standardize.whiten(DATA)]
# What `jax.jit` and `jax.custom_jvp` return, which `pickle` does not find by name, and a function.
ACTIVATIONS = (jnp.tanh, jaxode.nn.softplus, jax.nn.gelu)


def density_of(params=PARAMS, given=MAPS[1]):
    return jaxode.bind(FLOW, params, standardize=given, support=(-100.0, 100.0))


def scaled(t, z, a):
    return a * z


@pytest.mark.parametrize("given", MAPS[1:], ids=["normal", "whiten"])
def test_units_are_not_trained(given):
    """Outside of `jax.jit`, the programs of the flow serve both maps."""
    density = jaxode.bind(
        jaxode.cnf(scaled, FLOW.base, steps=2), jnp.asarray(0.1), standardize=given,
        support=(-100.0, 100.0),
    )  # fmt: skip

    def loss(density):
        x, log_prob = density.sample_and_log_prob(KEY, (2,))
        return sum(each.sum() for each in (x, log_prob, density.to_flow(x), density.log_det(x)))

    gradient = eqx.filter_grad(loss)(density)
    maps = jax.tree.leaves((gradient.support, gradient.standardize))
    assert len(maps) == 2 + 5  # the bounds, and a chain
    assert not any(np.any(leaf) for leaf in maps)
    assert gradient.params != 0


def test_it_is_an_argument_and_a_member_of_an_ensemble():
    density = density_of()
    both = density, density.with_params(jax.tree.map(lambda a: 0.5 * a, PARAMS))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    each = jax.jit(jax.vmap(lambda density, x: density.log_prob(x), (0, None)))(stacked, DATA[:4])
    np.testing.assert_allclose(each, [one.log_prob(DATA[:4]) for one in both], rtol=1e-9)


def by_equinox(path, density, zeros):
    eqx.tree_serialise_leaves(path / "density.eqx", density)
    return eqx.tree_deserialise_leaves(path / "density.eqx", zeros)


def by_orbax(path, density, zeros):
    with optional("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "density", density)
        return checkpointer.restore(path / "density", zeros)


@pytest.mark.parametrize("save_and_load", [by_equinox, by_orbax])
def test_it_is_saved_bit_for_bit(save_and_load, tmp_path):
    density = density_of()
    zeros = jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, density)
    assert not eqx.tree_equal(zeros, density)
    assert eqx.tree_equal(save_and_load(tmp_path, density, zeros), density)


def test_it_is_pickled_and_copied():
    """With all that it consists of."""
    layers = {
        jaxode.nn.ConcatSquash: (2, (4,)), jaxode.nn.Residual: (2, 4, 1),
        jaxode.nn.Mixer: ((1, 2), 1, 4, 1),
    }  # fmt: skip
    for make, sizes in layers.items():
        for f, given in zip(ACTIVATIONS, MAPS, strict=True):
            density = density_of(make(*sizes, activation=f, key=KEY), given)
            for again in (pickle.loads(pickle.dumps(density)), copy.copy(density)):
                assert eqx.tree_equal(again, density)
                assert again.params.activation is f


def key_of(rows):
    """A key that is known only where the rows are."""
    return jax.random.fold_in(KEY, rows[0].astype(np.uint32))


SERVED = {
    "log_prob": (lambda density: density.log_prob, ("batch, 2", float), DATA[:4]),
    "sample": (
        lambda density: lambda rows: density.sample(key_of(rows), rows.shape),
        ("count", np.float32), np.zeros(4, np.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", with_slow(SERVED, ["sample"]))  # see the last test
def test_an_exported_program_serves_any_batch_and_platform(name):
    """It calls nothing on the host. (Equal samples on other platforms are for their tests.)"""
    make, (names, dtype), rows = SERVED[name]
    call = make(density_of())
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(names), dtype)
    program = jax.jit(lambda x: call(x))
    exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(shape)
    assert "callback" not in exported.mlir_module()
    served = jax.export.deserialize(exported.serialize()).call
    np.testing.assert_allclose(served(rows), call(rows), rtol=1e-9)


@pytest.mark.slow  # a training from end to end, beside that of the docs
def test_a_density_of_images_is_trained_and_served():
    """In classes, with noise on its integers."""
    levels, classes = np.random.default_rng(0).integers(0, 8, (40, 2, 2)), np.eye(2)[[0, 1] * 20]
    network = jaxode.nn.Mixer((2, 2), 1, 4, 1, features=2, context_size=2, key=KEY)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal((2, 2)), steps=2)
    density, history = jaxode.fit(
        jaxode.bind(flow, network, standardize=(4.0, 2.0)), levels, context=classes, key=KEY,
        steps=2, dequantize="normal", optimizer=optax.sgd(0.01), progress=False,
    )  # fmt: skip
    assert np.isfinite([point.nats for point in history]).all()
    log_prob = jax.jit(lambda x, context: density.log_prob(x, context=context))
    x, context = levels[:4] + 0.5, classes[:4]
    expected = log_prob(x, context)
    each = jax.jit(jax.vmap(lambda x, context: log_prob(x[None], context[None])[0]))
    np.testing.assert_allclose(each(x, context), expected, rtol=1e-9)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *event), float) for event in ((2, 2), (2,))]
    exported = jax.export.export(log_prob, platforms=("cpu", "cuda", "tpu"))(*shapes)
    np.testing.assert_allclose(exported.call(x, context), expected, rtol=1e-9)


def test_known_samples_in_a_program_do_not_call_the_host():
    """Nor keep it from being exported: a failure is NaN there."""
    program = jax.jit(lambda s: s * density_of().sample(KEY, (2,)))
    assert "callback" not in str(jax.make_jaxpr(program)(1.0))
