"""Sums of the stages of a step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def weighted_sum(weights: Float[Array, "*sums stages"], k: Float[Array, "stages samples n"]):
    """`sum_i weights_i k_i`, or several of them."""
    return jnp.tensordot(weights, k, axes=1, precision=jax.lax.Precision.HIGHEST)
