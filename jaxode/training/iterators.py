"""Rows that an iterable gives, such as a loader of PyTorch, Grain or TensorFlow."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxode._checks.caller import arg

HEAD_ROWS = 20_000  # the first rows: maps are fitted to them, and warnings come from them


class NoRowsLeftError(Exception):
    """No rows are left. `count` of them were given."""

    def __init__(self, count: int):
        self.count = count


def is_stream(x: Any) -> bool:
    """Whether `x` gives arrays of rows one after the other, and is no array itself."""
    if isinstance(x, list | tuple):
        first = x[0] if x else None
        if isinstance(first, list | tuple) and len(first) in (1, 2):
            first = first[0]
        return len(getattr(first, "shape", ())) > 1
    return (
        isinstance(x, Iterable)
        and not hasattr(x, "__array__")
        and not isinstance(x, str | bytes | Mapping)
    )


class Stream:
    """The rows of an iterable in its order, which a thread reads ahead.

    At its end it starts again, unless it is an iterator.
    """

    def __init__(
        self,
        arrays: Iterable[Any],
        check: Callable[[Any, Any], Any],
        any_ended: Callable[[bool], bool] = bool,
    ):
        """`check` makes rows of each array and its context. `any_ended` says whether the rows of
        any process have ended, from whether those of this one have."""
        self.arrays, self.check, self.any_ended = arrays, check, any_ended
        self.iterator: Iterator[Any] = iter(arrays)
        self.again = self.iterator is not arrays
        self.read = self.given = 0  # arrays and rows
        from concurrent.futures import ThreadPoolExecutor  # `import jaxode` does not load it

        self.reader = ThreadPoolExecutor(1)
        self.waiting = None  # rows that were read and not taken
        self.ahead = None  # the arrays that the thread reads
        self.head = self.waiting = self._joined(self._more(HEAD_ROWS, False))
        if self.head is None:
            raise ValueError(f"{arg('x')} must give arrays of rows; got an iterable without any.")

    def next(self, count: int) -> Any:
        """Take the next `count` rows. If the rows of one process end, all processes end."""
        rows = self.waiting
        if (missing := count - _length(rows)) > 0:
            arrays = self.ahead.result() if self.ahead else self._more(missing, self.again)
            self.ahead = None
            rows = self._joined(arrays, rows)
            if (missing := count - _length(rows)) > 0:
                rows = self._joined(self._more(missing, self.again), rows)
        if self.any_ended(_length(rows) < count):
            raise NoRowsLeftError(self.given)
        self.given += count
        self.waiting = jax.tree.map(lambda leaf: leaf[count:], rows)
        if self.ahead is None:
            self.ahead = self.reader.submit(self._more, count, self.again)
        return jax.tree.map(lambda leaf: leaf[:count], rows)

    def close(self) -> None:
        self.reader.shutdown(wait=False, cancel_futures=True)

    def _more(self, count: int, again: bool) -> list[Any]:
        """Arrays with at least so many rows, or fewer at the end."""
        arrays, started = [], False
        while count > 0:
            array = next(self.iterator, None)
            if array is None:
                if started or not again:
                    break
                self.iterator, started = iter(self.arrays), True
                continue
            arrays.append(array)
            x = array[0] if isinstance(array, list | tuple) and array else array
            if not np.ndim(x) or not len(x):
                break  # no array of rows, or none in it, which the check says
            count -= len(x)
            started = False
        return arrays

    def _joined(self, arrays: list[Any], before: Any = None) -> Any:
        """The rows of arrays, checked, after those before them."""
        rows = [] if before is None else [before]
        for array in arrays:
            self.read += 1
            x, context, *more = (*array, None) if isinstance(array, list | tuple) else (array, None)
            try:
                if len(more) > 1:
                    raise ValueError(
                        f"{arg('x')} must give arrays of rows, or pairs (x, context); got "
                        f"{len(array)} parts."
                    )
                rows.append(self.check(x, context))
                shape, got = (_shape(r.context) for r in (rows[0], rows[-1]))
                if shape != got:
                    raise ValueError(
                        f"{arg('x')} must give contexts of one shape; got {got} after {shape}."
                    )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error} It is array {self.read} of the iterable.") from None
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows) if rows else None


def _length(rows: Any) -> int:
    return 0 if rows is None else len(rows.x)


def _shape(context: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape[1:], context)
