"""The checks of `jaxode.audit`. Each measures one property of a flow and judges it.

A new check is a function and an entry in `CHECKS`. This file has the checks of the solve, its
gradient, and its cost.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode._jax.closure import compiled
from jaxode.auditing import density
from jaxode.auditing.subject import BASE_DISTANCE, Row, Subject
from jaxode.ode.adjoints import DiscreteAdjoint

# Limits. Errors of log-densities are in nats: 0.01 is one percent of a density.
ROUND_TRIP = 1e-3
LOG_DENSITY = 1e-2
GRADIENT = 1e-2
EVALUATIONS = 1000
STEPS_USED = 0.5
# A healthy controller rejects about one step in five. At every kink of a field it rejects several
# in a row.
REJECTED = 0.4
# Explicit solvers are stable for steps of up to about three time constants.
STIFFNESS = 100.0


def _solves(s: Subject) -> Row:
    """Whether all solves reach their end."""
    return Row("solves that fail", float(bool(s.failure)), "0", s.failure)


def _reference(s: Subject) -> Row:
    """Whether there is anything to compare with."""
    cure = "fix the failing solves first" if s.failure else s.smoother
    advice = s.tight_failure and (
        f"A tight solve fails ({s.tight_failure.split('. ')[0]}), so errors cannot be measured: "
        f"{cure}."
    )
    return Row("tight solves that fail", float(bool(advice)), "0", advice)


def _round_trip(s: Subject) -> Row:
    """Data to base and back."""
    back = s.flow.from_base(s.params, s.z, context=s.context)
    value = jnp.max(jnp.abs(back - s.x) / (1 + jnp.abs(s.x)), initial=0.0)
    return s.judge(
        "round-trip error", value, ROUND_TRIP, "of 1 + |x|",
        f"{s.solve_finer}: samples and densities do not belong to the same flow; if that does "
        "not help, the flow contracts too much to be inverted.",
    )  # fmt: skip


def _outside(s: Subject) -> Row | None:
    """Samples with density zero in both solves, which have no error to measure."""
    count, batch = int(jnp.sum(s.outside)), s.x.shape[0]
    advice = "" if count < batch else (
        "No sample is where the base density has a support, so there is nothing to measure."
    )  # fmt: skip
    text = f"left out of {batch} samples"
    return Row("samples of density zero", float(count), text, advice) if count else None


def _log_density(s: Subject) -> Row:
    """`log_prob` with the same probes."""
    advice = (
        f"{s.solve_finer} of log_prob; if that does not help, the divergence of the vector field "
        "is wrong or not smooth."
    )
    if s.base_distance > BASE_DISTANCE:
        advice = (
            "Fix the distance from the base first: the log-densities of far samples are large, "
            "and so is their rounding."
        )
    error = jnp.abs(s.log_prob.astype(s.tight_log_prob.dtype) - s.tight_log_prob)
    return s.judge(
        "log-density error", jnp.max(jnp.where(s.outside, 0, error)), LOG_DENSITY, "nats", advice
    )


def _loss(s: Subject) -> Row:
    """`nll` with the same probes."""
    (own, _), (tight, _) = s.loss[0], s.tight_loss[0]
    return s.judge(
        "loss error", jnp.abs(own.astype(tight.dtype) - tight), LOG_DENSITY, "nats",
        f"{s.solve_finer} for training: the loss is not the likelihood of the flow.",
    )  # fmt: skip


def _gradient(s: Subject) -> Row:
    """The gradient of `nll`, all parameters as one vector.

    Near a zero gradient, its errors count like errors of the loss: in nats, for a change of all
    parameters by their own size.
    """
    own, tight = s.loss[1], s.tight_loss[1]
    error = _norm(jax.tree.map(lambda a, b: a.astype(b.dtype) - b, own, tight))
    size, least = _norm(tight), 1 / (1 + _norm(s.tight_params))
    adjoint, advice = s.flow.solve_options.adjoint, f"{s.solve_finer} for training"
    if not isinstance(adjoint, DiscreteAdjoint):
        advice += f", or use adjoint=jaxode.DiscreteAdjoint() instead of {adjoint!r}"
    of = "1 nat / (1 + norm of the parameters)" if size < least else "its norm"
    return s.judge(
        "gradient error", error / np.fmax(size, least), GRADIENT, f"of {of}", f"{advice}."
    )


def _norm(tree: PyTree) -> float:
    """The norm of all floating arrays as one vector."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return math.sqrt(sum(float(jnp.sum(jnp.square(jnp.abs(leaf)))) for leaf in leaves))


def _evaluations(s: Subject) -> Row | None:
    """Vector field evaluations in the forward solve of `nll`: the maximum over rows."""
    value = int(jnp.max(s.loss[0][1].stats.num_evals))
    if value < 0:
        return None  # An implicit solver does not count them.
    return s.judge(
        "evaluations", value, EVALUATIONS, "",
        "Train with jaxode.regularizers.kinetic_energy or jacobian_frobenius, or use "
        "solver=diffrax.Dopri8(): the field is expensive to follow.",
    )  # fmt: skip


def _steps(s: Subject) -> Row | None:
    """The fraction of `max_steps` that is used: the maximum over rows."""
    if s.flow.solve_options.steps is not None:
        return None
    max_steps = s.flow.solve_options.max_steps
    value = float(jnp.max(s.loss[0][1].stats.num_steps)) / max_steps
    return s.judge(
        "part of max_steps used", value, STEPS_USED, "",
        f"Raise max_steps from {max_steps}: another batch may need more.",
    )  # fmt: skip


def _rejected(s: Subject) -> Row | None:
    """The fraction of attempted steps that were rejected. The first few search for a step size."""
    if s.implicit:
        return None  # Its equations may need smaller steps than the field does.
    stats = s.loss[0][1].stats
    rejected, steps = float(jnp.sum(stats.num_rejected)), float(jnp.sum(stats.num_steps))
    # A failed solve has its own row, and may reject all later steps.
    value = np.nan if s.failure else rejected / max(steps, 1.0)
    return s.judge(
        "part of steps rejected", value, REJECTED, "",
        f"{s.smoother.capitalize()}: no step size suits the field.",
    )  # fmt: skip


def _stiffness(s: Subject) -> Row | None:
    """The time span times the largest |eigenvalue| of `df/dz` on the trajectories."""
    if s.implicit:
        return None  # Stability does not limit its steps.
    times, points = s.trajectories
    v = jax.random.normal(s.key, s.x.shape[1:], s.x.dtype)
    radius = _spectral_radii(s.integrands, s.params, times, points, s.context, v)
    span = abs(float(s.flow.t0) - float(s.flow.t1))
    return s.judge(
        "stiffness", jnp.max(radius) * span, STIFFNESS, "time constants",
        "Explicit steps are bound by stability: train with jaxode.regularizers.jacobian_frobenius, "
        "or try solver=jaxode.Rodas5P().",
    )  # fmt: skip


@compiled
def _spectral_radii(integrands, params, times, points, context, v):
    """The spectral radius of the Jacobian at each time and sample."""

    def at(t, z, context):
        field = lambda z: integrands.field(t, z, params, context).astype(z.dtype)
        return _spectral_radius(field, z, v)

    return jax.vmap(jax.vmap(at, (None, 0, 0)), (0, 0, None))(times, points, context)


def _spectral_radius(g, z, v):
    """The mean growth of a vector under 24 powers of the Jacobian, after the first eight.

    A mean, because the growth oscillates under a pair of complex eigenvalues.
    """
    _, jvp = jax.linearize(g, z)

    def grow(v, _):
        w = jvp(v)
        norm = jnp.sqrt(jnp.sum(w * w))
        return jnp.where(norm == 0, w, w / jnp.where(norm == 0, 1.0, norm)), jnp.log(norm)

    _, growth = jax.lax.scan(grow, v, None, length=24)
    return jnp.exp(jnp.mean(growth[8:]))


# A check that does not apply returns None.
CHECKS: tuple[Callable[[Subject], Row | None], ...] = (
    _solves, _reference, _outside, density.base_distance, _round_trip, _log_density, _loss,
    _gradient, density.divergence, density.probe_error, density.base_samples,
    density.base_probability, density.total_probability,
    _evaluations, _steps, _rejected, _stiffness,
)  # fmt: skip
