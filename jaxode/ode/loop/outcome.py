"""How a solve ended, and the work it did."""

import enum

import equinox as eqx
from jaxtyping import Array, Int


class Result(enum.IntEnum):
    """How a solve ended."""

    SUCCESS = 0
    MAX_STEPS_REACHED = 1
    STEP_SIZE_UNDERFLOW = 2
    NON_FINITE = 3
    INVALID_ARGUMENT = 4
    IMPLICIT_SOLVE_FAILED = 5
    EVENT_NOT_FOUND = 6


class Stats(eqx.Module):
    """Work done by a forward solve. Scalars; with per-sample steps, one entry per row.

    `num_steps == num_accepted + num_rejected`. `num_evals` counts every evaluation of the vector
    field, including those that choose the first step.
    """

    num_steps: Int[Array, "*rows"]
    """Attempted steps."""
    num_accepted: Int[Array, "*rows"]
    """Steps that advanced the solution."""
    num_rejected: Int[Array, "*rows"]
    """Steps discarded because their error estimate was too large."""
    num_evals: Int[Array, "*rows"]
    """Evaluations of the vector field. -1 for an implicit solver, which does not count them."""
