"""Checks of `jaxode.audit` for a density: its divergence, its noise and its integral."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._jax.closure import compiled
from jaxode.auditing.balance import imbalance
from jaxode.auditing.importance import importance
from jaxode.auditing.subject import BASE_DISTANCE, CHUNK, Row, Subject, cast, tight_dtype
from jaxode.distributions import CenteredNormal
from jaxode.divergence import EXACT_UP_TO, exact
from jaxode.flows.cnf import CNF

DIVERGENCE = 2e-3
PROBE_ERROR = 0.1
PROBABILITY = 1e-2
IMBALANCE = 6.0

# Rows that are solved at once; and grid points per side for the total probability, by the number of
# dimensions: odd, and so many that their grids nearly fill such chunks.
AT_ONCE = 2**12
GRIDS = {1: (4095, 16383), 2: (127, 255, 511)}
# An effective sample size below this fraction of the proposals decides nothing.
EFFECTIVE = 0.1
# Trace estimates per point, for a stochastic divergence.
ESTIMATES = 64


def divergence(s: Subject) -> Row:
    """The divergence against the exact trace of the Jacobian, at points of a few trajectories.

    An error counts relative to the trace, and to a tenth of the norm of the Jacobian, since terms
    that cancel leave their rounding. A stochastic divergence must have the trace as its mean.
    """
    dtype, (times, points) = tight_dtype(s.x), s.trajectories
    context = jax.tree.map(lambda leaf: leaf[:4], s.context)
    times, points, context = cast((times[::4], points[::4, :4], context), dtype)
    integrands = dataclasses.replace(s.integrands, f=s.tight.f)
    params = cast(s.params, dtype)
    shape = (*points.shape[:2], ESTIMATES if s.probes is not None else 1)
    keys = jax.random.split(s.key, shape)
    compared = _traces(integrands, params, times, points, context, keys)
    field, own_field, trace, norm, estimates = compared
    error = np.asarray(estimates, float) - np.asarray(trace, float)[..., None]
    of_trace = _relative(
        _rms(error) if s.probes is None else _bias(error), _rms(trace) + 0.1 * _rms(norm)
    )
    of_field = _relative(_rms(own_field - field), _rms(field))
    name = s.integrands.chosen_divergence(s.x, s.params, s.context).name
    what = "is not the trace of the Jacobian of the vector field"
    if of_field > of_trace:
        what = "returns a different derivative from the vector field"
    # A field may compute in lower precision than the solve.
    limit = max(DIVERGENCE, 32 * float(jnp.finfo(field.dtype).eps))
    return s.judge(
        "divergence error", np.maximum(of_trace, of_field), limit, "of the exact trace",
        f"The divergence ({name}) {what}: fix it, or use divergence=jaxode.divergence.exact().",
    )  # fmt: skip


def _bias(error: Float[np.ndarray, "*points estimates"]) -> float:
    """The bias of random estimates beyond their noise, common to all points or at each point.

    If errors of the trace change sign between points, only the mean of their squares shows them.
    The square of a mean is itself biased by the variance of the mean.
    """
    noise = np.var(error, axis=-1, ddof=1) / error.shape[-1]
    mean = abs(np.mean(error)) - 5 * math.sqrt(np.mean(noise) / noise.size)
    # Ten standard errors: few points make a distribution with a long tail.
    square = np.mean(np.mean(error, axis=-1) ** 2 - noise)
    square -= 10 * math.sqrt(2 / noise.size) * _rms(noise)
    return float(max(mean, math.sqrt(max(square, 0.0))))


def _rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, float)))))


def _relative(error: float, size: float) -> float:
    return error / size if size else (math.inf if error else 0.0)


@compiled
def _traces(integrands, params, times, points, context, keys):
    """`dz` from the field and from the divergence, the trace, the Jacobian's norm, the
    estimates."""
    chosen = integrands.chosen_divergence(points[0], params, context)
    exact_with_norm = exact(chunk=16).with_norm
    assert exact_with_norm is not None

    def at(t, z, context, keys):
        g = integrands.at(t, params, context)
        dz, trace, square = exact_with_norm(g, z, None)
        own = lambda key: chosen.apply(g, z, chosen.init(key, z))
        own_dz, estimates = jax.lax.map(own, keys)
        return dz, own_dz[0], trace, jnp.sqrt(square), estimates

    with jax.default_matmul_precision("highest"):
        over_batch = jax.vmap(at, (None, 0, 0, 0))
        return jax.vmap(over_batch, (0, 0, None, 0))(times, points, context, keys)


def probe_error(s: Subject) -> Row:
    """The standard error of one estimate of `log_prob`, over fresh probes."""
    value, probes = 0.0, s.probes
    if probes is not None:
        keys = jax.random.split(s.key, 8)
        again = [s.flow.log_prob(s.params, s.x, key=key, context=s.context) for key in keys]
        inside = jnp.stack(again)[:, ~s.outside]
        value = float(jnp.sqrt(jnp.mean(jnp.var(inside, axis=0, ddof=1))))
    times = math.ceil((value / PROBE_ERROR) ** 2) if math.isfinite(value) else 1
    event = s.x.shape[1:]
    drawn = probes.shape[1] if probes is not None and probes.shape[2:] == event else 1
    advice = "divergence=jaxode.divergence.exact(); training bears unbiased noise."
    if times * drawn < math.prod(event):
        advice = f"take {times} times as many probes, or {advice}"
    else:
        advice = f"use {advice}"
    return s.judge(
        "probe standard error", value, PROBE_ERROR, "nats", f"For densities to report {advice}"
    )


def base_distance(s: Subject) -> Row:
    """Where the samples end: their distance from the mean of the base, in its deviations.

    The median over rows of the root mean square over coordinates, so that a few outliers do not
    count. Far away, log-densities are so large that their rounding is an error.
    """
    return s.judge(
        "distance from the base", s.base_distance, BASE_DISTANCE, "standard deviations",
        "The flow does not carry these samples to its base: train it on standardized data, such "
        "as jaxode.bind(flow, params, standardize=data).to_flow(data), or for longer.",
    )  # fmt: skip


def of_all_coordinates(check: Callable[[Subject], Row]) -> Callable[[Subject], Row | None]:
    """The check, which leaves out configurations of particles: their density is that of fewer
    coordinates than samples have."""
    centered = lambda s: isinstance(s.flow.base, CenteredNormal)
    return functools.wraps(check)(lambda s: None if centered(s) else check(s))


@of_all_coordinates
def base_samples(s: Subject) -> Row:
    """Whether the base draws samples of its density."""
    log_density = lambda x: _log_density(s.flow.base.log_prob(jnp.asarray(x, s.x.dtype)))
    samples = np.asarray(s.base_samples)
    row = s.judge(
        "base samples", np.nan if s.base_fault else imbalance(s.key, samples, log_density),
        IMBALANCE, "standard errors off",
        "The samples of the base do not have its log_prob: give both the same location, scale and "
        "shape.",
    )  # fmt: skip
    return row._replace(advice=s.base_fault or row.advice)


@of_all_coordinates
def base_probability(s: Subject) -> Row:
    """The integral of the base density."""
    if s.base_fault:
        return Row("base probability", np.nan, f"1 within {PROBABILITY:g}")
    return _integrated(
        s, "base probability", s.base_samples, s.flow.base.log_prob,
        "Normalize the base density: it does not integrate to one, or not where its samples are.",
    )  # fmt: skip


@of_all_coordinates
def total_probability(s: Subject) -> Row:
    """The integral of the density of the flow."""
    name, size = "total probability", math.prod(s.flow.base.event_shape)
    if s.failure or s.tight_failure or bool(s.outside.all()):
        return Row(name, np.nan, f"1 within {PROBABILITY:g}")
    if size > EXACT_UP_TO:
        # No proposals come near enough to its samples.
        return Row(name, np.nan, f"not resolved beyond {EXACT_UP_TO} dimensions")
    # Noise in the log-density would not average out in the density.
    of_trace = s.wrong_divergence or s.probes is not None
    flow = dataclasses.replace(s.flow, divergence=exact()) if of_trace else s.flow
    to_data = lambda flow, z, context: flow.from_base(s.params, z, context=context)
    log_prob = lambda flow, x, context: flow.log_prob(s.params, x, context=context)
    of_flow = lambda solve: lambda rows: _in_chunks(s, flow, solve, rows)
    samples = of_flow(to_data)(flow.base.sample(s.key, (CHUNK,)))
    samples = samples[np.isfinite(samples).reshape(CHUNK, -1).all(axis=1)]
    if len(samples) < 2:
        return _near_one(s, name, np.nan, 0.0, "")
    advice = (
        f"{s.solve_finer}: the density does not integrate to one; if that does not help, the "
        "divergence of the vector field is wrong, or the field is not smooth."
    )
    measure = _on_grids if size in GRIDS else _integrated
    return measure(s, name, samples, of_flow(log_prob), advice)


def _in_chunks(s: Subject, flow: CNF, solve: Callable[..., Array], rows) -> np.ndarray:
    """Solve in chunks of one size, so that one program serves all, with the first context.

    A single row that fails, such as a point that no sample reaches, is NaN.
    """
    chunk = lambda leaf: jnp.broadcast_to(leaf[:1], (AT_ONCE, *leaf.shape[1:]))
    context = jax.tree.map(lambda leaf: chunk(jnp.asarray(leaf)), s.context)
    alone = flow if s.implicit else dataclasses.replace(flow, batch="per_sample")

    def run(x):
        if s.implicit:
            # It solves a batch as one system, whose Jacobian grows with the square of the batch.
            one = lambda x, c: solve(flow, x[None], jax.tree.map(lambda leaf: leaf[None], c))[0]
            return jax.vmap(one)(x, context)
        out = solve(flow, x, context)
        return solve(alone, x, context) if jnp.isnan(out).any() else out

    out = []
    for i in range(0, len(rows), AT_ONCE):
        part = jnp.asarray(rows[i : i + AT_ONCE], s.x.dtype)
        padded = jnp.concatenate([part, chunk(part)[len(part) :]])
        out.append(np.asarray(run(padded))[: len(part)])
    return np.concatenate(out)


def _on_grids(s: Subject, name: str, samples, log_prob, advice: str) -> Row:
    """The integral over a box around the samples, on successively finer grids.

    Where it is not one, narrow parts may lie between the nodes. Samples do not miss them.
    """
    event, flat = samples.shape[1:], samples.reshape(len(samples), -1)
    size, (low, high) = flat.shape[1], (np.min(flat, axis=0), np.max(flat, axis=0))
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    value, change, points = np.nan, np.nan, 0
    for points in GRIDS[size]:
        axes = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, *event)
        density = np.exp(_log_density(log_prob(grid))).reshape((points,) * size)
        value = _integral(density, axes)
        coarse = (slice(None, None, 2),) * size
        change = abs(value - _integral(density[coarse], [axis[::2] for axis in axes]))
        if abs(value - 1) > PROBABILITY:
            there = np.exp(_log_density(log_prob(samples[:AT_ONCE])))
            width = np.where(high > low, high - low, 1.0)  # samples may be alike
            places = (flat[:AT_ONCE].astype(float) - low) / width * (points - 1)
            nearest = density[tuple(np.rint(places).astype(int).T)]
            change = max(change, float(np.mean(nearest < there / 2)))
        if not change > 0.1 * PROBABILITY:
            break
    if change > PROBABILITY:
        # Not a fault of the flow, but nothing is known.
        return Row(name, np.nan, f"not resolved by {points} points a side")
    return _near_one(s, name, value, change, advice)


def _integrated(s: Subject, name: str, samples, log_prob, advice: str) -> Row:
    """The integral by importance sampling, with proposals similar to the samples."""
    found = importance(s.key, samples, lambda x: _log_density(log_prob(jnp.asarray(x, s.x.dtype))))
    effective, value = float(found.ess) * found.count, float(jnp.exp(found.log_z))
    if not effective >= EFFECTIVE * len(samples):
        text = f"not resolved: effective sample size {effective:.0f} of {len(samples)}"
        return Row(name, np.nan, text)
    return _near_one(s, name, value, 4 * value * float(found.log_z_error), advice)


def _log_density(log_prob) -> np.ndarray:
    """The log-density, minus infinity where no solve arrives."""
    return np.nan_to_num(np.asarray(log_prob, float), nan=-np.inf, posinf=np.inf, neginf=-np.inf)


def _near_one(s: Subject, name: str, value: float, uncertain: float, advice: str) -> Row:
    limit = PROBABILITY + uncertain
    row = s.judge(name, abs(value - 1), limit, "", advice)
    return row._replace(value=value, limit=f"1 within {limit:.2g}")


def _integral(values: np.ndarray, axes: list[np.ndarray]) -> float:
    for axis in reversed(axes):
        values = np.trapezoid(values, axis)
    return float(values)
