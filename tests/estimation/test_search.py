"""Levenberg-Marquardt within bounds, from many starts, on functions with known minima."""

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import DECAY, posed_problem
from jaxtyping import Array, Float

from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.search import starts as starts_of
from jaxode.estimation.search.levenberg_marquardt import MOST_STEPS, Fits, minimize
from jaxode.estimation.search.objectives import Objective
from jaxode.estimation.search.starts import (
    MultiStart,
    Outcomes,
    Runs,
    _astray,
    _distinct,
    improved,
    outcome_of_starts,
)
from jaxode.training.budget import Budget


class Line(Objective):
    """Linear least squares."""

    rows: Float[Array, "m n"]
    aims: Float[Array, " m"]

    @property
    def count(self):
        return len(self.aims)

    def quantities(self, flat, start):
        del start
        return self.rows @ flat - self.aims


def test_a_step_that_a_bound_cuts_short_is_no_end():
    # Newton's step goes far beyond a bound. It is within the tolerance from the first start.
    objective = Line(jnp.array([[1.0, 1.0], [0.01, -0.01]]), jnp.array([2000.0, -200.0]))
    starts = np.array([[100.0 + apart, 1000.0] for apart in (5e-5, 5e-3, 1.0, 50.0)])
    bounds = Bounds(np.array([100.0, -np.inf]), np.full(2, np.inf))
    found = minimize(objective, starts, bounds, 50)
    best = (1900.0 + 0.01 * (200.0 + 1.0)) / (1.0 + 0.01**2)
    np.testing.assert_allclose(found.flats, np.tile([100.0, best], (4, 1)), rtol=1e-9)
    assert found.converged.all()


class Waves(Objective):
    """A frequency, of which all but the nearest starts have a minimum of their own."""

    ts: Float[Array, " m"]

    @property
    def count(self):
        return len(self.ts)

    def quantities(self, flat, start):
        del start
        return jnp.cos(flat[0] * self.ts) - jnp.cos(3.0 * self.ts)


class Valley(Objective):
    """Rosenbrock's function, as residuals, with the first parameter in a unit."""

    unit: Float[Array, ""]

    @property
    def count(self):
        return 2

    def quantities(self, flat, start):
        del start
        x, y = flat[0] / self.unit, flat[1]
        return jnp.stack([10.0 * (y - x**2), 1.0 - x])


FREE = Bounds(np.full(2, -np.inf), np.full(2, np.inf))
VALLEY = np.array([[-1.2, 1.0], [2.0, -3.0], [0.0, 4.0]])


@pytest.mark.parametrize("unit", [1.0, 5e4, -1e3])
def test_a_minimum_is_where_it_is_in_any_unit(unit):
    found = minimize(Valley(jnp.asarray(unit)), VALLEY * np.array([unit, 1.0]), FREE, 200, size=3)
    np.testing.assert_allclose(found.flats / np.array([unit, 1.0]), np.ones((3, 2)), rtol=1e-5)
    assert found.converged.all()
    np.testing.assert_allclose(found.costs, 0.0, atol=1e-10)


def test_a_search_ends_after_its_steps_no_worse_than_it_began():
    valley = Valley(jnp.asarray(1.0))
    begun = minimize(valley, VALLEY, FREE, 0, size=3)
    np.testing.assert_array_equal(begun.flats, VALLEY)
    costs = 0.5 * (100 * (VALLEY[:, 1] - VALLEY[:, 0] ** 2) ** 2 + (1 - VALLEY[:, 0]) ** 2)
    np.testing.assert_allclose(begun.costs, costs)
    ended = minimize(valley, VALLEY, FREE, 4, size=3)
    assert (ended.costs < costs).all()
    assert not ended.converged.any()


def test_more_starts_than_go_at_a_time_end_where_each_belongs(capfd):
    starts, ts = np.linspace(1.0, 13.0, 13)[:, None], np.linspace(0.1, 6.0, 30)
    bounds, budget = Bounds(np.full(1, 0.1), np.full(1, 20.0)), Budget(MOST_STEPS, progress=True)
    found = minimize(Waves(jnp.asarray(ts)), starts, bounds, 200, budget=budget, label="waves")
    cost = lambda speed: 0.5 * np.sum((np.cos(speed * ts) - np.cos(3.0 * ts)) ** 2)
    ends = found.flats[:, 0]
    np.testing.assert_allclose(found.costs, [*map(cost, ends)], atol=1e-12)
    slopes = [(cost(end + 1e-4) - cost(end - 1e-4)) / 2e-4 for end in ends]
    curves = [(cost(end + 1e-4) - 2 * cost(end) + cost(end - 1e-4)) / 1e-8 for end in ends]
    assert np.abs(np.array(slopes) / np.array(curves)).max() < 1e-4
    assert ends[2] == pytest.approx(3.0)
    assert found.converged.all()
    assert len(np.unique(ends.round(2))) > 8  # others have their own
    # One after the other, they end in the same places.
    alone = minimize(Waves(jnp.asarray(ts)), starts[9:], bounds, 200)
    np.testing.assert_allclose(alone.flats, found.flats[9:], rtol=1e-6)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "waves: 13 of 13 starts, best cost" in last


@pytest.mark.parametrize("call", [1, 2])
def test_what_has_not_begun_before_the_end_of_a_budget_is_evaluated(call, monkeypatch):
    starts, budget = np.linspace(1.1, 13.1, 13)[:, None], Budget(MOST_STEPS)
    bounds, calls = Bounds(np.full(1, -np.inf), np.full(1, np.inf)), []
    ended = Budget.over.fget

    def over(self):
        calls.append(self)
        return len(calls) >= call or ended(self)

    monkeypatch.setattr(Budget, "over", property(over))
    objective = Waves(jnp.asarray(np.linspace(0.1, 6.0, 30)))
    found = minimize(objective, starts, bounds, 200, budget=budget)
    assert np.isfinite(found.costs).all()
    begun = 8 if call == 2 else 0  # at a time
    np.testing.assert_array_equal(found.flats[begun:], starts[begun:])
    assert (found.flats[:begun] != starts[:begun]).all()


def test_no_step_leaves_its_bounds_and_equal_ones_hold_a_parameter():
    bounds = Bounds(np.array([-2.0, 0.25]), np.array([0.5, 0.25]))
    starts = np.array([[-1.5, 0.25], [0.4, 0.25]])
    found = minimize(Valley(jnp.asarray(1.0)), starts, bounds, 200, size=3)
    assert ((found.flats >= bounds.lower) & (found.flats <= bounds.upper)).all()
    np.testing.assert_array_equal(found.flats[:, 1], 0.25)
    # Of x alone: 200 x (x**2 - 1/4) = 1 - x beside each root of 1/4.
    x = found.flats[:, 0]
    inside = x < 0.5
    np.testing.assert_allclose((200 * x * (x**2 - 0.25) - (1 - x))[inside], 0.0, atol=1e-4)
    assert (1 - x - 200 * x * (x**2 - 0.25))[~inside].min(initial=1.0) > 0


def test_a_distance_from_the_start_is_held_in_units_of_the_mean_residual():
    objective = Line(jnp.array([[1.0]]), jnp.array([5.0]))
    bounds = Bounds(np.full(1, -np.inf), np.full(1, np.inf))
    found = minimize(objective, np.array([[1.0]]), bounds, 50, size=1, hold=0.5)
    # Half squares of 5 - x, and of x - 1 by the weight: a mean residual of 4 / sqrt(2) by 0.5.
    weight = (0.5**2) * 0.5 * 4.0**2
    best = (5.0 + weight * 1.0) / (1.0 + weight)
    np.testing.assert_allclose(found.flats, best, rtol=1e-6)
    np.testing.assert_allclose(found.costs, 0.5 * (5.0 - best) ** 2, rtol=1e-5)  # without it


def test_runs_that_end_alike_go_on_as_one_and_each_start_finds_its_own():
    flats = np.array([[1.0], [1.0 + 1e-5], [2.0], [3.0]])
    of_start = np.array([[0, 2], [1, 3], [3, -1]])
    costs = np.array([5.0, 5.0 + 1e-5, np.inf, 1.0])
    kept = _distinct(Runs(flats, of_start), costs, 0.0)
    np.testing.assert_array_equal(kept.flats, [[3.0], [1.0]])  # the best first
    np.testing.assert_array_equal(kept.of_start, [[1, -1], [1, 0], [0, -1]])
    more = kept.with_more(np.array([[7.0], [8.0], [9.0]]), np.array([True, False, True]))
    np.testing.assert_array_equal(more.flats, [[3.0], [1.0], [7.0], [9.0]])
    np.testing.assert_array_equal(more.of_start[:, 2], [2, -1, 3])
    none = np.zeros(4, bool), np.zeros((4, 1)), np.zeros((4, 1, 1)), np.zeros((4, 1))
    found, of_each = outcome_of_starts(Outcomes(more, np.array([4.0, 2.0, 3.0, np.inf]), *none))
    np.testing.assert_array_equal(found, [[1.0], [1.0], [3.0]])
    np.testing.assert_array_equal(of_each, [2.0, 2.0, 4.0])


def test_worse_runs_are_given_up_but_the_best_eight():
    flats = np.arange(12.0)[:, None] * np.ones(1)
    of_start = np.arange(12)[None]  # all of one start, whose best goes on in any case
    costs = np.concatenate([np.full(8, 50.0), [9.9, 1.0, 10.1, 300.0]])
    kept = _distinct(Runs(flats, of_start), costs + 1e-3 * flats[:, 0], 0.0)
    assert sorted(kept.flats[:, 0]) == [0.0, 1.0, 2.0, 3.0, 4.0, 8.0, 9.0, 10.0]
    # Beyond the eight, those of at most ten times the least cost.
    costs = np.concatenate([np.linspace(1.0, 9.0, 10), [10.5, 11.0]])
    kept = _distinct(Runs(flats, of_start), costs, 0.0)
    assert sorted(kept.flats[:, 0]) == [*range(10)]
    kept = _distinct(Runs(flats, of_start), costs, 9.75)  # or by so many nats
    assert sorted(kept.flats[:, 0]) == [*range(11)]


def test_runs_go_astray_that_cost_far_more_than_another_or_their_start():
    costs, of_starts = np.array([1.0, 9.0, 11.0, 5.0]), np.array([2.0, 20.0, 30.0, 0.4])
    np.testing.assert_array_equal(_astray(costs, of_starts, 0.0), [0, 0, 1, 1])


TIMES = np.arange(1.0, 33.0)
OWN = np.array([[1.0], [2.0]])


class Numbered:
    """An objective that knows the end of its observations."""

    def __init__(self, problem, end):
        self.end = float(end)


@pytest.mark.parametrize(
    ("lost_from", "matched"), [(4.0, False), (4.0, True), (32.0, True), (np.inf, True)]
)
def test_a_start_that_can_be_evaluated_is_never_lost(lost_from, matched, monkeypatch):
    """Whatever the first parts end at: 100 cannot be evaluated from a time on; in all
    observations, it costs more than the second start, and less than the first."""

    def fake(objective, flats, bounds, steps, **options):
        here = np.asarray(flats)[:, 0]
        costs = np.where(here == 100.0, 15.0, 30.0 - 10.0 * here)
        costs = np.where((here == 100.0) & (objective.end >= lost_from), np.inf, costs)
        ends = flats if objective.end == TIMES[-1] or not steps else np.full_like(flats, 100.0)
        lost = np.zeros((len(flats), 1))
        return Fits(ends, costs, np.isfinite(costs), lost, lost[..., None], lost)

    monkeypatch.setattr(starts_of, "minimize", fake)
    monkeypatch.setattr(starts_of, "of_observations", Numbered)
    problem = posed_problem(
        DECAY, np.ones(1), TIMES, np.ones((32, 1)), {"rate": OWN[:, 0]}, noise=1.0
    )[0]
    runs = Runs(np.full((2, 1), 100.0) if matched else OWN, np.arange(2)[:, None])
    bounds, budget = Bounds(np.full(1, -np.inf), np.full(1, np.inf)), Budget(MOST_STEPS)
    search = MultiStart(problem, OWN, bounds, 2, budget)
    ends, costs = outcome_of_starts(improved(search, runs, matched))
    of_first = (100.0, 15.0) if lost_from == np.inf else (1.0, 20.0)
    np.testing.assert_array_equal(ends[:, 0], [of_first[0], 2.0])
    np.testing.assert_array_equal(costs, [of_first[1], 10.0])
