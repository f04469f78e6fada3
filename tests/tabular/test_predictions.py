"""Predictions of one number, against exact ones, sums of its probabilities, and samples."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from helpers import with_slow
from scipy.special import ndtr
from tables import FRAMES, KEY, table, trained

from jaxode._checks.errors import SolveError
from jaxode.tabular import frames
from jaxode.tabular.categorical import Categories
from jaxode.tabular.columns.column import Column
from jaxode.tabular.encoding import Encoder
from jaxode.tabular.table import Table

pytestmark = pytest.mark.usefixtures("default_settings")
TARGETS = {"atom": "count", "continuous": "y", "few": "n"}
VALUES = {"atom": np.arange(-30.0, 71.0), "few": np.arange(5.0)}
LEVEL = 2e-4  # by which solves at a tolerance of 1e-5 in equal steps miss a level


def rows(name, n=4):
    return FRAMES[name][:n].reset_index(drop=True)


def probabilities(name, frame):
    """`[rows, values]`, from `log_prob`."""
    values = VALUES[name]
    every = frame.loc[np.repeat(frame.index, len(values))]
    every = every.assign(**{TARGETS[name]: np.tile(values, len(frame))})
    p = np.exp(table(name).log_prob(every, draws=12 if name == "atom" else 1))
    return p.reshape(len(frame), -1)


@pytest.mark.parametrize("name", VALUES)
def test_predictions_are_those_of_the_probabilities(name):
    fitted, frame, values = table(name), rows(name, 3), VALUES[name]
    p, y = probabilities(name, frame), frame[TARGETS[name]].to_numpy(float)
    p /= p.sum(axis=1, keepdims=True)
    spread = FRAMES[name][TARGETS[name]].std()
    np.testing.assert_allclose(fitted.mean(frame), p @ values, atol=0.01 * spread)
    below = np.cumsum(p, axis=1)
    at = np.argmax(values == y[:, None], axis=1)
    np.testing.assert_allclose(fitted.cdf(frame), below[np.arange(len(y)), at], atol=0.01)
    # The score by its other definition, the integral of the squared error of the distribution.
    score = np.sum((below - (values >= y[:, None])) ** 2, axis=1)
    np.testing.assert_allclose(fitted.crps(frame), score, atol=0.01 * spread)
    for q in (0.05, 0.4, 0.93):
        quantile = fitted.quantile(q, frame)
        at = np.argmax(values == quantile[:, None], axis=1)
        reached = below[np.arange(len(y)), at]
        assert (values[at] == quantile).all()
        assert (reached > q - 0.01).all()
        assert (reached - p[np.arange(len(y)), at] < q + 0.01).all()


@pytest.mark.parametrize("make", with_slow([table, trained], [trained]))  # 4,800 solves
def test_predictions_are_those_of_samples(make):
    fitted, frame = make("continuous"), rows("continuous", 3)
    samples = fitted.sample(KEY, 1600, frame).y.to_numpy().reshape(3, -1)
    error = 4 * samples.std() / 40
    np.testing.assert_allclose(fitted.mean(frame), samples.mean(axis=1), atol=error)
    y = frame.y.to_numpy()[:, None]
    pairs = np.abs(samples[:, :800] - samples[:, 800:]).mean(axis=1)
    score = np.abs(samples - y).mean(axis=1) - pairs / 2
    np.testing.assert_allclose(fitted.crps(frame), score, atol=error)
    np.testing.assert_allclose(fitted.cdf(frame), (samples <= y).mean(axis=1), atol=0.05)
    low, high = fitted.interval(0.8, frame)
    inside = (samples >= low[:, None]) & (samples <= high[:, None])
    np.testing.assert_allclose(inside.mean(axis=1), 0.8, atol=0.04)


def test_the_quantile_is_the_inverse_of_the_distribution():
    fitted, frame = trained("continuous"), rows("continuous")
    quantiles = fitted.quantile([0.03, 0.5, 0.9], frame)
    assert quantiles.shape == (4, 3)
    # The same solve in another batch, up to rounding.
    np.testing.assert_allclose(quantiles[:, 1], fitted.quantile(0.5, frame), rtol=1e-6)
    for q, y in zip((0.03, 0.5, 0.9), quantiles.T, strict=True):
        np.testing.assert_allclose(fitted.cdf(frame.assign(y=y)), q, atol=LEVEL)


def test_the_distribution_ends_at_zero_and_one():
    frame = rows("atom").assign(count=[-1e6, 1e6, *[0.0] * 2])
    cdf = table("atom").cdf(frame)
    np.testing.assert_allclose(cdf[:2], [0, 1], atol=1e-6)
    # The atom counts at its value, and not just below it.
    below = table("atom").cdf(frame.assign(count=-1.0))
    p = np.exp(table("atom").log_prob(frame.assign(count=0.0)))
    np.testing.assert_allclose(cdf[2:] - below[2:], p[2:], atol=0.01)
    assert (p[2:] > 0.02).all()


def test_one_bounded_number_without_others():
    """A column alone has the same predictions in each row, within its bounds."""
    fitted, frame = table("one"), FRAMES["one"][:5]
    quantiles = fitted.quantile([0.001, 0.5, 0.99], frame)
    assert (quantiles == quantiles[0]).all()
    assert (quantiles >= 0).all()
    cdf = fitted.cdf(pd.DataFrame({"x": quantiles[0]}))
    np.testing.assert_allclose(cdf, [0.001, 0.5, 0.99], atol=LEVEL)
    assert np.ptp(fitted.mean(frame)) == 0


def test_rows_are_predicted_in_parts(monkeypatch):
    monkeypatch.setattr("jaxode.tabular.predictions.predictive.ROWS_OF_PREDICTION", 4)
    whole, parts = (table("few").crps(rows("few", n)) for n in (4, 10))
    np.testing.assert_allclose(parts[:4], whole, rtol=1e-5)
    assert len(parts) == 10
    assert table("few").mean(rows("few", 0)).shape == (0,)


class Peaks:
    """Normals around -1 and 1, of which a share is around 1."""

    def __init__(self, share, scale):
        self.share, self.scale = share, scale

    def cdf(self, x):
        low, high = (ndtr((x + center) / self.scale) for center in (1, -1))
        return (1 - self.share) * low + self.share * high

    def ppf(self, q):
        low, high = np.full(np.shape(q), -9.0), np.full(np.shape(q), 9.0)
        for _ in range(60):
            middle = (low + high) / 2
            less = self.cdf(middle) < q
            low, high = np.where(less, middle, low), np.where(less, high, middle)
        return high

    def rvs(self, n, rng):
        return np.where(rng.random(n) < self.share, 1, -1) + self.scale * rng.normal(size=n)


class Exact:
    """A density of which all levels are known."""

    def __init__(self, law):
        self.law = law

    def cdf(self, x, context=None):
        return self.law.cdf(np.asarray(x, float)[..., 0])

    def quantile(self, q, context=None, paired=False):
        return self.law.ppf(np.asarray(q, float))


LAWS = {
    f"peaks {share} {scale}": Peaks(share, scale)
    for share in (0.5, 0.7, 0.9)
    for scale in (0.01, 0.1, 0.3)
} | {
    "normal": scipy.stats.norm(3, 2),
    "lognormal": scipy.stats.lognorm(1),
    "t3": scipy.stats.t(3),
    "gamma": scipy.stats.gamma(0.3),
    "Cauchy": scipy.stats.cauchy(),
}


def made(column, density, modes=None, *given):
    """A table of one column with this density; and with modes as often as in these rows."""
    like = frames.as_frame("frame", pd.DataFrame({"y": [0.0]})).head(0)
    categories = None
    if modes is not None:
        categories = Categories.make(KEY, np.asarray(modes)[:, None], (column.modes,), len(given))
    return Table(Encoder(like, (column,), given), categories, density, None)


@pytest.mark.parametrize("name", LAWS)
def test_predictions_of_known_distributions(name):
    law = LAWS[name]
    exact = made(Column("y", "continuous", (), (0.0,), False), Exact(law))
    levels = [1e-6, 1e-3, 0.05, 0.3, 0.499, 0.5, 0.6, 0.95, 0.999]
    y = exact.quantile(levels, pd.DataFrame({"y": [0.0]}))[0]
    np.testing.assert_allclose(law.cdf(y), levels, rtol=1e-5)  # single precision of a level
    if name == "Cauchy":  # without a mean
        return
    rng = np.random.default_rng(0)
    draw = {"random_state": rng} if not isinstance(law, Peaks) else {"rng": rng}
    samples = np.sort(law.rvs(100_000, **draw))
    spread = np.sum(samples * (2 * np.arange(100_000) + 1 - 100_000)) / 100_000**2
    frame = pd.DataFrame({"y": law.ppf(np.array([0.1, 0.4, 0.6, 0.95]))})
    # Of the points, and three standard errors of the samples.
    error = 0.005 * spread + 3 * samples.std() / 100_000**0.5
    np.testing.assert_allclose(exact.mean(frame), samples.mean(), atol=error)
    score = np.abs(samples - frame.y.to_numpy()[:, None]).mean(axis=1) - spread
    np.testing.assert_allclose(exact.crps(frame), score, rtol=0.01, atol=error)


NORMAL = Exact(scipy.stats.norm(0.1, 1.0))  # whatever its context of modes
# Columns, and the modes of their training rows.
MIXED = {
    "atoms in a continuous column": (
        Column("y", "continuous", (-1.0, 0.0, 2.5), (0.0,), False),
        np.repeat([0, 1, 2, 3], [1, 4, 2, 5]),
    ),
    "atoms among integers": (
        Column("y", "integer", (0.0, 3.0), (1.0,), False, -4.0, 6.0, (-4.0, 6.0)),
        np.repeat([0, 1, 2], [1, 4, 5]),
    ),
    "several grids": (
        Column("y", "integer", (-10.0,), (5.0, 1.0), False, -30.0, 30.0, (-30.0, 30.0), scale=8.0),
        np.repeat([0, 1, 2], [1, 4, 5]),
    ),
    "decimals": (Column("y", "continuous", (), (0.1,), False, resolution=0.1), None),
    "atoms alone": (Column("y", "integer", (1.0, 2.0, 7.0), (), False), np.repeat([0, 1, 2], 4)),
}


@pytest.mark.parametrize("name", MIXED)
def test_quantiles_of_atoms_and_grids(name):
    """The quantile is the least number that reaches the level."""
    column, modes = MIXED[name]
    mixed = made(column, NORMAL if column.grids else None, modes)
    one = pd.DataFrame({"y": [0.0]})
    step = column.grids[-1] if column.grids and column.grids[-1] else 1e-3
    for q in (0.003, 0.1, 0.3, 0.45, 0.6, 0.9, 0.997):
        y = mixed.quantile(q, one)
        assert mixed.cdf(one.assign(y=y)) > q - 1e-6  # single precision
        assert mixed.cdf(one.assign(y=y - step)) < q
    if column.kind == "integer" and column.grids:
        low, high = mixed.interval(0.5, one)
        assert low == np.round(low)
        assert high == np.round(high)


class OfModes:
    """A law for each grid, moved by the given number; counts the levels that are solved for."""

    def __init__(self, *laws):
        self.laws, self.solved = laws, 0

    def cdf(self, x, context):
        x = np.asarray(x, float)[..., 0] - context[..., -1]
        self.solved += x.size
        return self._of_grid(lambda law: law.cdf(x), context)

    def quantile(self, q, context, paired=False):
        levels = np.asarray(q, float)
        x = self._of_grid(lambda law: law.ppf(levels), context[:, None])
        return x + context[:, -1:]

    def _of_grid(self, f, context):
        modes = context[..., -1 - len(self.laws) : -1]  # after those of the atoms
        return sum(f(law) * modes[..., i] for i, law in enumerate(self.laws))


NORMALS = OfModes(scipy.stats.norm(), scipy.stats.norm(0.2, 0.9))
FINE = {"grids": (0.5, 0.01), "resolution": 0.01}
# Columns, and densities of their grids.
SEVERAL = {
    "near": ({**FINE}, NORMALS),
    "atoms": ({**FINE, "values": (-1.0, 0.25, 9.0)}, NORMALS),
    "coarse": ({"grids": (5.0, 1.0), "scale": 6.0, "values": (2.0,)}, NORMALS),
    "three": ({**FINE, "grids": (1.0, 0.1, 0.01)}, OfModes(*NORMALS.laws, scipy.stats.norm(0.1))),
    "apart": (FINE, OfModes(scipy.stats.norm(-4, 0.3), scipy.stats.norm(3, 0.1))),
    "peaks": (FINE, OfModes(Peaks(0.5, 0.03), Peaks(0.6, 0.03))),
    "peaks and atoms": (
        {**FINE, "grids": (0.1, 0.01), "values": (0.0, 1.5)},
        OfModes(Peaks(0.1, 0.02), Peaks(0.1, 0.02)),
    ),
    "skewed": (FINE, OfModes(scipy.stats.gamma(2), scipy.stats.expon())),
    "tails": (FINE, OfModes(scipy.stats.t(3), scipy.stats.norm())),
}


@pytest.mark.parametrize("levels", [[0.3], [0.001, 0.05, 0.5, 0.95, 0.999], [0.95, 0.95 + 1e-6]])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("name", SEVERAL)
def test_quantiles_of_several_grids(name, rows, levels):
    """The least numbers that reach a level; if not, by as much as is accepted."""
    options, density = SEVERAL[name]
    column = Column("y", "continuous", missing=False, **{"values": (), **options})
    modes = np.repeat(np.arange(column.modes), np.arange(column.modes) + 1)
    given = Column("s", "continuous", (), (0.0,), False)
    mixed = made(column, density, modes, given)
    frame = pd.DataFrame({"y": 0.0, "s": np.linspace(0, 1, rows)})
    density.solved = 0
    found = mixed.quantile(levels, frame)
    if density is NORMALS:  # bisection takes 10 steps
        assert density.solved <= 3 * len(column.grids) * found.size
    q, unit = np.tile(levels, rows), column.grids[-1]
    every = pd.DataFrame({"y": found.reshape(-1), "s": np.repeat(frame.s, len(levels)).to_numpy()})
    # From which a search takes a last step. Away from narrow peaks it is exact.
    error = 0.01 * np.minimum(np.minimum(q, 1 - q), 0.05) if "peaks" in name else 1e-5
    assert (mixed.cdf(every) >= q - error).all()
    assert (mixed.cdf(every.assign(y=every.y - unit)) < q + error).all()


@pytest.mark.parametrize("y", [1e16, -1e16, 3e200])
def test_far_numbers_have_levels(y):
    column, modes = MIXED["several grids"]
    column = dataclasses.replace(column, low=-np.inf, high=np.inf)
    mixed = made(column, NORMAL, modes)
    np.testing.assert_allclose(mixed.cdf(pd.DataFrame({"y": [y]})), float(y > 0), atol=1e-6)


def test_levels_never_fall():
    """Neighbours differ by 2e-4 of a level; a step that misses it by more shows as a fall."""
    fitted, y = trained("continuous"), np.linspace(90, 150, 4000)
    frame = rows("continuous", 1).loc[[0] * len(y)].reset_index(drop=True).assign(y=y)
    assert np.diff(fitted.cdf(frame)).min() > -1e-6  # single precision


class WithErrors(Exact):
    """Whose quantiles miss by more than they are apart."""

    def quantile(self, q, context=None, paired=False):
        errors = np.random.default_rng(0).normal(size=(len(context), len(q)))
        return super().quantile(q) + 1e-4 * errors


def test_quantiles_never_cross():
    """Nor at levels that are hardly apart, whose solves differ by their errors."""
    given = Column("s", "continuous", (), (0.0,), False)
    column = Column("y", "continuous", (), (0.0,), False)
    fitted = made(column, WithErrors(scipy.stats.norm()), None, given)
    frame = pd.DataFrame({"y": 0.0, "s": np.linspace(0, 1, 20)})
    low, high = fitted.interval(1e-9, frame)
    assert (low <= high).all()
    levels = np.array([0.5, 0.5 + 1e-8, 0.2, 0.5 - 1e-8])
    y = fitted.quantile(levels, frame)
    assert (np.diff(y[:, np.argsort(levels)]) >= 0).all()


def test_no_levels_and_wrong_ones():
    exact = made(Column("y", "continuous", (), (0.0,), False), Exact(scipy.stats.norm()))
    frame = pd.DataFrame({"y": [0.0, 1.0]})
    assert exact.quantile([], frame).shape == (2, 0)
    with pytest.raises(ValueError, match=r"apart from 1; got 0\.99999998"):
        exact.quantile([0.5, 1 - 2e-8], frame)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to single precision
# The others name it as the first one does, and compile more.
@pytest.mark.parametrize("name", with_slow(["cdf", "quantile", "mean"], ["quantile", "mean"]))
def test_a_row_that_fails_is_named(name):
    frame = rows("continuous").assign(s2=[0.0, 0.0, 1e300, 0.0])
    call = getattr(trained("continuous"), name)
    with pytest.raises(SolveError, match=r"it fails in row 2, column 's2' has 1e\+300"):
        call([0.5, 0.6], frame) if name == "quantile" else call(frame)
