"""`fit` on an iterable of arrays of rows."""

import itertools

import fitting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from fitting import cheap, cheap_of_contexts, number

from jaxode.training import steps
from jaxode.training.dataset import DataArguments, Dataset, datasets_of_members
from jaxode.training.dequantization import Dequantization
from jaxode.training.iterators import HEAD_ROWS, NoRowsLeftError, Stream, is_stream
from jaxode.training.loop import STEPS_PER_BLOCK
from jaxode.training.sources import FromIterable, InMemory, Rows

pytestmark = pytest.mark.usefixtures("default_settings")
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NUMBERS = np.arange(10_000, dtype=np.float32)[:, None]
ROWS = RNG.normal(size=(4000, 2)).astype(np.float32) + np.array([3, 0], np.float32)


def parts(x, size=700):
    return [x[i : i + size] for i in range(0, len(x), size)]


class Loader:
    """Starts again with each `iter`, as those of PyTorch do, and gives lists."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __iter__(self):
        return map(list, zip(*map(parts, self.arrays), strict=True))


def stream(arrays):
    return Stream(arrays, lambda x, context: Rows(np.asarray(x), context))


@pytest.mark.parametrize("count", [10, 700, 1234, 9999])
def test_rows_come_in_their_order_and_none_is_lost(count):
    of = stream(itertools.cycle(parts(NUMBERS)))
    taken = np.concatenate([of.next(count).x[:, 0] for _ in range(5)])
    np.testing.assert_array_equal(taken, np.resize(NUMBERS[:, 0], 5 * count))
    of.close()


def test_an_iterable_starts_again_and_an_iterator_ends():
    of = stream(parts(NUMBERS))
    assert [len(of.next(6000).x) for _ in range(10)] == [6000] * 10
    of.close()
    of = stream(iter(parts(NUMBERS)))
    of.next(6000)
    with pytest.raises(NoRowsLeftError) as ended:
        of.next(6000)
    assert ended.value.count == 6000
    of.close()


def test_no_more_is_read_than_the_head_and_the_next_rows():
    read = []
    of = stream(read.append(i) or NUMBERS for i in itertools.count())
    assert len(read) == HEAD_ROWS // len(NUMBERS)
    of.next(5000)
    of.close()
    assert len(read) <= HEAD_ROWS // len(NUMBERS) + 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (ROWS, False), (ROWS.tolist(), False), (list(ROWS[:, 0]), False), ([], False),
        ({"x": ROWS}, False), ("text", False), (3.0, False),
        (parts(ROWS), True), ([(ROWS, ROWS)], True), (iter([]), True), (Loader(ROWS), True),
    ],
)  # fmt: skip
def test_what_is_an_iterable_of_rows(x, expected):
    assert is_stream(x) is expected


def fit(x, density=None, **options):
    density = cheap(params=number(0.6), standardize=None) if density is None else density
    return fitting.fit(density, x, **{"validation": ROWS[:100]} | options)


def test_it_trains_on_a_loader():
    density, history = fit(Loader(ROWS[500:]), steps=400, time_power=1.0)
    exact = -scipy.stats.norm.logpdf(ROWS[:100], [3.0, 0.0]).sum(1).mean()
    assert history[0].nats > exact + 0.3
    assert history[-1].nats < exact + 0.1
    np.testing.assert_allclose(density.from_flow(np.zeros(2)), [3.0, 0.0], atol=0.15)


def test_contexts_come_with_their_rows():
    density = cheap_of_contexts(standardize=None, context_shape=(1,))
    validation = ROWS[:100], ROWS[:100, :1]
    arguments = DataArguments(Loader(ROWS, ROWS[:, :1]), validation=validation)
    (dataset,) = datasets_of_members(density, arguments, KEY)
    take, aside, _ = dataset.in_flow(density, dataset.validation, KEY, 3200)
    for rows in (take(KEY), take(KEY), aside):
        np.testing.assert_array_equal(rows.context, rows.x[:, :1])
    assert len(take(KEY).x) == 3200
    dataset.source.close()


def test_the_best_so_far_is_kept_when_an_iterator_ends():
    with pytest.warns(UserWarning, match="training ended with the iterator, after 9600 rows"):
        _, history = fit((ROWS for _ in range(3)), steps=500)
    assert history[-1].step == 150


def test_an_iterator_that_ends_before_training_raises():
    with pytest.raises(ValueError, match="must give the rows of 50 batches of 64, which training"):
        fit(iter([ROWS[:3000]]), steps=500)


def test_steps_use_each_row_once():
    """The sum of all steps is that of all rows."""
    numbers = RNG.normal(size=(STEPS_PER_BLOCK * 8, 2)).astype(np.float32)
    source = FromIterable(stream(iter([ROWS[:1], numbers])), InMemory(Rows(ROWS, None)))
    source.stream.next(1)
    dataset = Dataset(source, Rows(ROWS[:9], None), Dequantization(np.zeros(2, bool)))
    density = cheap(standardize=(0.0, 1.0))
    take, _, _ = dataset.in_flow(density, dataset.validation, KEY, len(numbers))
    rows = take(KEY)
    assert (np.asarray(rows.x) != numbers).any()
    loss = lambda params, x, context, key: jnp.sum(params * x)
    start, optimizer = jnp.zeros(2), optax.sgd(1.0)
    program = steps.Program(loss, optimizer, 8, None, steps.unchanged, in_order=True)
    state = steps.TrainingState(start, start, optimizer.init(start), jnp.zeros((), jnp.int32))
    rates = jnp.ones(()), jnp.ones((), jnp.int32)
    state = steps.advance(program, state, rates, rows, KEY, jnp.array([0, STEPS_PER_BLOCK]))
    np.testing.assert_allclose(-state.arrays, numbers.sum(axis=0), rtol=1e-4)
    source.close()


class Unlike:
    """Gives an array of another shape after some."""

    def __init__(self, other):
        self.other = other

    def __iter__(self):
        return iter([*[ROWS] * 5, self.other])


class Again:
    """Gives an array at first, and another each time that it starts again."""

    def __init__(self, first, other):
        self.first, self.other = first, other

    def __iter__(self):
        yield self.first
        self.first = self.other


class Endless:
    """Gives one thing again and again, a hundred times at most."""

    def __init__(self, thing):
        self.thing = thing

    def __iter__(self):
        for _ in range(100):
            yield self.thing
        raise AssertionError("read on after a thing that is no array of rows")


LONG = {"steps": 500}  # which read more than five arrays


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (Unlike(ROWS[:, :1]), LONG, r"must have shape \[rows, 2\].*\(4000, 1\)\. It is array 6"),
        (Unlike(ROWS * np.nan), LONG, r"must be finite.*It is array 6 of the iterable"),
        (Unlike((ROWS, ROWS)), LONG, r"contexts of one shape; got \(2,\) after None"),
        (Unlike((ROWS, ROWS, ROWS)), LONG, r"or pairs \(x, context\); got 3 parts"),
        (Loader(ROWS), {"validation": 0.1}, r"rows of their own where x is an iterable"),
        (Loader(ROWS), {"context": ROWS}, r"must be left out where x is an iterable"),
        (iter([]), {}, r"must give arrays of rows; got an iterable without any"),
        (Endless({"x": ROWS}), {}, r"got a dict|must be an array"),
        (Endless(ROWS[:0]), {}, r"at least 1 row; got .*\(0, 2\)\. It is array 1"),
        (Again(ROWS, ROWS[:0]), {}, r"at least 1 row; got .*\(0, 2\)\. It is array 2"),
    ],
)
def test_wrong_iterables(x, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        fit(x, **options)
