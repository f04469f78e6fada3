"""The problem that the loop solves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


class Slope(NamedTuple):
    """The vector field as a function of time and state alone."""

    field: Any
    args: PyTree
    piece: Float[Array, "rows 2"] | None = None
    """The ends of the piece of the solve in which it is evaluated, if it may jump there."""
    evaluation_point: Callable[..., Any] = lambda t, y: (t, y)
    """Maps a time and a state to those at which the field is evaluated."""

    def __call__(
        self, t: Float[Array, " rows"], y: Float[Array, "samples n"]
    ) -> Float[Array, "samples n"]:
        return self.field(*self._inside(t, y), self.args)

    @property
    def jacobian(self) -> Callable[..., Float[Array, "samples n n"]] | None:
        """The field's Jacobian by the state, if the user gave one."""
        jacobian = self.field.jacobian
        return jacobian and (lambda t, y: jacobian(*self._inside(t, y), self.args))

    def _inside(self, t, y):
        """Move a time at an end of the piece inside it, by a few roundings."""
        t, y = self.evaluation_point(t, y)
        if self.piece is None:
            return t, y
        low, high = jnp.min(self.piece, axis=1), jnp.max(self.piece, axis=1)
        eps, largest = jnp.finfo(t.dtype).eps, jnp.maximum(jnp.abs(low), jnp.abs(high))

        def margin(end):  # `largest` sets the scale where an end is near zero
            return jnp.minimum(4 * eps * jnp.maximum(jnp.abs(end), eps * largest), (high - low) / 4)

        lowest, highest = low + margin(low), high - margin(high)
        moved = jnp.where(t < lowest, lowest, jnp.where(t > highest, highest, t))
        return t + jax.lax.stop_gradient(moved - t), y


class InitialValueProblem(NamedTuple):
    """An initial value problem: `dy/dt = field(t, y, args)`, `y(t0) = y0`, up to `t1`.

    The cotangents of a problem are also an `InitialValueProblem`, and so are the flags of which
    leaves are differentiated.
    """

    field: Any
    """`(t [rows], y [samples, n], args) -> dy/dt [samples, n]`, without closed-over values."""
    args: PyTree
    """`(shared, row_args)`: arguments that all samples share, and leaves `[samples, ...]`."""
    y0: Float[Array, "samples n"]
    t0: Float[Array, " rows"]
    t1: Float[Array, " rows"]
    ts: Float[Array, "times rows"] | None
    """The times of the outputs."""
    outputs: Int[Array, " rows"] | None = None
    """The number of outputs per row. Later ones are padding, with the state of the last output."""
    h0: Float[Array, " rows"] | None = None
    """The first step to try, with its sign. NaN in rows for which the stepper chooses it."""
    piece: Float[Array, "rows 2"] | None = None
    """The ends between which the field is evaluated, if it has breakpoints."""

    @property
    def slope(self) -> Slope:
        """The vector field at one time and state."""
        return Slope(self.field, self.args, self.piece)
