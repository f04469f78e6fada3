"""Divergence estimators: exact ones agree with the Jacobian, random ones are unbiased."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import OPTIMIZED, with_slow

import jaxode
from jaxode import divergence
from jaxode.divergence import TANGENTS_AT_ONCE, FieldAt
from jaxode.nn import ConcatSquash

D = 6
MODULE = ConcatSquash(D, (7, 5), key=jax.random.key(0))
# Larger output weights than at initialization, so that the divergence is not small.
MODULE = jax.tree.map(lambda x: 3 * x, MODULE)
Z = jnp.linspace(-1.0, 1.0, D)


def g(z):
    return MODULE(jnp.array(0.4), z)


def trace(g, z):
    flat = lambda y: g(y.reshape(z.shape)).reshape(-1)
    return jnp.trace(jax.jacfwd(flat)(z.reshape(-1)))


# Estimators that give the trace itself. A new one is one row.
EXACT = {
    "exact": divergence.exact(),
    "exact in chunks": divergence.exact(chunk=4),
    "exact one by one": divergence.exact(chunk=1),
    "as many orthogonal probes as dimensions": divergence.hutchinson(D, "orthogonal"),
    "auto for a small event": divergence.auto(),
}
# Estimators whose mean is the trace.
RANDOM = {
    "rademacher": divergence.hutchinson(),
    "gaussian": divergence.hutchinson(distribution="gaussian"),
    "orthogonal": divergence.hutchinson(2, "orthogonal"),
    "three rademacher probes": divergence.hutchinson(3),
}


@functools.cache
def of_the_jacobian(shape):
    """The slope, the trace, and the gradient of that."""
    both = lambda z: (g(z), *jax.value_and_grad(lambda z: trace(g, z))(z))
    return jax.jit(both)(Z.reshape(shape))


SHAPES = [(name, shape) for name in EXACT for shape in ((D,), (1, 2, 3))]
OF_MORE_AXES = [(name, shape) for name, shape in SHAPES if len(shape) > 1 and name != "exact"]


@pytest.mark.parametrize(("name", "shape"), with_slow(SHAPES, OF_MORE_AXES))  # "exact" has them
def test_exact_equals_the_trace_of_the_jacobian(name, shape):
    z = Z.reshape(shape)
    estimator = EXACT[name]
    probe = estimator.init(jax.random.key(1), z)

    def of(z):
        dz, div = estimator.apply(g, z, probe)
        return div, (dz, div)

    gradient, (dz, div) = jax.jit(jax.grad(of, has_aux=True))(z)
    assert dz.shape == shape
    exact_dz, exact_div, exact_gradient = of_the_jacobian(shape)
    np.testing.assert_allclose(dz, exact_dz, rtol=1e-14)
    np.testing.assert_allclose(div, exact_div, rtol=1e-12)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", RANDOM)
def test_random_probes_are_unbiased(name):
    estimator = RANDOM[name]
    keys = jax.random.split(jax.random.key(2), 20_000)
    samples = jax.jit(jax.vmap(lambda key: estimator.apply(g, Z, estimator.init(key, Z))[1]))(keys)
    error = np.abs(samples.mean() - of_the_jacobian((D,))[1])
    assert error < 4 * samples.std() / np.sqrt(samples.size)
    assert samples.std() > 1e-3  # random at all


@pytest.mark.parametrize("name", EXACT | RANDOM)
def test_all_products_share_one_linearization(name):
    """More probes, or more dimensions, evaluate the field no more often."""
    calls = []

    def counted(z):
        calls.append(1)
        return g(z)

    estimator = (EXACT | RANDOM)[name]
    probe = estimator.init(jax.random.key(0), Z)
    jax.eval_shape(lambda z: estimator.apply(counted, z, probe), Z)
    assert len(calls) == 1


def test_auto_switches_to_hutchinson_for_large_events():
    small, large = jnp.ones(divergence.EXACT_UP_TO), jnp.ones(divergence.EXACT_UP_TO + 1)
    auto = divergence.auto()
    assert auto.init(None, small) is None
    assert auto.init(jax.random.key(0), large).shape == (1, large.size)
    with pytest.raises(ValueError, match=r"needs random numbers; got key=None"):
        auto.init(None, large)


def test_a_noiseless_trace_takes_few_columns_at_once():
    """All of the Jacobian of many rows would not fit into memory."""
    noiseless, size = divergence.noiseless(), 2 * TANGENTS_AT_ONCE + 1
    wave = lambda t, z, _: jnp.sin(z) * jnp.roll(z, 1)
    assert noiseless.describe(wave, jnp.ones(size - 1)) == "exact(chunk=None)"
    assert noiseless.describe(wave, jnp.ones(size)) == f"exact(chunk={TANGENTS_AT_ONCE})"
    z = jnp.linspace(-1.0, 1.0, size)
    _, div = jax.jit(lambda z: noiseless.apply(lambda z: wave(0.0, z, None), z, None))(z)
    np.testing.assert_allclose(div, jnp.sum(jnp.cos(z) * jnp.roll(z, 1)), rtol=1e-12)


@pytest.mark.parametrize("name", ["auto", "noiseless"])
def test_a_norm_is_not_asked_of_a_closed_form(name):
    chooses, at = getattr(divergence, name)(), FieldAt(jaxode.nn.field, jnp.zeros(()), MODULE)
    assert chooses.chosen(at, Z) == divergence.closed_form()
    found, wanted = (of.with_norm(at, Z, None) for of in (chooses, divergence.exact()))
    np.testing.assert_array_equal(found[2], wanted[2])
    assert chooses.chosen(at, Z, needs_norm=True).with_norm is not None


def own_error(key, z):
    raise TypeError("of the user")


# What `init` of a divergence does without a key, and whether a density then computes the trace.
INITS = {
    "draws": (lambda key, z: jax.random.normal(key, z.shape, z.dtype), True),
    "draws nothing": (lambda key, z: None, False),
    "looks at the sample": (lambda key, z: None if (2 * z).size else z, False),
    "fails": (lambda key, z: [z][0 if key is not None else 1], True),
}


@pytest.mark.parametrize("name", INITS)
def test_without_noise(name):
    init, is_noiseless = INITS[name]
    given = divergence.Divergence(init, lambda g, z, probe: (g(z), jnp.zeros(())))
    assert given.without_noise((D,)) == (divergence.noiseless() if is_noiseless else given)


def test_without_noise_lets_errors_of_the_user_through():
    given = divergence.Divergence(own_error, lambda g, z, probe: (g(z), jnp.zeros(())))
    density = jaxode.bind(
        jaxode.cnf(lambda t, z, _: z, jaxode.standard_normal(D), divergence=given), ()
    )
    with pytest.raises(TypeError, match="of the user"):
        density.log_prob(Z)


@pytest.mark.parametrize("probes", with_slow([1, 4, D], [1]))  # part of the others
def test_orthogonal_probes_are_orthogonal_and_unbiased(probes):
    estimator = divergence.hutchinson(probes, "orthogonal")
    frames = jax.vmap(lambda key: estimator.init(key, Z))(jax.random.split(jax.random.key(3), 4000))
    gram = jnp.einsum("nki,nli->nkl", frames, frames)
    np.testing.assert_allclose(gram, np.broadcast_to(D * np.eye(probes), gram.shape), atol=1e-12)
    # Each probe has E[v v^T] = I. Entries of v v^T have variances below 3; 4.5 standard errors, as
    # there are up to 36 x 6 of them.
    second_moment = jnp.einsum("nki,nkj->kij", frames, frames) / len(frames)
    assert jnp.abs(second_moment - jnp.eye(D)[None]).max() < 4.5 * np.sqrt(3 / len(frames))


def test_orthogonal_probes_of_half_precision(default_settings):
    estimator, key = divergence.hutchinson(2, "orthogonal"), jax.random.key(3)
    half, single = (estimator.init(key, Z.astype(dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, single.astype(jnp.bfloat16))


SPREADS = [(name, n) for name in ("rademacher", "gaussian", "orthogonal") for n in (2, 5)]
ALIKE = [(name, n) for name, n in SPREADS if name != "orthogonal" and (name, n) != SPREADS[0]]


@pytest.mark.parametrize(("name", "probes"), with_slow(SPREADS, ALIKE))  # other numbers of probes
def test_standard_error_is_the_spread_of_the_estimate(name, probes):
    """Its square is an unbiased estimate of the variance of the mean over the probes."""
    estimator = divergence.hutchinson(probes, name)

    def draw(key):
        probe = estimator.init(key, Z)
        estimates = jax.vmap(lambda v: estimator.apply(g, Z, v[None])[1])(probe)
        return estimates.mean(), estimator.standard_error(estimates, D)

    mean, error = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(4), 20_000))
    difference = error**2 - (mean - of_the_jacobian((D,))[1]) ** 2
    assert jnp.abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)
    # and without the correction the test would see it for orthogonal probes: 1 - 2/6 and 1 - 5/6.
    assert difference.std() / np.sqrt(difference.size) < 0.02 * mean.var()


@pytest.mark.slow  # compiles for its memory alone
def test_chunks_bound_the_memory_of_a_large_event():
    """784 dimensions, as in MNIST, with the memory that the docstring states."""
    size, width, batch, chunk = 784, 256, 32, 4
    m = ConcatSquash(size, (width, width), key=jax.random.key(0))

    def temporary_bytes(chunk):
        apply = divergence.exact(chunk).apply
        loss = lambda m, z: jnp.sum(jax.vmap(lambda z: apply(lambda z: m(0.3, z), z, None)[1])(z))
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(m, jnp.ones((batch, size)))
        return lowered.compile(OPTIMIZED).memory_analysis().temp_size_in_bytes

    layers = 8 * batch * (2 * size + 2 * width)
    assert temporary_bytes(chunk) < 3 * (chunk + 1) * layers < 8e6
    assert temporary_bytes(None) > 20 * 3 * (chunk + 1) * layers
