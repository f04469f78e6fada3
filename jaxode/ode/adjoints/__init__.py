"""Gradient methods: each wraps the forward solve and knows how to differentiate it."""

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Array, Float, PyTree

from jaxode.ode.adjoints.backsolve import BacksolveAdjoint
from jaxode.ode.adjoints.discrete import DiscreteAdjoint
from jaxode.ode.adjoints.forward import ForwardMode
from jaxode.ode.adjoints.interpolating import InterpolatingAdjoint
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.method import Method

__all__ = ["Adjoint", "BacksolveAdjoint", "DiscreteAdjoint", "ForwardMode", "InterpolatingAdjoint"]


class Adjoint(Protocol):
    """A gradient method."""

    def integrate(
        self,
        field: Callable[..., Float[Array, "rows n"]],
        args: PyTree,
        y0: Float[Array, "rows n"],
        t0: Float[Array, ""],
        t1: Float[Array, ""],
        ts: Float[Array, " times"] | None,
        method: Method,
    ) -> Integration:
        """Solve `dy/dt = field(t, y, args)` on rows, with derivatives by this method."""
        ...
