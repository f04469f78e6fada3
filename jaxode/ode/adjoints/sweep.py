"""The chain rule through the recorded steps of a forward solve, last to first.

With `y_bar` the cotangent of a step's end and `z_bar_i` that of stage `i`'s state,

    k_bar_i = h (b_i y_bar + sum_{j > i} A_ji z_bar_j),

and `z_bar_i` is the vjp of the vector field at stage `i` applied to `k_bar_i`. The cotangent of the
step's start is `y_bar + sum_i z_bar_i`.

Anything that depends on the inside of a step, such as a saved output, adds to the cotangents of its
stages. If the last stage is the first stage of the next step, it waits for that step's
contribution, and is pulled back once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._jax.pullback import vjp
from jaxode._jax.sharding import fori_loop, while_loop
from jaxode.ode.adjoints.tape import interval, replay
from jaxode.ode.loop.checkpoints import Checkpoints
from jaxode.ode.loop.integrate import Tape
from jaxode.ode.loop.mesh import Mesh
from jaxode.ode.loop.rows import over_rows
from jaxode.ode.loop.stepper import weighted_sum
from jaxode.ode.loop.tableau import Tableau


class Step(NamedTuple):
    """A recorded step, or the cotangents of one: start, size, state at the start, and stages."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    y: Float[Array, "samples n"]
    k: Float[Array, "stages samples n"]


class Swept(NamedTuple):
    """Cotangents at the start of a step, and of everything that all steps share."""

    y: Float[Array, "samples n"]
    slope: Float[Array, "samples n"] | None
    """The cotangent of the first stage, if it waits for the previous step."""
    params: PyTree
    t0: Float[Array, " rows"]
    t1: Float[Array, " rows"]
    inside: Any
    """Whatever `Sweep.inside` carries from step to step."""


class _State(NamedTuple):
    stop: Int[Array, ""]
    slope: Float[Array, "samples n"] | None
    """The vector field at the end of the step."""
    checkpoints: Checkpoints
    swept: Swept


class Sweep(NamedTuple):
    """How to go back over the steps."""

    apply: Callable[..., Float[Array, "samples n"]]
    """The vector field as a function of `(params, t, y)`."""
    params: PyTree
    tableau: Tableau
    tape: Tape
    mesh: Mesh
    timed: bool
    """Whether the times are differentiated."""
    unused: Bool[Array, " rows"]
    """Rows whose stages may be NaN and which add nothing to any gradient."""
    per_step: bool
    """Whether the parameter gradient is gathered from all stages of a step as one batch, because
    writing and adding it at every stage would cost more than the products."""
    inside: Callable[..., tuple[Step, PyTree, Any]] | None = None
    """`(step, number, bar, params_bar, carry) -> (bar, params_bar, carry)`: adds the contributions
    from the inside of a step to its cotangents `bar`. `number` counts from 1. Number 0 is the start
    of the solve, a step of size zero with nothing inside."""
    inside_pulls_last: bool = False
    """Whether `inside` also pulls back the cotangent that waits for the last stage."""

    @property
    def waits(self) -> bool:
        """Whether the last stage of a step is left to the next step: nothing else depends on it."""
        return self.inside is not None and self.tableau.first_same_as_last

    @property
    def count(self) -> int:
        """The number of stages that matter."""
        tableau = self.tableau
        return tableau.advancing_stages if self.inside is None else tableau.stages

    @property
    def pulled(self) -> int:
        """The number of stages that are pulled back here."""
        return self.count - 1 if self.inside_pulls_last else self.count

    def run(
        self, y1_bar: Float[Array, "samples n"], params_bar: PyTree, carry: Any = None
    ) -> Swept:
        """Go from the cotangent of the end state to the cotangents at the start."""
        zero = jnp.zeros_like(self.mesh.t0)
        slope_bar = jnp.zeros_like(y1_bar) if self.waits else None
        swept = Swept(y1_bar, slope_bar, params_bar, zero, zero, carry)
        slope = self.tape.slope if self.waits else None
        state = _State(self.tape.num_steps, slope, self.tape.checkpoints, swept)
        first = 0 if self.waits else 1
        return while_loop(lambda state: state.stop >= first, self._step, state).swept

    def _step(self, state: _State) -> _State:
        step, checkpoints = self._replay(state)
        swept, zeros = state.swept, jax.tree.map(jnp.zeros_like, step)
        bar, params_bar, carry = zeros, swept.params, swept.inside
        if swept.slope is not None:
            bar = bar._replace(k=bar.k.at[-1].set(swept.slope))
        if self.inside is not None:
            bar, params_bar, carry = self.inside(step, state.stop, bar, params_bar, carry)
        # Before the first step, only its first stage is left: the last stage of step number 0.
        start = self.pulled if self.inside_pulls_last else self.pulled - 1
        lowest = jnp.where(state.stop == 0, start, 1) if self.waits else 0
        bar, params_bar = self._pull(step, bar, swept.y, params_bar, lowest)
        t0_bar, t1_bar = swept.t0, swept.t1
        if self.timed:
            by_t0, by_t1 = self.mesh.speeds(step.t, step.h, state.stop)
            t0_bar = t0_bar + bar.t * by_t0.t + bar.h * by_t0.h
            t1_bar = t1_bar + bar.t * by_t1.t + bar.h * by_t1.h
        slope, slope_bar = (step.k[0], bar.k[0]) if self.waits else (None, None)
        swept = Swept(bar.y, slope_bar, params_bar, t0_bar, t1_bar, carry)
        return _State(state.stop - 1, slope, checkpoints, swept)

    def _replay(self, state: _State) -> tuple[Step, Checkpoints]:
        field = lambda t, y: self.apply(self.params, t, y)
        count = self.tableau.advancing_stages if self.waits else self.count
        y, k, checkpoints = replay(
            field, self.tableau, count, self.tape.times, state.checkpoints, state.stop
        )
        if state.slope is not None:
            k = jnp.concatenate([k, state.slope[None]])
        t, h = interval(self.tape.times, jnp.maximum(state.stop - 1, 0))
        if self.waits:
            h = jnp.where(state.stop == 0, 0.0, h)
        if self.timed and len(self.unused) > 1:
            # Derivatives with respect to times are sums of products with the stages.
            k = jnp.where(self.unused[:, None], 0.0, k)
        return Step(t, h, y, k), checkpoints

    def _pull(self, step: Step, bar: Step, y_bar: Float[Array, "samples n"], params_bar, lowest):
        """The cotangents of a step, given the cotangents of its end, and of its stages from
        elsewhere.

        Stages below `lowest` are not pulled back; their cotangents wait.
        """
        t, h, y, k = step
        A = jnp.asarray(self.tableau.A[: self.count, : self.count], y.dtype)
        b = jnp.asarray(self.tableau.b[: self.count], y.dtype)
        c = jnp.asarray(self.tableau.c, t.dtype)
        varied = None if self.per_step else self.params

        def k_bar_of(i, z_bars, k_bar):
            return k_bar[i] + h[:, None] * (b[i] * y_bar + weighted_sum(A[:, i], z_bars))

        def stage(j, carry):
            z_bars, k_bar, params_bar, t_bar, h_bar = carry
            i = self.pulled - 1 - j
            increment, stage_bar = weighted_sum(A[i], k), k_bar_of(i, z_bars, k_bar)
            z, time = y + h[:, None] * increment, t + c[i] * h
            apply = lambda params, t, z: self.apply(self.params if self.per_step else params, t, z)
            if self.timed:
                _, pull = vjp(apply, varied, time, z)
                dparams, dtime, z_bar = pull(stage_bar)
                t_bar = t_bar + dtime
                h_bar = h_bar + c[i] * dtime + over_rows(jnp.sum, z_bar * increment, len(h))
            else:
                _, pull = vjp(lambda params, z: apply(params, time, z), varied, z)
                dparams, z_bar = pull(stage_bar)
            if not self.per_step:
                params_bar = jax.tree.map(jnp.add, params_bar, dparams)
            return z_bars.at[i].set(z_bar), k_bar.at[i].set(stage_bar), params_bar, t_bar, h_bar

        carry = (jnp.zeros_like(k), bar.k, params_bar, bar.t, bar.h)
        carry = fori_loop(0, self.pulled - lowest, stage, carry)
        z_bars, k_bar, params_bar, t_bar, h_bar = carry
        if self.waits:
            k_bar = k_bar.at[0].set(k_bar_of(0, z_bars, k_bar))
        if self.per_step:
            params_bar = self._gather(step, A, c, k_bar, params_bar)
        if self.timed:
            h_bar = h_bar + over_rows(jnp.sum, y_bar * weighted_sum(b, k), len(h))
        # XLA's sum over the first axis is slow on a CPU.
        y_bar = y_bar + bar.y + weighted_sum(jnp.ones_like(b), z_bars)
        return Step(t_bar, h_bar, y_bar, k_bar), params_bar

    def _gather(self, step: Step, A, c, k_bar, params_bar):
        """Add the parameter gradient of all stages of a step, except one that waits."""
        own = slice(1 if self.waits else 0, self.pulled)
        z = step.y[None] + step.h[None, :, None] * jax.vmap(weighted_sum, (0, None))(A, step.k)
        times = step.t[None] + c[: self.count, None] * step.h[None]
        stages = lambda params: jax.vmap(self.apply, (None, 0, 0))(params, times[own], z[own])
        (dparams,) = vjp(stages, self.params)[1](k_bar[own])
        return jax.tree.map(jnp.add, params_bar, dparams)
