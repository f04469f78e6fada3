"""The likelihood loss: its random ends, its regularizers, its memory and its precision.

Its value and gradients have closed forms in `test_flow_features.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import assert_close

import jaxode
from jaxode import divergence

KEY = jax.random.key(3)
BASE = jaxode.standard_normal(2)
X = jax.random.normal(jax.random.key(4), (5, 2))


def ones(t, z, args):
    return jnp.ones_like(z)


@jax.jit
def end_times(keys, t0, rows):
    """Where solves of the loss end: for `f = 1` they carry `x` to `x - t1 + end`."""
    flow = jaxode.cnf(ones, jaxode.standard_normal(1), t0=t0, t1=1 - t0, steer=0.4, steps=1)
    of = lambda key: flow.nll_and_stats(None, rows[:, None], key=key)[1].log_prob
    log_prob = jax.vmap(of)(keys)
    return log_prob[:, 0] - log_prob[:, 1] - 0.5 + flow.t1


@pytest.mark.parametrize("t0", [0.0, 2.0])
def test_steer_ends_at_a_uniform_random_time(t0):
    keys = jax.random.split(KEY, 2000)
    ends = end_times(keys, t0, jnp.arange(2.0))
    # The keys are fixed, and the ends are those of 2000 draws that no test of size 1% rejects.
    assert scipy.stats.kstest(ends, scipy.stats.uniform(t0 - 0.4, 0.8).cdf).pvalue > 0.01
    # Of the key alone, whatever the batch and the dtype.
    np.testing.assert_allclose(end_times(keys[:3], t0, jnp.arange(5.0)), ends[:3], rtol=1e-12)
    single = end_times(keys[:3], jnp.float32(t0), jnp.arange(2.0, dtype=jnp.float32))
    np.testing.assert_allclose(single, ends[:3], atol=1e-5)


def test_steer_beyond_a_traced_span_has_no_loss():
    """Some ends would be on the other side of the data."""
    flow = lambda t1: jaxode.cnf(ones, BASE, t1=t1, steer=0.5, steps=2, throw=False)
    losses = jax.jit(jax.vmap(lambda t1: flow(t1).nll(None, X, key=KEY)))(
        jnp.array([0.6, 0.5, 0.1])
    )
    np.testing.assert_array_equal(jnp.isfinite(losses), [True, False, False])


def test_steer_leaves_the_density_alone():
    flow, plain = (jaxode.cnf(ones, BASE, steer=steer, steps=2) for steer in (0.3, 0.0))
    for method in ("log_prob", "to_base"):
        found, wanted = (getattr(of, method)(None, X) for of in (flow, plain))
        np.testing.assert_array_equal(found, wanted)


def test_samples_of_half_precision(default_settings):
    """They are solved in float32; the derivative and the base density see them as they are."""
    flow = jaxode.cnf(jaxode.nn.field, BASE)
    m = jaxode.nn.ConcatSquash(2, (8,), key=KEY)
    x = jax.random.normal(jax.random.key(0), (8, 2)).astype(jnp.bfloat16)
    run = jax.jit(jax.value_and_grad(flow.nll))
    (loss, gradient), (expected, single) = run(m, x), run(m, x.astype(jnp.float32))
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(loss, expected, rtol=2 * eps)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    assert_close(gradient, single, 4 * eps)  # a few roundings of each sample


def test_transformations_of_the_gradient():
    """Of checkpoints, of Equinox and in a scan. Ensembles are in `test_flow_features.py`."""
    flow = jaxode.cnf(lambda t, z, a: jnp.sin(a * z), BASE, divergence=divergence.hutchinson())
    loss = lambda a, x, key: flow.nll(a, x, key=key)
    expected = jax.jit(jax.grad(loss))(0.5, X, KEY)
    scanned = jax.jit(lambda: jax.lax.scan(
        lambda carry, x: (carry, jax.grad(loss)(0.5, x, KEY)), 0, jnp.stack([X, X[::-1]])
    ))  # fmt: skip
    for found in (
        jax.jit(jax.grad(jax.checkpoint(loss)))(0.5, X, KEY),
        eqx.filter_value_and_grad(loss)(0.5, X, KEY)[1], scanned()[1][0],
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
    flow = jaxode.cnf(Shrinking(), BASE, divergence=divergence.closed_form(), regularizers=(norm,))
    said = r"the Jacobian, which the divergence \(closed form\) does"
    with pytest.raises(ValueError, match=said):
        flow.nll(None, X)


def test_a_regularizer_of_the_jacobian_with_a_field_that_has_a_closed_form():
    """`auto()` takes the exact trace for the loss, and the closed form for the density."""
    norm = (jaxode.regularizers.jacobian_frobenius(0.2),)
    flow = jaxode.cnf(Shrinking(), BASE, regularizers=norm, rtol=1e-8, atol=1e-8)
    # The norm of the Jacobian is 2 at all times.
    expected = 0.4 - flow.log_prob(None, X).mean()
    np.testing.assert_allclose(flow.nll(None, X), expected, rtol=1e-7)
    many = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(16), regularizers=norm)
    network, x = jaxode.nn.ConcatSquash(16, (8,), key=KEY), jnp.ones((3, 16))
    with pytest.raises(ValueError, match="a stochastic divergence needs random numbers"):
        many.nll(network, x)
    assert many.log_prob(network, x).shape == (3,)
