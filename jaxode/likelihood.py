"""The training objective of a flow: its value and its gradient in one sweep.

Solving forward carries the samples alone. Going back over the recorded steps, the costs that are
integrated along the trajectory (the divergence first) are evaluated at the nodes of a quadrature on
the solver's dense output, and pulled back to the step at once. So the forward solve does not pay
for the divergence, and the value costs nothing beside the gradient.

References: Chen et al. (2018), arXiv:1806.07366; Grathwohl et al. (2019), arXiv:1810.01367.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxode.adjoints.discrete import per_step_gradient
from jaxode.adjoints.replay import interval, nan_unless, once_only, replay, run
from jaxode.adjoints.sweep import Step, Sweep
from jaxode.closure import ClosedField
from jaxode.integrate import Tape
from jaxode.method import Method
from jaxode.results import Result, Stats
from jaxode.tableau import Tableau

# The golden ratio: its multiples are spread evenly over the unit interval.
GOLDEN = (5**0.5 - 1) / 2


class Inputs(NamedTuple):
    """What the objective is differentiated by."""

    field: ClosedField
    args: PyTree
    """`(params, context)`."""
    costs: ClosedField
    """`(t, y, (params, (probes, context))) -> [batch, costs]`, the divergence first."""
    probes: PyTree
    base: ClosedField
    """Log-density of the base, `[batch]`."""
    x: Float[Array, "rows n"]
    t0: Float[Array, ""]
    """The time of the data, where the solve starts."""
    t1: Float[Array, ""]
    weights: Float[Array, " batch"]
    """Of the samples in the mean; they sum to one."""


class Settings(eqx.Module):
    """How to compute the objective."""

    method: Method
    checkpoints: int = eqx.field(static=True)
    coefficients: Float[Array, " costs-1"]
    """Of the running costs after the divergence."""
    phase: Float[Array, " batch"] | None
    """Uniform random numbers for one random node a step and sample; None for Gauss-Legendre."""


class Objective(NamedTuple):
    """The loss, and what it is made of, for each sample."""

    loss: Float[Array, ""]
    log_prob: Float[Array, " batch"]
    log_det: Float[Array, " batch"]
    running: Float[Array, "batch costs-1"]
    stats: Stats
    result: Int[Array, " rows"]
    t_reached: Float[Array, " rows"]


@eqx.filter_jit
def objective(inputs: Inputs, settings: Settings) -> Objective:
    """The mean negative log-likelihood and running costs of a batch.

    Differentiable are the loss, with respect to `inputs`, and nothing else of it.
    """
    loss, rest = _objective(inputs, settings)
    return Objective(loss, *jax.lax.stop_gradient(rest))


@eqx.filter_custom_vjp
def _objective(inputs: Inputs, settings: Settings):
    integration, tape = _solve(inputs, settings)
    everything = (inputs.field, inputs.args, inputs.costs, inputs.probes)
    params, rest = eqx.partition(everything, eqx.is_array)
    nodes = _Nodes.of(params, rest, inputs, settings)
    integrals = _integrals(nodes, inputs, settings, tape)
    return _assemble(inputs, settings, integration, integrals)


@_objective.def_fwd
def _forward(perturbed, inputs: Inputs, settings: Settings):
    integration, tape = _solve(inputs, settings)
    everything = (inputs.field, inputs.args, inputs.costs, inputs.probes)
    wanted = (perturbed.field, perturbed.args, perturbed.costs, perturbed.probes)
    params, rest = eqx.partition(everything, wanted)
    nodes = _Nodes.of(params, rest, inputs, settings)
    timed = perturbed.t0 or perturbed.t1

    def apply(params, t, y):
        field, args, *_ = eqx.combine(params, rest)
        return field(t, y, args)

    base_params, base_rest = eqx.partition(inputs.base, perturbed.base)

    def base(base_params, z):
        base = eqx.combine(base_params, base_rest)
        return base(jnp.broadcast_to(inputs.t1, z.shape[:1]), z, ())

    _, base_vjp = jax.vjp(base, base_params, integration.y1)
    base_bar, z_bar = base_vjp(-inputs.weights)
    per_step = per_step_gradient(params, inputs.field)
    sweep = Sweep(
        apply, params, settings.method.tableau, tape, inputs.t0, inputs.t1, timed, per_step,
        nodes.inside(timed, per_step),
    )  # fmt: skip
    zeros = jax.tree.map(jnp.zeros_like, params)
    swept = sweep.run(z_bar, zeros, nodes.zero())
    out = _assemble(inputs, settings, integration, swept.inside)
    _, (log_prob, _, running, *_) = out
    weights_bar = running @ settings.coefficients - log_prob
    field_bar, args_bar, costs_bar, probes_bar = swept.params
    bars = Inputs(
        field_bar, args_bar, costs_bar, probes_bar, base_bar, swept.y, swept.t0, swept.t1,
        weights_bar,
    )  # fmt: skip
    # A failed solve has no gradient: NaN, not a plausible number.
    valid = jnp.prod(nan_unless(integration.result == Result.SUCCESS, inputs.x.dtype))
    bars = jax.tree.map(lambda leaf: leaf * valid.astype(leaf.dtype), bars)
    return out, eqx.filter(bars, perturbed)


@_objective.def_bwd
def _backward(bars, out, perturbed, inputs, settings):
    del perturbed, inputs, settings
    loss_bar, _ = out
    scaled = jax.tree.map(lambda bar: bar * loss_bar.astype(bar.dtype), bars)
    return once_only("nll", scaled)


def _solve(inputs: Inputs, settings: Settings):
    """The samples carried to the base density, and the tape of the steps."""
    solve = (inputs.field, inputs.args, inputs.x, inputs.t0, inputs.t1, None)
    return run(solve, settings.method, settings.checkpoints)


def _assemble(inputs: Inputs, settings: Settings, integration, integrals):
    t1 = jnp.broadcast_to(inputs.t1, integration.y1.shape[:1])
    log_det, running = integrals[:, 0], integrals[:, 1:]
    log_prob = inputs.base(t1, integration.y1, ()) + log_det
    valid = nan_unless(integration.result == Result.SUCCESS, log_prob.dtype)
    log_prob, log_det, running = log_prob * valid, log_det * valid, running * valid[:, None]
    loss = jnp.sum(inputs.weights * (running @ settings.coefficients - log_prob))
    rest = (log_prob, log_det, running, integration.stats, integration.result)
    return loss, (*rest, integration.t_reached)


def _integrals(nodes: "_Nodes", inputs: Inputs, settings: Settings, tape: Tape):
    """The integrals along the recorded steps, in the order in which the sweep adds them."""
    tableau = settings.method.tableau

    def step(carry):
        stop, integrals, checkpoints = carry
        field = lambda t, y: inputs.field(t, y, inputs.args)
        y, k, checkpoints = replay(field, tableau, tableau.stages, tape.times, checkpoints, stop)
        recorded = Step(*interval(tape.times, stop - 1), y, k)
        integrals = jax.lax.fori_loop(
            0, nodes.count, lambda i, total: total + nodes.evaluate(recorded, stop, i, 1), integrals
        )
        return stop - 1, integrals, checkpoints

    carry = (tape.num_steps, nodes.zero(), tape.checkpoints)
    return jax.lax.while_loop(lambda carry: carry[0] > 0, step, carry)[1]


def gauss_legendre(tableau: Tableau) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on the unit interval, as many as the order of the solver can use."""
    nodes, weights = np.polynomial.legendre.leggauss((tableau.order + 2) // 2)
    return (nodes + 1) / 2, weights / 2


class _Nodes(NamedTuple):
    """The quadrature of the costs within a step."""

    apply: Callable[..., Float[Array, "batch costs"]]
    """The costs as a function of `(params, t, y)`."""
    params: PyTree
    tableau: Tableau
    phase: Float[Array, " batch"] | None
    bars: Float[Array, "batch costs"]
    """The cotangents of the integrals."""

    @classmethod
    def of(cls, params, rest, inputs: Inputs, settings: Settings) -> "_Nodes":
        def apply(params, t, y):
            _, (shared, context), costs, probes = eqx.combine(params, rest)
            return costs(t, y, (shared, (probes, context)))

        of_costs = jnp.concatenate([-jnp.ones(1), settings.coefficients]).astype(inputs.x.dtype)
        bars = inputs.weights[:, None] * of_costs
        return cls(apply, params, settings.method.tableau, settings.phase, bars)

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
        return step.t + theta * step.h, step.y + step.h[:, None] * slope, slope, beta

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
                costs_bar = weights[:, None, None] * (scale * self.bars)
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
                bar = Step(t_bar, h_bar, bar.y + y_bar, bar.k + step.h[:, None] * k_bar)
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
