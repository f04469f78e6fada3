"""Sources of rows to train on: one protocol for arrays, files, iterables and processes."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jaxode.training.devices import Devices
from jaxode.training.iterators import Stream


class Rows(NamedTuple):
    """Data, each row with its context. Tables have more fields beside these."""

    x: Any
    """`[rows, *event]`, in JAX or NumPy."""
    context: PyTree
    """One row for each of `x`, or None."""


class Source(abc.ABC):
    """Rows to train on, wherever they come from. `dataset.py` chooses one."""

    @property
    def in_order(self) -> bool:
        """Whether steps use the rows of `take` in order, each once. Otherwise steps draw theirs."""
        return False

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """The number of rows in all processes; of an iterable, of the first that were read."""

    @abc.abstractmethod
    def sample(self, count: int) -> Any:
        """Rows that represent those of all processes: all, if in memory, or at most `count`.

        Their contexts may be left out.
        """

    def whole(self) -> Any | None:
        """All rows, if they can be mapped to the flow at once; otherwise None."""
        return None

    @abc.abstractmethod
    def take(self, key: PRNGKeyArray, count: int) -> Any:
        """Rows of this process for the next steps, at most `count` in all processes."""

    def close(self) -> None:
        """Stop reading ahead."""
        return None


def drawn_by(weights: np.ndarray, key: PRNGKeyArray, count: int) -> np.ndarray:
    """Numbers of `count` rows, drawn in proportion to their weights."""
    cumulative = np.cumsum(np.asarray(weights, float))
    seed = np.asarray(jax.random.key_data(key))
    levels = np.random.default_rng(seed).random(count) * cumulative[-1]
    last = np.flatnonzero(weights)[-1]  # rounding may lead beyond it
    return np.minimum(np.searchsorted(cumulative, levels, side="right"), last)


@dataclasses.dataclass(frozen=True)
class InMemory(Source):
    """Rows of arrays in memory."""

    rows: Any
    exact: bool = False
    """Whether `take` gives `count` rows even if there are fewer: shapes of all processes agree."""
    weights: np.ndarray | None = None
    """Weights `[rows]`: rows are drawn in proportion to them, or equally by default."""

    @property
    def count(self) -> int:
        return len(self.rows.x)

    def sample(self, count: int) -> Any:
        return self.rows if self.weights is None else self._drawn(jax.random.key(0), self.count)

    def whole(self) -> Any | None:
        return self.rows if self.weights is None else None

    def take(self, key: PRNGKeyArray, count: int) -> Any:
        if self.count <= count and not self.exact and self.weights is None:
            return self.rows
        return self._drawn(key, count)

    def _drawn(self, key: PRNGKeyArray, count: int) -> Any:
        if self.weights is None:
            drawn = np.asarray(jax.random.randint(key, (count,), 0, self.count))
        else:
            drawn = drawn_by(self.weights, key, count)
        return jax.tree.map(lambda leaf: leaf[drawn], self.rows)


@dataclasses.dataclass(frozen=True)
class InFile(InMemory):
    """Rows of `Without`: tables in a file, or too large to copy."""

    def sample(self, count: int) -> Any:
        if self.weights is not None:
            return self._drawn(jax.random.key(0), count)._replace(context=None)
        return Rows(self.rows.x.sample(count), None)

    def whole(self) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class FromIterable(Source):
    """The rows of an iterable, such as a loader."""

    stream: Stream
    first: Source
    """The rows that were read first. The stream gives them again."""

    @property
    def in_order(self) -> bool:
        return True

    @property
    def count(self) -> int:
        return self.first.count

    def sample(self, count: int) -> Any:
        return self.first.sample(count)

    def take(self, key: PRNGKeyArray, count: int) -> Any:
        rows, seed = self.stream.next(count), np.asarray(jax.random.key_data(key))
        order = np.random.default_rng(seed).permutation(count)
        return jax.tree.map(lambda leaf: leaf[order], rows)

    def close(self) -> None:
        self.stream.close()


@dataclasses.dataclass(frozen=True)
class Share(Source):
    """The rows of this process, one of several. Each process gives as many rows to a step."""

    source: Source
    devices: Devices

    @property
    def in_order(self) -> bool:
        return self.source.in_order

    @property
    def count(self) -> int:
        return int(self.devices.gathered(np.array([self.source.count])).sum())

    def sample(self, count: int) -> Any:
        return self.devices.gathered(self.source.sample(count))

    def take(self, key: PRNGKeyArray, count: int) -> Any:
        return self.source.take(key, count // jax.process_count())

    def close(self) -> None:
        self.source.close()
