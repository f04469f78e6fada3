"""Neural ODEs and continuous normalizing flows in JAX."""

from jaxode import coupling, divergence, images, interop, nn, plot, regularizers, standardize
from jaxode.distributions import diagonal_normal, standard_normal
from jaxode.flows.audit import audit
from jaxode.flows.cnf import cnf
from jaxode.flows.density import bind
from jaxode.flows.fit import fit
from jaxode.flows.probability_flow import (
    VarianceExploding,
    VariancePreserving,
    probability_flow,
)
from jaxode.ode.adjoints import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardMode,
    InterpolatingAdjoint,
)
from jaxode.ode.backward_stats import backward_stats
from jaxode.ode.events import Event
from jaxode.ode.loop.outcome import Result, Stats
from jaxode.ode.odeint import odeint
from jaxode.ode.results import SolveError
from jaxode.ode.solution import Solution
from jaxode.ode.solve import flow, solve

__version__ = "0.2.0"

__all__ = [
    "BacksolveAdjoint",
    "DiscreteAdjoint",
    "Event",
    "ForwardMode",
    "InterpolatingAdjoint",
    "Result",
    "Solution",
    "SolveError",
    "Stats",
    "VarianceExploding",
    "VariancePreserving",
    "audit",
    "backward_stats",
    "bind",
    "cnf",
    "coupling",
    "diagonal_normal",
    "divergence",
    "fit",
    "flow",
    "images",
    "interop",
    "nn",
    "odeint",
    "plot",
    "probability_flow",
    "regularizers",
    "solve",
    "standard_normal",
    "standardize",
]
