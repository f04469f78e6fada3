"""Tolerances: of the search, and absolute ones of its solves, in the units of the state."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._jax.closure import compiled
from jaxode.estimation.observed.observed_system import ObservedSystem

# The search ends when a step changes the parameters by less than this part of them, unless a bound
# cut it short.
PARAMETER_TOLERANCE = {jnp.dtype("float64"): 1e-6, jnp.dtype("float32"): 1e-3}
# The relative tolerance of solves that only measure the sizes of states.
ROUGH_RTOL = 1e-3
# A number of the state that falls below this part of its initial value may be nothing but rounding.
VANISHED = 1e-6
# Solve from this many starts at most to measure the sizes of states.
STARTS_FOR_SIZES = 8


S = TypeVar("S", bound=ObservedSystem)


def with_atol(system: S, ys: Float[Array, "..."], times: int, flats: Float[Array, "starts n"]) -> S:
    """Add an absolute tolerance for each number of the state: `rtol` times its size.

    Its size is the spread of its observations or, if it has none, that of solves from some starts.

    Args:
        system: the observed system.
        ys: its observations.
        times: the axis of their times.
        flats: the starts.
    """
    values = np.asarray(ys, float)
    rows = tuple(range(times + 1))
    if system.observe is None and (~np.isnan(values)).any(axis=rows).all():
        sizes = positive(spreads(values, times, rows))
    else:
        sizes = sizes_of_states(*_states(system, flats[:STARTS_FOR_SIZES]))
    rtol, dtype = float(system.options["rtol"]), system.t0.dtype
    # Arrays are inputs of programs: tolerances vary with the data.
    atol = jax.tree.map(lambda size: jnp.asarray(rtol * size, dtype), sizes)
    return dataclasses.replace(system, options={**system.options, "atol": atol})


def spreads(ys: np.ndarray, axis: int, over: tuple[int, ...] | None = None) -> np.ndarray:
    """The standard deviation of series along the axis of times, averaged `over` axes, or all.

    Missing observations do not count. A constant series has a thousandth of its root mean square.
    """
    mask = ~np.isnan(ys)
    mean = np.nansum(ys, axis, keepdims=True) / np.maximum(mask.sum(axis, keepdims=True), 1)

    def root(x):
        return np.sqrt(np.sum(np.where(mask, x, 0.0) ** 2, axis=over) / mask.sum(axis=over))

    return np.maximum(root(ys - mean), 1e-3 * root(ys))


def sizes_of_states(
    y0: PyTree[Float[Array, "starts rows ..."]], ys: PyTree[Float[Array, "starts rows times ..."]]
) -> PyTree[np.ndarray]:
    """The size of each number of the state, `[...]`.

    It is the root mean square over rows and times, but no more than at the initial time, unless
    that is zero. The least size of all starts counts, since one of them may lead far. Numbers that
    are not finite, of solves that failed, do not count.
    """

    def size(first, later):
        later = np.concatenate([np.asarray(first)[:, :, None], np.asarray(later)], axis=2)
        finite = np.isfinite(later)
        later = np.abs(np.where(finite, later, 0.0))
        peak = np.max(later, axis=(1, 2))
        unit = np.where(peak > 0, peak, 1.0)

        def root(x):
            count = np.maximum(finite[:, :, : x.shape[2]].sum(axis=(1, 2)), 1)
            return unit * np.sqrt(np.sum((x / unit[:, None, None]) ** 2, axis=(1, 2)) / count)

        initial, all_times = root(later[:, :, :1]), root(later)
        sizes = np.where(initial > 0, np.minimum(initial, all_times), all_times)
        sizes = np.maximum(sizes, VANISHED * peak)
        return np.min(np.where(sizes > 0, sizes, np.inf), axis=0)

    return positive(jax.tree.map(size, y0, ys))


def positive(sizes: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
    """Replace sizes that are zero or not finite by the least of the others."""
    usable = [
        leaf[(leaf > 0) & np.isfinite(leaf)] for leaf in map(np.asarray, jax.tree.leaves(sizes))
    ]
    least = min((float(leaf.min()) for leaf in usable if leaf.size), default=1.0)
    return jax.tree.map(lambda leaf: np.where((leaf > 0) & np.isfinite(leaf), leaf, least), sizes)


@compiled
def _states(system: ObservedSystem, flats: Float[Array, "starts n"]) -> tuple[PyTree, PyTree]:
    """Initial states `[starts, rows, ...]`, and states at the times of the observations, `[starts,
    rows, times, ...]`, by coarse solves."""

    def of_start(flat):
        params = system.unravel(flat)
        y0, _ = system.states_of_rows(params)
        least = jax.tree.map(lambda leaf: VANISHED * jnp.sqrt(jnp.mean(leaf**2, axis=0)), y0)
        options = {**system.options, "rtol": ROUGH_RTOL, "atol": least}
        return dataclasses.replace(system, options=options).states_of_rows(params)

    return jax.lax.map(of_start, flats)
