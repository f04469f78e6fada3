"""The training objective of a flow: its value and its gradient in one sweep.

Solving forward carries the samples alone. Going back over the recorded steps, the costs that are
integrated along the trajectory (the divergence first) are evaluated at the nodes of a quadrature on
the solver's dense output, and pulled back to the step at once. So the forward solve does not pay
for the divergence, and the value costs nothing beside the gradient.

References: Chen et al. (2018), arXiv:1806.07366; Grathwohl et al. (2019), arXiv:1810.01367.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxode._jax.closure import ClosedField, close_field
from jaxode._jax.sharding import fori_loop, vary_alike, while_loop
from jaxode.distributions import BaseDensity, log_prob_of
from jaxode.flows.quadrature import Nodes, shares_stages
from jaxode.ode.adjoints.discrete import per_step_gradient
from jaxode.ode.adjoints.replay import interval, nan_unless, once_only, replay, run
from jaxode.ode.adjoints.sweep import Step, Sweep
from jaxode.ode.loop.integrate import Tape
from jaxode.ode.loop.method import Method
from jaxode.ode.results import Result, Stats
from jaxode.ode.solve import DEFAULTS, pose
from jaxode.ode.validation import Time


class Inputs(NamedTuple):
    """What the objective is differentiated by."""

    field: ClosedField
    args: PyTree
    """`(params, context)`."""
    costs: ClosedField
    """`(t, y, (params, (probes, context))) -> [batch, costs]`, the divergence first; with the
    vector field after them, `[batch, costs + n]`, if the quadrature has nodes at stages."""
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
    """Uniform random numbers for one random node a step and sample; None for Gauss nodes."""


class Objective(NamedTuple):
    """The loss, and what it is made of, for each sample."""

    loss: Float[Array, ""]
    log_prob: Float[Array, " batch"]
    log_det: Float[Array, " batch"]
    running: Float[Array, "batch costs-1"]
    stats: Stats
    result: Int[Array, " rows"]
    t_reached: Float[Array, " rows"]


class Solve(NamedTuple):
    """What carries the samples to the base density, as for `solve_batch`."""

    field: Callable[..., Float[Array, " *event"]]
    x: Float[Array, "batch *event"]
    t0: Time
    """The time of the data, where the solve starts."""
    t1: Time
    params: PyTree
    context: PyTree
    step_control: Literal["joint", "per_sample"]
    options: dict[str, Any]


def objective(
    where: str,
    solve: Solve,
    field_and_costs: Callable[..., tuple[Float[Array, " *event"], Float[Array, " costs"]]],
    probes: PyTree,
    base: BaseDensity,
    weights: Float[Array, " batch"],
    coefficients: tuple[float, ...],
    phase: Float[Array, " batch"] | None,
) -> Objective:
    """The mean negative log-likelihood and running costs of a batch.

    Differentiable is the loss alone. `field_and_costs(t, (z, None), params, (probe, context))` is
    the vector field of one sample, and its costs: the divergence, and one running cost for each of
    the `coefficients`.
    """
    solve, probes, weights, phase = vary_alike((solve, probes, weights, phase))
    field, x, t0, t1, params, context, step_control, options = solve
    options = {**DEFAULTS, **options}
    joint = step_control == "joint"
    start = x[None] if joint else x
    problem, ravel = pose(
        where, field, start, t0, t1, params, context, step_control, options, False
    )
    per_row = not joint or phase is not None

    def rows(y):
        return y.reshape(x.shape).astype(x.dtype)

    with_field = shares_stages(problem.method.tableau, phase)

    def costs_of_rows(t, y, args):
        def one(t, z, params, row):
            dz, costs = field_and_costs(t, (z, None), params, row)
            parts = [costs, dz.reshape(-1).astype(costs.dtype)]
            return jnp.concatenate(parts) if with_field else costs

        params, rest = args
        time, axis = (t, 0) if per_row else (t[0], None)
        return jax.vmap(one, (axis, 0, None, 0))(time, rows(y), params, rest)

    y0 = problem.y0
    like = y0.reshape(x.shape[0], math.prod(x.shape[1:])) if per_row else y0
    times = lambda y: jnp.broadcast_to(problem.t0, y.shape[:1])
    closed_costs, (_, (probes, _)) = close_field(
        costs_of_rows, (field_and_costs, per_row), times(like), like, (params, (probes, context))
    )
    # The samples may be of lower precision than the solve, and their density with them.
    log_prob = lambda t, y, args: log_prob_of(base, rows(y)).astype(ravel.dtype)
    closed_base, _ = close_field(log_prob, base, times(y0), y0, ())
    inputs = Inputs(
        problem.field, problem.args, closed_costs, probes, closed_base, y0, problem.t0, problem.t1,
        weights.astype(ravel.dtype),
    )  # fmt: skip
    settings = Settings(
        problem.method, options["adjoint"].checkpoints,
        jnp.asarray(coefficients, ravel.dtype), phase,
    )  # fmt: skip
    try:
        loss, rest = _jitted(inputs, settings)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"{where}(adjoint=...): {type(options['adjoint']).__name__} has reverse-mode "
            "derivatives (jax.grad, jax.vjp), but no forward mode (jax.jvp, jax.jacfwd) of the "
            "loss itself. Pass adjoint=jaxode.ForwardMode() to cnf."
        ) from error
    return Objective(loss, *jax.lax.stop_gradient(rest))


@eqx.filter_jit
def _jitted(inputs: Inputs, settings: Settings):
    return _objective(inputs, settings)


def _nodes(params, rest, inputs: Inputs, settings: Settings) -> Nodes:
    """The quadrature of the costs, as a function of the differentiated leaves."""

    def apply(params, t, y):
        _, (shared, context), costs, probes = eqx.combine(params, rest)
        return costs(t, y, (shared, (probes, context)))

    of_costs = jnp.concatenate([-jnp.ones(1, inputs.x.dtype), settings.coefficients])
    bars = jnp.outer(inputs.weights, of_costs)
    return Nodes(apply, params, settings.method.tableau, settings.phase, bars)


@eqx.filter_custom_vjp
def _objective(inputs: Inputs, settings: Settings):
    integration, tape = _solve(inputs, settings)
    everything = (inputs.field, inputs.args, inputs.costs, inputs.probes)
    params, rest = eqx.partition(everything, eqx.is_array)
    nodes = _nodes(params, rest, inputs, settings)
    integrals = _integrals(nodes, inputs, settings, tape)
    return _assemble(inputs, settings, integration, integrals)


@_objective.def_fwd
def _forward(perturbed, inputs: Inputs, settings: Settings):
    for closed in ("field", "costs", "base"):
        getattr(inputs, closed).check_closed_over(getattr(perturbed, closed), inputs.x)
    integration, tape = _solve(inputs, settings)
    everything = (inputs.field, inputs.args, inputs.costs, inputs.probes)
    wanted = (perturbed.field, perturbed.args, perturbed.costs, perturbed.probes)
    params, rest = eqx.partition(everything, wanted)
    nodes = _nodes(params, rest, inputs, settings)
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
        nodes.inside(timed), nodes.shared,
    )  # fmt: skip
    zeros = jax.tree.map(jnp.zeros_like, params)
    swept = sweep.run(z_bar, zeros, (nodes.zero(), _no_step(tape)))
    integrals, _ = swept.inside
    out = _assemble(inputs, settings, integration, integrals)
    by_span = nodes.by_span(integrals, inputs.t1 - inputs.t0)
    _, (log_prob, _, running, *_) = out
    weights_bar = running @ settings.coefficients - log_prob
    field_bar, args_bar, costs_bar, probes_bar = swept.params
    bars = Inputs(
        field_bar, args_bar, costs_bar, probes_bar, base_bar, swept.y, swept.t0 - by_span,
        swept.t1 + by_span, weights_bar,
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


def _no_step(tape: Tape) -> Float[Array, " rows"]:
    """The size of the step after the last one."""
    return jnp.zeros_like(tape.times[0])


def _integrals(nodes: Nodes, inputs: Inputs, settings: Settings, tape: Tape):
    """The integrals along the recorded steps, in the order in which the sweep adds them."""
    tableau = settings.method.tableau

    def step(carry):
        stop, integrals, after, checkpoints = carry
        field = lambda t, y: inputs.field(t, y, inputs.args)
        y, k, checkpoints = replay(field, tableau, tableau.stages, tape.times, checkpoints, stop)
        t, h = interval(tape.times, jnp.maximum(stop - 1, 0))
        recorded = Step(t, jnp.where(stop == 0, 0.0, h), y, k)
        add = lambda i, total: total + nodes.evaluate(recorded, after, stop, i)
        integrals = fori_loop(*nodes.numbers(stop), add, integrals)
        return stop - 1, integrals, recorded.h, checkpoints

    carry = (tape.num_steps, nodes.zero(), _no_step(tape), tape.checkpoints)
    first = 0 if nodes.shared else 1
    return while_loop(lambda carry: carry[0] >= first, step, carry)[1]
