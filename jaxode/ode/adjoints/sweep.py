"""The chain rule through the recorded steps of a forward solve, last to first.

Each method pulls back its own step (`solvers/`). Anything that depends on the inside of a step,
such as a saved output, adds to the cotangents of its stages. If the last stage is the first stage
of the next step, it waits for that step's contribution, and is pulled back once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._jax.closure import ClosedField
from jaxode._jax.platform import is_for_cpu
from jaxode.ode.adjoints.base import Solved
from jaxode.ode.adjoints.replay import walk_back
from jaxode.ode.loop.rows import one_row
from jaxode.ode.loop.trajectory import Step

# If parameters outnumber the work of an evaluation by this factor, their gradient is gathered once
# per step. Measured at batch 8, with 1.2 million parameters and a tenth of the work: 0.8x the time.
PARAMETERS_PER_WORK = 4
# Up to this many numbers per evaluation, an accelerator spends more time starting kernels than
# running them. XLA's estimates for a TPU v5e with all stages gathered: 0.65x the cycles at 1.7
# million numbers, 1.13x at 30 million (benchmarks/NOTES.md).
WORK_OF_KERNELS = 7_000_000


def rows_are_cheap(field: ClosedField) -> bool:
    """Whether an accelerator takes longer to start kernels than to run them."""
    return not is_for_cpu() and field.work_size <= WORK_OF_KERNELS


class Swept(NamedTuple):
    """Cotangents at the start of a step, and of everything that all steps share."""

    y: Float[Array, "samples n"]
    slope: Float[Array, "samples n"] | None
    """The cotangent of the first stage, if it waits for the previous step."""
    params: PyTree
    t0: Float[Array, " rows"]
    t1: Float[Array, " rows"]
    interior: Any
    """The carry of `Sweep.interior` from step to step."""


class Sweep(NamedTuple):
    """Callbacks of a sweep back over the steps."""

    solved: Solved
    interior: Callable[..., tuple[Step, PyTree, Any]] | None = None
    """`(step, number, bar, params_bar, carry) -> (bar, params_bar, carry)`: adds the contributions
    from the inside of a step to its cotangents `bar`. Steps are those of `walk_back`."""
    interior_pulls_last: bool = False
    """Whether `interior` also pulls back the cotangent that waits for the last stage."""

    @property
    def method(self) -> Any:
        return self.solved.stepper.method

    @property
    def per_step(self) -> bool:
        """Whether the parameter gradient is gathered from all stages of a step as one batch,
        because writing and adding it at every stage would cost more than the products."""
        field, params = self.solved.problem.field, self.solved.params
        if rows_are_cheap(field):
            return True
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        return size > PARAMETERS_PER_WORK * field.work_size

    @property
    def waits(self) -> bool:
        """Whether the last stage of a step is left to the next step: nothing else depends on it."""
        return self.interior is not None and self.method.first_same_as_last

    def run(self, y1_bar: Float[Array, "samples n"], carry: Any = None) -> Swept:
        """Go from the cotangent of the end state to the cotangents at the start."""
        solved, zero = self.solved, jnp.zeros_like(self.solved.problem.t0)
        slope_bar = jnp.zeros_like(y1_bar) if self.waits else None
        zeros = jax.tree.map(jnp.zeros_like, solved.params)
        swept = Swept(y1_bar, slope_bar, zeros, zero, zero, carry)
        return walk_back(solved, self._step, swept, whole=self.interior is not None)

    def _step(self, step: Step, number, swept: Swept) -> Swept:
        masked, problem = self.solved.masked, self.solved.problem
        if not one_row(masked):
            # A row that has reached its end waits there, where the field need not be finite.
            waits = (step.h == 0) & (step.t == problem.t1) & (problem.t0 != problem.t1)
            masked = masked | waits
            if self.solved.timed or self.method.implicit:
                # Derivatives by times or of a Jacobian multiply stages, which may not be finite.
                step = step._replace(k=jnp.where(masked[:, None], 0.0, step.k))
        at_step = self._replace(solved=self.solved._replace(masked=masked))
        bar, params_bar, carry = jax.tree.map(jnp.zeros_like, step), swept.params, swept.interior
        if swept.slope is not None:
            bar = bar._replace(k=bar.k.at[-1].set(swept.slope))
        if self.interior is not None:
            bar, params_bar, carry = self.interior(step, number, bar, params_bar, carry)
        # Before the first step, only its first stage is left: the last stage of step number 0.
        lowest = jnp.where(number == 0, len(step.k) - 1, 1) if self.waits else 0
        bar, params_bar = self.method.pull_back(at_step, step, bar, swept.y, params_bar, lowest)
        t0_bar, t1_bar = swept.t0, swept.t1
        if self.solved.timed:
            by_t0, by_t1 = self.solved.step_tangents(step.t, step.h, number)
            t0_bar = t0_bar + bar.t * by_t0.t + bar.h * by_t0.h
            t1_bar = t1_bar + bar.t * by_t1.t + bar.h * by_t1.h
        slope_bar = bar.k[0] if self.waits else None
        return Swept(bar.y, slope_bar, params_bar, t0_bar, t1_bar, carry)
