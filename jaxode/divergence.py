"""The divergence of a vector field: exact, or estimated without bias.

Each estimator is a function that returns a `Divergence`, and works on one sample: `g` maps
`z [*event]` to `dz [*event]`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

# Up to this many dimensions `auto` takes the exact trace: one Jacobian-vector product a dimension.
EXACT_UP_TO = 8

Field = Callable[[Float[Array, " *event"]], Float[Array, " *event"]]


class Divergence(NamedTuple):
    """A divergence as two pure functions, for one sample."""

    init: Callable[[PRNGKeyArray | None, Float[Array, " *event"]], Array | None]
    """`init(key, z) -> probe`: the noise of one solve, or None. Drawn once, then held fixed."""
    apply: Callable[[Field, Float[Array, " *event"], Array | None], tuple[Array, Array]]
    """`apply(g, z, probe) -> (g(z), divergence of g at z)`."""


def _push(g: Field, z: Float[Array, " *event"], tangents: Float[Array, "k *event"]):
    """`g(z)` and the inner products `v . (dg/dz v)` for every tangent, on one linearization."""
    dz, jvp = jax.linearize(g, z)
    return dz, jax.vmap(lambda v: jnp.sum(v * jvp(v)))(tangents)


def exact(chunk: int | None = None) -> Divergence:
    """The trace of the Jacobian, `sum_i e_i . (dg/dz e_i)`, one product for each dimension.

    Args:
        chunk: push this many of them at a time, which bounds the memory; all by default.

    Raises:
        ValueError: if `chunk` is not a positive integer.
    """
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"exact(chunk=...): must be a positive integer; got {chunk!r}.")

    def init(key, z):
        del key, z
        return None

    def apply(g, z, probe):
        del probe
        if chunk is None or chunk >= z.size:
            basis = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
            dz, terms = _push(g, z, basis)
            return dz, jnp.sum(terms)
        dz, jvp = jax.linearize(g, z)

        # Recomputed rather than stored for a gradient, or the chunks would not bound its memory.
        @jax.checkpoint
        def diagonal(i):
            v = (jnp.arange(z.size) == i).astype(z.dtype).reshape(z.shape)
            return jnp.sum(v * jvp(v))

        return dz, jnp.sum(jax.lax.map(diagonal, jnp.arange(z.size), batch_size=chunk))

    return Divergence(init, apply)


def hutchinson(
    probes: int = 1, distribution: Literal["rademacher", "gaussian", "orthogonal"] = "rademacher"
) -> Divergence:
    """The unbiased estimate `mean_k v_k . (dg/dz v_k)` with random probes, `E[v v^T] = I`.

    Args:
        probes: number of probes, which share one linearization of `g`.
        distribution: of the probes. "rademacher" has independent random signs and the smallest
            variance of those with independent entries; "gaussian" independent standard normals;
            "orthogonal" rows of a random orthogonal matrix, scaled: exact with as many probes as
            dimensions, and never more probes than dimensions.

    Raises:
        ValueError: at construction for an unknown distribution or number of probes; at trace time
            without a key.

    References: Hutchinson (1990); Grathwohl et al. (2019), arXiv:1810.01367.
    """
    draws = {
        "rademacher": lambda key, z: jax.random.rademacher(key, (probes, *z.shape), z.dtype),
        "gaussian": lambda key, z: jax.random.normal(key, (probes, *z.shape), z.dtype),
        "orthogonal": lambda key, z: _orthogonal(key, z, probes),
    }
    if distribution not in draws:
        raise ValueError(
            f"hutchinson(distribution=...): must be one of {sorted(draws)}; got {distribution!r}."
        )
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"hutchinson(probes=...): must be a positive integer; got {probes!r}.")

    def init(key, z):
        if key is None:
            raise ValueError(
                "hutchinson: a stochastic divergence needs random numbers; got key=None. "
                "Pass key=jax.random.key(...), or use divergence=jaxode.divergence.exact()."
            )
        return draws[distribution](key, z)

    def apply(g, z, probe):
        dz, terms = _push(g, z, probe)
        return dz, jnp.mean(terms)

    return Divergence(init, apply)


def _orthogonal(key: PRNGKeyArray, z: Float[Array, " *event"], probes: int):
    if probes > z.size:
        raise ValueError(
            f"hutchinson(probes=..., distribution='orthogonal'): at most one probe a dimension; "
            f"got {probes} for {z.size} dimensions. Use divergence=jaxode.divergence.exact()."
        )
    rows = jax.random.orthogonal(key, z.size, dtype=z.dtype)[:probes]
    return rows.reshape(probes, *z.shape) * np.sqrt(z.size).astype(z.dtype)


def auto() -> Divergence:
    """`exact()` for events of at most `EXACT_UP_TO` dimensions, `hutchinson()` for larger ones."""

    def choose(z):
        return exact() if z.size <= EXACT_UP_TO else hutchinson()

    def init(key, z):
        return choose(z).init(key, z)

    def apply(g, z, probe):
        return choose(z).apply(g, z, probe)

    return Divergence(init, apply)
