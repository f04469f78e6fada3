"""A density as a flowjax distribution."""

import equinox as eqx
from flowjax.distributions import AbstractDistribution

from jaxode.density.density import Density


class FlowjaxDistribution(AbstractDistribution):
    """The flowjax interface, for one event and one condition."""

    density: Density
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)

    @classmethod
    def of_density(cls, density: Density) -> "FlowjaxDistribution":
        shapes = density.contexts.shapes
        if shapes is not None and len(shapes) > 1:
            raise ValueError(
                "interop.flowjax(density=...): the context must be one array; got shapes "
                f"{shapes}. Join them in the vector field."
            )
        condition = shapes[0] if shapes else None
        return cls(density=density, shape=density.event_shape, cond_shape=condition)

    def _context(self, condition):
        if condition is not None and self.cond_shape is None:
            # flowjax would pass the conditions of all samples to each of them.
            raise ValueError(
                "interop.flowjax(density=...): a condition needs a context whose shape is known. "
                "Pass context_shape= to bind."
            )
        return condition

    def _log_prob(self, x, condition=None):
        return self.density.log_prob(x, context=self._context(condition))

    def _sample(self, key, condition=None):
        return self.density.sample(key, context=self._context(condition))

    def _sample_and_log_prob(self, key, condition=None):
        return self.density.sample_and_log_prob(key, context=self._context(condition))
