"""Flows in other libraries, which are imported only when they are asked for."""

from typing import Any

from jaxtyping import PyTree

from jaxode.flows.density import Density


def numpyro(density: Density, context: PyTree = None) -> Any:
    """A numpyro `Distribution`: a prior for NUTS, also in a `plate`, a guide, or a likelihood.

    Args:
        density: made by `jaxode.bind`.
        context: one for all of its samples. For a context of each row, `jax.vmap` the model or use
            `density.log_prob` in `numpyro.factor`.

    Raises:
        ModuleNotFoundError: without numpyro.
    """
    from jaxode.interop.of_numpyro import FlowDistribution

    return FlowDistribution(density, context)


def flowjax(density: Density) -> Any:
    """A flowjax `AbstractDistribution`, conditional if it is called with a `condition`.

    Args:
        density: made by `jaxode.bind`. If it takes a context, that is one array, and its shape is
            known from `standardize` or `context_shape`.

    Raises:
        ValueError: if a context has several arrays.
        ModuleNotFoundError: without flowjax.
    """
    from jaxode.interop.of_flowjax import FlowDistribution

    return FlowDistribution.of(density)
