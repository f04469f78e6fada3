"""The checks of `jaxode.audit`: each measures one thing of a flow, and judges it.

A new check is a function and its place in `CHECKS`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.divergence import exact
from jaxode.flows.audit_subject import Row, Subject
from jaxode.flows.programs import carried
from jaxode.ode.adjoints import DiscreteAdjoint
from jaxode.ode.system import make_system

# What is out of range. Errors of densities are in nats: 0.01 is one percent of a density.
ROUND_TRIP = 1e-3
LOG_DENSITY = 1e-2
GRADIENT = 1e-2
PROBE_ERROR = 0.1
PROBABILITY = 1e-2
STEPS_USED = 0.5
EVALUATIONS = 1000
# Error control that works rejects about one step in five; at every kink of a field it rejects
# several in a row.
REJECTED = 0.4
# Explicit solvers are stable up to a step of about three time constants.
STIFFNESS = 100.0

# Points a side of the grid for the total probability, by the number of dimensions.
GRIDS = {1: (4097, 16385), 2: (129, 257, 513)}
CHUNK = 2**14


def _solves(s: Subject) -> Row:
    """Whether all solves reach their end."""
    return Row("solves that fail", float(bool(s.failure)), "0", s.failure)


def _reference(s: Subject) -> Row:
    """Whether there is anything to compare with."""
    where = (
        "mend the solves that fail first."
        if s.failure
        else "look for a kink, a jump or a singularity of the vector field."
    )
    advice = s.tight_failure and (
        f"A tight solve fails ({s.tight_failure.split('. ')[0]}), so errors cannot be measured: "
        f"{where}"
    )
    return Row("tight solves that fail", float(bool(advice)), "0", advice)


def _round_trip(s: Subject) -> Row:
    """Data to base and back."""
    back = s.flow.from_base(s.params, s.z, context=s.context)
    value = jnp.max(jnp.abs(back - s.x) / (1 + jnp.abs(s.x)), initial=0.0)
    return s.judge(
        "round-trip error", value, ROUND_TRIP, f"at most {ROUND_TRIP:g} of 1 + |x|",
        f"{s.solve_finer}: samples and densities are not those of one flow; if that does "
        "not help, the flow contracts too much to be inverted.",
    )  # fmt: skip


def _log_density(s: Subject) -> Row:
    """`log_prob` with the same probes."""
    error = jnp.abs(s.log_prob.astype(s.tight_log_prob.dtype) - s.tight_log_prob)
    return s.judge(
        "log-density error", jnp.max(error, initial=0.0), LOG_DENSITY,
        f"at most {LOG_DENSITY:g} nats",
        f"{s.solve_finer} of log_prob; if that does not help, the divergence of the vector "
        "field is wrong or not smooth.",
    )  # fmt: skip


def _loss(s: Subject) -> Row:
    """`nll` with the same probes."""
    (own, _), (tight, _) = s.loss[0], s.tight_loss[0]
    return s.judge(
        "loss error", jnp.abs(own.astype(tight.dtype) - tight), LOG_DENSITY,
        f"at most {LOG_DENSITY:g} nats",
        f"{s.solve_finer} for training: the loss is not that of the flow.",
    )  # fmt: skip


def _gradient(s: Subject) -> Row:
    """The gradient of `nll`, all parameters as one vector."""
    own, tight = jax.tree.leaves(s.loss[1]), jax.tree.leaves(s.tight_loss[1])
    norm = lambda leaves: math.sqrt(sum(float(jnp.sum(leaf * leaf)) for leaf in leaves))
    difference = norm([a.astype(b.dtype) - b for a, b in zip(own, tight, strict=True)])
    value = difference / norm(tight) if difference else 0.0
    adjoint = s.flow.solve_options.adjoint
    exact = isinstance(adjoint, DiscreteAdjoint)
    return s.judge(
        "gradient error", value, GRADIENT, f"at most {GRADIENT:g} of its norm",
        f"{s.solve_finer} for training"
        + ("." if exact else f", or use adjoint=jaxode.DiscreteAdjoint() instead of {adjoint!r}."),
    )  # fmt: skip


def _probe_error(s: Subject) -> Row:
    """The standard error of one estimate of `log_prob`, over fresh probes."""
    value = 0.0
    if s.probes is not None:
        keys = jax.random.split(s.key, 8)
        log_prob = lambda key: s.flow.log_prob(s.params, s.x, key=key, context=s.context)
        variance = jnp.var(jax.lax.map(log_prob, keys), axis=0, ddof=1)
        value = float(jnp.sqrt(jnp.mean(variance)))
    times = math.ceil((value / PROBE_ERROR) ** 2) if math.isfinite(value) else 1
    return s.judge(
        "probe standard error", value, PROBE_ERROR, f"at most {PROBE_ERROR:g} nats",
        f"For densities to report take {times} times as many probes, or "
        "divergence=jaxode.divergence.exact(); training bears unbiased noise.",
    )  # fmt: skip


def _total_probability(s: Subject) -> Row | None:
    """The integral of the density over a box around samples, on finer and finer grids."""
    event = tuple(s.flow.base.event_shape)
    size = math.prod(event)
    if size not in GRIDS:
        return None
    of_first = lambda leaf, n: jnp.broadcast_to(leaf[:1], (n, *leaf.shape[1:]))
    context = lambda n: jax.tree.map(lambda leaf: of_first(leaf, n), s.context)
    # Noise in the log-density would not average out in the density.
    flow = s.flow if s.probes is None else dataclasses.replace(s.flow, divergence=exact())
    to_data = lambda z: flow.from_base(s.params, z, context=context(z.shape[0]))
    log_prob = lambda x: flow.log_prob(s.params, x, context=context(x.shape[0]))
    if s.implicit:
        to_data, log_prob = _row_by_row(to_data), _row_by_row(log_prob)
    samples = to_data(flow.base.sample(s.key, (4096,))).reshape(-1, size)
    low, high = jnp.min(samples, axis=0), jnp.max(samples, axis=0)
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    value, change = np.nan, np.nan
    for points in GRIDS[size]:
        axes = [jnp.linspace(a, b, points, dtype=s.x.dtype) for a, b in zip(low, high, strict=True)]
        grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, *event)
        density = np.exp(_in_chunks(log_prob, grid)).reshape((points,) * size)
        value = _integral(density, axes)
        coarse = (slice(None, None, 2),) * size
        change = abs(value - _integral(density[coarse], [axis[::2] for axis in axes]))
        if not change > 0.1 * PROBABILITY:
            break
    name = "total probability"
    if change > PROBABILITY:
        # No fault of the flow, but nothing is known.
        return Row(name, np.nan, f"not resolved by {points} points a side")
    limit = PROBABILITY + change
    row = s.judge(
        name, abs(value - 1), limit, f"1 within {limit:.2g}",
        f"{s.solve_finer}: the density does not integrate to one; if that does not help, the "
        "divergence of the vector field is wrong, or the field is not smooth.",
    )  # fmt: skip
    return row._replace(value=value)


def _row_by_row(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An implicit solver takes a batch as one system, whose Jacobian grows with its square."""
    return jax.vmap(lambda row: f(row[None])[0])


def _in_chunks(log_prob: Callable[[Array], Array], x: Float[Array, "points *event"]) -> Array:
    """In chunks of one size, so that one program does for all of them."""
    count = -(-x.shape[0] // CHUNK)
    padding = jnp.broadcast_to(x[:1], (count * CHUNK - x.shape[0], *x.shape[1:]))
    chunks = jnp.concatenate([x, padding]).reshape(count, CHUNK, *x.shape[1:])
    return jax.lax.map(log_prob, chunks).reshape(-1)[: x.shape[0]]


def _integral(values: np.ndarray, axes: list[Array]) -> float:
    for axis in reversed(axes):
        values = np.trapezoid(values, axis)
    return float(values)


def _evaluations(s: Subject) -> Row | None:
    """Of the vector field, by the forward solve of `nll`; the largest number of all rows."""
    value = int(jnp.max(s.loss[0][1].stats.num_evals))
    if value < 0:
        return None  # An implicit solver does not count them.
    return s.judge(
        "evaluations", value, EVALUATIONS, f"at most {EVALUATIONS}",
        "Train with jaxode.regularizers.kinetic_energy or jacobian_frobenius, or use "
        "solver=diffrax.Dopri8(): the field is expensive to follow.",
    )  # fmt: skip


def _steps(s: Subject) -> Row | None:
    """How much of `max_steps` is used; the most of all rows."""
    if s.flow.solve_options.steps is not None:
        return None
    max_steps = s.flow.solve_options.max_steps
    value = float(jnp.max(s.loss[0][1].stats.num_steps)) / max_steps
    return s.judge(
        "part of max_steps used", value, STEPS_USED, f"at most {STEPS_USED:g}",
        f"Raise max_steps from {max_steps}: another batch may need more.",
    )  # fmt: skip


def _rejected(s: Subject) -> Row | None:
    """Rejected of the attempted steps. The first few are the search for a step size."""
    if s.implicit:
        return None  # Its equations may need a smaller step than the field does.
    stats = s.loss[0][1].stats
    rejected, steps = float(jnp.sum(stats.num_rejected)), float(jnp.sum(stats.num_steps))
    # A solve that fails says why, and may reject all steps after that.
    value = np.nan if s.failure else rejected / max(steps, 1.0)
    return s.judge(
        "part of steps rejected", value, REJECTED, f"at most {REJECTED:g}",
        "Look for a kink, a jump or a singularity of the vector field: the step size finds nothing "
        "to hold on to.",
    )  # fmt: skip


def _stiffness(s: Subject) -> Row | None:
    """The time span times the largest |eigenvalue| of `df/dz` on the trajectories."""
    if s.implicit:
        return None  # Its steps are not bound by stability.
    flow, start, end = s.flow, s.flow.t1, s.flow.t0
    times = jnp.linspace(start, end, 9, dtype=s.x.dtype)
    field, options = s.integrands.field, flow.solve_options
    span, batch = (start, end), flow.step_control
    solution = carried(
        make_system(
            "audit", field, s.x, span, s.params, options, ts=times, rows=s.context, batch=batch
        ),
        None,
        None,
    )
    v = jax.random.normal(s.key, s.x.shape[1:], s.x.dtype)

    def of_sample(t, z, context):
        return _spectral_radius(lambda z: field(t, z, s.params, context), z, v)

    over_batch = jax.vmap(of_sample, (None, 0, 0))
    radius = jax.vmap(over_batch, (0, 0, None))(times, solution.ys, s.context)
    return s.judge(
        "stiffness", jnp.max(radius, initial=0.0) * abs(start - end), STIFFNESS,
        f"at most {STIFFNESS:g} time constants",
        "Explicit steps are bound by stability: train with jaxode.regularizers.jacobian_frobenius, "
        "or try solver=diffrax.Kvaerno5().",
    )  # fmt: skip


def _spectral_radius(g, z, v, skip: int = 8, count: int = 16):
    """The mean growth of a vector under powers of the Jacobian, after the first few.

    A mean, because it swings under a pair of complex eigenvalues.
    """
    _, jvp = jax.linearize(g, z)

    def grow(v, _):
        w = jvp(v)
        norm = jnp.sqrt(jnp.sum(w * w))
        return jnp.where(norm == 0, w, w / jnp.where(norm == 0, 1.0, norm)), jnp.log(norm)

    _, growth = jax.lax.scan(grow, v, None, length=skip + count)
    return jnp.exp(jnp.mean(growth[skip:]))


# None is a check that does not apply.
CHECKS: tuple[Callable[[Subject], Row | None], ...] = (
    _solves, _reference, _round_trip, _log_density, _loss, _gradient, _probe_error,
    _total_probability, _evaluations, _steps, _rejected, _stiffness,
)  # fmt: skip
