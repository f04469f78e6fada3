"""Checks pass a posterior in closed form, and find one that is wrong by a tenth of a deviation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow
from scipy import stats

import jaxode
from jaxode.calibration import simulations, uniformity

KEY = jax.random.key(0)
NOISE = 0.5  # of an observation of a standard normal parameter
SIMULATIONS = 4000
WIDTH = NOISE / np.sqrt(1 + NOISE**2)


def straight(t, z, args):
    """Along straight paths to a normal posterior, that is moved and scaled by parts of its
    deviation. Equal steps are exact."""
    (moved, scaled), x = args
    mean, scale = x / (1 + NOISE**2) + moved * WIDTH, scaled * WIDTH
    return mean + (scale - 1) * (z - t * mean) / (1 + t * (scale - 1))


def posterior(moved=0.0, scaled=1.0):
    flow = jaxode.cnf(straight, jaxode.standard_normal(2), steps=1)
    params = jnp.array([moved, 0.0]), jnp.array([scaled, 1.0])
    return jaxode.bind(flow, params)


def simulate(n=SIMULATIONS):
    random = np.random.default_rng(0)
    theta = random.normal(size=(n, 2))
    return theta, theta + NOISE * random.normal(size=(n, 2))


@pytest.fixture
def drawn(monkeypatch):
    """Samples of the closed form instead of the flow, whose solves take most of the seconds.

    `test_ranks_are_those_of_the_closed_form` is of the flow.
    """

    def law(density, x):
        moved, scaled = map(np.asarray, density.params)
        return stats.norm(np.asarray(x) / (1 + NOISE**2) + moved * WIDTH, scaled * WIDTH)

    def sample(density, key, shape, *, context):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return jnp.asarray(law(density, context).rvs((*shape, 2), rng))

    def log_prob(density, theta, *, context):
        return jnp.asarray(law(density, context).logpdf(theta).sum(axis=-1))

    def both(density, key, shape, *, context):
        theta = sample(density, key, shape, context=context)
        return theta, log_prob(density, theta, context=context)

    stand_ins = {"sample": sample, "log_prob": log_prob, "sample_and_log_prob": both}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(jaxode.Density, name, stand_in)


THETA, X = simulate()
sbc = lambda density, **options: jaxode.calibration.sbc(density, THETA, X, key=KEY, **options)


def test_ranks_are_those_of_the_closed_form(monkeypatch):
    """A rank is binomial by the level of the parameter, with at most 3.3 deviations in 100. In two
    parts, which have contexts of their own."""
    monkeypatch.setattr(simulations, "MAX_NUMBERS", 30 * 4000 * 4)
    theta, x = simulate(60)
    found = jaxode.calibration.sbc(posterior(), theta, x, key=KEY, draws=4000)
    level = stats.norm.cdf((theta - x / (1 + NOISE**2)) / WIDTH)
    np.testing.assert_allclose(found.ranks / 4000, level, atol=5 * np.sqrt(0.25 / 4000))


def test_a_right_posterior_passes(drawn):
    density = posterior()
    found = sbc(density)
    assert found.ranks.shape == (SIMULATIONS, 2)
    assert (found.p_values > 1e-3).all()  # a chance of a thousandth
    assert str(found).count("no fault found") == 2
    for check in (jaxode.calibration.coverage, jaxode.calibration.tarp):
        found = check(density, THETA, X, key=KEY)
        assert found.p_value > 1e-3
        assert (np.abs(found.coverage - found.levels) < 4 * found.error).all()
        assert str(found).endswith(f"p = {found.p_value:.2g}, no fault found")


WRONG = {
    "too high": (0.1, 1.0), "too low": (-0.1, 1.0),
    "too wide": (0.0, 1.1), "too narrow": (0.0, 1 / 1.1),
}  # fmt: skip


@pytest.mark.parametrize("fault", with_slow(WRONG, ["too low", "too wide"]))  # signs alone differ
def test_a_tenth_of_a_deviation_is_found_in_the_parameter_that_has_it(fault, drawn):
    found = sbc(posterior(*WRONG[fault]))
    assert found.p_values[0] < 1e-3 < found.p_values[1]
    first, second = str(found).splitlines()[1:]
    assert fault in first
    assert "no fault found" in second


def test_coverage_is_that_of_regions_of_a_wrong_width(drawn):
    """Both parameters are too narrow by a fifth."""
    levels = [0.5, 0.9]
    density = posterior().with_params((jnp.zeros(2), jnp.full(2, 0.8)))
    found = jaxode.calibration.coverage(density, THETA, X, key=KEY, levels=levels)
    exact = stats.chi2(2).cdf(0.8**2 * stats.chi2(2).ppf(levels))
    # Errors of 4000 simulations, and levels that 100 draws shift by 1/100.
    np.testing.assert_allclose(found.coverage, exact, atol=4 * 0.008 + 0.01)
    assert found.p_value < 1e-6
    assert "50% regions cover" in str(found)
    assert ", regions of 50% to 90% cover too little (up to " in str(found).splitlines()[-1]


def test_the_density_of_a_flow_ranks_draws():
    """Those of coverage are solved with their densities."""
    found = jaxode.calibration.coverage(posterior(), THETA[:60], X[:60], key=KEY)
    assert (np.abs(found.coverage - found.levels) < 4 * found.error).all()


def test_tarp_finds_a_shift_of_all_parameters(monkeypatch, drawn):
    monkeypatch.setattr(simulations, "MAX_NUMBERS", 400 * SIMULATIONS)  # parts of that many
    density, (theta, x) = posterior(), simulate(4 * SIMULATIONS)
    density = density.with_params((jnp.full(2, 0.3), jnp.ones(2)))
    assert jaxode.calibration.tarp(density, theta, x, key=KEY).p_value < 1e-6
    with pytest.raises(ValueError, match=r"tarp\(theta=...\): .* constant, at \[\[1\]\]"):
        jaxode.calibration.tarp(density, theta * [1.0, 0.0], x, key=KEY)


def test_the_components_of_the_test_are_standard_normal_under_uniformity():
    """Variances of 2000 columns have errors of 0.03."""
    u = np.random.default_rng(0).random((200, 2000))
    found = uniformity.components(u)
    np.testing.assert_allclose(np.cov(found), np.eye(uniformity.DEGREES), atol=0.15)
    np.testing.assert_allclose(np.mean(uniformity.p_values(u) < 0.05), 0.05, atol=0.02)


def test_memory_is_bounded_whatever_the_context(monkeypatch):
    """In parts, and with a context of several arrays that `bind` was not told of."""
    field = lambda t, z, args: 0.0 * z + args[1]["place"] + 0.0 * args[1]["image"].sum()
    density = jaxode.bind(jaxode.cnf(field, jaxode.standard_normal(2), steps=1), None)
    theta = np.random.default_rng(1).normal(size=(60, 2))
    x = {"place": np.zeros((60, 2)), "image": np.zeros((60, 8, 8))}
    monkeypatch.setattr(simulations, "MAX_NUMBERS", 25 * 66 * 10)
    seen, sample = [], jaxode.Density.sample
    monkeypatch.setattr(
        jaxode.Density, "sample", lambda self, key, shape, **of: seen.append(shape)
        or sample(self, key, shape, **of),
    )  # fmt: skip
    assert jaxode.calibration.sbc(density, theta, x, key=KEY, draws=100).ranks.shape == (60, 2)
    assert sum(count for _, count in seen) == 60
    assert max(count for _, count in seen) == 2


def test_c2st_is_a_half_for_equal_samples_and_one_for_separated():
    pytest.importorskip("sklearn")
    a, b = np.random.default_rng(2).normal(size=(2, 200, 2))
    first = a[:, 0], b[:, 0]  # whose network is small: to separate nothing, it trains for long
    assert jaxode.calibration.c2st(*first) == pytest.approx(0.5, abs=0.1)  # 4 errors of 0.025
    assert jaxode.calibration.c2st(a, b + 20) == 1.0


DENSITY = posterior()
FEW, ROWS = THETA[:60], X[:60]
REFUSED = {
    "no density": (lambda: jaxode.calibration.sbc(None, FEW, ROWS, key=KEY),
                   TypeError, r"calibration.sbc\(density=...\): must be made by jaxode.bind"),
    "few": (lambda: jaxode.calibration.sbc(DENSITY, FEW[:9], ROWS[:9], key=KEY),
            ValueError, r"sbc\(theta=...\): .* \[simulations, 2\], .* least 50; got \(9, 2\)"),
    "other rows": (lambda: jaxode.calibration.tarp(DENSITY, FEW, ROWS[:9], key=KEY),
                   ValueError, r"calibration.tarp\(x=...\): .*leading axis of 60"),
    "no draws": (lambda: jaxode.calibration.sbc(DENSITY, FEW, ROWS, key=KEY, draws=0),
                 ValueError, r"calibration.sbc\(draws=...\): must be a positive integer"),
    "levels": (lambda: jaxode.calibration.coverage(DENSITY, FEW, ROWS, key=KEY, levels=[1.0]),
               ValueError, r"calibration.coverage\(levels=...\): .*between 0 and 1"),
    "jit": (lambda: jax.jit(lambda x: jaxode.calibration.sbc(DENSITY, FEW, x, key=KEY).ranks)(ROWS),
            ValueError, "calibration.sbc: runs many programs"),
    "unequal": (lambda: jaxode.calibration.c2st(FEW, FEW[:20]),
                ValueError, r"calibration.c2st\(b=...\): must have the shape of a"),
    "NaN": (lambda: jaxode.calibration.c2st(FEW, FEW * np.nan),
            ValueError, r"calibration.c2st\(b=...\): must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
