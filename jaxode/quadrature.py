"""The quadrature of costs along the recorded steps, on the solver's dense output.

Gauss-Legendre nodes, or one random node for each step and sample, which is unbiased.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode.adjoints.sweep import Step
from jaxode.mesh import fori_loop, row_numbers
from jaxode.pullback import vjp
from jaxode.tableau import Tableau

# The golden ratio: its multiples are spread evenly over the unit interval.
GOLDEN = (5**0.5 - 1) / 2


def gauss_legendre(tableau: Tableau) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on the unit interval, as many as the order of the solver can use."""
    nodes, weights = np.polynomial.legendre.leggauss((tableau.order + 2) // 2)
    return (nodes + 1) / 2, weights / 2


def random_phases(
    key: PRNGKeyArray | None, x: Float[Array, "batch *event"], axis_name: str | None
) -> Float[Array, " batch"]:
    """Uniform random numbers for the random nodes, one a sample, from the key and its index."""
    if key is None:
        raise ValueError(
            "nll: quadrature='stochastic' needs random numbers; got key=None. "
            "Pass key=jax.random.key(...)."
        )
    one = lambda i: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, i), 1))
    return jax.vmap(one)(row_numbers(x, key, axis_name))


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
        size = step.y.size // max(batch, 1)
        y, k = step.y.reshape(batch, size), step.k.reshape(step.k.shape[0], batch, size)
        return Step(time(step.t), time(step.h), y, k)

    def _place(self, step: Step, number, index):
        """Where a node lies in the step, `[rows]` in the unit interval, and its weight."""
        if self.phase is not None:
            theta = jnp.mod(self.phase + number.astype(step.t.dtype) * GOLDEN, 1.0)
            return theta, jnp.ones((), step.y.dtype)
        theta, weights = map(jnp.asarray, gauss_legendre(self.tableau))
        theta = jnp.broadcast_to(theta[index], step.t.shape).astype(step.t.dtype)
        return theta, weights[index].astype(step.y.dtype)

    def _state(self, step: Step, theta: Float[Array, " rows"]):
        """The time and the state at a node, with the mean slope up to there and its weights."""
        weights = jax.vmap(self.tableau.dense_weights)(theta.astype(step.y.dtype))
        # As a product: XLA's sum over the first axis takes as long as a node of a small network.
        precision = jax.lax.Precision.HIGHEST
        slope = jnp.einsum("rs,srn->rn", weights, step.k, precision=precision)
        beta = weights.T[..., None]
        return step.t + theta * step.h, step.y + step.h[:, None] * slope, slope, beta

    def _scale(self, step: Step) -> Float[Array, "batch costs"]:
        """What a cost is multiplied by for its integral over the step.

        The divergence is integrated in the direction of the solve, running costs in forward time.
        """
        batch, costs = self.bars.shape
        signed = [step.h] + [jnp.abs(step.h)] * (costs - 1)
        return jnp.broadcast_to(jnp.stack(signed, axis=-1).astype(step.y.dtype), (batch, costs))

    def evaluate(self, step: Step, number, index) -> Float[Array, "batch costs"]:
        """What a node adds to the integrals."""
        step = self._split(step)
        theta, weight = self._place(step, number, index)
        time, state, _, _ = self._state(step, theta)
        return self._scale(step) * (weight * self.apply(self.params, time, state))

    def inside(self, timed: bool):
        """For `Sweep.inside`."""

        def inside(whole: Step, number, params_bar, integrals):
            step = self._split(whole)
            add = lambda index, carry: self._add(step, number, index, timed, carry)
            carry = (jax.tree.map(jnp.zeros_like, step), params_bar, integrals)
            nodes = jnp.where(number == 0, 0, self.count)
            bar, params_bar, integrals = fori_loop(0, nodes, add, carry)
            bar = Step(
                _to_rows(bar.t, whole.t), _to_rows(bar.h, whole.h),
                bar.y.reshape(whole.y.shape), bar.k.reshape(whole.k.shape),
            )  # fmt: skip
            return bar, params_bar, integrals

        return inside

    def _add(self, step: Step, number, index, timed: bool, carry):
        """Add the integrals of one node, and pull their cotangents back to the step."""
        bar, params_bar, integrals = carry
        scale = self._scale(step)
        theta, weight = self._place(step, number, index)
        time, state, slope, beta = self._state(step, theta)
        costs_bar = weight * (scale * self.bars)
        t_bar, h_bar = bar.t, bar.h
        if timed:
            costs, pull = vjp(self.apply, self.params, time, state)
            dparams, dtime, dstate = pull(costs_bar)
            by_size = jnp.where(step.h == 0, 0.0, 1 / jnp.where(step.h == 0, 1.0, step.h))
            direct = _to_rows(jnp.sum(costs_bar * costs, axis=1), step.t) * by_size
            t_bar = t_bar + dtime
            h_bar = h_bar + theta * dtime + direct + jnp.sum(dstate * slope, axis=1)
        else:
            apply = lambda params, state: self.apply(params, time, state)
            costs, pull = vjp(apply, self.params, state)
            dparams, dstate = pull(costs_bar)
        k_bar = bar.k + step.h[None, :, None] * (beta * dstate[None])
        params_bar = jax.tree.map(jnp.add, params_bar, dparams)
        integrals = integrals + scale * (weight * costs)
        return Step(t_bar, h_bar, bar.y + dstate, k_bar), params_bar, integrals


def _to_rows(x: Float[Array, " batch"], like: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """Summed over the samples of each row."""
    samples = x.shape[0] // max(like.shape[0], 1)
    return jnp.sum(x.reshape(like.shape[0], samples), axis=1).astype(like.dtype)
