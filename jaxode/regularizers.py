"""Running costs to add to the negative log-likelihood, for `jaxode.cnf(regularizers=...)`."""

from jaxode.flows.regularizers import Regularizer, jacobian_frobenius, kinetic_energy

__all__ = ["Regularizer", "jacobian_frobenius", "kinetic_energy"]
