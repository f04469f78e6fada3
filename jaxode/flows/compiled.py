"""The compiled programs behind the methods of a flow.

A system carries the samples, and its state is extended by what is integrated along. Integrands and
the base density are one argument.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxode._checks.errors import Result
from jaxode._checks.samples import normalized
from jaxode._jax.closure import compiled
from jaxode.flows.bases import log_prob_of
from jaxode.flows.integrands import Integrands
from jaxode.flows.keys import of_each_row
from jaxode.flows.nll import BatchNLL, evaluate, with_integrals
from jaxode.flows.periods import with_periods
from jaxode.ode.bolza import unused_rows
from jaxode.ode.solution import Solution
from jaxode.ode.solve import run
from jaxode.ode.system import System


@compiled
@with_periods
def transport(system: System, integrands_and_base, key) -> Solution:
    """The samples at the other end of the flow."""
    del integrands_and_base, key
    return run(system)


@compiled
@with_periods
def log_prob(system: System, integrands_and_base, key) -> Solution:
    """The log-density of data, as the end state."""
    integrands, base = integrands_and_base
    return _log_prob(system, integrands, base, probes_of(system, integrands, key))


@compiled
@with_periods
def log_prob_and_error(system: System, integrands_and_base, key) -> Solution:
    """The log-density of data and its standard error, as the end state."""
    integrands, base = integrands_and_base
    probes, shape = probes_of(system, integrands, key), system.y0.shape
    if probes is None:
        solution = _log_prob(system, integrands, base, probes)
        no_error = jnp.where(jnp.isnan(solution.y1), solution.y1, 0.0)
        return dataclasses.replace(solution, y1=(solution.y1, no_error))
    chosen = integrands.chosen_divergence(system.y0, system.shared, system.row_args)
    standard_error = chosen.standard_error
    if standard_error is None or probes.shape[1] < 2:
        raise ValueError(
            "log_prob_and_error: needs a divergence with at least two probes and a "
            f"standard_error; got probes of shape {probes.shape[1:]} from {chosen.name}. "
            "Pass divergence=jaxode.divergence.hutchinson(probes=8) to cnf."
        )
    solution = with_integrals(system, integrands.volume_of_each_probe, probes, probes.shape[1:2])
    z, log_dets = solution.y1
    error = jax.vmap(lambda estimates: standard_error(estimates, math.prod(shape[1:])))(log_dets)
    log_probs = log_prob_of(base, z, system.stepper.precision) + jnp.mean(log_dets, axis=1)
    return dataclasses.replace(solution, y1=(log_probs, error))


@compiled
@with_periods
def sample(system: System, integrands_and_base, key) -> Solution:
    """Base samples carried to the time of the data, with their log-densities."""
    integrands, base = integrands_and_base
    solution = with_integrals(system, integrands.volume, probes_of(system, integrands, key), ())
    x, log_det = solution.y1
    log_base = log_prob_of(base, system.y0, system.stepper.precision)
    return dataclasses.replace(solution, y1=(x, log_base - log_det))


@compiled
@with_periods
def nll(system: System, integrands_and_base, key, weights):
    """The training loss, its statistics, the `Result` that counts, and the time reached."""
    integrands, base = integrands_and_base
    axis_name, x = system.stepper.axis_name, system.y0
    probes = probes_of(system, integrands, key, of_costs=True)
    weights, valid = normalized(weights, x, axis_name)
    loss, stats, t_reached = evaluate(BatchNLL(system, integrands, base, probes, weights))
    failed = stats.result != Result.SUCCESS
    result = jnp.where(valid | failed, stats.result, Result.INVALID_ARGUMENT)
    unused = unused_rows(result, weights).reshape(result.shape)
    counts = jnp.where(unused, Result.SUCCESS, result)
    return loss, stats._replace(result=result), counts, t_reached


def _log_prob(system: System, integrands: Integrands, base, probes) -> Solution:
    # From data to base, `-integral over [t0, t1] of div f`.
    solution = with_integrals(system, integrands.volume, probes, ())
    z, log_det = solution.y1
    log_base = log_prob_of(base, z, system.stepper.precision)
    return dataclasses.replace(solution, y1=log_base + log_det)


def probes_of(system: System, integrands: Integrands, key, *, of_costs: bool = False):
    """Draw one probe per sample, which depends only on the key and the sample's index.

    `of_costs`: for the divergence and the running costs.
    """
    x, context = system.y0, system.row_args
    chosen = integrands.chosen_divergence(x, system.shared, context, of_costs=of_costs)
    return of_each_row(chosen.init, key, x, system.stepper.axis_name)
