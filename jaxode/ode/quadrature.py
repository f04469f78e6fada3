"""The quadrature of integrands along the recorded steps, on the solver's dense output.

If the last stage of a step is the first stage of the next, both steps have a node there
(Gauss-Lobatto; otherwise Gauss-Legendre). Integrands are then evaluated together with that stage,
since those of a flow need its vector field anyway.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxode._jax.pullback import pulled_back
from jaxode._jax.sharding import fori_loop
from jaxode.ode.adjoints.base import Solved
from jaxode.ode.adjoints.replay import walk_back
from jaxode.ode.loop.rows import one_row, reduce_rows
from jaxode.ode.loop.stages import weighted_sum
from jaxode.ode.loop.trajectory import Step
from jaxode.ode.solvers.base import Method


def gauss(method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on the unit interval: as many as the solver's order can use.

    The first and last node lie at the ends (Lobatto) if the solver has stages there.
    """
    count = (method.order + 2) // 2
    if not method.first_same_as_last:
        nodes, weights = np.polynomial.legendre.leggauss(count)
        return (nodes + 1) / 2, weights / 2
    # One more node has the same order, `2 * count`.
    legendre = np.polynomial.Legendre.basis(count)
    # The roots are real, although NumPy 2.5 no longer returns them as such.
    nodes = np.concatenate([[-1.0], np.real(legendre.deriv().roots()), [1.0]])
    return (nodes + 1) / 2, 1 / (count * (count + 1) * legendre(nodes) ** 2)


class Quadrature(NamedTuple):
    """The quadrature of the integrands within a step."""

    solved: Solved
    apply: Callable[..., Float[Array, "batch values"]]
    """The integrands as a function of `(params, t, y)`; if `shared`, the vector field follows.

    The first one is integrated in the direction of the solve, the others forward in time.
    """
    bars: Float[Array, "batch integrals"]
    """The cotangents of the integrals."""
    together: bool
    """Whether the nodes inside a step are one batch, for accelerators."""

    @property
    def method(self) -> Method:
        return self.solved.stepper.method

    @property
    def shared(self) -> bool:
        """Whether a step ends at a node that is also a stage of the solver."""
        return self.method.first_same_as_last

    @property
    def inner(self) -> int:
        """The number of nodes inside a step."""
        return len(gauss(self.method)[0]) - (2 if self.shared else 0)

    def numbers(self, step: Int[Array, ""]) -> tuple[Any, int]:
        """The range of nodes of a step. Number 0, the start, has only its end."""
        first = jnp.where(step == 0, self.inner, 0)
        return first, self.inner + 1 if self.shared else self.inner

    def _place(self, step: Step, index) -> Float[Array, " rows"]:
        """The position of a node in the unit interval."""
        theta = jnp.asarray(self._rule[0], step.t.dtype)[index]
        return jnp.broadcast_to(theta, step.t.shape)

    @property
    def _rule(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights of a step. The node at its start may belong to the previous step."""
        nodes, weights = gauss(self.method)
        start = 1 if self.shared else 0
        return nodes[start:], weights[start:]

    def _weight(self, index, h: Float[Array, " rows"], after: Float[Array, " rows"]):
        """The weight of a node times the step size, linear in the sizes `h` and `after`.

        `after` is the size of the next step, which has a node at the same place.
        """
        h = jnp.where(index == self.inner, h + after, h) if self.shared else h
        return jnp.asarray(self._rule[1], h.dtype)[index] * h

    def _state(self, step: Step, theta: Float[Array, " rows"]):
        """The time and state at a node, with the mean slope up to it and the slope's weights."""
        weights = jax.vmap(self.method.dense_weights)(theta.astype(step.y.dtype))
        # As a product: XLA's sum over the first axis costs as much as a node of a small network.
        precision = jax.lax.Precision.HIGHEST
        if one_row(weights):
            slope = weighted_sum(weights[0], step.k)
        else:
            slope = jnp.einsum("rs,srn->rn", weights, step.k, precision=precision)
        beta = weights.T[..., None]
        return step.t + theta * step.h, step.y + step.h[:, None] * slope, slope, beta

    def _scale(self, weight: Float[Array, " rows"]) -> Float[Array, "batch integrals"]:
        """The factors of the integrands at a node in their integrals."""
        _, count = shape = self.bars.shape
        signed = [weight] + [jnp.abs(weight)] * (count - 1)
        return jnp.broadcast_to(jnp.stack(signed, -1).astype(self.bars.dtype), shape)

    def evaluate(self, step: Step, after, index) -> Float[Array, "batch integrals"]:
        """The contribution of a node to the integrals."""
        time, state, _, _ = self._state(step, self._place(step, index))
        values = self.apply(self.solved.params, time, state)
        scale = self._scale(self._weight(index, step.h, after))
        return scale * values[:, : self.bars.shape[1]]

    def along(self) -> Float[Array, "batch integrals"]:
        """The integrals along the recorded steps, summed in the order of the sweep."""

        def visit(step: Step, number, carry):
            integrals, after = carry

            def add(i, total):
                return total + self.evaluate(step, after, i)

            return fori_loop(*self.numbers(number), add, integrals), step.h

        carry = jnp.zeros_like(self.bars), jnp.zeros_like(self.solved.problem.t0)
        return walk_back(self.solved, visit, carry)[0]

    def interior(self, step: Step, number, bar: Step, params_bar, carry):
        """Integrate a step and pull its cotangents back, for `Sweep.interior`.

        It carries the integrals, their derivatives with respect to both times through the step
        sizes, and the size of the next step.
        """
        integrals, by_times, after = carry
        speeds = None
        if self.solved.timed:
            of_step = self.solved.step_tangents(step.t, step.h, number)
            of_next = self.solved.step_tangents(step.t + step.h, after, number + 1)
            speeds = [(this.h, next_.h) for this, next_ in zip(of_step, of_next, strict=True)]

        def add(index, carry):
            return self._add(step, after, index, speeds, carry)

        carry = (bar, params_bar, integrals, by_times)
        start, stop = self.numbers(number)
        if self.together:
            # The start is a step of size zero: nodes inside it have no weight.
            carry, start = add(jnp.arange(self.inner), carry), self.inner
        bar, params_bar, integrals, by_times = fori_loop(start, stop, add, carry)
        return bar, params_bar, (integrals, by_times, step.h)

    def _values_bar(self, scale, bar: Step, index) -> Float[Array, "batch values"]:
        """The cotangents of the values at a node."""
        values_bar = scale * self.bars
        if not self.shared:
            return values_bar
        # The cotangent that waits for the stage at the end of the step, which is the vector field
        # there.
        waiting = jnp.where(index == self.inner, bar.k[-1], 0.0)
        return jnp.concatenate([values_bar, waiting], axis=1)

    def _add(self, step: Step, after, index, speeds, carry):
        """Add the integrals of one or several nodes, and pull their cotangents back to the step.

        `speeds` are the derivatives of the sizes of this and the next step, with respect to each
        time.
        """
        over_nodes = jax.vmap if index.ndim else lambda f, *_: f
        bar, params_bar, integrals, by_times = carry

        def place(index):
            theta = self._place(step, index)
            scale = self._scale(self._weight(index, step.h, after))
            return theta, scale, self._state(step, theta), self._values_bar(scale, bar, index)

        theta, scale, (time, state, slope, beta), values_bar = over_nodes(place)(index)
        apply = over_nodes(self.apply, (None, 0, 0))
        params, timed = self.solved.params, self.solved.timed
        pulled = pulled_back(apply, params, time, state, values_bar, timed)
        values, dparams, dtime, dstate = pulled

        def contribution(index, theta, scale, values, slope, beta, dtime, dstate):
            """What a node adds to the cotangents of the step, the integrals, and their slopes."""
            of_node = scale * values[:, : self.bars.shape[1]]
            k_bar = step.h[None, :, None] * (beta * dstate[None])
            if speeds is None:
                untimed: Any = None
                return Step(untimed, untimed, dstate, k_bar), of_node, None
            along = theta * dtime + reduce_rows(jnp.sum, dstate * slope, theta)
            weight = self._weight(index, step.h, after)
            per_size = jnp.where(weight == 0, 0.0, 1 / jnp.where(weight == 0, 1.0, weight))
            per_size = per_size * jnp.sum(self.bars * of_node, axis=1).astype(weight.dtype)
            by_time = [
                reduce_rows(jnp.sum, per_size * self._weight(index, *speed), speed[0])
                for speed in speeds
            ]
            return Step(dtime, along, dstate, k_bar), of_node, jnp.stack(by_time)

        of_nodes = index, theta, scale, values, slope, beta, dtime, dstate
        contributions = over_nodes(contribution)(*of_nodes)
        if index.ndim:
            contributions = jax.tree.map(lambda x: x.sum(0), contributions)

        def add(x, dx):
            return x if dx is None else x + dx

        bar, integrals, by_times = jax.tree.map(add, (bar, integrals, by_times), contributions)
        return bar, jax.tree.map(jnp.add, params_bar, dparams), integrals, by_times
