"""The training loss of a flow: the mean negative log-likelihood of a batch plus running costs.

It is a Bolza objective (`jaxode/ode/bolza.py`). Its payoff is the log-density: that of the base at
the end of the solve, and the divergence on the way. In the fused form, value and gradient come from
one sweep. Gradient methods without that form solve the augmented ODE: samples and costs together.

References: Chen et al. (2018), arXiv:1806.07366; Grathwohl et al. (2019), arXiv:1810.01367.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxode._checks.errors import Result
from jaxode._jax.closure import close_field
from jaxode._jax.sharding import vary_alike
from jaxode.flows.bases import BaseDensity, log_prob_of
from jaxode.flows.integrands import Integrands
from jaxode.ode import bolza
from jaxode.ode.adjoints.base import nan_unless
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


class BatchNLL(NamedTuple):
    """The inputs of the loss of a batch."""

    system: System
    """The system that carries the samples `y0 [batch, *event]` to the base. Its rows are the
    context."""
    integrands: Integrands
    base: BaseDensity
    probes: PyTree
    """The noise of the divergence, one row per sample."""
    weights: Float[Array, " batch"]
    """Weights of the samples in the mean. They sum to one."""

    def coefficients(self, dtype) -> Float[Array, " costs"]:
        """Coefficients of the running costs, which are those of the regularizers."""
        return jnp.asarray([r.weight for r in self.integrands.regularizers], dtype)


def evaluate(nll: BatchNLL) -> tuple[Float[Array, ""], NLLStats, Float[Array, "*rows"]]:
    """The loss, its statistics, and the time reached.

    Only the loss is differentiable.
    """
    system = nll.system
    fused = system.adjoint.fused and system.breakpoints is None
    loss, outcome = _fused(nll) if fused else _augmented(nll)
    values, stats, result, t_reached = jax.lax.stop_gradient(outcome)
    log_prob, log_det = values.payoff, values.integrals[:, 0]
    valid = nan_unless(jnp.atleast_1d(result == Result.SUCCESS), log_prob.dtype)
    costs, regularizers = values.costs * valid[:, None], nll.integrands.regularizers
    running = {regularizer.name: costs[:, i] for i, regularizer in enumerate(regularizers)}
    return loss, NLLStats(log_prob * valid, log_det * valid, stats, result, running), t_reached


def _augmented(nll: BatchNLL) -> tuple[Float[Array, ""], bolza.Outcome]:
    """Solve the samples together with the integrals of their costs."""
    system, integrands = nll.system, nll.integrands
    count = 1 + len(integrands.regularizers)
    solution = with_integrals(system, integrands.field_and_costs, nll.probes, (count,))
    z, costs = solution.y1
    ok, unused = jnp.atleast_1d(solution.ok), bolza.unused_rows(solution.result, nll.weights)
    z, costs = replace_rows((z, costs), unused, ok)
    # The divergence is integrated in the direction of the solve, running costs forward in time.
    forward = jnp.sign(system.t1 - system.t0).astype(system.y0.dtype)
    integrals = jnp.concatenate([costs[:, :1], costs[:, 1:] * forward], axis=1)
    log_base = log_prob_of(nll.base, z, system.stepper.precision)
    values = bolza.RowValues(log_base, integrals)
    coefficients = nll.coefficients(costs.dtype)
    loss, _ = bolza.weighted_sum_of_rows(values, coefficients, nll.weights, ok, unused)
    return loss, bolza.Outcome(values, solution.stats, solution.result, solution.t_reached)


def with_integrals(system: System, field, probes, shape: tuple[int, ...]) -> Solution:
    """Solve for the samples, and for integrals of this `shape` along each trajectory."""
    x = system.y0
    zeros = jnp.zeros((*x.shape[:1], *shape), x.dtype)
    return run(system._replace(field=field, y0=(x, zeros), row_args=(probes, system.row_args)))


def _fused(nll: BatchNLL) -> tuple[Float[Array, ""], bolza.Outcome]:
    """Solve the samples alone, and integrate their costs on the way back."""
    nll = vary_alike(nll)
    system, x = nll.system, nll.system.y0
    problem, stepper, ravel = to_problem(system)
    joint, with_field = system.batch == "joint", stepper.method.first_same_as_last

    def samples(y):
        return y.reshape(x.shape).astype(x.dtype)

    def costs_of_samples(t, y, args):
        def of_sample(t, z, params, row):
            dz, costs = nll.integrands.field_and_costs(t, (z, None), params, row)
            costs = costs.astype(ravel.dtype)
            slope = dz.reshape(-1).astype(costs.dtype)
            return jnp.concatenate([costs, slope]) if with_field else costs

        params, rows = args
        time, axis = (t[0], None) if joint else (t, 0)
        return jax.vmap(of_sample, (axis, 0, None, 0))(time, samples(y), params, rows)

    y0, t0 = problem.y0, problem.t0
    shared = (system.shared, (nll.probes, system.row_args))
    precision = stepper.precision
    costs, (_, (probes, _)) = close_field(precision, costs_of_samples, t0, y0, shared)

    # The samples, and so their density, may have lower precision than the solve.
    def log_base(t, y, args):
        return log_prob_of(nll.base, samples(y), precision).astype(ravel.dtype)

    terminal, _ = close_field(precision, log_base, t0, y0, ())
    weights = nll.weights.astype(ravel.dtype)
    inputs = bolza.Inputs(problem, costs, probes, terminal, weights)
    settings = bolza.Settings.constant(stepper, system.adjoint, nll.coefficients(ravel.dtype))
    loss, outcome = bolza.evaluate(inputs, settings)
    if joint:  # one solve for all rows
        of_solve = outcome.stats, outcome.result, outcome.t_reached
        stats, result, t_reached = jax.tree.map(lambda leaf: leaf[0], of_solve)
        outcome = outcome._replace(stats=stats, result=result, t_reached=t_reached)
    return loss, outcome
