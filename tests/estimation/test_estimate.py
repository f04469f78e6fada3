"""Parameters from observations: against least squares of closed forms, and what is refused."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import DECAY, KnownSolution, decay, posed_problem
from helpers import with_slow
from jax.flatten_util import ravel_pytree
from scipy.optimize import curve_fit, minimize_scalar

import jaxode
from jaxode.estimation.search import levenberg_marquardt
from jaxode.estimation.search.levenberg_marquardt import MOST_STEPS
from jaxode.estimation.search.slopes import smoothed
from jaxode.estimation.search.starts import MultiStart, Runs, _cause, improved, outcome_of_starts
from jaxode.estimation.uncertainty import is_unlikely
from jaxode.training.budget import Budget

TS = np.linspace(0.1, 3.0, 30)
NOISE = 0.02
# As many as a search takes at a time: with slopes and without, it is the same program.
STARTS = {
    "rate": np.array([-1.5, 0.0, 1.5, -0.5, 0.5, 1.0, -1.0, 0.1]),
    "size": np.array([0.3, 1.0, 3.0, 2.5, 0.5, 1.5, 1.2, 2.2]),
}
FEW = {"rate": np.array([-1.5, 0.0, 1.5])}
KNOWN = {"rate": 0.2, "size": 2.0}
RNG = np.random.default_rng(0)


def start(params):
    return params["size"][None]


def closed(t, rate, size):
    return size * np.exp(-np.exp(rate) * t)


YS = closed(TS, *KNOWN.values()) + NOISE * RNG.normal(size=TS.shape)


def estimated(ys=YS, ts=TS, starts=STARTS, f=DECAY, **options):
    return jaxode.estimate(f, start, ts, ys[:, None], starts, **options)


@pytest.fixture(scope="module")
def fitted():
    return estimated()


@pytest.mark.parametrize("f", [DECAY, decay], ids=["known solution", "solve"])
def test_it_is_the_least_squares_of_the_closed_form(f):
    fitted = estimated(f=f)
    expected, covariance = curve_fit(closed, TS, YS, (0.0, 1.0), ftol=1e-12, xtol=1e-12)
    np.testing.assert_allclose([*fitted.params.values()], expected, rtol=1e-5)
    np.testing.assert_allclose(fitted.covariance, covariance, rtol=1e-3)
    np.testing.assert_allclose([*fitted.errors.values()], np.sqrt(np.diag(covariance)), rtol=1e-3)
    residuals = YS - closed(TS, *expected)
    np.testing.assert_allclose(fitted.noise, np.sqrt(np.sum(residuals**2) / 28), rtol=1e-5)


def test_every_start_ends_there(fitted):
    np.testing.assert_allclose(fitted.costs, fitted.cost, rtol=1e-6)
    np.testing.assert_allclose(fitted.starts["rate"], fitted.params["rate"], atol=1e-4)
    assert fitted.converged


def test_it_is_printed_as_numbers(fitted):
    title, header, *lines = str(fitted).splitlines()
    assert title.startswith("Estimate: converged, cost ")
    assert title.endswith(f"nll {fitted.nll:.5g}")
    assert header.split() == ["estimate", "error"]
    told = {name: numbers for name, *numbers in map(str.split, lines)}
    for name in ("rate", "size"):
        expected = [f"{fitted.params[name]:.5g}", f"{fitted.errors[name]:.5g}"]
        assert told[f"['{name}']"] == expected
    without = eqx.tree_at(lambda found: found.nll, fitted, None)
    assert "cost=f64[]" in str(without)  # it is not numbers


def test_a_missing_observation_is_one_less():
    ys = np.where(np.arange(30) % 3 == 0, np.nan, YS)
    expected, covariance = curve_fit(
        closed, TS[~np.isnan(ys)], YS[~np.isnan(ys)], (0.0, 1.0), ftol=1e-12, xtol=1e-12
    )
    found = estimated(ys)
    np.testing.assert_allclose([*found.params.values()], expected, rtol=1e-5)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-3)


def test_with_known_noise_and_a_prior_it_is_the_mode():
    prior = lambda params: (params["rate"] - 0.3) / 0.03
    found = estimated(noise=NOISE, prior=prior, match=False)
    times = np.append(TS, -1.0)  # a time that stands for the prior
    model = lambda t, rate, size: np.where(t < 0, rate, closed(t, rate, size))
    sigma = np.append(np.full(30, NOISE), 0.03)
    expected, covariance = curve_fit(
        model, times, np.append(YS, 0.3), (0.0, 1.0), sigma, absolute_sigma=True, ftol=1e-12
    )
    np.testing.assert_allclose([*found.params.values()], expected, rtol=1e-4)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-2)


def test_logarithms_are_observed_or_compared():
    logs = np.log(closed(TS, *KNOWN.values())) + NOISE * RNG.normal(size=TS.shape)
    observed = estimated(logs, observe=lambda t, y, params: jnp.log(y), noise=NOISE)
    apart = lambda predicted, observed, noise=NOISE: jnp.log(predicted / observed) / noise
    compared = estimated(np.exp(logs), residual=apart, match=False)
    np.testing.assert_allclose([*observed.params.values()], [*compared.params.values()], rtol=1e-5)
    np.testing.assert_allclose(observed.covariance, compared.covariance, rtol=1e-3)
    slope, _ = np.polyfit(TS, logs, 1)
    np.testing.assert_allclose(-jnp.exp(observed.params["rate"]), slope, rtol=1e-4)


def test_a_profile_is_what_a_refit_at_each_value_gives(fitted):
    error = fitted.errors["rate"]
    values = fitted.params["rate"] + error * jnp.array([-1.96, -1.0, 0.0, 1.0, 1.96])
    ratio, others = fitted.profile("rate", values)
    np.testing.assert_allclose(ratio, [3.84, 1.0, 0.0, 1.0, 3.84], atol=0.1)
    best = [np.exp(-np.exp(rate) * TS) for rate in np.asarray(values)]
    sizes = [basis @ YS / (basis @ basis) for basis in map(np.asarray, best)]
    np.testing.assert_allclose(others["size"], sizes, rtol=1e-5)
    np.testing.assert_allclose(others["rate"], values)


UNITS = [(1e-3, False, False), (1e-5, True, False), (1e-5, True, True)]


@pytest.mark.parametrize(
    ("unit", "double", "is_solved"),
    with_slow(UNITS, [case for case in UNITS if case[1]]),  # single precision loses more
)
def test_data_may_have_any_unit(unit, double, is_solved, request):
    if not double:
        request.getfixturevalue("default_settings")
    ts, rtol = TS, 1e-5 if double else 1e-3
    field = KnownSolution(
        lambda t, y, rate: -jnp.exp(rate) * y, lambda t, y0, rate: y0 * jnp.exp(-jnp.exp(rate) * t)
    )
    field = field.field if is_solved else field
    found = jaxode.estimate(field, np.full(1, 2 * unit), ts, unit * YS[:, None], np.array([-1.5]))
    model = lambda t, rate: closed(t, rate, 2.0)
    (expected,), covariance = curve_fit(model, ts, YS, 0.0, ftol=1e-12, xtol=1e-12)
    np.testing.assert_allclose(found.params, expected, rtol=rtol)
    np.testing.assert_allclose(found.errors, np.sqrt(covariance[0, 0]), rtol=1e-3)
    squares = np.sum((YS - model(ts, expected)) ** 2)
    np.testing.assert_allclose(found.cost / unit**2, squares / 2, rtol=1e-3)
    np.testing.assert_allclose(found.costs, found.cost, rtol=1e-6)
    np.testing.assert_allclose(found.noise / unit, np.sqrt(squares / 29), rtol=1e-3)
    values = found.params + found.errors * jnp.array([-1.96, 0.0])
    np.testing.assert_allclose(found.profile(lambda rate: rate, values)[0], [3.84, 0.0], atol=0.1)


@pytest.mark.slow  # test_search.py has a function of a parameter of another unit
@pytest.mark.usefixtures("default_settings")
def test_parameters_may_have_any_unit():
    temperatures, ts = np.array([290.0, 310.0]), np.stack([TS, TS])
    rate = lambda args: jnp.exp(20.0 - args[0] / (8.314 * args[1]))
    field = KnownSolution(
        lambda t, y, args: -rate(args) * y, lambda t, y0, args: y0 * jnp.exp(-rate(args) * t)
    )
    exact = lambda at, energy: np.exp(-np.exp(20 - energy / (8.314 * at[1])) * at[0])
    at = np.stack([ts.ravel(), np.repeat(temperatures, 30)])
    ys = exact(at, 5e4) + NOISE * RNG.normal(size=60)
    found = jaxode.estimate(
        field, np.ones((2, 1)), ts, ys.reshape(2, 30, 1), np.array([4.5e4, 5.5e4]),
        row_args=jnp.asarray(temperatures),
    )  # fmt: skip
    (expected,), covariance = curve_fit(exact, at, ys, 5.1e4)
    assert abs(found.params - expected) < 0.05 * covariance[0, 0] ** 0.5
    np.testing.assert_allclose(found.errors, covariance[0, 0] ** 0.5, rtol=1e-2)
    np.testing.assert_allclose(found.costs, found.cost, rtol=1e-3)


def test_starts_in_single_precision_are_taken_in_the_default_one(fitted):
    found = estimated(starts=jax.tree.map(lambda x: x.astype(jnp.float32), STARTS))
    np.testing.assert_allclose([*found.params.values()], [*fitted.params.values()], rtol=1e-6)


@pytest.mark.usefixtures("default_settings")
def test_it_refuses_times_that_single_precision_loses():
    ts = 2459000.0 + TS / 10
    words = r"estimate\(ts=.*times are lost in the precision of float32"
    with pytest.raises(ValueError, match=words):
        estimated(ts=ts, t0=2459000.0)
    posed_problem(DECAY, start, ts[:6] - 2459000.0, YS[:6, None], STARTS)  # which is no error


def test_experiments_share_parameters_and_have_their_own_inputs():
    rates, ts = np.array([0.5, 1.0, 2.0]), np.stack([TS, 2 * TS, np.minimum(TS, 1.0)])
    field = KnownSolution(
        lambda t, y, args: -jnp.exp(args[0]["rate"]) * args[1] * y,
        lambda t, y0, args: y0 * jnp.exp(-jnp.exp(args[0]["rate"]) * args[1] * t),
    )
    y0 = np.array([[1.0], [2.0], [3.0]])
    exact = y0 * np.exp(-np.exp(0.2) * rates[:, None] * ts)
    ys = exact + NOISE * RNG.normal(size=ts.shape)
    ys[2, TS > 1.0] = np.nan  # padded
    found = jaxode.estimate(field, y0, ts, ys[..., None], FEW, row_args=rates, noise=NOISE)
    seen = ~np.isnan(ys)
    model = lambda x, rate: x[1] * np.exp(-np.exp(rate) * x[0])
    x = np.stack([(rates[:, None] * ts)[seen], np.broadcast_to(y0, ts.shape)[seen]])
    sigma = np.full(seen.sum(), NOISE)
    expected, covariance = curve_fit(model, x, ys[seen], 0.0, sigma, absolute_sigma=True)
    np.testing.assert_allclose(found.params["rate"], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-2)


# With `args`, each gets the pair of parameters and data.
def decay_of(t, y, given):
    (params, data), row = given
    return -jnp.exp(params["rate"]) * data["speed"] * row * y


def decayed_of(t, y0, given):
    (params, data), row = given
    return y0 * jnp.exp(-jnp.exp(params["rate"]) * data["speed"] * row * t)


def start_of(given, row):
    params, data = given
    return params["size"] * data["dose"] * row * jnp.ones(1)


def channels(t, y, given):
    return jnp.concatenate([y, 2.0 * y])


def prior_of(given):
    return (given[0]["rate"] - given[1]["mean"]) / 0.01


def noise_of(given, row):
    return given[1]["noise"] * row


def residual_of(predicted, observed, given):
    return (predicted - observed) / given[1]["noise"]


@pytest.mark.parametrize(
    "by", [{"noise": noise_of}, {"residual": residual_of}], ids=["noise", "residual"]
)
def test_other_data_are_no_new_program(by, compiled):
    rows, ts = np.array([0.5, 2.0]), np.stack([TS, TS])
    sigma = (rows if "noise" in by else np.ones(2))[:, None, None]

    def found(mean, speed, dose):
        exact = dose * 2.0 * rows[:, None] * np.exp(-np.exp(0.2) * speed * rows[:, None] * ts)
        ys = exact[..., None] * np.array([1.0, 2.0]) + NOISE * sigma * RNG.normal(size=(2, 30, 2))
        args = {"mean": mean, "speed": speed, "dose": dose, "noise": NOISE}
        return ys, jaxode.estimate(
            KnownSolution(decay_of, decayed_of), start_of, ts, ys, STARTS, observe=channels,
            prior=prior_of, args=args, row_args=rows, **by,
        )  # fmt: skip

    found(0.2, 1.0, 1.0)
    compiled.clear()
    ys, fit = found(0.25, 1.3, 3.0)
    assert not compiled

    def model(x, rate, size):
        fits = 3.0 * size * rows[:, None] * np.exp(-np.exp(rate) * 1.3 * rows[:, None] * ts)
        fits = (fits[..., None] * np.array([1.0, 2.0]) / sigma).ravel()
        return np.append(fits / NOISE, rate / 0.01)

    target = np.append((ys / sigma).ravel() / NOISE, 25.0)
    expected, _ = curve_fit(model, 0.0, target, (0.2, 2.0), ftol=1e-12)
    np.testing.assert_allclose([*fit.params.values()], expected, rtol=1e-5)


def circling(t, y, params):
    return params["speed"] * jnp.stack([y[1], -y[0]])


def circled(t, y0, params):
    sin, cos = jnp.sin(params["speed"] * t), jnp.cos(params["speed"] * t)
    return jnp.stack([cos * y0[0] + sin * y0[1], cos * y0[1] - sin * y0[0]])


CIRCLE = KnownSolution(circling, circled)


@pytest.mark.parametrize(
    "observe",
    with_slow([None, lambda t, y, params: y[0]], [None]),  # other tests match slopes
    ids=["state", "half of it"],
)
def test_starts_that_single_shooting_loses_find_twenty_periods(observe):
    ts = np.linspace(0.1, 40 * np.pi, 400)
    ys = np.stack([np.sin(ts), np.cos(ts)], 1) + 0.1 * RNG.normal(size=(400, 2))
    starts = {"speed": jnp.array([0.7, 1.3])}
    ys = ys if observe is None else ys[:, 0]
    found = jaxode.estimate(
        CIRCLE, jnp.array([0.0, 1.0]), ts, ys, starts, observe=observe, max_steps=1024
    )
    assert abs(found.params["speed"] - 1.0) < 4 * found.errors["speed"] < 1e-3
    if observe is None:
        np.testing.assert_allclose(found.costs, found.cost, rtol=1e-6)


def swinging(t, y, p):
    return jnp.stack([y[1], -p["w2"] * y[0] - p["c"] * y[1]])


def swung(t, y0, p):
    """From a point of rest."""
    half = p["c"] / 2
    square = p["w2"] - half**2
    speed = jnp.sqrt(jnp.abs(square))
    cos = jnp.where(square > 0, jnp.cos(speed * t), jnp.cosh(speed * t))
    sin = jnp.where(square > 0, jnp.sin(speed * t), jnp.sinh(speed * t)) / speed
    size = y0[0] * jnp.exp(-half * t)
    return size * jnp.stack([cos + half * sin, -p["w2"] * sin])


def given_once(t, y, params, i):
    return y + 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_starts_count_where_samples_are_too_sparse_for_slopes(seed):
    """With the noise of seed 1, not shifted, slopes lead the second start to no oscillation."""
    noise = 0.01 * np.random.default_rng(seed).normal(size=(30, 2))
    field = KnownSolution(swinging, swung)
    y0, ts = np.array([1.0, 0.0]), 1.3 * np.arange(1.0, 31.0)
    true = {"w2": 9.0, "c": 0.05}
    ys = jax.jit(jax.vmap(lambda t: swung(t, y0, true)))(ts) + noise
    starts = {"w2": jnp.array([9.05, 8.9]), "c": jnp.array([0.05, 0.06])}
    found = jaxode.estimate(field, y0, ts, ys, starts)
    assert abs(found.params["w2"] - 9.0) < 4 * found.errors["w2"] < 0.01
    np.testing.assert_allclose(found.costs, found.cost, rtol=1e-4)


@pytest.mark.parametrize(
    ("f", "kind"),
    # test_population.py solves with doses.
    with_slow(
        [(DECAY, jnp.array), (DECAY, list), (decay, jnp.array)],
        [(decay, jnp.array)],
    ),
    ids=["array", "list", "solve"],
)
def test_doses_come_after_the_first_part(f, kind):
    dose = jaxode.Jumps(kind([0.05, 1.0, 2.0]), given_once)
    after = TS[:, None] - np.array([0.05, 1.0, 2.0])
    exact = np.where(after > 0, np.exp(-np.exp(0.2) * after), 0.0).sum(1, keepdims=True)
    ys = exact + NOISE * RNG.normal(size=(30, 1))
    found = jaxode.estimate(f, np.zeros(1), TS, ys, FEW, jumps=dose, noise=NOISE)
    assert abs(found.params["rate"] - 0.2) < 4 * found.errors["rate"] < 0.1
    np.testing.assert_allclose(found.costs, found.cost, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"noise": NOISE},
        {"residual": lambda predicted, observed: (predicted - observed) / NOISE},
    ],
    ids=["noise", "residual"],
)
def test_it_warns_of_a_model_that_does_not_fit(options):
    wrong = YS + 0.062 * np.sin(9 * TS)
    with pytest.warns(UserWarning, match=r"are 2\.\d* times the noise: .* for 28 degrees"):
        found = estimated(wrong, match=False, **options)
    assert found.noise == options.get("noise")
    ratio, _ = found.profile(
        lambda p: p["rate"], (found.params["rate"] + found.errors["rate"])[None]
    )
    np.testing.assert_allclose(ratio, 1.0, atol=0.1)


# The last differs from the noise by less than 10%, whatever the chance.
@pytest.mark.parametrize(
    ("square", "free", "said"),
    [(54, 11, True), (29, 11, False), (15, 1, False), (25, 1, True), (11000, 10000, False)],
)
def test_a_sum_of_squares_is_told_that_chance_rarely_makes(square, free, said):
    assert is_unlikely(square, free) == said


def test_it_names_what_the_observations_do_not_determine():
    field = KnownSolution(
        lambda t, y, p: -p["a"] * p["b"] * y + 0.0 * p["idle"],
        lambda t, y0, p: y0 * jnp.exp(-p["a"] * p["b"] * t) + 0.0 * p["idle"],
    )
    starts = {"a": jnp.ones(1), "b": 1.2 * jnp.ones(1), "idle": jnp.ones(1)}
    with pytest.warns(UserWarning, match=r"do not determine \['a'\], \['b'\], \['idle'\]"):
        found = jaxode.estimate(
            field, np.full(1, 2.0), TS, YS[:, None], starts, noise=NOISE, match=False
        )
    assert all(np.isinf(error) for error in found.errors.values())
    np.testing.assert_allclose(found.params["a"] * found.params["b"], np.exp(0.2), rtol=0.02)


def test_it_names_a_parameter_at_its_bound():
    # Nothing decays: the logarithm of the rate runs away.
    ys = jnp.asarray(2.0 + 0.01 * np.linspace(0, 1, 30))
    with pytest.warns(UserWarning, match=r"do not determine \['rate'\]"):
        found = estimated(ys, noise=NOISE)
    assert found.params["rate"] < -5.0


WRONG = {
    "numbers as starts": (
        {"starts": {"rate": 1.0, "size": 1.0}}, r"lambda x: jnp\.asarray\(x\)\[None\], starts\)",
    ),
    "names as starts": ({"starts": ["rate"]}, r"got the text 'rate'. Pass .* starts=\{'rate': jnp"),
    "noise of three": ({"noise": lambda p, q, r: p["s"]}, r"be a function \(params\), or"),
    "a residual of three": (
        {"residual": lambda p, o, s, t: p - o},
        r"must be a function \(predicted, observed\), or \(predicted, observed, params\); got one "
        r"of \(p, o, s, t\)",
    ),
    "a prior of two": ({"prior": lambda p, q: p, "noise": 0.1}, r"must be a function \(params\)"),
    "an observation of two": (
        {"observe": lambda t, y: y}, r"must be a function \(t, y, params\)",
    ),
    "one start without an axis": ({"starts": {"rate": 1.0, "size": 1.0}}, "share a leading axis"),
    "starts of two lengths": (
        {"starts": {"rate": jnp.ones(2), "size": jnp.ones(3)}}, "share a leading axis",
    ),
    "an infinite start": (
        {"starts": {"rate": jnp.array([jnp.inf]), "size": jnp.ones(1)}}, "must be finite",
    ),
    "times out of order": ({"ts": TS[::-1]}, "must be in order"),
    "a time before the start": ({"t0": 1.0}, "must not be before t0, 1"),
    "fewer times": ({"ts": TS[:5]}, "must be \\[times, ...\\]"),
    "infinity": ({"ys": np.where(TS > 2, np.inf, YS)}, "NaN where missing"),
    "fewer observations than parameters": (
        {"ys": np.where(TS > 0.2, np.nan, YS)}, "more than the 2 parameters",
    ),
    "a prior without noise": ({"prior": lambda p: p}, "Pass noise"),
    "noise twice": ({"noise": 0.1, "residual": lambda p, o: p - o}, "Leave one out"),
    "noise of zero": ({"noise": 0.0}, "must be positive"),
    "slopes of what is not observed": (
        {"match": True, "observe": lambda t, y, p: y}, "needs smooth states",
    ),
    "rows of one experiment": ({"row_args": jnp.ones(30)}, "several experiments"),
    "its own option": ({"batch": "joint"}, "is not an option"),
    "a list for a function": ({"observe": [1]}, "must be a function"),
    "an unknown option": ({"maxsteps": 3}, "is not an option"),
    "nothing observed": ({"ys": np.full(30, np.nan)}, "must hold an observation"),
    "infinite noise": ({"noise": np.inf}, "positive and finite"),
    "noise of another shape": ({"noise": np.full(30, 0.1)}, "must broadcast to ys"),
    "another shape observed": ({"observe": lambda t, y, p: y[0]}, "must return one observation"),
    "a pair observed": ({"observe": lambda t, y, p: (y, y)}, "must return one observation"),
    "one residual": ({"residual": lambda p, o: jnp.sum(p - o)}, "must return residuals like ys"),
    "masked observations": (
        {"ys": np.ma.masked_less(YS, 0.5)}, r"ys=.* got a masked array",
    ),
    "masked times": (
        {"ts": np.ma.masked_less(TS, 0.5)}, r"ts=.* got a masked array",
    ),
    "masked noise": (
        {"noise": np.ma.masked_less(YS, 0.5)[:, None]}, r"noise=.* got a masked array",
    ),
    "a word for a time": ({"t0": "noon"}, "must be a real time"),
    "jumps of another kind": ({"jumps": [0.0, 8.0]}, "must be a jaxode.Jumps"),
    "slopes of four observations": (
        {"match": True, "ts": TS[:4], "ys": YS[:4]}, "needs five observations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_it_refuses(case):
    options, words = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        estimated(**options)
    assert str(raised.value).startswith("estimate(")


def test_a_series_of_numbers_is_told_its_axis():
    with pytest.raises(ValueError, match=r"got shape \(30,\)\. Pass ys\[:, None\], since y0 is an"):
        jaxode.estimate(DECAY, start, TS, YS, STARTS)
    rows = np.stack([TS, TS])
    with pytest.raises(ValueError, match=r"Pass ys\[:, :, None\], since y0"):
        jaxode.estimate(DECAY, np.ones((2, 1)), rows, rows, FEW)


def test_a_start_takes_the_parameters():
    with pytest.raises(
        TypeError, match=r"estimate\(y0=.* function \(params\), .* got one of \(a, b\)"
    ):
        jaxode.estimate(DECAY, lambda a, b: a, TS, YS[:, None], STARTS)


@pytest.mark.parametrize("f", [lambda t, y, p: [-y[0]], lambda t, y, p: -y[0]], ids=["list", "0"])
def test_a_field_must_return_the_like_of_the_state(f):
    with pytest.raises(
        ValueError, match=r"estimate\(f=\.\.\.\): f\(t, y, args\) must return the s"
    ):
        jaxode.estimate(f, jnp.ones(1), TS, YS[:, None], FEW)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_slopes_do_not_depend_on_the_unit_of_time(unit):
    ts, ys = TS + 5.0, YS[None]
    values, slopes = smoothed(ts[None], ys)
    others = smoothed(unit * ts[None], ys)
    np.testing.assert_allclose(others[0], values, rtol=1e-4)
    np.testing.assert_allclose(unit * others[1], slopes, rtol=1e-2, atol=1e-3)


def test_times_too_uneven_for_a_spline_have_no_slopes():
    ts = np.array([[0.0, 1e-10, 2e-10, 1.0, 1e6]])
    assert smoothed(ts, np.array([[1.0, 2.0, 3.0, 2.0, 1.0]])) is None


def test_a_start_that_cannot_be_solved_costs_infinitely_much_and_says_why():
    explode = lambda t, y, params: y**2 + jnp.exp(params["rate"])
    y0, options = np.full(1, 1e3), {"max_steps": 64}
    problem, flats, _ = posed_problem(explode, y0, TS, YS[:, None], FEW, options=options)
    params, end = problem.unravel(flats[0]), jnp.asarray(0.3)
    assert np.isnan(problem.predicted(params, end)).all()
    assert "steps ran out at t=0.0" in _cause(problem, end, flats[0])


# What is not finite, and what is said of it.
LOST = {
    "observe": (
        {"observe": lambda t, y, p: jnp.log(-y)},
        r"observe .* 6 of 6 obs.*, first for ys\[0, 0\] = ",
    ),
    "residual": (
        {"residual": lambda p, o: jnp.where(o == YS[2], jnp.log(-p), p - o)},
        r"residual .* 1 of 6 obs.* first for ys\[2, 0\] = .*, where .* is predicted",
    ),
    "prior": ({"prior": lambda p: jnp.log(p["rate"] - 9.0), "noise": NOISE}, "prior is not"),
}


@pytest.mark.parametrize("case", LOST)
def test_it_names_what_is_not_finite(case):
    options, words = LOST[case]
    problem, flats, _ = posed_problem(DECAY, start, TS[:6], YS[:6, None], STARTS, **options)
    assert re.match(words, _cause(problem, TS[5], flats[0]))


def test_it_says_that_no_start_can_be_solved():
    huge = STARTS | {"size": np.full(8, 1e200)}
    words = r"estimate\(starts=.* none could .* to t = 0.3. From one of them, likelihood is not fin"
    with pytest.raises(jaxode.SolveError, match=words):
        estimated(starts=huge, match=False)


def test_inputs_of_experiments_must_cover_their_observations():
    knots = jnp.array([[0.0, 1.0], [0.0, 4.0]])
    inputs = jax.vmap(diffrax.LinearInterpolation)(knots, knots)
    field = lambda t, y, args: args[1].evaluate(t) - jnp.exp(args[0]["rate"]) * y
    with pytest.raises(ValueError, match=r"must cover the span .* first in row 0"):
        jaxode.estimate(
            field, jnp.ones((2, 1)), jnp.stack([TS, TS]), jnp.ones((2, 30, 1)),
            FEW, row_args=inputs,
        )  # fmt: skip


def test_a_profile_holds_a_function_of_parameters(fitted):
    # The size at a later time, which is held by its logarithm in closed form.
    later = lambda params: params["size"] * jnp.exp(-2.0 * jnp.exp(params["rate"]))
    rate, size = (float(value) for value in fitted.params.values())
    value = closed(2.0, rate, size)
    values = value * jnp.array([0.8, 1.0, 1.1])
    ratio, ends = fitted.profile(later, values)
    np.testing.assert_allclose(jax.vmap(later)(ends), values, rtol=1e-5)
    least = np.sum((YS - closed(TS, rate, size)) ** 2)
    for i, held in enumerate(np.asarray(values)):
        cost = lambda rate, held=held: np.sum((YS - held * np.exp(np.exp(rate) * (2.0 - TS))) ** 2)
        best = minimize_scalar(cost, (rate - 0.2, rate + 0.2), tol=1e-10)
        np.testing.assert_allclose(ends["rate"][i], best.x, atol=1e-4)
        expected = (best.fun - least) / float(fitted.noise) ** 2
        np.testing.assert_allclose(ratio[i], expected, rtol=1e-3, atol=1e-4)


def test_a_profile_needs_a_number_that_moves(fitted):
    with pytest.raises(ValueError, match="finite slope at the estimate that is not zero"):
        fitted.profile(lambda params: 0.0 * params["rate"], jnp.ones(1))
    for where in ("k", lambda params: params["k"], lambda params: jnp.ones(2) * params["rate"]):
        with pytest.raises(TypeError, match="must return one number"):
            fitted.profile(where, jnp.ones(1))


def absorbed(t, y, p):
    ka, ke = jnp.exp(p["ka"]), jnp.exp(p["ke"])
    return jnp.stack([-ka * y[0], ka * y[0] - ke * y[1]])


def taken(t, y0, p):
    """Of a dose."""
    ka, ke = jnp.exp(p["ka"]), jnp.exp(p["ke"])
    left = jnp.exp(-ka * t)
    return y0[0] * jnp.stack([left, ka / (ka - ke) * (jnp.exp(-ke * t) - left)])


def concentration(t, y, p):
    return y[1] / jnp.exp(p["v"])


@pytest.mark.slow  # test_reports.py has such ends, without the search for them
def test_modes_that_are_as_likely_are_told():
    # Absorption and elimination may flip, with another volume.
    ka, ke, v, ts = 1.5, 0.3, 0.5, np.linspace(0.5, 12.0, 12)
    ys = ka / v / (ka - ke) * (np.exp(-ke * ts) - np.exp(-ka * ts))
    ys += 0.02 * RNG.normal(size=ts.shape)
    logs = lambda *values: np.log(np.array(values))
    starts = {"ka": logs(1.2, 0.25), "ke": logs(0.25, 1.2), "v": logs(0.6, 0.1)}
    fit = lambda **options: jaxode.estimate(
        KnownSolution(absorbed, taken), jnp.array([1.0, 0.0]), ts, ys, starts,
        observe=concentration, **options,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"\['ka'\] .* or .*, \['ke'\] .* or .*, \['v'\] "):
        found = fit()
    np.testing.assert_allclose(found.costs, found.cost, rtol=1e-3)  # of solves at 1e-6
    np.testing.assert_allclose(found.starts["ka"], found.starts["ke"][::-1], atol=1e-3)
    high = {"ka": 3.0, "ke": -0.3, "v": 3.0}
    starts = jax.tree.map(lambda x: x[np.array([0, 0])], starts)
    assert fit(bounds=(-5.0, high)).params["ke"] < -1.0  # and no warning


def test_every_start_goes_to_its_end():
    # Of a frequency, all but the nearest have an optimum of their own, far above the least.
    ts = np.linspace(0.1, 6.0, 30)
    ys = np.cos(3.0 * ts) + NOISE * RNG.normal(size=30)
    starts = {"speed": jnp.linspace(1.0, 13.0, 13)}
    found = jaxode.estimate(
        CIRCLE,
        jnp.array([0.0, 1.0]),
        ts,
        ys,
        starts,
        observe=lambda t, y, p: y[1],
        noise=NOISE,
        bounds=(0.1, 20.0),
    )
    assert np.isfinite(found.costs).all()
    ends = np.asarray(found.starts["speed"])
    cost = lambda speed: 0.5 * np.sum((np.cos(speed * ts) - ys) ** 2) / NOISE**2
    slopes = [(cost(end + 1e-4) - cost(end - 1e-4)) / 2e-4 for end in ends]
    curves = [(cost(end + 1e-4) - 2 * cost(end) + cost(end - 1e-4)) / 1e-8 for end in ends]
    np.testing.assert_allclose(found.costs, [*map(cost, ends)], rtol=1e-2, atol=0.1)
    assert np.abs(np.array(slopes) / np.array(curves)).max() < 1e-2
    assert found.costs.max() > 10 * found.cost
    ratio, _ = found.profile(lambda params: params["speed"], jnp.array([0.0, 3.0, 20.5]))
    np.testing.assert_array_equal(np.isfinite(ratio), [False, True, False])  # within the bounds


def test_it_ends_after_few_steps_or_seconds_with_what_it_has(capfd):
    with pytest.warns(UserWarning, match="did not converge in 1 steps"):
        few = estimated(noise=NOISE, match=False, steps=1)
    with pytest.warns(UserWarning, match=r"ended by seconds=0 before it converged"):
        none = estimated(noise=NOISE, match=False, seconds=0, progress=True)
    assert few.cost <= none.cost
    best = np.argmin(none.costs)  # of the starts themselves
    assert none.params["rate"] == STARTS["rate"][best]
    at = (STARTS["rate"][best], STARTS["size"][best])
    squares = np.sum((YS - closed(TS, *map(float, at))) ** 2) / NOISE**2
    np.testing.assert_allclose(none.cost, squares / 2, rtol=1e-4)
    assert "up to 3: 8 of 8 starts, best cost" in capfd.readouterr().err


@pytest.mark.parametrize(("match", "call"), [(False, 3), (True, 1), (True, 2)])
def test_an_interrupt_keeps_the_best_so_far(match, call, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return advanced(*args)

    with pytest.warns(UserWarning, match="ended by seconds=0 before it converged"):
        begun = estimated(noise=NOISE, match=False, seconds=0)
    advanced = levenberg_marquardt._advanced
    monkeypatch.setattr(levenberg_marquardt, "_advanced", interrupted)
    with pytest.warns(UserWarning, match="ended by Ctrl-C before it converged"):
        found = estimated(noise=NOISE, match=match)
    limits = [int(of_steps[0]) for _, of_steps, *_ in calls[call:]]
    assert limits == [1] * len(limits)  # each stage only evaluates from there on
    assert found.cost <= begun.cost * (1 + 1e-6)  # of solves at 1e-6


def test_a_search_that_is_cut_short_looks_at_the_starts_again(fitted):
    """Slopes that were not matched to their end may have led to worse parameters."""
    start = np.asarray(ravel_pytree(fitted.params)[0])[None]
    worse, over = Runs(start + 1.0, np.zeros((1, 1), int)), Budget(MOST_STEPS, 0)
    search = MultiStart(fitted._problem, start, fitted._bounds, fitted._together, over)
    outcomes = improved(search, worse, matched=True)
    np.testing.assert_array_equal(outcome_of_starts(outcomes)[0], start)


def test_an_interrupt_keeps_the_values_of_a_profile_so_far(fitted, monkeypatch, capsys):
    """Those nearest to the estimate come first, as many at a time as there are rows."""
    calls, last = [], []
    advanced = levenberg_marquardt._advanced

    def counted(*args):
        calls.append(args)
        if len(calls) in last:
            raise KeyboardInterrupt
        return advanced(*args)

    monkeypatch.setattr(levenberg_marquardt, "_advanced", counted)
    rows = fitted._together
    values = fitted.params["rate"] + 1e-3 * np.arange(rows + 2)
    whole, _ = fitted.profile("rate", values[:rows])
    last.append(2 * len(calls) + 1)
    ratio, params = fitted.profile("rate", values, progress=True)
    np.testing.assert_allclose(ratio[:rows], whole, atol=1e-6)
    assert np.isinf(ratio[rows:]).all()
    assert np.isfinite(params["size"]).all()
    assert f"profile: {rows} of {rows + 2} values, " in capsys.readouterr().err
    calls.clear()
    none, _ = fitted.profile("rate", values, seconds=0)
    assert np.isinf(none).all()


def test_a_prediction_has_the_band_of_the_delta_method(fitted):
    ts = np.array([0.5, 6.0])
    band = fitted.predict(ts)
    rate, size = (float(fitted.params[name]) for name in ("rate", "size"))
    mean = closed(ts, rate, size)
    slopes = np.stack([-np.exp(rate) * ts * mean, mean / size], 1)
    apart = 1.96 * np.sqrt(np.einsum("ti,ij,tj->t", slopes, fitted.covariance, slopes))
    np.testing.assert_allclose(band.mean[:, 0], mean, rtol=1e-4)
    np.testing.assert_allclose(band.high[:, 0] - mean, apart, rtol=1e-2)
    np.testing.assert_allclose(mean - band.low[:, 0], apart, rtol=1e-2)
    for wrong in (ts[::-1], ts[None], ts - 1.0, 0.5):
        with pytest.raises(ValueError, match=r"predict\(ts=\.\.\.\): must"):
            fitted.predict(wrong)
