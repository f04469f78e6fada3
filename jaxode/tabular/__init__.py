"""Densities of tables with categories, integers and missing values, and predictions."""

from jaxode.tabular.fit_table import fit
from jaxode.tabular.table import Table

__all__ = ["Table", "fit"]
