"""The work that a solve did."""

import equinox as eqx
from jaxtyping import Array, Int


class Stats(eqx.Module):
    """Work done by a forward solve. Scalars; with per-sample steps, one entry per row.

    `num_steps == num_accepted + num_rejected`. `num_evals` counts every evaluation of the vector
    field, including those that choose the first step. Those of stiff solvers leave out the Jacobian
    of each step, which costs about as much as one for each component of the state.
    """

    num_steps: Int[Array, "*rows"]
    """Attempted steps."""
    num_accepted: Int[Array, "*rows"]
    """Steps that advanced the solution."""
    num_rejected: Int[Array, "*rows"]
    """Steps discarded because their error estimate was too large."""
    num_evals: Int[Array, "*rows"]
    """Evaluations of the vector field."""
