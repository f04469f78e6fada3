"""What the search minimizes: sums of squares, and likelihoods that look like them near a point."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode.estimation.observed.likelihoods import Likelihood
from jaxode.estimation.observed.observed_system import ObservedODE

# Floor of the information of one observation about log(noise), by which gradients are divided.
LEAST_NOISE_INFORMATION = 1e-8
# Floor of the eigenvalues of the Hessian of a user's log-density, as a part of the largest one.
LEAST_CURVATURE = 1e-10


class LocalModel(NamedTuple):
    """An objective near a point: about `cost + r @ J @ d + |J @ d|**2 / 2` after a step `d`."""

    cost: Float[Array, ""]
    residuals: Float[Array, " m"]
    jacobian: Float[Array, "m n"]


class Objective(eqx.Module):
    """Half a sum of squares, or a cost that looks like one near a point."""

    mean_floor = 0.0
    """Floor of the mean squared residual (half of it) when it scales `hold`."""

    @property
    def count(self) -> int:
        """The number of quantities."""
        raise NotImplementedError

    def quantities(self, flat: Float[Array, " n"], start: Float[Array, " n"]) -> Array:
        """The numbers that need a solve with the parameters `flat`. The search linearizes them."""
        raise NotImplementedError

    def local(
        self, flat: Array, start: Array, quantities: Float[Array, " m"], jacobian: Array
    ) -> LocalModel:
        """The objective near `flat`, from its quantities and their Jacobian."""
        del flat, start
        return LocalModel(0.5 * jnp.sum(quantities**2), quantities, jacobian)

    def information(self, flat: Array, start: Array, quantities: Array, jacobian: Array) -> Array:
        """A root `[m, n]` of the Fisher information about the parameters."""
        return self.local(flat, start, quantities, jacobian).jacobian


class OfObservations(Objective):
    """The observations up to a time, and the prior."""

    problem: ObservedODE
    end: Float[Array, ""]

    @property
    def mean_floor(self) -> float:
        # The squares of a density may vanish at a start. Scale as if residuals were one.
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
    """Squares of a user's residuals."""

    def quantities(self, flat, start):
        params, problem = self.problem.unravel(flat), self.problem
        predicted, mask = problem.predicted(params, self.end), problem.mask(self.end)
        ys = jnp.where(mask, problem.ys, jax.lax.stop_gradient(predicted))
        residuals = jnp.where(mask, problem.residuals(predicted, ys, params), 0.0)
        return jnp.concatenate([residuals.ravel(), problem.prior_residuals(params)])


class OfLikelihood(OfObservations):
    """A likelihood of `LIKELIHOODS`: steps by its Fisher information (Fisher scoring)."""

    @property
    def count(self) -> int:
        return super().count + (self.problem.ys.size if callable(self.problem.noise) else 0)

    def quantities(self, flat, start):
        params, problem = self.problem.unravel(flat), self.problem
        vectors = [problem.predicted(params, self.end).ravel(), problem.prior_residuals(params)]
        if callable(problem.noise):
            noise = problem.noise_at(self.noise_params(flat, start))
            vectors.append(jnp.log(noise).ravel())
        return jnp.concatenate(vectors)

    def local(self, flat, start, quantities, jacobian):
        return self._weighed(quantities, jacobian, self.problem.likelihood.curvature)

    def information(self, flat, start, quantities, jacobian):
        likelihood = self.problem.likelihood

        def fisher(predicted, _, noise):
            return likelihood.information(predicted, noise)[0]

        return self._weighed(quantities, jacobian, fisher).jacobian

    def _weighed(self, quantities: Array, jacobian: Array, curvature: Any) -> LocalModel:
        """The model of steps on which predictions have this `curvature`."""
        problem, likelihood = self.problem, self.problem.likelihood
        shape, size, mask = problem.ys.shape, problem.ys.size, problem.mask(self.end)
        count = size if callable(problem.noise) else 0
        predicted, prior, log_noise = jnp.split(quantities, [size, len(quantities) - count])
        predicted = jnp.where(mask, predicted.reshape(shape), 1.0)
        ys = jnp.where(mask, problem.ys, 1.0)

        def noise_of(log_noise):
            if count:
                return jnp.exp(log_noise).reshape(shape)
            return jnp.broadcast_to(problem.noise, shape)

        def nll(predicted, log_noise):
            noise = noise_of(log_noise)
            values = likelihood.half_deviance(predicted, ys, noise)
            if count:
                values = values + likelihood.saturated(ys, noise)
            return jnp.sum(jnp.where(mask, values, 0.0))

        cost, (down, down_noise) = jax.value_and_grad(nll, (0, 1))(predicted, log_noise)
        noise = noise_of(log_noise)
        root = jnp.sqrt(curvature(predicted, ys, noise))
        residuals = [jnp.where(mask, down / root, 0.0).ravel(), prior]
        weights = [jnp.where(mask, root, 0.0).ravel(), jnp.ones_like(prior)]
        if count:
            about_noise = likelihood.information(predicted, noise)[1]
            about_noise = jnp.maximum(about_noise, LEAST_NOISE_INFORMATION)
            root = jnp.where(mask, jnp.sqrt(about_noise), 0.0).ravel()
            residuals.append(down_noise / jnp.where(root > 0, root, 1.0))
            weights.append(root)
        cost = cost + 0.5 * jnp.sum(prior**2)
        jacobian = jnp.concatenate(weights)[:, None] * jacobian
        return LocalModel(cost, jnp.concatenate(residuals), jacobian)


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

    def _curved(self, flat, start, quantities, jacobian, make_positive) -> LocalModel:
        """The model of steps with the eigenvalues of the Hessian made positive."""
        problem, mask = self.problem, self.problem.mask(self.end)
        size, shape = problem.ys.size, problem.ys.shape
        prior, unit = quantities[size:], jnp.maximum(jnp.abs(start), 1.0)

        def nll(step):
            predicted = (quantities[:size] + jacobian[:size] @ (unit * step)).reshape(shape)
            params = self.noise_params(flat + unit * step, start)
            ys = jnp.where(mask, problem.ys, jax.lax.stop_gradient(predicted))
            return jnp.sum(
                jnp.where(mask, -problem.likelihood(predicted, ys, problem.with_args(params)), 0.0)
            )

        no_step = jnp.zeros_like(flat)
        cost, down = jax.value_and_grad(nll)(no_step)
        hessian = jnp.nan_to_num(jax.hessian(nll)(no_step))
        values, vectors = jnp.linalg.eigh(hessian)
        values = make_positive(values)
        largest = jnp.maximum(jnp.max(values), LEAST_CURVATURE)
        roots = jnp.sqrt(jnp.maximum(values, LEAST_CURVATURE * largest))
        residuals = vectors @ (vectors.T @ down / roots)
        root = (vectors * roots[None]) @ vectors.T / unit[None]
        cost = cost + 0.5 * jnp.sum(prior**2)
        rows = jnp.concatenate([root, jacobian[size:]])
        return LocalModel(cost, jnp.concatenate([residuals, prior]), rows)


def of_observations(problem: ObservedODE, end: Float[Array, ""]) -> OfObservations:
    """The objective of the observations up to `end`."""
    if problem.likelihood is None:
        return OfResidual(problem, end)
    kind = OfLikelihood if isinstance(problem.likelihood, Likelihood) else OfDensity
    return kind(problem, end)
