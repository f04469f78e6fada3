"""Neural ODEs and continuous normalizing flows in JAX."""

from jaxode import divergence, images, nn, plot, regularizers
from jaxode.adjoints import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardMode,
    InterpolatingAdjoint,
)
from jaxode.auditing import audit
from jaxode.cnf import cnf
from jaxode.debugging import backward_stats
from jaxode.distributions import diagonal_normal, standard_normal
from jaxode.odeint import odeint
from jaxode.results import Result, Solution, SolveError, Stats
from jaxode.solve import flow, solve

__all__ = [
    "BacksolveAdjoint",
    "DiscreteAdjoint",
    "ForwardMode",
    "InterpolatingAdjoint",
    "Result",
    "Solution",
    "SolveError",
    "Stats",
    "audit",
    "backward_stats",
    "cnf",
    "diagonal_normal",
    "divergence",
    "flow",
    "images",
    "nn",
    "odeint",
    "plot",
    "regularizers",
    "solve",
    "standard_normal",
]
