"""Flows whose density is known in closed form, in both directions of time, at any size or none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from helpers import with_slow

import jaxode
from jaxode import divergence

FINE = {"rtol": 1e-9, "atol": 1e-9}
# A flow of z' = M z + c carries normals to normals.
M = np.array([[0.3, 4.0, 0.0], [0.0, -0.5, 2.0], [0.1, 0.0, 0.5]])
C = np.array([0.5, -1.0, 2.0])
X = jax.random.normal(jax.random.key(1), (4, 3))


def affine(t, z, params):
    return params[0] @ z + params[1]


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (-0.5, -2.0)])
def test_an_affine_flow_in_both_directions_of_time(t0, t1):
    block = np.zeros((4, 4))
    block[:3] = np.column_stack([M, C]) * (t1 - t0)
    exp = scipy.linalg.expm(block)
    expected = scipy.stats.multivariate_normal(exp[:3, 3], exp[:3, :3] @ exp[:3, :3].T).logpdf(X)
    flow, params = jaxode.cnf(affine, jaxode.standard_normal(3), t0=t0, t1=t1, **FINE), (M, C)
    np.testing.assert_allclose(flow.log_prob(params, X), expected, rtol=1e-7)
    w = np.array([1.0, 0.0, 3.0, 0.5])
    loss = flow.nll(params, X, weights=jnp.asarray(w))
    np.testing.assert_allclose(loss, -(w @ expected) / w.sum(), rtol=1e-7)
    back = flow.from_base(params, flow.to_base(params, X))
    np.testing.assert_allclose(back, X, rtol=1e-6, atol=1e-7)


# `dz/dt = p z` carries N(0, 1) to N(0, e^2p).
P, KEY = 0.5, jax.random.key(0)


def growth(t, z, p):
    return p * z


def scaling(batch="per_sample", **options):
    options = {"batch": batch, "throw": False, **FINE, **options}
    return jaxode.cnf(growth, jaxode.standard_normal(2), **options)


def exact_log_prob(x):
    return -0.5 * ((x * np.exp(-P)) ** 2).sum(1) - 2 * (P + 0.5 * np.log(2 * np.pi))


@jax.jit
def of_scale(x):
    return scaling().log_prob(P, x), jax.value_and_grad(scaling().nll, 1)(P, x)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-310, np.nan, np.inf])
def test_the_scale_of_a_row(scale):
    """One that is not finite has no density, and neither has the loss."""
    x = np.array([[1.0, -2.0], [scale, scale]])
    log_prob, (loss, x_bar) = of_scale(x)
    expected = exact_log_prob(x) if np.isfinite(scale) else exact_log_prob(x) * [1, np.nan]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, -expected.mean(), rtol=1e-5)
    if np.isfinite(scale):
        np.testing.assert_allclose(x_bar, x * np.exp(-2 * P) / 2, rtol=1e-5, atol=1e-300)


def test_log_density_beyond_the_largest_number_is_minus_infinity():
    """In single precision `x^2` overflows at 1e30, where the density is zero."""
    x = jnp.full((1, 2), 1e30, jnp.float32)
    assert scaling().log_prob(jnp.float32(P), x) == -np.inf


@jax.jit
def of_parameter(p):
    flow, x = scaling("joint"), jnp.array([[0.1, 0.2], [0.3, 1.0]])
    return flow.log_prob(p, x), flow.sample(p, KEY, 3), *jax.value_and_grad(flow.nll)(p, x)


@pytest.mark.parametrize("p", [np.nan, np.inf, 1e30])
def test_parameters_without_a_solution(p):
    assert all(np.isnan(leaf).all() for leaf in of_parameter(p))


@pytest.mark.parametrize("control", with_slow(["joint", "per_sample"], ["joint"]))  # the same rule
def test_an_empty_span_is_the_base(control):
    flow = scaling(control, t0=1.0, t1=1.0)
    base = flow.base.log_prob(X[:, :2])
    np.testing.assert_array_equal(flow.log_prob(P, X[:, :2]), base)
    loss, (p_bar, x_bar) = jax.value_and_grad(flow.nll, (0, 1))(P, X[:, :2])
    np.testing.assert_allclose(loss, -base.mean(), rtol=1e-14)
    assert p_bar == 0.0
    np.testing.assert_allclose(x_bar, X[:, :2] / 4, rtol=1e-14)


EMPTY = [("joint", divergence.exact()), ("per_sample", divergence.hutchinson())]


@pytest.mark.parametrize(("control", "estimator"), EMPTY, ids=["joint-exact", "per_sample-noisy"])
def test_an_empty_batch(control, estimator):
    """No densities, and no samples; the mean of nothing is an error."""
    flow, x = scaling(control, divergence=estimator), jnp.zeros((0, 2))
    assert flow.log_prob(P, x, key=KEY).shape == (0,)
    with pytest.raises(ValueError, match=r"^nll\(x=...\): must have at least one row"):
        flow.nll(P, x, key=KEY)
    sample, log_prob = flow.sample_and_log_prob(P, KEY, 0)
    assert (sample.shape, log_prob.shape) == ((0, 2), (0,))
