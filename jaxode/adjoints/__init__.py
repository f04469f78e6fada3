"""Gradient methods: each wraps the forward solve and knows how to differentiate it."""

from jaxode.adjoints.discrete import DiscreteAdjoint

__all__ = ["DiscreteAdjoint"]
