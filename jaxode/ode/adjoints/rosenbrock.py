"""The chain rule through the linear solves of a Rosenbrock step. The equations: `sweep.py`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._jax.pullback import pulled_back
from jaxode._jax.tangents import along
from jaxode.ode.adjoints.base import Solved
from jaxode.ode.adjoints.tape import Step
from jaxode.ode.loop.problem import weighted_sum
from jaxode.ode.loop.rosenbrock import Linearized
from jaxode.ode.loop.rows import over_rows


class StartOfStep(NamedTuple):
    """The matrix of a step, and how the stages depend on its start."""

    solved: Solved
    step: Step
    linearized: Linearized
    C: Float[Array, "stages stages"]
    d: Float[Array, " stages"]

    @classmethod
    def of(cls, solved: Solved, step: Step) -> "StartOfStep":
        """With the factorization done again."""
        tableau, (t, h, y, k) = solved.stepper.tableau, step
        field, count = solved.slope(solved.params), len(k)
        C = jnp.asarray(tableau.C[:count, :count], y.dtype)
        d = jnp.asarray(tableau.d[:count], y.dtype)
        return cls(solved, step, Linearized.at(tableau, field, t, h, y), C, d)

    def pull(self, i: Any, bar: Float[Array, "samples n"], r: Float[Array, "stages samples n"]):
        """`r_i`, from the other contributions to `k_bar_i` and the `r_j` of later stages."""
        return self.linearized.solve(bar + weighted_sum(self.C[:, i], r), transposed=True)

    def pull_start(self, r: Float[Array, "stages samples n"]) -> tuple[Step, PyTree]:
        """The cotangents of the time, the size and the state at the start, and of the parameters.

        Given `r_i`, and for stage 0 what depends on it from elsewhere.
        """
        t, h, y, k = self.step
        solved = self.solved
        times = jnp.broadcast_to(self.d[1:, None].astype(t.dtype), (len(k) - 1, *t.shape))

        def tangents(params, t, y):
            """The vector field, and `J k_i + d_i f_t` for each stage."""
            field = solved.slope(params)
            if field.jacobian is None:
                push = lambda dt, dy: jax.jvp(lambda t, y: field(t, y), (t, y), (dt, dy))
                slopes, moved = jax.vmap(push)(times, k[1:])
                return slopes[0], moved
            moved = jnp.einsum("sij,ksj->ksi", field.jacobian(t, y), k[1:], precision="highest")
            slope, by_time = along(lambda t: field(t, y), t)
            return slope, moved + self.d[1:, None, None] * by_time[None]

        bars = r[0] + r[1], h[None, :, None] * r[1:]
        pulled = pulled_back(tangents, solved.params, t, y, bars, solved.timed)
        (_, moved), by_params, t_bar, y_bar = pulled
        if t_bar is None:
            return Step(jnp.zeros_like(t), jnp.zeros_like(h), y_bar, k), by_params
        products = over_rows(jnp.sum, jnp.sum(r[1:] * moved, axis=0), h)
        return Step(t_bar, products, y_bar, k), by_params
