"""A density as a numpyro distribution."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import PyTree
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform

from jaxode.density.density import Density
from jaxode.density.maps.base import Map


class NumpyroDistribution(dist.Distribution):
    """The numpyro interface. Its parameters are the leaves of the density."""

    pytree_data_fields = ("density", "context")

    def __init__(self, density: Density, context: PyTree = None, *, validate_args=None):
        if context is not None:
            shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(context))
            density = dataclasses.replace(density, contexts=density.contexts.knowing(shapes))
        self.density, self.context = density, context
        super().__init__(event_shape=density.event_shape, validate_args=validate_args)

    @property
    def support(self):
        if self.density.support is None:
            return constraints.independent(constraints.real, len(self.event_shape))
        return _InSupport(self.density.support, self.event_shape)

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


class _Events:
    """A support and the shape of its events, as a pytree, which numpyro requires."""

    def __init__(self, support: Map, event: tuple[int, ...]):
        self.held, self.event = support, event

    def tree_flatten(self):
        return (self.held,), (("held",), {"event": self.event})

    def map(self, f, x):
        """Apply `f` to each event of a batch."""
        shape = x.shape[: x.ndim - len(self.event)]
        mapped = jax.vmap(f)(x.reshape(math.prod(shape), *self.event))
        return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), mapped)


class _InSupport(_Events, constraints.Constraint):
    """The support of a density as a constraint."""

    @property
    def event_dim(self):
        return len(self.event)

    def __call__(self, x):
        return self.map(self.held.contains, x)

    def feasible_like(self, prototype):
        return _ToSupport(self.held, self.event)(jnp.zeros_like(prototype))


class _ToSupport(_Events, Transform):
    """The bijection from real numbers to the support."""

    @property
    def domain(self):
        return constraints.independent(constraints.real, len(self.event))

    @property
    def codomain(self):
        return _InSupport(self.held, self.event)

    def __call__(self, x):
        return self.map(self.held.forward, x)[0]

    def _inverse(self, y):
        return self.map(self.held.inverse, y)[0]

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return -self.map(self.held.forward, x)[1]


@biject_to.register(_InSupport)
def _(constraint):
    return _ToSupport(constraint.held, constraint.event)
