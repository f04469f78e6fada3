"""Expected coverage of credible regions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, PyTree

from jaxode._checks.caller import arg, public
from jaxode.calibration.simulations import Rank, Simulations
from jaxode.calibration.uniformity import SIGNIFICANT, p_values
from jaxode.density.density import Density

# The levels of regions by default.
DEFAULT_LEVELS = tuple(np.arange(1, 20) / 20)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coverage:
    """The result of `jaxode.calibration.coverage` and `tarp`. `print` shows a table, and says at
    which levels too few or too many simulations lie inside."""

    levels: Float[np.ndarray, " levels"]
    """The probability of the regions."""
    coverage: Float[np.ndarray, " levels"]
    """The part of the simulations whose parameters lie inside: the level if the posterior is
    right."""
    error: Float[np.ndarray, " levels"]
    """Standard errors of the coverage by the number of simulations, if the posterior is right."""
    p_value: float
    """The probability of a coverage as far from the levels as this, if the posterior is right."""

    def __str__(self) -> str:
        rows = zip(self.levels, self.coverage, self.error, strict=True)
        lines = [
            f"{level:.0%} regions cover {part:.1%} +- {error:.1%}" for level, part, error in rows
        ]
        said = self._verdict() if self.p_value < SIGNIFICANT else "no fault found"
        return "\n".join([*lines, f"p = {self.p_value:.2g}, {said}"])

    __repr__ = __str__

    def _verdict(self) -> str:
        levels, off = self.levels, (self.coverage - self.levels) / self.error
        faults = [
            f"regions of {levels[wrong].min():.0%} to {levels[wrong].max():.0%} cover too {amount} "
            f"(up to {np.abs(off[wrong]).max():.1f} standard errors)"
            for amount, wrong in (("little", off < -3), ("much", off > 3))
            if wrong.any()
        ]
        return " and ".join(faults) or "coverage is uneven between these levels"


@public("calibration.coverage")
def coverage(
    density: Density,
    theta: Float[Any, "simulations *event"],
    x: PyTree,
    *,
    key: PRNGKeyArray,
    draws: int = 100,
    levels: Any = DEFAULT_LEVELS,
) -> Coverage:
    """Count how often regions of highest posterior density contain the parameters.

    A region of level 0.9 should contain 90% of them; one that contains fewer is too small, and the
    posterior too sure. The level of the smallest region around `theta` is the part of draws with a
    higher density, which is exact here.

    Args:
        density, theta, x, key, draws: as for `sbc`.
        levels: of the regions, numbers between 0 and 1.

    Returns:
        A `Coverage`: `levels`, `coverage`, its standard `error`, and the `p_value` of Neyman's
        test, as of `sbc`.

    Raises:
        TypeError, ValueError, SolveError: as `sbc`, and for levels outside of (0, 1).

    References: Hermans et al. (2022), arXiv:2110.06581.
    """

    def rank(density, key, theta, x):
        of_truth = density.log_prob(theta, context=x)
        _, of_draws = density.sample_and_log_prob(key, (draws, len(theta)), context=x)
        return jnp.sum(of_draws > of_truth[None], axis=0)

    return _coverage(Simulations.checked(density, theta, x, draws), rank, key, levels)


@public("calibration.tarp")
def tarp(
    density: Density,
    theta: Float[Any, "simulations *event"],
    x: PyTree,
    *,
    key: PRNGKeyArray,
    draws: int = 100,
    levels: Any = DEFAULT_LEVELS,
) -> Coverage:
    """Count how often balls around random points contain the parameters.

    The ball of a simulation is around a random point of the box of all `theta`, and holds a part of
    the posterior, which is its level. This needs draws alone, and sees all parameters at once.
    Coverage that is not the level means that the posterior is wrong, but does not say how. The
    prior passes.

    Args:
        density, theta, x, key, draws: as for `sbc`.
        levels: as for `coverage`.

    Returns:
        A `Coverage`.

    Raises:
        TypeError, SolveError: as `coverage`.
        ValueError: as `coverage`, and for a parameter that is the same in all simulations.

    References: Lemos et al. (2023), arXiv:2302.03026.
    """
    simulations = Simulations.checked(density, theta, x, draws)
    low = simulations.theta.min(axis=0, keepdims=True)
    width = jnp.ptp(simulations.theta, axis=0, keepdims=True)
    constant = np.argwhere(np.asarray(width[0]) == 0).tolist()
    if constant:
        raise ValueError(
            f"{arg('theta')} must be draws of the prior; got parameters that are constant, at "
            f"{constant} (counting from 0)."
        )

    def distance(at, center):
        squares = ((at - low) / width - center) ** 2
        return squares.reshape(len(at), -1).sum(axis=1)

    def rank(density, key, theta, x):
        center_key, key = jax.random.split(key)
        center = jax.random.uniform(center_key, theta.shape, theta.dtype)
        samples = density.sample(key, (draws, len(theta)), context=x)

        def nearer(sample):
            return distance(sample, center) < distance(theta, center)

        return jnp.sum(jax.vmap(nearer)(samples), axis=0)

    return _coverage(simulations, rank, key, levels)


def _coverage(simulations: Simulations, rank: Rank, key: PRNGKeyArray, levels: Any) -> Coverage:
    """Count the simulations whose own level is at most each of the levels."""
    levels = np.asarray(levels, float)
    if levels.ndim != 1 or not np.all((levels > 0) & (levels < 1)):
        raise ValueError(
            f"{arg('levels')} must be a vector of numbers between 0 and 1; got {levels}."
        )
    _, u = simulations.levels(rank, key)
    covered = np.mean(u[:, None] <= levels[None], axis=0)
    error = np.sqrt(levels * (1 - levels) / len(u))
    return Coverage(levels, covered, error, float(p_values(u[:, None])[0]))
