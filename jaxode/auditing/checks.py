"""The checks of `jaxode.audit`. Each measures one property of a flow and judges it.

A new check is a function and an entry in `CHECKS`. It returns None if it does not apply.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode.auditing import base
from jaxode.auditing.audited_flow import AuditedFlow, Row, within
from jaxode.auditing.divergence_audit import divergence
from jaxode.ode.adjoints import DiscreteAdjoint

MAX_ROUND_TRIP_ERROR = 1e-3  # relative to 1 + |x|
MAX_LOG_DENSITY_ERROR = 1e-2  # nats: one percent of a density
MAX_GRADIENT_ERROR = 1e-2  # relative
MAX_STEPS_USED = 0.5  # of `max_steps`
# A healthy controller rejects about one step in five, and several in a row at each kink of a field.
MAX_REJECTED_PART = 0.4
SMOOTHER = "Look for a kink, a jump or a singularity of the vector field, or low precision in it"


def _solves(s: AuditedFlow) -> Row:
    """Whether all solves reach their end. Without the tight one, errors cannot be measured."""
    tight = s.tight.failed and f"A tight solve fails: {s.tight.failed.split('. ')[0]}. {SMOOTHER}."
    count = bool(s.failed) + bool(s.tight.failed)
    return Row("solves that fail", float(count), "0", s.failed or tight)


def _outside(s: AuditedFlow) -> Row | None:
    """Samples with density zero in both solves, which have no error to measure."""
    count, batch = int(jnp.sum(s.outside)), s.x.shape[0]
    advice = "No sample is where the base density has a support: there is nothing to measure."
    text = f"left out of {batch} samples"
    row = Row("samples of density zero", float(count), text, advice if count == batch else "")
    return row if count else None


def _round_trip(s: AuditedFlow) -> Row:
    """Carry the data to the base and back."""
    back = s.flow.from_base(s.params, s.z, context=s.context)
    value = jnp.max(jnp.abs(back - s.x) / (1 + jnp.abs(s.x)), initial=0.0)
    advice = f"{_finer(s)}; if that does not help, the flow contracts too much to be inverted."
    return within("round-trip error", value, MAX_ROUND_TRIP_ERROR, "of 1 + |x|", advice)


def _log_density(s: AuditedFlow) -> Row:
    """Compare `log_prob` with that of the tight solve, by the same probes."""
    error = jnp.abs(s.log_prob.astype(s.tight.log_prob.dtype) - s.tight.log_prob)
    error = jnp.max(jnp.where(s.outside, 0, error))
    advice = f"{_finer(s)} of log_prob; if that does not help, the field is not smooth."
    return within("log-density error", error, MAX_LOG_DENSITY_ERROR, "nats", advice)


def _finer(s: AuditedFlow) -> str:
    steps = s.flow.solve_options.steps
    return "Tighten rtol and atol" if steps is None else f"Raise steps from {steps}"


def _gradient(s: AuditedFlow) -> Row:
    """Compare the gradient of `nll`, with all parameters as one vector.

    Near a zero gradient, its errors count like errors of the loss: in nats, for a change of all
    parameters by their own size.
    """
    gradient_of_flow, tight = (gradient for gradient, _ in s.losses)
    error = _norm(jax.tree.map(lambda a, b: a.astype(b.dtype) - b, gradient_of_flow, tight))
    size, least = _norm(tight), 1 / (1 + _norm(s.params))
    adjoint, advice = s.flow.solve_options.adjoint, f"{_finer(s)} for training"
    if not isinstance(adjoint, DiscreteAdjoint):
        advice += f", or use adjoint=jaxode.DiscreteAdjoint() instead of {adjoint!r}"
    unit = "1 nat / (1 + norm of the parameters)" if size < least else "its norm"
    row = within(
        "gradient error",
        error / np.fmax(size, least),
        MAX_GRADIENT_ERROR,
        f"of {unit}",
        f"{advice}.",
    )
    if not np.isnan(row.value) or s.failed or s.tight.failed or s.outside.all():
        return row
    cure = "look for an operation of the field with an infinite derivative, such as sqrt at 0."
    return row._replace(advice=f"It is not finite although the solves succeed: {cure}")


def _norm(tree: PyTree) -> float:
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return math.sqrt(sum(float(jnp.sum(jnp.square(jnp.abs(leaf)))) for leaf in leaves))


def _steps(s: AuditedFlow) -> Row | None:
    """The fraction of `max_steps` that `nll` uses: the maximum over rows."""
    options, stats = s.flow.solve_options, s.losses[0][1]
    if options.steps is not None:
        return None
    value = float(jnp.max(stats.num_steps)) / options.max_steps
    advice = f"Raise max_steps from {options.max_steps}: another batch may need more."
    return within("part of max_steps used", value, MAX_STEPS_USED, "", advice)


def _rejected(s: AuditedFlow) -> Row | None:
    """The fraction of attempted steps of `nll` that were rejected."""
    if s.flow.solve_options.implicit:
        return None  # Its equations may need smaller steps than the field does.
    stats = s.losses[0][1]
    rejected, steps = float(jnp.sum(stats.num_rejected)), float(jnp.sum(stats.num_steps))
    # A failed solve has its own row, and may reject all later steps.
    value = np.nan if s.failed else rejected / max(steps, 1.0)
    advice = f"{SMOOTHER}: no step size suits the field."
    return within("part of steps rejected", value, MAX_REJECTED_PART, "", advice)


CHECKS: tuple[Callable[[AuditedFlow], Row | None], ...] = (
    _solves, _outside, base.distance, _round_trip, _log_density, _gradient,
    divergence, base.samples, base.probability, _steps, _rejected,
)  # fmt: skip
