"""Neural ODEs and continuous normalizing flows in JAX."""

from jaxode import (
    coupling,
    divergence,
    images,
    interop,
    nn,
    plot,
    regularizers,
    standardize,
    tabular,
)
from jaxode._checks.errors import Result, SolveError
from jaxode.auditing.report import audit
from jaxode.density.bind import bind
from jaxode.density.fit import fit
from jaxode.density.importance import importance
from jaxode.flows.bases import centered_normal, diagonal_normal, standard_normal, torus
from jaxode.flows.construct import cnf
from jaxode.flows.diffusion import VarianceExploding, VariancePreserving, probability_flow
from jaxode.ode.adjoints import BacksolveAdjoint, DiscreteAdjoint, ForwardMode
from jaxode.ode.estimation import Estimate, estimate
from jaxode.ode.events import Event
from jaxode.ode.loop.stats import Stats
from jaxode.ode.odeint import odeint
from jaxode.ode.pieces import Jumps
from jaxode.ode.solution import Solution
from jaxode.ode.solve import flow, solve
from jaxode.ode.solvers.rosenbrock import Rodas5P, Rosenbrock23
from jaxode.ode.steady import SteadyState, steady_state

__version__ = "0.4.0"

__all__ = [
    "BacksolveAdjoint",
    "DiscreteAdjoint",
    "Estimate",
    "Event",
    "ForwardMode",
    "Jumps",
    "Result",
    "Rodas5P",
    "Rosenbrock23",
    "Solution",
    "SolveError",
    "Stats",
    "SteadyState",
    "VarianceExploding",
    "VariancePreserving",
    "audit",
    "bind",
    "centered_normal",
    "cnf",
    "coupling",
    "diagonal_normal",
    "divergence",
    "estimate",
    "fit",
    "flow",
    "images",
    "importance",
    "interop",
    "nn",
    "odeint",
    "plot",
    "probability_flow",
    "regularizers",
    "solve",
    "standard_normal",
    "standardize",
    "steady_state",
    "tabular",
    "torus",
]
