"""Estimators of the trace with reduced variance, as divergences of jaxode."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxode.divergence import Divergence


def xtrace(products: int) -> Divergence:
    """XTrace of traceax, with a key for its noise. Epperly et al. (2024), arXiv:2301.07825."""

    def apply(g, z, key):
        import lineax
        import traceax

        dz, jvp = jax.linearize(g, z)
        like = jax.ShapeDtypeStruct(z.shape, z.dtype)
        operator = lineax.FunctionLinearOperator(jvp, like)
        return dz, traceax.XTraceEstimator()(key, operator, products)[0]

    return Divergence(lambda key, z: key, apply)


def hutch_plus_plus(products: int) -> Divergence:
    """The trace on the range of a few products, and an estimate of the rest.

    Meyer et al. (2021), arXiv:2010.09649.
    """
    third = products // 3

    def apply(g, z, probe):
        dz, jvp = jax.linearize(g, z)
        times = jax.vmap(jvp, 1, 1)
        q = jnp.linalg.qr(times(probe[:, :third]))[0]
        rest = probe[:, third:] - q @ (q.T @ probe[:, third:])
        both = jnp.concatenate([q, rest / np.sqrt(third)], axis=1)
        return dz, jnp.sum(both * times(both))

    draw = lambda key, z: jax.random.rademacher(key, (z.size, 2 * third), z.dtype)
    return Divergence(draw, apply)
