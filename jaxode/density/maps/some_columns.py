"""A map of some coordinates beside others, such as numbers beside angles."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from jaxode.density.maps.base import Map, Numbers


class Some(Map):
    """A map of some coordinates of the flattened event. The others stay as they are."""

    part: Map
    columns: tuple[int, ...] = eqx.field(static=True)

    def inverse(self, x):
        return self._through(self.part.inverse, x)

    def forward(self, u):
        return self._through(self.part.forward, u)

    def spares(self, columns):
        return not set(columns) & set(self.columns)

    def _through(self, step: Callable[[Array], Any], x: Array) -> tuple[Array, Array]:
        flat, at = x.reshape(-1), np.array(self.columns)
        part, log_det = step(flat[at])
        return flat.at[at].set(part).reshape(x.shape), log_det


def columns_of(
    x: Float[Numbers, "*rows_and_event"], event: tuple[int, ...], columns: Sequence[int]
) -> Any:
    """Some coordinates of events, flattened."""
    rows = x.shape[: x.ndim - len(event)]
    return x.reshape(*rows, -1)[..., np.array(columns)]
