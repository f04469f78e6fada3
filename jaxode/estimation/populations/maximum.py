"""The largest likelihood of a population, and the covariance there."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.estimation.populations.marginal import (
    DAMPING,
    LONGER,
    SHORTER,
    Population,
    evaluated,
    secant,
)

TOLERANCE, SHORTEST = 0.03, 1e-4  # of the search before Newton's steps, in standard errors
NEWTON_STEPS, CONVERGED = 5, 1e-3  # in standard errors
DIFFERENCE = 0.01  # of the Hessian, in standard errors
TOGETHER = 50  # subjects, at most
LEAST_DAMPING = 1e-6  # so that some steps that fail suffice to raise it
GOOD, POOR = 0.75, 0.25  # of the gain that a step promised
FLAT = 1e-6  # curvature by a parameter in its unit
WIDEST = 100.0  # of units, in standard errors where the others are known
DEVIATIONS = 5.0  # of a parameter that varies, as first guessed, are its unit
PART = 0.1  # of a variance that is known, from which on what is hidden spoils it
LEAST = 1e-6  # information of a parameter, in its unit, that the search takes for its scale


class Total(NamedTuple):
    """Of some of the subjects."""

    values: np.ndarray
    """Minus the log-likelihood of each."""
    scores: np.ndarray
    """The gradient of their sum."""
    information: np.ndarray
    """The expected Hessian of their sum, about."""

    @property
    def usable(self) -> bool:
        """Whether a search can go on from here."""
        return bool(np.isfinite(self.scores).all() and np.isfinite(self.information).all())

    @property
    def value(self) -> float:
        return float(self.values.sum())

    def decrement(self, units: np.ndarray) -> float:
        """How far the best parameters are, in standard errors."""
        return float(np.sqrt(self.scores @ np.linalg.solve(self.damped(1e-9, units), self.scores)))

    def damped(self, damping: float, units: np.ndarray) -> np.ndarray:
        scale = np.maximum(np.diag(self.information), LEAST / units**2)
        return self.information + damping * np.diag(scale)


class Maximum(NamedTuple):
    """Where the search of a population ends."""

    theta: np.ndarray
    nll: float
    covariance: np.ndarray
    """NaN for what is free."""
    converged: bool
    free: np.ndarray
    """Which parameters the observations do not determine."""


class PopulationLikelihood:
    """The likelihood of a population, part by part: one program serves all parts, subjects that
    take long delay few others, and the first part is a small population that starts the search.

    The effects begin where their derivatives at the last parameters say.
    """

    least_units: Any = 1.0
    """The unit of each parameter where it is near zero. Elsewhere it is its size."""
    sized: Any = True
    """Whether the size of a parameter says its unit, as that of the logarithm of the noise does
    not."""

    def __init__(self, population: Population, theta: np.ndarray):
        count, q = len(population.subjects.ts), len(population.places)
        parts = -(-count // TOGETHER)
        size = -(-count // parts)
        self.population = population
        self.members = [np.arange(part, count, parts) for part in range(parts)]
        self.parts = []
        for members in self.members:
            padded = np.resize(members, size)
            own = jax.tree.map(lambda x, rows=padded: x[rows], population.subjects)
            self.parts.append(eqx.tree_at(lambda p: p.subjects, population, own))
        dtype = population.t0.dtype
        none = jnp.zeros((size, q), dtype), jnp.zeros((size, q, len(theta)), dtype)
        self.last = [(theta, *none)] * parts  # where the effects and their derivatives were found

    def units(self, theta: np.ndarray) -> np.ndarray:
        """The unit of each parameter."""
        return np.maximum(np.where(self.sized, np.abs(theta), 0.0), self.least_units)

    def take_units(self, theta: np.ndarray, information: np.ndarray) -> None:
        """Let the first guess and the information there say the units: a number that varies has
        that of its deviation. Others are like logarithms, of which a unit is one, if that is less
        than they are known to; but an observed zero says no unit."""
        known = np.diag(information)
        n, q = self.population.shared, len(self.population.places)
        errors = WIDEST / np.sqrt(np.where(known > 0, known, np.inf))
        units = np.where(theta == 0, errors, np.minimum(errors, 1.0))
        spread = DEVIATIONS * np.asarray(self.population.split(jnp.asarray(theta))[1]).diagonal()
        rows = np.tril_indices(q)[0] if self.population.correlated else np.arange(q)
        units[np.asarray(self.population.places)] = spread
        units[n : n + len(rows)] = spread[rows]
        self.sized = np.arange(len(theta)) < n + len(rows)
        units[~self.sized] = 1.0
        self.least_units = np.where((units > 0) & np.isfinite(units), units, 1.0)

    @property
    def effects(self) -> Float[Array, "subjects q"]:
        """The likeliest effects at the last parameters."""
        each = zip(self.last, self.members, strict=True)
        found = np.concatenate([effects[: len(members)] for (_, effects, _), members in each])
        return jnp.asarray(found[np.argsort(np.concatenate(self.members))])

    def at(self, theta: np.ndarray, parts: int | None = None) -> Total:
        """The likelihood of the subjects of the first `parts`."""
        values, scores, information = [], 0.0, 0.0
        for i, members in enumerate(self.members[:parts]):
            last, effects, moves = self.last[i]
            begin = effects + jnp.clip(moves @ jnp.asarray(theta - last), -1.0, 1.0)
            found = evaluated(self.parts[i], jnp.asarray(theta), begin)
            if all(bool(jnp.isfinite(leaf).all()) for leaf in found):
                self.last[i] = theta, found.effects, found.moves
            values.append(np.asarray(found.values)[: len(members)])
            scores += np.asarray(found.scores)[: len(members)].sum(axis=0)
            information += np.asarray(found.information)[: len(members)].sum(axis=0)
        order = np.argsort(np.concatenate(self.members[:parts]))
        return Total(np.concatenate(values)[order], np.asarray(scores), np.asarray(information))

    def minimized(self, theta: np.ndarray, steps: int, parts: int | None = None) -> np.ndarray:
        """Damped Fisher scoring, corrected by the gradients as the search of effects is. The
        damping follows how much of the gain that a step promised was there. A step changes no
        parameter by more than its unit, and after one that fails, by less."""
        best, more, damping = self.at(theta, parts), np.zeros(2 * theta.shape), DAMPING
        longest = 1.0
        for _ in range(steps):
            units = self.units(theta)
            if not best.decrement(units) > TOLERANCE:
                break
            curved, expected = best.information + more, best.damped(damping, units)
            move = -np.linalg.solve(expected + more, best.scores)
            if not best.scores @ move < 0:
                curved = best.information
                move = -np.linalg.solve(expected, best.scores)
            length = np.max(np.abs(move) / units)
            move, length = move * min(1.0, longest / length), min(length, longest)
            kept, found = list(self.last), self.at(theta + move, parts)
            if found.usable and found.value <= best.value:
                promised = -(best.scores @ move + 0.5 * move @ curved @ move)
                gain = (best.value - found.value) / promised
                change = found.scores - best.scores
                known = (jnp.asarray(x) for x in (found.information + more, move, change))
                more = np.asarray(secant(*known)) - found.information
                theta, best = theta + move, found
                if gain > GOOD:
                    damping = max(damping * LONGER, LEAST_DAMPING)
                elif gain < POOR:
                    damping *= SHORTER
                longest = min(2 * longest, 1.0)
                continue
            self.last = kept
            if move @ best.information @ move < SHORTEST**2:
                break
            damping, longest = damping * SHORTER, length / SHORTER
        theta, signs = self.population.with_positive_root(theta)
        if bool((signs < 0).any()):
            for i, (last, effects, moves) in enumerate(self.last[:parts]):
                self.last[i] = last, effects * signs[None], 0 * moves
        return theta

    def polished(self, theta: np.ndarray) -> Maximum:
        """Newton's method with one Hessian, or with another where that of the start is too far."""
        found = self.by_newton(theta)
        if found.converged or np.isnan(found.covariance).any():
            return found
        return self.by_newton(found.theta)

    def by_newton(self, theta: np.ndarray) -> Maximum:
        """Newton's method, with one Hessian by differences of exact gradients."""
        best = self.at(theta)
        units = self.units(theta)
        about = np.diag(best.information)  # which is zero for what has no effect
        steps = np.diag(DIFFERENCE / np.maximum(np.sqrt(about), 1 / units))
        kept, rows = list(self.last), []
        for step in steps:
            rows.append((self.at(theta + step).scores - best.scores) / step.max())
            self.last = list(kept)
        hessian = (np.stack(rows) + np.stack(rows).T) / 2
        unknown, none = np.full_like(hessian, np.nan), np.zeros(len(theta), bool)
        if not np.isfinite(hessian).all():
            return Maximum(theta, best.value, unknown, False, none)
        # Units that leave curvatures alike: eigenvalues are known to rounding of the largest.
        known = np.maximum(np.diag(hessian), LEAST / units**2)
        wide = np.minimum(units, WIDEST / np.sqrt(known))
        curvatures, along = np.linalg.eigh(hessian * np.outer(wide, wide))
        rounding = 100 * np.finfo(best.scores.dtype).eps * curvatures.max()
        least = max(FLAT, rounding)
        if curvatures.min() < -least:
            return Maximum(theta, best.value, unknown, False, none)
        flat = curvatures < least
        # A flat direction hides a variance of at least `1 / least`. A parameter is free if that
        # exceeds a part of its known variance.
        hidden = (along[:, flat] ** 2).sum(axis=1) / least
        free = hidden > PART * (along[:, ~flat] ** 2 / curvatures[~flat]).sum(axis=1)
        along = along[:, ~flat] * wide[:, None]
        covariance = along / curvatures[~flat] @ along.T
        for _ in range(NEWTON_STEPS):
            better = theta - covariance @ best.scores
            kept, found = list(self.last), self.at(better)
            # Values are known to about 1e-5, by the last step of effects; gradients say the rest.
            if not found.value <= best.value + TOLERANCE**2:
                self.last = kept
                break
            theta, best = better, found
            if best.scores @ covariance @ best.scores < CONVERGED**2:
                break
        converged = best.scores @ covariance @ best.scores < CONVERGED**2
        covariance[free] = covariance[:, free] = np.nan
        return Maximum(theta, best.value, covariance, bool(converged), free)
