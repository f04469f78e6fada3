"""What is wrong with the columns of a table, so that they have no density."""

import warnings

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxode.standardize import dependent, listed

# A value is an atom if more than this part of the rows have it, and at least three; a column has
# atoms if more than twice this part of its rows lie on them.
OFTEN = 0.01


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
