"""The likelihood of a population, by Laplace's method over the effects."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from jaxode._jax.closure import compiled
from jaxode.estimation.observed.likelihoods import LOG_ROOT_2_PI
from jaxode.estimation.observed.observed_system import Experiment, ObservedSystem

# The largest number of steps of the search for the effects of a subject.
EFFECT_STEPS = 50
# It ends when the next step is below this, in standard deviations of the population.
EFFECT_TOLERANCE = 1e-5
# Cut its steps to this, in standard deviations of the population.
LONGEST_EFFECT_STEP = 3.0
# Leave out the last step of Newton's method if it is above this, in the same unit.
LONGEST_LAST_STEP = 1e-3
# Accept steps that raise the objective by less than this relative rounding.
OBJECTIVE_ROUNDING = 1e-9
# The damping at the start, as a part of the diagonal of the Hessian.
FIRST_DAMPING = 0.01
# Multiply the damping by this after a step that was accepted.
DAMPING_CUT = 0.2
# Multiply the damping by this after a step that was rejected.
DAMPING_GROWTH = 5.0


class NLL(NamedTuple):
    """Minus the logarithm of the density of a subject's observations and effects."""

    value: Float[Array, ""]
    gradient: Float[Array, " q"]
    """The gradient by the effects."""
    hessian: Float[Array, "q q"]
    """The expected Hessian by the effects."""


Moments = Callable[[Float[Array, " n"]], Float[Array, "2 times ..."]]


class Population(ObservedSystem):
    """Subjects with parameters `params + root @ z` in those that vary, and `z` standard normal."""

    noise: Callable[[Array, PyTree], Array] | None
    places: Int[Array, " q"]
    """Which entries of the vector of parameters vary between subjects."""
    correlated: bool
    subjects: Experiment
    """The data of all subjects, `[subjects, ...]`."""

    @property
    def shared(self) -> int:
        """The number of parameters of the population, without the noise."""
        return len(ravel_pytree(self.template)[0])

    def split(self, theta: Float[Array, " p"]) -> tuple[Array, Array, Array]:
        """The typical parameters, the root of the covariance, and the logarithm of the noise `[1]`,
        which is empty if `noise` is a function."""
        q, n = len(self.places), self.shared
        count = q * (q + 1) // 2 if self.correlated else q
        flat, root, log_noise = jnp.split(theta, [n, n + count])
        if not self.correlated:
            return flat, jnp.diag(root), log_noise
        return flat, jnp.zeros((q, q), theta.dtype).at[jnp.tril_indices(q)].set(root), log_noise

    def with_positive_root(self, theta: np.ndarray) -> tuple[np.ndarray, Float[Array, " q"]]:
        """Make the diagonal of the root positive. Also returns the signs by which this multiplies
        effects."""
        flat, root, log_noise = self.split(jnp.asarray(theta))
        signs = jnp.where(jnp.diag(root) < 0, -1.0, 1.0)
        root = root * signs[None, :]
        root = root[jnp.tril_indices(len(root))] if self.correlated else jnp.diag(root)
        return np.asarray(jnp.concatenate([flat, root, log_noise])), signs

    def params_of(self, theta: Float[Array, " p"], z: Float[Array, " q"]) -> Float[Array, " n"]:
        """The parameters of a subject with effects `z`, as a vector."""
        flat, root, _ = self.split(theta)
        return flat.at[self.places].add(root @ z)

    def states_of_rows(self, params: PyTree) -> tuple[PyTree, PyTree]:
        def of_subject(subject):
            return self.initial_state(params, subject), self.states_of(params, subject)

        return jax.vmap(of_subject)(self.subjects)

    def moments(self, flat: Float[Array, " n"], subject: Experiment) -> Float[Array, "2 times ..."]:
        """The mean of a subject's observations by its parameters, and the logarithm of their
        standard deviation, or zero if one number is the noise of all."""
        params = self.unravel(flat)
        mean, log_noise = self.prediction_of(params, subject), jnp.zeros(())
        if self.noise is not None:
            # Noise may be zero where an observation is missing.
            missing = jnp.isnan(subject.ys)
            log_noise = jnp.log(jnp.where(missing, 1.0, self.noise(mean, self.with_args(params))))
        return jnp.stack([mean, jnp.broadcast_to(log_noise, mean.shape)])

    def nll(self, moments: Moments, theta: Array, z: Array, ys: Array) -> NLL:
        """The density of a subject's observations and effects. Its `moments` are a function of its
        parameters."""

        def twice(z):
            values = moments(self.params_of(theta, z))
            return values, values

        slopes, (mean, log_noise) = jax.jacfwd(twice, has_aux=True)(z)
        if self.noise is None:
            log_noise += self.split(theta)[2][0]
        slopes = slopes.reshape(2, -1, len(z))
        mask = ~jnp.isnan(ys)
        residuals = jnp.where(mask, (ys - mean) / jnp.exp(log_noise), 0.0)
        terms = 0.5 * residuals**2 + log_noise + LOG_ROOT_2_PI
        value = jnp.sum(jnp.where(mask, terms, 0.0)) + 0.5 * jnp.sum(z**2)
        down = jnp.stack([-residuals / jnp.exp(log_noise), 1 - residuals**2])
        down = jnp.where(mask, down, 0.0)
        gradient = jnp.einsum("cm,cmq->q", down.reshape(2, -1), slopes) + z
        fisher = jnp.stack([jnp.exp(-2 * log_noise), jnp.full_like(mean, 2.0)])
        fisher = jnp.where(mask, fisher, 0.0).reshape(2, -1)
        hessian = jnp.einsum("cm,cmq,cmr->qr", fisher, slopes, slopes) + jnp.eye(len(z))
        return NLL(value, gradient, hessian)

    def effects(self, theta: Array, begin: Array, subject: Experiment) -> Float[Array, " q"]:
        """Search for the likeliest effects of a subject.

        The search starts from `begin` or from zero, whichever is likelier: `begin` comes from other
        parameters, and may be far. It is damped Fisher scoring, which alone creeps where residuals
        are large: gradients correct the expected Hessian, as in Dennis, Gay and Welsch (1981),
        doi:10.1145/355958.355965.
        """

        def moments(flat):
            return self.moments(flat, subject)

        def step(state):
            trial, z, best, correction, damping, count, _ = state
            at_trial = self.nll(moments, theta, trial, subject.ys)
            good = at_trial.value <= best.value + OBJECTIVE_ROUNDING * (1 + jnp.abs(best.value))
            good &= jnp.isfinite(at_trial.gradient).all() & jnp.isfinite(at_trial.hessian).all()
            taken, change = trial - z, at_trial.gradient - best.gradient
            corrected = secant(at_trial.hessian + correction, taken, change) - at_trial.hessian

            def choose(at_trial, before):
                return jnp.where(good, at_trial, before)

            correction = choose(jnp.where(count > 1, corrected, 0.0), correction)
            z, best = jax.tree.map(choose, (trial, at_trial), (z, best))
            damping = damping * jnp.where(good, DAMPING_CUT, DAMPING_GROWTH)
            damped = best.hessian + damping * jnp.diag(jnp.diag(best.hessian))
            matrices = jnp.stack([damped + correction, damped])  # one call: see `_after`
            down = jnp.broadcast_to(best.gradient[None, :, None], (2, len(z), 1))
            move, plain = -jnp.linalg.solve(matrices, down)[..., 0]
            move = jnp.where(best.gradient @ move < 0, move, plain)
            move *= jnp.minimum(1.0, LONGEST_EFFECT_STEP / jnp.max(jnp.abs(move)))
            first = count == 0
            done = ~first & (jnp.max(jnp.abs(move)) < EFFECT_TOLERANCE)
            trial = jnp.where(first, begin, z + move)
            return trial, z, best, correction, damping, count + 1, done

        def unfinished(state):
            return ~state[-1] & (state[-2] < EFFECT_STEPS)

        worst = NLL(jnp.asarray(jnp.inf, begin.dtype), 0 * begin, jnp.eye(len(begin)))
        damping = jnp.asarray(FIRST_DAMPING, begin.dtype)
        none, zero = jnp.zeros_like(begin), 0 * worst.hessian
        state = none, none, worst, zero, damping, jnp.asarray(0), jnp.asarray(False)
        return jax.lax.while_loop(unfinished, step, state)[1]

    def expanded(self, flat: Float[Array, " n"], subject: Experiment) -> Moments:
        """The moments near the parameters to second order.

        Second derivatives by two parameters that do not vary are left out: first derivatives of the
        likelihood and of its Hessian need none, and a solve has fewer directions without them.
        """

        def twice(flat):
            values = self.moments(flat, subject)
            return values, values

        def slopes(flat):
            def by_varying(varying):
                return twice(flat.at[self.places].set(varying))

            along, value = jax.jacfwd(by_varying, has_aux=True)(flat[self.places])
            return (value, along), (value, along)

        (slopes, curves), (value, _) = jax.jacfwd(slopes, has_aux=True)(flat)
        # From [2, times, ..., q, n] to all pairs of parameters.
        pairs = jnp.zeros((*slopes.shape, len(flat)), flat.dtype)
        pairs = pairs.at[..., self.places, :].set(curves)
        pairs = pairs.at[..., self.places].set(jnp.swapaxes(curves, -1, -2))

        def expansion(params):
            step = params - flat
            return value + slopes @ step + 0.5 * (pairs @ step) @ step

        return expansion

    def marginal(self, theta: Array, z: Array, subject: Experiment) -> "Evaluated":
        """Integrate over a subject's effects by Laplace's method, with the expected Hessian (FOCE
        with interaction), from effects `z` near the likeliest ones. The gradient is exact."""
        count = len(theta)
        moments = self.expanded(self.params_of(theta, z), subject)

        def integrated(together):
            nll = self.nll(moments, together[:count], together[count:], subject.ys)
            root = jnp.linalg.cholesky(nll.hessian)
            value = nll.value + jnp.sum(jnp.log(jnp.diag(root)))
            return (value, nll.gradient), (value, nll.gradient)

        together = jnp.concatenate([theta, z])
        (score, curves), (value, gradient) = jax.jacfwd(integrated, has_aux=True)(together)
        # A last step of Newton's method, and how the likeliest effects move with theta: the
        # gradient by effects stays zero.
        sides = jnp.concatenate([gradient[:, None], curves[:, :count]], axis=1)
        solved = -jnp.linalg.solve(_after(score, curves[:, count:]), sides)
        last, moves = solved[:, 0], solved[:, 1:]
        # Far from the likeliest effects, the Hessian may be singular, and the step useless.
        last = jnp.where(jnp.max(jnp.abs(last)) < LONGEST_LAST_STEP, last, 0.0)
        down = score[count:]
        value += down @ last - 0.5 * gradient @ last
        information = self.information(moments, theta, _after(solved, z), subject.ys)
        return Evaluated(value, score[:count] + down @ moves, information, z + last, moves)

    def information(
        self, moments: Moments, theta: Array, z: Array, ys: Array
    ) -> Float[Array, "p p"]:
        """The expected Hessian by `theta`, for observations that are linear in the effects.

        That by deviations includes a term whose mean is zero. It makes the Hessian too large by a
        factor of about 1.5, but near a deviation of zero, the other terms vanish.
        """
        flat = self.params_of(theta, z)
        mask = ~jnp.isnan(ys).reshape(-1)
        slopes = jax.jacfwd(moments)(flat).reshape(2, -1, len(flat))
        slopes = jnp.where(mask[:, None], slopes, 0.0)
        log_noise = jnp.where(mask, moments(flat)[1].reshape(-1), 0.0)

        def linear_model(at):
            shared, root, of_noise = self.split(at)
            along = slopes[0][:, self.places] @ root
            log_noises = log_noise + slopes[1] @ (shared - self.split(theta)[0])
            log_noises += jnp.where(mask, of_noise.sum(), 0.0)
            columns = jnp.concatenate([slopes[0] @ shared[:, None], along], axis=1)
            return columns, along @ along.T + jnp.diag(jnp.exp(2 * log_noises))

        of_columns, of_spread = jax.jacfwd(linear_model)(theta)
        lower = jnp.linalg.cholesky(linear_model(theta)[1])

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
    hessian: Float[Array, "n n"], step: Float[Array, " n"], change: Float[Array, " n"]
) -> Float[Array, "n n"]:
    """The update of Broyden, Fletcher, Goldfarb and Shanno, after which `hessian @ step` is the
    `change` of the gradient. Returns the same matrix if the updated one were not positive."""
    along = hessian @ step
    expected, measured = step @ along, step @ change
    positive = (expected > 0) & (measured > 0)
    removed = jnp.outer(along, along) / jnp.where(positive, expected, 1.0)
    added = jnp.outer(change, change) / jnp.where(positive, measured, 1.0)
    return jnp.where(positive, hessian - removed + added, hessian)


def _after(first: Array, x: Array) -> Array:
    """`x`, which the program computes after `first`.

    A solve of linear systems for many subjects waits for threads of XLA, and two at once can wait
    for each other forever (jaxlib 0.10), so each depends on the one before. XLA drops an
    `optimization_barrier` before it assigns threads; the product with zero stays.
    """
    return x + 0 * first.sum()


class Evaluated(NamedTuple):
    """The likelihood of each subject, and the likeliest effects."""

    values: Float[Array, " subjects"]
    """Minus the log-likelihoods."""
    scores: Float[Array, "subjects p"]
    """Their gradients by `theta`."""
    information: Float[Array, "subjects p p"]
    """Their expected Hessians, approximately: see `Population.information`."""
    effects: Float[Array, "subjects q"]
    moves: Float[Array, "subjects q p"]
    """The derivatives of the effects by `theta`."""


@compiled
def evaluated(
    population: Population, theta: Float[Array, " p"], begin: Float[Array, "subjects q"]
) -> Evaluated:
    """The likelihood of each subject. The search for its effects starts from `begin`."""

    def of_subject(pair):
        begin, subject = pair
        z = population.effects(theta, begin, subject)
        return population.marginal(theta, z, subject)

    return jax.vmap(of_subject)((begin, population.subjects))
