"""The solution between its ends, by the solver's own interpolant."""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode.ode.loop.outputs import Curve, Steps
from jaxode.ode.loop.tableau import Tableau
from jaxode.ode.validation import check_real_times, is_known


class OfSteps(eqx.Module):
    """The path `[rows, n]` over the time of each row, by the dense output of recorded steps."""

    steps: Steps
    sign: Float[Array, " rows"]
    """Of the direction of time."""
    tableau: Tableau = eqx.field(static=True)

    def __call__(self, t: Float[Array, " rows"]) -> Float[Array, "rows n"]:
        steps, row = self.steps, jnp.arange(len(t), dtype=jnp.int32)
        number = jnp.arange(len(steps.y), dtype=jnp.int32)[:, None]
        ends, along = jax.lax.stop_gradient((steps.times[1:], t))
        # In which step: how many end before the time.
        ends = jnp.where(number < steps.count - 1, self.sign[None] * ends, jnp.inf)
        index = jax.vmap(jnp.searchsorted)(ends.T, self.sign * along)
        start, end = steps.times[index, row], steps.times[index + 1, row]
        k = jnp.moveaxis(steps.k[index, :, row], 0, 1)
        return Curve.of(self.tableau, start, end - start, steps.y[index, row], k).at(t)

    def scaled(self, factor: Float[Array, " rows"]) -> "OfSteps":
        """The path times a factor for each row, which is one or NaN."""
        y = self.steps.y * factor[None, :, None].astype(self.steps.y.dtype)
        return dataclasses.replace(self, steps=self.steps._replace(y=y))


class OfDiffrax(eqx.Module):
    """The path of the one row that a solver of diffrax has."""

    path: diffrax.DenseInterpolation
    factor: Float[Array, " 1"]

    def __call__(self, t: Float[Array, " 1"]) -> Float[Array, "1 n"]:
        value = self.path.evaluate(t[0])[None]
        return value * self.factor[:, None].astype(value.dtype)

    def scaled(self, factor: Float[Array, " 1"]) -> "OfDiffrax":
        """The path times a factor."""
        return dataclasses.replace(self, factor=self.factor * factor)


class Interpolant(eqx.Module):
    """A solution as a function of time, between its ends."""

    path: Any
    """`OfSteps` or `OfDiffrax`."""
    t0: Float[Array, " rows"]
    t1: Float[Array, " rows"]
    ravel: Any = eqx.field(static=True)
    """Its `back` goes from rows to states."""
    per_sample: bool = eqx.field(static=True)
    """Whether the rows are the samples of a batch; else there is one, the state."""

    def at(self, where: str, t: Any, derivative: bool = False) -> PyTree:
        """The state at a time or times, or its derivative; NaN outside."""
        rows = len(self.t0)
        check_real_times(where, "t", t)
        t = jnp.asarray(t, self.t0.dtype)
        several = t.ndim == (2 if self.per_sample else 1)
        if self.per_sample:
            shapes = f"a scalar, [batch] or [batch, times], with a batch of {rows}"
            fits = t.ndim == 0 or (t.ndim <= 2 and t.shape[0] == rows)
        else:
            shapes, fits = "a scalar or a vector", t.ndim <= 1
        if not fits:
            raise ValueError(f"{where}(t=...): must be {shapes}; got shape {t.shape}.")
        if not self.per_sample:
            t = t[..., None]
        elif several:
            t = t.T
        else:
            t = jnp.broadcast_to(t, (rows,))
        inside = jax.vmap(self._inside)(t) if several else self._inside(t)
        if is_known((inside, t)) and not np.all(inside):
            ends = f"t0={np.min(self.t0):.6g} and t1={np.max(self.t1):.6g}"
            outside = np.asarray(t)[~np.asarray(inside)][0]
            raise ValueError(
                f"{where}(t=...): must lie between the start and the end of the solve, {ends}; got "
                f"{outside}. Extend the solve."
            )
        value = lambda t: self._value(t, derivative)
        states = jax.vmap(value)(t) if several else value(t)
        states = jnp.where(inside[..., None], states, jnp.nan)
        back = jax.vmap(self.ravel.back) if several else self.ravel.back
        states = back(states)
        if not self.per_sample:
            return jax.tree.map(lambda x: x[:, 0] if several else x[0], states)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), states) if several else states

    def _inside(self, t: Float[Array, " rows"]) -> Bool[Array, " rows"]:
        low, high = jnp.minimum(self.t0, self.t1), jnp.maximum(self.t0, self.t1)
        return (low <= t) & (t <= high)

    def _value(self, t: Float[Array, " rows"], derivative: bool) -> Float[Array, "rows n"]:
        if not derivative:
            return self.path(t)
        # Each row depends on its own time alone.
        return jax.jvp(self.path, (t,), (jnp.ones_like(t),))[1]
