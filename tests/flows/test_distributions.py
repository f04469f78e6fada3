"""Base densities: the library's own, and those of other libraries."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import LIBRARIES, optional

import jaxode


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_diagonal_normal(shape):
    base = jaxode.diagonal_normal(shape)
    assert base.event_shape == shape
    z = 2 * jax.random.normal(jax.random.key(0), (5, 4, *shape))
    standard = jaxode.standard_normal(shape)
    np.testing.assert_allclose(base.log_prob(z), standard.log_prob(z), rtol=1e-13)
    np.testing.assert_array_equal(
        base.sample(jax.random.key(1), (5, 4)), standard.sample(jax.random.key(1), (5, 4))
    )
    mean, log_scale = jax.random.normal(jax.random.key(2), (2, *shape))
    base = type(base)(mean, log_scale)
    scale = np.exp(log_scale)
    exact = scipy.stats.norm.logpdf(z, mean, scale).reshape(5, 4, -1).sum(-1)
    np.testing.assert_allclose(base.log_prob(z), exact, rtol=1e-12)
    shared = type(base)(mean, jnp.ones(()))  # one scale for all numbers
    exact = scipy.stats.norm.logpdf(z, mean, np.e).reshape(5, 4, -1).sum(-1)
    np.testing.assert_allclose(shared.log_prob(z), exact, rtol=1e-12)
    draws = np.asarray(base.sample(jax.random.key(3), (20_000,)))
    assert (np.abs(draws.mean(0) - mean) < 5 * scale / np.sqrt(20_000)).all()
    assert (np.abs(draws.std(0) / scale - 1) < 5 / np.sqrt(2 * 20_000)).all()
    with pytest.raises(ValueError, match=r"diagonal_normal\(event_shape=...\)"):
        jaxode.diagonal_normal(-1)
    assert jaxode.standard_normal(3) == jaxode.standard_normal((3,))


def test_centered_normal():
    """The normal on the six dimensions of four centred particles in the plane."""
    base = jaxode.centered_normal(4, 2)
    draws = np.asarray(base.sample(jax.random.key(0), (20_000,)))
    np.testing.assert_allclose(draws.mean(1), 0, atol=1e-15)
    covariance = np.einsum("bnd,bmd->nm", draws, draws) / len(draws) / 2
    assert np.abs(covariance - (np.eye(4) - 1 / 4)).max() < 5 / np.sqrt(20_000)
    axes = np.linalg.svd(np.eye(4) - 1 / 4)[0][:, :3]
    exact = scipy.stats.norm.logpdf(axes.T @ draws[:5]).sum((1, 2))
    np.testing.assert_allclose(base.log_prob(draws[:5]), exact, rtol=1e-12)
    np.testing.assert_allclose(base.log_prob(draws[:5] + 3.0), exact, rtol=1e-10)


class Growing(eqx.Module):
    """A field that moves with a shift, with its divergence in all coordinates, or without."""

    closed: bool = eqx.field(static=True)

    def __call__(self, t, z, a):
        return a * z + 3.0

    def value_and_divergence(self, t, z, a):
        return (self(t, z, a), a * z.size) if self.closed else NotImplemented


@pytest.mark.parametrize("closed", [True, False])
def test_a_field_that_moves_the_mean_has_the_divergence_of_centred_configurations(closed):
    """Four particles in the plane have six dimensions, in which it grows."""
    base = jaxode.centered_normal(4, 2)
    options = {"divergence": jaxode.divergence.exact()} if not closed else {}
    flow = jaxode.cnf(Growing(closed), base, rtol=1e-9, atol=1e-9, **options)
    x, log_q = flow.sample_and_log_prob(0.5, jax.random.key(0), 5)
    expected = base.log_prob(x * np.exp(-0.5)) - 6 * 0.5
    np.testing.assert_allclose(log_q, expected, rtol=1e-7)
    np.testing.assert_allclose(flow.log_prob(0.5, x), expected, rtol=1e-7)


def test_the_probability_flow_of_centred_particles():
    """With the exact score of centred normals, it moves nothing."""
    base = jaxode.centered_normal(4, 3)
    score = lambda t, z, _: -(z - z.mean(0, keepdims=True))
    field = jaxode.probability_flow(score, jaxode.VariancePreserving())
    x = base.sample(jax.random.key(0), (5,))
    flow = jaxode.cnf(field, base, t0=1.0, t1=0.0, divergence=jaxode.divergence.exact())
    np.testing.assert_allclose(flow.log_prob(None, x), base.log_prob(x), rtol=1e-5)
    with pytest.raises(ValueError, match=r"cnf\(t0=..., t1=...\)"):
        jaxode.cnf(field, base)


@pytest.mark.slow  # programs of other libraries
@pytest.mark.parametrize("library", LIBRARIES)
def test_densities_of_other_libraries(library, default_settings):
    """Values, draws and gradients, also of the matching loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their imports warn of what they should change
        optional(library)
        mean, scale = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
        make = LIBRARIES[library]
        make(mean, scale)
    still = lambda t, z, args: 0 * z
    flow = jaxode.cnf(still, make(mean, scale))
    assert flow.base.event_shape == (2,)
    x, log_prob = flow.sample_and_log_prob(None, jax.random.key(1), 1000)
    assert x.shape == (1000, 2)
    assert (jnp.abs(x.mean(0) - mean) < 5 * scale / np.sqrt(1000)).all()
    exact = scipy.stats.norm.logpdf(x, mean, scale).sum(1)
    np.testing.assert_allclose(log_prob, exact, atol=1e-5)
    np.testing.assert_allclose(flow.log_prob(None, x), exact, atol=1e-5)
    slope = jax.grad(lambda mean: jaxode.cnf(still, make(mean, scale)).nll(None, x))(mean)
    np.testing.assert_allclose(slope, -(x - mean).mean(0) / scale**2, atol=1e-4)
    # The gradient by a constant field is the mean of the start less the end.
    shift = jaxode.cnf(lambda t, z, p: p + 0 * z, make(mean, scale))
    slope = jax.grad(lambda p: shift.matching_loss(p, x, key=jax.random.key(2)))(jnp.zeros(2))
    z = slope + x.mean(0)
    assert (jnp.abs(z - mean) < 5 * scale / np.sqrt(1000)).all()


def test_an_integer_as_event_shape_stands_for_a_vector():
    normal = jaxode.standard_normal(3)

    class Own:
        event_shape = 3
        log_prob, sample = staticmethod(normal.log_prob), staticmethod(normal.sample)

    x = jnp.ones((4, 3))
    of = lambda base: jaxode.cnf(lambda t, z, a: a * z, base).nll(0.1, x)
    np.testing.assert_array_equal(of(Own()), of(normal))


def test_products_of_a_base_have_the_precision_of_those_of_the_field():
    """Accelerators would otherwise round them to 10 or 7 bits."""

    class Whitened:
        event_shape = (2,)

        def log_prob(self, z):
            return normal.log_prob(z @ jnp.eye(2))

        def sample(self, key, sample_shape):
            return normal.sample(key, sample_shape)

    normal, key = jaxode.standard_normal(2), jax.random.key(0)
    flow = jaxode.cnf(lambda t, z, a: a * z, Whitened())
    methods = [
        lambda a: flow.log_prob(a, jnp.ones((3, 2))),
        lambda a: flow.nll(a, jnp.ones((3, 2))),
        lambda a: flow.sample_and_log_prob(a, key, 3),
        jax.grad(lambda a: flow.reverse_kl_loss(a, normal.log_prob, 3, key=key)),
    ]
    for method in methods:
        program = str(jax.make_jaxpr(method)(0.1))
        products = program.count("dot_general[")
        assert 0 < products == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
