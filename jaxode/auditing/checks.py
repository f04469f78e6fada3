"""The checks of `jaxode.audit`. Each measures one property of a flow and judges it.

A new check is a function and an entry in `CHECKS`. This file has the checks of the solve and its
gradient.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode.auditing import density, work
from jaxode.auditing.subject import BASE_DISTANCE, Row, Subject
from jaxode.ode.adjoints import DiscreteAdjoint

# Limits. Errors of log-densities are in nats: 0.01 is one percent of a density.
ROUND_TRIP = 1e-3
LOG_DENSITY = 1e-2
GRADIENT = 1e-2


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
        "round-trip error", value, ROUND_TRIP, f"at most {ROUND_TRIP:g} of 1 + |x|",
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
        "log-density error", jnp.max(jnp.where(s.outside, 0, error)), LOG_DENSITY,
        f"at most {LOG_DENSITY:g} nats", advice,
    )  # fmt: skip


def _loss(s: Subject) -> Row:
    """`nll` with the same probes."""
    (own, _), (tight, _) = s.loss[0], s.tight_loss[0]
    return s.judge(
        "loss error", jnp.abs(own.astype(tight.dtype) - tight), LOG_DENSITY,
        f"at most {LOG_DENSITY:g} nats",
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
    adjoint = s.flow.solve_options.adjoint
    exact = isinstance(adjoint, DiscreteAdjoint)
    of = "its norm" if not size < least else "1 nat / (1 + norm of the parameters)"
    return s.judge(
        "gradient error", error / np.fmax(size, least), GRADIENT, f"at most {GRADIENT:g} of {of}",
        f"{s.solve_finer} for training"
        + ("." if exact else f", or use adjoint=jaxode.DiscreteAdjoint() instead of {adjoint!r}."),
    )  # fmt: skip


def _norm(tree: PyTree) -> float:
    """The norm of all floating arrays as one vector."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return math.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in leaves))


# A check that does not apply returns None.
CHECKS: tuple[Callable[[Subject], Row | None], ...] = (
    _solves, _reference, _outside, density.base_distance, _round_trip, _log_density, _loss,
    _gradient, density.divergence, density.probe_error, density.base_samples,
    density.base_probability, density.total_probability, work.evaluations,
    work.steps, work.rejected, work.stiffness,
)  # fmt: skip
