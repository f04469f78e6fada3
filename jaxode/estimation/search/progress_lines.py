"""Estimates as text."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxode.estimation.observed.bounds import names

# Significant digits of a number in text.
DIGITS = 5
Column = tuple[str, PyTree]


def as_text(
    title: str, converged: Any, measures: dict[str, Any], tables: Sequence[Sequence[Column]]
) -> str | None:
    """Write how a search ended in one line, and the tables below it, a line for each parameter.

    The columns of a table are pytrees of one structure, under headers such as "estimate" and
    "error". Returns None for values that are not numbers, as under `jax.vmap`.
    """
    try:
        words = [f"{name} {_as_digits(value)}" for name, value in measures.items()]
        ended = f"{title}: {'converged' if converged else 'not converged'}"
        return "\n".join(
            [", ".join([ended, *words]), *(line for t in tables for line in _lines(t))]
        )
    except (TypeError, ValueError):
        return None


def _lines(columns: Sequence[Column]) -> list[str]:
    headers, trees = zip(*columns, strict=True)
    numbers = [[x for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf)] for tree in trees]
    named = zip(names(trees[0]), *numbers, strict=True)
    rows = [["", *headers], *([name, *map(_as_digits, row)] for name, *row in named)]
    first, *widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]

    def aligned(cells):
        return map(str.rjust, cells, widths)

    return ["  ".join(["", name.ljust(first), *aligned(cells)]) for name, *cells in rows]


def _as_digits(value: Any) -> str:
    return f"{float(value):.{DIGITS}g}"
