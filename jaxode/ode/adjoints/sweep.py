"""The chain rule through the recorded steps of a forward solve, last to first.

With `y_bar` the cotangent of a step's end and `z_bar_i` that of stage `i`'s state,

    k_bar_i = h (b_i y_bar + sum_{j > i} A_ji z_bar_j),

and `z_bar_i` is the vjp of the vector field at stage `i` applied to `k_bar_i`. The cotangent of the
step's start is `y_bar + sum_i z_bar_i`.

Anything that depends on the inside of a step, such as a saved output, adds to the cotangents of its
stages. If the last stage is the first stage of the next step, it waits for that step's
contribution, and is pulled back once.

A step that needs the Jacobian (`loop/rosenbrock.py`) solves `M k_i = f_i + sum_j C_ij k_j + h d_i
f_t` with `M = I / gamma - h J`. There `k_bar_i` also gets `sum_{j > i} C_ji r_j`, and the vector
field is pulled back from `r_i = M^-T k_bar_i`. The rest depends on the start of the step alone:
`h sum_i r_i . (J k_i + d_i f_t)` is pulled back as a sum of tangents of the vector field, with no
derivative of the matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._jax.closure import ClosedField
from jaxode._jax.platform import is_for_cpu
from jaxode._jax.pullback import pulled_back, vjp
from jaxode._jax.sharding import fori_loop
from jaxode._jax.tangents import along
from jaxode.ode.adjoints.base import Solved
from jaxode.ode.adjoints.tape import Step, walk_back
from jaxode.ode.loop.problem import weighted_sum
from jaxode.ode.loop.rosenbrock import Linearized
from jaxode.ode.loop.rows import one_row, over_rows

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
    """Whatever `Sweep.interior` carries from step to step."""


class Sweep(NamedTuple):
    """How to go back over the steps."""

    solved: Solved
    interior: Callable[..., tuple[Step, PyTree, Any]] | None = None
    """`(step, number, bar, params_bar, carry) -> (bar, params_bar, carry)`: adds the contributions
    from the inside of a step to its cotangents `bar`. Steps are those of `walk_back`."""
    interior_pulls_last: bool = False
    """Whether `interior` also pulls back the cotangent that waits for the last stage."""

    @property
    def tableau(self) -> Any:
        return self.solved.stepper.tableau

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
        return self.interior is not None and self.tableau.first_same_as_last

    def run(self, y1_bar: Float[Array, "samples n"], carry: Any = None) -> Swept:
        """Go from the cotangent of the end state to the cotangents at the start."""
        solved, zero = self.solved, jnp.zeros_like(self.solved.problem.t0)
        slope_bar = jnp.zeros_like(y1_bar) if self.waits else None
        zeros = jax.tree.map(jnp.zeros_like, solved.params)
        swept = Swept(y1_bar, slope_bar, zeros, zero, zero, carry)
        return walk_back(solved, self._step, swept, whole=self.interior is not None)

    def _step(self, step: Step, number, swept: Swept) -> Swept:
        replaced, problem = self.solved.replaced, self.solved.problem
        if not one_row(replaced):
            # A row that has come to its end rests there, where the field need not be finite.
            rests = (step.h == 0) & (step.t == problem.t1) & (problem.t0 != problem.t1)
            replaced = replaced | rests
            if self.solved.timed or self.tableau.needs_jacobian:
                # Derivatives by times, and by a Jacobian, are products with the stages.
                step = step._replace(k=jnp.where(replaced[:, None], 0.0, step.k))
        at_step = self._replace(solved=self.solved._replace(replaced=replaced))
        bar, params_bar, carry = jax.tree.map(jnp.zeros_like, step), swept.params, swept.interior
        if swept.slope is not None:
            bar = bar._replace(k=bar.k.at[-1].set(swept.slope))
        if self.interior is not None:
            bar, params_bar, carry = self.interior(step, number, bar, params_bar, carry)
        # Before the first step, only its first stage is left: the last stage of step number 0.
        lowest = jnp.where(number == 0, len(step.k) - 1, 1) if self.waits else 0
        bar, params_bar = at_step._pull(step, bar, swept.y, params_bar, lowest)
        t0_bar, t1_bar = swept.t0, swept.t1
        if self.solved.timed:
            by_t0, by_t1 = self.solved.speeds(step.t, step.h, number)
            t0_bar = t0_bar + bar.t * by_t0.t + bar.h * by_t0.h
            t1_bar = t1_bar + bar.t * by_t1.t + bar.h * by_t1.h
        slope_bar = bar.k[0] if self.waits else None
        return Swept(bar.y, slope_bar, params_bar, t0_bar, t1_bar, carry)

    def _pull(self, step: Step, bar: Step, y_bar: Float[Array, "samples n"], params_bar, lowest):
        """The cotangents of a step, given the cotangents of its end, and of its stages from
        elsewhere.

        Stages below `lowest` are not pulled back; their cotangents wait.
        """
        t, h, y, k = step
        tableau, count = self.tableau, len(k)
        pulled = count - self.interior_pulls_last  # so many stages are pulled back here
        A = jnp.asarray(tableau.A[:count, :count], y.dtype)
        b = jnp.asarray(tableau.b[:count], y.dtype)
        c = jnp.asarray(tableau.c, t.dtype)
        per_step, apply_at = self.per_step, self.solved.apply
        varied = None if per_step else self.solved.params
        at_start: Any = None
        if tableau.needs_jacobian:
            lowest = 2  # Both first stages are the vector field at the start.
            linearized = Linearized.at(tableau, self.solved.slope(self.solved.params), t, h, y)
            at_start = linearized, jnp.asarray(tableau.C[:count, :count], y.dtype)

        def k_bar_of(i, z_bars, k_bar):
            bar = k_bar[i] + h[:, None] * (b[i] * y_bar + weighted_sum(A[:, i], z_bars))
            if at_start is None:
                return bar
            linearized, C = at_start
            return linearized.solve(bar + weighted_sum(C[:, i], k_bar), transposed=True)

        def stage(j, carry):
            z_bars, k_bar, params_bar, t_bar, h_bar = carry
            i = pulled - 1 - j
            increment, stage_bar = weighted_sum(A[i], k), k_bar_of(i, z_bars, k_bar)
            z, time = y + h[:, None] * increment, t + c[i] * h
            apply = lambda params, t, z: apply_at(self.solved.params if per_step else params, t, z)
            timed = self.solved.timed
            _, dparams, dtime, z_bar = pulled_back(apply, varied, time, z, stage_bar, timed)
            if dtime is not None:
                t_bar = t_bar + dtime
                h_bar = h_bar + c[i] * dtime + over_rows(jnp.sum, z_bar * increment, h)
            if not per_step:
                params_bar = jax.tree.map(jnp.add, params_bar, dparams)
            return z_bars.at[i].set(z_bar), k_bar.at[i].set(stage_bar), params_bar, t_bar, h_bar

        carry = (jnp.zeros_like(k), bar.k, params_bar, bar.t, bar.h)
        carry = fori_loop(0, pulled - lowest, stage, carry)
        z_bars, k_bar, params_bar, t_bar, h_bar = carry
        if self.waits:
            k_bar = k_bar.at[0].set(k_bar_of(0, z_bars, k_bar))
        if at_start is not None:
            k_bar = k_bar.at[1].set(k_bar_of(1, z_bars, k_bar))
            by_start, by_params = self._pull_start(step, k_bar)
            z_bars = z_bars.at[0].set(by_start.y)
            t_bar, h_bar = t_bar + by_start.t, h_bar + by_start.h
            params_bar = jax.tree.map(jnp.add, params_bar, by_params)
        if per_step:
            params_bar = self._gather(step, A, c, k_bar, params_bar)
        if self.solved.timed:
            h_bar = h_bar + over_rows(jnp.sum, y_bar * weighted_sum(b, k), h)
        # XLA's sum over the first axis is slow on a CPU.
        y_bar = y_bar + bar.y + weighted_sum(jnp.ones_like(b), z_bars)
        return Step(t_bar, h_bar, y_bar, k_bar), params_bar

    def _pull_start(self, step: Step, r: Float[Array, "stages samples n"]) -> tuple[Step, PyTree]:
        """The cotangents of a step that needs the Jacobian by its start and the parameters.

        Given `r_i`, and for stage 0 what depends on it from elsewhere.
        """
        (t, h, y, k), solved = step, self.solved
        d = jnp.asarray(self.tableau.d[1 : len(k)], y.dtype)
        times = jnp.broadcast_to(d[:, None].astype(t.dtype), (len(d), *t.shape))

        def tangents(params, t, y):
            """The vector field, and `J k_i + d_i f_t` for each stage."""
            field = solved.slope(params)
            if field.jacobian is None:
                push = lambda dt, dy: jax.jvp(lambda t, y: field(t, y), (t, y), (dt, dy))
                slopes, moved = jax.vmap(push)(times, k[1:])
                return slopes[0], moved
            moved = jnp.einsum("sij,ksj->ksi", field.jacobian(t, y), k[1:], precision="highest")
            slope, by_time = along(lambda t: field(t, y), t)
            return slope, moved + d[:, None, None] * by_time[None]

        bars = r[0] + r[1], h[None, :, None] * r[1:]
        pulled = pulled_back(tangents, solved.params, t, y, bars, solved.timed)
        (_, moved), by_params, t_bar, y_bar = pulled
        if t_bar is None:
            return Step(jnp.zeros_like(t), jnp.zeros_like(h), y_bar, k), by_params
        products = over_rows(jnp.sum, jnp.sum(r[1:] * moved, axis=0), h)
        return Step(t_bar, products, y_bar, k), by_params

    def _gather(self, step: Step, A, c, k_bar, params_bar):
        """Add the parameter gradient of all stages of a step, except one that waits."""
        first = 2 if self.tableau.needs_jacobian else int(self.waits)
        own = slice(first, len(k_bar) - self.interior_pulls_last)
        z = step.y[None] + step.h[None, :, None] * weighted_sum(A, step.k)
        times = step.t[None] + c[: len(k_bar), None] * step.h[None]
        stages = lambda params: jax.vmap(self.solved.apply, (None, 0, 0))(
            params, times[own], z[own]
        )
        (dparams,) = vjp(stages, self.solved.params)[1](k_bar[own])
        return jax.tree.map(jnp.add, params_bar, dparams)
