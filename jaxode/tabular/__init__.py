"""Densities of tables with categories, integers and missing values, and predictions."""

from jaxode.tabular.table import Table
from jaxode.tabular.training import fit

__all__ = ["Table", "fit"]
