"""Absolute tolerances of the solves, in the unit of each number of the state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._jax.closure import compiled
from jaxode.estimation.observed.observed_system import ObservedODE

ROUGH = 1e-3  # relative tolerance of the solves that say sizes
# A number that falls to this part of where it begins may be zero but for rounding.
VANISHED = 1e-6
STARTS = 8  # at most, that are solved for sizes


def with_atol(problem: ObservedODE, flats: Float[Array, "starts n"]) -> ObservedODE:
    """With an absolute tolerance of each number of the state: `rtol` of its size. That is the
    spread of its observations or, if it has none, what it comes to from some of the starts."""
    rows, ys = tuple(range(problem.ts.ndim)), np.asarray(problem.ys, float)
    if problem.observe is None and (~np.isnan(ys)).any(axis=rows).all():
        sizes = positive(spreads(ys, rows[-1], rows))
    else:
        sizes = sizes_of_states(*_states(problem, flats[:STARTS]))
    atol = tolerances(problem.options["rtol"], sizes, problem.ts.dtype)
    return dataclasses.replace(problem, options={**problem.options, "atol": atol})


def tolerances(rtol: Any, sizes: PyTree[np.ndarray], dtype: Any) -> PyTree[Array]:
    """Inputs of programs, since they vary with the data."""
    return jax.tree.map(lambda size: jnp.asarray(float(rtol) * size, dtype), sizes)


def spreads(ys: np.ndarray, axis: int, over: tuple[int, ...] | None = None) -> np.ndarray:
    """The standard deviation of series along the axis of times, over all or some axes. Some
    observations may be missing; series may be constant."""
    seen = ~np.isnan(ys)
    mean = np.nansum(ys, axis, keepdims=True) / np.maximum(seen.sum(axis, keepdims=True), 1)

    def root(x):
        return np.sqrt(np.sum(np.where(seen, x, 0.0) ** 2, axis=over) / seen.sum(axis=over))

    return np.maximum(root(ys - mean), 1e-3 * root(ys))


def sizes_of_states(
    y0: PyTree[Float[Array, "starts rows ..."]], ys: PyTree[Float[Array, "starts rows times ..."]]
) -> PyTree[np.ndarray]:
    """The size of each number of the state, `[...]`: the least of the starts, since one may lead
    far, and no more than where it begins, unless that is zero. What could not be solved is not
    finite, and does not count."""

    def size(first, later):
        later = np.concatenate([np.asarray(first)[:, :, None], np.asarray(later)], axis=2)
        known = np.isfinite(later)
        later = np.abs(np.where(known, later, 0.0))
        peak = np.max(later, axis=(1, 2))
        unit = np.where(peak > 0, peak, 1.0)

        def root(x):
            count = np.maximum(known[:, :, : x.shape[2]].sum(axis=(1, 2)), 1)
            return unit * np.sqrt(np.sum((x / unit[:, None, None]) ** 2, axis=(1, 2)) / count)

        begin, all_times = root(later[:, :, :1]), root(later)
        found = np.where(begin > 0, np.minimum(begin, all_times), all_times)
        found = np.maximum(found, VANISHED * peak)
        return np.min(np.where(found > 0, found, np.inf), axis=0)

    return positive(jax.tree.map(size, y0, ys))


def positive(sizes: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
    """With the least of the others in place of those that are zero or unknown."""
    known = [
        leaf[(leaf > 0) & np.isfinite(leaf)] for leaf in map(np.asarray, jax.tree.leaves(sizes))
    ]
    least = min((float(leaf.min()) for leaf in known if leaf.size), default=1.0)
    return jax.tree.map(lambda leaf: np.where((leaf > 0) & np.isfinite(leaf), leaf, least), sizes)


def rough(options: dict[str, Any], y0: PyTree[Array], rows: bool) -> dict[str, Any]:
    """Options of a solve from `y0` that says sizes."""

    def least(leaf):
        root = jnp.sqrt(jnp.mean(leaf**2, axis=0)) if rows else jnp.abs(leaf)
        return VANISHED * root

    return {**options, "rtol": ROUGH, "atol": jax.tree.map(least, y0)}


@compiled
def _states(problem: ObservedODE, flats: Float[Array, "starts n"]) -> tuple[PyTree, PyTree]:
    """Where the state begins and what it comes to at the times of the observations, `[starts, rows,
    ...]` and `[starts, rows, times, ...]`, with one row of one experiment."""
    rows = problem.ts.ndim == 2

    def each(flat):
        params = problem.unravel(flat)
        y0 = problem.start(params)
        options = rough(problem.options, y0, rows)
        ys = dataclasses.replace(problem, options=options).states(params, jnp.max(problem.ts))
        return (y0, ys) if rows else jax.tree.map(lambda leaf: leaf[None], (y0, ys))

    return jax.lax.map(each, flats)
