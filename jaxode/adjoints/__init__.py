"""Gradient methods: each wraps the forward solve and knows how to differentiate it."""

from jaxode.adjoints.backsolve import BacksolveAdjoint
from jaxode.adjoints.discrete import DiscreteAdjoint
from jaxode.adjoints.interpolating import InterpolatingAdjoint

__all__ = ["BacksolveAdjoint", "DiscreteAdjoint", "InterpolatingAdjoint"]
