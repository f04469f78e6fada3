"""The rows that `fit` trains on: checked, set aside, dequantized, and warned of."""

import math
import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxode.flows.density import Density
from jaxode.flows.standardize import check_inside, floating, numbers
from jaxode.flows.validation import check_context, check_finite
from jaxode.ode.validation import real_scalar, shape_of
from jaxode.standardize import dependent, listed

Rows = tuple[Any, PyTree]  # data `[rows, *event]`; the context of each row, or None

LOOK_AT, LEAST_ROWS = 1000, 10  # validation rows to set aside, at most; rows that there must be

# A value is an atom if more than this part of the rows have it, and at least three; a column has
# atoms if more than twice this part of its rows lie on them.
OFTEN = 0.01


def to_flow(density: Density, rows: Rows) -> Rows:
    z = density.to_flow(*rows)
    return (z, None) if rows[1] is None else z


def set_aside(
    density: Density,
    x: Any,
    context: PyTree,
    validation: Any,
    dequantize: bool,
    key: PRNGKeyArray,
) -> tuple[Rows, Rows]:
    """Rows to train on, and validation rows, at most `LOOK_AT` of them if they are drawn here."""
    rows = _checked("x", density, x, context, dequantize)
    if not isinstance(validation, int | float | np.number):
        of_x, of_context = validation if isinstance(validation, tuple) else (validation, None)
        return rows, _checked("validation", density, of_x, of_context, dequantize)
    real_scalar("fit", "validation", validation, "between 0 and 1", lambda v: 0 < v < 1, "part")
    count = min(math.ceil(validation * len(rows[0])), LOOK_AT, len(rows[0]) - 2)
    order = np.asarray(jax.random.permutation(key, len(rows[0])))
    part = lambda chosen: jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], rows)
    return part(order[count:]), part(order[:count])


def _checked(name: str, density: Density, x: Any, context: PyTree, dequantize: bool) -> Rows:
    x, event = floating(numbers(f"fit({name}=...):", x)), density.event_shape
    if x.ndim != len(event) + 1 or x.shape[1:] != event or len(x) < LEAST_ROWS:
        raise ValueError(
            f"fit({name}=...): must have shape {shape_of('rows', event)}, with at least "
            f"{LEAST_ROWS} rows; got {x.shape}."
        )
    context = check_context("fit", context, len(x))
    check_finite("fit", {name: x, "context": context})
    x = np.asarray(x)
    if density.support is not None:
        middle = x + (0.5 * (is_integer(x) & dequantize))[None].astype(x.dtype)
        check_inside("fit", jax.vmap(density.support.contains)(middle), middle)
    return x, context


def is_integer(columns: Float[np.ndarray, "rows columns"]) -> np.ndarray:
    """Which columns hold integers alone."""
    return (columns == np.round(columns)).all(axis=0)


def dequantized(
    key: PRNGKeyArray, x: Float[Array, "rows *event"], integers: Float[np.ndarray, " *event"]
) -> Float[Array, "rows *event"]:
    """`x` with uniform noise in [0, 1) on the columns of integers."""
    return x + jax.random.uniform(key, x.shape, x.dtype) * integers[None].astype(x.dtype)


def warn_of_columns(
    where: str, table: Float[np.ndarray, "rows columns"], columns: Int[np.ndarray, " some"]
) -> None:
    """Warn of columns with atoms, and of columns that depend on each other linearly."""
    atoms = [i for i in columns if _on_atoms(table[:, i]) > 2 * OFTEN]
    if atoms:
        warnings.warn(
            f"{where}(x=...): columns {listed(atoms)} repeat values, as integers, classes and "
            "rounded numbers do. They have no density: a flow narrows onto the values, and its "
            "likelihood has no bound. Pass dequantize=True for integers, add noise of the rounding "
            "to other numbers, or take classes as context.",
            stacklevel=3,
        )
    varying = columns[table.std(axis=0)[columns] > 0]
    part = table[:, varying]
    scaled = (part - part.mean(axis=0)) / part.std(axis=0)
    involved = varying[dependent(*np.linalg.eigh(scaled.T @ scaled / len(scaled)))]
    # Of few rows, any columns are linear combinations.
    if len(involved) and len(table) > len(varying):
        warnings.warn(
            f"{where}(x=...): columns {listed(involved)} depend on each other linearly. Together "
            "they have no density: a flow narrows onto the plane that they lie in. Leave one out.",
            stacklevel=3,
        )


def _on_atoms(column: Float[np.ndarray, " rows"]) -> float:
    """The part of the rows whose value is an atom."""
    _, counts = np.unique(column, return_counts=True)
    return float(counts[counts > max(2, OFTEN * len(column))].sum() / len(column))
