"""Populations: against closed forms of linear mixed models, quadrature and simulated subjects."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import KnownSolution
from helpers import with_slow
from scipy import optimize, stats

import jaxode
from jaxode.estimation.populations import maximum
from jaxode.estimation.populations.marginal import Evaluated, evaluated
from jaxode.estimation.populations.maximum import Maximum, PopulationLikelihood, Total
from jaxode.estimation.populations.population import _described
from jaxode.estimation.populations.population_arguments import (
    PopulationArguments,
    posed_population,
)
from jaxode.training.budget import Budget

RNG = np.random.default_rng(0)
TS = np.linspace(0.5, 3.0, 6)
BASIS = np.stack([np.ones(6), TS], 1)
ROOT = np.array([[0.5, 0.0], [-0.2, 0.3]])
LINES = (np.array([2.0, -1.0]) + RNG.normal(size=(10, 2)) @ ROOT.T) @ BASIS.T
LINES += 0.2 * RNG.normal(size=LINES.shape)
LINES[2, 3] = np.nan


def line(t, y, params):
    return params["slope"][None]


LINE = KnownSolution(line, lambda t, y0, params: y0 + params["slope"] * t)


def begin(params):
    return params["level"][None]


GUESS = {"level": 1.0, "slope": 0.0}
SPREAD = {"level": 1.0, "slope": 1.0}


def nll_of_lines(x):
    root = np.zeros((2, 2))
    root[np.tril_indices(2)] = x[2:5]
    covariance = BASIS @ root @ root.T @ BASIS.T + np.exp(2 * x[5]) * np.eye(6)
    total = 0.0
    for y in LINES:
        seen = ~np.isnan(y)
        part = covariance[np.ix_(seen, seen)]
        total -= stats.multivariate_normal.logpdf(y[seen], (BASIS @ x[:2])[seen], part)
    return total


@pytest.fixture(scope="module")
def lines():
    return jaxode.estimate_population(
        LINE, begin, TS, LINES[..., None], GUESS, SPREAD, correlated=True, pool=False
    )


def test_it_is_exact_for_a_linear_mixed_model(lines):
    x0 = [2.0, -1.0, 0.5, -0.2, 0.3, -1.5]
    best = optimize.minimize(nll_of_lines, x0, method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(lines.nll, best.fun, atol=1e-7)
    np.testing.assert_allclose([*lines.params.values()], best.x[:2], atol=1e-4)
    root = np.array([[best.x[2], 0.0], best.x[3:5]])
    deviations = np.sqrt(np.diag(root @ root.T))
    np.testing.assert_allclose([*lines.deviations.values()], deviations, rtol=1e-3)
    expected = (root @ root.T)[0, 1] / deviations.prod()
    np.testing.assert_allclose(lines.correlation[0, 1], expected, atol=1e-3)
    np.testing.assert_allclose(lines.noise, np.exp(best.x[5]), rtol=1e-3)
    np.testing.assert_allclose(lines.aic, 2 * best.fun + 12, rtol=1e-6)
    np.testing.assert_allclose(lines.bic, 2 * best.fun + 6 * np.log(59), rtol=1e-6)
    step = 1e-3
    shifted = lambda i, j, a, b: nll_of_lines(best.x + step * (a * np.eye(6)[i] + b * np.eye(6)[j]))
    hessian = np.array([
        [sum(a * b * shifted(i, j, a, b) for a in (-1, 1) for b in (-1, 1)) for i in range(6)]
        for j in range(6)
    ]) / (4 * step**2)  # fmt: skip
    covariance = np.linalg.inv(hessian)
    np.testing.assert_allclose(lines.covariance, covariance, rtol=0.02, atol=1e-4)
    np.testing.assert_allclose([*lines.errors.values()], np.diag(covariance)[:2] ** 0.5, rtol=1e-2)
    assert lines.converged
    _, header, level, _, also, *_ = str(lines).splitlines()
    assert header.split() + also.split() == ["estimate", "error", "deviation", "error", "shrinkage"]
    assert level.split() == [
        "['level']",
        f"{lines.params['level']:.5g}",
        f"{lines.errors['level']:.5g}",
    ]


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_a_population_has_the_same_answer_in_any_unit(lines, unit):
    start, vary = ({name: unit * x for name, x in tree.items()} for tree in (GUESS, SPREAD))
    found = jaxode.estimate_population(
        LINE, begin, TS, unit * LINES[..., None], start, vary, correlated=True, pool=False
    )
    assert found.converged
    for name in ("params", "errors", "deviations", "deviation_errors", "noise", "subjects"):
        one, other = (jax.tree.leaves(getattr(each, name)) for each in (lines, found))
        np.testing.assert_allclose(np.array(other) / unit, one, rtol=1e-6)
    for name in ("correlation", "shrinkage"):
        one, other = (jax.tree.leaves(getattr(each, name)) for each in (lines, found))
        np.testing.assert_allclose(np.array(other), np.array(one), rtol=1e-6)
    np.testing.assert_allclose(found.nll - 59 * np.log(unit), lines.nll, rtol=1e-6)


@pytest.mark.parametrize("observe", [None, lambda t, y, params: y[..., :1]])
def test_tolerances_of_a_population_are_in_units_of_the_state(observe):
    """By a solve from the start if it is not observed."""
    sizes = np.array([1e-9, 1e9])
    f = KnownSolution(lambda t, y, p: 0 * y, lambda t, y0, p: y0 * (1 + t * p["slope"]))
    ys = np.broadcast_to(sizes * (1.0 + TS[:, None]), (3, 6, 2))
    none = dict.fromkeys(("noise", "args", "row_args"))
    given = {"start": {"slope": 1.0}, "vary": {"slope": 1.0}, "t0": 0.0, "correlated": False}
    shown, rest = ys if observe is None else ys[..., :1], {"observe": observe, "options": {}}
    posed, _ = posed_population(
        PopulationArguments(f, np.tile(sizes, (3, 1)), TS, shown, **given, **none, **rest)
    )
    expected = sizes * (np.std(1.0 + TS) if observe is None else 1.0)  # where it begins
    np.testing.assert_allclose(posed.options["atol"], 1e-6 * expected, rtol=1e-6)


def test_a_subject_is_drawn_to_the_others(lines):
    noise, typical = lines.noise**2, np.array([*lines.params.values()])
    scale = np.array([*lines.deviations.values()])
    prior = np.linalg.inv(np.asarray(lines.correlation) * scale * scale[:, None])
    alone = BASIS.T @ LINES[0] / noise
    expected = np.linalg.solve(prior + BASIS.T @ BASIS / noise, alone + prior @ typical)
    found = np.stack([*lines.subjects.values()], 1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    shrunk = 1 - (found - typical).std(0) / scale  # as the likeliest deviation counts
    np.testing.assert_allclose([*lines.shrinkage.values()], shrunk, atol=1e-5)


def decay(t, y, given):
    (params, one), _ = given
    return -one * jnp.exp(params["rate"]) * y


def exponent(t, given):
    (params, one), _ = given
    return one * jnp.exp(params["rate"]) * t


def given_again(t, y, args, i):
    return y + args[1]


RATES = np.log(0.5) + 0.4 * RNG.normal(size=8)
DOSES = np.stack([np.full(8, 0.25), np.linspace(1.2, 2.2, 8)], 1)
SIZES = np.linspace(1.0, 3.0, 8)


def after_doses(rates):
    apart = np.maximum(TS[None] - DOSES[..., None], 0.0)  # [subjects, doses, times]
    left = (TS[None] > DOSES[..., None]) * np.exp(-np.exp(rates)[:, None, None] * apart)
    return SIZES[:, None] * left.sum(1)


MEAN = after_doses(RATES)
SEEN = MEAN * (1 + 0.05 * RNG.normal(size=MEAN.shape)) + 0.02 * RNG.normal(size=MEAN.shape)


def both(predicted, given):
    params, _ = given
    return jnp.exp(params["add"]) + jnp.exp(params["part"]) * predicted


# With all that a population may have.
DECAY = KnownSolution(decay, lambda t, y0, given: y0 * jnp.exp(-exponent(t, given)))
DOSED = {
    "f": DECAY, "y0": jnp.zeros((8, 1)), "ts": TS, "ys": SEEN[..., None],
    "start": {"rate": -1.0, "add": -3.5, "part": -2.5}, "vary": {"rate": 0.3},
    "noise": both, "args": jnp.ones(()), "row_args": SIZES,
}  # fmt: skip
DOSED_JUMPS = jaxode.Jumps(jnp.asarray(DOSES), given_again)


def dosed(f=DECAY):
    rest = {"t0": 0.0, "observe": None, "correlated": False, "options": {"jumps": DOSED_JUMPS}}
    return posed_population(PopulationArguments(**DOSED | {"f": f}, **rest))


def test_solves_of_subjects_and_their_slopes_are_those_of_the_closed_form():
    found = []
    for population, theta in map(dosed, (decay, DECAY)):
        subject = jax.tree.map(lambda leaf: leaf[3], population.subjects)
        flat = jnp.asarray(theta[:3])

        def twice(flat, of=(population, subject)):
            moments = of[0].moments(flat, of[1])
            return moments, moments

        slopes, (mean, _) = jax.jit(jax.jacfwd(twice, has_aux=True))(flat)
        found.append((mean[:, 0], slopes))
        rate = float(population.unravel(flat)["rate"])
        np.testing.assert_allclose(mean[:, 0], after_doses(np.full(8, rate))[3], rtol=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)  # of solves


@pytest.mark.parametrize(
    "f",
    with_slow([DECAY, decay], [decay]),  # solves and their slopes are tested alone
    ids=["known solution", "solve"],
)
def test_gradients_and_the_likelihood_of_doses_are_exact(f):
    population, theta = dosed(f)
    found = evaluated(population, jnp.asarray(theta), jnp.zeros((8, 1)))
    at = lambda theta: evaluated(population, jnp.asarray(theta), found.effects)
    steps = 1e-4 * np.eye(4)
    apart = [(at(theta + step), at(theta - step)) for step in steps]
    differences = [(above.values - below.values) / 2e-4 for above, below in apart]
    # Values are exact to about 1e-8, by the last step of the effects: differences to 1e-4.
    np.testing.assert_allclose(found.scores.T, differences, rtol=1e-4, atol=1e-4)
    moves = [(above.effects - below.effects) / 2e-4 for above, below in apart]
    np.testing.assert_allclose(found.moves[:, 0].T, np.stack(moves)[..., 0], rtol=0.01, atol=0.01)
    rate, add, part = (
        theta[[*population.template].index(name)] for name in ("rate", "add", "part")
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    for i in range(8):

        def curves(z, i=i):
            mean = np.stack([after_doses(np.full(8, rate + theta[3] * each))[i] for each in z])
            return mean, np.exp(add) + np.exp(part) * mean

        def joint(z, i=i):
            mean, noise = curves(z)
            return -stats.norm.logpdf(SEEN[i], mean, noise).sum(1) + z**2 / 2

        best = optimize.minimize_scalar(lambda z: joint(np.array([z]))[0], (-1, 1), tol=1e-8).x
        np.testing.assert_allclose(found.effects[i, 0], best, atol=1e-4)
        (mean, noise), near = curves(best + 1e-4 * np.arange(-1, 2)), best + 1e-2 * np.arange(-1, 2)
        slopes = [(of[2] - of[0]) / 2e-4 / noise[1] for of in (mean, noise)]
        expected = 1 + np.sum(slopes[0] ** 2 + 2 * slopes[1] ** 2)
        observed = joint(near) @ [1, -2, 1] / 1e-4
        laplace = joint(np.array([best]))[0] + 0.5 * np.log(expected)
        np.testing.assert_allclose(found.values[i], laplace, atol=1e-4)
        # By Gauss and Hermite's quadrature about the likeliest effect.
        spread = observed**-0.5
        parts = weights * np.exp(laplace - joint(best + spread * nodes) + nodes**2 / 2)
        exact = laplace - np.log(spread * parts.sum() / np.sqrt(2 * np.pi))
        # The Hessians differ by at most 0.044. The next term of the expansion is below 0.0096 here.
        np.testing.assert_allclose(laplace - 0.5 * np.log(expected / observed), exact, atol=0.02)


def test_doses_after_the_last_observation_of_a_subject_never_come():
    population, _ = dosed(decay)
    subject = jax.tree.map(lambda leaf: leaf[3], population.subjects)
    predicted = jax.jit(
        lambda ts: population.prediction_of(population.template, subject._replace(ts=ts))
    )
    early = predicted(jnp.asarray(TS / 3))[:, 0]  # ends before the second dose
    rate = np.exp(-1.0)
    apart = np.maximum(TS / 3 - DOSES[3, 0], 0.0)
    expected = SIZES[3] * (DOSES[3, 0] < TS / 3) * np.exp(-rate * apart)
    np.testing.assert_allclose(early, expected, rtol=1e-4)


def test_a_new_subject_lies_in_the_band_of_a_linear_mixed_model(lines):
    ts = np.array([0.5, 2.0, 4.0])
    band = lines.predict(ts)
    basis = np.stack([np.ones(3), ts], 1)
    typical, scale = (np.array([*tree.values()]) for tree in (lines.params, lines.deviations))
    spread = np.asarray(lines.correlation) * scale * scale[:, None] + lines.covariance[:2, :2]
    # The rows of the root are uncertain, too: their variances add to the mean spread.
    mean_of_squares = np.asarray(lines.covariance)[2:5, 2:5]
    spread += np.array(
        [
            [mean_of_squares[0, 0], mean_of_squares[0, 1]],
            [mean_of_squares[0, 1], mean_of_squares[1, 1] + mean_of_squares[2, 2]],
        ]
    )
    deviation = np.sqrt(np.einsum("ti,ij,tj->t", basis, spread, basis))
    np.testing.assert_allclose(band.mean[:, 0], basis @ typical, atol=0.02)
    np.testing.assert_allclose((band.high - band.low)[:, 0] / 3.92, deviation, rtol=0.05)
    np.testing.assert_allclose((band.high + band.low)[:, 0] / 2, basis @ typical, atol=0.05)


def test_a_profile_of_a_population_estimates_all_others_again(lines, monkeypatch, capsys):
    levels = np.array([1.2, 1.8, 2.6])
    ratio, params = lines.profile("level", levels, progress=True)
    assert "profile: 3 of 3 values, " in capsys.readouterr().err
    for level, nll, slope in zip(levels, lines.nll + ratio / 2, params["slope"], strict=True):
        rest = optimize.minimize(
            lambda x, level=level: nll_of_lines(np.append(level, x)),
            [-1.0, 0.5, -0.2, 0.3, -1.5],
            method="BFGS",
            options={"gtol": 1e-6},
        )
        np.testing.assert_allclose(nll, rest.fun, atol=1e-3)
        np.testing.assert_allclose(slope, rest.x[0], atol=0.01)
    np.testing.assert_array_equal(params["level"], levels)
    by_function, _ = lines.profile(lambda params: params["level"], levels[:1])
    np.testing.assert_allclose(by_function, ratio[:1], atol=1e-3)
    with pytest.raises(ValueError, match=r"where=.* must be one typical parameter .* as 'k' or"):
        lines.profile(lambda params: params["level"] + params["slope"], levels)
    with pytest.raises(ValueError, match=r"values=.* must be \[values\]; got shape \(0,\)"):
        lines.profile("level", [])

    calls, at = [], PopulationLikelihood.at

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return at(self, *args)

    monkeypatch.setattr(PopulationLikelihood, "at", interrupted)
    first, _ = lines.profile("level", np.append(levels, lines.params["level"] + 1e-3))
    np.testing.assert_allclose(first[3], 0.0, atol=1e-3)
    assert np.isinf(np.asarray(first)[[0, 2]]).all()  # those that are far away


NEW_SUBJECT = {"ts": TS, "y0": jnp.zeros(1), "row_args": 2.0, "doses": [0.25, 1.5]}
NO_SUBJECT = {
    "times before the start": ({"ts": TS - 2}, "ts=.*must not be before t0"),
    "times of several": ({"ts": TS[None]}, r"ts=.*must be \[times\]; got shape \(1, 6\)"),
    "no row": ({"row_args": None}, "row_args=.*must be the row of one subject.*; got none"),
    "all rows": ({"row_args": SIZES}, r"row_args=.*of shape \(\); got shape \(8,\)"),
    "a row that is not finite": ({"row_args": np.nan}, "row_args=.*must be finite"),
    "no state": ({"y0": None}, "y0=.*must"),
    "no doses": ({"doses": None}, r"doses=.*must be the times of the subject's jumps"),
    "doses out of order": (
        {"doses": [2.0, 1.0]},
        r"doses=.*in order from t0, 0; got \[2.0, 1.0\]. Sort",
    ),
    "a dose before the start": (
        {"doses": [-1.0]},
        r"doses=.*in order from t0, 0; got \[-1.0\]. Sort",
    ),
}


@pytest.fixture(scope="module")
def with_doses():
    rest = {"noise": both, "args": jnp.ones(()), "row_args": SIZES, "jumps": DOSED_JUMPS}
    given = (DOSED[name] for name in ("f", "y0", "ts", "ys", "start", "vary"))
    return jaxode.estimate_population(*given, **rest, steps=2, pool=False)


@pytest.mark.filterwarnings("ignore:estimate_population. the search")
def test_doses_of_a_new_subject(with_doses):
    band = with_doses.predict(**NEW_SUBJECT)
    rng = np.random.default_rng(0)
    names = [*with_doses.params]
    at = [with_doses.params[name] for name in names] + [with_doses.deviations["rate"]]
    drawn = rng.multivariate_normal(at, with_doses.covariance, 100_000)
    rate = drawn[:, names.index("rate")] + drawn[:, 3] * rng.normal(size=len(drawn))
    apart = TS - np.array([[0.25], [1.5]])
    left = np.exp(-np.exp(rate)[:, None, None] * np.maximum(apart, 0.0))
    expected = 2.0 * np.sum((apart > 0) * left, axis=1)
    np.testing.assert_allclose(band.mean[:, 0], expected.mean(0), rtol=0.01)
    ends = np.quantile(expected, [0.025, 0.975], axis=0)
    np.testing.assert_allclose([band.low[:, 0], band.high[:, 0]], ends, rtol=0.02)
    none = with_doses.predict(**NEW_SUBJECT | {"doses": []})
    assert not np.any(none.high)


@pytest.mark.parametrize("case", NO_SUBJECT)
@pytest.mark.filterwarnings("ignore:estimate_population. the search")
def test_what_is_no_new_subject(with_doses, case):
    changes, words = NO_SUBJECT[case]
    with pytest.raises((ValueError, TypeError), match=words):
        with_doses.predict(**NEW_SUBJECT | changes)


# What one or all of the subjects above may have, and what is said of it.
LOST = {
    "a row that is not finite": (
        {"row_args": np.where(np.arange(8) == 4, np.nan, SIZES)},
        "subject 4 has .* Its row_args are not finite",
    ),
    "no noise": (
        {
            "row_args": np.where(np.arange(8) == 4, 0.0, SIZES),
            "start": DOSED["start"] | {"add": -800.0},
        },
        r"subject 4 has .* noise is 0 for ys\[4, 0, 0\] = .*, where 0 is predicted. Let it be",
    ),
    "no solution": (
        {"start": DOSED["start"] | {"rate": 800.0}},
        "subject 0 has no finite likelihood. Start nearer, or raise max_steps",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_it_names_a_subject_without_a_finite_likelihood(case):
    changes, words = LOST[case]
    with pytest.raises(jaxode.SolveError, match=words):
        jaxode.estimate_population(**DOSED | changes, jumps=DOSED_JUMPS)


def test_no_difference_between_subjects_is_a_deviation_of_zero():
    # Lines that are nearer to each other than noise makes them.
    ys = 2.0 - TS + 0.2 * RNG.normal(size=(10, 6))
    ys -= 0.9 * (ys - ys.mean(axis=0)) @ BASIS @ np.linalg.pinv(BASIS)
    with pytest.warns(UserWarning, match=r"deviation of \['level'\], \['slope'\] ended at zero"):
        found = jaxode.estimate_population(
            LINE, begin, TS, ys[..., None], GUESS, SPREAD, correlated=True
        )
    assert max(found.deviations.values()) < 0.02
    np.testing.assert_allclose([*found.shrinkage.values()], 1.0, atol=1e-4)
    np.testing.assert_allclose(found.subjects["level"], found.params["level"], atol=0.02)


def halve(t, y, params, i):
    return 0.5 * y


WRONG = {
    "a name that is not given": ({"vary": {"k": 1.0}}, r"vary=.*by names of start, \['level'"),
    "no deviation": ({"vary": {"level": 0.0}}, r"vary=.*positive deviations; got 0.0 for 'level'"),
    "a list of names": ({"vary": ["level"]}, r"vary=.* Pass such as vary=\{'level': 0.3\}"),
    "no dictionary": ({"start": jnp.ones(2)}, r"start=.*must be a dictionary"),
    "one subject": ({"ys": LINES[0]}, r"ys=.*\[subjects, times, ...\]"),
    "noise of one": (
        {"noise": lambda p: p["level"]},
        r"function \(predicted, params\); got one of \(p\)",
    ),
    "an unknown option": ({"batch": "joint"}, "is not an option of estimate_population"),
    "states with one axis more": (
        {"ys": LINES},
        r"like its states, .*\(6,\)\. Pass ys\[:, :, None\]",
    ),
    "a prediction with one axis less": (
        {"observe": lambda t, y, params: y[0]},
        r"observe=.*must return one observation.* its ys, \(6, 1\); got shape \(6,\)",
    ),
    "noise of other times": (
        {"noise": lambda predicted, params: jnp.ones(3)},
        r"noise=.*must return what broadcasts.*, \(6, 1\); got shape \(3,\)",
    ),
    "half a step": ({"steps": 2.5}, r"steps=.*must be an integer of at least 0; got 2.5"),
    "times out of order": ({"ts": TS[::-1]}, "must be in order"),
    "an infinite observation": (
        {"ys": np.where(LINES > 1.0, np.inf, LINES)[..., None]},
        r"ys=.*must be finite, or NaN where missing; got infinity",
    ),
    "no observation": ({"ys": np.nan * LINES[..., None]}, r"ys=.*observation; got NaN alone"),
    "doses of other subjects": (
        {"jumps": jaxode.Jumps(jnp.ones((2, 10)), halve)},
        r"jumps=.*\[subjects, jumps\] of the 10 subjects; got shape \(2, 10\)",
    ),
    "doses out of order": (
        {"jumps": jaxode.Jumps(jnp.array([2.0, 1.0]), halve)},
        r"jumps=.*in order from t0, 0; got \[2.0, 1.0\] for subject 0. Sort them",
    ),
    "a dose before the start": (
        {"jumps": jaxode.Jumps(jnp.ones((10, 1)).at[3].set(-1.0), halve)},
        r"jumps=.*in order from t0, 0; got \[-1.0\] for subject 3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_refuses(case):
    options, words = WRONG[case]
    given = {"ts": TS, "ys": LINES[..., None], "start": GUESS, "vary": SPREAD, **options}
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        jaxode.estimate_population(LINE, begin, **given)
    assert str(raised.value).startswith("estimate_population(")


def test_a_search_that_is_cut_short_says_so():
    with pytest.warns(UserWarning, match="did not converge in 0 steps. Start nearer"):
        found = jaxode.estimate_population(
            LINE, begin, TS, LINES[..., None], GUESS, SPREAD, correlated=True, steps=0
        )
    assert not found.converged


def test_what_is_free_is_named_and_has_no_errors():
    none = dict.fromkeys(("observe", "noise", "args", "row_args"))
    given = {"ts": TS, "ys": LINES[..., None], "start": GUESS, "vary": SPREAD, "t0": 0.0}
    population, theta = posed_population(
        PopulationArguments(LINE, begin, correlated=False, options={}, **given, **none)
    )
    free = np.array([False, True, False, True, False])
    covariance = np.where(free | free[:, None], np.nan, 0.04 * np.eye(5))
    effects = RNG.normal(size=(10, 2))
    words = r"not determine \['slope'\], deviation of \['slope'\]: .* parameters vary.$"
    end = Maximum(theta, 1.0, covariance, True, free, np.zeros(5, bool), np.ones(5, bool))
    with pytest.warns(UserWarning, match=words):
        found = _described(population, end, effects, Budget(200), None)
    assert not found.converged
    np.testing.assert_allclose([*found.errors.values()], [0.2, np.nan])
    np.testing.assert_allclose([*found.deviation_errors.values()], [0.2, np.nan])


@pytest.mark.slow  # three programs: the test before it finds these faults
def test_it_names_what_observations_do_not_determine():
    """The rest has the errors that it has without."""
    given = TS, LINES[..., None]
    lone = jaxode.estimate_population(LINE, begin, *given, GUESS, SPREAD)
    start, vary = GUESS | {"also": 0.3}, SPREAD | {"also": 0.5}
    with pytest.warns(UserWarning, match=r"not determine \['also'\], deviation of \['also'\]:"):
        found = jaxode.estimate_population(LINE, begin, *given, start, vary)
    assert not found.converged
    assert jnp.isnan(found.errors["also"])
    assert jnp.isnan(found.deviation_errors["also"])
    for name in GUESS:
        np.testing.assert_allclose(found.params[name], lone.params[name], rtol=1e-4)
        np.testing.assert_allclose(found.errors[name], lone.errors[name], rtol=0.01)
        known = lone.deviation_errors[name]
        np.testing.assert_allclose(found.deviation_errors[name], known, rtol=0.01)

    both = lambda params: {"slope": params["slope"] + 0.03 * params["also"]}
    double = KnownSolution(
        lambda t, y, params: line(t, y, both(params)),
        lambda t, y0, params: LINE.solution(t, y0, both(params)),
    )

    with pytest.warns(UserWarning, match=r"not determine \['also'\], \['slope'\]:"):
        found = jaxode.estimate_population(double, begin, *given, start, SPREAD)
    assert jnp.isnan(found.errors["slope"])
    np.testing.assert_allclose(found.errors["level"], lone.errors["level"], rtol=0.01)


def test_noise_may_be_zero_where_an_observation_is_missing():
    none = dict.fromkeys(("observe", "args", "row_args"))
    given = {"start": GUESS, "vary": SPREAD, "t0": 0.0, "correlated": False, "options": {}, **none}
    noise = lambda predicted, params: jnp.sqrt(predicted - params["level"])  # zero at the start
    zero = np.append(0.0, TS), np.concatenate([np.full((10, 1), np.nan), LINES], 1)[..., None]
    given["start"] = {"level": 1.0, "slope": 0.5}
    found = []
    for ts, ys in (zero, (TS, LINES[..., None])):
        population, theta = posed_population(
            PopulationArguments(LINE, begin, ts, ys, noise=noise, **given)
        )
        subject = jax.tree.map(lambda leaf: leaf[2], population.subjects)
        moments = lambda flat, at=(population, subject): at[0].moments(flat, at[1])
        nll = jax.jit(lambda z, at=(population, moments, theta, subject.ys): at[0].nll(
            at[1], at[2], z, at[3]
        ))  # fmt: skip
        found.append(nll(np.zeros(2)))
    assert jnp.isfinite(found[1].value)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


class Cliff(PopulationLikelihood):
    """Half the square of the way to 1e6 as a likelihood, which cannot be known above 3000."""

    def __init__(self, lost):
        self.population = SimpleNamespace(with_positive_root=lambda theta: (theta, np.ones(0)))
        self.budget = Budget(40)
        self.lost, self.tried, self.last = lost, [], []

    def at(self, theta, chunks=None):
        self.tried.append(float(theta[0]))
        found = Total(0.5 * (theta - 1e6) ** 2, theta - 1e6, np.eye(1))
        if theta[0] <= 3000:
            return found
        return found._replace(**{name: np.nan * getattr(found, name) for name in self.lost})


@pytest.mark.parametrize("lost", [("values", "scores", "information"), ("information",)])
def test_a_search_goes_on_from_where_the_likelihood_is_known(lost):
    cliff = Cliff(lost)
    end = cliff.minimized(np.ones(1))
    assert 2900 < end[0] <= 3000
    assert len(set(cliff.tried)) == len(cliff.tried)


class Sample(Cliff):
    """The mean and the logarithm of the noise of a normal sample, of variance one."""

    def __init__(self, count):
        super().__init__(())
        self.count = count

    def at(self, theta, chunks=None):
        self.tried.append(theta)
        (mean, log_noise), part = theta, np.exp(-2 * theta[1])
        square = part * (1 + mean**2)
        value = self.count * (log_noise + 0.5 * square)
        scores = self.count * np.array([part * mean, 1 - square])
        return Total(np.array([value]), scores, self.count * np.diag([part, 2.0]))


def test_a_search_ends_at_a_bound():
    cliff = Cliff(())
    cliff.upper = np.array([50.0])
    end = cliff.minimized(np.ones(1))
    assert end[0] == 50
    assert max(cliff.tried) == 50
    np.testing.assert_array_equal(cliff.held(end, cliff.at(end).scores), [True])
    np.testing.assert_array_equal(cliff.held(end, -cliff.at(end).scores), [False])


def test_an_interrupt_keeps_the_best():
    class Interrupted(Cliff):
        def at(self, theta, chunks=None):
            if len(self.tried) == 3:
                self.tried.append(None)
                raise KeyboardInterrupt
            return super().at(theta, chunks)

    cliff = Interrupted(())
    assert cliff.minimized(np.ones(1))[0] == cliff.tried[2]
    assert cliff.budget.interrupted
    assert len(cliff.tried) == 4
    end = cliff.polished(np.array(cliff.tried[2:3]))
    assert not end.converged
    assert end.theta[0] == cliff.tried[2]
    np.testing.assert_allclose(end.covariance, [[1.0]])  # by the expected Hessian


@pytest.mark.parametrize("log_noise", [-1.2, -3.0, -6.0, 4.0])
def test_a_search_from_a_wrong_noise_ends_at_the_right_one(log_noise):
    sample = Sample(50)
    end = sample.minimized(np.array([0.5, log_noise]))
    # The search ends three hundredths of a standard error from the best.
    assert sample.at(end).decrement(np.ones(2)) < 0.03
    assert np.abs(end).max() < 0.01
    moves = np.abs(np.diff(sample.tried[:-1], axis=0))
    assert (moves <= np.maximum(np.abs(sample.tried[:-2]), 1.0) + 1e-12).all()


def test_subjects_count_once_in_their_order(monkeypatch):
    """More than fifty are evaluated in parts of one size, of which some are filled up."""
    ys = np.arange(101.0)[:, None, None] * np.ones((1, 6, 1))
    given = {"start": GUESS, "vary": SPREAD, "t0": 0.0, "correlated": False, "options": {}}
    none = dict.fromkeys(("observe", "noise", "args", "row_args"))
    population, theta = posed_population(PopulationArguments(LINE, begin, TS, ys, **given, **none))

    def each(part, theta, effects):
        number = np.asarray(part.subjects.ys)[:, 0, 0]
        of_theta = np.ones((len(number), len(theta)))
        return Evaluated(
            number, of_theta, of_theta[:, None] * np.eye(len(theta)),
            number[:, None] * np.ones(2), np.zeros((len(number), 2, len(theta))),
        )  # fmt: skip

    monkeypatch.setattr(maximum, "evaluated", each)
    likelihood = PopulationLikelihood(population, theta)
    assert len(likelihood.chunks) == 3
    found = likelihood.at(theta)
    np.testing.assert_array_equal(found.values, np.arange(101.0))
    np.testing.assert_array_equal(found.scores, 101.0)
    np.testing.assert_array_equal(np.diag(found.information), 101.0)
    np.testing.assert_array_equal(likelihood.effects[:, 0], np.arange(101.0))
    np.testing.assert_array_equal(likelihood.at(theta, 1).values, np.arange(0.0, 101.0, 3))


class Rounded(Cliff):
    """With a likelihood that looks worse by 2e-5 near its maximum."""

    def at(self, theta, chunks=None):
        worse = 2e-5 * (abs(theta) < 1e-3)
        return Total(0.5 * theta**2 + worse, theta, np.eye(1))


def test_newtons_steps_end_by_gradients_where_values_are_rounded():
    found = Rounded(()).polished(np.full(1, 0.003))
    assert found.converged
    assert abs(found.theta[0]) < 1e-3


class Bowl(Cliff):
    """A quadratic likelihood."""

    def __init__(self, hessian, sizes):
        super().__init__(())
        self.hessian, self.least_units = np.asarray(hessian), sizes

    def at(self, theta, chunks=None):
        values = 0.5 * theta @ self.hessian @ theta
        return Total(np.array([values]), self.hessian @ theta, self.hessian)


# The scale of the last of three parameters, and whether one direction of them all is flat.
BOWLS = {
    "parameters": (1.0, False),
    "a small unit": (1e-9, False),
    "a large unit": (1e12, False),
    "a flat direction": (1.0, True),
    "a flat direction in a small unit": (1e-6, True),
}


@pytest.mark.parametrize("bowl", BOWLS)
def test_errors_know_no_units(bowl):
    scale, is_flat = BOWLS[bowl]
    root = np.array([[2.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0 if is_flat else 2.0]])
    sizes = np.array([1.0, 1.0, scale])
    found = Bowl(root.T @ root / np.outer(sizes, sizes), sizes).polished(0.1 * sizes)
    assert found.converged
    if not is_flat:
        covariance = found.covariance / np.outer(sizes, sizes)
        np.testing.assert_allclose(covariance, np.linalg.inv(root.T @ root), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.undetermined, [is_flat] * 3)


def absorbed(t, y, params):
    taken = jnp.exp(params["ka"]) * y[0]
    return jnp.stack([-taken, taken - jnp.exp(params["ke"]) * y[1]])


def taken(t, y0, params):
    """Of a dose."""
    ka, ke = jnp.exp(params["ka"]), jnp.exp(params["ke"])
    left = jnp.exp(-ka * t)
    return y0[0] * jnp.stack([left, ka / (ka - ke) * (jnp.exp(-ke * t) - left)])


ABSORBED = KnownSolution(absorbed, taken)
CASES = [(ABSORBED, -1.2), (ABSORBED, -3.0), (absorbed, -3.0)]


@pytest.mark.parametrize(
    ("f", "log_noise"),
    with_slow(CASES, CASES),  # seven parameters: `Sample` searches from such a noise, too
)
def test_a_search_from_noise_that_is_far_too_small_ends_where_others_do(f, log_noise):
    rng, hours = np.random.default_rng(0), np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    effects = rng.normal(size=(3, 12, 1)) * np.array([0.6, 0.15, 0.2])[:, None, None]
    ka, ke, volume = np.exp(np.array([0.4, -2.5, -0.7])[:, None, None] + effects)
    mean = 10 * ka / volume / (ka - ke) * (np.exp(-ke * hours) - np.exp(-ka * hours))
    found = jaxode.estimate_population(
        f,
        lambda params: jnp.array([10.0, 0.0]),
        hours,
        mean + 0.3 * rng.normal(size=mean.shape),
        {"ka": 0.0, "ke": -2.0, "volume": 0.0, "log_noise": log_noise},
        {"ka": 1.0, "ke": 1.0, "volume": 1.0},
        observe=lambda t, y, params: y[1] * jnp.exp(-params["volume"]),
        noise=lambda predicted, params: jnp.exp(params["log_noise"]) + 0 * predicted,
    )
    assert found.converged
    np.testing.assert_allclose(found.nll, 95.3757, atol=1e-3)
    apart = np.array([found.params[name] for name in ("ka", "ke", "volume")]) - [0.4, -2.5, -0.7]
    errors = np.array([found.errors[name] for name in ("ka", "ke", "volume")])
    assert (abs(apart) < 3 * errors).all()


def test_the_information_is_that_of_a_linear_mixed_model():
    none = dict.fromkeys(("observe", "noise", "args", "row_args"))
    given = {"ts": TS, "ys": LINES[..., None], "start": GUESS, "vary": SPREAD, "t0": 0.0}
    population, theta = posed_population(
        PopulationArguments(LINE, begin, correlated=True, options={}, **given, **none)
    )
    found = evaluated(population, jnp.asarray(theta), jnp.zeros((10, 2))).information
    root, noise = np.zeros((2, 2)), np.exp(theta[5])
    root[np.tril_indices(2)] = theta[2:5]
    for subject in (0, 2):
        basis = BASIS[~np.isnan(LINES[subject])]
        inverse = np.linalg.inv(basis @ root @ root.T @ basis.T + noise**2 * np.eye(len(basis)))
        moved = [basis @ np.outer(*np.eye(2)[[i, j]]) for i, j in ((0, 0), (1, 0), (1, 1))]
        of_spread = [move @ root.T @ basis.T + basis @ root @ move.T for move in moved]
        of_spread.append(2 * noise**2 * np.eye(len(basis)))
        expected = np.zeros((6, 6))
        expected[:2, :2] = basis.T @ inverse @ basis
        for a, b in np.ndindex(4, 4):
            traced = np.trace(inverse @ of_spread[a] @ inverse @ of_spread[b])
            expected[a + 2, b + 2] = 0.5 * traced
        for a, b in np.ndindex(3, 3):  # the part that is zero in the mean
            expected[a + 2, b + 2] += np.trace(moved[a].T @ inverse @ moved[b])
        np.testing.assert_allclose(found[subject], expected, rtol=1e-6, atol=1e-6)


# The growth of pines (`Loblolly` of nlme): `height + rate * (limit - height)` a time on.
AGES = np.array([3.0, 5.0, 10.0, 15.0, 20.0, 25.0])


def grow(t, y, params):
    return jnp.exp(params["rate"]) * (params["limit"] - y)


PINES = KnownSolution(
    grow,
    lambda t, y0, p: p["limit"] + (y0 - p["limit"]) * jnp.exp(-jnp.exp(p["rate"]) * t),
)
PINE = {"limit": 102.0, "begin": -8.5, "rate": -3.24}


def heights():
    rng = np.random.default_rng(0)
    limit = PINE["limit"] + 4 * rng.normal(size=(14, 1))
    ys = limit + (PINE["begin"] - limit) * np.exp(-np.exp(PINE["rate"]) * AGES)
    return ys + 0.7 * rng.normal(size=ys.shape)


def pines(factor, **options):
    start = {name: factor * x for name, x in PINE.items()}
    return jaxode.estimate_population(
        PINES, lambda params: params["begin"], AGES, heights(), start, {"limit": 3.0}, **options
    )


@pytest.fixture(scope="module")
def right():
    return pines(1.0)


@pytest.mark.parametrize("factor", [2.0, 5.0, 0.2])
def test_a_guess_that_is_far_off_ends_at_the_same(right, factor):
    """From a fifth of it, the search of the population alone goes astray by 90 nats."""
    found = pines(factor)
    assert found.converged
    np.testing.assert_allclose(found.nll, right.nll, atol=1e-4)
    for name in ("params", "errors", "deviations"):
        one, other = (jax.tree.leaves(getattr(each, name)) for each in (right, found))
        np.testing.assert_allclose(np.array(other), np.array(one), rtol=1e-2)


def test_bounds_of_a_population(right):
    """A parameter that ends at a bound has no error; equal bounds fix one."""
    lower = {"limit": 0.0, "begin": -8.0, "rate": -9.0}
    upper = {"limit": 200.0, "begin": 9.0, "rate": 0.0}
    assert right.params["begin"] < -8.0
    start = {"limit": 90.0, "begin": -4.0, "rate": -3.0}
    begin = lambda params: params["begin"]
    given = PINES, begin, AGES, heights(), start, {"limit": 3.0}
    with pytest.warns(UserWarning, match=r"\['begin'\] ended at a bound"):
        found = jaxode.estimate_population(*given, bounds=(lower, upper))
    assert found.params["begin"] == -8.0
    assert found.converged
    assert jnp.isnan(found.errors["begin"])
    assert jnp.isfinite(found.errors["limit"])
    assert found.nll > right.nll
    fixed = jaxode.estimate_population(
        *given, bounds=(lower | {"begin": -4.0}, upper | {"begin": -4.0})
    )
    assert fixed.params["begin"] == -4.0
    assert fixed.nll > found.nll
    with pytest.raises(ValueError, match=r"start=.*within bounds, -8 to 9 for \['begin'\]; got -9"):
        jaxode.estimate_population(
            *given[:4], start | {"begin": -9.0}, {"limit": 3.0}, bounds=(lower, upper)
        )


def test_seconds_and_progress_of_a_population(capsys):
    with pytest.warns(UserWarning, match="was ended by seconds=0 before it converged"):
        found = pines(1.0, seconds=0.0)
    assert not found.converged
    assert jnp.isfinite(jnp.stack([*found.errors.values()])).all()  # by the expected Hessian
    assert not capsys.readouterr().err
    pines(1.0, progress=True)
    lines = capsys.readouterr().err
    assert "estimate_population: as one: observations up to 25: " in lines
    assert "estimate_population: step 1, nll " in lines
