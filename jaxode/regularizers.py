"""Running costs along the trajectories of a flow. They make it easier to solve.

Pass them to `jaxode.cnf(regularizers=...)`. They are added to the training loss `nll`, and reuse
the evaluations that the divergence needs anyway.

Reference: Finlay et al. (2020), arXiv:2002.02798 ("RNODE").
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._checks.arguments import non_negative
from jaxode._checks.caller import arg, public

__all__ = ["Regularizer", "jacobian_frobenius", "kinetic_energy"]


class Regularizer(NamedTuple):
    """A running cost: `weight` times the mean over samples of its integral over time."""

    name: str
    """The name of its integrals in `NLLStats.running`."""
    weight: float
    cost: Callable[[Float[Array, " *event"], Array | None], Float[Array, ""]]
    """`cost(dz, norm)` from `dz = f(t, z)` and the squared Frobenius norm of `df/dz`."""
    needs_norm: bool = False
    """Whether it uses `norm`, which is None otherwise."""


@public("kinetic_energy")
def kinetic_energy(weight: float) -> Regularizer:
    """`weight` times the integral of `|f(t, z)|^2`. Favors straight paths with constant speed.

    Raises:
        ValueError: if the weight is negative or not finite.
    """
    return Regularizer("kinetic_energy", non_negative("weight", weight), _square)


@public("jacobian_frobenius")
def jacobian_frobenius(weight: float) -> Regularizer:
    """`weight` times the integral of `|df/dz|_F^2`. Favors fields that vary little in space.

    The divergence's probes give an unbiased estimate, `E |df/dz v|^2`. With
    `jaxode.divergence.exact()` it is exact.

    Raises:
        ValueError: if the weight is negative or not finite.
    """
    weight = non_negative("weight", weight)
    return Regularizer("jacobian_frobenius", weight, _norm, needs_norm=True)


def _square(dz: Array, norm: Array | None) -> Array:
    del norm
    return jnp.sum(dz * dz)


def _norm(dz: Array, norm: Array | None) -> Array:
    del dz
    assert norm is not None
    return norm


def check_regularizers(regularizers: Iterable[Regularizer]) -> tuple[Regularizer, ...]:
    """The regularizers as a tuple. Their names must differ."""
    as_tuple = tuple(regularizers) if isinstance(regularizers, Iterable) else (regularizers,)
    if not all(isinstance(regularizer, Regularizer) for regularizer in as_tuple):
        raise TypeError(
            f"{arg('regularizers')} must be a tuple of jaxode.regularizers; got {regularizers!r}."
        )
    names = [regularizer.name for regularizer in as_tuple]
    if len(set(names)) < len(names):
        raise ValueError(f"{arg('regularizers')} their names must differ; got {names}.")
    return as_tuple
