"""What the loop solves."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, PyTree


class Problem(NamedTuple):
    """An initial value problem on rows: `dy/dt = field(t, y, args)`, `y(t0) = y0`, up to `t1`.

    The cotangents of a problem, and which of its leaves are differentiated, are a `Problem`, too.
    """

    field: Any
    """`(t [rows], y [rows, n], args) -> dy/dt [rows, n]`, without closed-over values."""
    args: PyTree
    """`(shared, rows)`: what all rows have in common, and leaves `[rows, ...]` of their own; of its
    samples, if the one row is a batch."""
    y0: Float[Array, "rows n"]
    t0: Float[Array, " rows"]
    t1: Float[Array, " rows"]
    ts: Float[Array, "times rows"] | None
    """The times of the outputs."""
    outputs: Int[Array, " rows"] | None = None
    """How many of them a row has. Those after are padding, and have the state of its last."""

    def slope(self, t: Float[Array, " rows"], y: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
        """The vector field at one time and state."""
        return self.field(t, y, self.args)
