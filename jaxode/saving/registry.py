"""Names in files of the classes and functions that models are made of.

A name outlives a release; where its class stands may change. Nothing else is ever looked up for a
file, so that reading one runs no code of its choice.
"""

import functools
import importlib
import pkgutil
from typing import Any

import diffrax
import jax
import jax.numpy as jnp

CLASSES = {
    # densities
    "Density": "jaxode.density.density:Density",
    "Contexts": "jaxode.density.contexts:Contexts",
    "ContextsInFlow": "jaxode.density.contexts:InFlow",
    "Chain": "jaxode.density.maps.chain:Chain",
    "Affine": "jaxode.density.maps.affine:Affine",
    "Box": "jaxode.density.maps.box:Box",
    "Linear": "jaxode.density.maps.whiten:Linear",
    "Monotone": "jaxode.density.maps.normal:Monotone",
    "MapOfSome": "jaxode.density.maps.columns:Some",
    "Constant": "jaxode._jax.closure:_Constant",
    # flows
    "CNF": "jaxode.flows.cnf:CNF",
    "Chunks": "jaxode.flows.chunks:Chunks",
    "Embedded": "jaxode.flows.embedding:Embedded",
    "StandardNormal": "jaxode.flows.bases:StandardNormal",
    "CenteredNormal": "jaxode.flows.bases:CenteredNormal",
    "DiagonalNormal": "jaxode.flows.bases:DiagonalNormal",
    "Torus": "jaxode.flows.bases:Torus",
    "AdaptedBase": "jaxode.flows.bases:_Adapted",
    "Exact": "jaxode.flows.divergence:Exact",
    "Hutchinson": "jaxode.flows.divergence:Hutchinson",
    "ClosedForm": "jaxode.flows.divergence:ClosedForm",
    "Auto": "jaxode.flows.divergence:Auto",
    "DivergenceOfFunctions": "jaxode.flows.divergence:_OfFunctions",
    "Regularizer": "jaxode.flows.regularizers:Regularizer",
    "Centered": "jaxode.flows.centered:Centered",
    "ProbabilityFlow": "jaxode.flows.diffusion:_ProbabilityFlow",
    "VariancePreserving": "jaxode.flows.diffusion:VariancePreserving",
    "VarianceExploding": "jaxode.flows.diffusion:VarianceExploding",
    # networks
    "MLP": "jaxode.nn.networks:MLP",
    "Concat": "jaxode.nn.networks:Concat",
    "ConcatSquash": "jaxode.nn.networks:ConcatSquash",
    "PotentialGradient": "jaxode.nn.networks:PotentialGradient",
    "Layer": "jaxode.nn.networks:_Layer",
    "ModuleField": "jaxode.nn.networks:_ModuleField",
    "Dense": "jaxode.nn.network:Dense",
    "Residual": "jaxode.nn.residual:Residual",
    "Ensemble": "jaxode.nn.ensemble:Ensemble",
    "DeepSet": "jaxode.nn.deep_set:DeepSet",
    "Lattice": "jaxode.nn.lattice:Lattice",
    "Mixer": "jaxode.nn.mixer:Mixer",
    "MixerBlock": "jaxode.nn.mixer:Block",
    "Particles": "jaxode.nn.particles:Particles",
    "ParticlesAround": "jaxode.nn.particles:_Around",
    # solves
    "SolveOptions": "jaxode.ode.options:SolveOptions",
    "Event": "jaxode.ode.events:Event",
    "Jumps": "jaxode.ode.pieces:Jumps",
    "Rodas5P": "jaxode.ode.solvers.rosenbrock:Rodas5P",
    "Rosenbrock23": "jaxode.ode.solvers.rosenbrock:Rosenbrock23",
    "DiscreteAdjoint": "jaxode.ode.adjoints.discrete:DiscreteAdjoint",
    "BacksolveAdjoint": "jaxode.ode.adjoints.backsolve:BacksolveAdjoint",
    "ForwardMode": "jaxode.ode.adjoints.forward:ForwardMode",
    # tables
    "Table": "jaxode.tabular.table:Table",
    "Encoder": "jaxode.tabular.encoding:Encoder",
    "Column": "jaxode.tabular.columns:Column",
    "Dates": "jaxode.tabular.dates:Dates",
    "Circle": "jaxode.tabular.periodic:Circle",
    "Categories": "jaxode.tabular.categorical:Categories",
    "AverageOfCategories": "jaxode.tabular.categorical:Average",
    "Calibrated": "jaxode.tabular.calibration:Calibrated",
    "GridMixture": "jaxode.tabular.several_grids:GridMixture",
    # series
    "Series": "jaxode.series.model:Series",
    "SeriesUnits": "jaxode.series.units:Units",
    "SeriesNetwork": "jaxode.series.network:SeriesNetwork",
    "GatedJump": "jaxode.series.network:GatedJump",
    "Push": "jaxode.series.network:Push",
    # estimates
    "Estimate": "jaxode.estimation.estimate:Estimate",
    "PopulationEstimate": "jaxode.estimation.population:PopulationEstimate",
    "ObservedODE": "jaxode.estimation.problem:ObservedODE",
    "ParameterBox": "jaxode.estimation.search:Box",
    "NormalNoise": "jaxode.estimation.likelihoods:Normal",
    "LogNormalNoise": "jaxode.estimation.likelihoods:LogNormal",
    "LaplaceNoise": "jaxode.estimation.likelihoods:Laplace",
    "PoissonNoise": "jaxode.estimation.likelihoods:Poisson",
    "NegativeBinomialNoise": "jaxode.estimation.likelihoods:NegativeBinomial",
    # trainings
    "Point": "jaxode.training.loop:Point",
}
FUNCTIONS = {
    "kinetic_energy": "jaxode.flows.regularizers:_square",
    "jacobian_frobenius": "jaxode.flows.regularizers:_norm",
}
# Functions of these modules have no effects: a file may name any of them.
MODULES = {"jax.nn": jax.nn, "jax.numpy": jnp}
# Libraries whose states and solvers a file may name.
LIBRARIES = ("optax", "diffrax")


def name_of_class(cls: type) -> str | None:
    """The name of a class in files, or None if it is the user's."""
    if (name := _names().get(f"{cls.__module__}:{cls.__qualname__}")) is not None:
        return name
    library = cls.__module__.partition(".")[0]
    name = f"{library}.{cls.__name__}"
    return name if class_of_name(name) is cls else None


def class_of_name(name: str) -> type | None:
    """The inverse of `name_of_class`, or None if there is no such class."""
    if name in CLASSES:
        return pkgutil.resolve_name(CLASSES[name])
    library, _, short = name.partition(".")
    if library not in LIBRARIES:
        return None
    cls = getattr(importlib.import_module(library), short, None)
    return cls if _is_state_or_solver(cls) else None


def _is_state_or_solver(cls: Any) -> bool:
    """Whether it is a class of named tuples, as states of Optax are, or of solvers of Diffrax."""
    if not isinstance(cls, type):
        return False
    return issubclass(cls, diffrax.AbstractSolver) or (
        issubclass(cls, tuple) and hasattr(cls, "_fields")
    )


def name_of_function(function: Any) -> str | None:
    """The name of a function in files, or None if it is the user's."""
    name = getattr(function, "__name__", "")
    for short, place in FUNCTIONS.items():
        if place.endswith(f":{name}") and pkgutil.resolve_name(place) is function:
            return short
    for module, library in MODULES.items():
        if getattr(library, name, None) is function:
            return f"{module}.{name}"
    return None


def function_of_name(name: str) -> Any:
    """The inverse of `name_of_function`, or None if there is no such function."""
    if name in FUNCTIONS:
        return pkgutil.resolve_name(FUNCTIONS[name])
    module, _, short = name.rpartition(".")
    function = getattr(MODULES.get(module), short, None)
    return function if callable(function) and not short.startswith("_") else None


@functools.cache
def _names() -> dict[str, str]:
    return {place: name for name, place in CLASSES.items()}
