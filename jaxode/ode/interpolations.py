"""Interpolations of diffrax among the arguments of a field."""

from typing import Any

import diffrax
import jax
import numpy as np
from jaxtyping import PyTree

from jaxode._checks.caller import arg
from jaxode._checks.rules import in_rows, is_known


def check_knots(name: str, tree: PyTree, span: tuple[Any, Any]) -> None:
    """Raise for an interpolation that is known not to cover the span: it would extrapolate."""
    if tree is None:
        return
    for path in filter(_is_path, jax.tree.leaves(tree, is_leaf=_is_path)):
        knots = getattr(path, "ts", None)
        if knots is None or not is_known((knots, span)):
            continue
        first_knot, last_knot = np.asarray(knots)[..., 0], np.asarray(knots)[..., -1]
        low, high = np.minimum(*span), np.maximum(*span)
        margin = 1e-5 * (last_knot - first_knot)
        wrong = (low < first_knot - margin) | (high > last_knot + margin)
        if wrong.any():
            of_rows = f", in {in_rows(wrong)}" if wrong.ndim else ""
            raise ValueError(
                f"{arg(name)} an interpolation must cover the span of the solve, from "
                f"{low.min():g} to {high.max():g}; got knots from {first_knot.max():g} to "
                f"{last_knot.min():g}{of_rows}. Beyond them it would extrapolate: add knots, or "
                "repeat its last value at a later time."
            )


def _is_path(leaf: Any) -> bool:
    return isinstance(leaf, diffrax.AbstractPath)
