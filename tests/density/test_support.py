"""Where a density is not zero: closed forms on a support, and what lies outside of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import jaxode
from jaxode.density.maps.box import Box

KEY = jax.random.key(0)
BASE = jaxode.standard_normal(2)
STEPS = {"steps": 2}  # no test here is of adaptive steps, which compile twice as long
# An interval, half lines above and below a bound, and all numbers.
BOUNDS = np.array([0.5, 0.5, -np.inf, -np.inf]), np.array([2.0, np.inf, 2.0, np.inf])
U = np.random.default_rng(2).normal([0.3, -0.5, 1.0, -2.0], [0.5, 1.0, 0.7, 3.0], (50, 4))
ON_SUPPORT = np.stack(
    [0.5 + 1.5 * special.expit(U[:, 0]), 0.5 + np.exp(U[:, 1]), 2 - np.exp(-U[:, 2]), U[:, 3]], 1
)


def still(t, z, a):
    return a * z


@pytest.mark.parametrize("given", ["data", "mean and scale"])
def test_a_normal_on_a_support(given):
    """The density and the samples have closed forms. Mean and scale are those of `u`."""
    m, s = U.mean(0), U.std(0)
    density = jaxode.bind(
        jaxode.cnf(still, jaxode.standard_normal(4), **STEPS), jnp.zeros(()),
        standardize=ON_SUPPORT if given == "data" else (m, s), support=BOUNDS,
    )  # fmt: skip
    exact = [
        stats.johnsonsb(-m[0] / s[0], 1 / s[0], 0.5, 1.5),
        stats.lognorm(s[1], 0.5, np.exp(m[1])),
        stats.lognorm(s[2], -2.0, np.exp(-m[2])),
        stats.norm(m[3], s[3]),
    ]
    each = lambda f, x: np.stack(
        [getattr(q, f)(column) for q, column in zip(exact, (x * [1, 1, -1, 1]).T, strict=True)]
    )
    expected = each("logpdf", ON_SUPPORT).sum(0)
    np.testing.assert_allclose(density.log_prob(ON_SUPPORT), expected, rtol=1e-9)
    x, log_prob = density.sample_and_log_prob(KEY, (400,))
    x = np.asarray(x)
    assert ((BOUNDS[0] < x) & (x < BOUNDS[1])).all()
    np.testing.assert_allclose(log_prob, each("logpdf", x).sum(0), rtol=1e-9)
    assert all(stats.kstest(cdf, "uniform").pvalue > 1e-3 for cdf in each("cdf", x))
    np.testing.assert_allclose(density.from_flow(density.to_flow(x)), x, rtol=1e-9)


@jax.jit
def forward_and_slopes(box, u):
    forward = lambda u: box.forward(u)
    return forward(u), jax.jacobian(forward)(u)


@pytest.mark.parametrize("u", [-1000.0, -100.0, 0.5, 100.0, 1000.0])
def test_bijections_and_their_derivatives_are_finite(u, default_settings):
    box = Box(*(jnp.asarray(bound, jnp.float32) for bound in BOUNDS))
    (x, log_det), slopes = forward_and_slopes(box, jnp.full(4, u))
    assert box.contains(x)
    assert np.isfinite(x).all()
    assert np.isfinite(log_det)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert slopes[0][3, 3] == 1  # where there is no bound, it is the identity


@pytest.mark.parametrize("value", [1e-30, 1.0 - 1e-7, 0.5])
def test_bounds_in_float32(value):
    """A sample next to a bound has the density that it has in float64."""
    for dtype in (np.float32, np.float64):
        box = Box(*(jnp.asarray([x], dtype) for x in (0.0, 1.0)))
        u, log_det = box.inverse(jnp.asarray([value], dtype))
        exact = np.longdouble(np.asarray(value, dtype))
        np.testing.assert_allclose(u[0], np.log(exact / (1 - exact)), rtol=1e-5)
        np.testing.assert_allclose(log_det, -np.log(exact * (1 - exact)), rtol=1e-5)


def careless(t, z, a):
    """NaN far from the base: a field that has never seen such data."""
    return jnp.where(jnp.abs(z) > 8.0, jnp.nan, a * z)


TINY = 1e-6 * np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))
POSITIVE = np.random.default_rng(2).lognormal([7.0, -2.0], [0.5, 1.0], (50, 2))
OUT, OVER = "strictly inside", "so far .* overflows"
# Maps, a row in reach, three rows out of reach, and what `to_flow` says of these.
OUTSIDE = {
    "a box": (
        {"support": (np.array([0.0, -1.0]), np.array([2.0, 1.0]))},
        [0.5, 0.5], [[3.0, 0.0], [0.0, 0.0], [1.0, 1.0]], OUT,
    ),
    "a half line": (
        {"support": (0.0, np.inf)},
        [1.0, 2.0], [[5e-324, 1.0], [-1.0, 1.0], [1.0, np.inf]], OUT,
    ),
    "units": ({"standardize": POSITIVE, "support": (0.0, np.inf)}, POSITIVE[0], -POSITIVE[:3], OUT),
    "a small scale": ({"standardize": (0.0, 1e-6)}, [3e-6, 1e-8], [[1.7e308, -1e-8]] * 3, OVER),
    "whitening": (
        {"standardize": jaxode.standardize.whiten(TINY)}, TINY[0], [[1.7e308, -1e-6]] * 3, OVER,
    ),
    "a spline": (
        {"standardize": jaxode.standardize.normal(TINY)}, TINY[0], [[1.7e308, -1e-6]] * 3, OVER,
    ),
}  # fmt: skip


def finite_sum(density, a, x):
    """The sum of the log-densities that are finite, and all of them."""
    values = density.with_params(a).log_prob(x)
    return jnp.sum(jnp.where(jnp.isfinite(values), values, 0)), values


@pytest.mark.parametrize("name", OUTSIDE)
def test_out_of_reach_of_the_maps_the_density_is_zero(name):
    """Its gradients, too, and the flow is not asked. What is NaN stays so, or raises.

    The programs of the flow, and of its gradient, serve all maps.
    """
    maps, near, far, told = OUTSIDE[name]
    density = jaxode.bind(jaxode.cnf(careless, BASE, **STEPS), jnp.array(0.1), **maps)
    gradient = jax.grad(finite_sum, (1, 2), has_aux=True)
    x, lost = jnp.asarray([near, *far]), jnp.asarray([near, far[0], [np.nan, 0.0], near])
    log_prob = density.log_prob(x)
    assert np.isfinite(log_prob[0])
    np.testing.assert_array_equal(log_prob[1:], -np.inf)
    (by_a, by_x), values = gradient(density, jnp.array(0.1), x)
    np.testing.assert_allclose(values, log_prob, rtol=1e-9)
    assert np.isfinite(by_a)
    assert by_a != 0
    assert (by_x[0] != 0).all()
    np.testing.assert_array_equal(by_x[1:], 0)
    _, values = gradient(density, jnp.array(0.1), lost)
    np.testing.assert_allclose(values, [log_prob[0], -np.inf, np.nan, log_prob[0]], rtol=1e-9)
    with pytest.raises(jaxode.SolveError, match=r"\(x=...\): .* 1 of 4 rows, first in row 2"):
        density.log_prob(lost)
    # Training does not hide it.
    for rows, message in ((lost[:2], told), (lost[::2], r"x=...\): must be finite")):
        with pytest.raises(ValueError, match=rf"to_flow\(.*{message}.* 1 of 2 rows, .* row 1"):
            density.to_flow(rows)
    missing = np.isnan(jax.jit(density.to_flow)(lost)).any(1).tolist()
    assert missing == [False, True, True, False]
    assert np.isfinite(jax.jit(lambda: density.to_flow(lost[:1]))()).all()


def test_in_a_program_the_density_is_zero_or_nan_out_of_reach():
    density = jaxode.bind(
        jaxode.cnf(careless, BASE, **STEPS), jnp.array(0.1), support=(0.0, np.inf)
    )
    x = jnp.array([[1.0, 2.0], [-1.0, 1.0], [np.nan, 0.0], [1.0, 1.0]])
    log_prob = jax.jit(density.log_prob)(x)
    assert np.isnan(log_prob).tolist() == [False, False, True, False]
    assert np.isinf(log_prob).tolist() == [False, True, False, False]
