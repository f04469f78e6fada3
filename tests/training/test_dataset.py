"""The rows that `fit` trains on: set aside, dequantized, mapped, and warned of."""

import fitting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fitting import (
    BENT,
    CONTEXT,
    INTEGERS,
    LOGNORMAL,
    OTHERS,
    ROWS,
    Machine,
    bound,
    cheap,
    equal,
    fit,
    on,
    score,
)
from helpers import Frame

import jaxode
from jaxode.density.noise import log_density
from jaxode.training import validations
from jaxode.training.column_warnings import warn_of_columns
from jaxode.training.dataset import (
    DataArguments,
    checked_rows,
    datasets_of_members,
    set_aside,
)
from jaxode.training.devices import Devices
from jaxode.training.sources import Rows

pytestmark = pytest.mark.usefixtures("default_settings")
KEY = jax.random.key(0)


def dataset_of(density, x, *, context=None, validation=0.1, dequantize=True):
    arguments = DataArguments(x, context, validation=validation, dequantize=dequantize)
    (dataset,) = datasets_of_members(density, arguments, KEY)
    return dataset


@pytest.mark.parametrize("part", [0.1, 0.25, 0.999, np.float32(0.5)])
def test_rows_are_set_aside(part):
    """Each row is on one side, with its context."""
    x, context = np.arange(40.0).reshape(20, 2), {"row": np.arange(20)}
    together = checked_rows("x", bound(context_shape=()), x, context, False)
    ((source, aside, _),) = set_aside(together, part, KEY)
    rows = source.whole()
    assert len(aside[0]) == min(np.ceil(20 * part), 18)
    both = np.concatenate([rows[0], aside[0]])
    labels = np.concatenate([rows[1]["row"], aside[1]["row"]])
    np.testing.assert_array_equal(both, x[labels])
    assert (labels != np.arange(20)).any()
    np.testing.assert_array_equal(np.sort(labels), np.arange(20))


def test_rows_keep_their_precision_beside_validation_rows_of_another():
    """Which may be few."""
    density = bound()
    jax.config.update("jax_enable_x64", True)
    x = BENT.astype(np.float32)
    dataset = dataset_of(density, x, validation=OTHERS[:2], dequantize=False)
    take, aside, _ = dataset.in_flow(density, dataset.validation, KEY, ROWS)
    assert dataset.validation.x.dtype == np.float64
    assert take(KEY).x.dtype == aside.x.dtype == np.float32
    assert aside.x.shape == (2, 2)


def test_tables_are_data_and_contexts():
    of = lambda kind: dataset_of(
        bound(context_shape=(1,)), kind(BENT), context=kind(CONTEXT[:200]),
        validation=(kind(OTHERS), kind(CONTEXT[200:])),
    )  # fmt: skip
    sides = lambda dataset: (dataset.source.whole(), dataset.validation)
    assert equal(sides(of(Frame)), sides(of(np.asarray)))


AROUND = {
    "a support": {"support": (0.0, np.inf), "standardize": None},
    "a map": {"standardize": jaxode.standardize.normal(LOGNORMAL)},
    "no map": {"standardize": None},
    "units": {"standardize": (0.0, 3.0)},
}


@pytest.mark.parametrize("name", AROUND)
def test_looks_are_in_the_units_of_the_data(name):
    rows, others = LOGNORMAL[:200], LOGNORMAL[200:]
    density = cheap(**AROUND[name])
    dataset = dataset_of(density, rows, validation=others, dequantize=False)
    _, aside, log_det = dataset.in_flow(density, dataset.validation, KEY, ROWS)
    look = validations.evaluation(density, aside, log_det, KEY, Devices())
    np.testing.assert_allclose(look(density.params), score(density, others), rtol=1e-5)


def test_looks_in_many_dimensions_take_no_closed_form_that_was_not_asked_for():
    """As the audit advises: of a field whose closed form is wrong."""

    def wrong(t, z, args):
        return args * z

    wrong.value_and_divergence = lambda t, z, args: (args * z, jnp.asarray(1e6, z.dtype))
    n = validations.MAX_EXACT_DIMENSIONS + 1
    exact = jaxode.divergence.exact()
    flow = jaxode.cnf(wrong, jaxode.standard_normal(n), divergence=exact, steps=4)
    density = jaxode.bind(flow, 0.1, standardize=(0.0, 1.0))
    rows = Rows(jnp.zeros((40, n)), None)
    look = validations.evaluation(density, rows, 0.0, KEY, Devices())
    assert abs(look(density.params)) < 100


EVEN = np.linspace(-2.0, 2.0, ROWS)
WAVE = np.sin(40 * EVEN)
LONG = np.linspace(-1.0, 1.0, 100 * ROWS)
ATOMS, PLANE = "repeat values, as integers", "depend on each other linearly"
# The columns of a table, and which of them are told of as what.
WARNED = {
    "ordinary": ([EVEN, WAVE, np.exp(EVEN), np.tan(0.7 * EVEN)], []),
    "many values, each rarely": ([np.arange(ROWS) // 2, WAVE], []),
    "zero, or any number": ([EVEN, np.maximum(WAVE, 0)], [("1", ATOMS)]),
    "the sum of others": ([EVEN, np.exp(EVEN), WAVE, 1 - EVEN + WAVE], [("0, 2, 3", PLANE)]),
    "nearly a sum": ([EVEN, WAVE, EVEN + WAVE + 1e-2 * np.exp(EVEN)], []),
    "in other units": ([1e-20 * EVEN, WAVE, 1e6 + 1e20 * EVEN], [("0, 2", PLANE)]),
    "both": ([np.round(EVEN), WAVE, 2 * WAVE], [("0", ATOMS), ("1, 2", PLANE)]),
    "many": (
        [np.round(np.sin((i + 1) * EVEN)) for i in range(12)],
        [("0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more", ATOMS)],
    ),
    "a part of many rows": (
        [np.repeat(np.round(EVEN), 100), np.repeat(WAVE, 100) + LONG,
         np.repeat(WAVE, 100) + 2 * LONG, LONG],
        [("0", ATOMS), ("1, 2, 3", PLANE)],
    ),
    "as many rows as columns": ([*np.random.default_rng(0).normal(size=(12, 12))], []),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNED)
def test_warnings_of_columns(name, recwarn):
    columns, expected = WARNED[name]
    table = np.stack(columns, 1).astype(np.float32)
    warn_of_columns(table, np.arange(0))
    warn_of_columns(table, np.arange(len(columns)))
    messages = [str(warning.message) for warning in recwarn]
    for message, (which, what) in zip(messages, expected, strict=True):
        assert message.startswith(f"fit(x=...): columns {which} (counting from 0) {what}")


def test_columns_are_named_as_in_the_table(monkeypatch):
    """Also where integers before them get noise. The warning points to the call of `fit`."""
    Machine(monkeypatch)
    table = np.stack([INTEGERS[:, 0], np.round(INTEGERS[:, 1]) / 2], 1)
    with pytest.warns(UserWarning, match=r"^fit\(x=...\): columns 1 \(counting") as caught:
        fit(x=table[:200], validation=table[200:], dequantize=True, steps=50)
    assert caught[0].filename == fitting.__file__


def test_centred_particles_do_not_depend_on_each_other(recwarn, monkeypatch):
    Machine(monkeypatch)
    x = np.random.default_rng(0).normal(size=(50, 3, 2))
    density = jaxode.bind(jaxode.cnf(fitting.scaled, jaxode.centered_normal(3, 2)), 0.1)
    fit(density, x - x.mean(1, keepdims=True), steps=1)
    assert not list(recwarn)


def test_validation_rows_that_have_noise_get_no_more():
    """Integers do. A column with a single other number, in either part, is none of integers."""
    for others in INTEGERS[200:], INTEGERS[200:] + np.array([0.25, 0.0]):
        dataset = dataset_of(on((0.0, -9.0), (8.0, 9.0)), INTEGERS[:200], validation=others)
        seen = np.asarray(dataset.noise.add(dataset.validation, KEY).x)
        assert (seen == dataset.validation.x).all() == (others[0, 0] % 1 > 0)
    rows = checked_rows("x", bound(), INTEGERS, None, True)
    ((source, aside, _),) = set_aside(rows, 0.1, KEY)
    for part in source.whole(), aside:
        almost = INTEGERS.copy()
        almost[INTEGERS[:, 1].astype(part.x.dtype) == part.x[0, 1], 0] += 0.5
        with pytest.warns(UserWarning, match="repeat values"):
            assert not dataset_of(bound(), almost).noise.exists


def test_validations_subtract_the_density_of_the_noise():
    """Of rows set aside, and not of noise that given ones have."""
    density, noisy = cheap(standardize=(0.0, 3.0)), INTEGERS[200:] + np.array([0.25, 0.0])
    for others in INTEGERS[200:], noisy:
        dataset = dataset_of(density, INTEGERS[:200], validation=others, dequantize="normal")
        seen = dataset.noise.add(dataset.validation, KEY)
        *_, log_det = dataset.in_flow(density, seen, KEY, ROWS)
        noise = (np.asarray(seen.x) - dataset.validation.x)[:, :1]
        has_noise = others[0, 0] % 1 == 0
        expected = float(log_density("normal", noise, noise).mean()) if has_noise else 0.0
        assert abs(expected) > 0.1 or not has_noise
        np.testing.assert_allclose(log_det, -2 * np.log(3) - expected, rtol=1e-5)


def test_noise_of_a_level_that_the_data_lack_raises():
    with pytest.raises(
        ValueError, match=r"must name levels, whole numbers from -7 to 7; got \[9\]"
    ):
        dataset_of(cheap(), INTEGERS, dequantize=(0, 9))
    assert dataset_of(cheap(), INTEGERS, dequantize=(0, 7)).noise.kind == (0.0, 7.0)


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-24])
def test_noise_never_reaches_a_bound(noise, monkeypatch):
    """Which would end a training, by chance."""
    dataset = dataset_of(on((0.0, -9.0), (8.0, 9.0)), INTEGERS)
    extreme = lambda key, shape, dtype: jnp.full(shape, noise, dtype)
    monkeypatch.setattr(jax.random, "uniform", extreme)
    whole, noisy = dataset.source.whole().x, np.asarray(dataset.sample(KEY).x)
    assert (noisy[:, 0] > whole[:, 0]).all()
    assert (noisy[:, 0] < whole[:, 0] + 1).all()
    np.testing.assert_array_equal(noisy[:, 1], whole[:, 1])


def test_integers_beside_which_noise_is_lost():
    x = np.stack([INTEGERS[:, 0], 1e6 + np.arange(ROWS), 1e7 + np.arange(ROWS)], 1)
    with pytest.warns(UserWarning, match=r"^fit\(dequantize=True\): columns 2 .* in float32, so"):
        dataset = dataset_of(bound(3, standardize=x), x)
    assert dataset.noise.columns.tolist() == [True, True, False]
    noisy = np.asarray(dataset.sample(KEY).x)
    assert (noisy[:, :2] != np.round(noisy[:, :2])).all()
    np.testing.assert_array_equal(noisy[:, 2], dataset.source.whole().x[:, 2])


def test_noise_is_drawn_for_as_many_rows_as_are_needed():
    """Anew for each key, and uniform in (0, 1)."""
    density = bound(standardize=(0.0, 1.0))
    dataset = dataset_of(density, INTEGERS)
    take, *_ = dataset.in_flow(density, dataset.validation, KEY, 100)
    some = take(KEY).x
    assert some.shape == (100, 2)
    assert not np.array_equal(some, take(jax.random.key(3)).x)
    noise = np.sort(some[:, 0] % 1)
    np.testing.assert_allclose(noise, np.linspace(0, 1, 100), atol=0.2)
