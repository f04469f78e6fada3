"""The absolute tolerance, of all numbers of a state or of each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode._checks.arguments import check_real
from jaxode._checks.caller import arg
from jaxode._checks.rules import is_known, rules_of


def check_atol(tree: PyTree) -> None:
    """Raise unless the leaves are real arrays that are not known to break a rule."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise TypeError(f"{arg('atol')} must be a real number; got {tree!r}.")
    for leaf in leaves:
        if not isinstance(leaf, float):
            check_real("atol", leaf)
        for rule in rules_of("atol"):
            rule.check(leaf, name="atol")


def for_each_number(tree: PyTree, row: PyTree, dtype: jnp.dtype) -> Any:
    """A value for each number of a row of the state, `[1, n]`, from a pytree like the row.

    Its arrays broadcast to those of the row; one leaf may stand for several.
    """
    xp = np if is_known(tree) else jnp

    def spread(value, leaves):
        like = jax.tree.leaves(leaves)
        return [xp.broadcast_to(xp.asarray(value), leaf.shape).reshape(-1) for leaf in like]

    try:
        if jax.tree_util.all_leaves([row]) and isinstance(tree, list):
            tree = xp.asarray(tree)
        leaves = jax.tree.leaves(jax.tree.map(spread, tree, row))
    except ValueError as error:
        got, expected = (jax.tree.map(np.shape, tree) for tree in (tree, row))
        raise ValueError(
            f"{arg('atol')} must be a number, or like the state of one row; got shapes {got} where "
            f"it has {expected}. All rows share it."
        ) from error
    return xp.concatenate([xp.asarray(leaf, dtype) for leaf in leaves])[None]
