"""The likelihood of a population, by Laplace's method over the effects."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from jaxode._jax.closure import compiled
from jaxode.estimation.observed.likelihoods import LOG_ROOT_2_PI
from jaxode.estimation.observed.observed_system import needs_row
from jaxode.ode.adjoints import ForwardMode
from jaxode.ode.field import call_field
from jaxode.ode.pieces import Jumps
from jaxode.ode.solve import solve

EFFECT_STEPS, EFFECT_TOLERANCE = 50, 1e-5  # in standard deviations of the population
LONGEST, LAST = 3.0, 1e-3  # standard deviations, of a step and of the last one
ROUNDING = 1e-9  # of a likelihood, by which a step may make it worse
DAMPING = 0.01  # at first
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


class NLL(NamedTuple):
    """Minus the logarithm of the density of a subject's observations and effects."""

    value: Float[Array, ""]
    gradient: Float[Array, " q"]
    """By the effects."""
    hessian: Float[Array, "q q"]
    """Expected."""


Moments = Callable[[Float[Array, " n"]], Float[Array, "2 times ..."]]


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
    args: PyTree
    """That all functions get beside the parameters, or None."""
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

    def given(self, flat: Float[Array, " n"]) -> PyTree:
        """What all functions get: the parameters, with `args` if there are any."""
        params = self.unravel(flat)
        return params if self.args is None else (params, self.args)

    def start(self, flat: Float[Array, " n"], subject: Subject) -> PyTree:
        """A subject's state at `t0`."""
        if not callable(self.y0):
            return subject.y0
        params, row = self.given(flat), subject.row
        return self.y0(params, row) if row is not None and needs_row(self.y0) else self.y0(params)

    def states(self, flat: Float[Array, " n"], subject: Subject) -> PyTree:
        """A subject's states at the times of its observations."""
        params, row = self.given(flat), subject.row
        jumps = None if subject.doses is None else Jumps(subject.doses, self.change)
        return solve(
            self.f, self.start(flat, subject), self.t0, subject.ts[-1],
            params if row is None else (params, row), ts=subject.ts, jumps=jumps,
            adjoint=ForwardMode(), throw=False, **self.options,
        ).ys  # fmt: skip

    def predicted(self, flat: Float[Array, " n"], subject: Subject) -> Float[Array, "times ..."]:
        """The mean of a subject's observations by its parameters."""
        params, row = self.given(flat), subject.row
        given = params if row is None else (params, row)
        found = self.states(flat, subject)
        if self.observe is None:
            return found

        def see(t, y):
            return call_field(self.observe, t, y, given, "observe", "what is observed")

        return jax.vmap(see)(subject.ts, found)

    def moments(self, flat: Float[Array, " n"], subject: Subject) -> Float[Array, "2 times ..."]:
        """The mean of a subject's observations by its parameters, and the logarithm of their
        standard deviation, or zero if one number is the noise of all."""
        found, log_noise = self.predicted(flat, subject), jnp.zeros(())
        if self.noise is not None:
            # Where an observation is missing, it may be zero.
            missing = jnp.isnan(subject.ys)
            log_noise = jnp.log(jnp.where(missing, 1.0, self.noise(found, self.given(flat))))
        return jnp.stack([found, jnp.broadcast_to(log_noise, found.shape)])

    def nll(self, moments: Moments, theta: Array, z: Array, ys: Array) -> NLL:
        """By the moments of the subject, a function of its parameters."""

        def twice(z):
            found = moments(self.params_of(theta, z))
            return found, found

        slopes, (mean, log_noise) = jax.jacfwd(twice, has_aux=True)(z)
        if self.noise is None:
            log_noise += self.split(theta)[2][0]
        slopes = slopes.reshape(2, -1, len(z))
        seen = ~jnp.isnan(ys)
        apart = jnp.where(seen, (ys - mean) / jnp.exp(log_noise), 0.0)
        each = 0.5 * apart**2 + log_noise + LOG_ROOT_2_PI
        value = jnp.sum(jnp.where(seen, each, 0.0)) + 0.5 * jnp.sum(z**2)
        down = jnp.where(seen, jnp.stack([-apart / jnp.exp(log_noise), 1 - apart**2]), 0.0)
        gradient = jnp.einsum("cm,cmq->q", down.reshape(2, -1), slopes) + z
        about = jnp.stack([jnp.exp(-2 * log_noise), jnp.full_like(mean, 2.0)])
        about = jnp.where(seen, about, 0.0).reshape(2, -1)
        hessian = jnp.einsum("cm,cmq,cmr->qr", about, slopes, slopes) + jnp.eye(len(z))
        return NLL(value, gradient, hessian)

    def effects(self, theta: Array, begin: Array, subject: Subject) -> Float[Array, " q"]:
        """The likeliest effects of a subject, from the given ones or from none, whichever are
        likelier: those that were found at far parameters may lead nowhere.

        Damped Fisher scoring with a correction of the expected Hessian by the gradients, as in
        Dennis, Gay and Welsch (1981), doi:10.1145/355958.355965: alone, it creeps where residuals
        are large.
        """

        def moments(flat):
            return self.moments(flat, subject)

        def step(state):
            trial, z, best, more, damping, count, _ = state
            found = self.nll(moments, theta, trial, subject.ys)
            good = found.value <= best.value + ROUNDING * (1 + jnp.abs(best.value))
            good &= jnp.isfinite(found.gradient).all() & jnp.isfinite(found.hessian).all()
            apart, change = trial - z, found.gradient - best.gradient
            corrected = secant(found.hessian + more, apart, change) - found.hessian

            def choose(new, old):
                return jnp.where(good, new, old)

            more = choose(jnp.where(count > 1, corrected, 0.0), more)
            z, best = jax.tree.map(choose, (trial, found), (z, best))
            damping = damping * jnp.where(good, LONGER, SHORTER)
            damped = best.hessian + damping * jnp.diag(jnp.diag(best.hessian))
            both = jnp.stack([damped + more, damped])  # as one: see `marginal`
            down = jnp.broadcast_to(best.gradient[None, :, None], (2, len(z), 1))
            move, plain = -jnp.linalg.solve(both, down)[..., 0]
            move = jnp.where(best.gradient @ move < 0, move, plain)
            move *= jnp.minimum(1.0, LONGEST / jnp.max(jnp.abs(move)))
            first = count == 0
            done = ~first & (jnp.max(jnp.abs(move)) < EFFECT_TOLERANCE)
            trial = jnp.where(first, begin, z + move)
            return trial, z, best, more, damping, count + 1, done

        def unfinished(state):
            return ~state[-1] & (state[-2] < EFFECT_STEPS)

        worst = NLL(jnp.asarray(jnp.inf, begin.dtype), 0 * begin, jnp.eye(len(begin)))
        damping = jnp.asarray(DAMPING, begin.dtype)
        none, zero = jnp.zeros_like(begin), 0 * worst.hessian
        state = none, none, worst, zero, damping, jnp.asarray(0), jnp.asarray(False)
        return jax.lax.while_loop(unfinished, step, state)[1]

    def expanded(self, flat: Float[Array, " n"], subject: Subject) -> Moments:
        """The moments near the parameters to second order, without derivatives by pairs of which
        neither varies. First derivatives of the likelihood and of its Hessian need no more, so
        that few directions are solved for."""

        def at(flat):
            found = self.moments(flat, subject)
            return found, found

        def slopes(flat):
            def near(vary):
                return at(flat.at[self.places].set(vary))

            along, found = jax.jacfwd(near, has_aux=True)(flat[self.places])
            return (found, along), (found, along)

        (slopes, curves), (value, _) = jax.jacfwd(slopes, has_aux=True)(flat)
        # [2, times, ..., q, n] to all pairs.
        pairs = jnp.zeros((*slopes.shape, len(flat)), flat.dtype)
        pairs = pairs.at[..., self.places, :].set(curves)
        pairs = pairs.at[..., self.places].set(jnp.swapaxes(curves, -1, -2))

        def near(moved):
            apart = moved - flat
            return value + slopes @ apart + 0.5 * (pairs @ apart) @ apart

        return near

    def marginal(self, theta: Array, z: Array, subject: Subject) -> "Evaluated":
        """By Laplace's method about the likeliest effects, from effects `z` near them, with the
        expected Hessian (FOCE with interaction). The gradient is exact.

        Of many subjects, each solve of linear systems is a call that waits for threads of XLA. Two
        at once can wait for each other forever (jaxlib 0.10), so each depends on the one before.
        """
        count = len(theta)
        moments = self.expanded(self.params_of(theta, z), subject)

        def both(together):
            found = self.nll(moments, together[:count], together[count:], subject.ys)
            root = jnp.linalg.cholesky(found.hessian)
            value = found.value + jnp.sum(jnp.log(jnp.diag(root)))
            return (value, found.gradient), (value, found.gradient)

        together = jnp.concatenate([theta, z])
        (by, of_down), (value, gradient) = jax.jacfwd(both, has_aux=True)(together)
        # A last step of Newton's, and how the likeliest effects change with theta, so that their
        # gradient stays zero.
        known = jnp.concatenate([gradient[:, None], of_down[:, :count]], axis=1)
        solved = -jnp.linalg.solve(of_down[:, count:] + 0 * by.sum(), known)
        last, moves = solved[:, 0], solved[:, 1:]
        # It is good near the likeliest effects alone: far from them, the Hessian may be singular.
        last = jnp.where(jnp.max(jnp.abs(last)) < LAST, last, 0.0)
        down = by[count:]
        value += down @ last - 0.5 * gradient @ last
        information = self.information(moments, theta, z + 0 * solved.sum(), subject.ys)
        return Evaluated(value, by[:count] + down @ moves, information, z + last, moves)

    def information(
        self, moments: Moments, theta: Array, z: Array, ys: Array
    ) -> Float[Array, "p p"]:
        """The expected Hessian of `theta`, of observations that are linear in the effects.

        Deviations also have the part whose mean is zero. It makes too much of them by a factor of
        1.5 or so, but near a deviation of zero, the rest vanishes.
        """
        flat = self.params_of(theta, z)
        seen = ~jnp.isnan(ys).reshape(-1)
        slopes = jax.jacfwd(moments)(flat).reshape(2, -1, len(flat))
        slopes = jnp.where(seen[:, None], slopes, 0.0)
        log_noise = jnp.where(seen, moments(flat)[1].reshape(-1), 0.0)

        def law(near):
            shared, root, of_noise = self.split(near)
            along = slopes[0][:, self.places] @ root
            each = log_noise + slopes[1] @ (shared - self.split(theta)[0])
            each += jnp.where(seen, of_noise.sum(), 0.0)
            columns = jnp.concatenate([slopes[0] @ shared[:, None], along], axis=1)
            return columns, along @ along.T + jnp.diag(jnp.exp(2 * each))

        of_columns, of_spread = jax.jacfwd(law)(theta)
        lower = jnp.linalg.cholesky(law(theta)[1])

        def white(matrix):
            return jax.scipy.linalg.solve_triangular(lower, matrix, lower=True)

        # One factor of the columns, and one from each side of the spread.
        n, k = of_columns.shape[:2]
        together = jnp.concatenate([of_columns, of_spread], axis=1)
        together = white(together.reshape(n, -1)).reshape(n, k + n, -1)
        of_columns, half = together[:, :k], jnp.swapaxes(together[:, k:], 0, 1)
        of_spread = white(half.reshape(n, -1)).reshape(n * n, -1)
        of_columns = of_columns.reshape(n * k, -1)
        return of_columns.T @ of_columns + 0.5 * of_spread.T @ of_spread


def secant(
    hessian: Float[Array, "n n"], apart: Float[Array, " n"], change: Float[Array, " n"]
) -> Float[Array, "n n"]:
    """The update of Broyden, Fletcher, Goldfarb and Shanno, so that `hessian @ apart` is the
    `change` of the gradient; the same matrix where it would not be positive."""
    along = hessian @ apart
    curved, known = apart @ along, apart @ change
    positive = (curved > 0) & (known > 0)
    old = jnp.outer(along, along) / jnp.where(positive, curved, 1.0)
    new = jnp.outer(change, change) / jnp.where(positive, known, 1.0)
    return jnp.where(positive, hessian - old + new, hessian)


class Evaluated(NamedTuple):
    """Of each subject, with the likeliest effects at `theta`."""

    values: Float[Array, " subjects"]
    """Minus the log-likelihoods."""
    scores: Float[Array, "subjects p"]
    """Their gradients."""
    information: Float[Array, "subjects p p"]
    """Their expected Hessians, about: of `Population.information`."""
    effects: Float[Array, "subjects q"]
    moves: Float[Array, "subjects q p"]
    """The derivatives of the effects."""


@compiled
def evaluated(
    population: Population, theta: Float[Array, " p"], begin: Float[Array, "subjects q"]
) -> Evaluated:
    """The likelihood of each subject, whose effects are searched from `begin`."""

    def one(each):
        begin, subject = each
        z = population.effects(theta, begin, subject)
        return population.marginal(theta, z, subject)

    return jax.vmap(one)((begin, population.subjects))
