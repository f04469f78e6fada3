"""The recorded steps of a forward solve, one by one, from bounded memory."""

import jax
import jax.numpy as jnp
from equinox.internal import nondifferentiable_backward
from jaxtyping import Array, Float, Int, PyTree

from jaxode.checkpoints import Checkpoints
from jaxode.integrate import Field, stages
from jaxode.method import weighted_sum
from jaxode.tableau import Tableau


def interval(times: Float[Array, "steps+1 rows"], index: Int[Array, ""]):
    """Start and size of a recorded step, per row; size zero for a row that waited."""
    t = jax.lax.dynamic_index_in_dim(times, index, 0, keepdims=False)
    t_next = jax.lax.dynamic_index_in_dim(times, index + 1, 0, keepdims=False)
    return t, t_next - t


def replay(
    field: Field,
    tableau: Tableau,
    count: int,
    times: Float[Array, "steps+1 rows"],
    checkpoints: Checkpoints,
    stop: Int[Array, ""],
) -> tuple[Float[Array, "rows n"], Float[Array, "stages rows n"], Checkpoints]:
    """The start and the first `count` stages of the last recorded step before number `stop`.

    Steps are taken again from the latest checkpoint, and states on the way are kept as slots allow.
    """
    start, y, k, known = checkpoints.latest_before(stop)
    k = jnp.zeros((count, *y.shape), y.dtype) if k is None else k[:count]
    spacing = checkpoints.spacing(start, stop)
    b = jnp.asarray(tableau.b[:count], y.dtype)

    def advance(carry):
        """To the next step, unless its stages are still unknown, and evaluate them."""
        index, y, k, known, checkpoints = carry
        t, h = interval(times, index)
        moved = known & (h[:, None] != 0)
        y = jnp.where(moved, y + h[:, None] * weighted_sum(b, k), y)
        index = index + known.astype(jnp.int32)
        t, h = interval(times, index)
        k = stages(field, tableau, t, h, y, None, count)
        keep = (index > start) & ((index - start) % spacing == 0)
        checkpoints = checkpoints.keep_replayed(index, y, stop, keep)
        return index, y, k, jnp.ones((), bool), checkpoints

    def unfinished(carry):
        index, _, _, known, _ = carry
        return (index < stop - 1) | ~known

    carry = (start, y, k, known, checkpoints)
    _, y, k, _, checkpoints = jax.lax.while_loop(unfinished, advance, carry)
    return y, k, checkpoints


def once_only(name: str, cotangents: PyTree) -> PyTree:
    """The cotangents of a solve, with an error if they are differentiated in reverse mode."""
    message = (
        f"{name}: the gradient of a solve can be differentiated in forward mode only, as in "
        "jax.jacfwd(jax.grad(...)). Use adjoint=jaxode.BacksolveAdjoint() for reverse over reverse."
    )
    return nondifferentiable_backward(cotangents, msg=message)
