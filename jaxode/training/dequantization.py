"""Noise on columns of integers, drawn anew for the rows of each block of steps."""

import dataclasses
import warnings
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PRNGKeyArray

from jaxode.density.maps.whiten import column_list
from jaxode.density.noise import NOISES, Noise, as_noise, in_cells, log_density
from jaxode.training.files import consecutive_parts
from jaxode.training.sources import Rows

MAX_INTEGER_SPACING = 1 / 8  # of the dtype at the largest integer, or noise would be rounded


class RowNoise(Protocol):
    """Noise that rows to train on and rows set aside get."""

    @property
    def exists(self) -> bool:
        """Whether `add` depends on its key."""
        ...

    def add(self, rows: Any, key: PRNGKeyArray) -> Rows:
        """The rows with noise."""
        ...

    def log_density(self, rows: Any, noisy: Rows) -> float:
        """Mean log-density of the noise that was added, which validations subtract."""
        ...


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """Noise in (0, 1) on columns of integers."""

    columns: Bool[np.ndarray, " *event"]
    """Which columns get noise."""
    kind: Noise = NOISES[0]

    @classmethod
    def on_integers(
        cls,
        dequantize: bool | Noise,
        integers: Bool[np.ndarray, " *event"],
        largest: np.ndarray,
        dtype: np.dtype,
    ) -> "Dequantization":
        """Noise on columns of integers of these largest sizes.

        Columns of so large integers that noise in (0, 1) is lost get none, with a warning.
        """
        kind = noise_kind(dequantize)
        if not isinstance(kind, str) and integers.any():
            reach = int(largest[integers].max())
            as_noise("dequantize", dequantize, (-reach, reach))
        coarse = integers & (largest * float(jnp.finfo(dtype).eps) > MAX_INTEGER_SPACING)
        if coarse.any():
            warnings.warn(
                f"fit(dequantize=True): columns {column_list(np.flatnonzero(coarse))} hold whole "
                f"numbers in {dtype}, so large that noise below 1 is lost, and get none. Subtract "
                "an offset first, or use float64.",
                stacklevel=5,
            )
        return cls(integers & ~coarse, kind)

    @property
    def exists(self) -> bool:
        return bool(self.columns.any())

    def add(self, rows: Rows, key: PRNGKeyArray) -> Rows:
        """Validation rows of the user may have noise of their own, and get no more."""
        if not self.exists:
            return rows
        integers, x = self.columns & is_integer(rows.x), jnp.asarray(rows.x)
        noisy = in_cells(key, x, noise=self.kind)
        return rows._replace(x=jnp.where(integers[None], noisy, x))

    def log_density(self, rows: Rows, noisy: Rows) -> float:
        if not self.exists or self.kind == NOISES[0]:
            return 0.0
        integers = self.columns & is_integer(rows.x)
        levels = jnp.asarray(rows.x[:, integers])
        log_noise = log_density(self.kind, noisy.x[:, integers] - levels, levels)
        return float(log_noise.sum(axis=1).mean())


def noise_kind(dequantize: bool | Noise) -> Noise:
    """The noise that the argument `dequantize` asks for."""
    is_flag = isinstance(dequantize, bool | np.bool_)
    return NOISES[0] if is_flag else as_noise("dequantize", dequantize)


def is_integer(columns: np.ndarray) -> Bool[np.ndarray, " *event"]:
    """Which columns hold integers alone."""
    return (columns == np.round(columns)).all(axis=0)


def scanned(x: Any) -> tuple[Bool[np.ndarray, " *event"], np.ndarray]:
    """Which columns hold integers alone, and the largest size of each column."""
    of_parts = [(is_integer(part), np.abs(part).max(axis=0)) for part in consecutive_parts(x)]
    integers, largest = zip(*of_parts, strict=True)
    return np.logical_and.reduce(integers), np.maximum.reduce(largest)
