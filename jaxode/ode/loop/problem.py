"""What the loop solves."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, PyTree


class Slope(NamedTuple):
    """The vector field as a function of time and state alone."""

    field: Any
    args: PyTree
    seen: Callable[..., Any] = lambda t, y: (t, y)
    """The time and state at which it is evaluated instead of the given ones."""

    def __call__(
        self, t: Float[Array, " rows"], y: Float[Array, "samples n"]
    ) -> Float[Array, "samples n"]:
        return self.field(*self.seen(t, y), self.args)

    @property
    def jacobian(self) -> Callable[..., Float[Array, "samples n n"]] | None:
        """Its Jacobian by the state, if the user gave one."""
        jacobian = self.field.jacobian
        return jacobian and (lambda t, y: jacobian(*self.seen(t, y), self.args))


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

    @property
    def slope(self) -> Slope:
        """The vector field at one time and state."""
        return Slope(self.field, self.args)
