"""Calibrate levels on rows that trained no network, by another base than the normal one.

The flow maps a number to `z` at the base. If its levels are right, `z` of new rows is normal. If
not, fit a monotone map `w(z)` that is normal on new rows, and take as base the density of a `z`
whose `w` is normal. So densities, levels, quantiles and samples are those of one normalized
distribution.
"""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.caller import arg
from jaxode.density.density import Density
from jaxode.density.maps.chain import Chain, from_data, to_data
from jaxode.density.maps.normal import fit as normalizing
from jaxode.flows.bases import StandardNormal
from jaxode.flows.cnf import CNF

STANDARD_NORMAL = StandardNormal((1,))
MIN_CALIBRATION_ROWS = 10  # rows of equal weight that a calibration needs
LEAST_LEVEL = 1e-7  # clip levels by this, which float32 tells apart from 0 and 1


class Calibrated(eqx.Module):
    """The density of one number `z` whose image under a monotone map is standard normal."""

    to_normal: Chain
    event_shape: ClassVar[tuple[int, ...]] = (1,)

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        w, log_det = self._normal(z)
        return STANDARD_NORMAL.log_prob(w) + log_det

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        return self._back(STANDARD_NORMAL.sample(key, sample_shape))

    def cdf(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        return STANDARD_NORMAL.cdf(self._normal(z)[0])

    def icdf(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        return self._back(STANDARD_NORMAL.icdf(q))

    def _normal(self, z: Array) -> tuple[Array, Array]:
        _, _, w, log_det = from_data(self.to_normal, z.reshape(-1, 1))
        return w.reshape(z.shape), log_det.reshape(z.shape[:-1])

    def _back(self, w: Array) -> Array:
        return to_data(self.to_normal, w.reshape(-1, 1))[0].reshape(w.shape)


def calibrated(
    density: Density,
    levels: Float[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"] | None = None,
) -> Density:
    """Give the density a base in which these levels are uniform.

    Args:
        density: of one number, with a normal base.
        levels: `density.cdf` of at least ten rows that did not train it.
        weights: of these rows, None for equal ones.
    """
    levels = levels if weights is None else _of_equal_weight(levels, weights)
    z = np.asarray(
        STANDARD_NORMAL.icdf(jnp.clip(jnp.asarray(levels), LEAST_LEVEL, 1 - LEAST_LEVEL))
    )
    base = Calibrated(jax.tree.map(jnp.asarray, normalizing(z[:, None])))
    flow: CNF = density.flow
    return density.with_flow(dataclasses.replace(flow, base=base))


def _of_equal_weight(
    levels: Float[np.ndarray, " rows"], weights: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " fewer"]:
    """Levels of equal weight with the distribution of the weighted ones. Their number is the
    effective sample size (Kish, 1965, Survey Sampling)."""
    order, part = np.argsort(levels), weights / weights.max()
    part = part / part.sum()
    count = round(1 / np.sum(part**2))
    places = np.searchsorted(np.cumsum(part[order]), (np.arange(count) + 0.5) / count)
    if count < MIN_CALIBRATION_ROWS:
        raise ValueError(
            f"{arg('weights')} must count at least {MIN_CALIBRATION_ROWS} of the rows aside, to "
            f"calibrate; got {len(part)} rows that are worth {count} of equal weight. Leave "
            "calibrate out."
        )
    return levels[order][places]
