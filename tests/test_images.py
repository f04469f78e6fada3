"""Images: the maps invert, their log-determinants are right, and flows take images as they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow

import jaxode
from jaxode import divergence, images

SHAPES = {"vector": (6,), "matrix": (2, 3), "channels": (1, 2, 3)}


@pytest.mark.parametrize("name", with_slow(SHAPES, ["vector", "matrix"]))
def test_maps_invert_and_have_their_log_determinants(name):
    shape = SHAPES[name]
    x = jax.random.randint(jax.random.key(0), (4, *shape), 0, 17)
    key, size = jax.random.key(1), 6
    u, log_det = images.dequantize(key, x, 17)
    assert u.shape == x.shape
    assert u.dtype == jnp.float64
    assert ((u >= 0) & (u < 1)).all()
    np.testing.assert_array_equal(images.quantize(u, 17), x)
    np.testing.assert_allclose(log_det, -size * np.log(17), rtol=1e-14)

    y, log_det = images.logit(u, 0.05)
    np.testing.assert_allclose(images.inverse_logit(y, 0.05), u, atol=1e-14)
    flat = lambda row: images.logit(row.reshape(1, *shape), 0.05)[0].reshape(-1)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(flat)))(u.reshape(4, size))
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobians)[1], rtol=1e-12)


def test_dequantization_keeps_the_dtype_and_needs_its_key():
    x = jnp.array([[0.0, 3.0]], jnp.float32)
    u, log_det = images.dequantize(jax.random.key(0), x, 4)
    assert u.dtype == log_det.dtype == jnp.float32
    assert (u != images.dequantize(jax.random.key(1), x, 4)[0]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.uint8])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_most_extreme_noise_stays_in_the_cell_of_its_level(levels, dtype, monkeypatch):
    x = (np.arange(256) % levels)[:, None]  # of one shape
    for noise in (lambda dtype: 0, lambda dtype: jnp.nextafter(*jnp.array([1, 0], dtype))):
        extreme = lambda key, shape, dtype, noise=noise: jnp.full(shape, noise(dtype), dtype)
        monkeypatch.setattr(jax.random, "uniform", extreme)
        u, _ = images.dequantize(jax.random.key(0), jnp.asarray(x, dtype), levels)
        half = dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        assert u.dtype == (jnp.float32 if half else float)
        assert ((u > 0) & (u < 1)).all()
        np.testing.assert_array_equal(images.quantize(u, levels), x)


QUANTIZE = jax.jit(images.quantize, static_argnums=1)


@pytest.mark.parametrize("levels", with_slow([10, 255, 1000, 65_535], [255, 1000, 65_535]))
@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_levels_come_back_whatever_the_noise(levels, compile):
    """XLA multiplies by the inverse of a number of levels that it knows."""
    x = jax.random.randint(jax.random.key(0), (1, 500_000), 0, levels).astype(jnp.float32)
    u, _ = compile(lambda key: images.dequantize(key, x, levels))(jax.random.key(1))
    for quantize in (images.quantize, QUANTIZE):
        np.testing.assert_array_equal(quantize(u, levels), x)


@pytest.mark.parametrize("x", [0.0, 255.0, 65_535.0, 250_000.0])
def test_noise_covers_its_cell(x):
    """Of integers of any size: a density is no higher where it covers less."""
    noise = images.in_cells(jax.random.key(0), jnp.full(100_000, x, jnp.float32)) - x
    # The standard deviation of a uniform number. At 250,000 single precision is 1/64 apart.
    np.testing.assert_allclose(noise.std() * 12**0.5, 1, rtol=0.02)


def test_logits_of_half_precision_have_determinants_of_single_precision():
    u = jax.random.uniform(jax.random.key(0), (1, 3000), jnp.bfloat16)
    found, wanted = (images.logit(each)[1] for each in (u, u.astype(jnp.float32)))
    np.testing.assert_array_equal(found, wanted)


def test_half_precision_levels_have_noise_of_single_precision():
    x = jnp.full((1, 1000), 255, jnp.bfloat16)
    u, _ = images.dequantize(jax.random.key(0), x, 256)
    # Between 255 and 256 there are 2^16 numbers of float32: about 8 of 1000 draws coincide.
    assert len(np.unique(u)) > 950


def test_bits_of_uniform_levels_are_their_logarithm():
    """The uniform density on `[0, 1]` codes each of 16 equally likely levels with 4 bits."""
    x = jax.random.randint(jax.random.key(0), (5, 3), 0, 16)
    _, log_det = images.dequantize(jax.random.key(1), x, 16)
    np.testing.assert_allclose(images.bits_per_dimension(log_det, 3), 4.0, rtol=1e-14)


def test_probabilities_of_levels_add_up_to_one():
    """Of a logistic density on the logit: the mean density of a cell is its level's probability."""
    levels, margin = 8, 0.02
    x = jnp.repeat(jnp.arange(levels), 4000)[:, None]
    u, log_det = images.dequantize(jax.random.key(0), x, levels)
    y, logit_log_det = images.logit(u, margin)
    log_prob = jax.scipy.stats.logistic.logpdf(y[:, 0]) + log_det + logit_log_det
    probability = jnp.exp(log_prob).reshape(levels, 4000).mean(1)
    # The logistic density makes `v` uniform, so each level has (1 - 2 margin) / levels.
    np.testing.assert_allclose(probability, (1 - 2 * margin) / levels, rtol=1e-10)


def test_values_known_only_at_run_time_are_not_checked():
    u, _ = jax.jit(images.dequantize, static_argnums=2)(jax.random.key(0), jnp.array([[300]]), 256)
    assert u > 1
    assert jnp.isfinite(jax.jit(images.logit)(jnp.array([[1.02]]))[0])


class Convolutional(eqx.Module):
    """Two convolutions on `[channels, height, width]`, with the time as one more channel."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d

    def __init__(self, channels: int, hidden: int, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Conv2d(channels + 1, hidden, 3, padding=1, key=keys[0])
        self.second = eqx.nn.Conv2d(hidden, channels, 3, padding=1, key=keys[1])

    def __call__(self, t, y):
        time = jnp.full((1, *y.shape[1:]), t)
        return self.second(jnp.tanh(self.first(jnp.concatenate([y, time]))))


@pytest.mark.slow
def test_convolutional_flow_on_images():
    """Exact, estimated, and by the change of variables of the whole flow."""
    event = 2, 3, 2
    net = Convolutional(event[0], 4, jax.random.key(0))

    def flow(estimator):
        return jaxode.cnf(
            lambda t, y, m: m(t, y), jaxode.standard_normal(event), divergence=estimator,
            rtol=1e-8, atol=1e-8,
        )  # fmt: skip

    x = jax.random.normal(jax.random.key(1), (3, *event))
    exact = flow(divergence.exact())
    z = exact.to_base(net, x)
    np.testing.assert_allclose(exact.from_base(net, z), x, atol=1e-6)
    size = x[0].size
    flat = lambda row: exact.to_base(net, row.reshape(1, *event)).reshape(-1)
    jacobians = jax.vmap(jax.jacrev(flat))(x.reshape(3, size))
    log_det = jnp.linalg.slogdet(jacobians)[1]
    log_prob = exact.log_prob(net, x)
    np.testing.assert_allclose(log_prob, exact.base.log_prob(z) + log_det, atol=1e-6)
    assert (jnp.abs(log_det) > 1e-2).all()
    orthogonal = flow(divergence.hutchinson(size, "orthogonal"))
    np.testing.assert_allclose(orthogonal.log_prob(net, x, key=jax.random.key(2)), log_prob, 1e-6)
    samples = exact.sample(net, jax.random.key(3), 2)
    assert samples.shape == (2, *event)
    gradient = jax.grad(flow(divergence.hutchinson()).nll)(net, x, key=jax.random.key(2))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("margin", [0.05, 1e-6, 1e-8])
def test_logits_are_as_exact_at_the_upper_end_as_at_the_lower(margin):
    (low, high), _ = images.logit(jnp.array([[0.0], [1.0]], jnp.float32), margin)
    np.testing.assert_allclose(high, -low, rtol=1e-6)
    np.testing.assert_allclose(low, np.log(margin) - np.log1p(-margin), rtol=1e-6)
