"""Continuous normalizing flows against closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from helpers import with_slow

import jaxode
from jaxode import divergence
from jaxode.nn import ConcatSquash, field

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def module(size, key=0):
    """A flow that is far from the identity: its output weights are larger than at the start."""
    m = ConcatSquash(size, (16, 16), key=jax.random.key(key))
    return eqx.tree_at(lambda m: m.weight, m, 20 * m.weight)


def linear(t, z, A):
    return A @ z


A = jnp.array([[0.3, 1.0, 0.0], [-0.5, -0.2, 0.4], [0.1, 0.0, 0.6]])


def test_linear_flow_gradient_is_that_of_the_gaussian():
    flow = jaxode.cnf(linear, jaxode.standard_normal(3), **TIGHT)
    x = 2 * np.random.default_rng(0).standard_normal((20, 3))
    # Of |z|^2 / 2 + tr A, where z = expm(-A) x: the adjoint of the derivative of an exponential at
    # a matrix is that derivative at its transpose.
    back = scipy.linalg.expm(-np.asarray(A))
    z = x @ back.T
    by_exponential = scipy.linalg.expm_frechet(-np.asarray(A).T, z.T @ x / 20, compute_expm=False)
    expected = np.eye(3) - by_exponential, z @ back / 20
    for a, b in zip(jax.jit(jax.grad(flow.nll, (0, 1)))(A, x), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (-2.0, 0.5)], ids=str)
def test_density_of_one_dimension_integrates_to_one(times):
    t0, t1 = times
    flow = jaxode.cnf(field, jaxode.standard_normal(1), t0=t0, t1=t1)
    m = module(1)
    grid = jnp.linspace(-30.0, 30.0, 6001)
    density = jnp.exp(flow.log_prob(m, grid[:, None]))
    assert abs(jnp.trapezoid(density, grid) - 1) < 1e-4
    assert jnp.abs(density - jax.scipy.stats.norm.pdf(grid)).max() > 0.05  # not the base density


@pytest.mark.slow
def test_density_of_two_dimensions_integrates_to_one():
    flow = jaxode.cnf(field, jaxode.standard_normal(2))
    m = module(2)
    edge = jnp.linspace(-14.0, 14.0, 141)
    x = jnp.stack(jnp.meshgrid(edge, edge), -1).reshape(-1, 2)
    density = np.exp(flow.log_prob(m, x)).reshape(141, 141)
    assert abs(np.trapezoid(np.trapezoid(density, edge), edge) - 1) < 1e-4


@pytest.mark.parametrize("event", [(2,), (1, 2, 2)], ids=str)
def test_from_base_inverts_to_base_for_any_event_shape(event):
    flow = jaxode.cnf(field, jaxode.standard_normal(event), **TIGHT)
    m = ConcatSquash(event, (8,), key=jax.random.key(3))
    m = jax.tree.map(lambda x: 3 * x, m)
    x = jax.random.normal(jax.random.key(1), (5, *event))
    z = flow.to_base(m, x)
    assert z.shape == x.shape
    assert jnp.abs(z - x).max() > 0.05
    np.testing.assert_allclose(flow.from_base(m, z), x, atol=1e-7)


@pytest.mark.slow
def test_log_prob_is_the_change_of_variables_of_the_whole_flow():
    """`log p(x) = log p_base(z) + log |det dz/dx|`, with the Jacobian of the solve by autodiff."""
    flow = jaxode.cnf(field, jaxode.standard_normal(2), **TIGHT)
    m, x = module(2), jnp.array([[0.5, -1.0], [2.0, 0.3]])
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda x: flow.to_base(m, x[None])[0])))(x)
    expected = flow.base.log_prob(flow.to_base(m, x)) + jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(flow.log_prob(m, x), expected, rtol=1e-7)


def test_sample_and_log_prob_agrees_with_log_prob():
    flow = jaxode.cnf(field, jaxode.standard_normal(2), divergence=divergence.exact(), **TIGHT)
    m = module(2)
    x, log_prob = flow.sample_and_log_prob(m, jax.random.key(5), 50)
    assert x.shape == (50, 2)
    np.testing.assert_allclose(flow.log_prob(m, x), log_prob, atol=1e-6)
    # Of the same key; its steps see the log-density, too.
    np.testing.assert_allclose(flow.sample(m, jax.random.key(5), 50), x, atol=1e-6)


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


def test_samples_follow_the_density():
    """The linear flow's samples have the covariance `E E^T`."""
    flow = jaxode.cnf(linear, jaxode.standard_normal(3))
    x = flow.sample(A, jax.random.key(0), 40_000)
    E = scipy.linalg.expm(np.asarray(A))
    exact = E @ E.T
    # The standard error of the covariance of two normals with variances s, t is at most
    # sqrt(2 s t / n).
    error = np.sqrt(2 * np.outer(np.diag(exact), np.diag(exact)) / 40_000)
    assert (np.abs(np.cov(x.T) - exact) < 5 * error).all()


@pytest.mark.parametrize("control", with_slow(["joint", "per_sample"], ["joint"]))
def test_noise_depends_on_the_key_and_the_index_alone(control):
    """Same key, same value: with or without jit, with joint or own steps, whatever the batch."""
    noisy = {"divergence": divergence.hutchinson(), **TIGHT}
    flow = jaxode.cnf(field, jaxode.standard_normal(3), batch=control, **noisy)
    m, key = module(3), jax.random.key(11)
    x = jax.random.normal(jax.random.key(1), (6, 3))
    values = flow.log_prob(m, x, key=key)
    np.testing.assert_allclose(jax.jit(flow.log_prob)(m, x, key=key), values, rtol=1e-12)
    np.testing.assert_allclose(flow.log_prob(m, x[:2], key=key), values[:2], rtol=1e-7)
    joint = jaxode.cnf(field, jaxode.standard_normal(3), batch="joint", **noisy)
    np.testing.assert_allclose(joint.log_prob(m, x, key=key), values, rtol=1e-7)
    other = x.at[2:].set(0.0)
    np.testing.assert_allclose(flow.log_prob(m, other, key=key)[:2], values[:2], rtol=1e-7)
    assert jnp.abs(flow.log_prob(m, x, key=jax.random.key(12)) - values).max() > 1e-3


@pytest.mark.slow
def test_standard_error_of_log_prob_is_calibrated():
    """Its square is unbiased, and it covers the exact value as often as Student's t says."""
    size, probes, draws = 6, 5, 2000
    m = ConcatSquash(size, (16, 16, 16), key=jax.random.key(2))
    m = eqx.tree_at(lambda m: m.weight, m, 20 * m.weight)
    x = jax.random.normal(jax.random.key(1), (4, size))
    # One sequence of steps for all, so that the tolerance does not enter.
    fixed = {"steps": 8, "base": jaxode.standard_normal(size)}
    exact = jaxode.cnf(field, divergence=divergence.exact(), **fixed).log_prob(m, x)
    flow = jaxode.cnf(field, divergence=divergence.hutchinson(probes, "orthogonal"), **fixed)
    keys = jax.random.split(jax.random.key(2), draws)
    value, error = jax.jit(jax.vmap(lambda key: flow.log_prob_and_error(m, x, key=key)))(keys)
    np.testing.assert_allclose(value[0], flow.log_prob(m, x, key=keys[0]), rtol=1e-12)
    assert (error.mean(0) > 1e-3).all()
    # error ** 2 is unbiased for the squared deviation: 4 standard errors of the difference.
    difference = error**2 - (value - exact[None]) ** 2
    assert (jnp.abs(difference.mean(0)) < 4 * difference.std(0) / np.sqrt(draws)).all()
    # 95% of Student's t with 4 degrees of freedom lie within 2.78. The estimates of a probe are
    # not normal, hence 3% of room beside the sampling error of 8000 draws.
    covered = jnp.mean(jnp.abs(value - exact[None]) < 2.776 * error)
    assert abs(covered - 0.95) < 0.03


def test_standard_error_of_an_exact_divergence_is_zero():
    m, x = module(2), jnp.ones((3, 2))
    flow = jaxode.cnf(field, jaxode.standard_normal(2))
    value, error = flow.log_prob_and_error(m, x, key=jax.random.key(0))
    np.testing.assert_array_equal(value, flow.log_prob(m, x))
    np.testing.assert_array_equal(error, jnp.zeros(3))


def test_standard_error_of_an_empty_batch():
    flow = jaxode.cnf(linear, jaxode.standard_normal(3), divergence=divergence.hutchinson(2))
    log_prob, error = flow.log_prob_and_error(A, jnp.zeros((0, 3)), key=jax.random.key(0))
    assert log_prob.shape == error.shape == (0,)


def test_probe_is_held_fixed_through_the_solve():
    """With a fixed probe the estimate of a linear flow is `-v . A v` times the time span."""
    flow = jaxode.cnf(
        linear, jaxode.standard_normal(3), divergence=divergence.hutchinson(), **TIGHT
    )
    x, key = jnp.ones((4, 3)), jax.random.key(3)
    _, aux = flow.nll_and_stats(A, x, key=key)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(4))
    probes = jax.vmap(flow.divergence.init)(keys, x)[:, 0]
    np.testing.assert_allclose(
        aux.log_det, -jnp.einsum("bi,ij,bj->b", probes, A, probes), rtol=1e-7
    )


def test_own_divergence_with_a_fixed_probe_needs_no_key():
    """Every sample has its own probe, also if it depends on no key."""
    ones = divergence.hutchinson().apply
    own = divergence.Divergence(lambda key, z: jnp.ones((1, *z.shape)), ones)
    flow = jaxode.cnf(linear, jaxode.standard_normal(3), divergence=own, **TIGHT)
    _, aux = flow.nll_and_stats(A, jnp.ones((4, 3)))
    np.testing.assert_allclose(aux.log_det, -A.sum(), rtol=1e-7)


def test_context_selects_the_density():
    """A field that shifts by its context makes a Gaussian with that mean."""
    shift = lambda t, z, args: args[0] * args[1]
    flow = jaxode.cnf(shift, jaxode.standard_normal(2), **TIGHT)
    context = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    x = jnp.array([[0.2, 0.1], [2.0, 1.0]])
    exact = scipy.stats.norm.logpdf(x, loc=2 * context).sum(1)
    np.testing.assert_allclose(flow.log_prob(2.0, x, context=context), exact, rtol=1e-7)
    np.testing.assert_allclose(flow.nll(2.0, x, context=context), -exact.mean(), rtol=1e-7)
    np.testing.assert_allclose(flow.to_base(2.0, x, context=context), x - 2 * context, atol=1e-7)
    sample = flow.sample(2.0, jax.random.key(1), 2, context=context)
    z = flow.base.sample(jax.random.split(jax.random.key(1))[0], (2,))
    np.testing.assert_allclose(sample, z + 2 * context, atol=1e-7)
    sample, log_prob = flow.sample_and_log_prob(2.0, jax.random.key(0), 2, context=context)
    np.testing.assert_allclose(
        log_prob, scipy.stats.norm.logpdf(sample, loc=2 * context).sum(1), rtol=1e-7
    )


@pytest.mark.slow
def test_weights_of_the_loss():
    flow = jaxode.cnf(field, jaxode.standard_normal(2))
    m, x = module(2), jax.random.normal(jax.random.key(0), (4, 2))
    weights = jnp.array([1.0, 0.0, 3.0, 0.0])
    log_prob = flow.nll_and_stats(m, x)[1].log_prob
    np.testing.assert_allclose(log_prob, flow.log_prob(m, x), rtol=1e-5)
    expected = -(log_prob[0] + 3 * log_prob[2]) / 4
    np.testing.assert_allclose(flow.nll(m, x, weights=weights), expected, rtol=1e-12)


@pytest.mark.slow
def test_nll_and_stats_reports_the_forward_solve():
    flow = jaxode.cnf(field, jaxode.standard_normal(2))
    m, x = module(2), jax.random.normal(jax.random.key(0), (4, 2))
    run = jax.jit(jax.value_and_grad(flow.nll_and_stats, has_aux=True))
    (loss, aux), gradient = run(m, x)
    np.testing.assert_allclose(loss, -aux.log_prob.mean(), rtol=1e-14)
    np.testing.assert_allclose(
        aux.log_prob, flow.base.log_prob(flow.to_base(m, x)) + aux.log_det, atol=1e-4
    )
    assert aux.stats.num_evals > 6
    assert aux.result == jaxode.Result.SUCCESS
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_training_loss_gradient_in_float32_matches_float64():
    flow = jaxode.cnf(field, jaxode.standard_normal(2), divergence=divergence.hutchinson())
    m, x = module(2), jax.random.normal(jax.random.key(0), (16, 2))
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    # The probes of the two dtypes are the same signs.
    run = jax.jit(jax.grad(flow.nll))
    double = run(m, x, key=jax.random.key(4))
    gradient = run(single(m), single(x), key=jax.random.key(4))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(double), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_an_integer_is_the_size_of_a_vector():
    assert jaxode.standard_normal(3) == jaxode.standard_normal((3,))
