"""The likelihood of a population, by Laplace's method over the effects, and its maximum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from jaxode._checks.arguments import takes
from jaxode._jax.closure import compiled
from jaxode.estimation.likelihoods import LOG_ROOT_2_PI
from jaxode.ode.adjoints import ForwardMode
from jaxode.ode.field import call_field
from jaxode.ode.pieces import Jumps
from jaxode.ode.solve import solve

EFFECT_STEPS, EFFECT_TOLERANCE = 50, 1e-6  # in standard deviations of the population
ROUNDING = 1e-9  # of a likelihood, by which a step may make it worse
DAMPING = 0.01  # at first
TOLERANCE = 1e-3  # of the search, in standard errors; its last step is Newton's
DIFFERENCE = 1e-2  # of the Hessian, in standard errors
FAILED = 1e10  # nats, where a subject cannot be solved
LONGER, SHORTER = 0.2, 5.0  # factors of the damping


class Subject(NamedTuple):
    """What one subject has for itself."""

    ts: Float[Array, " times"]
    ys: Float[Array, "times ..."]
    """NaN where an observation is missing."""
    y0: PyTree
    """The state at `t0`, or None if it is a function."""
    row: PyTree
    """Of `row_args`, or None."""
    doses: Float[Array, " jumps"] | None


class Population(eqx.Module):
    """Subjects with parameters `params + root @ z` in those that vary, and `z` standard normal."""

    f: Callable[..., PyTree]
    y0: Any
    t0: Float[Array, ""]
    observe: Any
    noise: Callable[[Array, PyTree], Array] | None
    change: Any
    """Of the state, at doses."""
    places: Int[Array, " q"]
    """Of the parameters that vary, in the vector of all."""
    correlated: bool
    template: PyTree
    subjects: Subject
    options: dict[str, Any]

    @property
    def shared(self) -> int:
        """The number of parameters of the population, without the noise."""
        return len(ravel_pytree(self.template)[0])

    def unravel(self, flat: Float[Array, " n"]) -> PyTree:
        """The parameters of a subject."""
        return ravel_pytree(self.template)[1](flat)

    def split(self, theta: Float[Array, " p"]) -> tuple[Array, Array, Array]:
        """The typical parameters, the root of the covariance, and the logarithm of the noise, which
        is empty if `noise` is a function."""
        q, n = len(self.places), self.shared
        count = q * (q + 1) // 2 if self.correlated else q
        flat, root, log_noise = jnp.split(theta, [n, n + count])
        if not self.correlated:
            return flat, jnp.diag(root), log_noise
        return flat, jnp.zeros((q, q), theta.dtype).at[jnp.tril_indices(q)].set(root), log_noise

    def with_positive_root(self, theta: np.ndarray) -> tuple[np.ndarray, Float[Array, " q"]]:
        """Let the diagonal of the root be positive, which changes the signs of effects: those are
        returned, too."""
        flat, root, log_noise = self.split(jnp.asarray(theta))
        signs = jnp.where(jnp.diag(root) < 0, -1.0, 1.0)
        root = root * signs[None, :]
        root = root[jnp.tril_indices(len(root))] if self.correlated else jnp.diag(root)
        return np.asarray(jnp.concatenate([flat, root, log_noise])), signs

    def params_of(self, theta: Float[Array, " p"], z: Float[Array, " q"]) -> Float[Array, " n"]:
        """The parameters of a subject with effects `z`, as a vector."""
        flat, root, _ = self.split(theta)
        return flat.at[self.places].add(root @ z)

    def moments(self, theta: Array, z: Array, subject: Subject) -> Float[Array, "2 times ..."]:
        """The mean of a subject's observations, and the logarithm of their standard deviation."""
        params, row = self.unravel(self.params_of(theta, z)), subject.row
        given = params if row is None else (params, row)
        by_row = row is not None and callable(self.y0) and takes(self.y0, "params", "row")
        start = subject.y0
        if callable(self.y0):
            start = self.y0(params, row) if by_row else self.y0(params)
        jumps = None if subject.doses is None else Jumps(subject.doses, self.change)
        found = solve(
            self.f, start, self.t0, subject.ts[-1], given, ts=subject.ts, jumps=jumps,
            adjoint=ForwardMode(), throw=False, **self.options,
        ).ys  # fmt: skip
        if self.observe is not None:
            see = lambda t, y: call_field(self.observe, t, y, given, "observe", "what is observed")
            found = jax.vmap(see)(subject.ts, found)
        if self.noise is None:
            log_noise = self.split(theta)[2][0]
        else:
            log_noise = jnp.log(self.noise(found, params))
        return jnp.stack([found, jnp.broadcast_to(log_noise, found.shape)])

    def nll(self, theta: Array, z: Array, subject: Subject) -> tuple[Array, Array, Array]:
        """Minus the logarithm of the density of a subject's observations and effects, its gradient
        by the effects, and its expected Hessian."""

        def twice(z):
            found = self.moments(theta, z, subject)
            return found, found

        slopes, (mean, log_noise) = jax.jacfwd(twice, has_aux=True)(z)
        slopes = slopes.reshape(2, -1, len(z))
        seen = ~jnp.isnan(subject.ys)
        apart = jnp.where(seen, (subject.ys - mean) / jnp.exp(log_noise), 0.0)
        each = 0.5 * apart**2 + log_noise + LOG_ROOT_2_PI
        value = jnp.sum(jnp.where(seen, each, 0.0)) + 0.5 * jnp.sum(z**2)
        down = jnp.where(seen, jnp.stack([-apart / jnp.exp(log_noise), 1 - apart**2]), 0.0)
        gradient = jnp.einsum("cm,cmq->q", down.reshape(2, -1), slopes) + z
        about = jnp.stack([jnp.exp(-2 * log_noise), jnp.full_like(mean, 2.0)])
        about = jnp.where(seen, about, 0.0).reshape(2, -1)
        hessian = jnp.einsum("cm,cmq,cmr->qr", about, slopes, slopes) + jnp.eye(len(z))
        return value, gradient, hessian

    def effects(self, theta: Array, begin: Array, subject: Subject) -> Float[Array, " q"]:
        """The likeliest effects of a subject, by damped Fisher scoring."""

        def step(state):
            z, value, gradient, hessian, damping, count, _ = state
            damped = hessian + damping * jnp.diag(jnp.diag(hessian))
            move = -jnp.linalg.solve(damped, gradient)
            trial = z + move
            found = self.nll(theta, trial, subject)
            good = found[0] <= value + ROUNDING * (1 + jnp.abs(value))
            kept = [jnp.where(good, *pair) for pair in zip((trial, *found), state[:4], strict=True)]
            done = jnp.max(jnp.abs(move)) < EFFECT_TOLERANCE
            damping = damping * jnp.where(good, LONGER, SHORTER)
            return *kept, damping, count + 1, done

        more = lambda state: ~state[-1] & (state[-2] < EFFECT_STEPS)
        first = self.nll(theta, begin, subject)
        state = begin, *first, jnp.asarray(DAMPING, begin.dtype), jnp.asarray(0), jnp.asarray(False)
        return jax.lax.while_loop(more, step, state)[0]

    def marginal(self, theta: Array, z: Array, subject: Subject) -> tuple[Array, Array]:
        """Minus the log-likelihood of a subject by Laplace's method about its likeliest effects
        `z`, with the expected Hessian (FOCE with interaction); and the exact gradient by `theta`.
        """
        count = len(theta)

        def both(together):
            value, down, hessian = self.nll(together[:count], together[count:], subject)
            found = value + 0.5 * jnp.linalg.slogdet(hessian)[1]
            return (found, down), found

        (by, of_down), value = jax.jacfwd(both, has_aux=True)(jnp.concatenate([theta, z]))
        # The likeliest effects change with theta so that their gradient stays zero.
        moves = -jnp.linalg.solve(of_down[:, count:], of_down[:, :count])
        return value, by[:count] + by[count:] @ moves


@compiled
def evaluated(
    population: Population, theta: Float[Array, " p"], begin: Float[Array, "subjects q"]
) -> tuple[Array, Array, Array]:
    """Minus the log-likelihoods of the subjects, `[subjects]`, their gradients, and effects."""

    def one(begin, subject):
        z = population.effects(theta, begin, subject)
        return *population.marginal(theta, z, subject), z

    return jax.vmap(one)(begin, population.subjects)


class Search:
    """The likelihood of a population as SciPy takes it. The effects begin where they ended."""

    def __init__(self, population: Population):
        count = len(population.subjects.ts)
        self.population = population
        self.effects = jnp.zeros((count, len(population.places)), population.t0.dtype)

    def at(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Minus the log-likelihood of each subject, and their gradients."""
        values, scores, effects = evaluated(self.population, jnp.asarray(theta), self.effects)
        if bool(jnp.isfinite(values).all()):
            self.effects = effects
        return np.asarray(values), np.asarray(scores)

    def minimized(self, theta: np.ndarray, scores: np.ndarray, steps: int):
        """BFGS, in units of what the scores say of the standard errors."""
        from scipy.optimize import minimize

        about = scores.T @ scores
        about += 1e-3 * np.diag(np.maximum(np.diag(about), 1e-6))
        unit = np.linalg.inv(np.linalg.cholesky(about)).T

        def total(x):
            values, scores = self.at(theta + unit @ x)
            value, down = values.sum(), unit.T @ scores.sum(axis=0)
            if np.isfinite(value) and np.isfinite(down).all():
                return float(value), down
            return FAILED, np.zeros_like(x)

        settings = {"gtol": TOLERANCE, "maxiter": steps}
        found = minimize(total, np.zeros(len(theta)), jac=True, method="BFGS", options=settings)
        theta, signs = self.population.with_positive_root(theta + unit @ found.x)
        self.effects = self.effects * signs[None, :]
        return theta, bool(np.abs(found.jac).max() < 100 * TOLERANCE)

    def polished(self, theta: np.ndarray, converged: bool) -> tuple[np.ndarray, np.ndarray, bool]:
        """A step of Newton's method, and the covariance: by differences of exact gradients."""
        values, scores = self.at(theta)
        about = (scores**2).sum(axis=0)  # which is zero where a deviation is
        wide = np.maximum(np.abs(theta), 1.0)
        steps = DIFFERENCE / np.maximum(np.sqrt(about), 1 / wide)
        down = lambda step: self.at(theta + step)[1].sum(axis=0)
        rows = [(down(step) - down(-step)) / (2 * step.max()) for step in np.diag(steps)]
        hessian = np.stack(rows)
        curves, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        if not np.isfinite(hessian).all() or curves.min() <= 0:
            return theta, np.full_like(hessian, np.nan), False
        covariance = (vectors / curves) @ vectors.T
        better = theta - covariance @ scores.sum(axis=0)
        if self.at(better)[0].sum() <= values.sum():
            theta = better
        self.at(theta)
        return theta, covariance, converged
