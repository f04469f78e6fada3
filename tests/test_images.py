"""Images: the maps invert, their log-determinants are right, and flows take images as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import images
from jaxode.density.noise import NOISES, in_cells, log_density


def test_maps_invert_and_have_their_log_determinants():
    x = jax.random.randint(jax.random.key(0), (4, 1, 2, 3), 0, 17)
    u, log_det = images.dequantize(jax.random.key(1), x, 17)
    assert (u.shape, u.dtype) == (x.shape, jnp.float64)
    assert ((u >= 0) & (u < 1)).all()
    assert (u != images.dequantize(jax.random.key(2), x, 17)[0]).all()
    np.testing.assert_array_equal(images.quantize(u, 17), x)
    np.testing.assert_allclose(log_det, -6 * np.log(17), rtol=1e-14)

    y, log_det = images.logit(u, 0.05)
    np.testing.assert_allclose(images.inverse_logit(y, 0.05), u, atol=1e-14)
    flat = lambda row: images.logit(row.reshape(1, 1, 2, 3), 0.05)[0].reshape(-1)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(flat)))(u.reshape(4, 6))
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobians)[1], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64, jnp.uint8])
@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize("kind", NOISES)
def test_the_most_extreme_noise_stays_in_the_cell_of_its_level(kind, levels, dtype, monkeypatch):
    x = (np.arange(256) % levels)[:, None]  # of one shape
    for noise in (lambda dtype: 0, lambda dtype: jnp.nextafter(*jnp.array([1, 0], dtype))):
        extreme = lambda key, shape, dtype, noise=noise: jnp.full(shape, noise(dtype), dtype)
        monkeypatch.setattr(jax.random, "uniform", extreme)
        u, _ = images.dequantize(jax.random.key(0), jnp.asarray(x, dtype), levels, noise=kind)
        single = dtype in (jnp.bfloat16, jnp.float32)
        assert u.dtype == (jnp.float32 if single else float)
        assert ((u > 0) & (u < 1)).all()
        np.testing.assert_array_equal(images.quantize(u, levels), x)


@pytest.mark.parametrize("levels", [10, 255, 65_535])
@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_levels_come_back_whatever_the_noise(levels, compile):
    """XLA multiplies by the inverse of a number of levels that it knows."""
    x = jax.random.randint(jax.random.key(0), (1, 200_000), 0, levels).astype(jnp.float32)
    u, _ = compile(lambda key: images.dequantize(key, x, levels))(jax.random.key(1))
    found = compile(lambda u: images.quantize(u, levels))(u)
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("x", [0.0, 250_000.0])
def test_noise_covers_its_cell(x):
    """Of integers of any size: a density is no higher where it covers less."""
    noise = in_cells(jax.random.key(0), jnp.full(100_000, x, jnp.float32)) - x
    # The standard deviation of a uniform number. At 250,000 single precision is 1/64 apart.
    np.testing.assert_allclose(noise.std() * 12**0.5, 1, rtol=0.02)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_its_density(noise):
    """Which integrates to one."""
    ends = np.linspace(0.0, 1.0, 65)
    x, weights = np.polynomial.legendre.leggauss(8)
    nodes = ends[:-1, None] + (x[None] + 1) / 128
    parts = np.exp(log_density(noise, nodes, jnp.full_like(nodes, 7.0))) @ weights / 128
    np.testing.assert_allclose(parts.sum(), 1, rtol=1e-12)
    drawn = in_cells(jax.random.key(0), jnp.full(100_000, 7.0), noise=noise) - 7
    levels = np.searchsorted(np.sort(drawn), ends) / len(drawn)
    # Of 100,000 draws, a level is off by 0.0016 at most.
    np.testing.assert_allclose(levels[1:-1], np.cumsum(parts)[:-1], atol=5e-3)


# Probabilities of levels, and log-densities in a cell.
SHARES = np.array([0.5, 0.3, 0.15, 0.05])
IN_CELL = {
    **{noise: lambda v, noise=noise: log_density(noise, v, v) for noise in NOISES},
    "neither": lambda v: jnp.log(2 * v),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("density", IN_CELL)
def test_the_probability_of_a_level_is_bounded(density, noise):
    """Tightly by noise with the density of the cell."""
    x = np.repeat(np.arange(4), 5000)[:, None]
    u, log_det = images.dequantize(jax.random.key(0), x, 4, noise=noise)
    v = (4 * np.asarray(u) - x)[:, 0]
    log_prob = np.log(4 * SHARES)[x[:, 0]] + np.asarray(IN_CELL[density](v))  # of u
    bound = np.asarray(log_prob + log_det).reshape(4, -1)
    if density == noise:
        np.testing.assert_allclose(bound.T, [np.log(SHARES)] * 5000, rtol=1e-10)
    else:
        assert (bound.mean(1) < np.log(SHARES) - 0.05).all()


def test_some_levels_get_the_normal_noise():
    x = np.repeat(np.arange(4), 5000)[:, None]
    key = jax.random.key(0)
    found, log_det = images.dequantize(key, x, 4, noise=(0, 3))
    for level, noise in enumerate(["normal", "uniform", "uniform", "normal"]):
        here = x[:, 0] == level
        u, expected = images.dequantize(key, x, 4, noise=noise)
        np.testing.assert_allclose(found[here], u[here], rtol=1e-12)
        np.testing.assert_allclose(log_det[here], expected[here], rtol=1e-9)


@pytest.mark.parametrize("noise", ["no", (), ("a",), 3, None])
def test_a_noise_that_is_none_raises(noise):
    with pytest.raises(ValueError, match="must be 'uniform', 'normal' or a tuple"):
        images.dequantize(jax.random.key(0), jnp.zeros((1, 1)), 4, noise=noise)


@pytest.mark.parametrize("noise", [(9,), (0, 8), (-1,), (0.5,), (np.nan,), (np.inf,)])
def test_noise_of_what_is_no_level_raises(noise):
    x = np.arange(8).repeat(5)[:, None]
    with pytest.raises(ValueError, match="must name levels, whole numbers from 0 to 7; got "):
        images.dequantize(jax.random.key(0), x, 8, noise=noise)


def test_half_precision_is_mapped_in_single():
    u = jax.random.uniform(jax.random.key(0), (1, 3000), jnp.bfloat16)
    found, wanted = (images.logit(each)[1] for each in (u, u.astype(jnp.float32)))
    np.testing.assert_array_equal(found, wanted)
    levels = jnp.full((1, 1000), 255, jnp.bfloat16)
    u, _ = images.dequantize(jax.random.key(0), levels, 256)
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


@pytest.mark.parametrize("margin", [0.05, 1e-6, 1e-8])
def test_logits_are_as_exact_at_the_upper_end_as_at_the_lower(margin):
    (low, high), _ = images.logit(jnp.array([[0.0], [1.0]], jnp.float32), margin)
    np.testing.assert_allclose(high, -low, rtol=1e-6)
    np.testing.assert_allclose(low, np.log(margin) - np.log1p(-margin), rtol=1e-6)
