"""The settings of a solve."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._jax.sharding import AxisName


class Stepper(eqx.Module):
    """How to step: a tableau, and either tolerances or a number of equal steps."""

    tableau: Any = eqx.field(static=True)
    """A `Tableau`, or None if diffrax runs the solver."""
    rtol: Float[Array, ""]
    atol: Float[Array, ""] | Float[Array, "1 n"]
    first_step: Float[Array, ""] | None
    steps: int | None = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    axis_name: AxisName | None = eqx.field(static=True)
    max_step: Float[Array, ""] | None = None
    breakpoints: Float[Array, " points"] | None = None
    """Times at which the vector field may jump."""
    dense: bool = eqx.field(static=True, default=False)
    """Whether to keep all accepted steps, so that the solution is known between the ends."""
    precision: str | None = eqx.field(static=True, default=None)
    """The precision of matrix products in the vector field."""
    raises: bool = eqx.field(static=True, default=False)
    """Whether a failed backward solve raises."""

    @property
    def tape_length(self) -> int:
        return self.max_steps if self.steps is None else self.steps


def weighted_sum(weights: Float[Array, "*sums stages"], k: Float[Array, "stages samples n"]):
    """`sum_i weights_i k_i`, or several of them."""
    return jnp.tensordot(weights, k, axes=1, precision=jax.lax.Precision.HIGHEST)


def limit_step(stepper: Stepper, h: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """The step size, capped at `max_step`."""
    return h if stepper.max_step is None else jnp.clip(h, -stepper.max_step, stepper.max_step)
