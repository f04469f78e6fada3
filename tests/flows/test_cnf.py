"""Continuous normalizing flows and their loss: what holds of any field.

Values and gradients have closed forms in `test_flow_features.py`.
"""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import jaxode
from jaxode import divergence, regularizers
from jaxode.nn import ConcatSquash, field

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
KEY, PLANE = jax.random.key(11), jaxode.standard_normal(2)
X = jax.random.normal(jax.random.key(4), (5, 2))


def module(size, key=0):
    """A flow that is far from the identity: its output weights are larger than at the start."""
    m = ConcatSquash(size, (8, 8), key=jax.random.key(key))
    return eqx.tree_at(lambda m: m.weight, m, 20 * m.weight)


def linear(t, z, A):
    return A @ z


A = jnp.array([[0.3, 1.0, 0.0], [-0.5, -0.2, 0.4], [0.1, 0.0, 0.6]])


@pytest.mark.parametrize("times", [(0.0, 1.0), (-2.0, 0.5)], ids=str)
def test_density_of_one_dimension_integrates_to_one(times):
    t0, t1 = times
    flow = jaxode.cnf(field, jaxode.standard_normal(1), t0=t0, t1=t1)
    grid = jnp.linspace(-30.0, 30.0, 6001)
    density = jnp.exp(flow.log_prob(module(1), grid[:, None]))
    assert abs(jnp.trapezoid(density, grid) - 1) < 1e-4
    assert jnp.abs(density - jax.scipy.stats.norm.pdf(grid)).max() > 0.01  # not the base density


def test_the_size_of_a_log_density_is_no_scale_of_its_tolerance():
    """In 200 dimensions it is -280; what the flow adds, here without a motion, is 0.04."""

    class Still:
        def __call__(self, t, z, args):
            return 0 * z

        def value_and_divergence(self, t, z, args):
            return 0 * z, jnp.cos(12 * t).astype(z.dtype)

    flow = jaxode.cnf(Still(), jaxode.standard_normal(200), rtol=1e-3, atol=1e-6)
    x, log_prob = flow.sample_and_log_prob(None, jax.random.key(0), 3)
    np.testing.assert_allclose(log_prob, flow.base.log_prob(x) - np.sin(12) / 12, atol=2e-4)


def test_noise_depends_on_the_key_and_the_index_alone():
    """Same key, same value: with joint or own steps, whatever the batch."""
    noisy = {"divergence": divergence.hutchinson(), **TIGHT}
    flow = jaxode.cnf(field, jaxode.standard_normal(3), batch="per_sample", **noisy)
    m, x = module(3), jax.random.normal(jax.random.key(1), (6, 3))
    values = flow.log_prob(m, x, key=KEY)
    np.testing.assert_allclose(flow.log_prob(m, x[:2], key=KEY), values[:2], rtol=1e-12)
    joint = jaxode.cnf(field, jaxode.standard_normal(3), batch="joint", **noisy)
    np.testing.assert_allclose(joint.log_prob(m, x, key=KEY), values, rtol=1e-7)
    other = x.at[2:].set(0.0)
    np.testing.assert_allclose(joint.log_prob(m, other, key=KEY)[:2], values[:2], rtol=1e-7)
    assert jnp.abs(flow.log_prob(m, x, key=jax.random.key(12)) - values).max() > 1e-3


def test_standard_errors_without_probes_and_without_rows():
    x = jnp.ones((3, 3))
    flow = jaxode.cnf(linear, jaxode.standard_normal(3))
    value, error = flow.log_prob_and_error(A, x, key=KEY)
    np.testing.assert_array_equal(value, flow.log_prob(A, x))
    np.testing.assert_array_equal(error, jnp.zeros(3))
    two = jaxode.cnf(linear, jaxode.standard_normal(3), divergence=divergence.hutchinson(2))
    for leaf in two.log_prob_and_error(A, x[:0], key=KEY):
        assert leaf.shape == (0,)
    one = jaxode.cnf(linear, jaxode.standard_normal(3), divergence=divergence.hutchinson())
    with pytest.raises(ValueError, match="needs a divergence with at least two probes"):
        one.log_prob_and_error(A, x, key=KEY)


@pytest.mark.parametrize(
    "value",
    [
        divergence.auto(), divergence.exact(), divergence.exact(chunk=2), divergence.closed_form(),
        divergence.hutchinson(), divergence.hutchinson(2, "orthogonal"),
    ],
    ids=lambda value: value.name,
)  # fmt: skip
def test_a_flow_can_be_pickled(value):
    costs = (regularizers.kinetic_energy(0.1), regularizers.jacobian_frobenius(0.2))
    base = jaxode.standard_normal(2)
    made = jaxode.cnf(field, base, divergence=value, regularizers=costs)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert hash(again) == hash(made)
    assert again != jaxode.cnf(field, base, divergence=value)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0), np.zeros(2, np.uint32)], ids=str)
def test_any_key_draws_samples(key):
    keys = jax.random.split(KEY, 3) if key is KEY else jnp.stack([key] * 3)
    flow = jaxode.cnf(linear, jaxode.standard_normal(3))
    draw = lambda key: flow.sample(A, key, 2)
    # The keys are known, and nothing is compiled.
    assert jax.eval_shape(lambda: jax.vmap(draw)(keys)).shape == (3, 2, 3)
    assert jax.eval_shape(lambda: draw(key)).shape == (2, 3)


@pytest.mark.slow  # programs of another dtype
def test_samples_of_half_precision(default_settings):
    """They are solved in float32; the derivative and the base density see them as they are."""
    flow = jaxode.cnf(jaxode.nn.field, PLANE)
    m = jaxode.nn.ConcatSquash(2, (8,), key=KEY)
    x = jax.random.normal(jax.random.key(0), (7, 2)).astype(jnp.bfloat16)
    run = jax.jit(jax.value_and_grad(flow.nll_and_stats, has_aux=True))
    ((loss, aux), gradient), ((expected, _), single) = run(m, x), run(m, x.astype(jnp.float32))
    # The mean is one of single precision.
    np.testing.assert_allclose(loss, -np.mean(aux.log_prob.astype(jnp.float32)), rtol=1e-6)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(loss, expected, rtol=2 * eps)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    assert_close(gradient, single, 4 * eps)  # a few roundings of each sample


@pytest.mark.slow  # those of a solve are in `test_transforms.py`
def test_transformations_of_the_gradient():
    """Of checkpoints, of Equinox and in a scan. Ensembles are in `test_flow_features.py`."""
    flow = jaxode.cnf(lambda t, z, a: jnp.sin(a * z), PLANE, divergence=divergence.hutchinson())
    loss, a = lambda a, x, key: flow.nll(a, x, key=key), jnp.array(0.5)
    expected = jax.jit(jax.grad(loss))(a, X, KEY)
    scanned = jax.jit(lambda: jax.lax.scan(
        lambda carry, x: (carry, jax.grad(loss)(a, x, KEY)), 0, jnp.stack([X, X[::-1]])
    ))  # fmt: skip
    for found in (
        jax.jit(jax.grad(jax.checkpoint(loss)))(a, X, KEY),
        eqx.filter_value_and_grad(loss)(a, X, KEY)[1], scanned()[1][0],
    ):  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-12)


class Shrinking:
    """With a closed form of its divergence."""

    def __call__(self, t, z, args):
        return -z

    def value_and_divergence(self, t, z, args):
        return -z, jnp.array(-2.0)


def test_a_regularizer_needs_what_the_divergence_can_give():
    norm = jaxode.regularizers.jacobian_frobenius(1.0)
    flow = jaxode.cnf(Shrinking(), PLANE, divergence=divergence.closed_form(), regularizers=(norm,))
    said = r"the Jacobian, which the divergence \(closed form\) does"
    with pytest.raises(ValueError, match=said):
        flow.nll(None, X)


def test_a_regularizer_of_the_jacobian_with_a_field_that_has_a_closed_form():
    """`auto()` takes the exact trace for the loss, and the closed form for the density."""
    norm = (jaxode.regularizers.jacobian_frobenius(0.2),)
    flow = jaxode.cnf(Shrinking(), PLANE, regularizers=norm, rtol=1e-8, atol=1e-8)
    # The norm of the Jacobian is 2 at all times.
    expected = 0.4 - flow.log_prob(None, X).mean()
    np.testing.assert_allclose(flow.nll(None, X), expected, rtol=1e-7)
    many = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(16), regularizers=norm)
    network, x = jaxode.nn.ConcatSquash(16, (8,), key=KEY), jnp.ones((3, 16))
    with pytest.raises(ValueError, match="a stochastic divergence needs random numbers"):
        many.nll(network, x)
    assert many.log_prob(network, x).shape == (3,)
