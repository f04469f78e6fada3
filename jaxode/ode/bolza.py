"""Bolza objectives of optimal control: running costs less a payoff, summed over rows.

    J      = sum over rows of  weight * (coefficients @ integrals of running costs - payoff)
    payoff = terminal payoff at y(t1) + integral over [t0, t1] of the running payoff

Value and gradient come from one sweep. The forward solve carries only the state. The backward sweep
evaluates the integrands at quadrature nodes on the solver's dense output, and pulls them back to
their step at once. So the forward solve does not pay for integrals, and the value is free once the
gradient is computed.

References: Bryson and Ho (1975), Applied Optimal Control.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxode._checks.errors import Result
from jaxode._jax.closure import ClosedField
from jaxode._jax.modes import differentiable, with_sweep
from jaxode._jax.vmap_rule import one_by_one, plain, with_vmap_rule
from jaxode.ode.adjoints.base import Solved, nan_unless
from jaxode.ode.adjoints.flat import pulled_leaves, undifferentiated
from jaxode.ode.adjoints.sweep import Sweep, rows_are_cheap
from jaxode.ode.adjoints.vmap import is_busy
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.stats import Stats
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.quadrature import Quadrature


class Inputs(NamedTuple):
    """The differentiated inputs of an objective."""

    problem: InitialValueProblem
    """The problem that is solved. Its `args` are `(shared, row_args)`."""
    integrands: ClosedField
    """The running payoff, then the running costs: `(t, y, (shared, (integrand_args, row_args))) ->
    [batch, 1 + costs]`. If the quadrature has nodes at stages, the vector field follows:
    `[batch, 1 + costs + n]`."""
    integrand_args: PyTree
    """Arguments per row of the integrands alone."""
    terminal: ClosedField
    """The payoff of the end state, `(t1, y1, ()) -> [batch]`."""
    weights: Float[Array, " batch"]
    """Weights of the rows in the sum."""


class Settings(eqx.Module):
    """The settings of an objective, which are not differentiated."""

    stepper: Stepper
    adjoint: Any = eqx.field(static=True)
    """A gradient method that is `fused`."""
    coefficients: Float[Array, " costs"]
    """Factors of the running costs, which are integrated forward in time."""

    @classmethod
    def constant(
        cls, stepper: Stepper, adjoint: Any, coefficients: Float[Array, " costs"]
    ) -> "Settings":
        """The settings, with a stepper that has no derivatives."""
        return cls(undifferentiated(stepper), adjoint, coefficients)


class RowValues(NamedTuple):
    """The values of the rows. A failed row of weight zero has the values of another row."""

    terminal: Float[Array, " batch"]
    """The payoff of the end state."""
    integrals: Float[Array, "batch 1+costs"]
    """The integrals of the running payoff and costs."""

    @property
    def payoff(self) -> Float[Array, " batch"]:
        """The payoff of the end state and on the way."""
        return self.terminal + self.integrals[:, 0]

    @property
    def costs(self) -> Float[Array, "batch costs"]:
        """The integrals of the running costs."""
        return self.integrals[:, 1:]


class Outcome(NamedTuple):
    """What an objective returns beside its value, without derivatives."""

    values: RowValues
    stats: Stats
    """Work of the forward solve."""
    result: Int[Array, "*rows"]
    """`Result` code of the forward solve."""
    t_reached: Float[Array, "*rows"]


def evaluate(inputs: Inputs, settings: Settings) -> tuple[Float[Array, ""], Outcome]:
    """The objective, with every mode and order of differentiation, and its outcome."""
    return _one_after_the_other(_objective, inputs, settings)


def weighted_sum_of_rows(
    values: RowValues,
    coefficients: Float[Array, " costs"],
    weights: Float[Array, " batch"],
    ok: Bool[Array, " rows"],
    unused: Bool[Array, " rows"],
) -> tuple[Float[Array, ""], Float[Array, " batch"]]:
    """The objective, and the part of each row. NaN if a row failed that is not `unused`."""
    payoff, precision = values.payoff, jax.lax.Precision.HIGHEST
    costs = jnp.matmul(values.costs, coefficients, precision=precision)
    of_rows = (costs - payoff) * nan_unless(ok | unused, payoff.dtype)
    of_rows = of_rows.astype(weights.dtype)
    # A row of weight zero may also end where its payoff is infinite.
    of_rows = jnp.where(unused | ((weights == 0) & ~jnp.isfinite(of_rows)), 0, of_rows)
    return jnp.sum(weights * of_rows), of_rows


def unused_rows(
    result: Int[Array, "*rows"], weights: Float[Array, " batch"]
) -> Bool[Array, " rows"]:
    """Which rows failed in a solve of their own, and have weight zero."""
    failed = jnp.atleast_1d(result != Result.SUCCESS)
    return failed & (weights == 0) if result.shape == weights.shape else jnp.zeros_like(failed)


def _objective(inputs: Inputs, settings: Settings):
    """The objective with every mode and order of differentiation, and its outcome."""
    leaves, structure = jax.tree.flatten((inputs, settings))

    def run(leaves):
        inputs, settings = structure.unflatten(leaves)
        nothing = jax.tree.map(lambda _: False, inputs)
        solved, quadrature = _solve(nothing, inputs, settings)
        terminal = inputs.terminal(inputs.problem.t1, solved.integration.y1, ())
        return _outcome(inputs, settings, solved, RowValues(terminal, quadrature.along()))[0]

    def record(differentiated, leaves) -> Any:
        """The objective with its gradient, by which the sweep multiplies."""
        perturbed, _ = structure.unflatten(differentiated)

        def with_gradient(inputs, settings):
            (value, outcome), bars = _outcome_and_bars(perturbed, inputs, settings)
            return value, outcome, pulled_leaves(perturbed, inputs, bars)

        return _one_after_the_other(with_gradient, *structure.unflatten(leaves))

    def scaled(differentiated, touched, leaves, gradient, bars):
        del differentiated, touched, leaves
        return [bar * bars[0].astype(bar.dtype) for bar in gradient]

    return differentiable(with_sweep(run, record, scaled), run, leaves)


def _one_after_the_other(run, inputs: Inputs, settings: Settings):
    """`run(inputs, settings)`. Under `jax.vmap`, each of several busy objectives has its own
    loop."""

    def rule(size: int, mapped, inputs: Inputs, settings: Settings):
        del size
        mapping = one_by_one if is_busy(inputs.problem.field) else plain
        return mapping(run, mapped, inputs, settings)

    if settings.stepper.axis_name is not None:
        return run(inputs, settings)
    return with_vmap_rule(run, rule, inputs, settings)


def _solve(perturbed: Inputs, inputs: Inputs, settings: Settings) -> tuple[Solved, Quadrature]:
    """The solve on the way back, and the quadrature along it."""
    problem, integrands = inputs.problem, (inputs.integrands, inputs.integrand_args)
    recorded = settings.adjoint.record(problem, settings.stepper)
    unused = unused_rows(recorded[0].result, inputs.weights)
    perturbed_integrands = (perturbed.integrands, perturbed.integrand_args)
    solved = Solved.make(
        problem, perturbed.problem, settings.stepper, recorded, unused, integrands,
        perturbed_integrands,
    )  # fmt: skip

    def apply(params, t, y):
        _, (shared, row_args), integrands, integrand_args = solved.field_and_args(params)
        return integrands(*solved.finite(t, y), (shared, (integrand_args, row_args)))

    of_payoff = -jnp.ones(1, problem.y0.dtype)
    bars = jnp.outer(inputs.weights, jnp.concatenate([of_payoff, settings.coefficients]))
    return solved, Quadrature(solved, apply, bars, rows_are_cheap(problem.field))


def _outcome(inputs: Inputs, settings: Settings, solved: Solved, values: RowValues):
    """The objective with its outcome, and the part of each row."""
    objective, of_rows = weighted_sum_of_rows(
        values, settings.coefficients, inputs.weights, solved.ok, solved.masked
    )
    of_solve = solved.integration
    outcome = Outcome(values, of_solve.stats, of_solve.result, of_solve.t_reached)
    return (objective, outcome), of_rows


def _outcome_and_bars(perturbed: Inputs, inputs: Inputs, settings: Settings):
    """The objective with its outcome, and its gradient by what is `perturbed`."""
    problem = inputs.problem
    inputs.integrands.check_closed_over(perturbed.integrands, problem.y0)
    inputs.terminal.check_closed_over(perturbed.terminal, problem.y0)
    solved, quadrature = _solve(perturbed, inputs, settings)
    terminal_params, terminal_constants = eqx.partition(inputs.terminal, perturbed.terminal)

    def terminal_at(params, y1):
        return eqx.combine(params, terminal_constants)(problem.t1, y1, ())

    terminal, pull = jax.vjp(terminal_at, terminal_params, solved.integration.y1)
    terminal_bar, y1_bar = pull(-inputs.weights)
    zero = jnp.zeros_like(problem.t0)
    carry = jnp.zeros_like(quadrature.bars), jnp.stack([zero] * 2), zero
    swept = Sweep(solved, quadrature.interior, quadrature.shared).run(y1_bar, carry)
    integrals, by_times, _ = swept.interior
    outcome, of_rows = _outcome(inputs, settings, solved, RowValues(terminal, integrals))
    field_bar, args_bar, integrands_bar, integrand_args_bar = swept.params
    t0_bar, t1_bar = swept.t0 + by_times[0], swept.t1 + by_times[1]
    problem_bar = InitialValueProblem(field_bar, args_bar, swept.y, t0_bar, t1_bar, None)
    bars = Inputs(problem_bar, integrands_bar, integrand_args_bar, terminal_bar, weights=of_rows)
    valid = jnp.prod(nan_unless(solved.ok | solved.masked, swept.y.dtype))
    bars = jax.tree.map(lambda leaf: leaf * valid.astype(leaf.dtype), bars)
    return outcome, eqx.filter(bars, perturbed)
