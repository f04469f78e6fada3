"""The training loss of a flow: the mean negative log-likelihood of a batch plus running costs.

In the fused form, value and gradient come from one sweep. The forward solve carries only the
samples. The backward sweep evaluates the integrated costs (the divergence first) at quadrature
nodes on the solver's dense output, and pulls them back to their step at once. So the forward solve
does not pay for the divergence, and the value is free once the gradient is computed.

Other gradient methods solve the augmented ODE: samples and costs together.

References: Chen et al. (2018), arXiv:1806.07366; Grathwohl et al. (2019), arXiv:1810.01367.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxode._checks.errors import Result
from jaxode._jax.closure import ClosedField, close_field
from jaxode._jax.modes import differentiable, with_sweep
from jaxode._jax.sharding import vary_alike
from jaxode._jax.vmap_rule import one_by_one, plain, with_vmap_rule
from jaxode.flows.bases import BaseDensity, log_prob_of
from jaxode.flows.integrands import Integrands
from jaxode.flows.likelihood.quadrature import Quadrature
from jaxode.ode.adjoints.base import Solved, nan_unless
from jaxode.ode.adjoints.flat import pulled_leaves, undifferentiated
from jaxode.ode.adjoints.sweep import Sweep, rows_are_cheap
from jaxode.ode.adjoints.vmap import is_busy
from jaxode.ode.loop.initial_value_problem import InitialValueProblem, Stepper
from jaxode.ode.loop.rows import replace_rows
from jaxode.ode.loop.stats import Stats
from jaxode.ode.solution import Solution
from jaxode.ode.solve import run
from jaxode.ode.system import System, to_problem


class NLLStats(NamedTuple):
    """Statistics that `nll_and_stats` returns beside the loss."""

    log_prob: Float[Array, " batch"]
    """Log-density of each sample, in nats."""
    log_det: Float[Array, " batch"]
    """Its change-of-volume part: `log_prob - log p_base(z(t0))`."""
    stats: Stats
    """Work of the forward solve."""
    result: Int[Array, "*rows"]
    """`Result` code of the forward solve. `INVALID_ARGUMENT` if the weights are wrong."""
    running: dict[str, Float[Array, " batch"]]
    """The integral of each regularizer's cost along each trajectory, by name."""


class Objective(NamedTuple):
    """The parts of the loss of a batch."""

    system: System
    """The system that carries the samples `y0 [batch, *event]` to the base. Its rows are the
    context."""
    integrands: Integrands
    base: BaseDensity
    probes: PyTree
    """The noise of the divergence, one row per sample."""
    weights: Float[Array, " batch"]
    """Weights of the samples in the mean. They sum to one."""

    def coefficients(self, dtype) -> Float[Array, " costs-1"]:
        """Coefficients of the running costs after the divergence."""
        return jnp.asarray([r.weight for r in self.integrands.regularizers], dtype)


def evaluate(objective: Objective) -> tuple[Float[Array, ""], NLLStats, Float[Array, "*rows"]]:
    """The loss, its statistics, and the time reached.

    Only the loss is differentiable.
    """
    system = objective.system
    compute = _fused if system.adjoint.fused and system.breakpoints is None else _augmented
    loss, rest = compute(objective)
    log_prob, log_det, running, stats, result, t_reached = jax.lax.stop_gradient(rest)
    costs = objective.integrands.regularizers
    by_name = {cost.name: running[:, i] for i, cost in enumerate(costs)}
    return loss, NLLStats(log_prob, log_det, stats, result, by_name), t_reached


def _augmented(objective: Objective):
    """Solve the samples together with the integrals of their costs."""
    system, integrands = objective.system, objective.integrands
    count = 1 + len(integrands.regularizers)
    solution = with_integrals(system, integrands.field_and_costs, objective.probes, (count,))
    z, costs = solution.y1
    ok, unused = jnp.atleast_1d(solution.ok), unused_rows(solution.result, objective.weights)
    z, costs = replace_rows((z, costs), unused, ok)
    # The divergence is integrated in the direction of the solve, running costs forward in time.
    forward = jnp.sign(system.t1 - system.t0).astype(system.y0.dtype)
    integrals = jnp.concatenate([costs[:, :1], costs[:, 1:] * forward], axis=1)
    log_base = log_prob_of(objective.base, z, system.stepper.precision)
    coefficients = objective.coefficients(costs.dtype)
    loss, _, values = _assemble(log_base, integrals, coefficients, objective.weights, ok, unused)
    return loss, (*values, solution.stats, solution.result, solution.t_reached)


def with_integrals(system: System, field, probes, each: tuple[int, ...]) -> Solution:
    """Solve for the samples, and for integrals of shape `each` along the way of each sample."""
    x = system.y0
    zeros = jnp.zeros((*x.shape[:1], *each), x.dtype)
    return run(system._replace(field=field, y0=(x, zeros), row_args=(probes, system.row_args)))


def unused_rows(result: Int[Array, "*rows"], weights: Float[Array, " batch"]):
    """Which samples of weight zero failed in their own solve, `[rows]`."""
    failed = jnp.atleast_1d(result != Result.SUCCESS)
    return failed & (weights == 0) if result.shape == weights.shape else jnp.zeros_like(failed)


def _assemble(log_base, integrals, coefficients, weights, ok, unused):
    """The loss, the losses of the samples, and their log-densities, log-determinants and costs."""
    log_det, running = integrals[:, 0], integrals[:, 1:]
    log_prob = log_base + log_det
    penalty = jnp.matmul(running, coefficients, precision=jax.lax.Precision.HIGHEST)
    losses = (penalty - log_prob) * nan_unless(ok | unused, log_prob.dtype)
    losses = losses.astype(weights.dtype)
    # A row of weight zero may also end where the base density is zero.
    losses = jnp.where(unused | ((weights == 0) & ~jnp.isfinite(losses)), 0, losses)
    valid = nan_unless(ok, log_prob.dtype)
    values = log_prob * valid, log_det * valid, running * valid[:, None]
    return jnp.sum(weights * losses), losses, values


class Inputs(NamedTuple):
    """The differentiated inputs of the fused loss."""

    problem: InitialValueProblem
    """The problem of the samples: `args` are `(params, context)`, and the solve starts at the time
    of the data."""
    costs: ClosedField
    """`(t, y, (params, (probes, context))) -> [batch, costs]`, the divergence first. If the
    quadrature has nodes at stages, the vector field follows: `[batch, costs + n]`."""
    probes: PyTree
    base: ClosedField
    """Log-density of the base, `[batch]`."""
    weights: Float[Array, " batch"]


class Settings(eqx.Module):
    """Options of the fused loss."""

    stepper: Stepper
    adjoint: Any = eqx.field(static=True)
    coefficients: Float[Array, " costs-1"]


def _fused(objective: Objective):
    objective = vary_alike(objective)
    system, x = objective.system, objective.system.y0
    problem, stepper, ravel = to_problem(system)
    joint, with_field = system.batch == "joint", stepper.method.first_same_as_last

    def samples(y):
        return y.reshape(x.shape).astype(x.dtype)

    def costs_of_samples(t, y, args):
        def one(t, z, params, row):
            dz, costs = objective.integrands.field_and_costs(t, (z, None), params, row)
            costs = costs.astype(ravel.dtype)
            parts = [costs, dz.reshape(-1).astype(costs.dtype)]
            return jnp.concatenate(parts) if with_field else costs

        params, rest = args
        time, axis = (t[0], None) if joint else (t, 0)
        return jax.vmap(one, (axis, 0, None, 0))(time, samples(y), params, rest)

    y0, t0 = problem.y0, problem.t0
    shared = (system.shared, (objective.probes, system.row_args))
    precision = stepper.precision
    costs, (_, (probes, _)) = close_field(precision, costs_of_samples, t0, y0, shared)

    # The samples, and so their density, may have lower precision than the solve.
    def log_prob_at(z):
        return log_prob_of(objective.base, z, precision)

    def log_prob(t, y, args):
        return log_prob_at(samples(y)).astype(ravel.dtype)

    base, _ = close_field(precision, log_prob, t0, y0, ())
    inputs = Inputs(problem, costs, probes, base, objective.weights.astype(ravel.dtype))
    coefficients = objective.coefficients(ravel.dtype)
    settings = Settings(undifferentiated(stepper), system.adjoint, coefficients)
    loss, rest = one_after_the_other(_loss, inputs, settings)
    if joint:
        *of_samples, stats, result, t_reached = rest
        rest = (*of_samples, *jax.tree.map(lambda leaf: leaf[0], (stats, result, t_reached)))
    return loss, rest


def _solve(perturbed: Inputs, inputs: Inputs, settings: Settings) -> tuple[Solved, Quadrature]:
    """The solve on the way back, and the quadrature of the costs along it."""
    problem, costs = inputs.problem, (inputs.costs, inputs.probes)
    recorded = settings.adjoint.record(problem, settings.stepper)
    unused = unused_rows(recorded[0].result, inputs.weights)
    perturbed_costs = (perturbed.costs, perturbed.probes)
    solved = Solved.of(
        problem, perturbed.problem, settings.stepper, recorded, unused, costs, perturbed_costs
    )

    def apply(params, t, y):
        _, (shared, context), costs, probes = solved.parts(params)
        return costs(*solved.finite(t, y), (shared, (probes, context)))

    of_costs = jnp.concatenate([-jnp.ones(1, problem.y0.dtype), settings.coefficients])
    bars = jnp.outer(inputs.weights, of_costs)
    return solved, Quadrature(solved, apply, bars, rows_are_cheap(problem.field))


def _outcome(inputs: Inputs, settings: Settings, solved: Solved, log_base, integrals):
    """The loss with all that `evaluate` returns, and the losses of the samples."""
    loss, losses, values = _assemble(
        log_base, integrals, settings.coefficients, inputs.weights, solved.ok, solved.masked
    )
    integration = solved.integration
    return (
        loss, (*values, integration.stats, integration.result, integration.t_reached)
    ), losses  # fmt: skip


def _loss(inputs: Inputs, settings: Settings):
    """The loss and all that `evaluate` returns, with every mode and order of differentiation."""
    leaves, structure = jax.tree.flatten((inputs, settings))

    def run(leaves):
        inputs, settings = structure.unflatten(leaves)
        nothing = jax.tree.map(lambda _: False, inputs)
        solved, quadrature = _solve(nothing, inputs, settings)
        log_base = inputs.base(inputs.problem.t1, solved.integration.y1, ())
        return _outcome(inputs, settings, solved, log_base, quadrature.along())[0]

    def record(moved, leaves) -> Any:
        """The loss with its gradient, by which the sweep multiplies."""
        perturbed, _ = structure.unflatten(moved)

        def with_gradient(inputs, settings):
            (loss, rest), bars = _loss_and_bars(perturbed, inputs, settings)
            return loss, rest, pulled_leaves(perturbed, inputs, bars)

        return one_after_the_other(with_gradient, *structure.unflatten(leaves))

    def scaled(moved, touched, leaves, gradient, bars):
        del moved, touched, leaves
        return [bar * bars[0].astype(bar.dtype) for bar in gradient]

    return differentiable(with_sweep(run, record, scaled), run, leaves)


def one_after_the_other(run, inputs: Inputs, settings: Settings):
    """`run(inputs, settings)`. Under `jax.vmap`, each of several busy losses has its own loop."""

    def rule(size: int, mapped, inputs: Inputs, settings: Settings):
        del size
        mapping = one_by_one if is_busy(inputs.problem.field) else plain
        return mapping(run, mapped, inputs, settings)

    if settings.stepper.axis_name is not None:
        return run(inputs, settings)
    return with_vmap_rule(run, rule, inputs, settings)


def _loss_and_bars(perturbed: Inputs, inputs: Inputs, settings: Settings):
    problem = inputs.problem
    for closed, by in ((inputs.costs, perturbed.costs), (inputs.base, perturbed.base)):
        closed.check_closed_over(by, problem.y0)
    solved, quadrature = _solve(perturbed, inputs, settings)
    base_params, rest = eqx.partition(inputs.base, perturbed.base)

    def log_prob(params, z):
        return eqx.combine(params, rest)(problem.t1, z, ())

    log_base, pull = jax.vjp(log_prob, base_params, solved.integration.y1)
    base_bar, z_bar = pull(-inputs.weights)
    zero = jnp.zeros_like(problem.t0)
    carry = jnp.zeros_like(quadrature.bars), jnp.stack([zero] * 2), zero
    swept = Sweep(solved, quadrature.interior, quadrature.shared).run(z_bar, carry)
    integrals, by_times, _ = swept.interior
    out, losses = _outcome(inputs, settings, solved, log_base, integrals)
    field_bar, args_bar, costs_bar, probes_bar = swept.params
    t0_bar, t1_bar = swept.t0 + by_times[0], swept.t1 + by_times[1]
    problem_bar = InitialValueProblem(field_bar, args_bar, swept.y, t0_bar, t1_bar, None)
    bars = Inputs(problem_bar, costs_bar, probes_bar, base_bar, weights=losses)
    valid = jnp.prod(nan_unless(solved.ok | solved.masked, swept.y.dtype))
    bars = jax.tree.map(lambda leaf: leaf * valid.astype(leaf.dtype), bars)
    return out, eqx.filter(bars, perturbed)
