"""Divergences of a vector field, for `jaxode.cnf(divergence=...)`."""

from jaxode.flows.divergence import (
    EXACT_UP_TO,
    Divergence,
    FieldAt,
    auto,
    closed_form,
    exact,
    hutchinson,
    noiseless,
)

__all__ = [
    "EXACT_UP_TO",
    "Divergence",
    "FieldAt",
    "auto",
    "closed_form",
    "exact",
    "hutchinson",
    "noiseless",
]
