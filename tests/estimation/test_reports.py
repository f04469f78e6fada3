"""What is said of the end of a search: from ends as a search may leave them, without one."""

import dataclasses
import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import DECAY, posed_problem
from scipy import optimize, stats

from jaxode.estimation.estimate import _described
from jaxode.estimation.observed.bounds import names
from jaxode.estimation.search.levenberg_marquardt import MOST_STEPS, search_budget
from jaxode.estimation.search.starts import MultiStart, Outcomes, Runs
from jaxode.estimation.uncertainty import covariance_without_bounds, gain_left, uncertainty
from jaxode.training.budget import Budget

TS = np.linspace(0.1, 3.0, 30)
NOISE = 0.02
RNG = np.random.default_rng(3)
BEST = np.array([0.2, 2.0])
YS = BEST[1] * np.exp(-np.exp(BEST[0]) * TS) + NOISE * RNG.normal(size=30)
STARTS = {"rate": np.array([0.0, 1.0]), "size": np.ones(2)}


def described(
    flats=(BEST, BEST), costs=(0.0, 0.0), converged=True, budget=None, starts=STARTS, at=BEST,
    **options,
):  # fmt: skip
    """What `estimate` makes of ends at `flats`, with costs above those of the known noise `at`."""
    problem, flats_of_starts, bounds = posed_problem(
        DECAY, lambda params: params["size"][None], TS, YS[:, None], starts, **options
    )
    unit = NOISE if "noise" in options else float(problem.noise)
    rate, size = at
    shape = np.exp(-np.exp(rate) * TS)
    residuals = (size * shape - YS) / unit
    slopes = np.stack([-size * np.exp(rate) * TS * shape, shape], 1) / unit
    slopes = np.pad(slopes, ((0, 0), (0, len(starts) - 2)))  # of others, without effect
    runs, costs = Runs(np.array(flats), np.array([[0], [1]])), np.array(costs)
    outcomes = Outcomes(
        runs, 0.5 * np.sum(residuals**2) + costs, np.full(2, converged),
        np.tile(residuals, (2, 1)), np.tile(slopes, (2, 1, 1)),
        np.tile(residuals @ slopes, (2, 1)),
    )  # fmt: skip
    search = MultiStart(
        problem, np.asarray(flats_of_starts), bounds, 2, budget or Budget(MOST_STEPS)
    )
    return _described(search, outcomes), slopes


def test_ends_are_described_by_the_best_of_them():
    found, slopes = described(flats=(BEST + 1.0, BEST), costs=(9.0, 0.0), noise=NOISE)
    np.testing.assert_allclose([*found.params.values()], BEST)
    np.testing.assert_allclose(found.covariance, np.linalg.inv(slopes.T @ slopes), rtol=1e-9)
    np.testing.assert_allclose(found.starts["rate"], [BEST[0] + 1.0, BEST[0]])
    np.testing.assert_allclose(found.costs - found.cost, [9.0, 0.0])
    predicted = BEST[1] * np.exp(-np.exp(BEST[0]) * TS)
    nll = -stats.norm.logpdf(YS, predicted, NOISE).sum()
    np.testing.assert_allclose(found.nll, nll, rtol=1e-9)
    np.testing.assert_allclose(found.aic, 2 * nll + 4, rtol=1e-9)
    np.testing.assert_allclose(found.bic, 2 * nll + 2 * np.log(30), rtol=1e-9)


def test_a_noise_that_the_residuals_say_is_a_parameter_of_the_criteria():
    found, _ = described()
    residuals = YS - BEST[1] * np.exp(-np.exp(BEST[0]) * TS)
    np.testing.assert_allclose(found.noise, np.sqrt(np.sum(residuals**2) / 28), rtol=1e-9)
    np.testing.assert_allclose(found.cost, np.sum(residuals**2) / 2, rtol=1e-9)
    likeliest = np.sqrt(np.mean(residuals**2))
    nll = -stats.norm.logpdf(residuals, 0.0, likeliest).sum()
    np.testing.assert_allclose(found.nll, nll, rtol=1e-9)
    np.testing.assert_allclose(found.aic, 2 * nll + 6, rtol=1e-9)
    np.testing.assert_allclose(found.bic, 2 * nll + 3 * np.log(30), rtol=1e-9)


def test_modes_that_are_as_likely_are_told_and_others_are_not():
    other = BEST + np.array([0.7, 0.0])
    words = r"as likely: \['rate'\] 0.2 or 0.9. Choose"
    with pytest.warns(UserWarning, match=words):
        described(flats=(BEST, other), costs=(0.0, 0.005), noise=NOISE)
    described(flats=(BEST, other), costs=(0.0, 0.5), noise=NOISE)
    described(flats=(BEST, BEST + 1e-4), noise=NOISE)  # by less than an error


@pytest.mark.parametrize("side", [0, 1])
def test_a_parameter_at_a_bound_has_no_error_and_the_others_have_theirs(side):
    bounds = [(0.0, -np.inf), (BEST[0], np.inf)] if side else [(BEST[0], -np.inf), (1.0, np.inf)]
    bounds = tuple(dict(zip(("rate", "size"), bound, strict=True)) for bound in bounds)
    starts = {"rate": np.full(2, BEST[0]), "size": np.ones(2)}
    with pytest.warns(UserWarning, match=r"estimate: \['rate'\] ended at a bound. The"):
        found, slopes = described(starts=starts, bounds=bounds, noise=NOISE)
    assert np.isnan(found.errors["rate"])
    np.testing.assert_allclose(found.errors["size"], np.sum(slopes[:, 1] ** 2) ** -0.5, rtol=1e-9)


@pytest.mark.parametrize("noise", [None, NOISE])
def test_a_parameter_that_equal_bounds_fix_does_not_count(noise):
    bounds = tuple({"rate": BEST[0], "size": size} for size in (-np.inf, np.inf))
    starts = {"rate": np.full(2, BEST[0]), "size": np.ones(2)}
    options = {} if noise is None else {"noise": noise}
    found, slopes = described(starts=starts, bounds=bounds, **options)  # without a warning
    residuals, count = YS - BEST[1] * np.exp(-np.exp(BEST[0]) * TS), 1
    if noise is None:
        expected, count = np.sqrt(np.sum(residuals**2) / 29), 2
        noise = np.sqrt(np.mean(residuals**2))
        np.testing.assert_allclose(found.noise, expected, rtol=1e-9)
        slopes = slopes * float(found._problem.noise) / expected
    nll = -stats.norm.logpdf(residuals, 0.0, noise).sum()
    np.testing.assert_allclose(found.aic, 2 * nll + 2 * count, rtol=1e-9)
    np.testing.assert_allclose(found.bic, 2 * nll + count * np.log(30), rtol=1e-9)
    assert np.isnan(found.errors["rate"])
    np.testing.assert_allclose(found.errors["size"], np.sum(slopes[:, 1] ** 2) ** -0.5, rtol=1e-9)


@pytest.mark.parametrize("high", [BEST[0], 1.0])
def test_a_band_counts_a_parameter_at_a_bound_and_none_that_is_fixed(high):
    bounds = {"rate": BEST[0], "size": -np.inf}, {"rate": high, "size": np.inf}
    starts = {"rate": np.full(2, BEST[0]), "size": np.ones(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, slopes = described(starts=starts, bounds=bounds, noise=NOISE)
    band, of = found.predict(TS), slice(1, 2) if high == BEST[0] else slice(0, 2)
    along = NOISE * slopes[:, of]
    covariance = np.linalg.inv(slopes[:, of].T @ slopes[:, of])
    apart = 1.959964 * np.sqrt(np.einsum("ti,ij,tj->t", along, covariance, along))
    np.testing.assert_allclose((band.high - band.mean)[:, 0], apart, rtol=1e-6)


@pytest.mark.parametrize("second", [2.0, 3.0])
def test_what_a_bound_determines_stays_so_in_a_band(second):
    """A column is determined beside one like it only if that one is at a bound."""
    jacobian, free = np.array([[1.0, 1.0], [2.0, second]]), np.array([True, True])
    held, _ = uncertainty(jacobian, 1.0, 1e-7, np.array([True, False]))
    covariance = covariance_without_bounds(jacobian, 1.0, 1e-7, free, held)
    expected = held if second == 2 else np.linalg.inv(jacobian.T @ jacobian)
    np.testing.assert_allclose(covariance, expected)
    np.testing.assert_allclose(held[0, 0], 0.2)


@pytest.mark.parametrize("rows", [False, True])
def test_a_prediction_beyond_the_knots_of_an_input_is_refused(rows):
    found, _ = described(noise=NOISE)
    knots = jnp.array([[0.0, 4.0]] * 3) if rows else jnp.array([0.0, 4.0])
    make = diffrax.LinearInterpolation
    inputs = jax.vmap(make)(knots, knots) if rows else make(knots, knots)
    problem = dataclasses.replace(
        found._problem, args=None if rows else inputs, row_args=inputs if rows else None,
        ts=jnp.tile(TS, (3, 1)) if rows else jnp.asarray(TS),
    )  # fmt: skip
    words = r"predict\(ts=\.\.\.\): an interpolation must cover the span of the solve, from 0 to 5"
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(found, _problem=problem).predict(np.array([1.0, 5.0]))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(7), "did not converge in 7 steps"),
        (Budget(MOST_STEPS, 0), "was ended by seconds=0 before it converged"),
    ],
)
def test_it_says_why_a_search_has_not_converged(budget, words):
    with pytest.warns(UserWarning, match=words):
        found, _ = described(converged=False, budget=budget, noise=NOISE)
    assert not found.converged
    assert str(found).startswith("Estimate: not converged, cost ")


@pytest.mark.parametrize("noise", [{}, {"noise": NOISE}])
def test_a_search_that_creeps_along_a_flat_direction_at_the_optimum_has_converged(noise):
    model = lambda t, rate, size: size * np.exp(-np.exp(rate) * t)
    best, covariance = optimize.curve_fit(model, TS, YS, BEST, ftol=1e-12, xtol=1e-12)
    off = best + 0.3 * np.sqrt(np.diag(covariance)) * [1, 0]
    for at, at_optimum in ((best, True), (off, False)):
        for starts in (STARTS, STARTS | {"unused": np.zeros(2)}):
            flats = (at,) * 2 if len(starts) == 2 else (np.append(at, 5.0),) * 2
            with pytest.warns(UserWarning, match="did not converge|do not determine") as told:
                found, _ = described(flats=flats, at=at, converged=False, starts=starts, **noise)
            ended = at_optimum and "unused" in starts
            assert found.converged == ended
            assert any("did not converge" in str(w.message) for w in told) != ended


def test_what_is_left_to_gain_is_in_directions_that_change_a_residual():
    rows = np.array([[1.0, 2.0, 0.5], [0.5, -1.0, 3.0], [2.0, 0.3, 1.0], [1.0, 1.0, 1.0]])
    residuals = np.array([0.3, -0.2, 0.5, 1.0])
    rows = np.concatenate([rows, 1e6 * rows[:, :1] + 1e6 * rows[:, 1:2]], axis=1)  # a flat one
    basis = np.linalg.qr(rows[:, :3])[0]
    expected = 0.5 * np.sum((residuals @ basis) ** 2)
    free = np.array([True, True, True, True])
    gain = gain_left(rows, residuals @ rows + [0.0, 0.0, 0.0, 1e-3], 1e-7, free)  # of rounding
    np.testing.assert_allclose(gain, expected, rtol=1e-6)
    # A parameter at a bound stays.
    basis = np.linalg.qr(rows[:, [0, 2]])[0]
    held = gain_left(rows, residuals @ rows, 1e-7, np.array([True, False, True, False]))
    np.testing.assert_allclose(held, 0.5 * np.sum((residuals @ basis) ** 2), rtol=1e-9)


def test_a_search_that_was_stopped_says_so():
    budget = Budget(MOST_STEPS)
    with budget.until_interrupted():
        raise KeyboardInterrupt
    assert budget.over
    assert budget.describe() == "was ended by Ctrl-C before it converged"
    with pytest.raises(KeyboardInterrupt), budget.until_interrupted():  # a second one
        raise KeyboardInterrupt


def test_progress_names_the_part_the_starts_and_the_best_cost(capfd):
    for seconds, of in ((None, ""), (60, " of 60")):
        budget = search_budget(None, seconds, True)
        budget.show("estimate: part: 3 of 8 starts, best cost 1.25")
        budget.finish()
        line = f"estimate: part: 3 of 8 starts, best cost 1.25, 0{of} s"
        assert line in capfd.readouterr().err
    Budget(MOST_STEPS).show("part")
    assert not capfd.readouterr().err


def test_each_number_has_a_name():
    template = {"k": jnp.zeros(2), "m": jnp.zeros(()), "t": (jnp.zeros((1, 2)),)}
    expected = ["['k'][0]", "['k'][1]", "['m']", "['t'][0][0][0]", "['t'][0][0][1]"]
    assert names(template) == expected
    assert names(jnp.zeros(())) == ["params"]


def test_one_residual_determines_neither_of_two_parameters():
    free = np.full(2, True)
    covariance, errors = uncertainty(np.array([[2.0, 3.0]]), 1.0, 1e-7, free)
    assert np.isinf(errors).all()
    np.testing.assert_array_equal(covariance, np.diag([np.inf, np.inf]))
    # One that changes nothing leaves the other's.
    _, errors = uncertainty(np.array([[2.0, 0.0]]), 9.0, 1e-7, free)
    np.testing.assert_allclose(errors, [1.5, np.inf])
