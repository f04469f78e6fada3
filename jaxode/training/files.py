"""Tables too large to copy: rows are read when a step needs them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

# A table with more rows is not copied: steps read their rows from it, and maps see a sample.
MAX_ROWS_COPIED = 100_000


@dataclasses.dataclass(frozen=True)
class Without:
    """An array in memory or in a file, without some of its rows."""

    array: Any
    aside: Int[np.ndarray, " some"]
    """The numbers of these rows, in increasing order."""
    dtype: Any
    """The dtype of the rows that are read."""

    def __len__(self) -> int:
        return len(self.array) - len(self.aside)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.array.shape[1:])

    def __getitem__(self, rows: Int[np.ndarray, " drawn"]) -> np.ndarray:
        """Copy rows, which are numbered without those that are left out."""
        before = self.aside - np.arange(len(self.aside))
        at = rows + np.searchsorted(before, rows, side="right")
        return np.asarray(self.array[at], self.dtype)

    def sample(self, count: int) -> np.ndarray:
        """Take a fixed sample of `count` rows, or all if there are fewer."""
        count = min(count, len(self))
        return self[np.random.default_rng(0).choice(len(self), count, replace=False)]


def consecutive_parts(x: Any) -> Iterator[np.ndarray]:
    """The rows of an array in parts; all at once, if it is not large."""
    for start in range(0, len(x), MAX_ROWS_COPIED):
        yield x[start : start + MAX_ROWS_COPIED]


def check_in_parts(check: Callable[[Any], Any], x: Any) -> None:
    """Check rows part by part. A failure counts rows from the first one."""
    read = 0
    for part in consecutive_parts(x):
        read += len(part)
        try:
            check(part)
        except ValueError:
            check(x[:read])
            raise
