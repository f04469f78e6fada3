"""A density as a distribution of numpyro."""

from typing import Any

import jax
import numpyro.distributions as dist
from jaxtyping import PyTree
from numpyro.distributions import constraints

from jaxode.flows.density import Density
from jaxode.flows.support import Box, OfNumpyro


class FlowDistribution(dist.Distribution):
    """What numpyro asks of a distribution. Its parameters are the leaves of the density."""

    pytree_data_fields = ("density", "context", "_support")

    def __init__(self, density: Density, context: PyTree = None, *, validate_args=None):
        self.density, self.context = density, context
        self._support: Any = _constraint(density)
        super().__init__(event_shape=density.event_shape, validate_args=validate_args)

    @property
    def support(self):
        return self._support

    def sample(self, key: Any, sample_shape=()):
        return self.density.sample(key, sample_shape, context=self.context)

    def sample_with_intermediates(self, key: Any, sample_shape=()):
        """Samples, and their log-densities from the same solve."""
        x, log_prob = self.density.sample_and_log_prob(key, sample_shape, context=self.context)
        return x, [log_prob]

    def log_prob(self, value: Any, intermediates=None):
        if intermediates:
            return intermediates[0]
        return self.density.log_prob(value, context=self.context)


def _constraint(density: Density) -> Any:
    event, support = len(density.event_shape), density.support
    if support is None:
        return constraints.independent(constraints.real, event)
    if isinstance(support, OfNumpyro):
        missing = event - support.constraint.event_dim
        return constraints.independent(support.constraint, missing)
    if isinstance(support, Box):
        low, high = support.low, support.high
        bounded = [bool(jax.numpy.isfinite(x).all()) for x in (low, high)]
        free = [bool(jax.numpy.isinf(x).all()) for x in (low, high)]
        if all(bounded):
            return constraints.independent(constraints.interval(low, high), event)
        if bounded[0] and free[1]:
            return constraints.independent(constraints.greater_than(low), event)
        if bounded[1] and free[0]:
            return constraints.independent(constraints.less_than(high), event)
        if all(free):
            return constraints.independent(constraints.real, event)
    raise ValueError(
        "interop.numpyro(density=...): coordinates must have the same kind of bounds; got a "
        f"support that numpyro has no constraint for, {support!r}. Use a site for each kind."
    )
