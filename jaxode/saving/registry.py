"""The names that files give to the classes and functions of models.

A name stays in all releases, while its class may move. Reading a file looks nothing else up, so
that it runs no code that the file chooses.
"""

import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

import diffrax
import numpy as np

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
    "MapOfSome": "jaxode.density.maps.some_columns:Some",
    "NumpyroSupport": "jaxode.density.maps.of_numpyro:NumpyroSupport",
    "DistraxSupport": "jaxode.density.maps.of_distrax:DistraxSupport",
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
    "Exact": "jaxode.divergence:Exact",
    "Hutchinson": "jaxode.divergence:Hutchinson",
    "ClosedForm": "jaxode.divergence:ClosedForm",
    "Auto": "jaxode.divergence:Auto",
    "DivergenceOfFunctions": "jaxode.divergence:_OfFunctions",
    "Regularizer": "jaxode.regularizers:Regularizer",
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
    "Dense": "jaxode.nn.base:Dense",
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
    "Column": "jaxode.tabular.columns.column:Column",
    "Dates": "jaxode.tabular.columns.dates:Dates",
    "Circle": "jaxode.tabular.columns.periodic:Circle",
    "Categories": "jaxode.tabular.categorical:Categories",
    "AverageOfCategories": "jaxode.tabular.categorical:Average",
    "Calibrated": "jaxode.tabular.predictions.level_calibration:Calibrated",
    # series
    "Series": "jaxode.series.series_model:Series",
    "SeriesUnits": "jaxode.series.units:Units",
    "SeriesNetwork": "jaxode.series.series_network:SeriesNetwork",
    "GatedJump": "jaxode.series.series_network:GatedJump",
    "Push": "jaxode.series.series_network:Push",
    # estimates
    "Estimate": "jaxode.estimation.estimate:Estimate",
    "PopulationEstimate": "jaxode.estimation.populations.population:PopulationEstimate",
    "Population": "jaxode.estimation.populations.marginal:Population",
    "Experiment": "jaxode.estimation.observed.observed_system:Experiment",
    "ObservedODE": "jaxode.estimation.observed.observed_system:ObservedODE",
    "ParameterBox": "jaxode.estimation.observed.bounds:Bounds",
    "NormalNoise": "jaxode.estimation.observed.likelihoods:Normal",
    "LogNormalNoise": "jaxode.estimation.observed.likelihoods:LogNormal",
    "LaplaceNoise": "jaxode.estimation.observed.likelihoods:Laplace",
    "PoissonNoise": "jaxode.estimation.observed.likelihoods:Poisson",
    "NegativeBinomialNoise": "jaxode.estimation.observed.likelihoods:NegativeBinomial",
    # trainings
    "Point": "jaxode.training.validations:Point",
}
# Fields that files of 0.6 have by an older name, in classes by their names in files.
RENAMED_FIELDS = {
    "Estimate": {"_box": "_bounds"},
    "ParameterBox": {"low": "lower", "high": "upper"},
}
FUNCTIONS = {
    "kinetic_energy": "jaxode.regularizers:_square",
    "jacobian_frobenius": "jaxode.regularizers:_norm",
    "jaxode.nn.softplus": "jaxode.nn:softplus",
}
# Functions of numbers, such as activations of networks.
FUNCTIONS |= {
    f"{module}.{name}": f"{module}:{name}"
    for module, names in {
        "jax.nn": (
            "celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity leaky_relu "
            "log_sigmoid log_softmax mish relu relu6 selu sigmoid silu soft_sign softmax softplus "
            "sparse_plus sparse_sigmoid squareplus standardize swish tanh"
        ),
        "jax.numpy": (
            "abs arcsinh arctan cbrt cos cosh exp expm1 log log1p maximum mean minimum negative "
            "positive reciprocal sign sin sinc sinh sqrt square sum tanh"
        ),
    }.items()
    for name in names.split()
}
# Libraries whose states and solvers a file may name.
LIBRARIES_OF_STATES = ("optax", "diffrax")


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
    if library not in LIBRARIES_OF_STATES:
        return None
    cls = getattr(importlib.import_module(library), short, None)
    return cls if _is_state_or_solver(cls) else None


def _is_state_or_solver(cls: Any) -> bool:
    """Whether it is a named tuple, as states of Optax are, or a solver of Diffrax."""
    if not isinstance(cls, type):
        return False
    return issubclass(cls, diffrax.AbstractSolver) or (
        issubclass(cls, tuple) and hasattr(cls, "_fields")
    )


def name_of_function(function: Any) -> str | None:
    """The name of a function in files, or None if it is the user's."""
    short = f":{getattr(function, '__name__', '')}"
    for name, place in FUNCTIONS.items():
        if place.endswith(short) and function_of_name(name) is function:
            return name
    return None


def function_of_name(name: str) -> Any:
    """The inverse of `name_of_function`, or None if there is no such function."""
    try:
        return pkgutil.resolve_name(FUNCTIONS[name])
    except (KeyError, AttributeError):
        return None


def fields(cls: type) -> tuple[str, ...]:
    """The names of the fields of a class."""
    if issubclass(cls, tuple):
        named: Any = cls
        return named._fields
    return tuple(field.name for field in dataclasses.fields(cls))


def is_of_numpy(dtype: np.dtype) -> bool:
    """Whether NumPy knows a dtype by its code, unlike bfloat16."""
    try:
        return np.dtype(dtype.str) == dtype
    except TypeError:
        return False


@functools.cache
def _names() -> dict[str, str]:
    """The inverse of `CLASSES`."""
    return {place: name for name, place in CLASSES.items()}
