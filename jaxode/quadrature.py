"""The quadrature of costs along the recorded steps, on the solver's dense output.

Gauss-Legendre nodes, or one random node for each step and sample, which is unbiased.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode.adjoints.sweep import Step
from jaxode.tableau import Tableau

# The golden ratio: its multiples are spread evenly over the unit interval.
GOLDEN = (5**0.5 - 1) / 2


def gauss_legendre(tableau: Tableau) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on the unit interval, as many as the order of the solver can use."""
    nodes, weights = np.polynomial.legendre.leggauss((tableau.order + 2) // 2)
    return (nodes + 1) / 2, weights / 2


class Nodes(NamedTuple):
    """The quadrature of the costs within a step."""

    apply: Callable[..., Float[Array, "batch costs"]]
    """The costs as a function of `(params, t, y)`."""
    params: PyTree
    tableau: Tableau
    phase: Float[Array, " batch"] | None
    bars: Float[Array, "batch costs"]
    """The cotangents of the integrals."""

    @property
    def count(self) -> int:
        """Nodes in a step."""
        return len(gauss_legendre(self.tableau)[0]) if self.phase is None else 1

    def zero(self) -> Float[Array, "batch costs"]:
        """The integrals over nothing."""
        return jnp.zeros_like(self.bars)

    def _split(self, step: Step) -> Step:
        """One row a sample, if the samples have nodes of their own."""
        if self.phase is None:
            return step
        batch = self.phase.shape[0]
        time = lambda t: jnp.broadcast_to(t, (batch,))
        y, k = step.y.reshape(batch, -1), step.k.reshape(step.k.shape[0], batch, -1)
        return Step(time(step.t), time(step.h), y, k)

    def _place(self, step: Step, number, first, group: int):
        """Where a group of nodes lies in the step, and its weights: `[group, rows]`, `[group]`."""
        rows = step.t.shape[0]
        if self.phase is not None:
            theta = jnp.mod(self.phase + number.astype(step.t.dtype) * GOLDEN, 1.0)
            return theta[None], jnp.ones(1, step.y.dtype)
        theta, weights = (jnp.asarray(x, step.t.dtype) for x in gauss_legendre(self.tableau))
        theta, weights = (jax.lax.dynamic_slice_in_dim(x, first, group) for x in (theta, weights))
        return jnp.broadcast_to(theta[:, None], (group, rows)), weights.astype(step.y.dtype)

    def _states(self, step: Step, theta):
        """The times, the states and the dense output's weights of the stages at some nodes."""
        beta = jax.vmap(jax.vmap(self.tableau.dense_weights))(theta.astype(step.y.dtype))
        beta = jnp.moveaxis(beta, -1, 1)[..., None]
        slope = jnp.sum(beta * step.k[None], axis=1)
        times = step.t[None] + theta * step.h[None]
        return times, step.y[None] + step.h[None, :, None] * slope, slope, beta

    def _scale(self, step: Step):
        """What a cost is multiplied by for its integral over the step, `[batch, costs]`.

        The divergence is integrated in the direction of the solve, running costs in forward time.
        """
        batch, costs = self.bars.shape
        signed = [step.h] + [jnp.abs(step.h)] * (costs - 1)
        return jnp.broadcast_to(jnp.stack(signed, axis=-1).astype(step.y.dtype), (batch, costs))

    def evaluate(self, step: Step, number, first, group: int) -> Float[Array, "batch costs"]:
        """What a group of nodes adds to the integrals."""
        step = self._split(step)
        theta, weights = self._place(step, number, first, group)
        times, states, _, _ = self._states(step, theta)
        costs = jax.vmap(self.apply, (None, 0, 0))(self.params, times, states)
        return self._scale(step) * jnp.tensordot(weights, costs, 1)

    def inside(self, timed: bool, together: bool):
        """For `Sweep.inside`. `together`: evaluate all nodes of a step as one batch."""
        group = self.count if together else 1

        def inside(whole: Step, number, params_bar, integrals):
            step = self._split(whole)
            scale = self._scale(step)

            def add(i, carry):
                bar, params_bar, integrals = carry
                theta, weights = self._place(step, number, i * group, group)
                times, states, slope, beta = self._states(step, theta)
                apply = lambda params, times, states: jax.vmap(self.apply, (None, 0, 0))(
                    params, times, states
                )
                if timed:
                    costs, vjp = jax.vjp(apply, self.params, times, states)
                else:
                    fixed = lambda params, states: apply(params, times, states)
                    costs, vjp = jax.vjp(fixed, self.params, states)
                costs_bar = weights[:, None, None] * (scale * self.bars)[None]
                dparams, *dtimes, dstates = vjp(costs_bar)
                params_bar = jax.tree.map(jnp.add, params_bar, dparams)
                y_bar, k_bar = jnp.sum(dstates, 0), jnp.sum(beta * dstates[:, None], 0)
                t_bar, h_bar = bar.t, bar.h
                if timed:
                    by_size = jnp.where(step.h == 0, 0.0, 1 / jnp.where(step.h == 0, 1.0, step.h))
                    direct = _to_rows(jnp.sum(costs_bar * costs, axis=(0, 2)), step.t)
                    t_bar = t_bar + jnp.sum(dtimes[0], axis=0)
                    h_bar = h_bar + jnp.sum(theta * dtimes[0], axis=0) + direct * by_size
                    h_bar = h_bar + jnp.sum(dstates * slope, axis=(0, 2))
                bar = Step(t_bar, h_bar, bar.y + y_bar, bar.k + step.h[None, :, None] * k_bar)
                integrals = integrals + scale * jnp.tensordot(weights, costs, 1)
                return bar, params_bar, integrals

            carry = (jax.tree.map(jnp.zeros_like, step), params_bar, integrals)
            groups = jnp.where(number == 0, 0, self.count // group)
            bar, params_bar, integrals = jax.lax.fori_loop(0, groups, add, carry)
            if self.phase is not None:
                bar = Step(
                    _to_rows(bar.t, whole.t), _to_rows(bar.h, whole.h),
                    bar.y.reshape(whole.y.shape), bar.k.reshape(whole.k.shape),
                )  # fmt: skip
            return bar, params_bar, integrals

        return inside


def _to_rows(x: Float[Array, " batch"], like: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """Summed over the samples of each row."""
    return jnp.sum(x.reshape(like.shape[0], -1), axis=1).astype(like.dtype)
