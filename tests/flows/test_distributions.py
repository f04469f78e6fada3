"""Base densities: the library's own, and those of other libraries."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import LIBRARIES, optional

import jaxode
from jaxode.nn import ConcatSquash, field


@pytest.mark.parametrize("shape", [(), pytest.param((3,), marks=pytest.mark.slow), (2, 3)], ids=str)
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
        return a * z

    def value_and_divergence(self, t, z, a):
        return (a * z, a * z.size) if self.closed else NotImplemented


@pytest.mark.parametrize("closed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_field_that_moves_the_mean_has_the_divergence_of_centred_configurations(closed):
    """Four particles in the plane have six dimensions, in which it grows."""
    base = jaxode.centered_normal(4, 2)
    options = {"divergence": jaxode.divergence.exact()} if not closed else {}
    flow = jaxode.cnf(Growing(closed), base, rtol=1e-9, atol=1e-9, **options)
    x, log_q = flow.sample_and_log_prob(0.5, jax.random.key(0), 5)
    expected = base.log_prob(x * np.exp(-0.5)) - 6 * 0.5
    np.testing.assert_allclose(log_q, expected, rtol=1e-7)
    np.testing.assert_allclose(flow.log_prob(0.5, x), expected, rtol=1e-7)
    shifted = jaxode.cnf(lambda t, z, a: a * z + 3.0, base, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(shifted.log_prob(0.5, x), expected, rtol=1e-7)


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


@pytest.mark.slow
def test_a_base_density_is_learned_together_with_the_field():
    """Its gradient is the closed form's, and training finds the data's mean and scale."""

    @jax.jit
    @jax.value_and_grad
    def loss(params, x):
        m, base = params
        return jaxode.cnf(field, base, rtol=1e-9, atol=1e-9).nll(m, x)

    still = jax.tree.map(jnp.zeros_like, ConcatSquash(2, (4,), key=jax.random.key(0)))
    noise = jax.random.normal(jax.random.key(1), (500, 2))
    x = jnp.array([[5.0, -1.0]]) + jnp.array([[0.5, 3.0]]) * noise
    base = jaxode.diagonal_normal(2)
    gradient = loss((still, base), x)[1][1]
    np.testing.assert_allclose(gradient.mean, -x.mean(0), rtol=1e-7)
    np.testing.assert_allclose(gradient.log_scale, 1 - (x**2).mean(0), rtol=1e-7)

    # The maximum of the likelihood is the data's own mean and scale.
    best = jaxode.distributions.DiagonalNormal(x.mean(0), jnp.log(x.std(0)))
    for leaf in jax.tree.leaves(loss((still, best), x)[1][1]):
        np.testing.assert_allclose(leaf, jnp.zeros(2), atol=1e-7)

    params, optimizer = (ConcatSquash(2, (4,), key=jax.random.key(0)), base), optax.sgd(0.01)
    before, gradient = loss(params, x)
    updates, _ = optimizer.update(gradient, optimizer.init(params))
    assert loss(optax.apply_updates(params, updates), x)[0] < before - 0.1
    sample = jax.jit(lambda base: jaxode.cnf(field, base).sample(still, jax.random.key(0), 3))
    assert sample(base).shape == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_densities_of_other_libraries(library, default_settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their imports warn of what they should change
        optional(library)
        mean, scale = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
        make = LIBRARIES[library]
        make(mean, scale)
    m = ConcatSquash(2, (8,), key=jax.random.key(0))
    own = jaxode.cnf(field, jaxode.distributions.DiagonalNormal(mean, jnp.log(scale)))

    @jax.jit
    @jax.grad
    def slope(params, x):
        mean, scale = params
        return jaxode.cnf(field, make(mean, scale)).nll(m, x)

    flow = jaxode.cnf(field, make(mean, scale))
    assert flow.base.event_shape == (2,)
    x, log_prob = flow.sample_and_log_prob(m, jax.random.key(1), 1000)
    assert x.shape == (1000, 2)
    np.testing.assert_allclose(log_prob, own.log_prob(m, x), atol=1e-3)
    np.testing.assert_allclose(flow.log_prob(m, x), own.log_prob(m, x), atol=1e-5)
    z = flow.base.sample(jax.random.key(2), (1000,))
    assert (jnp.abs(z.mean(0) - mean) < 5 * scale / np.sqrt(1000)).all()
    gradient = slope((mean, scale), x)
    expected = -(flow.to_base(m, x) - mean).mean(0) / scale**2
    np.testing.assert_allclose(gradient[0], expected, atol=1e-4)


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
