"""Gradient methods: each wraps the forward solve and knows how to differentiate it."""

from jaxode.ode.adjoints.backsolve import BacksolveAdjoint
from jaxode.ode.adjoints.base import Adjoint
from jaxode.ode.adjoints.discrete import DiscreteAdjoint
from jaxode.ode.adjoints.forward import ForwardMode

__all__ = ["Adjoint", "BacksolveAdjoint", "DiscreteAdjoint", "ForwardMode"]
