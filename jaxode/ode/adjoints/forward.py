"""Forward-mode differentiation through the solve."""

from dataclasses import dataclass
from typing import ClassVar

from jaxode._jax.primitives import nondifferentiable_backward
from jaxode.ode.adjoints.base import Adjoint
from jaxode.ode.adjoints.vmap import vmappable
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration, integrate
from jaxode.ode.loop.stepper import Stepper

FORWARD_ONLY = (
    "ForwardMode: a solve with this adjoint has forward-mode derivatives only (jax.jvp, "
    "jax.jacfwd). Use adjoint=jaxode.DiscreteAdjoint() for jax.grad and jax.vjp."
)


@dataclass(frozen=True)
class ForwardMode(Adjoint):
    """Differentiate the solver's own steps in forward mode: `jax.jvp` and `jax.jacfwd`.

    Tangents are carried along with the state, so nothing is stored. `DiscreteAdjoint` has this
    mode, too, and the two agree up to rounding; here a program has no way back, so it compiles
    sooner. Reverse mode raises an error.
    """

    supports_dense: ClassVar[bool] = True
    forward_only: ClassVar[bool] = True

    def integrate(self, problem: InitialValueProblem, stepper: Stepper) -> Integration:
        def run(problem, stepper):
            return integrate(problem, stepper)[0]

        integration = vmappable(run, problem, stepper)
        return nondifferentiable_backward(integration, msg=FORWARD_ONLY)
