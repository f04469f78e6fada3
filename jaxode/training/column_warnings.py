"""Warnings of columns that have no density."""

import warnings

import numpy as np
from jaxtyping import Float, Int

from jaxode.density.maps.whiten import (
    MOST_WHITENED_COLUMNS,
    column_list,
    dependent_columns,
    principal_axes,
)

# A value is an atom if more than this part of the rows have it, and at least three; a column has
# atoms if more than twice this part of its rows lie on them.
ATOM_PART = 0.01
MAX_ROWS_SEEN = 20_000  # a sample that shows atoms and dependences


def warn_of_columns(
    table: Float[np.ndarray, "rows columns"],
    columns: Int[np.ndarray, " some"],
    independent: bool = True,
) -> None:
    """Warn of columns with atoms and, if they should be `independent`, of columns that depend on
    each other linearly."""
    if len(table) > MAX_ROWS_SEEN:  # to sort all would take longer than the training
        table = table[np.random.default_rng(0).choice(len(table), MAX_ROWS_SEEN, replace=False)]
    table = table[:, columns].astype(np.float64)  # float32 would round a dependence away
    atoms = [i for i, x in zip(columns, table.T, strict=True) if _on_atoms(x) > 2 * ATOM_PART]
    if atoms:
        warnings.warn(
            f"fit(x=...): columns {column_list(atoms)} repeat values, as integers, classes and "
            "rounded numbers do. They have no density: a flow narrows onto the values, and its "
            "likelihood has no bound. Pass dequantize=True for integers, add noise of the rounding "
            "to other numbers, or take classes as context. Numbers such as time stamps repeat if "
            "they are too large for the dtype: subtract an offset first.",
            stacklevel=5,
        )
    varying = table.std(axis=0) > 0
    if not independent or varying.sum() > MOST_WHITENED_COLUMNS:  # of more, it would take minutes
        return
    involved = columns[varying][dependent_columns(*principal_axes(table[:, varying]))]
    # Of few rows, any columns are linear combinations.
    if len(involved) and len(table) > varying.sum():
        warnings.warn(
            f"fit(x=...): columns {column_list(involved)} depend on each other linearly. "
            "Together they have no density: a flow narrows onto the plane that they lie in. Leave "
            "one out.",
            stacklevel=5,
        )


def _on_atoms(column: Float[np.ndarray, " rows"]) -> float:
    """The part of the rows whose value is an atom."""
    _, counts = np.unique(column, return_counts=True)
    return float(counts[counts > max(2, ATOM_PART * len(column))].sum() / len(column))
