"""What the search minimizes: sums of squares, and likelihoods that look like them near a point."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode.estimation.observed.likelihoods import Likelihood
from jaxode.estimation.observed.observed_system import ObservedODE

LEAST_INFORMATION = 1e-8  # of an observation about log(noise), which divides
LEAST_CURVATURE = 1e-10  # of a user's log-density, as a part of the largest


class Local(NamedTuple):
    """An objective near a point: about `cost + r @ J @ d + |J @ d|**2 / 2` after a step `d`."""

    cost: Float[Array, ""]
    residuals: Float[Array, " m"]
    jacobian: Float[Array, "m n"]


class Objective(eqx.Module):
    """Half a sum of squares, or what can be stepped on as if it were one."""

    least_mean = 0.0
    """The least mean of half squared residuals, where it stands for their size."""

    @property
    def count(self) -> int:
        """The number of quantities."""
        raise NotImplementedError

    def quantities(self, flat: Float[Array, " n"], start: Float[Array, " n"]) -> Array:
        """What depends on the parameters `flat` through a solve. The search linearizes it."""
        raise NotImplementedError

    def local(
        self, flat: Array, start: Array, quantities: Float[Array, " m"], jacobian: Array
    ) -> Local:
        """The objective near `flat`, from its quantities and their Jacobian."""
        del flat, start
        return Local(0.5 * jnp.sum(quantities**2), quantities, jacobian)

    def information(self, flat: Array, start: Array, quantities: Array, jacobian: Array) -> Array:
        """A root `[m, n]` of the Fisher information about the parameters."""
        return self.local(flat, start, quantities, jacobian).jacobian


class OfObservations(Objective):
    """The observations up to a time, and the prior."""

    problem: ObservedODE
    end: Float[Array, ""]

    @property
    def least_mean(self) -> float:
        # The squares of a density may vanish, as if residuals were one.
        return 0.5 if self.problem.is_density else 0.0

    @property
    def count(self) -> int:
        problem = self.problem
        prior = jax.eval_shape(problem.prior_residuals, problem.template)
        return problem.ys.size + prior.size

    def noise_params(self, flat: Array, start: Array) -> Any:
        """The parameters of the noise: those at the start until all observations are fitted, since
        a few of them can be fitted exactly."""
        whole = self.end >= jnp.max(self.problem.ts)
        return self.problem.unravel(jnp.where(whole, flat, start))


class OfResidual(OfObservations):
    """A user's residuals."""

    def quantities(self, flat, start):
        params, problem = self.problem.unravel(flat), self.problem
        predicted, seen = problem.predicted(params, self.end), problem.seen(self.end)
        ys = jnp.where(seen, problem.ys, jax.lax.stop_gradient(predicted))
        apart = jnp.where(seen, problem.residuals(predicted, ys, params), 0.0)
        return jnp.concatenate([apart.ravel(), problem.prior_residuals(params)])


class OfLikelihood(OfObservations):
    """A likelihood that is known by name: steps by its Fisher information (Fisher scoring)."""

    @property
    def count(self) -> int:
        return super().count + (self.problem.ys.size if callable(self.problem.noise) else 0)

    def quantities(self, flat, start):
        params, problem = self.problem.unravel(flat), self.problem
        found = [problem.predicted(params, self.end).ravel(), problem.prior_residuals(params)]
        if callable(problem.noise):
            noise = problem.noise_at(self.noise_params(flat, start))
            found.append(jnp.log(noise).ravel())
        return jnp.concatenate(found)

    def local(self, flat, start, quantities, jacobian):
        return self._weighed(quantities, jacobian, self.problem.likelihood.curvature)

    def information(self, flat, start, quantities, jacobian):
        of = self.problem.likelihood

        def fisher(predicted, _, noise):
            return of.information(predicted, noise)[0]

        return self._weighed(quantities, jacobian, fisher).jacobian

    def _weighed(self, quantities: Array, jacobian: Array, curvature: Any) -> Local:
        problem, of = self.problem, self.problem.likelihood
        shape, size, seen = problem.ys.shape, problem.ys.size, problem.seen(self.end)
        count = size if callable(problem.noise) else 0
        predicted, prior, log_noise = jnp.split(quantities, [size, len(quantities) - count])
        predicted = jnp.where(seen, predicted.reshape(shape), 1.0)
        ys = jnp.where(seen, problem.ys, 1.0)

        def noise_of(log_noise):
            if count:
                return jnp.exp(log_noise).reshape(shape)
            return jnp.broadcast_to(problem.noise, shape)

        def nll(predicted, log_noise):
            noise = noise_of(log_noise)
            each = of.half_deviance(predicted, ys, noise)
            if count:
                each = each + of.saturated(ys, noise)
            return jnp.sum(jnp.where(seen, each, 0.0))

        cost, (down, down_noise) = jax.value_and_grad(nll, (0, 1))(predicted, log_noise)
        noise = noise_of(log_noise)
        root = jnp.sqrt(curvature(predicted, ys, noise))
        residuals = [jnp.where(seen, down / root, 0.0).ravel(), prior]
        weights = [jnp.where(seen, root, 0.0).ravel(), jnp.ones_like(prior)]
        if count:
            about = jnp.maximum(of.information(predicted, noise)[1], LEAST_INFORMATION)
            root = jnp.where(seen, jnp.sqrt(about), 0.0).ravel()
            residuals.append(down_noise / jnp.where(root > 0, root, 1.0))
            weights.append(root)
        cost = cost + 0.5 * jnp.sum(prior**2)
        jacobian = jnp.concatenate(weights)[:, None] * jacobian
        return Local(cost, jnp.concatenate(residuals), jacobian)


class OfDensity(OfObservations):
    """A user's log-density: steps by its exact Hessian, without that of the predictions."""

    def quantities(self, flat, start):
        params = self.problem.unravel(flat)
        predicted = self.problem.predicted(params, self.end)
        return jnp.concatenate([predicted.ravel(), self.problem.prior_residuals(params)])

    def local(self, flat, start, quantities, jacobian):
        return self._curved(flat, start, quantities, jacobian, jnp.abs)

    def information(self, flat, start, quantities, jacobian):
        def positive(values):
            return jnp.maximum(values, 0.0)

        return self._curved(flat, start, quantities, jacobian, positive).jacobian

    def _curved(self, flat, start, quantities, jacobian, make_positive) -> Local:
        problem, seen = self.problem, self.problem.seen(self.end)
        size, shape = problem.ys.size, problem.ys.shape
        prior, unit = quantities[size:], jnp.maximum(jnp.abs(start), 1.0)

        def nll(step):
            predicted = (quantities[:size] + jacobian[:size] @ (unit * step)).reshape(shape)
            params = self.noise_params(flat + unit * step, start)
            ys = jnp.where(seen, problem.ys, jax.lax.stop_gradient(predicted))
            return jnp.sum(
                jnp.where(seen, -problem.likelihood(predicted, ys, problem.given(params)), 0.0)
            )

        here = jnp.zeros_like(flat)
        cost, down = jax.value_and_grad(nll)(here)
        hessian = jnp.nan_to_num(jax.hessian(nll)(here))
        values, vectors = jnp.linalg.eigh(hessian)
        values = make_positive(values)
        largest = jnp.maximum(jnp.max(values), LEAST_CURVATURE)
        roots = jnp.sqrt(jnp.maximum(values, LEAST_CURVATURE * largest))
        residuals = vectors @ (vectors.T @ down / roots)
        root = (vectors * roots[None]) @ vectors.T / unit[None]
        cost = cost + 0.5 * jnp.sum(prior**2)
        rows = jnp.concatenate([root, jacobian[size:]])
        return Local(cost, jnp.concatenate([residuals, prior]), rows)


def of_observations(problem: ObservedODE, end: Float[Array, ""]) -> OfObservations:
    """The objective of the observations up to `end`."""
    if problem.likelihood is None:
        return OfResidual(problem, end)
    kind = OfLikelihood if isinstance(problem.likelihood, Likelihood) else OfDensity
    return kind(problem, end)
