"""Flows in other libraries, which are imported only when they are asked for."""

from typing import Any

from jaxtyping import PyTree

from jaxode.flows.density import Density


def numpyro(density: Density, context: PyTree = None) -> Any:
    """A numpyro `Distribution`: a prior for NUTS, a guide, a likelihood in a `plate`.

    Args:
        density: made by `jaxode.bind`.
        context: one for all of its samples.

    Raises:
        ModuleNotFoundError: without numpyro.
    """
    from jaxode.interop.of_numpyro import FlowDistribution

    return FlowDistribution(density, context)


def flowjax(density: Density) -> Any:
    """A flowjax `AbstractDistribution`, conditional if it is called with a `condition`.

    Args:
        density: made by `jaxode.bind`. If it takes a context, `cond_shape` is that of
            `standardize`; without one it is unconditional.

    Raises:
        ModuleNotFoundError: without flowjax.
    """
    from jaxode.interop.of_flowjax import FlowDistribution

    return FlowDistribution.of(density)
