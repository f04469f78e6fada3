"""The largest likelihood of a population, and the covariance there."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.estimation.marginal import Population, evaluated

TOLERANCE = 0.03  # of the search before Newton's steps, in standard errors
NEWTON_STEPS, CONVERGED = 5, 1e-3  # in standard errors
DIFFERENCE = 0.01  # of the Hessian, in standard errors
TOGETHER = 50  # subjects, at most
FAILED = 1e10  # nats, where a subject cannot be solved


class PopulationLikelihood:
    """The likelihood of a population, part by part: one program serves all parts, subjects that
    take long delay few others, and the first part is a small population that starts the search.

    The effects begin where their derivatives at the last parameters say.
    """

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

    @property
    def effects(self) -> Float[Array, "subjects q"]:
        """The likeliest effects at the last parameters."""
        each = zip(self.last, self.members, strict=True)
        found = np.concatenate([effects[: len(members)] for (_, effects, _), members in each])
        return jnp.asarray(found[np.argsort(np.concatenate(self.members))])

    def at(self, theta: np.ndarray, parts: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Minus the log-likelihood of each subject of the first `parts`, and their gradients."""
        values, scores = [], []
        for i, members in enumerate(self.members[:parts]):
            last, effects, moves = self.last[i]
            begin = effects + jnp.clip(moves @ jnp.asarray(theta - last), -1.0, 1.0)
            found = evaluated(self.parts[i], jnp.asarray(theta), begin)
            if bool(jnp.isfinite(found.values).all()):
                self.last[i] = theta, found.effects, found.moves
            values.append(np.asarray(found.values)[: len(members)])
            scores.append(np.asarray(found.scores)[: len(members)])
        order = np.argsort(np.concatenate(self.members[:parts]))
        return np.concatenate(values)[order], np.concatenate(scores)[order]

    def minimized(self, theta: np.ndarray, steps: int, parts: int | None = None) -> np.ndarray:
        """BFGS, in units of what the scores say of the standard errors."""
        from scipy.optimize import minimize

        _, scores = self.at(theta, parts)
        about = scores.T @ scores
        about += 1e-3 * np.diag(np.maximum(np.diag(about), 1e-6))
        unit = np.linalg.inv(np.linalg.cholesky(about)).T

        def total(x):
            values, scores = self.at(theta + unit @ x, parts)
            value, down = values.sum(), unit.T @ scores.sum(axis=0)
            if np.isfinite(value) and np.isfinite(down).all():
                return float(value), down
            return FAILED, np.zeros_like(x)

        settings = {"gtol": TOLERANCE, "maxiter": steps}
        found = minimize(total, np.zeros(len(theta)), jac=True, method="BFGS", options=settings)
        theta, signs = self.population.with_positive_root(theta + unit @ found.x)
        if bool((signs < 0).any()):
            for i, (last, effects, moves) in enumerate(self.last[:parts]):
                self.last[i] = last, effects * signs[None], 0 * moves
        return theta

    def polished(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Newton's method, with one Hessian by differences of exact gradients: the end, the
        covariance, and whether it has converged."""
        values, scores = self.at(theta)
        value, down = values.sum(), scores.sum(axis=0)
        about = (scores**2).sum(axis=0)  # which is zero where a deviation is
        wide = np.maximum(np.abs(theta), 1.0)
        steps = np.diag(DIFFERENCE / np.maximum(np.sqrt(about), 1 / wide))
        rows = [(self.at(theta + step)[1].sum(axis=0) - down) / step.max() for step in steps]
        hessian = (np.stack(rows) + np.stack(rows).T) / 2
        if not np.isfinite(hessian).all() or np.linalg.eigvalsh(hessian).min() <= 0:
            return theta, np.full_like(hessian, np.nan), False
        covariance = np.linalg.inv(hessian)
        for _ in range(NEWTON_STEPS):
            better = theta - covariance @ down
            values, scores = self.at(better)
            if not values.sum() <= value:
                break
            theta, value, down = better, values.sum(), scores.sum(axis=0)
            if down @ covariance @ down < CONVERGED**2:
                break
        return theta, covariance, bool(down @ covariance @ down < CONVERGED**2)
