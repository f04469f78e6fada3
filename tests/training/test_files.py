"""Tables of more than 100,000 rows: nothing is copied, and steps read their own rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from fitting import cheap, fit, number

import jaxode
from jaxode.training.dataset import DataArguments, datasets_of_members
from jaxode.training.files import MAX_ROWS_COPIED, Without

pytestmark = pytest.mark.usefixtures("default_settings")
KEY = jax.random.key(0)
COUNT = MAX_ROWS_COPIED + 20_000
RNG = np.random.default_rng(0)
TABLE = (RNG.normal(size=(COUNT, 2)) + np.array([3.0, 0.0])).astype(np.float32)


def bound(size=2, context_size=0, **options):
    network = jaxode.nn.Residual(size, 8, 1, key=KEY, context_size=context_size)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(size))
    return jaxode.bind(flow, network, **options)


def posed(x=TABLE, context=None, dequantize=False, density=None):
    arguments = DataArguments(x, context, dequantize=dequantize)
    (dataset,) = datasets_of_members(density or bound(), arguments, KEY)
    return dataset


def test_rows_are_those_of_a_copy_without_some():
    aside = np.array([0, 3, 4, 9])
    rows = Without(np.arange(10), aside, np.int32)
    assert len(rows) == 6
    np.testing.assert_array_equal(rows[np.arange(6)], np.delete(np.arange(10), aside))


def test_a_large_table_is_not_copied_and_rows_set_aside_are_not_drawn():
    dataset = posed()
    rows, aside = dataset.source.rows.x, dataset.validation.x
    assert rows.array is TABLE
    assert len(aside) == len(rows.aside) == 1000
    np.testing.assert_array_equal(TABLE[rows.aside], aside)
    everything = rows[np.arange(len(rows))]
    np.testing.assert_array_equal(everything, np.delete(TABLE, rows.aside, axis=0))


def test_maps_see_all_rows_that_are_left_of_few_more_than_large():
    dataset = posed(TABLE[: MAX_ROWS_COPIED + 500])
    assert len(dataset.sample(KEY).x) == MAX_ROWS_COPIED - 500


def test_steps_get_other_rows_with_their_contexts():
    context = TABLE.sum(axis=1, keepdims=True)
    density = bound(context_size=1, context_shape=(1,))
    dataset = posed(context=context, density=density)
    take, aside, log_det = dataset.in_flow(density, dataset.validation, KEY, 64)
    first, second = take(KEY), take(jax.random.key(1))
    assert first.x.shape == (64, 2)
    assert not (first.x == second.x).any()
    np.testing.assert_allclose(first.x.sum(axis=1), first.context[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(aside.x, dataset.validation.x)
    assert log_det == 0.0


def test_it_trains_from_a_file(tmp_path):
    np.save(tmp_path / "rows.npy", TABLE)
    x = np.load(tmp_path / "rows.npy", mmap_mode="r")
    start = cheap(params=number(0.6), standardize=None)
    density, history = fit(start, x, validation=TABLE[:100], steps=400, time_power=1.0)
    exact = -scipy.stats.norm.logpdf(TABLE[:100], [3.0, 0.0]).sum(1).mean()
    assert history[0].nats > exact + 0.3
    assert abs(history[-1].nats - exact) < 0.1
    np.testing.assert_allclose(density.from_flow(np.zeros(2)), [3.0, 0.0], atol=0.1)


def test_validation_rows_may_be_a_large_table_too():
    arguments = DataArguments(TABLE, validation=TABLE.astype(np.float64))
    (dataset,) = datasets_of_members(bound(), arguments, KEY)
    assert dataset.source.count == COUNT
    assert len(dataset.validation.x) == 1000
    assert dataset.validation.x.dtype == np.float32


def test_integers_get_noise():
    levels = RNG.integers(0, 3, (COUNT, 1))
    x: Any = np.concatenate([levels, levels[::-1]], 1)
    dataset = posed(x, dequantize=True)
    take, _, _ = dataset.in_flow(bound(), dataset.validation, KEY, 512)
    x = take(KEY).x
    assert x.dtype == jnp.zeros(()).dtype
    assert not (x == jnp.round(x)).any()
    assert set(np.unique(np.floor(x)).tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize(
    ("row", "value", "options", "words"),
    [
        (110_000, np.nan, {}, "1 of 120000 rows, first in row 110000"),
        (110_000, 99.0, {"support": (-50.0, 50.0)}, "1 of 120000 rows, first in row 110000"),
        (50, np.nan, {}, "first in row 50"),
    ],
)
def test_messages_count_rows_from_the_first(row, value, options, words):
    x = TABLE.copy()
    x[row, 0] = value
    with pytest.raises(ValueError, match=words):
        posed(x, density=bound(**options))
