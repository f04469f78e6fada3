"""Likelihoods by name and of one's own, estimated noise, and bounds: against SciPy."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import DECAY, KnownSolution, posed_problem
from helpers import with_slow
from scipy import optimize, stats

import jaxode
from jaxode.estimation.observed.likelihoods import LIKELIHOODS
from jaxode.estimation.search.starts import _cause

RNG = np.random.default_rng(1)
TS = np.linspace(0.2, 6.0, 30)
SIZE = 30.0


def start(params):
    return jnp.exp(params["size"])[None]


def first(t, y, params):
    return y[0]


def noise_of(params):
    return jnp.exp(params["noise"])


def estimated(ys, starts, **options):
    return jaxode.estimate(
        DECAY, start, TS, ys, jax.tree.map(lambda x: jnp.asarray(x, float)[None], starts),
        observe=first, **options,
    )  # fmt: skip


def mean(rate, size):
    return np.exp(size - np.exp(rate) * TS)


MEAN = mean(-1.0, np.log(SIZE))
COUNTS = RNG.negative_binomial(4.0, 4.0 / (4.0 + MEAN)).astype(float)
COUNTS[3] = np.nan
RARE = RNG.poisson(MEAN).astype(float)
REAL = MEAN + 2.0 * RNG.normal(size=30)
REAL[7] = np.nan
POSITIVE = MEAN * np.exp(0.3 * RNG.normal(size=30))
TAILED = MEAN + RNG.laplace(scale=2.0, size=30)


def of_laplace(y, mu, scale):
    return stats.laplace.logpdf(y, mu, scale)


# Of each likelihood: log-density by SciPy, observations, whether it has a noise.
TABLE = {
    "normal": (stats.norm.logpdf, REAL, True),
    "log_normal": (lambda y, mu, s: stats.lognorm.logpdf(y, s, scale=mu), POSITIVE, True),
    "laplace": (of_laplace, TAILED, True),
    "poisson": (lambda y, mu, s: stats.poisson.logpmf(y, mu), RARE, False),
    "negative_binomial": (
        lambda y, mu, k: stats.nbinom.logpmf(y, k, k / (k + mu)), COUNTS, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_log_density_is_that_of_scipy(name):
    logpdf, ys, _ = TABLE[name]
    ys, of = ys[~np.isnan(ys)], LIKELIHOODS[name]
    for noise in (0.7, 12.0):
        predicted = 1.1 * MEAN[: len(ys)]  # of others, which does not matter
        found = of.half_deviance(predicted, ys, noise) + of.saturated(ys, noise)
        corner = 0.005 if name == "laplace" else 0.0  # which is round
        np.testing.assert_allclose(-found, logpdf(ys, predicted, noise), rtol=1e-9, atol=corner)


INFORMATIONS = {name: jax.jit(of.information) for name, of in LIKELIHOODS.items()}


@pytest.mark.parametrize("k", [0.2, 1.0, 2.9, 3.1, 50.0])
@pytest.mark.parametrize("mu", [0.1, 10.0, 300.0])
def test_the_information_about_a_size_is_the_mean_square_of_its_score(k, mu):
    y = np.arange(40_000 if k < 1 else 10_000)
    log_p = lambda k: stats.nbinom.logpmf(y, k, k / (k + mu))
    score = k * (log_p(k * 1.001) - log_p(k * 0.999)) / (0.002 * k)
    about = INFORMATIONS["negative_binomial"](mu, k)[1]
    # The quadrature is within 2%: it decides how fast the search ends, and the error of k.
    np.testing.assert_allclose(about, np.sum(np.exp(log_p(k)) * score**2), rtol=0.03)


# Where its densities of a noise are, and observations that have all of the chance.
EVERYWHERE = {
    "normal": np.linspace(-40.0, 60.0, 20_001),
    "log_normal": np.exp(np.linspace(-8.0, 12.0, 20_001)),
    "laplace": np.linspace(-40.0, 60.0, 20_001),
    "poisson": np.arange(400.0),
    "negative_binomial": np.arange(4000.0),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_information_about_a_prediction_is_the_mean_square_of_its_score(name):
    logpdf, *_ = TABLE[name]
    y, of = EVERYWHERE[name], LIKELIHOODS[name]
    for mu, noise in ((10.0, 1.3), (4.0, 0.8)):
        score = (logpdf(y, mu + 1e-4, noise) - logpdf(y, mu - 1e-4, noise)) / 2e-4
        weights = np.exp(logpdf(y, mu, noise))
        weights *= 1.0 if of.values == "counts" else np.gradient(y)
        about = INFORMATIONS[name](mu, noise)[0]
        np.testing.assert_allclose(about, np.sum(weights * score**2), rtol=5e-3)  # of sums


@pytest.mark.parametrize(
    "name",
    with_slow(TABLE, ["negative_binomial"]),  # eigenvalues: its parts are tested alone
)
def test_the_end_is_that_of_scipy(name):
    logpdf, ys, noisy = TABLE[name]
    seen, starts = ~np.isnan(ys), {"rate": -0.5, "size": 3.0}
    options = {"noise": noise_of} if noisy else {}
    if noisy:
        starts = {"noise": 0.5, **starts}
    found = estimated(ys, starts, likelihood=name, **options)

    def nll(x):
        *noise, rate, size = x
        scale = np.exp(noise[0]) if noise else 0.0
        return -np.sum(logpdf(ys[seen], mean(rate, size)[seen], scale))

    settings = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000, "maxfev": 4000}
    x0 = [*starts.values()]
    expected = optimize.minimize(nll, x0, method="Nelder-Mead", options=settings)
    x = np.array([*found.params.values()])
    # The corner of Laplace's density is round within a hundredth of its scale. Solves have 1e-6.
    nats, apart = (0.03, 0.02) if name == "laplace" else (3e-5, 1e-4)
    np.testing.assert_allclose(found.nll, expected.fun, atol=nats)
    np.testing.assert_allclose(x, expected.x, atol=apart)
    if name != "laplace":
        slope = optimize.approx_fprime(x, nll, 1e-6)
        np.testing.assert_allclose(slope, 0.0, atol=2e-3)  # of differences
    np.testing.assert_allclose(found.aic, 2 * found.nll + 2 * len(x))
    np.testing.assert_allclose(found.bic, 2 * found.nll + len(x) * np.log(seen.sum()))
    assert found.converged


def test_estimated_noise_is_the_closed_form_after_few_steps():
    starts = {"noise": 0.0, "rate": -0.8, "size": 3.2}
    found = estimated(REAL, starts, noise=noise_of, steps=12)
    apart = REAL - mean(found.params["rate"], found.params["size"])
    np.testing.assert_allclose(found.noise, np.sqrt(np.nanmean(apart**2)), rtol=1e-5)
    assert found.converged
    logpdf = stats.norm.logpdf(apart[~np.isnan(apart)], 0.0, found.noise[0])
    np.testing.assert_allclose(found.nll, -logpdf.sum(), rtol=1e-6)
    plain = estimated(REAL, {"rate": -0.8, "size": 3.2})
    np.testing.assert_allclose(found.params["rate"], plain.params["rate"], rtol=1e-4)
    np.testing.assert_allclose([found.nll, found.aic], [plain.nll, plain.aic], rtol=1e-6)
    # The residuals' noise counts parameters; that of the likelihood does not.
    np.testing.assert_allclose(found.errors["rate"] ** 2, 27 / 29 * plain.errors["rate"] ** 2, 1e-3)
    np.testing.assert_allclose(found.errors["noise"], np.sqrt(1 / 58), rtol=1e-4)


def test_noise_may_differ_by_component_and_by_row():
    turn = KnownSolution(
        lambda t, y, args: jnp.stack([-jnp.exp(args[0]["rate"]) * y[0], 0.0 * y[1]]),
        lambda t, y0, args: jnp.stack([y0[0] * jnp.exp(-jnp.exp(args[0]["rate"]) * t), y0[1]]),
    )
    ts, scale = jnp.stack([TS, TS]), np.array([[1.0, 3.0], [2.0, 6.0]])
    exact = np.stack([10 * np.exp(-0.4 * TS), 5 + 0 * TS], 1)
    ys = exact + 0.1 * scale[:, None] * RNG.normal(size=(2, 30, 2))
    noise = lambda p, row: row * jnp.exp(p["noise"])
    found = jaxode.estimate(
        turn, jnp.array([[10.0, 5.0]] * 2), ts, ys,
        {"noise": jnp.zeros((1, 2)), "rate": jnp.array([-1.0])},
        noise=noise, row_args=jnp.array([1.0, 2.0]), match=False,
    )  # fmt: skip
    fit = np.stack([10 * np.exp(-np.exp(found.params["rate"]) * TS), 5 + 0 * TS], 1)
    each = np.sqrt(np.mean(((ys - fit) / np.array([1.0, 2.0])[:, None, None]) ** 2, axis=(0, 1)))
    np.testing.assert_allclose(np.exp(found.params["noise"]), each, rtol=1e-4)
    assert found.noise.shape == ys.shape


@pytest.mark.parametrize(
    "name",
    with_slow(["normal", "student"], ["normal"]),  # less general
)
def test_a_log_density_of_ones_own_is_maximized(name):
    tails = jax.scipy.stats.t.logpdf
    own = {
        "normal": lambda y, mu, p: jax.scipy.stats.norm.logpdf(mu, y, jnp.exp(p["noise"])),
        "student": lambda y, mu, p: tails(mu, 3.0, y, jnp.exp(p["noise"])),
    }[name]
    ys = np.where(np.arange(30) == 5, np.nan, TAILED)
    starts = {"noise": 0.5, "rate": -0.5, "size": 3.0}
    found = estimated(ys, starts, likelihood=own)
    seen = ~np.isnan(ys)

    def nll(x):
        mu, scale = mean(x[1], x[2])[seen], np.exp(x[0])
        if name == "normal":
            return -np.sum(stats.norm.logpdf(ys[seen], mu, scale))
        return -np.sum(stats.t.logpdf(ys[seen], 3.0, mu, scale))

    settings = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000, "maxfev": 4000}
    expected = optimize.minimize(nll, [*starts.values()], method="Nelder-Mead", options=settings)
    np.testing.assert_allclose(found.nll, expected.fun, atol=3e-5)
    np.testing.assert_allclose([*found.params.values()], expected.x, atol=1e-4)
    hessian = jax.jit(jax.hessian(lambda x: _nll_of(own, ys, seen, x)))(jnp.asarray(expected.x))
    # Without the curvature of the predictions, which the tails of few residuals leave.
    np.testing.assert_allclose(found.covariance, np.linalg.inv(hessian), rtol=0.15, atol=2e-3)
    assert found.noise is None
    assert found.converged


def _nll_of(own, ys, seen, x):
    predicted = jnp.exp(x[2] - jnp.exp(x[1]) * TS)[seen]
    return -jnp.sum(own(predicted, ys[seen], {"noise": x[0]}))


def test_counts_that_vary_more_than_their_mean_says_are_told():
    # Of a variance of the mean and a quarter of its square.
    words = r"are [2-9]\.\d* times the noise: .* try likelihood='negative_binomial'"
    with pytest.warns(UserWarning, match=words):
        estimated(3 * COUNTS, {"rate": -0.5, "size": 4.0}, likelihood="poisson")


def test_a_profile_is_by_the_likelihood():
    found = estimated(
        REAL, {"noise": 0.5, "rate": -0.5, "size": 3.0}, likelihood="normal", noise=noise_of
    )
    values = found.params["rate"] + jnp.array([0.0, 0.1])
    ratio, others = found.profile(lambda p: p["rate"], values)
    seen = ~np.isnan(REAL)

    def nll(x):
        return -np.sum(stats.norm.logpdf(REAL[seen], mean(values[1], x[1])[seen], np.exp(x[0])))

    expected = optimize.minimize(nll, [0.5, 3.0], method="Nelder-Mead", options={"xatol": 1e-6})
    np.testing.assert_allclose(ratio, [0.0, 2 * (expected.fun - found.nll)], atol=1e-4)
    np.testing.assert_allclose(others["size"][1], expected.x[1], atol=1e-3)


BOUNDED = {"rate": -0.5, "size": 3.0}


@pytest.mark.parametrize("rates", [(-0.8, -0.3), (-2.0, -1.2)], ids=["low", "high"])
def test_bounds_hold_and_the_others_are_the_best_there(rates):
    bounds = {"rate": rates[0], "size": -jnp.inf}, {"rate": rates[1], "size": 5.0}
    starts = {"rate": sum(rates) / 2, "size": 2.0}
    with pytest.warns(UserWarning, match=r"\['rate'\] ended at a bound"):
        found = estimated(RARE, starts, likelihood="poisson", bounds=bounds)
    at = found.params["rate"]
    assert at in rates
    held = estimated(
        RARE, {"rate": at, "size": 2.0}, likelihood="poisson",
        bounds=({"rate": at, "size": -jnp.inf}, {"rate": at, "size": 9.0}),
    )  # fmt: skip
    np.testing.assert_allclose(found.params["size"], held.params["size"], rtol=1e-5)
    np.testing.assert_allclose(found.nll, held.nll, rtol=1e-8)
    assert np.isnan(found.errors["rate"])
    assert found.converged
    # The score of Poisson's size is the excess of counts.
    mu = mean(at, found.params["size"])
    np.testing.assert_allclose(mu.sum(), RARE.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.errors["size"], RARE.sum() ** -0.5, rtol=1e-4)


def test_bounds_that_nothing_meets_change_nothing():
    free = estimated(RARE, BOUNDED, likelihood="poisson")
    bounded = estimated(RARE, BOUNDED, likelihood="poisson", bounds=(-4.0, 4.0))
    np.testing.assert_allclose([*bounded.params.values()], [*free.params.values()], rtol=1e-6)
    np.testing.assert_allclose(bounded.covariance, free.covariance, rtol=1e-4)


def test_no_step_leaves_the_bounds():
    # The logarithm is not finite outside.
    nothing = lambda p: 0.0 * jnp.log(p["rate"] - 0.1)
    field = KnownSolution(
        lambda t, y, p: -p["rate"] * y + nothing(p),
        lambda t, y0, p: y0 * jnp.exp(-p["rate"] * t) + nothing(p),
    )
    ys = 2.0 * np.exp(-0.1 * TS) + 0.01 * RNG.normal(size=30)
    with pytest.warns(UserWarning, match="ended at a bound"):
        found = jaxode.estimate(
            field, jnp.full(1, 2.0), TS, ys[:, None], {"rate": jnp.array([0.5, 2.0])},
            bounds=(0.2, 3.0), match=False,
        )  # fmt: skip
    assert found.params["rate"] == 0.2
    assert np.isfinite(found.costs).all()


WRONG = {
    "negative counts": (
        {"ys": COUNTS - 1e3, "likelihood": "poisson"}, r"ys=.*counts: .* got ys\[0\] = -9",
    ),
    "half a count": ({"ys": REAL, "likelihood": "poisson"}, "must be counts: whole, from zero"),
    "nothing in logarithms": (
        {"ys": np.where(TS > 5, 0.0, POSITIVE), "likelihood": "log_normal"}, "must be positive",
    ),
    "another word": ({"likelihood": "cauchy"}, r"must be 'normal', .* got 'cauchy'"),
    "noise of counts": ({"ys": RARE, "likelihood": "poisson", "noise": 1.0}, "is not used with"),
    "no size": ({"ys": RARE, "likelihood": "negative_binomial"}, "is needed for"),
    "both": ({"likelihood": "normal", "residual": lambda p, o: p - o}, "Leave one out"),
    "a density of two": (
        {"likelihood": lambda p, o: p - o}, r"function \(predicted, observed, params\)",
    ),
    "one density": ({"likelihood": lambda p, o, q: jnp.sum(p)}, "must return log-densities like"),
    "noise of another shape": (
        {"noise": lambda p: jnp.ones(3)}, r"must return what broadcasts with an observation, \(\)",
    ),
    "one bound": ({"bounds": 3.0}, r"must be a pair \(low, high\)"),
    "bounds of others": ({"bounds": ({"k": 0.0}, 1.0)}, "must be numbers, or pytrees"),
    "bounds that cross": (
        {"bounds": ({"rate": -1.0, "size": 4.0}, 3.0)}, r"cross; got 4 and 3 for \['size'\]",
    ),
    "a start above": (
        {"bounds": (-4.0, 2.0)}, r"starts=.*bounds, -4 to 2 for \['size'\]; got 3 in start 0",
    ),
    "a start outside": (
        {"bounds": (0.0, 5.0)}, r"starts=.*bounds, 0 to 5 for \['rate'\]; got -0.5 in start 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_it_refuses(case):
    options, words = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        estimated(**{"ys": REAL, "starts": BOUNDED, **options})
    assert str(raised.value).startswith("estimate(")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            r"likelihood is not .* 1 of 29 obs.* first for ys\[4\] = ",
            {"likelihood": lambda p, o, q: jnp.where(o == REAL[4], jnp.nan, -((p - o) ** 2))},
        ),
        ("noise is -1. Let it be positive", {"noise": lambda p: p["rate"] - 0.5}),
    ],
)
def test_it_names_what_is_not_finite(words, options):
    starts = {"rate": np.full(1, -0.5), "size": np.full(1, 3.0)}
    options = {"observe": first} | options
    problem, flats, _ = posed_problem(DECAY, start, TS, REAL, starts, **options)
    assert re.match(words, _cause(problem, TS[-1], flats[0]))


INFLOW = KnownSolution(
    lambda t, y, params: params["in"] - params["out"] * y,
    lambda t, y0, params: (
        params["in"] / params["out"]
        + (y0 - params["in"] / params["out"]) * jnp.exp(-params["out"] * t)
    ),
)
# Of the median 1 + exp(-t / 2), every fifth of a time unit.
FEW_COUNTS = [*map(int, "2051112103502311212112010111022321333302")]
ABOVE_ZERO = [
    1.53, 1.03, 2.44, 0.96, 4.40, 2.46, 1.25, 1.93, 3.15, 5.64, 0.84, 2.22, 1.65, 1.08, 2.11, 1.55,
    2.03, 0.90, 1.15, 1.38, 1.13, 1.12, 0.75, 1.16, 1.19, 1.04, 1.06, 1.50, 0.76, 1.49, 0.97, 1.07,
    0.94, 1.62, 1.51, 1.03, 0.82, 2.59, 1.34, 0.57,
]  # fmt: skip


@pytest.mark.parametrize("likelihood", ["poisson", "log_normal"])
def test_the_end_is_no_worse_than_the_start_where_the_first_part_misleads(likelihood):
    """The first observations are fitted by predictions that turn negative, which have no density,
    or are worse than those of the start."""
    ts = np.linspace(0.2, 8.0, 40)
    ys = np.array(FEW_COUNTS if likelihood == "poisson" else ABOVE_ZERO, float)
    true = {"in": 0.5, "out": 0.5, "size": 2.0}
    starts = {name: np.full(1, value) for name, value in true.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that so few counts do not determine
        found = jaxode.estimate(
            INFLOW, lambda params: params["size"][None], ts, ys[:, None], starts,
            likelihood=likelihood,
        )  # fmt: skip
    predicted = 1.0 + np.exp(-0.5 * ts)
    if likelihood == "poisson":
        nll = -stats.poisson.logpmf(ys, predicted).sum()
    else:
        noise = np.sqrt(np.mean(np.log(ys / predicted) ** 2))
        nll = -stats.lognorm.logpdf(ys, noise, scale=predicted).sum()
    assert found.nll <= nll
