"""Forward-mode differentiation through the solve."""

from collections.abc import Callable
from dataclasses import dataclass

from equinox.internal import nondifferentiable_backward
from jaxtyping import Array, Float, PyTree

from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.method import Method

FORWARD_ONLY = (
    "ForwardMode: a solve with this adjoint has forward-mode derivatives only (jax.jvp, "
    "jax.jacfwd). Use adjoint=jaxode.DiscreteAdjoint() for jax.grad and jax.vjp."
)


@dataclass(frozen=True)
class ForwardMode:
    """Differentiate the solver's own steps in forward mode: `jax.jvp` and `jax.jacfwd`.

    Tangents are carried along with the state, so nothing is stored. It pays when few inputs are
    differentiated. The mesh is a constant of differentiation, as for `DiscreteAdjoint`, and the
    results of the two agree to rounding. Reverse mode raises an error.
    """

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
        """Solve `dy/dt = field(t, y, args)`, with a forward-mode derivative in everything."""
        integration, _ = integrate(lambda t, y: field(t, y, args), method, y0, t0, t1, ts)
        return nondifferentiable_backward(integration, msg=FORWARD_ONLY)
