"""What a search minimizes, and the problem that arguments pose, without a search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import DECAY, KnownSolution, posed_problem
from scipy import stats

from jaxode.estimation.observed.tolerances import sizes_of_states
from jaxode.estimation.search.levenberg_marquardt import MOST_STEPS
from jaxode.estimation.search.objectives import of_observations
from jaxode.estimation.search.slopes import OfSlopes, match_slopes
from jaxode.estimation.search.starts import end_of_part
from jaxode.training.budget import Budget

TS = np.linspace(0.5, 4.0, 8)
YS = 2.0 * np.exp(-0.5 * TS) + 0.1 * np.cos(5 * TS)
YS[2] = np.nan
SEEN = ~np.isnan(YS)
AT = {"noise": -1.5, "rate": -0.4, "size": 1.8}
STARTS = {name: np.full(1, value) for name, value in AT.items()}
FLAT = jnp.asarray([*AT.values()])


def begin(params):
    return params["size"][None]


def noise_of(params):
    return jnp.exp(params["noise"])


def prior_of(params):
    return (params["rate"] + 0.5) / 0.2


def own(predicted, observed, params):
    return jax.scipy.stats.norm.logpdf(observed, predicted, noise_of(params))


def posed(**options):
    return posed_problem(DECAY, begin, TS, YS[:, None], STARTS, **options)[0]


def nll_of(x, upto=np.inf):
    """Of what is observed, with the prior."""
    noise, rate, size = x
    seen = SEEN & (upto >= TS)
    predicted = size * np.exp(-np.exp(rate) * TS)
    nll = -stats.norm.logpdf(YS, predicted, np.exp(noise))[seen].sum()
    return nll + 0.5 * ((rate + 0.5) / 0.2) ** 2


KINDS = {
    "a noise of parameters": {"noise": noise_of},
    "a density of one's own": {"likelihood": own},
    "a residual": {"residual": lambda p, o, params: (p - o) / noise_of(params)},
    "a known noise": {"noise": float(np.exp(AT["noise"]))},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_has_the_value_and_the_slope_of_its_likelihood(kind):
    objective = of_observations(posed(prior=prior_of, **KINDS[kind]), jnp.asarray(TS[-1]))

    @jax.jit
    def near(flat):
        def twice(flat):
            found = objective.quantities(flat, FLAT)
            return found, found

        jacobian, quantities = jax.jacfwd(twice, has_aux=True)(flat)
        return objective.local(flat, FLAT, quantities, jacobian)

    found, n = near(FLAT), SEEN.sum()
    # Those that are not densities are above a perfect fit.
    above = 0.0 if kind in ("a noise of parameters", "a density of one's own") else n * (
        AT["noise"] + 0.5 * np.log(2 * np.pi)
    )  # fmt: skip
    np.testing.assert_allclose(found.cost, nll_of(FLAT) - above, rtol=1e-9)
    apart = 1e-5 * np.eye(3)
    slopes = [(near(FLAT + step).cost - near(FLAT - step).cost) / 2e-5 for step in apart]
    np.testing.assert_allclose(found.residuals @ found.jacobian, slopes, rtol=1e-5, atol=1e-5)
    # Fisher's information: squares of the slopes of predictions, the noise, and the prior.
    if kind in ("a noise of parameters", "a known noise"):
        predicted = AT["size"] * np.exp(-np.exp(AT["rate"]) * TS)[SEEN]
        along = np.stack([0 * predicted, -np.exp(AT["rate"]) * TS[SEEN] * predicted,
                          predicted / AT["size"]], 1)  # fmt: skip
        expected = along.T @ along / np.exp(2 * AT["noise"]) + np.diag([0.0, 25.0, 0.0])
        expected[0, 0] = 2 * n if kind == "a noise of parameters" else 0.0
        np.testing.assert_allclose(found.jacobian.T @ found.jacobian, expected, atol=1e-8)


def test_few_observations_leave_the_noise_where_the_search_began():
    """They can be fitted exactly, by a noise of zero."""
    problem, other = posed(noise=noise_of), FLAT + jnp.array([0.7, 0.0, 0.0])
    for end, noise in ((TS[3], AT["noise"]), (TS[-1], AT["noise"] + 0.7)):
        objective = of_observations(problem, jnp.asarray(end))
        quantities = objective.quantities(other, FLAT)
        np.testing.assert_allclose(quantities[-len(TS) :], noise)
        cost = objective.local(other, FLAT, quantities, jnp.zeros((len(quantities), 3))).cost
        at = [noise, AT["rate"], AT["size"]]
        prior = 0.5 * ((AT["rate"] + 0.5) / 0.2) ** 2
        np.testing.assert_allclose(cost, nll_of(at, end) - prior, rtol=1e-9)


def test_predictions_stay_what_they_are_at_the_end():
    problem = posed(noise=noise_of)
    predicted = problem.predicted(problem.unravel(FLAT), jnp.asarray(TS[3]))[:, 0]
    expected = AT["size"] * np.exp(-np.exp(AT["rate"]) * np.minimum(TS, TS[3]))
    np.testing.assert_allclose(predicted, expected, rtol=1e-12)
    np.testing.assert_array_equal(problem.mask(jnp.asarray(TS[3]))[:, 0], SEEN & (TS[3] >= TS))


def test_parts_of_the_times_hold_more_observations_than_parameters():
    problem = posed(noise=noise_of)
    # The first four, of which one is missing, are three, as many as the parameters.
    ends = [float(end_of_part(problem, number)) for number in range(5)]
    np.testing.assert_allclose(ends, [TS[4], TS[4], TS[4], TS[4], TS[7]])
    long = np.arange(1.0, 65.0)
    many = posed_problem(DECAY, begin, long, np.ones((64, 1)), STARTS, noise=noise_of)[0]
    ends = [float(end_of_part(many, number)) for number in range(6)]
    np.testing.assert_allclose(ends, [4, 8, 16, 32, 64, 64])


def decayed(t, y0, params):
    """Of two numbers, of which the second begins at zero."""
    left = jnp.exp(-jnp.exp(params["rate"]) * t)
    return jnp.stack([y0[0] * left, params["size"] * y0[0] * (1 - left)])


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("observed", [False, True])
def test_tolerances_are_in_units_of_each_number_of_the_state(unit, observed):
    """By its observations; if it has none, by where it begins, or by where the starts lead it."""
    left = np.exp(-0.5 * TS)
    units = np.array([1e3 * unit, unit])
    states = np.stack([1e3 * unit * left, unit * np.where(SEEN, 1 - left, np.nan)], 1)
    starts = {"rate": np.log([0.5, 0.1]), "size": np.array([1e-3, 1e-2])}
    two = KnownSolution(lambda t, y, params: 0 * y, decayed)
    begin = np.array([1e3 * unit, 0.0])
    if observed:
        problem = posed_problem(two, begin, TS, states, starts, noise=1.0)[0]
        spread = units * np.array([np.std(left), np.std(left[SEEN])])
        np.testing.assert_allclose(problem.options["atol"], 1e-6 * spread, rtol=1e-6)
        alone = posed_problem(two, begin, TS, states, starts)[0]
        pooled = np.concatenate([(x - x.mean()) for x in (units[0] * left, unit * left[SEEN])])
        np.testing.assert_allclose(alone.noise, np.sqrt(np.mean(pooled**2)), rtol=1e-6)
        assert alone.estimated  # as if the spread were the noise
    else:
        first = {"observe": lambda t, y, params: y[1], "noise": 1.0}
        problem = posed_problem(two, begin, TS, states[:, 1] / unit, starts, **first)[0]
        at = np.append(0.0, TS)
        roots = [size * np.sqrt(np.mean((1e3 * unit * (1 - np.exp(-rate * at))) ** 2))
                 for rate, size in ((0.5, 1e-3), (0.1, 1e-2))]  # fmt: skip
        begun = np.sqrt(np.mean((1e3 * unit * np.exp(-0.5 * at)) ** 2))
        np.testing.assert_allclose(problem.options["atol"], [1e-6 * begun, 1e-6 * min(roots)])
        own = posed_problem(two, begin, TS, states[:, 1], starts, options={"atol": 1e-3}, **first)
        assert own[0].options["atol"] == 1e-3
    assert problem.options["rtol"] == 1e-6


def test_sizes_of_states_are_finite_whatever_the_solves_are():
    y0 = {"a": np.array([[2.0]]), "b": np.array([[0.0]]), "c": np.array([[8.0]])}
    ys = {"a": np.array([[[np.nan]]]), "b": np.array([[[0.0]]]), "c": np.array([[[1e-300]]])}
    found = sizes_of_states(y0, ys)
    # Its start, the least of the others, and the root of a mean square.
    np.testing.assert_allclose([found["a"], found["b"], found["c"]], [2.0, 2.0, 8 * 0.5**0.5])
    starts = np.array([[[np.nan]], [[3.0]]]), np.array([[[[np.nan]]], [[[3.0]]]])
    np.testing.assert_allclose(sizes_of_states(*starts), [3.0])
    none = sizes_of_states(np.zeros((1, 1, 2)), np.full((1, 1, 3, 2), np.nan))
    np.testing.assert_array_equal(none, np.ones(2))


def test_slopes_of_what_is_missing_do_not_count():
    """And each series counts by the spread of its slopes."""
    problem, flats, box = posed_problem(
        KnownSolution(lambda t, y, p: t * jnp.stack([p["rate"], 1e3 * p["size"]]), None),
        np.zeros(2), TS, np.stack([np.where(SEEN, 1.5 * TS**2, np.nan), 2.5e3 * TS**2], 1),
        {name: STARTS[name] for name in ("rate", "size")},
    )  # fmt: skip
    ends, costs = match_slopes(problem, flats, box, Budget(MOST_STEPS))
    np.testing.assert_allclose(ends, [[3.0, 5.0]], rtol=0.05)  # of splines of eight
    assert costs[0] < 0.5
    values = jnp.zeros((8, 2))
    scale = jnp.asarray(np.where(SEEN[:, None], 2.0, np.inf) * np.ones(2))
    off = OfSlopes(problem, values, values, scale).quantities(jnp.array([3.0, 0.0]), flats[0])
    np.testing.assert_allclose(off.reshape(8, 2)[:, 0], np.where(SEEN, 1.5 * TS, 0.0))


def test_observations_need_not_exceed_parameters_that_are_fixed():
    few = {"ys": np.where(TS > 1.25, np.nan, YS)[:, None], "f": DECAY, "ts": TS}
    starts = {"rate": np.zeros(1), "size": np.ones(1)}
    given = {"y0": begin, "starts": starts, **few}
    with pytest.raises(ValueError, match="more than the 2 parameters"):
        posed_problem(**given)
    bounds = tuple({"rate": 0.0, "size": size} for size in (-np.inf, np.inf))
    assert posed_problem(**given, bounds=bounds)[0].estimated
