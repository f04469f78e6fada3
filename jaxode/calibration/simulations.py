"""Draw from the posterior of each simulation, and rank the parameters among the draws."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxode._checks.arguments import check_not_traced, integer
from jaxode._checks.caller import arg
from jaxode._checks.samples import check_data, check_key, check_rows
from jaxode.density.contexts import context_numbers
from jaxode.density.density import Density

# The largest number of values that draws and their contexts may have in memory.
MAX_NUMBERS = 2**23
# P-values and standard errors, which hold for large samples, need this many simulations.
MIN_SIMULATIONS = 50

Rank = Callable[[Density, PRNGKeyArray, Array, PyTree], Any]


@dataclasses.dataclass(frozen=True)
class Simulations:
    """The arguments of a check of a posterior, themselves checked."""

    density: Density
    """Knows the shapes of a context."""
    theta: Float[Array, "simulations *event"]
    x: PyTree
    draws: int
    chunk: int
    """How many simulations at a time: their draws and contexts fit in memory."""

    @classmethod
    def checked(cls, density: Any, theta: Any, x: PyTree, draws: Any) -> "Simulations":
        """Check the arguments of a public function."""
        check_not_traced("runs many programs", density, theta, x)
        if not isinstance(density, Density):
            raise TypeError(
                f"{arg('density')} must be made by jaxode.bind; got {type(density).__name__}. Pass "
                "what jaxode.fit returns."
            )
        event = density.event_shape
        axes = ", ".join(map(str, ("simulations", *event)))
        rule = f"must have shape [{axes}], with at least {MIN_SIMULATIONS}"
        theta = jnp.asarray(check_data("theta", theta, event, MIN_SIMULATIONS, rule))
        x = check_rows("x", context_numbers("x", x), len(theta))
        shapes = tuple(leaf.shape[1:] for leaf in jax.tree.leaves(x))
        density = dataclasses.replace(density, contexts=density.contexts.knowing(shapes))
        numbers = integer("draws", draws) * sum(map(math.prod, (event, *shapes)))
        return cls(density, theta, x, draws, max(MAX_NUMBERS // numbers, 1))

    def levels(
        self, rank: Rank, key: PRNGKeyArray
    ) -> tuple[Int[np.ndarray, "simulations *ranks"], Float[np.ndarray, "simulations *ranks"]]:
        """Rank the parameters of all simulations.

        Args:
            rank: function of the density, a key, and the `theta` and `x` of some simulations.
            key: draws samples.

        Returns:
            The ranks; and as levels, exactly uniform in [0, 1] if the density is right.
        """
        key, level_key = jax.random.split(check_key(key))
        chunks = []
        for first in range(0, len(self.theta), self.chunk):
            rows = slice(first, first + self.chunk)
            x = jax.tree.map(lambda leaf, rows=rows: leaf[rows], self.x)
            chunk_key = jax.random.fold_in(key, first)
            chunks.append(np.asarray(rank(self.density, chunk_key, self.theta[rows], x)))
        ranks = np.concatenate(chunks)
        random = np.random.default_rng(np.asarray(jax.random.key_data(level_key)))
        return ranks, (ranks + random.random(ranks.shape)) / (self.draws + 1)
