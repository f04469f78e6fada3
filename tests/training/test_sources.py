"""Sources of rows: arrays, tables in a file, iterables, and the share of a process."""

import jax
import numpy as np
import pytest

from jaxode.training.devices import Devices
from jaxode.training.files import Without
from jaxode.training.iterators import Stream
from jaxode.training.sources import FromIterable, InFile, InMemory, Rows, Share

pytestmark = pytest.mark.usefixtures("default_settings")
KEY, COUNT = jax.random.key(0), 60
X = np.arange(2.0 * COUNT).reshape(COUNT, 2)
ROWS = Rows(X, X.sum(axis=1))


def in_file(**options):
    nothing = np.arange(0)
    return InFile(Rows(*(Without(leaf, nothing, leaf.dtype) for leaf in ROWS)), **options)


def from_iterable():
    stream = Stream([(X[:20], X[:20].sum(axis=1)), (X[20:], X[20:].sum(axis=1))], Rows)
    return FromIterable(stream, InMemory(ROWS))


# Each source, whether steps use its rows in order, and whether they are mapped at once.
SOURCES = {
    "memory": (lambda: InMemory(ROWS), False, True),
    "file": (in_file, False, False),
    "iterable": (from_iterable, True, False),
    "share": (lambda: Share(in_file(exact=True), Devices()), False, False),
    "share of an iterable": (lambda: Share(from_iterable(), Devices()), True, False),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_keep_the_protocol(name):
    make, in_order, at_once = SOURCES[name]
    source = make()
    assert source.count == COUNT
    assert source.in_order == in_order
    assert (source.whole() is not None) == at_once
    sample = source.sample(COUNT).x
    np.testing.assert_array_equal(np.sort(sample[:, 0]), X[:, 0])
    rows = source.take(KEY, 16)
    assert rows.x.shape == (16, 2)
    np.testing.assert_array_equal(rows.x.sum(axis=1), rows.context)
    source.close()


@pytest.mark.parametrize("exact", [False, True])
def test_all_rows_are_taken_if_there_are_no_more(exact):
    """Processes draw as many as they are asked for: their arrays must have one shape."""
    for source in InMemory(ROWS, exact), in_file(exact=exact):
        assert len(source.take(KEY, 100).x) == (100 if exact else COUNT)
