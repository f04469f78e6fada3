"""Maps from the units of the data to what a flow sees: inverses, determinants, and odd columns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxode
from jaxode.standardize import affine, normal, whiten

KEY = jax.random.key(0)
KINDS = {"affine": affine, "normal": normal, "whiten": whiten}


def field(t, z, a):
    return a * z


def bound(given, event, **options):
    """A standard normal within the map."""
    flow = jaxode.cnf(field, jaxode.standard_normal(event), steps=1)
    return jaxode.bind(flow, jnp.zeros(()), standardize=given, **options)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def skewed(*event):
    """Columns that are skewed, and depend on each other."""
    data = np.exp(normals(0, 60, *event))
    return data + 0.5 * data.sum(axis=tuple(range(1, data.ndim)), keepdims=True)


# The affine map is the first of both others.
OF_EVENTS = [
    (kind, event) for kind in KINDS for event in ((), (3,), (2, 2))
    if kind != "affine" or event == (3,)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "event"), OF_EVENTS, ids=str)
def test_the_inverse_and_the_determinants(kind, event):
    """Among the data, at one of them, and far outside."""
    data = skewed(*event)
    density = bound(KINDS[kind](data), event)
    maps = density.standardize
    x = jnp.asarray([*(1.01 * data[:4]), data[7], data.max(0) + 1e4, data.min(0) - 1e4])
    matrix = lambda f, x: jax.jacfwd(lambda x: f(x)[0])(x).reshape(x.size, x.size)

    @jax.jit
    @jax.vmap
    def carry(x):
        z, log_det = maps.inverse(x)
        back, of_forward = maps.forward(z)
        return z, back, log_det, of_forward, matrix(maps.inverse, x), matrix(maps.forward, z)

    z, back, log_det, of_forward, slope, back_slope = carry(x)
    np.testing.assert_allclose(back, x, rtol=1e-9)
    for found, matrix, sign in ((log_det, slope, 1), (of_forward, back_slope, -1)):
        signs, expected = np.linalg.slogdet(matrix)
        np.testing.assert_allclose(found, sign * expected, rtol=1e-9)
        np.testing.assert_array_equal(signs, 1)
    np.testing.assert_allclose(density.to_flow(x), z, rtol=1e-12)
    np.testing.assert_allclose(density.log_det(x), log_det, rtol=1e-12)


@pytest.mark.parametrize("way", ["inverse", "forward"])
def test_at_a_knot_the_determinant_has_the_slope_of_a_side(way):
    """Knots are among the data, and so are they where scores are evaluated."""
    maps = bound(normal(EVEN), ()).standardize.maps[1]
    knots = (maps.x if way == "inverse" else maps.z)[1:-1]
    slope = jax.jit(jax.vmap(jax.grad(lambda x: getattr(maps, way)(x)[1])))
    below, at, above = (slope(knots + shift) for shift in (-1e-10, 0, 1e-10))
    off = np.minimum(abs(at - below), abs(at - above)) / (1 + abs(at))
    np.testing.assert_allclose(off, 0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_units_do_not_matter(kind):
    data = skewed(3)
    scale, shift = np.array([1e-20, 1e3, 7.0]), np.array([0.0, 1e9, -1.0])
    one, other = (bound(KINDS[kind](x), 3) for x in (data, scale * data + shift))
    # In the units of the second column, the shift has seven digits more than the scale.
    np.testing.assert_allclose(
        other.to_flow(scale * data + shift), one.to_flow(data), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        other.log_det(scale * data + shift), one.log_det(data) - np.log(scale).sum(), rtol=1e-6
    )


ROWS = 1000
EVEN = stats.norm.ppf((np.arange(ROWS) + 0.5) / ROWS)
COIN = np.arange(ROWS) % 2
# Columns without ties, of even quantiles; the Kolmogorov distance of some to a normal is large.
SMOOTH = {
    "normal": 3 + 2 * EVEN,
    "lognormal": np.exp(1.5 * EVEN),
    "very skewed": np.exp(3 * EVEN),
    "heavier than Cauchy": stats.t(0.5).ppf((np.arange(ROWS) + 0.5) / ROWS),
    "Cauchy": stats.cauchy.ppf((np.arange(ROWS) + 0.5) / ROWS),
    "uniform": stats.norm.cdf(EVEN),
    "tiny": 1e-20 * EVEN,
    "far off": 1e6 + EVEN,
    "two peaks": np.where(COIN, 5, -5) + 0.1 * EVEN,
}
TIED = {
    "rounded": np.round(EVEN, 1),
    "few values": np.round(EVEN),
    "zero and one, and some others": np.where(np.abs(EVEN) < 2, COIN, EVEN),
    "zero, and rarely one": 1.0 * (EVEN > 2.6),
    "zero, and skewed": np.where(EVEN < 0.3, 0.0, np.exp(3 * EVEN)),
    "clipped": np.minimum(EVEN, 1.0),
    "steps, and one row beyond": np.where(EVEN > 3.2, 90.0, np.arange(ROWS) // 30),
    "peaks of noise": np.round(EVEN, 1) + 1e-5 * EVEN[::-1],
}
COLUMNS = SMOOTH | TIED


@functools.cache
def carried(dtype):
    """All columns at once: the data; and at these and far outside `x`, `z`, `x` again, slopes."""
    data = np.stack(list(COLUMNS.values()), 1).astype(dtype)
    maps = bound(normal(data), data.shape[1]).standardize
    span = np.ptp(data, axis=0)
    x = [data.min(0) - 1e4 * span, *np.sort(data, axis=0), data.max(0) + 1e4 * span]

    @jax.jit
    @jax.vmap
    def carry(x):
        push = lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),), has_aux=True)
        z, slope, log_det = push(maps.inverse, x)
        back, back_slope, of_forward = push(maps.forward, z)
        return z, back, slope, back_slope, log_det, of_forward

    return data, np.asarray(x), *map(np.asarray, carry(jnp.asarray(x)))


def column(name, dtype):
    return (table[:, list(COLUMNS).index(name)] for table in carried(dtype)[:6])


of_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


@of_dtype
@pytest.mark.parametrize("name", COLUMNS)
def test_any_column_is_carried_and_back(name, dtype):
    """And is normal after it, unless its values are tied."""
    data, x, z, back, slope, back_slope = column(name, dtype)
    assert z.dtype == back.dtype == dtype
    eps = np.finfo(dtype).eps
    # Four roundings of `x` and of `z`: a knot is added on each side.
    rounding = 4 * eps * (np.abs(x) + np.abs(z) / slope + data.std(dtype=float))
    assert (np.abs(back - x) < rounding).all()
    assert (np.diff(z)[np.diff(x) > rounding[1:]] > 0).all()
    assert (slope > 0).all()
    # Within a rounding of `x`, the slope changes, too.
    np.testing.assert_allclose(back_slope * slope, 1, rtol=2000 * eps)
    # The extreme of so many normal numbers.
    np.testing.assert_array_less(np.abs(z[1:-1]), 3.1)
    assert name in TIED or stats.kstest(z[1:-1], "norm").statistic < 0.05


@of_dtype
def test_the_determinant_of_any_columns(dtype):
    *_, slope, back_slope, log_det, of_forward = carried(dtype)
    rounding = 1e4 * np.finfo(dtype).eps
    np.testing.assert_allclose(log_det, np.log(slope).sum(1), atol=rounding)
    np.testing.assert_allclose(of_forward, -np.log(back_slope).sum(1), atol=rounding)


@pytest.mark.parametrize("rows", [2, 3, 10])
@pytest.mark.parametrize("kind", ["affine", "normal"])
def test_few_rows(kind, rows):
    data = np.exp(normals(1, rows, 2))
    z = bound(KINDS[kind](data), 2).to_flow(np.sort(data, axis=0))
    assert (np.diff(z, axis=0) > 0).all()
    # An affine map takes ten rows no farther than the root of nine.
    assert np.abs(z).max() < 3.1


def test_an_untrained_flow_on_whitened_data_is_a_normal():
    """Also in units that differ by fifteen orders of magnitude."""
    data = normals(2, 50, 2, 2) * np.array([[1e-9, 1.0], [3.0, 1e6]])
    data[:, 0, 1] += data[:, 1, 0]
    density, rows = bound(whiten(data), (2, 2)), data.reshape(50, 4)
    unit = rows.std(0)
    of_units = stats.multivariate_normal(rows.mean(0) / unit, np.cov((rows / unit).T, bias=True))
    expected = of_units.logpdf(rows / unit) - np.log(unit).sum()
    np.testing.assert_allclose(density.log_prob(data), expected, rtol=1e-9)
    z = density.to_flow(data).reshape(50, 4)
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(4), atol=1e-9)


def test_a_map_on_a_support():
    """It is fitted to the data after the bijection."""
    data = skewed(2)
    density = bound(normal(data), 2, support=(0.0, np.inf))
    of_logarithms = bound(normal(np.log(data)), 2)
    x = data.copy()
    x[-1] *= -1
    log_prob = density.log_prob(x)
    expected = of_logarithms.log_prob(np.log(data)) - np.log(data).sum(1)
    np.testing.assert_allclose(log_prob[:-1], expected[:-1], rtol=1e-9)
    assert log_prob[-1] == -np.inf
    assert (density.from_flow(normals(1, 50, 2)) > 0).all()
    with pytest.raises(ValueError, match=r"support=...\): the data must lie strictly inside"):
        bound(normal(data), 2, support=(0.0, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_take_the_same_program(kind):
    """However many of their values are tied. NaN stays NaN, in its row alone."""
    f = jax.jit(lambda density, x: density.log_prob(x))
    for data in (skewed(2), np.round(skewed(2))):
        density, x = bound(KINDS[kind](data), 2), data.copy()
        x[1, 0] = np.nan
        log_prob = np.asarray(f(density, x))
        assert np.flatnonzero(~np.isfinite(log_prob)).tolist() == [1]
        assert np.isnan(log_prob[1])
    assert f._cache_size() == 1


@pytest.mark.parametrize("kind", ["normal", "whiten"])
def test_known_data_inside_of_a_program(kind):
    """The map is that of outside, also after the bijection of a support."""
    data = skewed(2)
    log_prob = lambda x: bound(KINDS[kind](data), 2, support=(0.0, np.inf)).log_prob(x)
    np.testing.assert_allclose(jax.jit(log_prob)(data), log_prob(data), rtol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "whiten"])
def test_traced_data(kind):
    with pytest.raises(
        TypeError, match=r"^bind\(standardize=...\): needs data that are known, .* a tracer\."
    ):
        jax.jit(lambda x: bound(KINDS[kind](x), 2).log_prob(x))(skewed(2))


def test_a_quartile_range_that_single_precision_does_not_hold(default_settings):
    data = np.where(EVEN > 1.5, 1.0, 1e-50 * np.exp(EVEN))[:, None]
    maps = bound(normal(data), 1)
    z = maps.to_flow(data)
    assert np.isfinite(z).all()
    np.testing.assert_allclose(maps.from_flow(z), data, atol=1e-6)
