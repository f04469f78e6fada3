"""A check of `jaxode.audit`: the divergence of a flow against the trace of the Jacobian."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._jax.closure import compiled
from jaxode.auditing.audited_flow import AuditedFlow, Row, within
from jaxode.divergence import Exact
from jaxode.flows.integrands import Integrands

MAX_DIVERGENCE_ERROR = 2e-3  # relative
ESTIMATES = 64  # at each point, if the divergence is stochastic


def divergence(s: AuditedFlow) -> Row:
    """The divergence at three times, between four samples and where they end.

    An error counts relative to the trace, and to a tenth of the norm of the Jacobian, since terms
    that cancel leave their rounding. A stochastic divergence must have the trace as its mean.
    """
    flow, dtype = s.flow, s.tight.x.dtype
    times = jnp.linspace(flow.t1, flow.t0, 3, dtype=dtype)
    points = jnp.linspace(s.tight.x[:4], s.z[:4].astype(dtype), 3)
    context = jax.tree.map(lambda leaf: leaf[:4], s.tight.context)
    keys = jax.random.split(s.key, (*points.shape[:2], ESTIMATES if s.noisy else 1))
    integrands = Integrands(s.tight.flow.f, flow.divergence)
    traces = _traces(integrands, s.tight.params, times, points, context, keys)
    field, dz_by_divergence, trace, norm, estimates = (np.asarray(part, float) for part in traces)
    error = estimates - trace[..., None]
    size = _rms(error)
    if s.noisy:  # its mean, beyond five standard errors
        noise = math.sqrt(np.mean(np.var(error, axis=-1)) / error.size)
        size = max(float(abs(np.mean(error))) - 5 * noise, 0.0)

    def relative(error, size):
        return error / size if size else (math.inf if error else 0.0)

    of_trace = relative(size, _rms(trace) + 0.1 * _rms(norm))
    of_field = relative(_rms(dz_by_divergence - field), _rms(field))
    fault = "is not the trace of the Jacobian of the vector field"
    if of_field > of_trace:
        fault = "returns a different derivative from the vector field"
    # A field may compute in lower precision than the solve.
    limit = max(MAX_DIVERGENCE_ERROR, 32 * float(jnp.finfo(traces[0].dtype).eps))
    return within(
        "divergence error", np.maximum(of_trace, of_field), limit, "of the exact trace",
        f"The divergence ({s.divergence.name}) {fault}: fix it, or use "
        "divergence=jaxode.divergence.exact().",
    )  # fmt: skip


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@compiled
def _traces(integrands, params, times, points, context, keys):
    """Returns `dz` by the field, `dz` by the divergence, the trace, the Jacobian's norm, and
    estimates of the divergence."""
    chosen = integrands.chosen_divergence(points[0], params, context)
    exact = Exact(chunk=16)

    def at(t, z, context, keys):
        g = integrands.at(t, params, context)
        dz, trace, square = exact.with_norm(g, z, None)

        def by_divergence(key):
            return chosen.apply(g, z, chosen.init(key, z))

        dz_by_divergence, estimates = jax.lax.map(by_divergence, keys)
        return dz, dz_by_divergence[0], trace, jnp.sqrt(square), estimates

    with jax.default_matmul_precision("highest"):
        over_batch = jax.vmap(at, (None, 0, 0, 0))
        return jax.vmap(over_batch, (0, 0, None, 0))(times, points, context, keys)
