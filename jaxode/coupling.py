"""Couplings of base samples with data, for `matching_loss(coupling=...)`."""

from jaxode.flows.coupling import Coupling, independent, optimal_transport

__all__ = ["Coupling", "independent", "optimal_transport"]
