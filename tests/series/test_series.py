"""Series: exact likelihoods, forecasts, frames, and what is refused."""

import dataclasses
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import logsumexp

import jaxode
from jaxode.series import Series, fit_series
from jaxode.series.mixture import Mixture
from jaxode.series.series_network import SeriesNetwork
from jaxode.series.units import Units, recalled

NAN = np.nan
AT = np.array([3.5, 4.0, 9.0])


def simulated(rows: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine with noise at 4 to 6 times below 3, a third of the values missing."""
    rng = np.random.default_rng(seed)
    ts, ys = np.sort(rng.uniform(0.0, 3.0, (rows, 6)), axis=1), np.full((rows, 6, 2), NAN)
    for i, (t, y) in enumerate(zip(ts, ys, strict=True)):
        count = max(rng.integers(4, 7), 6 * (i == 0))  # the first one is not padded
        t[count:] = t[count - 1]
        phase = t[:count] + rng.uniform(0.0, 6.0)
        y[:count] = np.stack([5 + np.sin(phase), 100 * np.cos(phase)], axis=1)
        y[:count] *= 1 + 0.1 * rng.normal(size=(count, 2))
        y[:count][rng.random((count, 2)) < 0.3] = NAN
        y[0] = y[0] if not np.isnan(y[0]).all() else [5.0, 0.0]
    return ts, ys


TS, YS = simulated()


def trained(ys: np.ndarray = YS, **options) -> Series:
    own = {"steps": 30, "size": 4, "validation": 0.15}  # 20 series in a batch
    options = own | {"key": jax.random.key(0), "progress": False} | options
    with jax.numpy_dtype_promotion("standard"):  # Adam has no strict one
        model, history = jaxode.series.fit(TS, ys, **options)
    assert history[-1].step == options["steps"]
    assert np.isfinite([point.nats for point in history]).all()
    return model


def untrained(ts: np.ndarray = TS, ys: np.ndarray = YS) -> Series:
    """What training begins with: most of what a model promises holds for any network."""
    units = Units.from_series(ts, ys, None)
    starts = recalled(units.readings(ts, ys))
    network = SeriesNetwork.make(
        jax.random.key(0), 0, 4, units.gap, starts, fit_series.SERIES_DROPOUT
    )
    return Series(network, units)


@pytest.fixture(scope="module")
def model() -> Series:
    return untrained()


# The context of a series decides its level.
CONTEXT = np.where(np.random.default_rng(1).random(len(TS)) < 0.5, 0.0, 1.0)[:, None]
LEVELS = YS + 50 * CONTEXT[:, :, None]


@pytest.fixture(scope="module")
def of_context() -> Series:
    """The only model that is trained: from start to end, as a user trains it."""
    return trained(LEVELS, context=CONTEXT, steps=60)


MANY = 2001  # rows of one program, for the densities of many values of one series


def with_last(values: np.ndarray, at: float = 3.5) -> tuple[np.ndarray, np.ndarray]:
    """Copies of the first series, with each of these values `[n, channels]` at a later time."""
    values = np.concatenate([values, np.full((MANY - len(values), 2), NAN)])
    ts = np.repeat(np.append(TS[0], at)[None], MANY, axis=0)
    return ts, np.concatenate([np.repeat(YS[:1], MANY, axis=0), values[:, None]], axis=1)


@pytest.mark.parametrize("at", [3.5, 9.0], ids=["soon", "after more than the longest gap"])
def test_the_density_of_one_value_integrates_to_one(model, at):
    """And its quantiles are those of `quantile`, its mean that of `mean`."""
    x = np.linspace(-2000.0, 2000.0, MANY)
    ts, ys = with_last(np.stack([np.full_like(x, NAN), x], axis=1), at)
    before = model.log_prob(TS, YS)[0]
    density = np.exp(model.log_prob(ts, ys) - before)
    # Its standard deviation is about 70, so the trapezoidal rule is exact to rounding but for the
    # tail beyond, which is below 1e-6.
    assert np.trapezoid(density, x) == pytest.approx(1.0, abs=1e-6)
    ahead = TS, YS, np.full((len(TS), 3), at)
    mean = model.mean(*ahead)[0, 0, 1]
    assert np.trapezoid(x * density, x) == pytest.approx(mean, abs=1e-3)
    levels = np.array([0.1, 0.9])
    low, high = model.quantile(levels, *ahead)[:, 0, 0, 1]
    below = np.interp([low, high], x, (x[1] - x[0]) * (np.cumsum(density) - 0.5 * density))
    np.testing.assert_allclose(below, levels, atol=1e-3)


mixture_of = jax.jit(Mixture.from_numbers, static_argnums=1)
log_probs = jax.jit(jax.vmap(Mixture.log_prob, (None, 0, 0)))


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_a_mixture_has_the_density_of_its_normals(channels):
    """Those of SciPy, of the channels that are there."""
    rng = np.random.default_rng(channels)
    numbers = jnp.asarray(rng.normal(size=Mixture.size(channels)))
    mixture = jax.tree.map(np.asarray, mixture_of(numbers, channels))
    ys, seen = rng.normal(size=(5, channels)), rng.random((5, channels)) < 0.6
    seen[:, 0], seen[0], seen[1] = True, True, False
    found = log_probs(mixture, jnp.asarray(ys), jnp.asarray(seen))
    assert found[1] == pytest.approx(0.0, abs=1e-12)
    shared = mixture.loading @ mixture.loading.T
    for i in (0, 2, 3, 4):
        some = seen[i]
        normal = lambda mean, sd, some=some: stats.multivariate_normal(
            mean[some], (shared + np.diag(sd**2))[np.ix_(some, some)]
        )
        parts = [normal(*part) for part in zip(mixture.mean, mixture.sd, strict=True)]
        of_parts = [part.logpdf(ys[i, some]) for part in parts]
        expected = logsumexp(of_parts, b=np.exp(mixture.log_weight))
        np.testing.assert_allclose(found[i], expected, rtol=1e-10)


def test_narrow_normals_keep_their_digits_in_float32():
    """Of channels that share almost all of their variance, as repeated values have."""
    rng = np.random.default_rng(0)
    mixture = Mixture(
        np.log([0.2, 0.3, 0.5]), rng.normal(size=(3, 7)), np.full((3, 7), 2e-3),
        10.0 * rng.normal(size=(7, 1)) + 1e-3 * rng.normal(size=(7, 4)),
    )  # fmt: skip
    y = mixture.mean[0] + mixture.loading @ rng.normal(size=4)
    ys, there = y + 2e-3 * rng.normal(size=(5, 7)), np.ones((5, 7), bool)
    of = lambda dtype: jax.tree.map(lambda x: jnp.asarray(x, dtype), (mixture, ys))
    found, exact = (log_probs(*of(dtype), there) for dtype in (jnp.float32, jnp.float64))
    # The values have 1e-6 of their digits left, which are 1e-2 of the standard deviation.
    np.testing.assert_allclose(found, exact, atol=0.1)


def test_a_gap_is_integrated_out(model):
    """The density of the second channel is that of both, integrated over the first."""
    x = np.linspace(-30.0, 40.0, MANY)
    both = model.log_prob(*with_last(np.stack([x, np.full_like(x, 30.0)], axis=1)))
    alone = model.log_prob(*with_last(np.array([[NAN, 30.0]])))[0]
    # The trapezoidal rule is exact to rounding but for the tails.
    assert np.trapezoid(np.exp(both - alone), x) == pytest.approx(1.0, abs=1e-6)


def test_later_values_do_not_change_the_density_of_earlier_ones(model):
    """The chain rule: that of a series less that of its past is a function of the last value."""
    longer = model.log_prob(*with_last(np.array([[5.0, 10.0], [5.0, -10.0]])))
    assert longer[0] != longer[1]
    cut = YS.copy()
    cut[:, 3:] = NAN
    halves = model.log_prob(TS, cut)
    short = np.pad(TS[:, :3], ((0, 0), (0, 3)), mode="edge"), cut
    np.testing.assert_allclose(halves, model.log_prob(*short), rtol=1e-12)


def test_padding_changes_nothing(model):
    padded = (
        np.pad(TS, ((0, 0), (0, 3)), mode="edge"),
        np.pad(YS, ((0, 0), (0, 3), (0, 0)), constant_values=NAN),
    )
    np.testing.assert_allclose(model.log_prob(*padded), model.log_prob(TS, YS), rtol=1e-12)
    np.testing.assert_array_equal(model.mean(*padded, AT), model.mean(TS, YS, AT))


def test_times_without_values_change_nothing(model):
    """On a common grid, most series have some: before the first observation, between and later."""
    before, after = TS[:, :1] - [[7.0]], TS[:, -1:] + 7.0
    between = TS[:, :1] + 0.9 * (TS[:, 1:2] - TS[:, :1])
    ts = np.concatenate([before, TS[:, :1], between, TS[:, 1:], after], axis=1)
    ys = np.insert(YS, [0, 1, 6], NAN, axis=1)
    np.testing.assert_allclose(model.log_prob(ts, ys), model.log_prob(TS, YS), rtol=1e-12)
    np.testing.assert_array_equal(model.mean(ts, ys, AT), model.mean(TS, YS, AT))


def test_a_jump_sees_the_time_since_the_last_value_that_was_read(model):
    """Of any channel. A value that a training step hides is as one that was not observed."""
    jump = lambda h, seen, key: jnp.zeros_like(h) + seen.gap
    network, ys = dataclasses.replace(model.params, jump=jump), np.arange(12.0).reshape(1, 6, 2)
    ys[0, 3, 1] = NAN
    readings = jax.tree.map(lambda leaf: leaf[0], model.units.readings(TS[:1], ys))
    is_read = readings.is_observed & (np.arange(6) != 4)[:, None]
    found = jax.jit(lambda *args: network.read(args[0], None, args[1])[0].h)(readings, is_read)
    gap = model.units.gap
    since = (TS[0, 5] - TS[0, 3]) / model.units.time
    np.testing.assert_allclose(found, np.log(since / gap + 0.01), rtol=1e-9)


def test_later_times_without_values_change_nothing(model):
    """However far away they are."""
    ys = YS.copy()
    ys[:, 5] = NAN
    near, far = TS.copy(), TS.copy()
    near[:, 5], far[:, 5] = near[:, 4], 1e6
    np.testing.assert_array_equal(model.log_prob(far, ys), model.log_prob(near, ys))
    np.testing.assert_array_equal(model.mean(far, ys, AT), model.mean(near, ys, AT))


def test_units_shift_the_density(of_context):
    """Training on scaled and shifted data gives the same model, up to rounding."""
    scale, shift = np.array([10.0, 0.01]), np.array([3.0, -4.0])
    moved, known = LEVELS * scale + shift, {"context": CONTEXT}
    other = trained(moved, context=CONTEXT, steps=60)
    lost = (~np.isnan(YS) * np.log(scale)).sum(axis=(1, 2))
    expected = of_context.log_prob(TS, LEVELS, **known) - lost
    # Standardization rounds differently, and training amplifies it.
    np.testing.assert_allclose(other.log_prob(TS, moved, **known), expected, atol=1e-6)
    mean = other.mean(TS, moved, AT, **known)
    expected = of_context.mean(TS, LEVELS, AT, **known) * scale + shift
    np.testing.assert_allclose(mean, expected, atol=1e-6, rtol=1e-6)


def test_quantiles_in_single_precision_reach_as_far(model):
    """A level of `1 - 1e-9` is 1 there."""
    levels = np.array([1e-9, 1 - 1e-9])
    expected = model.quantile(levels, TS, YS, AT)
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), model.params)
    with jax.enable_x64(False):
        found = Series(single, model.units).quantile(levels, TS, YS, AT)
        with pytest.raises(
            ValueError, match=r"\(q=...\): must be at least 1.2e-38, and as far from"
        ):
            model.quantile(1e-39, TS, YS, AT)
    spread = np.ptp(expected, axis=0).max(axis=(0, 1))
    assert (np.abs(found - expected) < 1e-4 * spread).all()


def test_draws_are_a_function_of_the_key_and_have_the_moments_of_the_density(model):
    key, some = jax.random.key(1), (TS[:3], YS[:3])
    draws = model.forecast(key, *some, AT, n=4000)
    assert draws.shape == (4000, 3, 3, 2)
    np.testing.assert_array_equal(draws, model.forecast(key, *some, AT, n=4000))
    assert (draws != model.forecast(jax.random.key(2), *some, AT, n=4000)).any()
    # Five standard errors of the mean of 4000 draws, at the first time, which has none before it.
    error = 5 * draws[:, :, 0].std(axis=0) / 4000**0.5
    assert (abs(draws[:, :, 0].mean(axis=0) - model.mean(TS, YS, AT)[:3, 0]) < error).all()
    low, high = model.quantile([0.25, 0.75], TS, YS, AT)[:, :3, 0]
    inside = ((draws[:, :, 0] > low) & (draws[:, :, 0] < high)).mean(axis=0)
    np.testing.assert_allclose(inside, 0.5, atol=5 * 0.5 / 4000**0.5)


def test_a_draw_follows_from_those_before_it(model):
    """Its mean is that of a series in which these were observed. Of a network that recalls the last
    value, with draws that have no limits."""
    i = next(i for i in range(1, 3) if TS[i, 4] == TS[i, 5])  # has a place for one more value
    limits = np.full(2, -1e3), np.full(2, 1e3)
    units = dataclasses.replace(model.units, limits=limits)
    recalls = (jnp.ones(2), jnp.full(2, -5.0))
    network = eqx.tree_at(lambda net: (net.recall, net.forget), model.params, recalls)
    recalling = Series(network, units)
    draws = recalling.forecast(jax.random.key(3), TS[:3], YS[:3], AT, n=4000)[:240, i]
    first, second = draws[:, 0], draws[:, 1]
    ts, ys, means = np.tile(TS[i], (24, 1)), np.tile(YS[i], (24, 1, 1)), []
    ts[:, 5] = AT[0]
    for some in np.split(first, 10):
        ys[:, 5] = some
        means.append(recalling.mean(ts, ys, np.full((24, 3), AT[1]))[:, 0])
    rest = second - np.concatenate(means)
    for product in (rest, (first - first.mean(axis=0)) * rest):
        # Five standard errors of 240 draws.
        assert (abs(product.mean(axis=0)) < 5 * product.std(axis=0) / 240**0.5).all()


def test_draws_stay_near_the_range_of_training(model):
    """Of a network whose last normal is as probable as the others and a thousand times as wide."""
    bias = model.params.density[1].bias.at[2].add(4.0).at[17:19].add(7.0)
    wide = model.with_params(eqx.tree_at(lambda net: net.density[1].bias, model.params, bias))
    ends = np.array([np.nanmin(YS, (0, 1)), np.nanmax(YS, (0, 1))])
    most = np.ptp(ends, axis=0) / 2
    draws = wide.forecast(jax.random.key(1), TS[:3], YS[:3], AT, n=4000)
    assert ((draws >= ends[0] - 1.001 * most) & (draws <= ends[1] + 1.001 * most)).all()
    at_an_end = np.isclose(draws, ends[0] - most) | np.isclose(draws, ends[1] + most)
    assert at_an_end.any(axis=3).mean() < 0.05  # about 1 in 3 without other tries


def test_forecasts_start_at_the_last_observation_of_each_row(model):
    """Rows may have times of their own."""
    each = AT + np.arange(len(TS))[:, None]
    means, states = model.mean(TS, YS, each), model.state(TS, YS, each)
    assert states.shape == (len(TS), 3, 8)
    assert (states[0, 0] != states[1, 0]).any()
    for i in range(3):
        np.testing.assert_allclose(model.mean(TS, YS, each[i])[i], means[i], rtol=1e-12)


def test_rows_of_later_times_may_be_padded_by_their_last_time(model):
    """And the forecast of a row is a function of that row alone."""
    at = np.repeat(AT[None], len(TS), axis=0)
    at[1], order = 3.5, np.roll(np.arange(len(TS)), 5)
    padded = model.mean(TS, YS, at)
    np.testing.assert_allclose(padded[1], np.repeat(padded[1, :1], 3, axis=0), rtol=1e-12)
    np.testing.assert_allclose(padded[1, 0], model.mean(TS, YS, AT)[1, 0], rtol=1e-12)
    np.testing.assert_allclose(model.mean(TS[order], YS[order], at[order]), padded[order])


def test_between_observations_the_state_follows_an_ode(model):
    network = model.params

    def field(t, h, network):
        (a, b), rate, turn = jnp.split(h, 2), jnp.exp(network.decay), jnp.exp(network.frequency)
        linear = jnp.concatenate([-rate * a - turn * b, turn * a - rate * b])
        return linear + network.push(h)

    h = jnp.asarray([0.3, -1.0, 2.0, 0.5])
    exact = jaxode.solve(field, h, 0.0, 0.4, network, rtol=1e-9, atol=1e-9).y1
    found = [network.flow(h, jnp.asarray(0.4), steps) - exact for steps in (8, 64)]
    errors = [float(jnp.abs(error).max()) for error in found]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(64, rel=0.2)  # of second order


def test_a_state_holds_the_last_values_and_how_recent_they_are(model):
    ys = YS.copy()
    ys[1, :, 1] = NAN  # never seen
    ys[1, 0, 0] = 5.0
    found = model.state(TS, ys, AT)
    assert found.shape == (len(TS), 3, 4 + 2 * 2)
    last, recency = np.split(found[:, :, 4:], 2, axis=2)
    place = lambda i, c: np.flatnonzero(~np.isnan(ys[i, :, c]))[-1]
    mean, sd, span = model.units.mean, model.units.sd, model.units.time
    for i, c in ((0, 0), (0, 1), (1, 0)):
        np.testing.assert_allclose(last[i, :, c], (ys[i, place(i, c), c] - mean[c]) / sd[c])
        np.testing.assert_allclose(recency[i, :, c], np.exp(-(AT - TS[i, place(i, c)]) / span))
    assert not found[1, :, [5, 7]].any()


def test_training_reads_observed_values_alone_and_often_fewer():
    there = ~np.isnan(YS)
    keys = jax.random.split(jax.random.key(0), len(there))
    fed = np.asarray(jax.jit(jax.vmap(fit_series.visible))(keys, there))
    assert not (fed & ~there).any()
    fewer = (fed < there).any(axis=(1, 2))
    assert fewer.mean() > 0.5


@pytest.mark.slow  # trains for 300 steps; the next test has what it begins with
def test_a_channel_that_stays_as_it_is_is_recalled():
    """Of a level of each series that 4 numbers of a state cannot hold for 6 channels."""
    rng = np.random.default_rng(0)
    ts = np.sort(rng.uniform(0.0, 3.0, (200, 6)), axis=1)
    ys = rng.normal(size=(200, 1, 6)) + 0.05 * rng.normal(size=(200, 6, 6))
    with jax.numpy_dtype_promotion("standard"):
        key, options = jax.random.key(0), {"steps": 300, "size": 4, "progress": False}
        model, _ = jaxode.series.fit(ts[:150], ys[:150], key=key, **options)
    past = ys[150:].copy()
    past[:, 5] = NAN
    at = ts[150:, 5:]
    error = model.mean(ts[150:], past, at) - ys[150:, 5:]
    assert np.sqrt(np.mean(error**2)) < 0.5  # 0.05 at best; the values have 1


def test_a_network_begins_with_what_it_recalls():
    """Of a level of each series, in the mean; and a value that is long past counts less."""
    rng = np.random.default_rng(0)
    level = rng.normal(size=(len(TS), 2))
    ys = np.where(np.isnan(YS), NAN, level[:, None] + 0.05 * rng.normal(size=YS.shape))
    model, both = untrained(TS, ys), (~np.isnan(YS)).any(axis=1).all(axis=1)
    mean = model.mean(TS, ys, AT)[:, 0]
    for c in range(2):  # The network adds a tenth of what it may learn.
        assert np.corrcoef(mean[both, c], level[both, c])[0, 1] > 0.9
    forgets = eqx.tree_at(lambda net: net.forget, model.params, jnp.full(2, 3.0))
    later = model.with_params(forgets).mean(TS, ys, AT)
    assert np.std(later[:, 2], axis=0).max() < 0.5 * np.std(mean, axis=0).min()


def test_it_survives_pickle(model):
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.log_prob(TS, YS), model.log_prob(TS, YS))


class OwnJump(eqx.Module):
    """Adds a product of the surprises."""

    weight: jax.Array

    def __call__(self, h, seen, key):
        return h + self.weight @ seen.surprise


def own_networks():
    key = jax.random.key(0)
    return {"field": eqx.nn.Linear(4, 4, key=key), "jump": OwnJump(jnp.ones((4, 2)))}


def test_networks_of_ones_own_take_the_place_of_those_of_the_library(model):
    networks = own_networks()
    other = model.with_params(fit_series._with_modules(model.params, **networks))
    assert (other.params.push, other.params.jump) == (networks["field"], networks["jump"])
    again = pickle.loads(pickle.dumps(other))
    found = other.log_prob(TS, YS)
    assert np.isfinite(found).all()
    assert (found != model.log_prob(TS, YS)).all()
    np.testing.assert_array_equal(again.log_prob(TS, YS), found)


@pytest.mark.slow  # compiles a training of its own
def test_networks_of_ones_own_are_trained_and_pickled():
    networks = own_networks()
    model = trained(steps=100, **networks)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.log_prob(TS, YS), model.log_prob(TS, YS))
    pairs = (again.params.push, networks["field"]), (again.params.jump, networks["jump"])
    for found, before in pairs:
        assert type(found) is type(before)
        assert np.all(found.weight != before.weight)


@pytest.mark.slow  # compiles a training for two devices, which no other test shares
def test_several_devices_train_the_model_of_one(of_context):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "rows")
    found, known = trained(LEVELS, context=CONTEXT, steps=60, mesh=mesh), {"context": CONTEXT}
    # Sums in parts, in 60 steps of double precision.
    expected = of_context.log_prob(TS, LEVELS, **known)
    np.testing.assert_allclose(found.log_prob(TS, LEVELS, **known), expected, rtol=1e-7)


def test_recall_starts_where_it_forecasts_best():
    """Of a level that stays, of one that decays at a rate of the grid, and of noise."""
    rng = np.random.default_rng(0)
    ts = np.tile(np.linspace(0.0, 1.0, 11), (2000, 1))
    ys = rng.normal(size=(2000, 11, 3))
    ys[:, :, 0] = ys[:, :1, 0] + 0.5 * rng.normal(size=(2000, 11))
    keep = np.exp(-0.1 * np.exp(0.5))
    for i in range(1, 11):
        ys[:, i, 1] = keep * ys[:, i - 1, 1] + np.sqrt(1 - keep**2) * ys[:, i, 1]
    part, log_rate = recalled(Units.from_series(ts, ys, None).readings(ts, ys))
    # The part of a value that is left after a gap. Of noise, a fast rate and its part say little
    # alone.
    left = part * np.exp(-0.1 * np.exp(log_rate))
    np.testing.assert_allclose(left, [0.8, keep, 0.0], atol=0.05)
    assert log_rate[0] < -2
    assert log_rate[1] == pytest.approx(0.5)


def test_context_moves_the_start(of_context):
    """A context that decides the level of a series is worth nats; without it, it is refused."""
    of = lambda context: of_context.log_prob(TS, LEVELS, context=context).mean()
    assert of(CONTEXT) > of(1 - CONTEXT)
    with pytest.raises(ValueError, match=r"log_prob\(context=...\): must be given, with 1 .*none"):
        of(None)
    with pytest.raises(ValueError, match=r"must be given, with 1 columns, .* got shape"):
        of(np.ones((len(TS), 2)))


def test_training_is_better_than_its_start_and_shows_so(of_context):
    """In nats of a value, on the series that it trained on and those that it did not."""
    units = of_context.units
    starts = recalled(units.readings(TS, LEVELS))
    network = SeriesNetwork.make(
        jax.random.key(0), 1, 4, units.gap, starts, fit_series.SERIES_DROPOUT
    )
    before = of_context.with_params(network).log_prob(TS, LEVELS, context=CONTEXT)
    after = of_context.log_prob(TS, LEVELS, context=CONTEXT)
    assert (after - before).sum() / np.count_nonzero(~np.isnan(YS)) > 0.1


LINES = {
    "patient": ["b", "a", "b", "a", "a"],
    "hour": [2.0, 0.0, 1.0, 5.0, 3.0],
    "pulse": [80, 60, 70, 63, 62],
    "ph": [7.1, NAN, 7.3, NAN, 7.4],
}


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames(library):
    frame = pytest.importorskip(library).DataFrame(LINES)
    ts, ys = jaxode.series.from_frame(frame, row="patient", time="hour")
    np.testing.assert_array_equal(ts, [[1, 2, 2], [0, 3, 5]])
    np.testing.assert_array_equal(ys[0], [[70, 7.3], [80, 7.1], [NAN, NAN]])
    np.testing.assert_array_equal(ys[1], [[60, NAN], [62, 7.4], [63, NAN]])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_large_identifiers_tell_series_apart(library):
    numbers = [{"a": 2**53, "b": 2**53 + 1}[name] for name in LINES["patient"]]
    make = pytest.importorskip(library).DataFrame
    found = jaxode.series.from_frame(make(LINES | {"patient": numbers}), row="patient", time="hour")
    expected = jaxode.series.from_frame(make(LINES), row="patient", time="hour")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


FRAMES = {
    "twice": ({"hour": [2.0, 0.0, 1.0, 0.0, 3.0]}, "each time of a series once; got 0 twice in pa"),
    "no time": (
        {"hour": [2.0, NAN, 1.0, 0.0, 3.0]},
        "must have a value of 'hour' in each line; got none in line 1",
    ),
    "text": ({"ph": list("vwxyz")}, "column 'ph' must hold numbers; got text or booleans. Encode"),
    "numbers as text": (
        {"ph": ["7.1", "7", "n/a", "7.2", "7"]},
        r"got text or booleans. If it .* pandas.to_numeric\(frame\['ph'\], errors='coerce'\)",
    ),
    "booleans": ({"ph": [True] * 5}, "column 'ph' must hold numbers; got text or booleans. Encode"),
    "dates": (
        {"hour": pd.date_range("2020-01-01", periods=5, freq="h")},
        "column 'hour' must hold numbers; got dates. Pass the hours",
    ),
    "words": ({"hour": list("vwxyz")}, "column 'hour' must hold numbers; got text"),
}


@pytest.mark.parametrize(("change", "match"), FRAMES.values(), ids=FRAMES)
def test_wrong_frames(change, match):
    frame = pytest.importorskip("pandas").DataFrame(LINES | change)
    with pytest.raises((TypeError, ValueError), match=match):
        jaxode.series.from_frame(frame, row="patient", time="hour")


def test_the_column_of_times_does_not_tell_series_apart():
    frame = pd.DataFrame(LINES).drop(columns="patient")
    with pytest.raises(ValueError, match=r"from_frame\(time=...\): must be another .* got 'hour'"):
        jaxode.series.from_frame(frame, row="hour", time="hour")


def changed(x: np.ndarray, where, value) -> np.ndarray:
    x = x.copy()
    x[where] = value
    return x


WRONG = {
    "order": (changed(TS, (2, 1), -1.0), YS, {}, r"\(ts=...\): must increase within .* row 2"),
    "repeated": (changed(TS, (2, 1), TS[2, 0]), YS, {}, "got .* and then .* in row 2. Sort the"),
    "seconds since 1970": (
        (1.7e9 + TS).astype("f4"), YS, {}, "got 1700000000 and then 1700000000 in row 0. In "
        "float32, times of that size are 128 apart: subtract the start",
    ),
    "time": (changed(TS, (3, 1), NAN), YS, {}, "finite; got nan in row 3, at place 1. Pad"),
    "dates": (TS.astype("M8[h]"), YS, {}, r"\(ts=...\): must be numbers; got dates. Pass hours"),
    "empty": (TS, changed(YS, 4, NAN), {}, "observation in each row; got none in row 4"),
    "unseen": (TS, changed(YS, (..., 1), NAN), {}, "different values .*; got none in channel 1"),
    "constant": (TS, YS * [1.0, 0.0], {}, "got only 0 in channel 1"),
    "infinite": (TS, changed(YS, (1, 2, 0), np.inf), {}, "got inf in row 1, channel 0. Leave"),
    "shape": (TS, YS[:, :, 0], {}, r"channels\] .* shape \(24, 6\). For a single channel, pass"),
    "shared times": (TS[0], YS, {}, r"\(24, 6, 2\). For times .* np.broadcast_to\(ts, ys.shape"),
    "shared, one channel": (TS[0], YS[:, :, 0], {}, r"ys.shape\[:2\]\) and ys\[:, :, None\]"),
    "too few times": (TS[:, :5], YS, {}, r"\(24, 6, 2\). Pass a time for each row and time of ys"),
    "one row": (TS[:1], YS[:1], {}, "at least three series, .* got 1"),
    "one time": (TS[:, :1], YS[:, :1], {}, "two observed times in"),
    "validation": (TS, YS, {"validation": 1.0}, r"\(validation=...\): must be between 0 and 1"),
    "context": (TS, YS, {"context": np.ones(24)}, r"\(context=...\): must be finite"),
    "field": (TS, YS, {"field": jnp.sum}, r"\(field=...\): must return an array float64\[32\], as"),
    "jump": (TS, YS, {"jump": lambda h, *_: h[1:]}, r"\(jump=...\): must return an array float"),
    "mesh": (TS, YS, {"mesh": 2}, r"\(mesh=...\): must be a mesh of JAX, or None"),
}  # fmt: skip


@pytest.mark.parametrize(("ts", "ys", "options", "match"), WRONG.values(), ids=WRONG)
def test_wrong_series(ts, ys, options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        jaxode.series.fit(ts, ys, key=jax.random.key(0), steps=1, progress=False, **options)


AHEAD = {
    "past": (
        [1e-3],
        "must not lie before the last observation of a row; got 0.001 in row 0, whose",
    ),
    "order": ([5.0, 4.0], "must increase; got 5 and then 4 in row 0"),
    "repeated": ([4.0, 4.0, 5.0], "must increase; got 4 and then 4 in row 0. Sort the times"),
    "infinite": ([5.0, np.inf], "must be finite; got inf in row 0. Pad a row"),
    "unit": ([1e9], "must go on by at most .* times the longest gap .* got 1e\\+09 in row 0. Pass"),
    "shape": (np.ones((7, 2)), r"must be \[times\], or \[rows, times\] with 24 rows as in ts"),
}


@pytest.mark.parametrize(("at", "match"), AHEAD.values(), ids=AHEAD)
def test_wrong_times_of_forecasts(model, at, match):
    with pytest.raises(ValueError, match=r"Series.mean\(at=...\): " + match):
        model.mean(TS, YS, at)


def test_wrong_levels_and_channels(model):
    with pytest.raises(ValueError, match=r"Series.quantile\(q=...\): must lie between 0 and 1"):
        model.quantile(1.0, TS, YS, AT)
    with pytest.raises(ValueError, match=r"must have 2 channels, as in training; got 1"):
        model.log_prob(TS, YS[:, :, :1])
