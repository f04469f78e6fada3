"""Gradient methods: each wraps the forward solve and knows how to differentiate it."""

from typing import Protocol

from jaxode.ode.adjoints.backsolve import BacksolveAdjoint
from jaxode.ode.adjoints.discrete import DiscreteAdjoint
from jaxode.ode.adjoints.forward import ForwardMode
from jaxode.ode.adjoints.interpolating import InterpolatingAdjoint
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.method import Method
from jaxode.ode.loop.problem import Problem

__all__ = ["Adjoint", "BacksolveAdjoint", "DiscreteAdjoint", "ForwardMode", "InterpolatingAdjoint"]


class Adjoint(Protocol):
    """A gradient method: a frozen dataclass, compared by value."""

    def integrate(self, problem: Problem, method: Method) -> Integration:
        """Solve the problem. Differentiable in all of its floating leaves."""
        ...
