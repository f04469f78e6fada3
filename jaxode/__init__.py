"""Neural ODEs and continuous normalizing flows in JAX."""

from jaxode import (
    calibration,
    coupling,
    divergence,
    images,
    interop,
    nn,
    petab,
    plot,
    regularizers,
    series,
    standardize,
    tabular,
)
from jaxode._checks.errors import Result, SolveError
from jaxode.auditing.report import Report, audit
from jaxode.density.density import Density, bind
from jaxode.density.importance import Importance, importance
from jaxode.estimation.estimate import Estimate, estimate
from jaxode.estimation.populations.population import PopulationEstimate, estimate_population
from jaxode.flows.bases import centered_normal, diagonal_normal, standard_normal, torus
from jaxode.flows.cnf import CNF
from jaxode.flows.construct import cnf
from jaxode.flows.diffusion import VarianceExploding, VariancePreserving, probability_flow
from jaxode.ode.adjoints import BacksolveAdjoint, DiscreteAdjoint, ForwardMode
from jaxode.ode.events import Event
from jaxode.ode.loop.stats import Stats
from jaxode.ode.odeint import odeint
from jaxode.ode.pieces import Jumps
from jaxode.ode.solution import Solution
from jaxode.ode.solve import flow, solve
from jaxode.ode.solvers.rosenbrock import Rodas5P, Rosenbrock23
from jaxode.ode.steady import SteadyState, steady_state
from jaxode.saving.models import load, save
from jaxode.training.fit import fit
from jaxode.training.validations import Point

__version__ = "0.5.0"

__all__ = [
    "CNF",
    "BacksolveAdjoint",
    "Density",
    "DiscreteAdjoint",
    "Estimate",
    "Event",
    "ForwardMode",
    "Importance",
    "Jumps",
    "Point",
    "PopulationEstimate",
    "Report",
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
    "calibration",
    "centered_normal",
    "cnf",
    "coupling",
    "diagonal_normal",
    "divergence",
    "estimate",
    "estimate_population",
    "fit",
    "flow",
    "images",
    "importance",
    "interop",
    "load",
    "nn",
    "odeint",
    "petab",
    "plot",
    "probability_flow",
    "regularizers",
    "save",
    "series",
    "solve",
    "standard_normal",
    "standardize",
    "steady_state",
    "tabular",
    "torus",
]
