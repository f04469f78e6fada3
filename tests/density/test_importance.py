"""The report on importance weights, against draws whose tail is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode

N = 10_000


def fields(report):
    return [report.ess, report.log_z, report.log_z_error, report.pareto_k]


def psis_k(weights):
    """The estimate as in Vehtari et al., of weights instead of their logarithms."""
    weights = np.sort(weights)
    m = int(np.ceil(min(0.2 * len(weights), 3 * np.sqrt(len(weights)))))
    x = weights[-m:] - weights[-m - 1]
    j = np.arange(1, 31 + int(np.sqrt(m)))
    theta = 1 / x[-1] + (1 - np.sqrt(len(j) / (j - 0.5))) / (3 * x[int(m / 4 + 0.5) - 1])
    k = np.array([np.log(1 - b * x).mean() for b in theta])
    profile = m * (np.log(-theta / k) - k - 1)
    posterior = np.array([1 / np.exp(profile - each).sum() for each in profile])
    k = np.log(1 - (theta * posterior).sum() * x).mean()
    return k * m / (m + 10) + 0.5 * 10 / (m + 10)


@pytest.mark.parametrize("shape", [-0.5, 0.2, 0.5, 0.9])
def test_the_tail_of_pareto_weights(shape):
    """A generalized Pareto distribution has its shape in every tail."""
    u = np.random.default_rng(0).uniform(size=N)
    weights = 1 + ((1 - u) ** -shape - 1) / shape
    report = jaxode.importance(np.log(weights) + 500.0)
    # The standard error of a shape k from 300 exceedances is (1 + k) / sqrt(300).
    assert abs(report.pareto_k - shape) < 3 * (1 + shape) / np.sqrt(300)
    np.testing.assert_allclose(report.pareto_k, psis_k(weights), rtol=1e-6)
    assert ("pareto_k above 0.7" in str(report)) == (shape > 0.7)


def test_moments_of_lognormal_weights():
    """`ess = exp(-s^2)` and `log Z = s^2 / 2`, as with noise of variance `s^2` in `log q`."""
    log_w = 0.5 * np.random.default_rng(0).standard_normal(N)
    report = jaxode.importance(log_w)
    w = np.exp(log_w)
    np.testing.assert_allclose(report.ess, w.sum() ** 2 / (w**2).sum() / N, rtol=1e-12)
    np.testing.assert_allclose(report.log_z, np.log(w.mean()), rtol=1e-9)
    np.testing.assert_allclose(report.log_z_error, w.std(ddof=1) / w.mean() / np.sqrt(N), rtol=1e-9)
    assert abs(report.log_z - 0.125) < 4 * report.log_z_error
    assert abs(report.ess - np.exp(-0.25)) < 0.03
    assert "!" not in str(report)
    assert "of 10,000" in str(report)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("count", [10, 2000])
def test_weights_that_are_not_finite_are_not_hidden(bad, count):
    log_w = np.zeros(count)
    log_w[3] = bad
    report = jaxode.importance(log_w)
    assert np.isnan(report.ess)
    assert not np.isfinite(report.log_z)
    assert not report.pareto_k <= 0.7
    assert "NaN or infinite" in str(report)


def test_weights_of_zero():
    """They count as samples. Too few others have no tail to speak of."""
    log_w = np.random.default_rng(0).standard_normal(N)
    half = np.where(np.arange(N) % 2, log_w, -np.inf)
    np.testing.assert_allclose(
        jaxode.importance(half).ess, jaxode.importance(half[1::2]).ess / 2, rtol=1e-12
    )
    few = jaxode.importance(np.where(np.arange(N) < 20, 0.0, -np.inf))
    np.testing.assert_allclose(few.ess, 20 / N, rtol=1e-12)
    assert few.pareto_k == np.inf
    none = jaxode.importance(np.full(N, -np.inf))
    assert np.isnan(none.ess)
    assert none.log_z == -np.inf


def test_weights_in_half_precision_are_summed_in_single():
    log_w = (0.3 * np.random.default_rng(0).standard_normal(70_000) - 9).astype(np.float16)
    np.testing.assert_array_equal(
        fields(jaxode.importance(log_w)), fields(jaxode.importance(log_w.astype(np.float32)))
    )


def test_a_common_factor_of_the_weights_does_not_count():
    """In float32: the numbers themselves have errors of 1e-7 of their size."""
    log_w = 0.05 * np.random.default_rng(0).standard_normal(N)
    exact = jaxode.importance(log_w)
    shifted = jaxode.importance((log_w - 1e5).astype(np.float32))
    np.testing.assert_allclose(shifted.ess, exact.ess, atol=1e-4)
    np.testing.assert_allclose(shifted.log_z_error, exact.log_z_error, rtol=0.02)
    np.testing.assert_allclose(shifted.log_z, exact.log_z - 1e5, rtol=1e-6)
    equal = jaxode.importance(jnp.full(N, 3.0))
    np.testing.assert_allclose(fields(equal)[:3], [1, 3, 0], atol=1e-6)
    assert equal.pareto_k == -np.inf
    assert "!" not in str(equal)


def test_it_maps_over_columns_and_is_printed_inside_of_a_program():
    log_w = jax.random.normal(jax.random.key(0), (2, N))
    report = jax.jit(jax.vmap(jaxode.importance))(log_w)
    for i in range(2):
        one = jaxode.importance(log_w[i])
        np.testing.assert_allclose([x[i] for x in fields(report)], fields(one), rtol=1e-12)
    jax.eval_shape(lambda x: (str(jaxode.importance(x)), x)[1], log_w[0])
    assert "Importance" in str(report)
    assert "fewer than 1000" in str(jaxode.importance(log_w[0, :999]))
