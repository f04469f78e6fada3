"""What the loop solves."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, PyTree


class Problem(NamedTuple):
    """An initial value problem: `dy/dt = field(t, y, args)`, `y(t0) = y0`, up to `t1`.

    The cotangents of a problem are also a `Problem`, and so are the flags of which leaves are
    differentiated.
    """

    field: Any
    """`(t [rows], y [samples, n], args) -> dy/dt [samples, n]`, without closed-over values."""
    args: PyTree
    """`(shared, rows)`: arguments that all samples share, and leaves `[samples, ...]`."""
    y0: Float[Array, "samples n"]
    t0: Float[Array, " rows"]
    t1: Float[Array, " rows"]
    ts: Float[Array, "times rows"] | None
    """The times of the outputs."""
    outputs: Int[Array, " rows"] | None = None
    """The number of outputs per row. Later ones are padding, with the state of the last output."""

    def slope(
        self, t: Float[Array, " rows"], y: Float[Array, "samples n"]
    ) -> Float[Array, "samples n"]:
        """The vector field at one time and state."""
        return self.field(t, y, self.args)
