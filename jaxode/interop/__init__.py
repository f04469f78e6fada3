"""Flows in other libraries, which are imported only on use."""

from typing import Any

from jaxtyping import PyTree

from jaxode.density.density import Density
from jaxode.flows.bases import Torus, has_full_support


def numpyro(density: Density, context: PyTree = None) -> Any:
    """A numpyro `Distribution`: for priors (with NUTS, and in a `plate`), guides and likelihoods.

    Args:
        density: made by `jaxode.bind`.
        context: one context, shared by all samples. For a context per row, `jax.vmap` the model, or
            use `density.log_prob` in `numpyro.factor`.

    Raises:
        ValueError: for a flow of centred particles, whose density has no scale along a shift, and
            for one of angles.
        ModuleNotFoundError: if numpyro is not installed.
    """
    _check_all_coordinates("numpyro", density)
    from jaxode.interop.to_numpyro import NumpyroDistribution

    return NumpyroDistribution(density, context)


def flowjax(density: Density) -> Any:
    """A flowjax `AbstractDistribution`, conditional if it is called with a `condition`.

    Args:
        density: made by `jaxode.bind`. A context must be a single array whose shape is known from
            `standardize_context` or `context_shape`. In `log_prob` flowjax makes it floating: use
            one-hot vectors in place of labels.

    Raises:
        ValueError: if the context has several arrays, for centred particles and angles, and when
            called with a condition whose shape `bind` does not know.
        ModuleNotFoundError: if flowjax is not installed.
    """
    _check_all_coordinates("flowjax", density)
    from jaxode.interop.to_flowjax import FlowjaxDistribution

    return FlowjaxDistribution.of_density(density)


def _check_all_coordinates(name: str, density: Density) -> None:
    if not has_full_support(density.flow.base):
        raise ValueError(
            f"interop.{name}(density=...): needs a density of all coordinates; got one of centred "
            "configurations, which a shift does not change. Sample from the density itself."
        )
    if isinstance(density.flow.base, Torus):
        raise ValueError(
            f"interop.{name}(density=...): needs a density of numbers; got one of angles, which "
            f"{name} would take for numbers on the whole line. Sample from the density itself."
        )
