"""A density as a distribution of flowjax."""

import equinox as eqx
import jax
from flowjax.distributions import AbstractDistribution

from jaxode.flows.density import Density
from jaxode.flows.standardize import Affine


class FlowDistribution(AbstractDistribution):
    """What flowjax asks of a distribution: of one event and one condition."""

    density: Density
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)

    @classmethod
    def of(cls, density: Density) -> "FlowDistribution":
        context = density.of_context
        condition = jax.numpy.shape(context.mean) if isinstance(context, Affine) else None
        return cls(density=density, shape=density.event_shape, cond_shape=condition)

    def _log_prob(self, x, condition=None):
        return self.density.log_prob(x, context=condition)

    def _sample(self, key, condition=None):
        return self.density.sample(key, context=condition)

    def _sample_and_log_prob(self, key, condition=None):
        return self.density.sample_and_log_prob(key, context=condition)
