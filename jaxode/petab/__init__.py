"""Estimation problems in PEtab: models in SBML, and tables of conditions and measurements."""

from jaxode.petab.petab_problem import Problem, load

__all__ = ["Problem", "load"]
