"""Neural ODEs and continuous normalizing flows in JAX."""

from jaxode import divergence, nn
from jaxode.adjoints import DiscreteAdjoint
from jaxode.cnf import cnf
from jaxode.distributions import standard_normal
from jaxode.results import Result, Solution, SolveError, Stats
from jaxode.solve import flow, solve

__all__ = [
    "DiscreteAdjoint",
    "Result",
    "Solution",
    "SolveError",
    "Stats",
    "cnf",
    "divergence",
    "flow",
    "nn",
    "solve",
    "standard_normal",
]
