"""Checks of `jaxode.audit`: what a solve costs, and what makes it expensive."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._jax.closure import compiled
from jaxode.auditing.subject import Row, Subject

EVALUATIONS = 1000
STEPS_USED = 0.5
# A healthy controller rejects about one step in five. At every kink of a field it rejects several
# in a row.
REJECTED = 0.4
# Explicit solvers are stable for steps of up to about three time constants.
STIFFNESS = 100.0


def evaluations(s: Subject) -> Row | None:
    """Vector field evaluations in the forward solve of `nll`: the maximum over rows."""
    value = int(jnp.max(s.loss[0][1].stats.num_evals))
    if value < 0:
        return None  # An implicit solver does not count them.
    return s.judge(
        "evaluations", value, EVALUATIONS, f"at most {EVALUATIONS}",
        "Train with jaxode.regularizers.kinetic_energy or jacobian_frobenius, or use "
        "solver=diffrax.Dopri8(): the field is expensive to follow.",
    )  # fmt: skip


def steps(s: Subject) -> Row | None:
    """The fraction of `max_steps` that is used: the maximum over rows."""
    if s.flow.solve_options.steps is not None:
        return None
    max_steps = s.flow.solve_options.max_steps
    value = float(jnp.max(s.loss[0][1].stats.num_steps)) / max_steps
    return s.judge(
        "part of max_steps used", value, STEPS_USED, f"at most {STEPS_USED:g}",
        f"Raise max_steps from {max_steps}: another batch may need more.",
    )  # fmt: skip


def rejected(s: Subject) -> Row | None:
    """The fraction of attempted steps that were rejected. The first few search for a step size."""
    if s.implicit:
        return None  # Its equations may need smaller steps than the field does.
    stats = s.loss[0][1].stats
    rejected, steps = float(jnp.sum(stats.num_rejected)), float(jnp.sum(stats.num_steps))
    # A failed solve has its own row, and may reject all later steps.
    value = np.nan if s.failure else rejected / max(steps, 1.0)
    return s.judge(
        "part of steps rejected", value, REJECTED, f"at most {REJECTED:g}",
        f"{s.smoother.capitalize()}: no step size suits the field.",
    )  # fmt: skip


def stiffness(s: Subject) -> Row | None:
    """The time span times the largest |eigenvalue| of `df/dz` on the trajectories."""
    if s.implicit:
        return None  # Stability does not limit its steps.
    times, points = s.trajectories
    v = jax.random.normal(s.key, s.x.shape[1:], s.x.dtype)
    radius = _spectral_radii((s.integrands, s.params), times, points, s.context, v)
    span = abs(float(s.flow.t0) - float(s.flow.t1))
    return s.judge(
        "stiffness", jnp.max(radius) * span, STIFFNESS,
        f"at most {STIFFNESS:g} time constants",
        "Explicit steps are bound by stability: train with jaxode.regularizers.jacobian_frobenius, "
        "or try solver=jaxode.Rodas5P().",
    )  # fmt: skip


@compiled
def _spectral_radii(parts, times, points, context, v):
    """The spectral radius of the Jacobian at each time and sample."""
    integrands, params = parts

    def at(t, z, context):
        field = lambda z: integrands.field(t, z, params, context).astype(z.dtype)
        return _spectral_radius(field, z, v)

    return jax.vmap(jax.vmap(at, (None, 0, 0)), (0, 0, None))(times, points, context)


def _spectral_radius(g, z, v, skip: int = 8, count: int = 16):
    """The mean growth of a vector under powers of the Jacobian, after the first few.

    A mean, because the growth oscillates under a pair of complex eigenvalues.
    """
    _, jvp = jax.linearize(g, z)

    def grow(v, _):
        w = jvp(v)
        norm = jnp.sqrt(jnp.sum(w * w))
        return jnp.where(norm == 0, w, w / jnp.where(norm == 0, 1.0, norm)), jnp.log(norm)

    _, growth = jax.lax.scan(grow, v, None, length=skip + count)
    return jnp.exp(jnp.mean(growth[skip:]))
